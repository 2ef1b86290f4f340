"""Judge a difference: conditions that it must not meet, and a margin that the mean forgetting must stay within."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import scipy

from forgetcast.errors import ConfigError, DataError
from forgetcast.measure.diff import Change, Difference
from forgetcast.measure.scores import NATS_PER_TOKEN
from forgetcast.results import Result
from forgetcast.stats import holm
from forgetcast.text import did_you_mean

NOT_WORSE, WORSE, INCONCLUSIVE = "not worse", "worse", "inconclusive"
"""Verdicts at a margin."""

ROUNDING = 1e-9
"""Differences in nats per token that are due to the arithmetic: 1.02 - 1 is larger than 0.02."""

P_VALUES = ("wilcoxon_p", "mcnemar_p")
"""Figures that are p-values, which are corrected for their number."""

_COMPARISONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


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
            If the text is something else, or the number is not finite: such a condition would never hold, or always.
        """
        parts = re.fullmatch(r"\s*([^<>=]+?)\s*(>=|<=|>|<)\s*(\S+)\s*", text)
        try:
            if parts is None:
                raise ValueError
            gate = cls(text.strip(), parts[1], parts[2], float(parts[3]))
        except ValueError:
            raise ConfigError(f"{text!r} is not a condition; write one as mean>0.05") from None
        if not math.isfinite(gate.bound):
            raise ConfigError(f"{text!r} is not a condition: {parts[3]} is not a finite number")
        return gate

    def fails(self, measured: Difference) -> bool:
        """Return whether the condition holds, so that the difference must not pass; `judge` corrects p-values too.

        Raises
        ------
        DataError
            If the figure is unknown, or these score files do not give it.
        """
        return self.holds(self.value(measured))

    def value(self, measured: Difference) -> float:
        """Return the figure that the condition names; raises as `fails` does."""
        figures = measured.figures()
        if self.figure not in figures:
            hint = did_you_mean(self.figure, figures)
            raise DataError(f"there is no figure {self.figure!r} here; there are {', '.join(figures)}{hint}")
        return figures[self.figure]

    def holds(self, value: float) -> bool:
        """Return whether the condition holds of a value."""
        return bool(_COMPARISONS[self.comparison](value, self.bound))


@dataclass(frozen=True)
class Judgement(Result):
    """What conditions and a margin say about a difference.

    Attributes
    ----------
    failed : tuple of str
        Why it does not pass; empty if it passes.
    corrected_p : dict
        p-values that conditions set an upper bound for, by figure, after Holm's correction for their number.
    margin : float or None
        Largest mean forgetting that is accepted, in `unit`.
    verdict : str or None
        'not worse' if the whole 95 % interval of the mean is at or below the margin, 'worse' if it is above,
        'inconclusive' if it includes it. None without a margin.
    more_examples, more_clusters : int or None
        If inconclusive: about how many more would decide, if mean and spread stayed as they are. None where that cannot
        be estimated: the mean equals the margin, or there is one example or cluster; and for clusters, without any.
    unit : str
        Unit of the losses and the margin.
    """

    kind: ClassVar[str] = "judgement"

    failed: tuple[str, ...]
    corrected_p: dict[str, float]
    margin: float | None = None
    verdict: str | None = None
    more_examples: int | None = None
    more_clusters: int | None = None
    unit: str = NATS_PER_TOKEN

    def sentence(self) -> str | None:
        """State the verdict; None without a margin."""
        if self.verdict is None:
            return None
        if self.verdict != INCONCLUSIVE:
            return f"{self.verdict} by more than {self.margin:g} {self.unit}"
        if self.more_examples is None:
            return f"inconclusive at {self.margin:g} {self.unit}; how many more examples would decide is not known"
        clusters = "" if self.more_clusters is None else f", in {self.more_clusters:,} more clusters,"
        return (
            f"inconclusive at {self.margin:g} {self.unit}: about {self.more_examples:,} more examples{clusters} "
            "would decide"
        )


