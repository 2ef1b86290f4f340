"""How much to replay: a law of forgetting by the fraction of replayed examples, fitted to fine-tunes with replay.

With a fraction p of replayed examples, forgetting relative to no replay falls as a power of 1 + B p. A pilot, one
fine-tune without replay and two with it, already says much about one task; each verification adds more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import scipy
from pydantic import TypeAdapter, ValidationError

from forgetcast.atlas.store import Atlas
from forgetcast.data.recipe import Recipe
from forgetcast.defaults import MOST_EXAMPLES
from forgetcast.errors import ConfigError, DataError
from forgetcast.faults import in_words
from forgetcast.replay.outcome import LAW_METRICS, METRICS, Run
from forgetcast.replay.plan import achieved_ratio, ratio_note
from forgetcast.replay.strategies import NoReplay
from forgetcast.results import Result, plain
from forgetcast.text import did_you_mean

REFERENCE = 1 / 8
"""Replayed examples per new one at which the law's strength is defined."""

STRENGTH_PRIOR = (np.log(0.6), 0.8)
"""Prior mean and standard deviation of the log strength: at the reference ratio a fraction exp(-strength) of the
forgetting remains, 55 % at the mean, and between 6 % and 88 % in 19 of 20 cases."""

CURVATURE_PRIOR = (np.log(300.0), 2.0)
"""The same for log B: from 6 (nearly a straight line) to 15,000; at 300, replaying 1 % has half the effect of 11 %."""

EFFICIENCY_SCALE = 0.35
"""Prior standard deviation of a strategy's log efficiency: within a factor of 2 in 19 of 20 cases."""

NOISE = np.geomspace(0.01, 0.4, 8)
"""Grid of standard deviations of one run's remaining forgetting, averaged over; the prior is log-normal."""

NOISE_PRIOR = (np.log(0.03), 0.8)

SPREAD = np.geomspace(0.05, 0.8, 5)
"""Grid of standard deviations of log strength between tasks, averaged over; the prior is log-normal."""

SPREAD_PRIOR = (np.log(0.3), 0.6)

DRAWS = 4000

MAX_RATIO = 1.0
"""Largest ratio that is advised: half of all examples are replayed ones."""


ADVISED_RATIOS = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)


class Expected(NamedTuple):
    """An estimate with its interval."""

    mean: float
    lower: float
    upper: float


