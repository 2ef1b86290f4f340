"""Commands that fine-tune, with and without replay: train, verify, pilot, sequence."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forgetcast.cli.app import (
    app,
    check_models,
    check_output_directory,
    err,
    fractions,
    import_torch,
    is_first,
    load_base,
    load_data,
    load_recipe,
    load_tasks,
    load_tuner,
    print_all,
    print_json,
    progress,
    recipe_of,
    require_single_process,
    say_ratios,
    show,
)
from forgetcast.cli.options import (
    REPLAY,
    Arms,
    AsJson,
    AtlasOption,
    Columns,
    Date,
    Format,
    HoldOut,
    Loading,
    Margin,
    ModelName,
    NamedColumns,
    NoThinking,
    NumberOfProbes,
    OnlineAt,
    Output,
    PoolColumns,
    PoolFormat,
    Ratio,
    RecipeName,
    Repeat,
    Seed,
    Seeds,
    Strategies,
    Strict,
    TaskPath,
    TestShare,
    loads_a_model,
)
from forgetcast.defaults import (
    ALPHA_PROBES,
    HOLD_OUT,
    LOSS_MARGIN,
    MEMORY,
    MOST_EXAMPLES,
    ORDERS,
    PROBES,
    RATIO,
    TEST_SHARE,
    WATCH_EVERY,
)
from forgetcast.errors import ConfigError
from forgetcast.files import check_destination
from forgetcast.interruption import Stop, stoppable
from forgetcast.progress import counted
from forgetcast.text import did_you_mean

if TYPE_CHECKING:
    from forgetcast.atlas import Atlas
    from forgetcast.completion.watch import WatchedRun
    from forgetcast.data import Pool, Recipe
    from forgetcast.experiments import ReplayComparison, Verification
    from forgetcast.experiments.variants import AskedArm
    from forgetcast.lm import FineTuner, ForgettingMonitor, ReplaySelector, Tuned
    from forgetcast.replay import ReplayPlan


@app.command(rich_help_panel=REPLAY)
@loads_a_model
def train(
    model: ModelName,
    task: TaskPath,
    output: Output,
    recipe: RecipeName = None,
    plan: Annotated[Path | None, typer.Option(help="Replay plan; default: no replay.")] = None,
    pool: Annotated[Path | None, typer.Option(help="The pool that the plan was made for.")] = None,
    atlas: Annotated[str | None, typer.Option(help="For --online and plans that select during training.")] = None,
    online: OnlineAt = None,
    probes: NumberOfProbes = PROBES,
    watch: Annotated[
        str | None, typer.Option(help="Atlas of the model: measure probes during the training, write forgetting.json.")
    ] = None,
    watch_every: Annotated[int, typer.Option(min=1, help="Steps from one look to the next.")] = WATCH_EVERY,
    stop_if: Annotated[
        str | None, typer.Option(help='With --watch: end the training where this holds, such as "lower > .1".')
    ] = None,
    revise: Annotated[
        bool, typer.Option("--revise", help="With --watch and --plan: choose what is replayed anew at each look.")
    ] = False,
    format: Format = None,
    column: Columns = None,
    pool_format: PoolFormat = None,
    pool_column: PoolColumns = None,
    strict: Strict = False,
    date: Date = None,
    no_thinking: NoThinking = False,
    fsdp: Annotated[
        bool, typer.Option("--fsdp", help="Share weights and optimiser among the processes (FSDP2); see torchrun.")
    ] = False,
    as_json: AsJson = False,
    *,
    loading: Loading,
) -> None:
    """Fine-tune a model, with or without replay. An interrupted run resumes from its checkpoint in OUTPUT.partial.

    Example: forgetcast train ./my-model task.jsonl --plan plan.parquet --pool pool.jsonl -o tuned

    Example: forgetcast train ./my-model task.jsonl --watch runs.atlas --stop-if "lower > .1" -o tuned

    Example: forgetcast train ./my-model task.jsonl --plan plan.parquet --pool pool.jsonl --watch runs.atlas --revise
    -o tuned
    """
    from forgetcast.atlas import Atlas
    from forgetcast.data import Rendering
    from forgetcast.data.reader import data_name
    from forgetcast.replay import ReplayPlan

    check_output_directory(output)
    partial = output.with_name(f"{output.name}.partial")
    check_destination(partial, folder=True)
    if (plan is None) != (pool is None):
        raise ConfigError("--plan needs --pool, the pool that the plan was made for; --pool alone replays nothing")
    if pool is None and (pool_format is not None or pool_column):
        raise ConfigError("--pool-format and --pool-column are about --pool; give it too")
    replay = ReplayPlan.load(plan) if plan is not None else None
    opened = Atlas.open(atlas) if atlas is not None else None
    watched = Atlas.open(watch) if watch is not None else None
    settings = _recipe(recipe, replay, opened or watched)
    examples = load_data(task, format, column, strict)
    if (read := settings.steps * settings.batch_size) < len(examples):
        err.print(
            f"{settings.steps} steps of {settings.batch_size} read {read} of the {len(examples)} examples; the others "
            "are not trained on",
            soft_wrap=True,
        )
    upstream = load_data(pool, pool_format, pool_column, strict) if pool is not None else None
    if replay is not None and upstream is not None:
        replay.check_pool(upstream)
        replay.count(settings.steps, settings.batch_size)  # too many or none is an error before the model is loaded
        say_ratios([replay.ratio], settings)
    selects = online is not None or (replay is not None and replay.phase == "in-training")
    if selects and (replay is None or opened is None):
        raise ConfigError("--online and plans that select during training need --plan, --pool and --atlas")
    if watch is None and stop_if is not None:
        raise ConfigError("--stop-if is about what is forgotten: give an atlas with --watch too")
    if revise:
        if watched is None or replay is None or selects:
            raise ConfigError(
                "--revise needs --watch, and --plan with --pool; without --online, or a plan that selects by itself"
            )
        replay.check_pool(watched.pool)
    check_models(loading, model)  # what follows imports PyTorch
    selector = None
    if selects and replay is not None and opened is not None:
        selector = _selector(opened, replay, online, probes)
    monitor = None if watched is None else _monitor(watched, probes, watch_every, stop_if)
    if revise and monitor is not None:
        selector = _revising(monitor)
    asked = date is not None or no_thinking  # else conversations are rendered as for the atlas
    rendering = Rendering(date or Rendering.date, not no_thinking) if asked else None
    tuner = load_tuner(model, loading, opened or watched, rendering, sharded=fsdp)
    # A sharded training saves no checkpoint to stop at.
    stopping = nullcontext(Stop()) if fsdp else stoppable("stopping after this step")
    with _alone_in(partial), progress() as report, stopping as stop:
        tuned = tuner.tune(
            examples,
            settings,
            plan=replay,
            pool=upstream,
            selector=selector,
            checkpoints=partial,
            on_step=lambda i, n: report("fine-tuning", i, n),
            callbacks=() if monitor is None else [monitor],
        )
        if is_first():
            _store(tuned, partial, output, None if monitor is None else monitor.run(data_name(task)))
        stop.forget()  # too late: everything is done
    if not is_first():
        return
    facts = {
        "steps": tuned.steps,
        "replayed": len(tuned.replayed),
        "held_out_replayed": None if replay is None else len(set(tuned.replayed).intersection(replay.held_out_ids)),
        "seconds": round(tuned.seconds, 1),
        "output": str(output),
    }
    if monitor is not None:
        facts |= _watched_facts(monitor)
    show(facts, as_json, title="Fine-tuned")


def _recipe(name: str | None, plan: ReplayPlan | None, atlas: Atlas | None) -> Recipe:
    """Load the recipe that is named; else take the plan's, else the atlas's, else the defaults, and say so."""
    from forgetcast.data import Recipe

    if name is not None:
        return Recipe.load(name)
    recipe, whose = None if plan is None else plan.recipe, "that of the plan"
    if recipe is None and atlas is not None:
        recipe, whose = recipe_of(atlas), f"that of {atlas.path}"
    if recipe is None:
        recipe, whose = Recipe(), "the defaults"
    if is_first():
        err.print(
            f"no --recipe: {whose}: {recipe.method}, {recipe.steps} steps of {recipe.batch_size} examples of at most "
            f"{recipe.max_length} tokens, learning rate {recipe.learning_rate:g}",
            markup=False,
            soft_wrap=True,
        )
    return recipe


@contextmanager
def _alone_in(partial: Path) -> Iterator[None]:
    """Raise ConfigError if another command trains into a folder; the processes of this one are as one."""
    from forgetcast.experiments.claims import claimed

    if not is_first():
        yield
        return
    with claimed(partial) as ours:
        if not ours:
            raise ConfigError(f"another process is training into {partial}; choose another output, or wait for it")
        yield


def _store(tuned: Tuned, partial: Path, output: Path, watched: WatchedRun | None) -> None:
    """Write the model, and what was seen of its training; remove the checkpoints."""
    tuned.save(partial / "model")
    if watched is not None:
        watched.save(partial / "model" / "forgetting.json")
    shutil.copy(partial / "run.json", partial / "model" / "run.json")  # from which `add` knows the recipe
    if output.is_dir():
        output.rmdir()
    (partial / "model").rename(output)
    shutil.rmtree(partial)


def _monitor(atlas: Atlas, probes: int, every: int, stop_if: str | None) -> ForgettingMonitor:
    import_torch()
    from forgetcast.lm import ForgettingMonitor

    return ForgettingMonitor(atlas, probes=probes, every=every, stop_if=stop_if)


def _revising(monitor: ForgettingMonitor) -> ReplaySelector:
    from forgetcast.lm import MonitorSelector

    return MonitorSelector(monitor)


def _watched_facts(monitor: ForgettingMonitor) -> dict[str, Any]:
    """Return the mean forgetting at the last look, with its interval, and why the training ended early."""
    last = monitor.readings[-1].figures["mean"]
    facts: dict[str, Any] = {"forgetting": last.value, "forgetting_lower": last.lower, "forgetting_upper": last.upper}
    return facts if monitor.stopped is None else facts | {"stopped": monitor.stopped}


def _selector(atlas: Atlas, plan: ReplayPlan, online: str | None, k: int) -> ReplaySelector:
    """Make what selects during training: from probes after fractions of training, or before every batch."""
    import_torch()
    from forgetcast.lm import MostForgottenSelector, OnlineSelector

    if online is None:
        return MostForgottenSelector(atlas.pool, atlas.nll_before, max_length=atlas.before.metadata.get("max_length"))
    return OnlineSelector.from_atlas(atlas, plan, k=k, at=fractions(online, "--online"))


def _compare(
    tuner: FineTuner,
    atlas: Atlas,
    recipe: Recipe,
    comparisons: Sequence[ReplayComparison],
    seeds: int,
    directory: Path,
    margin: float = LOSS_MARGIN,
) -> Verification:
    """Make the runs of comparisons, and store their outcomes in the atlas."""
    from forgetcast.experiments import verify

    with progress() as report:
        result = verify(
            tuner,
            atlas,
            recipe,
            comparisons,
            seeds=range(seeds),
            directory=directory,
            margin=margin,
            on_progress=report,
        )
    # The law of ratios is about the recipe as it is, and the pool's texts.
    varied = {(each.name, arm) for each in comparisons for arm in each.variants}
    atlas.add_replays(asdict(run) for run in result.runs if (run.task, run.arm) not in varied)
    return result


@app.command(rich_help_panel=REPLAY)
@loads_a_model
def verify(
    model: ModelName,
    tasks: Annotated[list[Path], typer.Argument(help="Fine-tuning data: a file for each task.")],
    atlas: AtlasOption,
    plan: Annotated[
        list[str],
        typer.Option(help="Replay plan to verify; may be repeated. TASK=FILE: for the task of this name only."),
    ],
    output: Output,
    recipe: RecipeName = None,
    arm: Arms = None,
    on_policy: Annotated[
        Path | None,
        typer.Option(help="The base model's own answers (see `generate --on-policy`): an arm of them for every plan."),
    ] = None,
    margin: Margin = LOSS_MARGIN,
    seeds: Seeds = 2,
    test_share: TestShare = TEST_SHARE,
    online: OnlineAt = None,
    probes: NumberOfProbes = PROBES,
    format: Format = None,
    column: NamedColumns = None,
    strict: Strict = False,
    as_json: AsJson = False,
    *,
    loading: Loading,
) -> None:
    """Fine-tune without replay, with random replay and with each plan; judge on examples that are never replayed.

    With several tasks, a verdict is over the tasks, not the seeds of one. The recipe defaults to the atlas's. Finished
    runs are kept next to the output and not repeated.

    Further arms are asked for with --arm. Without replay: `interpolation` of the tuned weights with the base model's,
    at an alpha chosen on 60 probes, or `interpolation=0.7` at this alpha; `learning-rate=0.3` and `steps=0.5`, factors
    of the recipe's; `easy`, new examples weighted by how well the base model predicts them. With every plan: `kl=1`,
    `weight=4` and `spacing`, see the recipe. With --on-policy, every plan is an arm with the model's own answers too.
    To choose alpha, half of the test examples are taken, and all arms are tested on the other half.

    Arms are compared at equal new-task loss: shown to be at most --margin higher than without replay.

    Example: forgetcast verify ./my-model task.jsonl --atlas runs.atlas --plan plan.parquet -o verification.json

    Example: forgetcast verify ./my-model law.jsonl code.jsonl --atlas runs.atlas --plan law=law-plan.parquet --plan
    code=code-plan.parquet -o verification.json
    """
    from forgetcast.atlas import Atlas
    from forgetcast.atlas.index import check_writable
    from forgetcast.cli.tables import verification_tables
    from forgetcast.experiments.variants import parse_arm

    require_single_process("verify")
    check_destination(output)
    check_destination(output.with_suffix(".runs"), folder=True)
    opened = Atlas.open(atlas)
    check_writable(opened.path)
    loaded = load_tasks(tasks, format, column, strict)
    replays = _plans_of(plan, list(loaded))
    settings = load_recipe(recipe, opened)
    own = load_data(on_policy) if on_policy is not None else None
    asked = _AskedArms([parse_arm(text) for text in arm or ()], settings, margin, own)
    comparisons = [
        _comparison(opened, name, examples, replays[name], asked, test_share=test_share, online=online, probes=probes)
        for name, examples in loaded.items()
    ]
    every = [replay for comparison in comparisons for replay in comparison.plans.values()]
    say_ratios((replay.ratio for replay in every), settings)
    for replay in every:
        replay.count(settings.steps, settings.batch_size)  # too many is an error before the model is loaded
    tuner = load_tuner(model, loading, opened)
    result = _compare(tuner, opened, settings, comparisons, seeds, output.with_suffix(".runs"), margin)
    result.save(output)
    print_json(result.as_dict()) if as_json else print_all(verification_tables(result))


@dataclass(frozen=True)
class _AskedArms:
    """The arms of a verification that are not plans, and what they change."""

    arms: Sequence[AskedArm]
    recipe: Recipe
    margin: float
    texts: Pool | None


def _plans_of(given: Sequence[str], tasks: Sequence[str]) -> dict[str, list[ReplayPlan]]:
    """Read the plans of each task: FILE is for all tasks, TASK=FILE for one."""
    from forgetcast.replay import ReplayPlan

    plans: dict[str, list[ReplayPlan]] = {name: [] for name in tasks}
    for text in given:
        name, sign, path = text.partition("=")
        if not sign or (name not in plans and Path(text).exists()):
            loaded = ReplayPlan.load(text)
            for of_task in plans.values():
                of_task.append(loaded)
        elif name in plans:
            plans[name].append(ReplayPlan.load(path))
        else:
            hint = did_you_mean(name, tasks)
            raise ConfigError(f"--plan {text}: there is no task {name!r}; there are {', '.join(tasks)}{hint}")
    if without := [name for name, of_task in plans.items() if not of_task]:
        raise ConfigError(f"the task {without[0]!r} has no plan; give one as --plan {without[0]}=FILE, or one for all")
    return plans


def _comparison(
    atlas: Atlas,
    name: str,
    examples: Pool,
    replays: Sequence[ReplayPlan],
    asked: _AskedArms,
    *,
    test_share: float,
    online: str | None,
    probes: int,
) -> ReplayComparison:
    """Set up a task's arms: the baselines, its plans, those that are revised during training, and those asked for."""
    from forgetcast.data import split_task
    from forgetcast.experiments import ReplayComparison, arms
    from forgetcast.experiments.interpolation import draw_probes
    from forgetcast.experiments.variants import Interpolating, add_arms
    from forgetcast.replay import get_strategy

    for replay in replays:
        replay.check_pool(atlas.pool)
    training, test = split_task(examples, test_share)
    plans = arms(replays, atlas.pool)
    selectors = {arm: _selector(atlas, p, None, probes) for arm, p in plans.items() if p.phase == "in-training"}
    if online is not None:
        revised = {f"{p.strategy} online": p for p in replays if "forecast" in get_strategy(p.strategy).needs}
        if not revised:
            raise ConfigError("--online needs a plan of a strategy that uses a forecast")
        plans |= revised
        selectors |= {arm: _selector(atlas, p, online, probes) for arm, p in revised.items()}
    choosing = None
    if any(arm.kind == "interpolation" and arm.value is None for arm in asked.arms):
        validation, test = split_task(test, 0.5)
        drawn = draw_probes(atlas.examples, atlas.nll_before, replays[0].held_out_ids, ALPHA_PROBES, 0)
        choosing = Interpolating(None, drawn, validation, asked.margin)
    plans, variants = add_arms(asked.arms, plans, asked.recipe, choosing=choosing, texts=asked.texts)
    return ReplayComparison(name, training, test, plans, selectors, variants)


