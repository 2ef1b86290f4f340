"""Intervals of the whole of a pool: its mean, its most forgotten share, the share above a threshold, and by source.

Two kinds. A *model-based* interval follows from the joint posterior of a row, in which the coefficients are common to
all examples, and from how far off such figures were for left-out tasks. A *guaranteed* one is survey sampling's: random
probes are an unbiased sample of the pool, and the forecast only serves as control variate (the difference estimator;
Saerndal, Swensson and Wretman 1992, sections 6.3 and 6.10). A control variate may not have seen the probe that it is
compared at, so each tenth of the random probes is forecast from the rest (cross-fitting; Zrnic and Candes 2024).
Errors are divided by the probability of their draw (`design`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import scipy  # submodules load lazily, so that starting is fast

from forgetcast.completion.design import Design
from forgetcast.errors import ConfigError, DataError

if TYPE_CHECKING:
    from forgetcast.completion.base import State

LEVELS = np.array([0.0, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99])
"""Interval levels whose widths are estimated on left-out tasks; others are interpolated."""

DRAWS, CALIBRATION_DRAWS = 200, 50
"""Rows drawn from a joint posterior; for each left-out task, fewer."""

PRIOR_TASKS = 8.0
"""Weight, in left-out tasks, of Student's t in the widths of model-based intervals."""

FEW_TASKS = 8
"""With fewer left-out tasks than this, the widths of model-based intervals are mostly Student's t, not measured."""

FOLDS = 10
"""Parts of the random probes, each forecast from the others."""

PRIOR_DEGREES = 10.0
"""Weight, in degrees of freedom, of the model's variances beside the sample's in a guaranteed interval.

A sample of heavy-tailed errors mostly lacks the largest, and its variance is then too small. The model knows from the
atlas which examples are noisy; their variances, in the scale of the sample's errors, are averaged in. With more random
probes their weight vanishes. `benchmarks/forecast.py` measures the coverage."""

LEAST_AUDIT = 5
"""Random probes in a source from which on it gets a guaranteed interval."""


class Component(NamedTuple):
    """One component of the mixture that a row's joint posterior is: ``mean + loadings @ c + e``.

    Attributes
    ----------
    weight : float
        Probability of the component; those of a mixture add up to one.
    mean : array, shape (N,)
    loadings : array, shape (N, r)
    centre, covariance : array, shapes (r,) and (r, r)
        Of the Gaussian coefficients c.
    noise : array, shape (N,)
        Variances of the independent e.
    degrees : float
        Of Student's t that all variances share a scale of; infinite for a Gaussian.
    binary : bool
        Whether the row consists of 0 and 1, with the rest of the component as linearised probabilities; then `noise` is
        the variance of a Bernoulli variable.
    """

    weight: float
    mean: np.ndarray
    loadings: np.ndarray
    centre: np.ndarray
    covariance: np.ndarray
    noise: np.ndarray
    degrees: float = np.inf
    binary: bool = False


Joint = tuple[Component, ...]
"""Joint posterior of one row: a mixture. At the probes it is not conditioned; they are known."""


def moments(joint: Joint, columns: np.ndarray) -> tuple[float, float]:
    """Compute mean and variance of the sum over some columns, in closed form."""
    centres, variances, weights = [], [], []
    for part in joint:
        loading = part.loadings[columns].sum(axis=0, dtype=np.float64)
        centres.append(part.mean[columns].sum(dtype=np.float64) + loading @ part.centre)
        variances.append(loading @ part.covariance @ loading + part.noise[columns].sum(dtype=np.float64))
        weights.append(part.weight)
    centre = float(np.dot(weights, centres))
    return centre, float(np.dot(weights, np.array(variances) + (np.array(centres) - centre) ** 2))


def draws(joint: Joint, columns: np.ndarray, count: int, *, scale: float = 1.0) -> Iterator[np.ndarray]:
    """Draw rows, each of shape (len(columns),), from a joint posterior whose standard deviations are scaled.

    The draws are the same every time.
    """
    rng = np.random.default_rng(0)
    counts = rng.multinomial(count, [part.weight for part in joint])
    for part, number in zip(joint, counts.tolist(), strict=True):
        if not number:
            continue
        values, directions = np.linalg.eigh(part.covariance)
        root = directions * np.sqrt(np.maximum(values, 0.0)) * scale
        loadings = part.loadings[columns].astype(np.float32)
        mean = (part.mean[columns] + part.loadings[columns] @ part.centre).astype(np.float32)
        spread = (scale * np.sqrt(part.noise[columns])).astype(np.float32)
        common = np.sqrt(part.degrees / rng.chisquare(part.degrees, number)) if np.isfinite(part.degrees) else None
        for i, coefficients in enumerate(rng.standard_normal((number, len(values))) @ root.T):
            factor = np.float32(1.0 if common is None else common[i])
            expected = loadings @ (factor * coefficients.astype(np.float32))
            expected += mean
            if part.binary:
                yield (rng.random(len(columns), np.float32) < expected).astype(np.float32)
                continue
            row = rng.standard_normal(len(columns), np.float32)
            row *= factor * spread
            row += expected
            yield row


