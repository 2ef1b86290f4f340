"""How much to replay: a law of forgetting against the share of replayed examples, learned from fine-tunes with replay.

Forgetting that is left with a share p of replayed examples, relative to no replay, falls as a power of 1 + B p. One
fine-tune without replay and two with it, a pilot, already say much about one task; each verification says more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy
from pydantic import TypeAdapter, ValidationError

from forgetcast.atlas.store import Atlas
from forgetcast.errors import ConfigError, DataError
from forgetcast.replay.outcome import LAW_METRICS, METRICS, Run
from forgetcast.results import Result, plain

REFERENCE = 1 / 8
"""Replayed examples per new one at which the law's strength is defined."""

STRENGTH = (np.log(0.6), 0.8)
"""Mean and standard deviation beforehand of the logarithm of the strength: at the reference ratio exp(-strength) of the
forgetting is left, 55 % at the mean, and between 6 % and 88 % in 19 of 20 cases."""

BEND = (np.log(300.0), 2.0)
"""The same of log B: from 6 (nearly a straight line) to 15,000; at 300, a share of 1 % does half of what 11 % does."""

EFFICIENCY = 0.35
"""Standard deviation beforehand of the logarithm of a strategy's efficiency: within a factor of 2 in 19 of 20 cases."""

NOISE = np.geomspace(0.01, 0.4, 8)
"""Standard deviations of one run's share of forgetting left that are averaged over; NOISE_BEFORE is log-normal."""

NOISE_BEFORE = (np.log(0.03), 0.8)

SPREAD = np.geomspace(0.05, 0.8, 5)
"""Standard deviations of log strength between tasks that are averaged over; SPREAD_BEFORE is log-normal."""

SPREAD_BEFORE = (np.log(0.3), 0.6)

DRAWS = 4000

MOST = 1.0
"""Largest ratio that is advised: half of all examples are replayed ones."""