@app.command(rich_help_panel=REPLAY)
@loads_a_model
def pilot(
    model: ModelName,
    task: TaskPath,
    atlas: AtlasOption,
    ratios: Annotated[
        str | None,
        typer.Option(help="Replayed examples per new one; default: about 1/32 and 1/8, as the recipe's steps allow."),
    ] = None,
    strategy: Strategies = None,
    steps: Annotated[int | None, typer.Option(min=1, max=MOST_EXAMPLES, help="Default: those of the recipe.")] = None,
    recipe: RecipeName = None,
    seeds: Seeds = 1,
    hold_out: HoldOut = HOLD_OUT,
    repeat: Repeat = False,
    format: Format = None,
    column: Columns = None,
    strict: Strict = False,
    as_json: AsJson = False,
    *,
    loading: Loading,
) -> None:
    """Measure what replay saves: a fine-tune without it and one at each ratio, stored in the atlas for `plan --advise`.

    Random replay is always run; a further strategy must need nothing but the atlas.

    Example: forgetcast pilot ./my-model task.jsonl --atlas runs.atlas --ratios 1/32,1/8 --steps 100
    """
    from forgetcast.atlas import Atlas
    from forgetcast.atlas.index import check_writable
    from forgetcast.cli.tables import advice_tables
    from forgetcast.data import Recipe
    from forgetcast.data.reader import data_name
    from forgetcast.experiments import pilot_comparison
    from forgetcast.replay import Random, advise, get_strategy
    from forgetcast.replay.plan import achieved_ratio, default_ratios
    from forgetcast.settings import check_settings

    require_single_process("pilot")
    opened = Atlas.open(atlas)
    check_writable(opened.path)
    examples = load_data(task, format, column, strict)
    settings = load_recipe(recipe, opened)
    if steps is not None:
        settings = check_settings(settings.model_dump() | {"steps": steps}, Recipe, where="--steps")
    others = [get_strategy(name) for name in strategy or ()]
    asked = default_ratios(settings.steps) if ratios is None else fractions(ratios, "--ratios")
    say_ratios(asked, settings)
    comparison = pilot_comparison(
        opened,
        data_name(task),
        examples,
        strategies=others,
        ratios=list(dict.fromkeys(achieved_ratio(settings.steps, ratio) for ratio in asked)),
        hold_out=hold_out,
        repeat=repeat,
    )
    for replay in comparison.plans.values():
        replay.count(settings.steps, settings.batch_size)  # too many is an error before the model is loaded
    tuner = load_tuner(model, loading, opened)
    result = _compare(tuner, opened, settings, [comparison], seeds, opened.beside("pilots"))
    rule = others[0].name if others else Random.name
    advice = advise(opened, rule, task=data_name(task), recipe=settings)
    if as_json:
        print_json({"runs": [asdict(run) for run in result.runs], "advice": advice.as_dict()})
    else:
        print_all(advice_tables(advice))


