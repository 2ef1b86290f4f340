"""Statistics of paired experiments: intervals, tests and comparisons of arms, and means of the worst examples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import scipy

from forgetcast.errors import DataError

RESAMPLES = 10_000
"""Number of bootstrap resamples."""


@dataclass(frozen=True)
class PairedDifference:
    """Mean of paired differences, with a Student-t interval and the p-value of "the mean is zero"."""

    mean: float
    lower: float
    upper: float
    p_value: float
    pairs: int


def paired_difference(a: Any, b: Any, *, level: float = 0.95) -> PairedDifference:
    """Compute the interval of the mean of a - b over pairs (Student's t).

    Parameters
    ----------
    a, b : array-like, shape (n,)
        n >= 2.
    """
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    if difference.ndim != 1 or len(difference) < 2:
        raise DataError("a paired interval needs at least two pairs")
    mean = float(difference.mean())
    # Shares of a few answers often differ by the same, up to rounding.
    if np.ptp(difference) <= 1e-12 * np.abs(difference).max():
        return PairedDifference(mean, mean, mean, float(mean == 0), len(difference))
    test = scipy.stats.ttest_1samp(difference, 0.0)
    interval = test.confidence_interval(level)
    return PairedDifference(mean, float(interval.low), float(interval.high), float(test.pvalue), len(difference))


def wilcoxon_p(differences: Any) -> float:
    """Test that the differences (n,) are symmetric about zero (Wilcoxon's signed ranks): p-value, 1 if all are 0."""
    differences = np.asarray(differences, dtype=np.float64)
    return float(scipy.stats.wilcoxon(differences).pvalue) if differences.any() else 1.0


def bootstrap_interval(
    groups: Sequence[np.ndarray], *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Compute a percentile interval of the mean of grouped values: resample the groups, then the values in each.

    Of a single group, only the values are resampled.

    Parameters
    ----------
    groups : sequence of array, shape (n_g,)
        Values of one group are not independent of each other, such as the seeds of one task.
    level : float
    resamples : int
    seed : int

    References
    ----------
    Davison and Hinkley (1997), Bootstrap Methods and their Application, section 3.8.
    """
    sizes = np.array([len(group) for group in groups])
    if not len(sizes) or sizes.min() < 1:
        raise DataError("a bootstrap needs at least one value in every group")
    padded = np.zeros((len(sizes), sizes.max()))
    for row, group in zip(padded, groups, strict=True):
        row[: len(group)] = group
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(sizes), size=(resamples, len(sizes)))
    within = (rng.random((*drawn.shape, padded.shape[1])) * sizes[drawn][..., None]).astype(np.intp)
    counted = np.arange(padded.shape[1]) < sizes[drawn][..., None]
    values = padded[drawn[..., None], within]
    means = (values * counted).sum(axis=(1, 2)) / counted.sum(axis=(1, 2))
    lower, upper = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(lower), float(upper)


FEW_UNITS = 20
"""Below this number, resamples of the units are too alike for a bootstrap, and an interval is Student's t."""

MEAN_RESAMPLES, BATCH_ENTRIES = 2_000, 10_000_000
"""Bootstrap resamples of a mean over many units, and entries drawn at once."""


@dataclass(frozen=True)
class MeanInterval:
    """Mean of some values, its standard error and 95 % interval; None if there is only one independent unit."""

    mean: float
    standard_error: float | None
    lower: float | None
    upper: float | None
    units: int


def mean_interval(values: Any, clusters: Any = None) -> MeanInterval:
    """Compute the 95 % interval of the mean of values that are independent, or that are so between clusters only.

    The units, which are the values or the clusters, are resampled; the percentile interval is widened to the width of
    Student's t (Hesterberg 2015). With fewer than `FEW_UNITS` units it is Student's t.

    Parameters
    ----------
    values : array-like, shape (n,)
    clusters : array-like of int or str, shape (n,), optional
        Label of each value's cluster. The mean is over the values: a large cluster weighs more.

    References
    ----------
    Cameron, Gelbach and Miller (2008), Bootstrap-Based Improvements for Inference with Clustered Errors.
    Hesterberg (2015), What Teachers Should Know About the Bootstrap, section 5.3.
    """
    values = np.asarray(values, dtype=np.float64)
    mean = float(values.mean())
    sums, sizes = values, np.ones(len(values))
    if clusters is not None:
        codes = np.unique(np.asarray(clusters), return_inverse=True)[1]
        sums, sizes = np.bincount(codes, values), np.bincount(codes).astype(np.float64)
    units = len(sums)
    if units < 2:
        return MeanInterval(mean, None, None, None, units)
    if np.ptp(values) == 0:
        return MeanInterval(mean, 0.0, mean, mean, units)
    # The mean is a ratio of two sums over clusters; its linearised standard error is sd / sqrt(n) for single values.
    error = float(np.sqrt(units / (units - 1) * ((sums - mean * sizes) ** 2).sum()) / len(values))
    quantile = float(scipy.stats.t.ppf(0.975, units - 1))
    if units < FEW_UNITS:
        return MeanInterval(mean, error, mean - quantile * error, mean + quantile * error, units)
    interval = scipy.stats.bootstrap(
        (values,) if clusters is None else (sums, sizes),
        np.mean if clusters is None else lambda total, count, axis: total.sum(axis=axis) / count.sum(axis=axis),
        paired=clusters is not None,
        n_resamples=MEAN_RESAMPLES,
        batch=max(BATCH_ENTRIES // units, 1),
        method="percentile",
        confidence_level=1 - 2 * scipy.stats.norm.cdf(-quantile * np.sqrt(units / (units - 1))),
        vectorized=True,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return MeanInterval(mean, error, float(interval.low), float(interval.high), units)


def holm(p_values: Any) -> np.ndarray:
    """Correct the p-values (m,) of one family, so that the chance of any false positive stays at the level.

    References
    ----------
    Holm (1979), A simple sequentially rejective multiple test procedure.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return corrected


LEVEL = 0.05
"""A corrected p-value below it decides a verdict."""

FEWEST_RANKS = 6
"""With fewer differences, Wilcoxon's p-value cannot be below `LEVEL`: the smallest is 2 / 2^n."""


MOST_PAIRS = 1000
"""So many pairs nobody makes."""


def supports_part(examples: int, parts: int) -> bool:
    """Say whether the worst 1/`parts` of so many examples is at least one example."""
    return examples >= parts


@dataclass(frozen=True)
class Comparison:
    """One arm against another on one metric, paired by task and seed; negative is better for every metric.

    One test decides the verdict: Student's t, corrected for the number of arms; the interval is that of the same test.

    Attributes
    ----------
    arm, baseline, metric : str
    difference : PairedDifference
        Of the tasks' means; with one task, of the seeds. Its interval includes zero if and only if `corrected_p` is at
        least `LEVEL`: it has a level of 95 % after the correction.
    bootstrap_lower, bootstrap_upper : float
        95 % interval of the mean, by resampling tasks, then seeds within each; with one task, only seeds.
    wilcoxon_p : float or None
        By Wilcoxon's signed ranks of the same values; None for fewer than `FEWEST_RANKS`.
    corrected_p, corrected_wilcoxon_p : float
        `difference.p_value` and `wilcoxon_p` after Holm's correction over all arms compared with this baseline on
        this metric.
    tasks : int
    said : str
        What sentences call the arm; default: its name and "replay".
    """

    arm: str
    baseline: str
    metric: str
    difference: PairedDifference
    bootstrap_lower: float
    bootstrap_upper: float
    wilcoxon_p: float | None
    corrected_p: float
    corrected_wilcoxon_p: float | None
    tasks: int
    said: str = ""

    def __repr__(self) -> str:
        d = self.difference
        return (
            f"Comparison({self.arm} - {self.baseline}, {self.metric}: "
            f"{d.mean:+.4f} [{d.lower:+.4f}, {d.upper:+.4f}], {d.pairs} pairs, {self.tasks} tasks)"
        )

    @property
    def better(self) -> bool:
        """Whether the test shows that the mean difference is below zero."""
        return self.corrected_p < LEVEL and self.difference.mean < 0

    @property
    def worse(self) -> bool:
        """Whether the test shows that the mean difference is above zero."""
        return self.corrected_p < LEVEL and self.difference.mean > 0

    def verdict(self) -> str:
        """State the conclusion that the test supports."""
        arm = self.said or f"{self.arm} replay"
        if self.better:
            return f"{arm} is better than {self.baseline}"
        if self.worse:
            return f"{arm} is worse than {self.baseline}"
        return f"{arm} is not shown to be better than {self.baseline} (the interval includes zero)"

    def pairs_needed(self) -> int | None:
        """Return how many pairs would show a difference as large and as scattered as this one, with an even chance.

        None if they were more than `MOST_PAIRS`.
        """
        seen, level = self.difference, LEVEL
        if self.corrected_p > 0:
            level *= seen.p_value / self.corrected_p
        effect = scipy.stats.t.isf(seen.p_value / 2, seen.pairs - 1) / np.sqrt(seen.pairs)
        pairs = np.arange(2, MOST_PAIRS + 1)
        enough = effect * np.sqrt(pairs) > scipy.stats.t.isf(level / 2, pairs - 1)
        return int(pairs[enough.argmax()]) if enough.any() else None

    def as_dict(self) -> dict[str, Any]:
        """Return all figures on one level, and the verdict."""
        others = {name: value for name, value in asdict(self).items() if name not in ("difference", "said")}
        return {"verdict": self.verdict()} | asdict(self.difference) | others


class Compared(ABC):
    """Base of results whose arms are compared in pairs."""

    @property
    @abstractmethod
    def arms(self) -> tuple[str, ...]:
        """Names of the arms, in the order they were run."""

    @property
    @abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """Metrics of the comparison; lower is better for each."""

    @abstractmethod
    def _differences(self, arm: str, baseline: str, metric: str) -> list[np.ndarray]:
        """Return arm minus baseline of every pair, in groups of dependent pairs."""

    def compare(self, arm: str, baseline: str, metric: str) -> Comparison | None:
        """Compare two arms; None if fewer than two tasks, or seeds of one task, were run with both."""
        groups = self._differences(arm, baseline, metric)
        values = _independent(groups)
        if len(values) < 2:
            return None
        family = dict.fromkeys([arm, *self._rivals(baseline)])
        rivals = [_independent(self._differences(name, baseline, metric)) for name in family]
        rivals = [each for each in rivals if len(each) >= 2]
        raw = paired_difference(values, np.zeros(len(values))).p_value
        corrected = float(holm([paired_difference(each, np.zeros(len(each))).p_value for each in rivals])[0])
        ranked = len(values) >= FEWEST_RANKS
        ranks = holm([wilcoxon_p(each) for each in rivals if len(each) >= FEWEST_RANKS]) if ranked else None
        lower, upper = bootstrap_interval(groups)
        # At this level, the interval excludes zero just where the corrected p-value is below LEVEL.
        level = 1 - LEVEL * (raw / corrected if corrected else 1.0)
        return Comparison(
            arm=arm,
            baseline=baseline,
            metric=metric,
            difference=paired_difference(values, np.zeros(len(values)), level=level),
            bootstrap_lower=lower,
            bootstrap_upper=upper,
            wilcoxon_p=wilcoxon_p(values) if ranked else None,
            corrected_p=corrected,
            corrected_wilcoxon_p=None if ranks is None else float(ranks[0]),
            tasks=len(groups),
            said=self._said(arm),
        )

    def _said(self, arm: str) -> str:
        """Return what sentences call an arm."""
        return f"{arm} replay"

    def _rivals(self, baseline: str) -> tuple[str, ...]:
        """Return the arms to compare with a baseline: all others, except the no-replay arm."""
        return tuple(arm for arm in self.arms if arm not in ("none", baseline))

    def comparisons(self) -> tuple[Comparison, ...]:
        """Compare every arm with 'none' and, except 'random', with 'random', on every metric."""
        wanted = [(arm, baseline) for baseline in ("none", "random") for arm in self._rivals(baseline)]
        results = (self.compare(arm, baseline, metric) for arm, baseline in wanted for metric in self.metrics)
        return tuple(comparison for comparison in results if comparison is not None)


Shared = TypeVar("Shared")
"""What the two runs of a pair share."""


def differences_by_task(values: Mapping[tuple[str, Shared, str], float], arm: str, baseline: str) -> list[np.ndarray]:
    """Return arm minus baseline of every pair, a group for each task.

    Parameters
    ----------
    values : mapping
        A figure by task, by what two runs of a pair share, such as the seed, and by arm.
    arm, baseline : str
    """
    groups: dict[str, list[float]] = {}
    for (task, shared, name), value in values.items():
        if name == arm and (other := values.get((task, shared, baseline))) is not None:
            groups.setdefault(task, []).append(value - other)
    return [np.array(group) for group in groups.values()]


def _independent(groups: Sequence[np.ndarray]) -> np.ndarray:
    """Return the differences of one group, or the means of several: values of one group depend on each other."""
    return np.concatenate([*groups, np.empty(0)]) if len(groups) < 2 else np.array([group.mean() for group in groups])


def worst_tenth(forgetting: Any) -> float:
    """Return the mean of the most forgotten tenth (at least one example), nats per token; NaN entries are skipped."""
    return worst_part(forgetting, 10)


def worst_part(forgetting: Any, parts: int) -> float:
    """Return the mean of the worst 1/`parts`, as `worst_tenth` does."""
    values = np.asarray(forgetting, dtype=np.float64)
    values = np.sort(values[~np.isnan(values)])
    return float(values[-max(1, round(len(values) / parts)) :].mean())
