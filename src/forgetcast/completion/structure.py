"""Structure of a forgetting matrix: its approximate rank, and the loadings of its components."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import scipy  # submodules load lazily, so that starting is fast

from forgetcast.atlas.matrix import ForgettingMatrix
from forgetcast.completion.additive import additive_effects
from forgetcast.completion.factorisation import held_out_entries
from forgetcast.completion.influence import FewTokens, WithoutSource, few_tokens, largest_share, mean_per_token
from forgetcast.completion.logistic import f1, factor_logistic, is_binary
from forgetcast.completion.low_rank import fit_low_rank, sum_of
from forgetcast.errors import DataError
from forgetcast.results import Result

MAX_RANK = 10

F1_RANKS, F1_PRECISION = 5, 0.1
"""Highest rank and the prior's precision for F1, as in arXiv 2406.14026."""


MOST_SPLITS = 10
"""Random tenths of a small matrix that are held out in turn."""

ENOUGH_HELD_OUT = 5000
"""Held-out entries after which no further tenth is."""


@dataclass(frozen=True)
class Component:
    """One component of the rank-r fit and its loadings by source.

    Attributes
    ----------
    share : float
        Share of the fit's sum of squares.
    by_source : dict
        Mean loading of each source's examples, in units of the loadings' root mean square; the sign is chosen so
        that the average task has a positive coordinate, so positive means "forgotten when this component acts".
    between_sources : float
        Share of the loadings' variance that lies between sources (eta squared), in [0, 1].
    """

    share: float
    by_source: dict[str, float]
    between_sources: float


@dataclass(frozen=True)
class RunNoise:
    """How much two fine-tunes on the same task differ, by their seed alone.

    Attributes
    ----------
    tasks, rows : int
        Tasks with several rows, and how many rows these are.
    std : float
        Standard deviation between the seeds of a task, of one entry, pooled over entries and tasks; nats per token.
    residual_share : float or None
        Share of the held-out mean squared error of the best rank, fitted to a row per task, that is this noise: the
        part that no forecast can reach. None where nothing could be held out.
    """

    tasks: int
    rows: int
    std: float
    residual_share: float | None


@dataclass(frozen=True)
class Structure(Result):
    """Result of `analyze`. R^2 is over observed entries, with the sum of squares around the grand mean.

    Attributes
    ----------
    tasks, examples : int
    measured : float
        Share of the entries that are observed.
    mean_by_task : dict
        Mean forgetting of each task, nats per token.
    rank_r2 : tuple of float
        R^2 of the best rank-1, rank-2, ... reconstruction (truncated SVD, not centred, as in arXiv 2406.14026).
    held_out_r2 : tuple of float
        The same on a held-out tenth of the entries, on at most 1,000 examples. It falls where a rank explains noise.
        Of a small matrix, over up to ten random tenths: one would be little but chance. Without the last two ranks of
        few tasks or examples; empty where too few entries are observed to hold any out.
    row_r2, column_r2, additive_r2 : float
        R^2 of a_i alone, b_j alone, and a_i + b_j. That of a_i b_j, the multiplicative fit, is `rank_r2[0]`.
    rank_f1 : tuple of float
        For forgetting that is 0 or 1: F1 of the entries that logistic factorisation of rank 1 to 5 gives a probability
        of at least one half. Empty otherwise.
    components : tuple of Component
    noise : RunNoise or None
        None where no task has several rows.
    priors : int
        How many of the tasks were measured on another version of the base model.
    without : WithoutSource or None
        The best `held_out_r2`, or if there is none that of rank 1, fitted without the source that has most of the
        variation; None where the examples have one source.
    rank_correlation : tuple of float
        Of the held-out entries with their fit by rank 1, 2, ... (Spearman): a few large entries cannot carry it.
    median_error : tuple of float
        Median absolute error of the held-out entries by rank 1, 2, ..., nats per token: nor can they carry this.
    mean_per_token : float or None
        Mean forgetting with examples weighted by their target tokens; None where these are not known.
    few_tokens : FewTokens or None
        None where no example is known to have so few target tokens.
    """

    kind: ClassVar[str] = "structure"

    tasks: int
    examples: int
    measured: float
    mean_by_task: dict[str, float]
    rank_r2: tuple[float, ...]
    held_out_r2: tuple[float, ...]
    row_r2: float
    column_r2: float
    additive_r2: float
    rank_f1: tuple[float, ...]
    components: tuple[Component, ...]
    noise: RunNoise | None = None
    priors: int = 0
    without: WithoutSource | None = None
    rank_correlation: tuple[float, ...] = ()
    median_error: tuple[float, ...] = ()
    mean_per_token: float | None = None
    few_tokens: FewTokens | None = None

    def __repr__(self) -> str:
        return (
            f"Structure({self.tasks} tasks x {self.examples} examples, {self.measured:.0%} observed, "
            f"R^2 {self.additive_r2:.2f} additive, {self.rank_r2[0]:.2f} to {self.rank_r2[-1]:.2f} "
            f"of rank 1 to {len(self.rank_r2)})"
        )