class Statistic(ABC):
    """A figure of a row, such as its mean.

    A guaranteed interval needs it as ``base + slope * mean of g(z)``, with a g of single examples.
    """

    name: str

    @abstractmethod
    def of(self, row: np.ndarray) -> float:
        """Compute the figure of a row, shape (n,)."""

    @abstractmethod
    def transform(self, values: np.ndarray) -> np.ndarray:
        """Return g of each value."""

    @abstractmethod
    def expected(self, mean: np.ndarray, std: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and variance of g of Gaussian values with these means and standard deviations."""

    @property
    def affine(self) -> tuple[float, float]:
        """Return base and slope."""
        return 0.0, 1.0


@dataclass(frozen=True)
class MeanOf(Statistic):
    """The mean of all examples, nats per token."""

    name: str = "mean"

    def of(self, row: np.ndarray) -> float:
        """Return the mean."""
        return float(row.mean(dtype=np.float64))

    def transform(self, values: np.ndarray) -> np.ndarray:
        """Return the values themselves."""
        return values

    def expected(self, mean: np.ndarray, std: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and variance."""
        return mean, std**2


@dataclass(frozen=True)
class Tail(Statistic):
    """The mean of the examples that are truly the most forgotten, nats per token; at least one example.

    With a threshold q between the values inside and outside, it is q plus the mean of max(z - q, 0) divided by the
    share; any other q gives more (Rockafellar and Uryasev 2000), and one that is nearly right, hardly more.

    Attributes
    ----------
    share : float
        Of the examples.
    threshold : float
        The q of a guaranteed interval.
    exact : float
        Share that the whole number of examples is.
    """

    share: float = 0.1
    threshold: float = 0.0
    exact: float = 0.1
    name: str = "tail"

    def count(self, size: int) -> int:
        """Return how many of `size` examples the tail has."""
        return min(max(1, round(self.share * size)), size)

    def of(self, row: np.ndarray) -> float:
        """Return the mean of the largest values."""
        count = self.count(len(row))
        return float(np.partition(row, len(row) - count)[-count:].mean(dtype=np.float64))

    def transform(self, values: np.ndarray) -> np.ndarray:
        """Return the excess over the threshold."""
        return np.maximum(values - self.threshold, 0.0)

    def expected(self, mean: np.ndarray, std: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and variance of the excess: partial moments of a Gaussian."""
        above = mean - self.threshold
        z = above / np.maximum(std, 1e-12)
        density = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
        probability = scipy.special.ndtr(z)
        first = above * probability + std * density
        second = (above**2 + std**2) * probability + above * std * density
        return first, np.maximum(second - first**2, 0.0)

    @property
    def affine(self) -> tuple[float, float]:
        """Return the threshold, and one over the share."""
        return self.threshold, 1.0 / self.exact


@dataclass(frozen=True)
class Above(Statistic):
    """Share of the examples whose forgetting is above a threshold in nats per token."""

    threshold: float = 0.1
    name: str = "above"

    def of(self, row: np.ndarray) -> float:
        """Return the share."""
        return float((row > self.threshold).mean())

    def transform(self, values: np.ndarray) -> np.ndarray:
        """Return 1 where a value is above, 0 elsewhere."""
        return (values > self.threshold).astype(np.float64)

    def expected(self, mean: np.ndarray, std: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the probability of being above, and its Bernoulli variance."""
        p = scipy.special.ndtr((mean - self.threshold) / np.maximum(std, 1e-12))
        return p, p * (1 - p)


Interval = tuple[float, float, float]
"""Value, lower end and upper end."""


@dataclass(frozen=True)
class Widths:
    """Half-widths of model-based intervals in posterior standard deviations, from left-out tasks.

    Attributes
    ----------
    by_statistic : dict of str to array, shape (len(LEVELS),)
    """

    by_statistic: dict[str, np.ndarray]

    @classmethod
    def of(cls, errors: dict[str, list[float]], known: int) -> Widths:
        """Estimate them from standardised errors of left-out tasks; `known` is the number of all tasks.

        The widths are quantiles of a mixture: the absolute errors, and with the weight of PRIOR_TASKS tasks Student's t
        with one degree of freedom less than there are tasks, in the errors' root mean square.
        """
        grid = (np.arange(200) + 0.5) / 200
        prior = np.abs(scipy.special.stdtrit(max(known - 1, 1), 0.5 + grid / 2))
        widths = {}
        for name in ("mean", "tail", "above"):
            found = np.abs(np.array(errors.get(name, ())))
            tasks = len(found)
            scale = np.sqrt((PRIOR_TASKS + (found**2).sum()) / (PRIOR_TASKS + tasks))
            values = np.concatenate([found, scale * prior])
            weights = np.concatenate([np.ones(tasks), np.full(len(grid), PRIOR_TASKS / len(grid))])
            # A new task is one more, as in conformal intervals.
            levels = np.minimum(LEVELS * (1 + 1 / weights.sum()), 1.0) if tasks else LEVELS
            widths[name] = np.quantile(values, levels, weights=weights, method="inverted_cdf")
            widths[name][0] = 0.0
        return cls(widths)

    def at(self, level: float, statistic: Statistic) -> float:
        """Return the half-width at a level, in standard deviations."""
        check_level(level)
        return float(np.interp(level, LEVELS, self.by_statistic[statistic.name]))


def standardised_errors(joint: Joint, row: np.ndarray, probes: np.ndarray, scale: float) -> dict[str, float]:
    """Compare the figures of a left-out row with its joint posterior: errors in posterior standard deviations.

    The threshold of `Above` is the row's upper decile.
    """
    rest = np.delete(np.arange(len(row)), probes)
    known = row[probes]
    drawn = [np.concatenate([known, z]) for z in draws(joint, rest, CALIBRATION_DRAWS, scale=scale)]
    centre, variance = moments(joint, rest)
    errors = {"mean": (row[rest].sum() - centre) / np.sqrt(variance)}
    for statistic in (Tail(), Above(float(np.quantile(row, 0.9)))):
        values = np.array([statistic.of(z) for z in drawn])
        errors[statistic.name] = (statistic.of(row) - values.mean()) / max(float(values.std(ddof=1)), 1e-12)
    return errors


@dataclass(frozen=True)
class LeftOut:
    """Left-out tasks, from which the widths are estimated when they are first needed: draws take longer than a fit.

    Attributes
    ----------
    tasks : sequence of (State, array of shape (B, n))
        A state that has not seen the rows, and the rows.
    scale : float
        Factor of the posterior standard deviations of single examples.
    known : int
        Number of all tasks.
    """

    tasks: Sequence[tuple[State, np.ndarray]]
    scale: float
    known: int
    _widths: dict[tuple[int, int], Widths] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def count(self) -> int:
        """Number of left-out tasks."""
        return sum(len(rows) for _, rows in self.tasks)

    def widths(self, chosen: int, drawn: int) -> Widths:
        """Estimate the widths for so many chosen probes and so many random ones.

        The left-out tasks are forecast from as many, half of their columns at most: chosen probes have other errors
        than random ones, and with more probes the model's own errors count for more of what is left.
        """
        if (chosen, drawn) not in self._widths:
            errors: dict[str, list[float]] = {}
            for state, rows in self.tasks:
                probes = _probes_of(state, rows.shape[1], chosen, drawn)
                for row in rows:
                    found = standardised_errors(state.joint(probes, row[probes]), row, probes, self.scale)
                    for name, error in found.items():
                        errors.setdefault(name, []).append(error)
            self._widths[chosen, drawn] = Widths.of(errors, self.known)
        return self._widths[chosen, drawn]


def _probes_of(state: State, examples: int, chosen: int, drawn: int) -> np.ndarray:
    """Return the probes of a left-out task: chosen ones as far as the method can choose, and then random ones."""
    most = examples // 2
    count = min(chosen + drawn, most)
    best = state.choose(min(chosen, most), np.arange(examples))
    rest = np.setdiff1d(np.arange(examples), best, assume_unique=True)
    return np.concatenate([best, np.random.default_rng(0).permutation(rest)[: count - len(best)]])


@dataclass(frozen=True)
class Whole:
    """What is known of one row as a whole: its probes and its joint posterior.

    Attributes
    ----------
    state : State
    size : int
        Number of examples.
    probes, observed : array, shape (k,)
    audit : int
        Number of the last probes that are a random sample of `population` without the other probes.
    weights : array, shape (N,), or None
        What they were drawn by, in their order; None: with equal probabilities.
    population : array of int, or None
        Sorted columns that the figures are of; None: all.
    scale : float
        Factor of the posterior standard deviations of single examples.
    left_out : LeftOut
    """

    state: State
    size: int
    probes: np.ndarray
    observed: np.ndarray
    audit: int
    weights: np.ndarray | None
    population: np.ndarray | None
    scale: float
    left_out: LeftOut = field(repr=False)

    def interval(
        self, statistic: Statistic, level: float = 0.9, *, guaranteed: bool = False, among: np.ndarray | None = None
    ) -> Interval:
        """Return value and interval of a figure of the population, or of a part of it.

        Parameters
        ----------
        statistic : Statistic
        level : float
        guaranteed : bool
        among : array of int, optional
            Different columns of the part, among those of the population.
        """
        check_level(level)
        if not guaranteed:
            return self.model_based([statistic], level, among=among)[0]
        return self.guaranteed([statistic], level, among=among)[0]

    def _columns(self, among: np.ndarray | None) -> np.ndarray:
        """Return the columns of the population, or of a part of it, sorted."""
        columns = np.arange(self.size) if self.population is None else self.population
        return columns if among is None else np.intersect1d(columns, among, assume_unique=True)

    def _unmeasured(self, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the columns that are no probes, and the measurements of those that are."""
        inside = np.isin(self.probes, columns, assume_unique=True)
        return np.setdiff1d(columns, self.probes, assume_unique=True), self.observed[inside]

    def model_based(
        self, statistics: Sequence[Statistic], level: float, *, among: np.ndarray | None = None
    ) -> list[Interval]:
        """Return model-based intervals of several figures, all from the same draws."""
        joint = self.state.joint(self.probes, self.observed)
        columns = self._columns(among)
        rest, known = self._unmeasured(columns)
        drawn: list[list[float]] = [[] for _ in statistics]
        centre, variance = moments(joint, rest)
        if any(not isinstance(statistic, MeanOf) for statistic in statistics):
            for row in draws(joint, rest, DRAWS, scale=self.scale):
                whole = np.concatenate([known.astype(np.float32), row])
                for values, statistic in zip(drawn, statistics, strict=True):
                    values.append(statistic.of(whole))
        widths = self.left_out.widths(len(self.probes) - self.audit, self.audit)
        found = []
        for values, statistic in zip(drawn, statistics, strict=True):
            if isinstance(statistic, MeanOf):
                value = (known.sum() + centre) / len(columns)
                deviation = float(np.sqrt(variance)) / len(columns)
            else:
                value, deviation = float(np.mean(values)), float(np.std(values, ddof=1)) if len(rest) else 0.0
            half = widths.at(level, statistic) * deviation
            lower, upper = value - half, value + half
            if isinstance(statistic, Above):
                lower, upper = max(lower, 0.0), min(upper, 1.0)
            found.append((float(value), float(lower), float(upper)))
        return found

    def guaranteed(
        self, statistics: Sequence[Statistic], level: float, *, among: np.ndarray | None = None
    ) -> list[Interval]:
        """Return guaranteed intervals of several figures.

        The estimate is unbiased, whatever the atlas: each part of the random probes is, given the others, a random
        sample of what is not measured. The interval is Student's t of the errors at the random probes, with the
        correction for a finite population; its variance is the sample's, averaged with the model's (PRIOR_DEGREES).
        With unequal draws, errors and variances are divided by their probabilities.

        Raises
        ------
        DataError
            If there are fewer than two random probes.
        """
        columns = self._columns(among)
        certain, audit = self._parts()
        drawn = self.observed[audit][np.isin(self.probes[audit], columns)]
        if len(drawn) < 2:
            raise DataError(
                f"a guaranteed interval needs at least two random probes, and there are {len(drawn)}: choose them with "
                "probes.choose(model, k, audit=10), and pass the same audit to predict"
            )
        inside, candidates = np.zeros(self.size, dtype=bool), np.zeros(self.size, dtype=bool)
        inside[columns] = candidates[self._columns(None)] = True
        candidates[self.probes[certain]] = False
        free = np.flatnonzero(candidates & inside)
        inclusion = self._design.inclusion(free, len(drawn))
        # A tail is computed with two thresholds, the first of which is the forecast's.
        located = [self._located(statistic, columns, drawn) for statistic in statistics]
        every = [each for several in located for each in several]
        sums = iter(self._cross_fitted(every, candidates, inside))
        found = []
        for several in located:
            computed = [next(sums).interval(each, inclusion, len(columns), len(free), level) for each in several]
            value, _, upper = computed[0]
            # No threshold gives less than the tail, so the lower of two lower ends holds if one of them is near it.
            interval = value, min(lower for _, lower, _ in computed), upper
            kinds = several[0].transform(drawn)
            if isinstance(several[0], Above) and np.ptp(kinds) == 0:
                known = float(several[0].transform(self.observed[inside[self.probes]]).sum())
                least = float(inclusion[self._design.levels[free]].min()) * len(free) / len(drawn)
                interval = _of_one_kind(interval, kinds, known, len(columns), len(free), level, least)
            found.append(interval)
        return found

    def _cross_fitted(self, statistics: Sequence[Statistic], candidates: np.ndarray, inside: np.ndarray) -> list[_Sums]:
        """Compare the random probes among the columns `inside` with forecasts from the other probes.

        `candidates` (N,) says from which examples they were drawn.
        """
        design, (certain, audit) = self._design, self._parts()
        chances = np.full(len(self.probes), np.nan)
        chances[audit] = design.chances(candidates, self.probes[audit], inside)
        # The order of the probes may follow the pool's; a random one makes every part a random sample.
        order = np.random.default_rng(0).permutation(len(audit))
        audit = audit[np.argsort(self.probes[audit], kind="stable")][order]
        sums = [_Sums(len(design.weights)) for _ in statistics]
        for part in np.array_split(np.arange(len(audit)), min(len(audit), FOLDS)):
            held = audit[part]
            held = held[inside[self.probes[held]]]
            if not len(held):
                continue
            kept = np.concatenate([certain, np.delete(audit, part)])
            mean, variance, _ = self.state.posterior(self.probes[kept], self.observed[None, kept])
            std = self.scale * np.sqrt(np.broadcast_to(variance, mean.shape)[0].astype(np.float64))
            mean = mean[0].astype(np.float64)
            rest = inside.copy()
            rest[self.probes[kept]] = False
            measured = self.observed[kept][inside[self.probes[kept]]]
            for total, statistic in zip(sums, statistics, strict=True):
                expected, spread = statistic.expected(mean, std)
                errors = statistic.transform(self.observed[held]) - expected[self.probes[held]]
                # Of each held probe, the others of its part count as measured.
                known = statistic.transform(measured).sum() + expected[rest].sum() + errors.sum()
                total.add(
                    known + errors * (1 / chances[held] - 1),
                    errors,
                    spread[self.probes[held]],
                    design.levels[self.probes[held]],
                    np.bincount(design.levels[rest], spread[rest], len(design.weights)) / rest.sum(),
                )
        return sums

    @cached_property
    def _design(self) -> Design:
        """What the random probes were drawn by, rounded once for all figures and sources."""
        return Design.equal(self.size) if self.weights is None else Design.of(self.weights)

    def _parts(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions of the chosen probes, and of the random ones."""
        every = np.arange(len(self.probes))
        return every[: len(every) - self.audit], every[len(every) - self.audit :]

    def _located(self, statistic: Statistic, columns: np.ndarray, drawn: np.ndarray) -> list[Statistic]:
        """Give a tail the threshold where the forecast puts it, and one where the random probes' values put it."""
        if not isinstance(statistic, Tail):
            return [statistic]
        rest, known = self._unmeasured(columns)
        count, thresholds = statistic.count(len(columns)), []
        joint = self.state.joint(self.probes, self.observed)
        for row in draws(joint, rest, CALIBRATION_DRAWS, scale=self.scale):
            whole = np.concatenate([known, row])
            thresholds.append(float(np.partition(whole, len(whole) - count)[-count]))
        share = count / len(columns)
        return [Tail(statistic.share, float(q), share) for q in (np.mean(thresholds), np.quantile(drawn, 1 - share))]


def _of_one_kind(
    interval: Interval, drawn: np.ndarray, known: float, size: int, free: int, level: float, least: float
) -> Interval:
    """Widen the interval of a share whose random probes are all above, or all below: their errors show no variance.

    With a share p of the `free` examples of the other kind, each drawn at least `least` times as probably as the
    average, n random ones miss it with a probability of at most (1 - least p)^n, so that least p is at most
    1 - ((1 - level) / 2)^(1/n) (Clopper and Pearson 1934). `known` probes are above.
    """
    value, lower, upper = interval
    rest = free - len(drawn)
    other = min((1 - ((1 - level) / 2) ** (1 / len(drawn))) / least * free, rest)
    if drawn[0]:
        return value, min(lower, (known + rest - other) / size), upper
    return value, lower, max(upper, (known + other) / size)


class _Sums:
    """Gathers the parts of a difference estimate, from draws with so many levels of weights."""

    def __init__(self, levels: int) -> None:
        self.totals: list[np.ndarray] = []
        self.errors: list[np.ndarray] = []
        self.variances: list[np.ndarray] = []
        self.levels: list[np.ndarray] = []
        self.everywhere = np.zeros(levels)

    def add(
        self, totals: np.ndarray, errors: np.ndarray, variances: np.ndarray, levels: np.ndarray, everywhere: np.ndarray
    ) -> None:
        """Add one part: of its probes estimates of the total, errors, model variances and levels.

        `everywhere`, shape (L,), has the sums of the model's variances by level, divided by the number of examples.
        """
        self.totals.append(totals)
        self.errors.append(errors)
        self.variances.append(variances)
        self.levels.append(levels)
        self.everywhere += len(errors) * everywhere

    def interval(self, statistic: Statistic, inclusion: np.ndarray, size: int, free: int, level: float) -> Interval:
        """Return the figure of `size` examples, `free` of which were not chosen.

        `inclusion`, shape (L,), is the probability of being among the random probes, by level.
        """
        levels = np.concatenate(self.levels)
        n = len(levels)
        # Relative to draws with equal probabilities; with those, all are one, and `left` corrects for a finite pool.
        density, left = inclusion * free / n, 1 - inclusion
        errors, remaining = np.concatenate(self.errors) / density[levels], left[levels]
        variances = np.concatenate(self.variances) * remaining / density[levels] ** 2
        everywhere = float((self.everywhere * left / density).sum()) / n
        # In the scale of the sample's errors; examples whose variance is nearly zero do not dominate.
        weights = 1.0 / (variances + everywhere + 1e-300)
        squares = remaining * errors**2
        modelled = everywhere * float((weights * squares).sum() / max((weights * variances).sum(), 1e-300))
        centre = float((remaining * errors).sum() / max(remaining.sum(), 1e-300))
        sample = float((remaining * (errors - centre) ** 2).sum()) / (n - 1)
        pooled = ((n - 1) * sample + PRIOR_DEGREES * modelled) / (n - 1 + PRIOR_DEGREES)
        if isinstance(statistic, Tail):  # few random probes are in the tail, and often too few to show its variance
            pooled = max(sample, modelled)
        half = float(scipy.special.stdtrit(n - 1, 0.5 + level / 2)) * free / size * np.sqrt(pooled / n)
        base, slope = statistic.affine
        value = float(np.concatenate(self.totals).mean()) / size
        lower, upper = value - half, value + half
        least = -np.inf if isinstance(statistic, MeanOf) else 0.0  # neither an excess nor a share is negative
        most = 1.0 if isinstance(statistic, Above) else np.inf
        value, lower, upper = (base + slope * float(np.clip(each, least, most)) for each in (value, lower, upper))
        return value, lower, upper


def check_level(level: float) -> None:
    """Raise ConfigError if an interval's level is not in [0, .99]."""
    if not 0 <= level <= LEVELS[-1]:
        raise ConfigError(f"an interval's level must be between 0 and {LEVELS[-1]}, not {level}")


def check_share(share: float) -> None:
    """Raise ConfigError if a share of the examples is not in (0, 1]."""
    if not 0 < share <= 1:
        raise ConfigError(f"the share of a tail must be above 0 and at most 1, not {share}")


def check_threshold(threshold: float) -> None:
    """Raise ConfigError if a threshold of forgetting is not a finite number."""
    if not np.isfinite(threshold):
        raise ConfigError(f"the threshold of forgetting must be a finite number, not {threshold}")


def each_row(
    rows: Sequence[Whole], single: bool, interval: Callable[[Whole], Interval]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute an interval of every row: value, lower and upper end, each of shape () or (B,)."""
    values = np.array([interval(row) for row in rows], dtype=np.float64).reshape(-1, 3).T
    value, lower, upper = (values[i, 0] if single else values[i] for i in range(3))
    return np.asarray(value), np.asarray(lower), np.asarray(upper)