@app.command(rich_help_panel=REPLAY)
@loads_a_model
def interpolate(
    base: Annotated[str, typer.Argument(help="Base model: directory or hub id.")],
    tuned: Annotated[str, typer.Argument(help="Model that was tuned from it, or a LoRA adapter.")],
    output: Output,
    alpha: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Place between base (0) and tuned model (1); default: chosen on probes."),
    ] = None,
    atlas: Annotated[str | None, typer.Option(help="To choose: an atlas with the pool and its base scores.")] = None,
    pool: Annotated[Path | None, typer.Option(help="To choose, without an atlas: the pool.")] = None,
    task: Annotated[
        Path | None, typer.Option(help="To choose: examples of the new task that were not trained on.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="A replay plan, whose held-out examples are no probes; default: --hold-out.")
    ] = None,
    hold_out: HoldOut = HOLD_OUT,
    probes: Annotated[int, typer.Option(min=1, help="Upstream examples to choose by, drawn at random.")] = ALPHA_PROBES,
    margin: Margin = LOSS_MARGIN,
    seed: Seed = 0,
    format: Format = None,
    column: Columns = None,
    pool_format: PoolFormat = None,
    pool_column: PoolColumns = None,
    strict: Strict = False,
    as_json: AsJson = False,
    *,
    loading: Loading,
) -> None:
    """Interpolate between the weights of a base model and a tuned one: less forgetting, without any training.

    Of a LoRA adapter, the update is scaled. Alpha is the one of 0, 0.1 to 1 with least forgetting of the probes whose
    loss on the new task is shown to exceed the tuned model's by at most --margin, by the 95 % interval over the
    examples of --task: a hundred are better than ten. No held-out example is a probe.

    Example: forgetcast interpolate ./my-model ./tuned --atlas runs.atlas --task unseen.jsonl -o between

    Example: forgetcast interpolate ./my-model ./adapter --alpha 0.7 -o between
    """
    from forgetcast.files import write_json

    require_single_process("interpolate")
    check_output_directory(output)
    check_destination(output, folder=True)
    check_models(loading, base, tuned)
    if alpha is not None:
        if atlas is not None or pool is not None or task is not None or plan is not None:
            raise ConfigError("--atlas, --pool, --task and --plan are to choose alpha; leave them out with --alpha")
        upstream, examples, opened = None, None, None
    else:
        if (atlas is None) == (pool is None) or task is None:
            raise ConfigError("give --alpha; or --task with --atlas or --pool, to choose it")
        upstream, opened = _probes_of(atlas, pool, plan, hold_out, probes, seed, (pool_format, pool_column, strict))
        examples = load_data(task, format, column, strict)
    import_torch()
    from forgetcast.lm import Interpolation, load

    start = load_base(base, loading, opened)
    end = load(tuned, **loading.arguments())
    end = dataclasses.replace(end, rendering=start.rendering)
    between, chosen = Interpolation(end, start.model.state_dict()), None
    del start
    if upstream is not None and examples is not None:
        from forgetcast.experiments import choose_alpha
        from forgetcast.experiments.interpolation import ALPHAS

        with progress(resumable=False) as report:
            add = counted(report, "scoring", len(ALPHAS) * (len(upstream) + len(examples)))
            known = opened.before.subset(upstream.ids) if opened is not None else None
            chosen = choose_alpha(between, upstream, examples, known, margin=margin, on_progress=add)
        alpha = chosen.alpha
    assert alpha is not None
    between.save(output, alpha)
    facts: dict[str, Any] = {"alpha": alpha, "base": base, "tuned": tuned}
    if chosen is not None and upstream is not None:
        facts |= {"probes": list(upstream.ids), "choice": chosen.as_dict()}
    write_json(output / "interpolation.json", facts)
    if as_json:
        print_json(facts | {"output": str(output)})
        return
    if chosen is not None:
        from forgetcast.cli.tables import alpha_table

        print_all([alpha_table(chosen), chosen.sentence()])
    show({"alpha": alpha, "output": str(output)}, as_json, title="Interpolated")