@dataclass(frozen=True, repr=False)
class ReplayLaw:
    """Remaining forgetting as a function of ratio and strategy.

    With p = ratio / (1 + ratio), the fraction of replayed examples among all, and P its value at the `REFERENCE`, the
    remaining forgetting of a run of task t with strategy s is::

        exp(-strength_t * log(1 + B e_s p) / log(1 + B P)) + noise,    e_random = 1

    which is (1 + B e_s p) to a negative power. A strategy of efficiency e_s needs 1 / e_s times as many replayed
    examples as random replay. The strength varies from task to task. The posterior is a Laplace approximation at each
    noise and each spread between tasks on a grid, averaged with the evidence as weight.

    Parameters
    ----------
    metric : 'mean' or 'worst_tenth'
    tasks : tuple of str
        Tasks that the law was fitted to.
    strategies : tuple of str
        Strategies that the law was fitted to; 'random' comes first whether or not it was run.
    runs : int
        Number of runs with replay.
    draws : array, shape (DRAWS, 2 + S - 1 + T + 2)
        Posterior samples: log strength, log B, log efficiency of each strategy but random, deviation of each task's log
        strength, and the standard deviations of noise and of the deviations.

    References
    ----------
    Bethune et al. (2025), Scaling laws for forgetting during finetuning with pretraining data injection,
    arXiv 2502.06042: the loss increase has a factor (1 + B p) to a negative power.
    """

    metric: str
    tasks: tuple[str, ...]
    strategies: tuple[str, ...]
    runs: int
    draws: np.ndarray

    def __repr__(self) -> str:
        strategies = ", ".join(self.strategies)
        return f"ReplayLaw({self.metric!r}, {self.runs} runs of {len(self.tasks)} tasks, strategies {strategies})"

    @classmethod
    def fit(cls, runs: Iterable[Run], metric: str = "mean", *, seed: int = 0) -> ReplayLaw:
        """Fit the law to runs; without any, it is the prior.

        Parameters
        ----------
        runs : iterable of Run
            Those with replay whose run without replay, of the same task, setup and seed, has positive forgetting.
            Others are ignored.
        metric : 'mean' or 'worst_tenth'
        seed : int
            Seed of the posterior samples.
        """
        if metric not in LAW_METRICS:
            raise ConfigError(f"a replay law is fitted to the metric 'mean' or 'worst_tenth', not {metric!r}")
        data = _Data.from_runs(list(runs), metric)
        rng = np.random.default_rng(seed)
        fits = [(*_fit(data, noise, spread), noise, spread) for noise in NOISE for spread in SPREAD]
        evidence = np.array([fit[2] for fit in fits])
        weights = np.exp(evidence - evidence.max())
        counts = rng.multinomial(DRAWS, weights / weights.sum())
        parts = []
        for (mode, root, _, noise, spread), count in zip(fits, counts, strict=True):
            standard = rng.standard_normal((count, len(mode)))
            points = (mode + standard @ root.T) * data.scales(spread)
            points[:, 0] += STRENGTH_PRIOR[0]
            points[:, 1] += CURVATURE_PRIOR[0]
            parts.append(np.column_stack([points, np.full(count, noise), np.full(count, spread)]))
        return cls(metric, data.tasks, data.strategies, len(data.remaining), np.concatenate(parts))

    def remaining(self, strategy: str, ratio: float, *, task: str | None = None, level: float = 0.9) -> Expected:
        """Predict a run's remaining forgetting; below zero means better than before the fine-tune.

        Parameters
        ----------
        strategy : str
            One that was not run has the prior efficiency.
        ratio : float
            Replayed examples per new one.
        task : str, optional
            One of `tasks`, or None for a task without runs.
        level : float
            Probability that the interval contains a single run.
        """
        if not ratio >= 0:
            raise ConfigError(f"the replay ratio must not be negative, but is {ratio}")
        remaining = self._remaining(strategy, ratio, task)
        noise = self.draws[:, -2] * np.random.default_rng(1).standard_normal(len(remaining)) if ratio else 0.0
        lower, upper = np.quantile(remaining + noise, [(1 - level) / 2, (1 + level) / 2])
        return Expected(float(remaining.mean()), float(lower), float(upper))

    def ratio_for(
        self, retention: float, strategy: str = "random", *, task: str | None = None, level: float = 0.9
    ) -> Expected | None:
        """Return the ratio at which the expected retention is reached, with an interval.

        Parameters
        ----------
        retention : float
            Fraction of the forgetting without replay to avoid, in (0, 1).
        strategy, task, level :
            As in `remaining`; the interval is that of the law, without the noise of a run, and may be infinite.

        Returns
        -------
        Expected or None
            None if no ratio up to `MAX_RATIO` is expected to suffice.
        """
        if not 0 < retention < 1:
            raise ConfigError(f"the retention must be between 0 and 1, not {retention}")

        def excess(log_ratio: float) -> float:
            return retention - 1 + float(self._remaining(strategy, float(np.exp(log_ratio)), task).mean())

        low, high = np.log(1e-6), np.log(MAX_RATIO)
        if excess(high) > 0:
            return None
        ratio = float(np.exp(scipy.optimize.brentq(excess, low, high))) if excess(low) > 0 else 1e-6
        curvature, strength, efficiency = self._parts(strategy, task)
        with np.errstate(over="ignore"):
            unit = np.log1p(curvature * _fraction(REFERENCE))
            fraction = np.expm1(-np.log1p(-retention) * unit / strength) / curvature / efficiency
        needed = np.where(fraction < 1, fraction / np.maximum(1 - fraction, 1e-12), np.inf)
        lower, upper = np.quantile(needed, [(1 - level) / 2, (1 + level) / 2], method="nearest")
        return Expected(ratio, float(lower), float(upper))

    def efficiency(self, strategy: str, *, level: float = 0.9) -> Expected:
        """Return the median of a strategy's efficiency, and its interval."""
        *_, efficiency = self._parts(strategy, None)
        lower, median, upper = np.quantile(efficiency, [(1 - level) / 2, 0.5, (1 + level) / 2])
        return Expected(float(median), float(lower), float(upper))

    def _parts(self, strategy: str, task: str | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return B, the task's strength and the strategy's efficiency in every sample, shape (DRAWS,) each."""
        rng, n = np.random.default_rng(0), len(self.draws)
        if strategy == "random":
            log_efficiency = np.zeros(n)
        elif strategy in self.strategies:
            log_efficiency = self.draws[:, 1 + self.strategies.index(strategy)]
        else:
            log_efficiency = EFFICIENCY_SCALE * rng.standard_normal(n)
        if task is None:
            deviation = self.draws[:, -1] * rng.standard_normal(n)
        elif task in self.tasks:
            deviation = self.draws[:, 1 + len(self.strategies) + self.tasks.index(task)]
        else:
            hint = did_you_mean(task, self.tasks)
            raise DataError(f"there is no run with replay of the task {task!r}, only of {', '.join(self.tasks)}{hint}")
        return np.exp(self.draws[:, 1]), np.exp(self.draws[:, 0] + deviation), np.exp(log_efficiency)

    def _remaining(self, strategy: str, ratio: float, task: str | None) -> np.ndarray:
        curvature, strength, efficiency = self._parts(strategy, task)
        doses = np.log1p(curvature * efficiency * _fraction(ratio)) / np.log1p(curvature * _fraction(REFERENCE))
        return np.asarray(np.exp(-strength * doses))


@dataclass(frozen=True, repr=False)
class Advice(Result):
    """What the runs in an atlas say about ratios and strategies.

    Attributes
    ----------
    strategy : str
        Strategy that will be used.
    task : str or None
        Task that the estimates are for; None for one without runs.
    target : float or None
        Retention to reach.
    runs, tasks : int
        Number of runs with replay, and of their tasks.
    largest : float
        Largest ratio that was run; 0 without runs.
    remaining : mapping of (strategy, ratio) to mapping of metric to Expected
        Remaining forgetting.
    efficiency : mapping of strategy to mapping of metric to Expected
        Efficiency of each strategy that was run.
    needed : Expected or None
        Ratio at which the mean forgetting is expected to meet the target; None without a target or such a ratio.
    most : Expected
        Remaining forgetting at `MAX_RATIO`.
    recipe : Recipe or None
        Whose whole batches make the ratios of `remaining`; None: no recipe is known, and any ratio is listed.
    """

    strategy: str
    task: str | None
    target: float | None
    runs: int
    tasks: int
    largest: float
    remaining: Mapping[tuple[str, float], Mapping[str, Expected]]
    efficiency: Mapping[str, Mapping[str, Expected]]
    needed: Expected | None
    most: Expected
    recipe: Recipe | None = None

    def __repr__(self) -> str:
        needed = "None" if self.needed is None else f"{self.needed.mean:.3g}"
        return (
            f"Advice({self.strategy!r}, {self.runs} runs of {self.tasks} tasks, target={self.target}, needed={needed})"
        )

    def sentences(self) -> list[str]:
        """State what the runs show, and what remains unknown."""
        if self.runs:
            which = self.task or "a new task like these"
            lines = [f"Based on {self.runs} runs with replay of {self.tasks} task(s); the estimates are for {which}."]
        elif self.largest:
            lines = [
                "No run with replay in this atlas has one without replay beside it that forgot anything on the mean, "
                "so there was nothing to save: the mean is a rough estimate from published results. Pilot a task that "
                "costs more, or fine-tune longer."
            ]
        else:
            lines = [
                "This atlas has no runs with replay, so this is a rough estimate from published results; "
                "`forgetcast pilot` makes three runs and narrows it."
            ]
        for strategy, by_metric in self.efficiency.items():
            lines += [self._compared(strategy, metric, efficiency) for metric, efficiency in by_metric.items()]
        if self.runs and not self.efficiency:
            lines.append("Only random replay was run; whether another strategy needs fewer examples is unknown.")
        elif self.efficiency and all(
            e.lower <= 1 for by_metric in self.efficiency.values() for e in by_metric.values()
        ):
            lines.append("Random replay is good enough: no strategy is shown to need fewer examples.")
        if self.recipe is not None:
            lines += _of_whole_batches(self.recipe)
        if self.target is None:
            return lines
        aim = f"To avoid {self.target:.0%} of the forgetting with {self.strategy} replay"
        if self.needed is None:
            lines.append(
                f"{aim}, no ratio up to {MAX_RATIO:g} is expected to suffice; "
                f"a ratio of {MAX_RATIO:g} avoids {1 - self.most.mean:.0%}."
            )
        else:
            lines.append(
                f"{aim}, expect a ratio of {self.needed.mean:.3g} "
                f"(90 % interval {self.needed.lower:.2g} to {self.needed.upper:.2g})."
            )
            if self.needed.mean > self.largest > 0:
                lines.append(f"This extrapolates beyond the largest ratio that was run, {self.largest:.3g}.")
            if self.recipe is not None:
                lines += _in_whole_batches(self.needed.mean, self.recipe)
        return lines

    def _compared(self, strategy: str, metric: str, efficiency: Expected) -> str:
        if efficiency.lower > 1:
            verdict = "needs fewer examples"
        elif efficiency.upper < 1:
            verdict = "needs more examples"
        else:
            verdict = "is not shown to need fewer examples"
        return (
            f"{METRICS[metric].capitalize()}: {strategy} replay {verdict} than random replay "
            f"(estimate {1 / efficiency.mean:.2f} times as many, "
            f"90 % interval {1 / efficiency.upper:.2f} to {1 / efficiency.lower:.2f})."
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the estimates and the sentences, ready for JSON; an infinite end of an interval is None."""
        names = ("strategy", "task", "target", "runs", "tasks", "largest")
        return {
            **{name: getattr(self, name) for name in names},
            "remaining": [
                {"strategy": strategy, "ratio": ratio} | plain(by_metric)
                for (strategy, ratio), by_metric in self.remaining.items()
            ],
            "efficiency": plain(self.efficiency),
            "needed": plain(self.needed),
            "at_most": plain(self.most),
            "steps": None if self.recipe is None else self.recipe.steps,
            "sentences": self.sentences(),
        }


def ratio_text(ratio: float) -> str:
    """Write a ratio as a fraction in whole numbers, such as 1/32 or 2/7."""
    return str(Fraction(ratio).limit_denominator(MOST_EXAMPLES))


def advised_ratios(recipe: Recipe | None) -> tuple[float, ...]:
    """Return the ratios that advice is about: those that whole batches of the recipe make of `ADVISED_RATIOS`."""
    if recipe is None:
        return ADVISED_RATIOS
    made: list[float] = []
    for ratio in ADVISED_RATIOS:
        with suppress(ConfigError):  # so small that it has no batch
            made.append(achieved_ratio(recipe.steps, ratio))
    return tuple(dict.fromkeys(made)) or (1 / recipe.steps,)


def _of_whole_batches(recipe: Recipe) -> list[str]:
    """Say which of `ADVISED_RATIOS` are not listed, because the recipe's whole batches do not make them."""
    made = advised_ratios(recipe)
    others = [ratio_text(ratio) for ratio in ADVISED_RATIOS if not np.isclose(made, ratio, rtol=1e-9, atol=0).any()]
    if not others:
        return []
    return [
        f"Ratios are those that whole batches make with the {recipe.steps} steps of the recipe: "
        f"{', '.join(map(ratio_text, made))}, but not {', '.join(others)}."
    ]


def _in_whole_batches(ratio: float, recipe: Recipe) -> list[str]:
    """Say what an advised ratio becomes under the recipe, or that it has no batch."""
    try:
        note = ratio_note(ratio, recipe.steps, recipe.batch_size)
    except ConfigError as error:
        note = str(error)
    return [] if note is None else [f"With this recipe, {note}."]


def advise(
    atlas: Atlas, strategy: str, *, target: float | None = None, task: str | None = None, recipe: Recipe | None = None
) -> Advice:
    """Return what the runs in an atlas say about ratios and strategies.

    Parameters
    ----------
    atlas : Atlas
    strategy : str
        Strategy that will be used.
    target : float, optional
        Retention to reach, in (0, 1).
    task : str, optional
        The estimates are for this task if the atlas has runs of it, otherwise for a new one.
    recipe : Recipe, optional
        How the model will be tuned: ratios are those of its whole batches; default: not known.

    Raises
    ------
    DataError
        If the atlas has runs that `verify` and `pilot` did not write.
    """
    try:
        runs = TypeAdapter(list[Run]).validate_python(atlas.replays)
    except ValidationError as error:
        raise DataError(f"{atlas.path}/replays: {in_words(error)}") from None
    laws = {metric: ReplayLaw.fit(runs, metric) for metric in LAW_METRICS}
    mean = laws["mean"]
    task = task if task in mean.tasks else None
    strategies = dict.fromkeys([*mean.strategies, strategy])
    return Advice(
        strategy=strategy,
        task=task,
        target=target,
        runs=mean.runs,
        tasks=len(mean.tasks),
        largest=max((run.achieved_ratio or run.ratio or 0.0 for run in runs), default=0.0),
        remaining={
            (name, ratio): {metric: law.remaining(name, ratio, task=task) for metric, law in laws.items()}
            for name in strategies
            for ratio in advised_ratios(recipe)
        },
        efficiency={
            name: {metric: law.efficiency(name) for metric, law in laws.items()} for name in mean.strategies[1:]
        },
        needed=mean.ratio_for(target, strategy, task=task) if target is not None else None,
        most=mean.remaining(strategy, MAX_RATIO, task=task),
        recipe=recipe,
    )


def _fraction(ratio: float | np.ndarray) -> float | np.ndarray:
    """Convert a ratio of replayed to new examples to the fraction of replayed ones among all."""
    return ratio / (1 + ratio)


@dataclass(frozen=True)
class _Data:
    """Runs with replay, relative to those without: remaining forgetting, fraction replayed, strategy and task codes."""

    remaining: np.ndarray
    fraction: np.ndarray
    strategy: np.ndarray
    task: np.ndarray
    strategies: tuple[str, ...]
    tasks: tuple[str, ...]

    @classmethod
    def from_runs(cls, runs: Sequence[Run], metric: str) -> _Data:
        # Other arms that replay nothing, such as interpolated weights, are no baseline.
        without = {
            (run.task, run.setup, run.seed): getattr(run, metric)
            for run in runs
            if run.ratio == 0 and run.strategy in (None, NoReplay.name)
        }
        rows = [
            (getattr(run, metric) / before, run.achieved_ratio or run.ratio, run.strategy, run.task)
            for run in runs
            if run.ratio and run.strategy and (before := without.get((run.task, run.setup, run.seed), 0.0)) > 0
        ]
        names = tuple(dict.fromkeys(["random", *(row[2] for row in rows)]))
        tasks = tuple(dict.fromkeys(row[3] for row in rows))
        return cls(
            remaining=np.array([row[0] for row in rows]),
            fraction=np.asarray(_fraction(np.array([row[1] for row in rows]))),
            strategy=np.array([names.index(row[2]) for row in rows], dtype=np.intp),
            task=np.array([tasks.index(row[3]) for row in rows], dtype=np.intp),
            strategies=names,
            tasks=tasks,
        )

    def scales(self, spread: float) -> np.ndarray:
        """Prior standard deviations of log strength, log B, log efficiencies, and deviations of the tasks."""
        efficiencies = [EFFICIENCY_SCALE] * (len(self.strategies) - 1)
        return np.array([STRENGTH_PRIOR[1], CURVATURE_PRIOR[1], *efficiencies, *[spread] * len(self.tasks)])


def _fit(data: _Data, noise: float, spread: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the posterior mode in prior standard deviations, a root of the covariance, and the log evidence."""
    scales, n = data.scales(spread), len(data.remaining)
    rows, reference = np.arange(n), float(_fraction(REFERENCE))
    first_task = 1 + len(data.strategies)

    def curve(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the remaining forgetting of each run, shape (n,), and its derivatives by x, shape (n, len(x))."""
        point = x * scales
        log_efficiency = np.concatenate([[0.0], point[2:first_task]])[data.strategy]
        strength = np.exp(STRENGTH_PRIOR[0] + point[0] + point[first_task:][data.task])
        curvature = np.exp(CURVATURE_PRIOR[0] + point[1])
        dose, unit = curvature * np.exp(log_efficiency) * data.fraction, np.log1p(curvature * reference)
        log_remaining = -strength * np.log1p(dose) / unit
        by_dose = -strength * dose / (1 + dose) / unit
        slopes = np.zeros((n, len(x)))
        slopes[:, 0] = slopes[rows, first_task + data.task] = log_remaining
        slopes[:, 1] = by_dose - log_remaining * curvature * reference / (1 + curvature * reference) / unit
        other = data.strategy > 0
        slopes[rows[other], 1 + data.strategy[other]] = by_dose[other]
        remaining = np.exp(log_remaining)
        return remaining, remaining[:, None] * slopes * scales

    solution = scipy.optimize.least_squares(
        lambda x: np.concatenate([(curve(x)[0] - data.remaining) / noise, x]),
        np.zeros(len(scales)),
        jac=lambda x: np.concatenate([curve(x)[1] / noise, np.eye(len(x))]),
        method="lm",
    )
    precision = np.linalg.cholesky(solution.jac.T @ solution.jac)
    root = scipy.linalg.solve_triangular(precision, np.eye(len(scales)), lower=True).T
    evidence = -solution.cost - n * np.log(noise) - np.log(np.diag(precision)).sum()
    for value, (center, width) in ((noise, NOISE_PRIOR), (spread, SPREAD_PRIOR)):
        evidence -= 0.5 * ((np.log(value) - center) / width) ** 2
    return solution.x, root, float(evidence)