def judge(
    measured: Difference, gates: Sequence[Gate] = (), *, margin: float | None = None, allow_unscored: bool = False
) -> Judgement:
    """Judge a difference by conditions, a margin, or both.

    Conditions ``p<bound`` on several p-values are one family: they hold of the values after Holm's correction, so that
    the chance of failing a model that did not change stays at the largest bound.

    Parameters
    ----------
    measured : Difference
    gates : sequence of Gate
        Conditions that must not hold.
    margin : float, optional
        Largest mean forgetting that is accepted, in the unit of the losses, at least 0.
    allow_unscored : bool
        Whether a difference may pass although examples are without a score in the second file only. Otherwise these
        fail it: they may be the ones that became worst.

    Raises
    ------
    ConfigError
        If the margin is negative or not finite.
    DataError
        If a figure is unknown, or these score files do not give it, or with a margin, no example has a loss on both
        sides or the losses have several units.
    """
    if margin is not None and not 0 <= margin < math.inf:
        raise ConfigError(f"a margin of {margin} is not a number of at least 0")
    failed = []
    if measured.lost and not allow_unscored and (gates or margin is not None):
        failed.append(f"{measured.lost} example(s) have no score in the candidate but in the base")
        if measured.loss is None:  # nothing is left to be judged
            return Judgement(tuple(failed), {}, margin, unit=measured.unit)
    family = [name for name in P_VALUES if any(_is_test(gate) and gate.figure == name for gate in gates)]
    figures = measured.figures()
    known = [name for name in family if name in figures]
    corrected = dict(zip(known, holm([figures[name] for name in known]).tolist(), strict=True))
    for gate in gates:
        value = gate.value(measured)
        if gate.holds(corrected[gate.figure] if _is_test(gate) else value):
            failed.append(gate.text)
    if margin is None:
        return Judgement(tuple(failed), corrected, unit=measured.unit)
    if measured.loss is None:
        raise DataError("a margin needs losses, and no example has one on both sides")
    if "," in measured.unit:
        raise DataError(f"a margin needs losses of one unit, and these are in {measured.unit}; compare task by task")
    verdict, more = _verdict(measured.loss, margin)
    loss = measured.loss
    judgement = Judgement(
        failed=tuple(failed),
        corrected_p=corrected,
        margin=margin,
        verdict=verdict,
        more_examples=None if more is None else math.ceil(more * loss.examples / (loss.clusters or loss.examples)),
        more_clusters=None if more is None or loss.clusters is None else more,
        unit=measured.unit,
    )
    if verdict != WORSE:
        return judgement
    return replace(judgement, failed=(*failed, str(judgement.sentence())))


def _is_test(gate: Gate) -> bool:
    return gate.figure in P_VALUES and gate.comparison in ("<", "<=")


def _verdict(loss: Change, margin: float) -> tuple[str, int | None]:
    """Return the verdict, and if inconclusive, how many more examples or clusters would decide."""
    if loss.lower is None or loss.upper is None or loss.standard_error is None:
        return INCONCLUSIVE, None
    if loss.upper <= margin + ROUNDING:
        return NOT_WORSE, None
    if loss.lower > margin + ROUNDING:
        return WORSE, None
    gap, units = abs(margin - loss.mean), loss.clusters or loss.examples
    if gap <= ROUNDING:
        return INCONCLUSIVE, None

    def excess(number: float) -> float:
        """Half-width of Student's interval of so many units, minus the distance that it must not exceed."""
        quantile = scipy.stats.t.ppf(0.975, number - 1)
        return float(quantile * loss.standard_error * math.sqrt(units / number) - gap)

    if excess(units + 1) <= 0:
        return INCONCLUSIVE, 1
    most = (units + 1) * (excess(units + 1) / gap + 1) ** 2  # the quantile only falls
    return INCONCLUSIVE, math.ceil(scipy.optimize.brentq(excess, units + 1, most * (1 + 1e-9))) - units
