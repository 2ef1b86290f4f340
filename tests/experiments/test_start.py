from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgetcast import Atlas, ConfigError, MismatchError, MissingExtraError
from forgetcast.experiments.procedural import KNOWN_TASKS, procedural_task
from forgetcast.experiments.start import (
    MEASURED,
    MEASURED_TASKS,
    RESERVE,
    START_RECIPE,
    Speed,
    StartSettings,
    choose_plan,
    duration,
    measured_error,
    plan_start,
    start_atlas,
)
from forgetcast.lm import FineTuner, score
from support.data import make_pool
from support.models import tiny
from support.training import Interruption, make_recipe, stop_at

RECIPE = make_recipe(method="lora", steps=2)
SETTINGS = StartSettings(tasks=3, recipe=RECIPE)
SLOW = Speed(setup=1.0, step=0.5, example=0.01)

seconds = st.floats(1e-3, 10.0)
speeds = st.builds(Speed, seconds, seconds, seconds, st.lists(st.floats(0.2, 5.0), min_size=36, max_size=36).map(tuple))


@given(speeds, st.integers(1, 5000), st.floats(1.0, 1e6), st.none() | st.integers(2, 36), st.booleans())
def test_a_plan_fits_its_budget_and_no_measured_one_is_better(
    speed: Speed, examples: int, budget: float, tasks: int | None, own: bool
) -> None:
    recipe = RECIPE if own else None
    everything = [
        # By hand, the cost of each setting that was measured.
        (
            measured_error("lora", steps, n, share),
            speed.example * examples
            + sum(
                speed.setup + steps * speed.step * length + max(round(share * examples), 1) * speed.example
                for length in speed.lengths[:n]
            ),
        )
        for n in ([tasks] if tasks else range(2, 37))
        for steps in ([RECIPE.steps] if own else [10, 40])
        for share in (1.0, 0.25)
    ]
    useful = [(error, cost) for error, cost in everything if tasks or error < 1]
    try:
        plan = choose_plan(speed, examples, StartSettings(budget=budget, tasks=tasks, recipe=recipe))
    except ConfigError:
        assert min(cost for _, cost in useful) > (budget - 1) * (1 - RESERVE)  # rounded up to a whole second
        return
    assert plan.seconds <= budget * (1 - RESERVE) + 1e-6
    assert tasks in (None, len(plan.tasks))
    assert plan.tasks == KNOWN_TASKS[: len(plan.tasks)]
    better = [error for error, cost in useful if cost <= (budget - 1) * (1 - RESERVE) and error < plan.error - 1e-9]
    assert not better
    if tasks is None:
        assert plan.score_share == 1, "fewer tasks of the whole pool forecast better"


@given(speeds, st.integers(1, 5000), st.floats(1.0, 1e5), st.floats(1.0, 10.0))
def test_a_larger_budget_is_never_worse(speed: Speed, examples: int, budget: float, more: float) -> None:
    def error(budget: float) -> float:
        try:
            return choose_plan(speed, examples, StartSettings(budget=budget)).error
        except ConfigError:
            return np.inf

    assert error(budget * more) <= error(budget)


@given(speeds, st.integers(1, 5000))
def test_the_least_budget_that_is_named_is_enough(speed: Speed, examples: int) -> None:
    with pytest.raises(ConfigError, match="the least is") as error:
        choose_plan(speed, examples, StartSettings(budget=1e-6))
    number, unit = str(error.value).partition("the least is ")[2].partition(",")[0][:-1], str(error.value)
    unit = unit.partition("the least is ")[2].partition(",")[0][-1]
    least = float(number) * {"s": 1, "m": 60, "h": 3600}[unit]
    assert choose_plan(speed, examples, StartSettings(budget=least)).error < 1


