"""Difference of two score files of the same examples: its size, uncertainty and location, and gates on it."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import scipy  # submodules load lazily, so that starting is fast

from forgetcast.errors import ConfigError, DataError, MismatchError
from forgetcast.measure.scores import Scores, flips, forgetting
from forgetcast.results import Result
from forgetcast.stats import wilcoxon_p, worst_part

RESAMPLES, BATCH_ENTRIES = 2_000, 10_000_000
"""Bootstrap resamples, and entries drawn at once."""

WORST = 10
"""Number of examples listed as the most forgotten."""

_COMPARISONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


@dataclass(frozen=True)
class Change:
    """Forgetting over some examples: loss after minus before, nats per target token.

    Attributes
    ----------
    examples : int
        Number of examples scored on both sides.
    mean, median : float
    lower, upper : float
        95 % interval of the mean, by a paired bootstrap over the examples; equal to the mean if there is one example.
    worst_tenth, worst_hundredth : float
        Mean of the most forgotten tenth or hundredth (at least one example).
    share_worse : float
        Fraction of the examples whose loss rose.
    """

    examples: int
    mean: float
    median: float
    lower: float
    upper: float
    worst_tenth: float
    worst_hundredth: float
    share_worse: float


@dataclass(frozen=True)
class Flips:
    """Answers that changed from right to wrong or back.

    Attributes
    ----------
    examples : int
    right_before, right_after : float
        Fraction of right answers.
    right_to_wrong, wrong_to_right : int
    mcnemar_p : float
        Exact p-value of "both changes are equally likely" (McNemar 1947).
    """

    examples: int
    right_before: float
    right_after: float
    right_to_wrong: int
    wrong_to_right: int
    mcnemar_p: float


@dataclass(frozen=True)
class Difference(Result):
    """Paired difference of two score files.

    Attributes
    ----------
    loss : Change or None
        None where no example has a loss on both sides.
    wilcoxon_p : float or None
        p-value of "the changes are symmetric about zero" (Wilcoxon's signed ranks).
    flips : Flips or None
        None where a side has no exact match.
    unscored : int
        Number of examples without a loss on a side; they count in `flips` only.
    by_source : dict
        `Change` by source, largest mean first; empty if no sources were given.
    worst : tuple of dict
        The most forgotten examples: id, before, after, change.
    """

    kind: ClassVar[str] = "difference"

    loss: Change | None
    wilcoxon_p: float | None
    flips: Flips | None
    unscored: int
    by_source: dict[str, Change]
    worst: tuple[dict[str, Any], ...]

    def __repr__(self) -> str:
        """Size, mean forgetting with its interval, and flips."""
        parts = [f"{self.unscored} unscored"]
        if (loss := self.loss) is not None:
            parts.insert(0, f"mean {loss.mean:+.3f} ({loss.lower:+.3f} to {loss.upper:+.3f}) nats per token")
            parts.insert(0, f"{loss.examples} examples")
        if self.flips is not None:
            parts.append(f"{self.flips.right_to_wrong} right to wrong, {self.flips.wrong_to_right} wrong to right")
        return f"Difference({', '.join(parts)})"

    def figures(self) -> dict[str, float]:
        """Return every figure that a gate may name."""
        figures: dict[str, float] = {}
        for part in (self.loss, self.flips):
            if part is not None:
                figures |= {name: value for name, value in asdict(part).items() if name != "examples"}
        if self.wilcoxon_p is not None:
            figures["wilcoxon_p"] = self.wilcoxon_p
        return figures


def difference(before: Scores, after: Scores, *, sources: Sequence[str] | None = None) -> Difference:
    """Compare two models' scores of the same examples, pair by pair.

    Parameters
    ----------
    before, after : Scores
    sources : sequence of str, optional
        Source of each of `before.ids`.

    Raises
    ------
    MismatchError
        If the two are of different examples.
    """
    pools = {before.pool_fingerprint, after.pool_fingerprint} - {None}
    if len(pools) > 1:
        raise MismatchError("the two score files are of different pools; score both models on the same one")
    if set(before.ids) != set(after.ids):
        odd = sorted(set(before.ids) ^ set(after.ids))
        raise MismatchError(f"{len(odd)} example(s) are in only one of the score files, e.g. {odd[0]!r}")
    after = after.subset(before.ids)
    change = forgetting(before, after)
    scored = np.flatnonzero(~np.isnan(change))
    by_source = {}
    if sources is not None:
        labels = np.array(sources)
        parts = {name: scored[labels[scored] == name] for name in sorted(set(sources))}
        by_source = {name: _change(change[rows]) for name, rows in parts.items() if len(rows)}
    worst = scored[np.argsort(-change[scored], kind="stable")[:WORST]]
    return Difference(
        loss=_change(change[scored]) if len(scored) else None,
        wilcoxon_p=wilcoxon_p(change[scored]) if len(scored) else None,
        flips=_flips(before, after),
        unscored=len(change) - len(scored),
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
    )


def _change(change: np.ndarray) -> Change:
    mean = lower = upper = float(change.mean())
    if np.ptp(change) > 0:
        interval = scipy.stats.bootstrap(
            (change,),
            np.mean,
            n_resamples=RESAMPLES,
            batch=max(BATCH_ENTRIES // len(change), 1),
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
        lower, upper = float(interval.low), float(interval.high)
    return Change(
        examples=len(change),
        mean=mean,
        median=float(np.median(change)),
        lower=lower,
        upper=upper,
        worst_tenth=worst_part(change, 10),
        worst_hundredth=worst_part(change, 100),
        share_worse=float((change > 0).mean()),
    )


def _flips(before: Scores, after: Scores) -> Flips | None:
    """Count the flips both ways; `before` and `after` have the same ids in the same order."""
    if before.exact_match is None or after.exact_match is None:
        return None
    right = np.stack([before.exact_match, after.exact_match])
    right = right[:, ~np.isnan(right).any(axis=0)]
    if not right.shape[1]:
        return None
    lost, won = int(np.nansum(flips(before, after))), int(np.nansum(flips(after, before)))
    return Flips(
        examples=right.shape[1],
        right_before=float(right[0].mean()),
        right_after=float(right[1].mean()),
        right_to_wrong=lost,
        wrong_to_right=won,
        mcnemar_p=float(scipy.stats.binomtest(lost, lost + won).pvalue) if lost + won else 1.0,
    )


@dataclass(frozen=True)
class Gate:
    """A condition that fails a difference, such as ``mean>0.05``."""

    text: str
    figure: str
    comparison: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Gate:
        """Parse a figure's name, one of > >= < <=, and a number.

        Raises
        ------
        ConfigError
            If the text is something else.
        """
        parts = re.fullmatch(r"\s*([a-z_]+)\s*(>=|<=|>|<)\s*(\S+)\s*", text)
        try:
            if parts is None:
                raise ValueError
            return cls(text.strip(), parts[1], parts[2], float(parts[3]))
        except ValueError:
            raise ConfigError(f"{text!r} is not a condition; write one as mean>0.05") from None

    def fails(self, measured: Difference) -> bool:
        """Return whether the condition holds, so that the difference must not pass.

        Raises
        ------
        DataError
            If the figure is unknown, or these score files lack it.
        """
        figures = measured.figures()
        if self.figure not in figures:
            raise DataError(f"there is no figure {self.figure!r} here; there are {', '.join(figures)}")
        return bool(_COMPARISONS[self.comparison](figures[self.figure], self.bound))
