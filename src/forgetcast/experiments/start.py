"""A first atlas without a history: fine-tunes on built-in procedural tasks, as many as pay within a budget of time."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from forgetcast.atlas.index import check_writable, is_atlas
from forgetcast.atlas.matrix import check_fingerprint
from forgetcast.atlas.storage import beside
from forgetcast.atlas.store import Atlas
from forgetcast.data.pool import Pool
from forgetcast.data.recipe import Recipe
from forgetcast.errors import ConfigError, MismatchError
from forgetcast.experiments.collect import Sweep, collect, collection_work, prepare_atlas
from forgetcast.experiments.meter import Meter, Work
from forgetcast.experiments.procedural import KNOWN_TASKS, procedural_task
from forgetcast.experiments.runs import check_base
from forgetcast.experiments.speed import TIMED_STEPS, time_scoring, time_training, timed_sample
from forgetcast.files import check_destination, read_json, write_json
from forgetcast.progress import OnProgress
from forgetcast.results import validated
from forgetcast.settings import Seed

if TYPE_CHECKING:
    from forgetcast.lm import FineTuner

START_RECIPE = Recipe(method="lora", steps=40, learning_rate=1e-3, batch_size=8, max_length=512)
"""How a first atlas is tuned, unless another recipe is given; a small budget takes fewer steps."""

MEASURED_TASKS = (2, 4, 8, 16, 28)

MEASURED: dict[tuple[str, int, float], tuple[float, ...]] = {
    ("lora", 40, 1.0): (1.21, 0.75, 0.7, 0.66, 0.57),
    ("lora", 40, 0.25): (1.33, 1.26, 1.12, 0.96, 0.88),
    ("lora", 10, 1.0): (0.96, 0.93, 0.93, 0.92, 0.86),
    ("lora", 10, 0.25): (0.99, 0.98, 1.0, 0.97, 0.98),
    ("full", 40, 1.0): (1.15, 0.7, 0.66, 0.66, 0.6),
    ("full", 40, 0.25): (1.27, 1.2, 1.1, 0.92, 0.86),
    ("full", 10, 1.0): (0.89, 0.78, 0.73, 0.74, 0.71),
    ("full", 10, 0.25): (0.97, 0.97, 0.95, 0.9, 0.9),
}
"""Error of forecasts relative to no history, by method, steps and share scored, for each of `MEASURED_TASKS`.

Of `benchmarks/cost.py`, on the demo model: 30 probes of new procedural tasks that were tuned for 40 steps."""

DEFAULT_TASKS = 16
"""Without a budget."""

RESERVE = 0.1
"""Share of the budget that is not planned with, because steps and scores do not always take the same time."""

MOST_QUESTIONS = 1000
"""Questions of a task at most; a longer fine-tune repeats them."""


class StartSettings(BaseModel):
    """What is asked of a first atlas.

    Attributes
    ----------
    budget : float, optional
        Seconds for base scores and rows; default: `tasks` of the recipe, however long they take.
    tasks : int, optional
        Number of tasks; default: as many as pay within the budget, or 16 without one.
    recipe : Recipe, optional
        How the model is tuned; default: LoRA, with 40 or 10 steps.
    seed : int
        Of the questions, their order and LoRA's initial weights.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    budget: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    tasks: int | None = Field(default=None, ge=2, le=len(KNOWN_TASKS))
    recipe: Recipe | None = None
    seed: Seed = 0


class StartPlan(BaseModel):
    """Rows of a first atlas, how long they take, and what such an atlas was worth where it was measured.

    Attributes
    ----------
    recipe : Recipe
    score_share : float
        Share of the pool, in (0, 1], that is scored for each task.
    base_seconds : float
        Estimate of the base scores.
    row_seconds : tuple of float
        Estimate of each row: the first of `KNOWN_TASKS`.
    error : float
        RMSE of forecasts relative to no history; see `MEASURED`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: Recipe
    score_share: float = Field(gt=0, le=1)
    base_seconds: float
    row_seconds: tuple[float, ...]
    error: float

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, which are those of the rows."""
        return KNOWN_TASKS[: len(self.row_seconds)]

    @property
    def seconds(self) -> float:
        """Estimate of everything."""
        return self.base_seconds + sum(self.row_seconds)

    def left(self, done: Collection[str]) -> float:
        """Return the estimate of what is left once the base scores and the rows in `done` are there."""
        return sum(s for name, s in zip(self.tasks, self.row_seconds, strict=True) if name not in done)


