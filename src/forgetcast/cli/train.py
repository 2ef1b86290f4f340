"""Commands that fine-tune, with and without replay: train, verify, pilot, sequence."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from forgetcast.atlas.store import Atlas
from forgetcast.cli.app import (
    AsJson,
    Device,
    ModelName,
    NumberOfProbes,
    OnlineAt,
    RecipeName,
    Repeat,
    TrustCode,
    alone,
    app,
    fractions,
    is_first,
    print_all,
    print_json,
    progress,
    recipe_of,
    show,
)
from forgetcast.cli.tables import advice_tables, sequence_tables, verification_tables
from forgetcast.data.pool import Pool, load_task, split_task
from forgetcast.data.recipe import Recipe
from forgetcast.errors import ConfigError, DataError
from forgetcast.experiments.collect import load_tasks
from forgetcast.experiments.runs import TEST_SHARE, check_base
from forgetcast.experiments.sequence import AVAILABLE, SequenceSettings, run_sequence, task_orders
from forgetcast.experiments.verify import ReplayComparison, arms, pilot_comparison, verify
from forgetcast.replay.law import advise
from forgetcast.replay.plan import HOLD_OUT, RATIO, ReplayPlan
from forgetcast.replay.strategies import Random, available_strategies, get_strategy
from forgetcast.settings import check_settings

if TYPE_CHECKING:
    from forgetcast.lm import ReplaySelector


@app.command(name="train")
def train_(
    model: ModelName,
    task: Annotated[Path, typer.Argument(help="Fine-tuning data: JSONL, Parquet, or a saved data set.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory for the tuned model.")],
    recipe: RecipeName = None,
    plan: Annotated[Path | None, typer.Option(help="Replay plan; default: no replay.")] = None,
    pool: Annotated[Path | None, typer.Option(help="The pool that the plan was made for.")] = None,
    atlas: Annotated[Path | None, typer.Option(help="For --online and plans that select during training.")] = None,
    online: OnlineAt = None,
    probes_: NumberOfProbes = 30,
    device: Device = None,
    trust_remote_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model, with or without replay. An interrupted run goes on from its last checkpoint in OUTPUT.partial.

    Example: forgetcast train ./my-model task.jsonl --plan plan.parquet --pool pool.jsonl -o tuned
    """
    from forgetcast.lm import FineTuner, load

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(f"{output} exists and is not empty; choose another directory")
    if (plan is None) != (pool is None):
        raise DataError("--plan and --pool go together")
    settings = Recipe() if recipe is None else Recipe.load(recipe)
    examples = load_task(task)
    replay = ReplayPlan.load(plan) if plan is not None else None
    upstream = Pool.load(pool) if pool is not None else None
    if replay is not None and upstream is not None:
        replay.check_pool(upstream)
        replay.count(settings.steps, settings.batch_size)  # too many or none is an error before the model is loaded
    opened, selector = Atlas.open(atlas) if atlas is not None else None, None
    if online is not None or (replay is not None and replay.phase == "in-training"):
        if replay is None or opened is None:
            raise ConfigError("--online and plans that select during training need --plan, --pool and --atlas")
        selector = _chooser(opened, replay, online, probes_)
    base = load(model, device=device, trust_remote_code=trust_remote_code)
    if opened is not None:
        check_base(opened, base)
    tuner = FineTuner(base)
    partial = output.with_name(f"{output.name}.partial")
    with progress() as report:
        tuned = tuner.tune(
            examples,
            settings,
            plan=replay,
            pool=upstream,
            selector=selector,
            checkpoints=partial,
            on_step=lambda i, n: report("fine-tuning", i, n),
        )
    if not is_first():
        return
    tuned.save(partial / "model")
    if output.is_dir():
        output.rmdir()
    (partial / "model").rename(output)
    shutil.rmtree(partial)
    facts = {
        "steps": tuned.steps,
        "replayed": len(tuned.replayed),
        "seconds": round(tuned.seconds, 1),
        "output": str(output),
    }
    show(facts, as_json, title="Fine-tuned")


