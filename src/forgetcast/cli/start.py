"""The command that makes a first atlas where there is no history: start."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forgetcast.cli.app import (
    app,
    check_models,
    err,
    load_data,
    load_tuner,
    out,
    print_json,
    progress,
    require_single_process,
    seconds,
)
from forgetcast.cli.options import (
    ATLAS,
    AsJson,
    Columns,
    Format,
    Loading,
    ModelName,
    NewAtlas,
    PoolPath,
    RecipeName,
    Seed,
    Strict,
    loads_a_model,
)
from forgetcast.errors import IncompleteError

if TYPE_CHECKING:
    from forgetcast.atlas import Atlas
    from forgetcast.experiments import StartPlan


@app.command(rich_help_panel=ATLAS)
@loads_a_model
def start(
    model: ModelName,
    pool: PoolPath,
    output: NewAtlas,
    budget: Annotated[
        str | None, typer.Option(help="Time for base scores and rows, such as 90s, 30m or 2h; default: no limit.")
    ] = None,
    tasks: Annotated[
        int | None, typer.Option(help="Number of tasks; default: what pays within the budget, or 16 without one.")
    ] = None,
    recipe: RecipeName = None,
    seed: Seed = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Time the machine, say what would be done, and stop there.")
    ] = False,
    format: Format = None,
    column: Columns = None,
    strict: Strict = False,
    as_json: AsJson = False,
    *,
    loading: Loading,
) -> None:
    """Make a first atlas without a history, by fine-tunes on built-in procedural tasks (extra demo). Resumable.

    A few steps and scores are timed first, and the time that everything takes is said before it begins. The recipe
    defaults to LoRA with 40 steps, or 10 if the budget is small; --format and --column are about the pool. Exit code 1:
    rows failed; each is named, and the others were made.

    Example: forgetcast start ./my-model pool.jsonl -o first.atlas --budget 30m
    """
    from forgetcast.atlas import Atlas
    from forgetcast.atlas.index import check_writable, is_atlas
    from forgetcast.data import Recipe
    from forgetcast.experiments.start import StartSettings, measured_steps, plan_start, start_atlas
    from forgetcast.settings import check_settings

    require_single_process("start")
    asked: dict[str, Any] = {
        "budget": None if budget is None else seconds(budget, "--budget"),
        "tasks": tasks,
        "recipe": None if recipe is None else Recipe.load(recipe).model_copy(update={"seed": seed}),
        "seed": seed,
    }
    settings = check_settings(asked, StartSettings, where="start")
    check_writable(output)
    check_models(loading, model)
    examples = load_data(pool, format, column, strict)
    tuner = load_tuner(model, loading)
    plan = plan_start(output, tuner, examples, settings)
    left = plan.left(Atlas.open(output).tasks) if is_atlas(output) else plan.seconds
    _say_plan(plan, left)
    facts: dict[str, Any] = {
        "atlas": str(output),
        "tasks": list(plan.tasks),
        "method": plan.recipe.method,
        "steps": plan.recipe.steps,
        "score_share": plan.score_share,
        "estimated_seconds": round(left, 1),
        "error_to_no_history": round(plan.error, 2),
        "error_measured_with": {
            "model": "the demo model",
            "method": plan.recipe.method,
            "steps": measured_steps(plan.recipe.method, plan.recipe.steps),
        },
    }
    if dry_run:
        if as_json:
            print_json(facts)
        return
    started, failures = time.monotonic(), dict[str, str]()
    with progress() as report:
        try:
            start_atlas(output, tuner, examples, settings, plan, on_progress=report)
        except IncompleteError as error:
            failures = error.failures
    facts |= {"seconds": round(time.monotonic() - started, 1), "failures": failures}
    if as_json:
        print_json(facts)
    else:
        _say_result(Atlas.open(output), plan, facts)
    for name, reason in failures.items():
        err.print(f"failed: {name}: {reason}", markup=False, soft_wrap=True)
    if failures:
        raise typer.Exit(1)


def _say_plan(plan: StartPlan, left: float) -> None:
    """Say what will be done, and how long it takes."""
    from forgetcast.experiments.start import duration

    share = "the whole pool" if plan.score_share == 1 else f"{plan.score_share:.0%} of the pool"
    err.print(
        f"{len(plan.tasks)} tasks of {plan.recipe.steps} steps ({plan.recipe.method}), {share} scored after each: "
        f"about {duration(left)} on this machine",
        markup=False,
        soft_wrap=True,
    )
    if plan.error >= 1:
        err.print(
            "warning: where it was measured, such an atlas forecast no better than none; take more tasks, or more time",
            markup=False,
            soft_wrap=True,
        )


def _say_result(atlas: Atlas, plan: StartPlan, facts: dict[str, Any]) -> None:
    """Say what was made, what it is worth as far as that was measured, and what comes next."""
    from forgetcast.experiments.start import duration

    measured = facts["error_measured_with"]
    for line in (
        f"{atlas.path}: {len(atlas.tasks)} tasks x {len(atlas.examples)} examples, in {duration(facts['seconds'])}",
        f"With {len(plan.tasks)} such tasks, the error of forecasts from 30 probes was {plan.error:.2f} times that of "
        f"no history (benchmarks/cost.py), on the demo model with {measured['steps']} steps ({measured['method']}), "
        "for new procedural tasks. For your model, recipe and tasks it is not known. Fine-tunes of your own make a "
        "better history: `forgetcast add` adds them to this atlas.",
        f"Next: forgetcast bench {atlas.path}; or forgetcast probes {atlas.path} -k 30 -o probes.jsonl",
    ):
        out.print(line, markup=False, soft_wrap=True)