def _probes_of(
    atlas: str | None,
    pool: Path | None,
    plan: Path | None,
    hold_out: float,
    count: int,
    seed: int,
    reading: tuple[Any, Any, bool],
) -> tuple[Pool, Atlas | None]:
    """Draw probes of a pool at random, none of them held out; and open the atlas if there is one."""
    from forgetcast.atlas import Atlas
    from forgetcast.experiments.interpolation import draw_probes
    from forgetcast.replay import ReplayPlan

    opened = Atlas.open(atlas) if atlas is not None else None
    if pool is not None:
        upstream = load_data(pool, *reading)
    else:
        assert opened is not None
        upstream = opened.pool
    if plan is not None:
        replay = ReplayPlan.load(plan)
        replay.check_pool(upstream)
        held_out = replay.held_out_ids
    else:
        held_out = upstream.hold_out(hold_out) if opened is None else opened.hold_out(hold_out)
    losses = None if opened is None else opened.nll_before
    return upstream.subset(draw_probes(upstream.ids, losses, held_out, count, seed)), opened


@app.command(rich_help_panel=REPLAY)
@loads_a_model
def sequence(
    model: ModelName,
    tasks: Annotated[list[Path], typer.Argument(help="A folder of task files, or the files.")],
    atlas: AtlasOption,
    output: Output,
    strategy: Strategies = None,
    ratio: Ratio = RATIO,
    orders: Annotated[
        int, typer.Option(help="Random orders of the tasks for every arm; with fewer than six, little can be shown.")
    ] = ORDERS,
    memory: Annotated[
        int, typer.Option(help="Training examples of each learned task that later ones may replay, too; 0: none.")
    ] = MEMORY,
    recipe: RecipeName = None,
    probes: NumberOfProbes = PROBES,
    hold_out: HoldOut = 0.5,
    repeat: Repeat = False,
    test_share: TestShare = TEST_SHARE,
    format: Format = None,
    column: NamedColumns = None,
    strict: Strict = False,
    as_json: AsJson = False,
    *,
    loading: Loading,
) -> None:
    """Fine-tune on tasks one after another: without replay, with random replay, and with a new forecast before each.

    After every task, the held-out upstream examples and all tasks learned so far are judged. Replayed are examples of
    the pool and, from the second task on, --memory training examples of each task before. The strategy defaults to top,
    the recipe to the atlas's. Finished stages are kept next to the output and not repeated; more --orders add to them.

    Example: forgetcast sequence ./my-model tasks/ --atlas runs.atlas -o sequence.json
    """
    from forgetcast.atlas import Atlas
    from forgetcast.cli.tables import sequence_tables
    from forgetcast.data import split_task
    from forgetcast.experiments import SequenceSettings, run_sequence
    from forgetcast.experiments.sequence import task_orders
    from forgetcast.settings import check_settings

    require_single_process("sequence")
    check_destination(output)
    check_destination(output.with_suffix(".runs"), folder=True)
    given: dict[str, Any] = {"ratio": ratio, "orders": orders, "probes": probes, "hold_out": hold_out}
    given |= {"memory": memory, "repeat": repeat}
    settings = check_settings(
        given | ({"strategies": strategy} if strategy else {}), SequenceSettings, where="the sequence"
    )
    opened = Atlas.open(atlas)
    shared = load_recipe(recipe, opened)
    folder = tasks[0] if len(tasks) == 1 and tasks[0].is_dir() else tasks
    loaded = load_tasks(folder, format, column, strict)
    task_orders(list(loaded), orders)  # too few tasks are an error before the model is loaded
    parts = {name: split_task(task, test_share) for name, task in loaded.items()}
    say_ratios([ratio], shared)
    tuner = load_tuner(model, loading, opened)
    with progress() as report:
        result = run_sequence(
            tuner, opened, shared, parts, settings, directory=output.with_suffix(".runs"), on_progress=report
        )
    result.save(output)
    print_json(result.as_dict()) if as_json else print_all(sequence_tables(result))