def _chooser(atlas: Atlas, plan: ReplayPlan, online: str | None, k: int) -> ReplaySelector:
    """What decides during training what comes next: by probes after shares of the steps, or batch by batch."""
    from forgetcast.lm import MostForgottenSelector, OnlineSelector

    if online is None:
        return MostForgottenSelector(atlas.pool, atlas.nll_before, max_length=atlas.before.metadata.get("max_length"))
    return OnlineSelector.from_atlas(atlas, plan, k=k, at=fractions(online, "--online"))


@app.command(name="verify")
def verify_(
    model: ModelName,
    task: Annotated[Path, typer.Argument(help="Fine-tuning data.")],
    atlas: Annotated[Path, typer.Option(help="Atlas with the pool and the base model's scores.")],
    plan: Annotated[list[Path], typer.Option(help="Replay plan to verify; may be given several times.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Verification to write (JSON).")],
    recipe: RecipeName = None,
    seeds: Annotated[int, typer.Option(min=1, help="Fine-tunes per arm.")] = 2,
    test_share: Annotated[float, typer.Option(help="Share of the task that only its loss is judged on.")] = TEST_SHARE,
    online: OnlineAt = None,
    probes_: NumberOfProbes = 30,
    device: Device = None,
    trust_remote_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune without replay, with random replay and with each plan; judge on examples that were never replayed.

    The recipe is the atlas's unless one is given. Finished runs are kept beside the output and not repeated.

    Example: forgetcast verify ./my-model task.jsonl --atlas runs.atlas --plan plan.parquet -o verification.json
    """
    from forgetcast.lm import FineTuner, load

    alone("verify")
    opened, replays, examples = Atlas.open(atlas), [ReplayPlan.load(path) for path in plan], load_task(task)
    for replay in replays:
        replay.check_pool(opened.pool)
    shared = recipe_of(recipe, opened)
    train, test = split_task(examples, test_share)
    plans = arms(replays, opened.pool)
    selectors = {name: _chooser(opened, p, None, probes_) for name, p in plans.items() if p.phase == "in-training"}
    if online is not None:
        again = {f"{p.strategy} online": p for p in replays if "forecast" in get_strategy(p.strategy).needs}
        if not again:
            raise ConfigError("--online needs a plan of a strategy that uses a forecast")
        plans, selectors = (
            plans | again,
            selectors | {n: _chooser(opened, p, online, probes_) for n, p in again.items()},
        )
    comparison = ReplayComparison(name=task.stem, train=train, test=test, plans=plans, selectors=selectors)
    base = load(model, device=device, trust_remote_code=trust_remote_code)
    check_base(opened, base)
    with progress() as report:
        result = verify(
            FineTuner(base),
            opened,
            shared,
            [comparison],
            seeds=range(seeds),
            directory=output.with_suffix(".runs"),
            on_progress=report,
        )
    result.save(output)
    opened.add_replays(asdict(run) for run in result.runs)
    if as_json:
        print_json(result.as_dict())
    else:
        print_all(verification_tables(result))


@app.command(name="pilot")
def pilot_(
    model: ModelName,
    task: Annotated[Path, typer.Argument(help="Fine-tuning data.")],
    atlas: Annotated[Path, typer.Option(help="Atlas with the pool and the base model's scores; keeps the outcome.")],
    ratios: Annotated[str, typer.Option(help="Replayed examples per new one.")] = "1/32,1/8",
    strategy: Annotated[
        list[str] | None, typer.Option(help="Beside random: one that goes by the atlas alone; may be repeated.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Default: those of the recipe.")] = None,
    recipe: RecipeName = None,
    seeds: Annotated[int, typer.Option(min=1, help="Fine-tunes of each kind.")] = 1,
    hold_out: Annotated[float, typer.Option(help="Share of the pool never replayed, to judge on.")] = HOLD_OUT,
    repeat: Repeat = False,
    device: Device = None,
    trust_remote_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure what replay saves: a fine-tune without it and one at each ratio, kept in the atlas for `plan --advise`.

    Example: forgetcast pilot ./my-model task.jsonl --atlas runs.atlas --ratios 1/32,1/8 --steps 100
    """
    from forgetcast.lm import FineTuner, load

    alone("pilot")
    opened, examples, shares = Atlas.open(atlas), load_task(task), fractions(ratios, "--ratios")
    settings = recipe_of(recipe, opened)
    if steps is not None:
        settings = settings.model_copy(update={"steps": steps})
    others = [get_strategy(name) for name in strategy or ()]
    comparison = pilot_comparison(
        opened, task.stem, examples, strategies=others, ratios=shares, hold_out=hold_out, repeat=repeat
    )
    base = load(model, device=device, trust_remote_code=trust_remote_code)
    check_base(opened, base)
    with progress() as report:
        result = verify(
            FineTuner(base),
            opened,
            settings,
            [comparison],
            seeds=range(seeds),
            directory=opened.path.with_name(f"{opened.path.name}.pilots"),
            on_progress=report,
        )
    opened.add_replays(asdict(run) for run in result.runs)
    advice = advise(opened, others[0].name if others else Random.name, task=task.stem)
    if as_json:
        print_json({"runs": [asdict(run) for run in result.runs], "advice": advice.as_dict()})
    else:
        print_all(advice_tables(advice))


@app.command(name="sequence")
def sequence_(
    model: ModelName,
    tasks: Annotated[list[Path], typer.Argument(help="A folder of task files, or the files.")],
    atlas: Annotated[Path, typer.Option(help="Atlas to forecast from, with the pool and the base model's scores.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Result to write (JSON).")],
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Replay to compare, default top; may be repeated: {', '.join(available_strategies(AVAILABLE))}."
        ),
    ] = None,
    ratio: Annotated[float, typer.Option(help="Replayed examples per new one.")] = RATIO,
    orders: Annotated[
        int, typer.Option(help="Random orders of the tasks, for every arm; to show a difference takes about six.")
    ] = 2,
    recipe: RecipeName = None,
    probes_: Annotated[int, typer.Option("--probes", help="Examples measured before each task but the first.")] = 30,
    hold_out: Annotated[float, typer.Option(help="Share of the pool never replayed, to judge on.")] = 0.5,
    repeat: Repeat = False,
    test_share: Annotated[float, typer.Option(help="Share of each task that only its loss is judged on.")] = TEST_SHARE,
    device: Device = None,
    trust_remote_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune on tasks one after another: without replay, with random replay, and by a forecast made anew each time.

    After every task, the upstream examples that are never replayed and all tasks learned so far are judged. The recipe,
    of each task, is the atlas's unless one is given. Finished stages are kept beside the output and not repeated.

    Example: forgetcast sequence ./my-model tasks/ --atlas runs.atlas -o sequence.json
    """
    from forgetcast.lm import FineTuner, load

    alone("sequence")
    settings = check_settings(
        {
            "strategies": tuple(strategy or ("top",)),
            "ratio": ratio,
            "orders": orders,
            "probes": probes_,
            "hold_out": hold_out,
            "repeat": repeat,
        },
        SequenceSettings,
        where="sequence",
    )
    settings.arms  # noqa: B018  # an unknown strategy is an error before the model is loaded
    opened = Atlas.open(atlas)
    shared = recipe_of(recipe, opened)
    found = load_tasks(tasks[0] if len(tasks) == 1 and tasks[0].is_dir() else tasks)
    task_orders(list(found), orders)  # too few are an error before the model is loaded
    parts = {name: split_task(task, test_share) for name, task in found.items()}
    tuner = FineTuner(load(model, device=device, trust_remote_code=trust_remote_code))
    with progress() as report:
        result = run_sequence(
            tuner, opened, shared, parts, settings, directory=output.with_suffix(".runs"), on_progress=report
        )
    result.save(output)
    if as_json:
        print_json(result.as_dict())
    else:
        print_all(sequence_tables(result))