SHOWN = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Ratios that advice is given for."""


class Expected(NamedTuple):
    """An expectation, and the interval that a run should be in."""

    mean: float
    lower: float
    upper: float


@dataclass(frozen=True)
class ReplayLaw:
    """Share of the forgetting without replay that is left, against ratio and strategy.

    With p = ratio / (1 + ratio), the share of replayed examples in all, and P that at the `REFERENCE`, a run of task t
    with strategy s leaves::

        exp(-strength_t * log(1 + B e_s p) / log(1 + B P)) + noise,    e_random = 1

    which is (1 + B e_s p) to a negative power. A strategy's efficiency e_s says that it needs 1 / e_s times as many
    replayed examples as random replay. The strength varies from task to task. Posterior by Laplace's approximation at
    each noise and each spread between tasks on a grid, averaged by their evidence.

    Parameters
    ----------
    metric : 'mean' or 'worst_tenth'
    tasks : tuple of str
        Those that the law was learned from.
    strategies : tuple of str
        The same; 'random' comes first whether or not it was run.
    runs : int
        With replay.
    draws : array, shape (DRAWS, 2 + S - 1 + T + 2)
        Of the posterior: log strength, log B, log efficiency of each strategy but random, deviation of each task's log
        strength, and the standard deviations of noise and of the deviations.

    References
    ----------
    Bethune et al. (2025), Scaling laws for forgetting during finetuning with pretraining data injection,
    arXiv 2502.06042: loss rises by a term with (1 + B p) to a negative power in it.
    """

    metric: str
    tasks: tuple[str, ...]
    strategies: tuple[str, ...]
    runs: int
    draws: np.ndarray

    @classmethod
    def fit(cls, runs: Iterable[Run], metric: str = "mean", *, seed: int = 0) -> ReplayLaw:
        """Learn from runs; without any, the law is what is known beforehand.

        Parameters
        ----------
        runs : iterable of Run
            A run with replay counts where there is one without, of the same task, setup and seed, that forgot anything.
        metric : 'mean' or 'worst_tenth'
        seed : int
            Of the draws.
        """
        if metric not in LAW_METRICS:
            raise ConfigError(f"a replay law is of the metric 'mean' or 'worst_tenth', not {metric!r}")
        data = _Data.of(list(runs), metric)
        rng = np.random.default_rng(seed)
        fits = [(*_fit(data, noise, spread), noise, spread) for noise in NOISE for spread in SPREAD]
        evidence = np.array([fit[2] for fit in fits])
        weights = np.exp(evidence - evidence.max())
        counts = rng.multinomial(DRAWS, weights / weights.sum())
        parts = []
        for (at, root, _, noise, spread), count in zip(fits, counts, strict=True):
            standard = rng.standard_normal((count, len(at)))
            points = (at + standard @ root.T) * data.scales(spread)
            points[:, 0] += STRENGTH[0]
            points[:, 1] += BEND[0]
            parts.append(np.column_stack([points, np.full(count, noise), np.full(count, spread)]))
        return cls(metric, data.tasks, data.strategies, len(data.left), np.concatenate(parts))

    def left(self, strategy: str, ratio: float, *, task: str | None = None, level: float = 0.9) -> Expected:
        """Share of the forgetting without replay that a run will leave; zero is none, below zero is better than before.

        Parameters
        ----------
        strategy : str
            One that was not run yet may be as good or bad as any.
        ratio : float
            Replayed examples per new one.
        task : str, optional
            One of `tasks`, or None for a task that no run was made of.
        level : float
            Of the interval of a single run.
        """
        if not ratio >= 0:
            raise ConfigError(f"the replay ratio must not be negative, but is {ratio}")
        left = self._left(strategy, ratio, task)
        noise = self.draws[:, -2] * np.random.default_rng(1).standard_normal(len(left)) if ratio else 0.0
        lower, upper = np.quantile(left + noise, [(1 - level) / 2, (1 + level) / 2])
        return Expected(float(left.mean()), float(lower), float(upper))

    def ratio_for(
        self, retention: float, strategy: str = "random", *, task: str | None = None, level: float = 0.9
    ) -> Expected | None:
        """Replayed examples per new one at which the expected retention is this, with an interval.

        Parameters
        ----------
        retention : float
            Share of the forgetting without replay that is to be avoided, in (0, 1).
        strategy, task, level :
            As in `left`; the interval is of what is not known of the law, and an end of it may be infinite.

        Returns
        -------
        Expected or None
            None where no ratio up to `MOST` is expected to do.
        """
        if not 0 < retention < 1:
            raise ConfigError(f"the retention to aim at must be between 0 and 1, not {retention}")

        def short(log_ratio: float) -> float:
            return retention - 1 + float(self._left(strategy, float(np.exp(log_ratio)), task).mean())

        least = np.log(1e-6)
        if short(np.log(MOST)) > 0:
            return None
        found = float(np.exp(scipy.optimize.brentq(short, least, np.log(MOST)))) if short(least) > 0 else 1e-6
        bend, strength, efficiency = self._parts(strategy, task)
        with np.errstate(over="ignore"):
            share = np.expm1(-np.log1p(-retention) * np.log1p(bend * _share(REFERENCE)) / strength) / bend / efficiency
        needed = np.where(share < 1, share / np.maximum(1 - share, 1e-12), np.inf)
        lower, upper = np.quantile(needed, [(1 - level) / 2, (1 + level) / 2], method="nearest")
        return Expected(found, float(lower), float(upper))

    def efficiency(self, strategy: str, *, level: float = 0.9) -> Expected:
        """How many examples of random replay one of this strategy's is worth: median and interval."""
        *_, efficiency = self._parts(strategy, None)
        lower, middle, upper = np.quantile(efficiency, [(1 - level) / 2, 0.5, (1 + level) / 2])
        return Expected(float(middle), float(lower), float(upper))

    def _parts(self, strategy: str, task: str | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of every draw: B, the task's strength, and the strategy's efficiency."""
        rng, n = np.random.default_rng(0), len(self.draws)
        if strategy == "random":
            log_efficiency = np.zeros(n)
        elif strategy in self.strategies:
            log_efficiency = self.draws[:, 1 + self.strategies.index(strategy)]
        else:
            log_efficiency = EFFICIENCY * rng.standard_normal(n)
        if task is None:
            deviation = self.draws[:, -1] * rng.standard_normal(n)
        elif task in self.tasks:
            deviation = self.draws[:, 1 + len(self.strategies) + self.tasks.index(task)]
        else:
            raise DataError(f"no run with replay is known of the task {task!r}, only of {', '.join(self.tasks)}")
        return np.exp(self.draws[:, 1]), np.exp(self.draws[:, 0] + deviation), np.exp(log_efficiency)

    def _left(self, strategy: str, ratio: float, task: str | None) -> np.ndarray:
        bend, strength, efficiency = self._parts(strategy, task)
        doses = np.log1p(bend * efficiency * _share(ratio)) / np.log1p(bend * _share(REFERENCE))
        return np.asarray(np.exp(-strength * doses))


@dataclass(frozen=True)
class Advice(Result):
    """What the runs that an atlas has kept tell of ratios and strategies.

    Attributes
    ----------
    strategy : str
        The one that is to be used.
    task : str or None
        The task that the figures are of; None for one that no run was made of.
    target : float or None
        Share of the forgetting without replay that is to be avoided.
    runs, tasks : int
        With replay, that it was learned from.
    largest : float
        Largest ratio that was run; 0 without runs.
    left : mapping of (strategy, ratio) to mapping of metric to Expected
        Share of the forgetting without replay that is left.
    efficiency : mapping of strategy to mapping of metric to Expected
        Examples of random replay that one of the strategy's is worth, for those that were run.
    needed : Expected or None
        Ratio at which the target is expected to be met on the mean; None where there is no target, or no such ratio.
    most : Expected
        Share left at the ratio `MOST`.
    """

    strategy: str
    task: str | None
    target: float | None
    runs: int
    tasks: int
    largest: float
    left: Mapping[tuple[str, float], Mapping[str, Expected]]
    efficiency: Mapping[str, Mapping[str, Expected]]
    needed: Expected | None
    most: Expected

    def sentences(self) -> list[str]:
        """Say plainly what is known, and what is not."""
        of = f"of {self.task}" if self.task else "of a task like those that were run"
        if self.runs:
            found = [f"Learned from {self.runs} runs with replay of {self.tasks} task(s); the figures are {of}."]
        else:
            found = [
                "No run with replay is kept in this atlas, so this is a wide guess from what is published: "
                "`forgetcast pilot` makes three runs, and narrows it."
            ]
        for strategy, by_metric in self.efficiency.items():
            found += [self._compared(strategy, metric, worth) for metric, worth in by_metric.items()]
        if self.runs and not self.efficiency:
            found.append("Only random replay was run here: whether another strategy needs fewer examples is not known.")
        elif self.efficiency and all(worth.lower <= 1 for by in self.efficiency.values() for worth in by.values()):
            found.append("Random replay is good enough: nothing here is shown to need fewer examples.")
        if self.target is None:
            return found
        aim = f"To avoid {self.target:.0%} of the forgetting with {self.strategy} replay"
        if self.needed is None:
            found.append(
                f"{aim}, no ratio up to {MOST:g} is expected to do; at {MOST:g} it is {1 - self.most.mean:.0%}."
            )
        else:
            found.append(
                f"{aim}, expect a ratio of {self.needed.mean:.3g} "
                f"(90 % interval {self.needed.lower:.2g} to {self.needed.upper:.2g})."
            )
            if self.needed.mean > self.largest > 0:
                found.append(f"That is beyond the largest ratio that was run, {self.largest:.3g}: a guess by the law.")
        return found

    def _compared(self, strategy: str, metric: str, worth: Expected) -> str:
        on = f"On the {METRICS[metric]}, {strategy} replay"
        needs = f"{1 / worth.mean:.2f} times as many examples as random (90 % interval {1 / worth.upper:.2f} to "
        needs += f"{1 / worth.lower:.2f})"
        if worth.lower > 1:
            return f"{on} needs fewer: {needs}."
        if worth.upper < 1:
            return f"{on} needs more: {needs}."
        return f"{on} is not shown to need fewer than random: {needs}."

    def as_dict(self) -> dict[str, Any]:
        """Return the figures and the sentences, ready for JSON; an infinite end of an interval is None."""
        named = ("strategy", "task", "target", "runs", "tasks", "largest")
        return {
            **{name: getattr(self, name) for name in named},
            "left": [
                {"strategy": strategy, "ratio": ratio} | plain(found) for (strategy, ratio), found in self.left.items()
            ],
            "efficiency": plain(self.efficiency),
            "needed": plain(self.needed),
            "at_most": plain(self.most),
            "sentences": self.sentences(),
        }


def advise(atlas: Atlas, strategy: str, *, target: float | None = None, task: str | None = None) -> Advice:
    """Say what the runs that an atlas has kept tell of ratios and strategies.

    Parameters
    ----------
    atlas : Atlas
    strategy : str
        The one that is to be used.
    target : float, optional
        Share of the forgetting without replay that is to be avoided, in (0, 1).
    task : str, optional
        If runs of it were made, the figures are its own.

    Raises
    ------
    DataError
        If the runs in the atlas are not what `verify` and `pilot` keep there.
    """
    try:
        runs = TypeAdapter(list[Run]).validate_python(atlas.replays)
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"{part}: " for part in first["loc"])
        raise DataError(f"{atlas.path / 'replays.json'}: {place}{first['msg']}") from None
    laws = {metric: ReplayLaw.fit(runs, metric) for metric in LAW_METRICS}
    mean = laws["mean"]
    own = task if task in mean.tasks else None
    strategies = dict.fromkeys([*mean.strategies, strategy])
    return Advice(
        strategy=strategy,
        task=own,
        target=target,
        runs=mean.runs,
        tasks=len(mean.tasks),
        largest=max((run.ratio or 0.0 for run in runs), default=0.0),
        left={
            (name, ratio): {metric: law.left(name, ratio, task=own) for metric, law in laws.items()}
            for name in strategies
            for ratio in SHOWN
        },
        efficiency={
            name: {metric: law.efficiency(name) for metric, law in laws.items()} for name in mean.strategies[1:]
        },
        needed=mean.ratio_for(target, strategy, task=own) if target is not None else None,
        most=mean.left(strategy, MOST, task=own),
    )


def _share(ratio: float | np.ndarray) -> float | np.ndarray:
    """Share of replayed examples in all, from their ratio to new ones."""
    return ratio / (1 + ratio)


@dataclass(frozen=True)
class _Data:
    """Runs with replay, beside those without: share of forgetting left, share replayed, and codes of who ran it."""

    left: np.ndarray
    share: np.ndarray
    strategy: np.ndarray
    task: np.ndarray
    strategies: tuple[str, ...]
    tasks: tuple[str, ...]

    @classmethod
    def of(cls, runs: Sequence[Run], metric: str) -> _Data:
        without = {(run.task, run.setup, run.seed): getattr(run, metric) for run in runs if run.ratio == 0}
        rows = [
            (getattr(run, metric) / before, run.ratio, run.strategy, run.task)
            for run in runs
            if run.ratio and run.strategy and (before := without.get((run.task, run.setup, run.seed), 0.0)) > 0
        ]
        names = tuple(dict.fromkeys(["random", *(row[2] for row in rows)]))
        tasks = tuple(dict.fromkeys(row[3] for row in rows))
        return cls(
            left=np.array([row[0] for row in rows]),
            share=np.asarray(_share(np.array([row[1] for row in rows]))),
            strategy=np.array([names.index(row[2]) for row in rows], dtype=np.intp),
            task=np.array([tasks.index(row[3]) for row in rows], dtype=np.intp),
            strategies=names,
            tasks=tasks,
        )

    def scales(self, spread: float) -> np.ndarray:
        """Standard deviations beforehand of log strength, log B, log efficiencies, and deviations of the tasks."""
        return np.array([STRENGTH[1], BEND[1], *[EFFICIENCY] * (len(self.strategies) - 1), *[spread] * len(self.tasks)])


def _fit(data: _Data, noise: float, spread: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Most probable parameters in units of their prior, a root of their covariance, and the log evidence."""
    scales, n = data.scales(spread), len(data.left)
    rows, reference = np.arange(n), float(_share(REFERENCE))
    first_task = 1 + len(data.strategies)

    def curve(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Share left of each run, and its derivatives by the parameters."""
        point = x * scales
        log_efficiency = np.concatenate([[0.0], point[2:first_task]])[data.strategy]
        strength = np.exp(STRENGTH[0] + point[0] + point[first_task:][data.task])
        bend = np.exp(BEND[0] + point[1])
        dose, unit = bend * np.exp(log_efficiency) * data.share, np.log1p(bend * reference)
        log_left = -strength * np.log1p(dose) / unit
        by_dose = -strength * dose / (1 + dose) / unit
        slopes = np.zeros((n, len(x)))
        slopes[:, 0] = slopes[rows, first_task + data.task] = log_left
        slopes[:, 1] = by_dose - log_left * bend * reference / (1 + bend * reference) / unit
        chosen = data.strategy > 0
        slopes[rows[chosen], 1 + data.strategy[chosen]] = by_dose[chosen]
        left = np.exp(log_left)
        return left, left[:, None] * slopes * scales

    found = scipy.optimize.least_squares(
        lambda x: np.concatenate([(curve(x)[0] - data.left) / noise, x]),
        np.zeros(len(scales)),
        jac=lambda x: np.concatenate([curve(x)[1] / noise, np.eye(len(x))]),
        method="lm",
    )
    precision = np.linalg.cholesky(found.jac.T @ found.jac)
    root = scipy.linalg.solve_triangular(precision, np.eye(len(scales)), lower=True).T
    evidence = -found.cost - n * np.log(noise) - np.log(np.diag(precision)).sum()
    for value, (center, width) in ((noise, NOISE_BEFORE), (spread, SPREAD_BEFORE)):
        evidence -= 0.5 * ((np.log(value) - center) / width) ** 2
    return found.x, root, float(evidence)
