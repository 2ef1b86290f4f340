"""Structure of a forgetting matrix: its approximate rank, and the loadings of its components."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from forgetcast.atlas.matrix import ForgettingMatrix
from forgetcast.completion.additive import additive_effects
from forgetcast.completion.factorisation import held_out_entries
from forgetcast.completion.logistic import f1, factor_logistic, is_binary
from forgetcast.completion.low_rank import fit_low_rank, sum_of
from forgetcast.errors import DataError
from forgetcast.results import Result

MAX_RANK = 10

F1_RANKS, F1_PRECISION = 5, 0.1
"""Highest rank and the prior's precision for F1, as in arXiv 2406.14026."""


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
        Empty where too few entries are observed to hold any out.
    row_r2, column_r2, additive_r2 : float
        R^2 of a_i alone, b_j alone, and a_i + b_j. That of a_i b_j, the multiplicative fit, is `rank_r2[0]`.
    rank_f1 : tuple of float
        For forgetting that is 0 or 1: F1 of the entries that logistic factorisation of rank 1 to 5 gives a probability
        of at least one half. Empty otherwise.
    components : tuple of Component
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

    def __repr__(self) -> str:
        return (
            f"Structure({self.tasks} tasks x {self.examples} examples, {self.measured:.0%} observed, "
            f"R^2 {self.additive_r2:.2f} additive, {self.rank_r2[0]:.2f} to {self.rank_r2[-1]:.2f} "
            f"of rank 1 to {len(self.rank_r2)})"
        )


def analyze(matrix: ForgettingMatrix, *, max_rank: int = MAX_RANK, components: int = 3) -> Structure:
    """Measure the structure of a forgetting matrix.

    Parameters
    ----------
    matrix : ForgettingMatrix, shape (M, N)
        NaN is legal; rows and columns without entries are skipped.
    max_rank : int
        Highest rank to fit; at most min(M, N).
    components : int
        Number of components to describe.

    Raises
    ------
    DataError
        If nothing is observed, or all observed entries are equal.
    """
    observed = matrix.observed
    rows, columns = np.flatnonzero(observed.any(axis=1)), np.flatnonzero(observed.any(axis=0))
    values = matrix.values[np.ix_(rows, columns)].astype(np.float64)
    if values.size == 0:
        raise DataError("the matrix has no measured entry")
    total = float(np.nansum((values - np.nanmean(values)) ** 2))
    if total == 0:
        raise DataError("all measured entries are equal: there is no structure to analyse")

    def r2(fit: np.ndarray) -> float:
        return 1.0 - float(np.nansum((values - fit) ** 2)) / total

    task_effects, example_effects = additive_effects(values)
    ranks = range(1, min(max_rank, *values.shape) + 1)
    fits = [fit_low_rank(values, rank, centred=False) for rank in ranks]
    described = fits[min(components, len(fits)) - 1]
    tasks = [matrix.tasks[i] for i in rows]
    return Structure(
        tasks=len(values),
        examples=values.shape[1],
        measured=float(np.mean(~np.isnan(values))),
        mean_by_task=dict(zip(tasks, np.nanmean(values, axis=1).tolist(), strict=True)),
        rank_r2=tuple(r2(low_rank.fit) for low_rank in fits),
        held_out_r2=_held_out_r2(values, len(fits)),
        row_r2=r2(np.nanmean(values, axis=1, keepdims=True)),
        column_r2=r2(np.nanmean(values, axis=0, keepdims=True)),
        additive_r2=r2(sum_of(task_effects, example_effects)),
        rank_f1=_binary_f1(values, min(len(fits), F1_RANKS)),
        components=_components(described.fit, described.loadings, [matrix.sources[j] for j in columns]),
    )


def _binary_f1(values: np.ndarray, ranks: int) -> tuple[float, ...]:
    if not is_binary(values):
        return ()
    observed, forgotten = ~np.isnan(values), values == 1
    scores = []
    for rank in range(1, ranks + 1):
        predicted = (factor_logistic(values, rank, F1_PRECISION).probability >= 0.5) & observed
        scores.append(f1(int((predicted & forgotten).sum()), int(forgotten.sum()), int(predicted.sum())))
    return tuple(scores)


def _held_out_r2(values: np.ndarray, ranks: int) -> tuple[float, ...]:
    split = held_out_entries(values)
    if split is None:
        return ()
    truth = split.values[split.held_out]
    total = float(((truth - truth.mean()) ** 2).sum()) or 1.0
    fits = (fit_low_rank(split.kept, rank, centred=False, rounds=100).fit for rank in range(1, ranks + 1))
    return tuple(1 - float(((fit[split.held_out] - truth) ** 2).sum()) / total for fit in fits)


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