def analyze(
    matrix: ForgettingMatrix,
    *,
    max_rank: int = MAX_RANK,
    components: int = 3,
    replicates: Mapping[str, str] | None = None,
    priors: Collection[str] = (),
    tokens: np.ndarray | None = None,
) -> Structure:
    """Measure the structure of a forgetting matrix.

    Parameters
    ----------
    matrix : ForgettingMatrix, shape (M, N)
        NaN is legal; rows and columns without entries are skipped.
    max_rank : int
        Highest rank to fit; at most min(M, N).
    components : int
        Number of components to describe.
    replicates : mapping of str to str, optional
        Task of each row by the row's name, where rows are of the same task with another seed.
    priors : collection of str, optional
        Names of the rows that were measured on another version of the base model, to be counted: `Atlas.priors`.
    tokens : array of int, shape (N,), optional
        Target tokens of each example; for forgetting of the loss.

    Raises
    ------
    DataError
        If nothing is observed, or all observed entries are equal.
    """
    observed = matrix.observed
    rows, columns = np.flatnonzero(observed.any(axis=1)), np.flatnonzero(observed.any(axis=0))
    values = matrix.values[np.ix_(rows, columns)].astype(np.float64)
    if values.size == 0:
        raise DataError(
            "the matrix has no measured entry; an atlas gets its rows by `forgetcast collect` or `forgetcast add`"
        )
    total = float(np.nansum((values - np.nanmean(values)) ** 2))
    if total == 0:
        raise DataError("all measured entries are equal: there is no structure to analyse")

    def r2(fit: np.ndarray) -> float:
        return 1.0 - float(np.nansum((values - fit) ** 2)) / total

    task_effects, example_effects = additive_effects(values)
    ranks = range(1, min(max_rank, *values.shape) + 1)
    fits = [fit_low_rank(values, rank, centred=False) for rank in ranks]
    described = fits[min(components, len(fits)) - 1]
    tasks, sources = [matrix.tasks[i] for i in rows], [matrix.sources[j] for j in columns]
    held_out, correlations, medians = _held_out(values, len(fits))
    counts = None if tokens is None else np.asarray(tokens)[columns]
    best = int(np.argmax(held_out)) + 1 if held_out else 1
    return Structure(
        tasks=len(values),
        examples=values.shape[1],
        measured=float(np.mean(~np.isnan(values))),
        mean_by_task=dict(zip(tasks, np.nanmean(values, axis=1).tolist(), strict=True)),
        rank_r2=tuple(r2(low_rank.fit) for low_rank in fits),
        held_out_r2=held_out,
        row_r2=r2(np.nanmean(values, axis=1, keepdims=True)),
        column_r2=r2(np.nanmean(values, axis=0, keepdims=True)),
        additive_r2=r2(sum_of(task_effects, example_effects)),
        rank_f1=reconstruction_f1(values, min(len(fits), F1_RANKS)) if is_binary(values) else (),
        components=_components(described.fit, described.loadings, sources),
        noise=_run_noise(values, [(replicates or {}).get(task, task) for task in tasks], max_rank),
        priors=len(set(priors).intersection(tasks)),
        without=_without(values, sources, best),
        rank_correlation=correlations,
        median_error=medians,
        mean_per_token=None if counts is None else mean_per_token(values, counts),
        few_tokens=None if counts is None else few_tokens(values, counts),
    )


def _without(values: np.ndarray, sources: Sequence[str], rank: int) -> WithoutSource | None:
    """Return the held-out R^2 of a rank without the source that has most of the variation; None where there is none.

    Where nothing can be held out, it is the R^2 of the fit.
    """
    deviations = np.nansum((values - np.nanmean(values)) ** 2, axis=0)
    if (largest := largest_share(sources, deviations)) is None:
        return None
    rest = values[:, np.array(sources) != largest.source]
    rest = rest[(~np.isnan(rest)).any(axis=1)]
    if rank > min(rest.shape) or np.nanvar(rest) == 0:
        return None
    if held_out := _held_out(rest, rank, lowest=rank)[0]:
        return replace(largest, value=held_out[-1])
    fit = fit_low_rank(rest, rank, centred=False).fit
    return replace(largest, value=1 - float(np.nanmean((rest - fit) ** 2) / np.nanvar(rest)))