class _Kept(BaseModel):
    """Content of the file beside the atlas from which the same command goes on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    settings: StartSettings
    plan: StartPlan


@dataclass(frozen=True)
class Speed:
    """How fast a machine is with a model, in seconds.

    Attributes
    ----------
    setup : float
        What a fine-tune takes besides its steps.
    step : float
        A step on a task of relative length 1.
    example : float
        Scoring an example of the pool.
    lengths : tuple of float
        Mean length of the questions of each of `KNOWN_TASKS`, relative to the task that was timed.
    """

    setup: float
    step: float
    example: float
    lengths: tuple[float, ...] = (1.0,) * len(KNOWN_TASKS)


def choose_plan(speed: Speed, examples: int, settings: StartSettings) -> StartPlan:
    """Choose tasks, steps and the share scored: the least measured error within the budget, then the least time.

    A share of the pool is scored for each task only where the number of tasks is given and the whole pool does not fit:
    by the measurement, fewer tasks or steps lose less.

    Parameters
    ----------
    speed : Speed
    examples : int
        Of the pool.
    settings : StartSettings

    Raises
    ------
    ConfigError
        If nothing fits that forecasts better than no history; the message says the least budget.
    """
    sizes = range(2, len(KNOWN_TASKS) + 1) if settings.tasks is None else (settings.tasks,)
    if settings.budget is None:
        size = settings.tasks or DEFAULT_TASKS
        return _plan(speed, examples, settings.recipe or _default(settings.seed), size, 1.0)
    plans = [
        _plan(speed, examples, recipe, size, share) for recipe, share in _ways_to_measure(settings) for size in sizes
    ]
    useful = [plan for plan in plans if settings.tasks is not None or plan.error < 1]
    fitting = [plan for plan in useful if _needed(plan) <= settings.budget]
    if not fitting:
        least = min(useful, key=_needed)
        raise ConfigError(
            f"a budget of {duration(settings.budget)} is too small: the least is {duration(_needed(least))}, for "
            f"{len(least.tasks)} tasks of {least.recipe.steps} steps; a smaller pool needs less"
        )
    return min(fitting, key=lambda plan: (plan.error, plan.seconds))


def _needed(plan: StartPlan) -> float:
    """Return the budget of a plan, in whole seconds, so that it is enough as it is printed."""
    return math.ceil(plan.seconds / (1 - RESERVE))


def _default(seed: int, steps: int = START_RECIPE.steps) -> Recipe:
    return START_RECIPE.model_copy(update={"seed": seed, "steps": steps})


def _ways_to_measure(settings: StartSettings) -> Iterator[tuple[Recipe, float]]:
    """Yield recipes and shares of the pool that were measured."""
    shares = sorted({share for _, _, share in MEASURED}, reverse=True)
    steps = sorted({steps for _, steps, _ in MEASURED}, reverse=True)
    for recipe in [settings.recipe] if settings.recipe is not None else [_default(settings.seed, n) for n in steps]:
        for share in shares:
            yield recipe, share


def _plan(speed: Speed, examples: int, recipe: Recipe, size: int, share: float) -> StartPlan:
    scoring = speed.example * max(round(share * examples), 1)
    rows = tuple(speed.setup + recipe.steps * speed.step * length + scoring for length in speed.lengths[:size])
    return StartPlan(
        recipe=recipe,
        score_share=share,
        base_seconds=speed.example * examples,
        row_seconds=rows,
        error=measured_error(recipe.method, recipe.steps, size, share),
    )


def measured_error(method: str, steps: int, tasks: int, share: float = 1.0) -> float:
    """Return the error of forecasts from so many tasks, relative to no history, where it was measured.

    Between numbers of tasks it is read off a line in their logarithm; beyond, and for other steps, the nearest counts.
    """
    errors = MEASURED[method, measured_steps(method, steps), share]
    return float(np.interp(math.log(tasks), np.log(MEASURED_TASKS), errors))


def measured_steps(method: str, steps: int) -> int:
    """Return the number of steps that was measured and is nearest, as a ratio."""
    return min(sorted({n for m, n, _ in MEASURED if m == method}), key=lambda n: abs(math.log(n / steps)))


def measure_speed(tuner: FineTuner, pool: Pool, recipe: Recipe) -> Speed:
    """Time some steps of training, and the scoring of some examples, after one of each that does not count.

    Parameters
    ----------
    tuner : FineTuner
    pool : Pool
    recipe : Recipe

    Raises
    ------
    MissingExtraError
        If reasoning-gym is not installed.
    """
    count = TIMED_STEPS * recipe.batch_size
    tasks = [procedural_task(name, count, seed=recipe.seed) for name in KNOWN_TASKS]
    lengths = np.array([np.mean([len(example.full_text) for example in task]) for task in tasks])
    typical = int(np.argsort(lengths)[len(lengths) // 2])
    training = time_training(tuner, tasks[typical], recipe)
    sample = timed_sample(pool, recipe.seed)
    example = time_scoring(tuner.base, sample) / len(sample)
    return Speed(training.setup, training.step, example, tuple((lengths / lengths[typical]).tolist()))


def plan_start(path: str | Path, tuner: FineTuner, pool: Pool, settings: StartSettings) -> StartPlan:
    """Plan a first atlas by timing the machine, or return the plan of the atlas that was begun.

    Parameters
    ----------
    path : path
        Of the atlas.
    tuner : FineTuner
    pool : Pool
    settings : StartSettings

    Raises
    ------
    MismatchError
        If there is an atlas of another base model or pool, or one that was begun with other settings or otherwise.
    ConfigError
        If the budget is too small.
    MissingExtraError
        If reasoning-gym is not installed.
    DataError, OSError
        If the atlas can be neither created nor written to.
    """
    check_writable(path)
    check_destination(_kept_file(path))
    if is_atlas(path):
        atlas = Atlas.open(path)
        check_fingerprint(f"the atlas {atlas.path}", atlas.pool.fingerprint, pool)
        check_base(atlas, tuner.base)
        if _kept_file(path).exists():
            return _begun(path, settings)
        if atlas.recipe:
            raise MismatchError(f"the atlas {atlas.path} was not begun by `start`: choose another, or use `collect`")
    speed = measure_speed(tuner, pool, settings.recipe or _default(settings.seed))
    return choose_plan(speed, len(pool), settings)


def start_atlas(
    path: str | Path,
    tuner: FineTuner,
    pool: Pool,
    settings: StartSettings,
    plan: StartPlan,
    *,
    on_progress: OnProgress | None = None,
) -> Atlas:
    """Make what was planned, and what is missing of it if it was begun.

    Settings and plan are kept in a file beside the atlas, ATLAS.start.json, from which `plan_start` goes on.

    Parameters
    ----------
    path : path
        Of the atlas.
    tuner : FineTuner
    pool : Pool
    settings : StartSettings
    plan : StartPlan
        From `plan_start`.
    on_progress : callable, optional

    Raises
    ------
    MismatchError
        If the atlas is of another base model, pool or recipe.
    IncompleteError
        If rows failed; all others were made.
    """
    size = min(plan.recipe.steps * plan.recipe.batch_size, MOST_QUESTIONS)
    tasks = {name: procedural_task(name, size, seed=settings.seed) for name in plan.tasks}
    write_json(_kept_file(path), _Kept(settings=settings, plan=plan).model_dump())
    meter = Meter.of(on_progress)
    meter.later = collection_work(tasks.values(), pool, plan.recipe, tuner.base.context)
    atlas = prepare_atlas(path, tuner.base, pool, plan.recipe, on_progress=meter)
    meter.later = Work()
    sweep = Sweep(score_share=plan.score_share)
    return collect(tuner, atlas, plan.recipe, tasks, sweep=sweep, on_progress=meter)


def _kept_file(path: str | Path) -> Path:
    return beside(path, "start.json")


def _begun(path: str | Path, settings: StartSettings) -> StartPlan:
    """Return the plan of an atlas that was begun with these settings."""
    file = _kept_file(path)
    kept = validated(_Kept, read_json(file), str(file))
    now: dict[str, Any] = settings.model_dump()
    if changed := {name: value for name, value in kept.settings.model_dump().items() if value != now[name]}:
        raise MismatchError(
            f"the atlas {path} was begun with {', '.join(f'{name} {value}' for name, value in changed.items())} "
            f"({file}); go on with that, or choose another atlas"
        )
    return kept.plan


def duration(seconds: float) -> str:
    """Write a time as a budget is written, rounded up: 95s, 12m, 2h."""
    for unit, length in (("h", 3600), ("m", 60)):
        if seconds >= 10 * length or (seconds >= length and math.ceil(seconds) % length == 0):
            return f"{math.ceil(math.ceil(seconds) / length)}{unit}"
    return f"{math.ceil(seconds)}s"
