"""Difference of two score files of the same examples: its size, uncertainty and location; `gates` judges it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np
import scipy  # submodules load lazily, so that starting is fast

from forgetcast.errors import MismatchError
from forgetcast.measure.scores import NATS_PER_TOKEN, Scores, check_tokens, flips, forgetting, unit_of
from forgetcast.results import Result
from forgetcast.stats import holm, mean_interval, wilcoxon_p, worst_part

FEW_TOKENS = 4
"""Examples with fewer target tokens are named as such."""

WORST = 10
"""Number of examples listed as the most forgotten."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A figure of some examples, in the unit of their losses.

    Attributes
    ----------
    examples : int
        Number of examples that have the figure.
    mean, median : float
    lower, upper : float or None
        95 % interval of the mean, from resampled examples or clusters (`stats.mean_interval`). None if there is only
        one of them.
    worst_tenth, worst_hundredth : float
        Mean of the largest tenth or hundredth (at least one example).
    standard_error : float or None
        Of the mean; None as for the interval.
    clusters : int or None
        Number of clusters that were resampled. None: the examples were, as if they were independent.
    """

    examples: int
    mean: float
    median: float
    lower: float | None
    upper: float | None
    worst_tenth: float
    worst_hundredth: float
    standard_error: float | None = None
    clusters: int | None = None


@dataclass(frozen=True, kw_only=True)
class Change(Summary):
    """Forgetting over the examples scored on both sides: loss after minus loss before.

    Attributes
    ----------
    share_worse : float
        Fraction of the examples whose loss rose.
    per_token : float or None
        Mean with each example weighted by its target tokens; None where a number of tokens is not known.
    few_tokens : int
        Number of examples with fewer than `FEW_TOKENS` target tokens. Their mean loss is of so few tokens that it moves
        far, and counts as much as that of a long text.
    few_tokens_mean : float or None
        Mean of these.
    """

    share_worse: float
    per_token: float | None = None
    few_tokens: int = 0
    few_tokens_mean: float | None = None


@dataclass(frozen=True, kw_only=True)
class Divergence(Summary):
    """KL divergence of the second model's predictions from those of a reference: KL(reference || model).

    Attributes
    ----------
    reference : str or None
        Name of the reference model.
    """

    reference: str | None = None


@dataclass(frozen=True)
class Noise:
    """How far the same losses differ when they are measured again with other batches.

    Attributes
    ----------
    before_rms, after_rms : float or None
        Root mean square difference of an example's two measurements; None if that side was measured once.
    mean : float
        Effect on the mean change. Of each side it is the difference of its two means or, if that is smaller,
        `rms / sqrt(N)`, which independent errors would give; the sides are added in squares.
    exceeds_change : bool
        Whether the mean change is smaller than that, so that it may be due to the measurement alone.
    """

    before_rms: float | None
    after_rms: float | None
    mean: float
    exceeds_change: bool


@dataclass(frozen=True)
class Flips:
    """Answers that changed from right to wrong or back.

    Attributes
    ----------
    examples : int
    right_before, right_after : float
        Fraction of right answers.
    right_to_wrong, wrong_to_right : int
    mcnemar_p : float or None
        Exact p-value of "both changes are equally likely" (McNemar 1947). None where examples are clustered: the test
        needs independent ones.
    """

    examples: int
    right_before: float
    right_after: float
    right_to_wrong: int
    wrong_to_right: int
    mcnemar_p: float | None


@dataclass(frozen=True)
class Difference(Result):
    """Paired difference of two score files.

    Attributes
    ----------
    loss : Change or None
        None where no example has a loss on both sides.
    wilcoxon_p : float or None
        p-value of "the changes are symmetric about zero" (Wilcoxon's signed ranks), of the clusters' means if there are
        clusters.
    flips : Flips or None
        None where a side has no exact match.
    unscored : int
        Number of examples without a loss on a side; they count in `flips` only.
    by_source : dict
        `Change` by source, largest mean first; empty if no sources were given. Where the clusters are the sources, its
        interval is from resampled examples: of one source there is no second cluster.
    worst : tuple of dict
        The most forgotten examples: id, before, after, change.
    lost : int
        Number of examples that the first file has a score of and the second has not: no loss, no exact match although
        both files have that column, or no KL divergence.
    by_source_p : dict
        p-value by source, as `wilcoxon_p`, after Holm's correction for the number of sources.
    kl : Divergence or None
        None where the second file has no KL divergence.
    noise : Noise or None
        None where neither side was measured twice.
    different_tokens : int or None
        Number of examples scored on other tokens or targets on the two sides; None if that is unknown.
    unit : str
        Unit of the losses: "nats per token", or what the logs of another tool state. Several, where tasks differ;
        "unit unknown" where a log states none. A KL divergence is in nats per token.
    """

    kind: ClassVar[str] = "difference"

    loss: Change | None
    wilcoxon_p: float | None
    flips: Flips | None
    unscored: int
    by_source: dict[str, Change]
    worst: tuple[dict[str, Any], ...]
    lost: int = 0
    by_source_p: dict[str, float] = field(default_factory=dict)
    kl: Divergence | None = None
    noise: Noise | None = None
    different_tokens: int | None = None
    unit: str = NATS_PER_TOKEN

    def __repr__(self) -> str:
        """Size, mean forgetting with its interval, and flips."""
        parts = [f"{self.unscored} unscored"]
        if (loss := self.loss) is not None:
            interval = "" if loss.lower is None else f" ({loss.lower:+.3f} to {loss.upper:+.3f})"
            parts.insert(0, f"mean {loss.mean:+.3f}{interval} {self.unit}")
            parts.insert(0, f"{loss.examples} examples")
        if self.flips is not None:
            parts.append(f"{self.flips.right_to_wrong} right to wrong, {self.flips.wrong_to_right} wrong to right")
        return f"Difference({', '.join(parts)})"

    def figures(self) -> dict[str, float]:
        """Return every figure that a condition may name; one that is not known is not there."""
        parts = (("", self.loss), ("", self.flips), ("kl_", self.kl))
        figures: dict[str, float | None] = {
            f"{prefix}{name}": value
            for prefix, part in parts
            if part is not None
            for name, value in asdict(part).items()
            if name not in ("examples", "clusters", "reference")
        }
        figures["wilcoxon_p"] = self.wilcoxon_p
        figures["noise"] = self.noise.mean if self.noise is not None else None
        figures["unscored"] = self.unscored
        scored = self.loss.examples if self.loss is not None else 0
        figures["unscored_share"] = self.unscored / (self.unscored + scored)
        return {name: value for name, value in figures.items() if value is not None}


def difference(
    before: Scores,
    after: Scores,
    *,
    sources: Sequence[str] | None = None,
    clusters: Sequence[str] | None = None,
    allow_different_tokens: bool = False,
) -> Difference:
    """Compare two models' scores of the same examples, pair by pair.

    Parameters
    ----------
    before, after : Scores
    sources : sequence of str, optional
        Source of each of `before.ids`.
    clusters : sequence of str, optional
        Cluster of each of `before.ids`. Examples of one cluster, such as the parts of one document, may change
        together; intervals and p-values then rest on the number of clusters. Default: all examples are independent.
    allow_different_tokens : bool
        Whether to compare examples, too, that were scored on other tokens or targets.

    Raises
    ------
    MismatchError
        If the two are of different examples, in different units, or of different tokens, which are not allowed.
    """
    pools = {before.pool_fingerprint, after.pool_fingerprint} - {None}
    if len(pools) > 1:
        raise MismatchError("the two score files are of different pools; score both models on the same one")
    if set(before.ids) != set(after.ids):
        odd = sorted(set(before.ids) ^ set(after.ids))
        raise MismatchError(f"{len(odd)} example(s) are in only one of the score files, e.g. {odd[0]!r}")
    after, unit = after.subset(before.ids), unit_of(before, after)
    different = check_tokens(before, after, allow_different=allow_different_tokens)
    change = forgetting(before, after)
    scored = np.flatnonzero(~np.isnan(change))
    labels, groups = (None if names is None else np.array(names) for names in (sources, clusters))
    by_source, by_source_p = {}, {}
    if labels is not None:
        within = None if groups is None or (groups == labels).all() else groups
        parts = {name: scored[labels[scored] == name] for name in sorted(set(labels[scored].tolist()))}
        for name, rows in parts.items():
            by_source[name] = _change(change[rows], _of(within, rows), before.tokens[rows])
            by_source_p[name] = _wilcoxon(change[rows], _of(within, rows))
        by_source_p = dict(zip(by_source_p, holm(list(by_source_p.values())).tolist(), strict=True))
    worst = scored[np.argsort(-change[scored], kind="stable")[:WORST]]
    return Difference(
        loss=_change(change[scored], _of(groups, scored), before.tokens[scored]) if len(scored) else None,
        wilcoxon_p=_wilcoxon(change[scored], _of(groups, scored)) if len(scored) else None,
        flips=_flips(before, after, clustered=groups is not None),
        unscored=len(change) - len(scored),
        different_tokens=different,
        by_source=dict(sorted(by_source.items(), key=lambda item: -item[1].mean)),
        worst=tuple(
            {
                "id": before.ids[i],
                "before": float(before.nll[i]),
                "after": float(after.nll[i]),
                "change": float(change[i]),
            }
            for i in worst.tolist()
        ),
        lost=_lost(before, after),
        by_source_p=by_source_p,
        kl=_divergence(after, groups),
        noise=_noise(before, after, change[scored].mean(), scored) if len(scored) else None,
        unit=unit,
    )


def documents(ids: Iterable[str]) -> tuple[str, ...]:
    """Return the document that each id belongs to: the id up to its last "#", as parts of a split document have it."""
    return tuple(id_.rpartition("#")[0] or id_ for id_ in ids)


def _of(groups: np.ndarray | None, rows: np.ndarray) -> np.ndarray | None:
    return None if groups is None else groups[rows]


def _summary(values: np.ndarray, groups: np.ndarray | None) -> dict[str, Any]:
    """Fields of a `Summary`."""
    interval = mean_interval(values, groups)
    return {
        "examples": len(values),
        "mean": interval.mean,
        "median": float(np.median(values)),
        "lower": interval.lower,
        "upper": interval.upper,
        "worst_tenth": worst_part(values, 10),
        "worst_hundredth": worst_part(values, 100),
        "standard_error": interval.standard_error,
        "clusters": None if groups is None else interval.units,
    }


def _change(change: np.ndarray, groups: np.ndarray | None, tokens: np.ndarray) -> Change:
    few = (tokens > 0) & (tokens < FEW_TOKENS)
    return Change(
        **_summary(change, groups),
        share_worse=float((change > 0).mean()),
        per_token=float(np.average(change, weights=tokens)) if tokens.all() else None,
        few_tokens=int(few.sum()),
        few_tokens_mean=float(change[few].mean()) if few.any() else None,
    )


def _wilcoxon(change: np.ndarray, groups: np.ndarray | None) -> float:
    if groups is None:
        return wilcoxon_p(change)
    codes = np.unique(groups, return_inverse=True)[1]
    return wilcoxon_p(np.bincount(codes, change) / np.bincount(codes))


def _divergence(after: Scores, groups: np.ndarray | None) -> Divergence | None:
    if after.kl is None or not len(rows := np.flatnonzero(~np.isnan(after.kl))):
        return None
    return Divergence(**_summary(after.kl[rows], _of(groups, rows)), reference=after.metadata.get("reference"))


def _noise(before: Scores, after: Scores, mean_change: float, scored: np.ndarray) -> Noise | None:
    """Compare repeated measurements; `before` and `after` have the same ids in the same order."""
    rms: list[float | None] = []
    shifts = []
    for scores in (before, after):
        gap = np.empty(0) if scores.repeats is None else (scores.repeats - scores.nll)[scored]
        gap = gap[~np.isnan(gap)]
        rms.append(float(np.sqrt((gap**2).mean())) if len(gap) else None)
        if len(gap):
            shifts.append(max(abs(gap.mean()), np.sqrt((gap**2).mean() / len(gap))))
    if not shifts:
        return None
    mean = float(np.sqrt(np.square(shifts).sum()))
    return Noise(before_rms=rms[0], after_rms=rms[1], mean=mean, exceeds_change=bool(abs(mean_change) < mean))


def _lost(before: Scores, after: Scores) -> int:
    """Count the examples with a score before but not after; both have the same ids in the same order."""
    lost = ~np.isnan(before.nll) & np.isnan(after.nll)
    if before.exact_match is not None and after.exact_match is not None:
        lost |= ~np.isnan(before.exact_match) & np.isnan(after.exact_match)
    if after.kl is not None:
        lost |= ~np.isnan(before.nll) & np.isnan(after.kl)
    return int(lost.sum())


def _flips(before: Scores, after: Scores, *, clustered: bool) -> Flips | None:
    """Count the flips both ways; `before` and `after` have the same ids in the same order."""
    if before.exact_match is None or after.exact_match is None:
        return None
    right = np.stack([before.exact_match, after.exact_match])
    right = right[:, ~np.isnan(right).any(axis=0)]
    if not right.shape[1]:
        return None
    lost, won = int(np.nansum(flips(before, after))), int(np.nansum(flips(after, before)))
    p = float(scipy.stats.binomtest(lost, lost + won).pvalue) if lost + won else 1.0
    return Flips(
        examples=right.shape[1],
        right_before=float(right[0].mean()),
        right_after=float(right[1].mean()),
        right_to_wrong=lost,
        wrong_to_right=won,
        mcnemar_p=None if clustered else p,
    )