def test_a_share_is_scored_only_where_more_tasks_are_asked_for_than_fit() -> None:
    many = choose_plan(SLOW, 10_000, StartSettings(budget=1800, tasks=28))
    assert many.score_share == 0.25
    assert choose_plan(SLOW, 10_000, StartSettings(budget=1800)).score_share == 1
    assert choose_plan(SLOW, 100, StartSettings()).recipe == START_RECIPE
    assert len(choose_plan(SLOW, 100, StartSettings()).tasks) == 16


def test_what_was_measured_is_what_the_benchmark_wrote() -> None:
    file = Path(__file__).parents[2] / "benchmarks" / "results" / "cost.json"
    rows = [row for row in json.loads(file.read_text())["rows"] if "method" in row]
    found: dict[tuple[str, int, float], list[float]] = {}
    for row in sorted(rows, key=lambda row: row["tasks"]):
        found.setdefault((row["method"], row["steps"], row["share"]), []).append(round(row["error"], 2))
    assert {key: tuple(errors) for key, errors in found.items()} == MEASURED
    assert {row["tasks"] for row in rows} == set(MEASURED_TASKS)
    for (method, steps, share), errors in MEASURED.items():
        assert measured_error(method, steps, 2, share) == errors[0]
        assert measured_error(method, steps, 36, share) == errors[-1]


@pytest.mark.parametrize(("time", "text"), [(0.2, "1s"), (95, "95s"), (120, "2m"), (601, "11m"), (7200, "2h")])
def test_durations(time: float, text: str) -> None:
    assert duration(time) == text


def test_rows_are_those_of_the_tasks_and_an_interrupted_start_goes_on(tmp_path: Path) -> None:
    path, pool = tmp_path / "first.atlas", make_pool()
    plan = plan_start(path, FineTuner(tiny()), pool, SETTINGS)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()], "a plan leaves nothing"
    assert (len(plan.tasks), plan.recipe, plan.score_share) == (3, RECIPE, 1.0)
    assert plan.base_seconds > 0
    assert all(seconds > 0 for seconds in plan.row_seconds)
    with pytest.raises(Interruption):
        start_atlas(path, FineTuner(tiny()), pool, SETTINGS, plan, on_progress=stop_at(f"{plan.tasks[1]}: scoring"))
    assert Atlas.open(path).tasks == plan.tasks[:1]
    again = plan_start(path, FineTuner(tiny()), pool, SETTINGS)
    assert again == plan
    assert again.left(Atlas.open(path).tasks) == pytest.approx(sum(plan.row_seconds[1:]))
    atlas = start_atlas(path, FineTuner(tiny()), pool, SETTINGS, again)
    assert atlas.tasks == KNOWN_TASKS[:3]
    for name, row in zip(atlas.tasks, atlas.matrix().values, strict=True):
        task = procedural_task(name, RECIPE.steps * RECIPE.batch_size)
        tuned = FineTuner(tiny()).tune(task, RECIPE).language_model
        np.testing.assert_allclose(row, score(tuned, pool).nll - atlas.before.nll, atol=1e-5)

    with pytest.raises(MismatchError, match=r"was begun with tasks 3 .*go on with that"):
        plan_start(path, FineTuner(tiny()), pool, SETTINGS.model_copy(update={"tasks": 4}))
    with pytest.raises(MismatchError, match="measured on another base model"):
        plan_start(path, FineTuner(tiny(seed=1)), pool, SETTINGS)
    with pytest.raises(MismatchError, match="pool"):
        plan_start(path, FineTuner(tiny()), make_pool(12), SETTINGS)
    (tmp_path / "first.atlas.start.json").unlink()
    with pytest.raises(MismatchError, match="was not begun by `start`"):
        plan_start(path, FineTuner(tiny()), pool, SETTINGS)


def test_without_reasoning_gym_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(MissingExtraError, match=r"forgetcast\[demo\]"):
        plan_start(tmp_path / "first.atlas", FineTuner(tiny()), make_pool(), SETTINGS)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


@pytest.mark.parametrize("wrong", [{"tasks": 1}, {"tasks": 37}, {"budget": 0.0}, {"budgets": 3.0}])
def test_invalid_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        StartSettings(**wrong)
