"""What changed between two score files of the same examples: how much, how surely, where, and whether it may pass."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import scipy  # its parts load when they are first used, which keeps starting fast

from forgetcast.errors import ConfigError, DataError, MismatchError
from forgetcast.evaluation import worst_part
from forgetcast.paired import wilcoxon_p
from forgetcast.scores import Scores

RESAMPLES, BATCH_ENTRIES = 2_000, 10_000_000
"""Of the bootstrap: how many, and how many entries are drawn at once."""

WORST = 10
"""Examples that are listed."""

_COMPARISONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


@dataclass(frozen=True)
class Change:
    """Change of the loss over some examples, after minus before, nats per target token; positive is forgotten.

    Attributes
    ----------
    examples : int
        Scored on both sides.
    mean, median : float
    lower, upper : float
        95 % interval of the mean, by a paired bootstrap over the examples; equal to it where there is one example.
    worst_tenth, worst_hundredth : float
        Mean of the examples that got worst (at least one).
    share_worse : float
        Share of the examples whose loss rose.
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
    """Answers that changed sides.

    Attributes
    ----------
    examples : int
    right_before, right_after : float
        Share of right answers.
    right_to_wrong, wrong_to_right : int
    mcnemar_p : float
        Exact p-value of "both are equally likely" (McNemar 1947).
    """

    examples: int
    right_before: float
    right_after: float
    right_to_wrong: int
    wrong_to_right: int
    mcnemar_p: float


@dataclass(frozen=True)
class Difference:
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
        Examples without a loss on a side; they are in `flips` only.
    by_source : dict
        Source to its `Change`, largest mean first; empty where sources are not known.
    worst : tuple of dict
        The examples that got worst: id, before, after, change.
    """

    loss: Change | None
    wilcoxon_p: float | None
    flips: Flips | None
    unscored: int
    by_source: dict[str, Change]
    worst: tuple[dict[str, Any], ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        return asdict(self)

    def figures(self) -> dict[str, float]:
        """Every figure that a gate may name."""
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
        If the two are not of the same examples.
    """
    pools = {before.pool_fingerprint, after.pool_fingerprint} - {None}
    if len(pools) > 1:
        raise MismatchError("the two score files are of different pools; score both models on the same one")
    if set(before.ids) != set(after.ids):
        odd = sorted(set(before.ids) ^ set(after.ids))
        raise MismatchError(f"{len(odd)} example(s) are in only one of the score files, e.g. {odd[0]!r}")
    position = {id_: i for i, id_ in enumerate(after.ids)}
    order = np.array([position[id_] for id_ in before.ids])
    change = after.nll[order] - before.nll
    scored = np.flatnonzero(~np.isnan(change))
    by_source = {}
    if sources is not None:
        labels = np.array(sources)
        parts = {name: scored[labels[scored] == name] for name in sorted(set(sources))}
        by_source = {name: _change(change[own]) for name, own in parts.items() if len(own)}
    worst = scored[np.argsort(-change[scored], kind="stable")[:WORST]]
    return Difference(
        loss=_change(change[scored]) if len(scored) else None,
        wilcoxon_p=wilcoxon_p(change[scored]) if len(scored) else None,
        flips=None
        if before.exact_match is None or after.exact_match is None
        else _flips(before.exact_match, after.exact_match[order]),
        unscored=len(change) - len(scored),
        by_source=dict(sorted(by_source.items(), key=lambda item: -item[1].mean)),
        worst=tuple(
            {
                "id": before.ids[i],
                "before": float(before.nll[i]),
                "after": float(after.nll[order[i]]),
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


def _flips(before: np.ndarray, after: np.ndarray) -> Flips | None:
    asked = ~np.isnan(before) & ~np.isnan(after)
    if not asked.any():
        return None
    before, after = before[asked] == 1, after[asked] == 1
    lost, won = int((before & ~after).sum()), int((~before & after).sum())
    return Flips(
        examples=len(before),
        right_before=float(before.mean()),
        right_after=float(after.mean()),
        right_to_wrong=lost,
        wrong_to_right=won,
        mcnemar_p=float(scipy.stats.binomtest(lost, lost + won).pvalue) if lost + won else 1.0,
    )


@dataclass(frozen=True)
class Gate:
    """A condition under which a change must not pass, such as ``mean>0.05``."""

    text: str
    figure: str
    comparison: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Gate:
        """Read a figure's name, one of > >= < <=, and a number.

        Raises
        ------
        ConfigError
            If it is something else.
        """
        parts = re.fullmatch(r"\s*([a-z_]+)\s*(>=|<=|>|<)\s*(\S+)\s*", text)
        try:
            if parts is None:
                raise ValueError
            return cls(text.strip(), parts[1], parts[2], float(parts[3]))
        except ValueError:
            raise ConfigError(f"{text!r} is not a condition; write one as mean>0.05") from None

    def fails(self, found: Difference) -> bool:
        """Whether the condition is true, so that the change must not pass.

        Raises
        ------
        DataError
            If the figure is unknown, or these score files do not have it.
        """
        figures = found.figures()
        if self.figure not in figures:
            raise DataError(f"there is no figure {self.figure!r} here to judge by; there are {', '.join(figures)}")
        return bool(_COMPARISONS[self.comparison](figures[self.figure], self.bound))