def reconstruction_f1(values: np.ndarray, ranks: int = F1_RANKS) -> tuple[float, ...]:
    """Return F1 of the entries that logistic factorisation of rank 1, 2, ... gives a probability of at least one half.

    Parameters
    ----------
    values : array, shape (M, N)
        Of 0, 1 and NaN.
    ranks : int
    """
    observed, forgotten = ~np.isnan(values), values == 1
    scores = []
    for rank in range(1, ranks + 1):
        predicted = (factor_logistic(values, rank, F1_PRECISION).probability >= 0.5) & observed
        scores.append(f1(int((predicted & forgotten).sum()), int(forgotten.sum()), int(predicted.sum())))
    return tuple(scores)


def _held_out(values: np.ndarray, ranks: int, lowest: int = 1) -> tuple[tuple[float, ...], ...]:
    """Return R^2, rank correlation and median absolute error of held-out entries by their fit of each rank.

    None if none can be held out.
    """
    truth, fits = _held_out_fits(values, ranks, lowest)
    total = float(truth.var()) if len(fits) else 0.0
    r2 = tuple(1 - float(((fit - truth) ** 2).mean()) / (total or 1.0) for fit in fits)
    medians = tuple(float(np.median(np.abs(fit - truth))) for fit in fits)
    if not total:
        return r2, (), medians
    ranked = (float(scipy.stats.spearmanr(fit, truth).statistic) if np.ptp(fit) else 0.0 for fit in fits)
    return r2, tuple(ranked), medians


def _held_out_errors(values: np.ndarray, ranks: int) -> list[float]:
    """Return the held-out mean squared error of each rank, none if nothing can be held out."""
    truth, fits = _held_out_fits(values, ranks)
    return [float(((fit - truth) ** 2).mean()) for fit in fits]


def _held_out_fits(values: np.ndarray, ranks: int, lowest: int = 1) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return held-out entries, and their fit by each rank; no fits if nothing can be held out.

    A matrix of few tasks is split several times. Ranks within one of the full rank are left out: where an entry is
    held out, they leave nothing to tell it by, and it keeps the value that the fit starts from.
    """
    tried = range(lowest, min(ranks, min(values.shape) - 2) + 1)
    truths: list[np.ndarray] = []
    fits: list[list[np.ndarray]] = [[] for _ in tried]
    for seed in range(MOST_SPLITS if tried else 0):
        split = held_out_entries(values, seed)
        if split is None:
            continue
        truths.append(split.values[split.held_out])
        for found, rank in zip(fits, tried, strict=True):
            found.append(fit_low_rank(split.kept, rank, centred=False, rounds=100).fit[split.held_out])
        if sum(map(len, truths)) >= ENOUGH_HELD_OUT:
            break
    return (np.concatenate(truths), [np.concatenate(each) for each in fits]) if truths else (np.empty(0), [])


def _run_noise(values: np.ndarray, tasks: Sequence[str], max_rank: int) -> RunNoise | None:
    """Pool the variances between the rows of a task; None if no entry was measured twice."""
    labels = np.array(tasks)
    groups = [rows for task in dict.fromkeys(tasks) if len(rows := np.flatnonzero(labels == task)) > 1]
    squares, freedom = 0.0, 0
    for rows in groups:
        both = values[rows][:, (~np.isnan(values[rows])).sum(axis=0) > 1]
        squares += float(np.nansum((both - np.nanmean(both, axis=0)) ** 2))
        freedom += int((~np.isnan(both)).sum()) - both.shape[1]
    if not freedom:
        return None
    # A second row of a task would tell of the first one's entries what a forecast cannot know.
    first = values[[tasks.index(task) for task in dict.fromkeys(tasks)]]
    first = first[:, (~np.isnan(first)).any(axis=0)]
    errors = _held_out_errors(first, min(max_rank, *first.shape))
    variance = squares / freedom
    return RunNoise(
        tasks=len(groups),
        rows=sum(map(len, groups)),
        std=float(np.sqrt(variance)),
        residual_share=variance / min(errors) if errors and min(errors) > 0 else None,
    )


def _components(low_rank: np.ndarray, loadings: np.ndarray, sources: Sequence[str]) -> tuple[Component, ...]:
    labels = np.array(sources)
    names = sorted(set(sources))
    squares = (loadings**2).sum(axis=0)
    components = []
    for loading, square in zip(loadings.T, squares, strict=True):
        unit = loading / np.sqrt(np.mean(loading**2))
        if (low_rank @ unit).mean() < 0:
            unit = -unit
        means = {name: float(unit[labels == name].mean()) for name in names}
        between = sum(float((labels == name).mean()) * (means[name] - unit.mean()) ** 2 for name in names)
        components.append(Component(float(square / squares.sum()), means, float(between / max(unit.var(), 1e-30))))
    return tuple(components)
