"""Commands that decide what to replay: strategies, plan, export."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from forgetcast.cli.app import (
    app,
    err,
    load_base,
    load_data,
    load_recipe,
    out,
    print_all,
    print_json,
    recipe_of,
    say_ratios,
    show,
)
from forgetcast.cli.options import (
    REPLAY,
    AsJson,
    AtlasPath,
    Columns,
    DataFormat,
    ExportFormat,
    Format,
    HoldOut,
    Loading,
    Output,
    PoolColumns,
    PoolFormat,
    PoolPath,
    RecipeName,
    Repeat,
    Seed,
    Strict,
    loads_a_model,
)
from forgetcast.defaults import HOLD_OUT, MOST_EXAMPLES, RATIO
from forgetcast.errors import ConfigError
from forgetcast.files import check_destination
from forgetcast.text import did_you_mean

if TYPE_CHECKING:
    import numpy as np

    from forgetcast.atlas import Atlas
    from forgetcast.data import Pool, Recipe
    from forgetcast.measure import Scores
    from forgetcast.replay import Advice, ReplayPlan, Strategy
    from forgetcast.replay.corpus import Candidates


@app.command(rich_help_panel=REPLAY)
def strategies(as_json: AsJson = False) -> None:
    """List the replay strategies: what each does, and which signals it needs.

    Example: forgetcast strategies
    """
    from forgetcast.cli.columns import FigureTable, Name, Words
    from forgetcast.replay import STRATEGIES

    rows = {name: {"summary": s.summary, "needs": sorted(s.needs), "phase": s.phase} for name, s in STRATEGIES.items()}
    if as_json:
        print_json(rows)
        return
    table = FigureTable(Name("strategy"), Words("needs"), Words("what it does"))
    for name, row in rows.items():
        table.add_row(name, ", ".join(row["needs"]), str(row["summary"]))
    out.print(table)


@app.command(rich_help_panel=REPLAY)
@loads_a_model
def plan(
    atlas: AtlasPath,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Replay plan to write (Parquet).")] = None,
    strategy: Annotated[
        str, typer.Option(help="What to replay: see `forgetcast strategies`; FILE.py:NAME for a strategy of your own.")
    ] = "top",
    ratio: Annotated[float | None, typer.Option(help=f"Replayed examples per new one; default: {RATIO:g}.")] = None,
    share_of_set: Annotated[
        float | None, typer.Option(help="Instead of --ratio: replayed examples among all, such as 0.5 or 0.9.")
    ] = None,
    share_of_tokens: Annotated[
        float | None,
        typer.Option(help="Instead of --ratio: replayed tokens among all; needs --model and --task, to count them."),
    ] = None,
    target_retention: Annotated[
        float | None,
        typer.Option(help="Use the ratio that is expected to avoid this fraction of the forgetting without replay."),
    ] = None,
    advise: Annotated[bool, typer.Option("--advise", help="Print advice from past runs first.")] = False,
    verification: Annotated[
        Path | None, typer.Option(help="For --advise: a verification file, by which a recipe is advised too.")
    ] = None,
    forecast: Annotated[Path | None, typer.Option(help="Forecast file; default: the mean of the atlas.")] = None,
    truth: Annotated[
        Path | None, typer.Option(help="For strategies that need `truth`: the tuned model's scores of the pool.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="For strategies that need `gradients`, and --share-of-tokens: the base model.")
    ] = None,
    task: Annotated[
        Path | None,
        typer.Option(
            help="Fine-tuning data: for strategies that need `gradients`, --share-of-tokens, and advice on a piloted "
            "task."
        ),
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(help="Features of a corpus (see `forgetcast features`): replay from it and from the pool."),
    ] = None,
    on_policy: Annotated[
        Path | None,
        typer.Option(
            help="The base model's own answers (see `generate --on-policy`): replay these; the plan is of them."
        ),
    ] = None,
    source: Annotated[
        list[str] | None, typer.Option(help="Replay only examples of this source; may be repeated.")
    ] = None,
    hold_out: HoldOut = HOLD_OUT,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Of the softmax, in nats (ranked: in standard deviations); default: effective sample size = 25 %."
        ),
    ] = None,
    repeat: Repeat = False,
    seed: Seed = 0,
    recipe: RecipeName = None,
    format: Format = None,
    column: Columns = None,
    strict: Strict = False,
    as_json: AsJson = False,
    *,
    loading: Loading,
) -> None:
    """Plan what to mix into the fine-tune, and what to hold out for judging.

    Advice on the ratio is learned from the runs that `pilot` and `verify` have stored in the atlas. How much to replay
    is a ratio to the new examples, which may be above 1, or a share of all examples or of all tokens.

    Example: forgetcast plan runs.atlas --forecast forecast.parquet --ratio 0.125 -o plan.parquet

    With `--corpus`, the plan is of a pool that has the examples of both: the corpus, if the pool was drawn from it,
    else a folder with both files.

    Example: forgetcast plan runs.atlas --forecast forecast.parquet --corpus corpus.features -o plan.parquet

    Example: forgetcast plan runs.atlas --advise --target-retention 0.5 --strategy top -o plan.parquet

    A verification says whether to replay at all: --advise then names the simplest of its arms that is not shown to
    forget more than the best, at equal new-task loss.

    Example: forgetcast plan runs.atlas --advise --verification verification.json
    """
    from forgetcast import replay
    from forgetcast.atlas import Atlas
    from forgetcast.cli.tables import advice_tables
    from forgetcast.data.reader import data_name
    from forgetcast.experiments import Verification
    from forgetcast.measure.features import FeatureFolder
    from forgetcast.replay.corpus import join_corpus

    if output is not None:
        check_destination(output)
    rule = replay.get_strategy(strategy, temperature=temperature)
    by_tokens = share_of_tokens is not None
    if "gradients" not in rule.needs and not by_tokens and (format is not None or column or strict):
        raise ConfigError("--format, --column and --strict are about --task, read only where gradients are needed")
    if sum(given is not None for given in (ratio, share_of_set, share_of_tokens, target_retention)) > 1:
        raise ConfigError("give one of --ratio, --share-of-set, --share-of-tokens and --target-retention")
    if share_of_set is not None:
        ratio = replay.ratio_of_share(share_of_set)
    if share_of_tokens is not None:
        ratio = replay.ratio_of_share(share_of_tokens)  # until the tokens are counted
    if verification is not None and not advise:
        raise ConfigError("--verification is for --advise")
    opened, advice = Atlas.open(atlas), None
    verified = Verification.load(verification).advice if verification is not None else None
    shared = load_recipe(recipe, opened) if recipe is not None else recipe_of(opened)
    if advise or target_retention is not None:
        about = data_name(task) if task is not None else None
        advice = replay.advise(opened, rule.name, target=target_retention, task=about, recipe=shared)
        if target_retention is not None:
            ratio = _advised_ratio(advice)
    if output is None:
        if advice is None:
            raise ConfigError("give -o, the plan to write, or --advise")
        if as_json:
            print_json(advice.as_dict() | ({} if verified is None else {"recipe_advice": verified.as_dict()}))
        else:
            print_all(advice_tables(advice))
            print_all(escape(sentence) for sentence in (verified.sentences if verified is not None else ()))
        return
    _check_inputs(rule, truth=truth, model=model, task=task, advised=advice is not None, counted=by_tokens)
    given, predicted, measure = _forecast(forecast, opened)
    if corpus is not None and measure != "loss":
        raise ConfigError(f"{forecast} is a forecast of exact match; --corpus needs one of the loss")
    signals = replay.Signals.from_atlas(
        opened,
        needs=rule.needs,
        forecast=predicted,
        truth=_measured(opened, truth) if truth is not None else None,
        gradients=(
            _gradients(opened, model, load_data(task, format, column, strict), loading)
            if "gradients" in rule.needs and model is not None and task is not None
            else None
        ),
    )
    held_out_ids, joined = opened.hold_out(hold_out, seed=seed, exclude=given), None
    candidates: Pool | Candidates = opened.pool
    among: Sequence[str] | None = None
    if predicted is not None and measure != "loss" and "forecast" in rule.needs:
        # Where the base model's answer was not right there is none to lose, and no forecast.
        among = [id_ for id_, value in zip(opened.pool.ids, predicted.tolist(), strict=True) if value == value]
    if corpus is not None:
        folder = FeatureFolder(corpus)
        folder.check_model(opened.model_hash)
        joined = join_corpus(signals, folder, held_out_ids, needs=rule.needs)
        candidates, signals, among = joined.candidates, joined.signals, joined.among
    planned = replay.make_plan(
        candidates,
        rule,
        signals,
        ratio=(RATIO if ratio is None else ratio) if rule.phase != "never" else 0.0,
        held_out=held_out_ids if joined is None else joined.held_out,
        among=_of_sources(candidates, source, among) if source else among,
        repeat=repeat,
        seed=seed,
    )
    planned = dataclasses.replace(planned, recipe=shared)
    if share_of_tokens is not None and model is not None and task is not None:
        if shared is None or joined is not None:
            raise ConfigError("--share-of-tokens needs --recipe, as the atlas has none of ours, and takes no --corpus")
        examples = load_data(task, format, column, strict)
        planned = _with_share_of_tokens(planned, share_of_tokens, opened, model, examples, loading)
    if on_policy is not None:
        if joined is not None or by_tokens:
            raise ConfigError("--on-policy cannot be combined with --corpus or --share-of-tokens")
        planned = planned.of_texts(load_data(on_policy))
    planned.save(output)
    uses_forecast, sampled = "forecast" in rule.needs, planned.rank is None or planned.ranked_share < 1
    facts = {
        "strategy": rule.name,
        "ratio": planned.ratio,
        "forecast": str(forecast) if forecast is not None else "the atlas's mean" if uses_forecast else None,
        "forecast_measure": measure if uses_forecast else None,
        "usable": planned.usable,
        "effective_size": round(planned.effective_size, 1) if sampled else None,
        "held_out": len(planned.held_out_ids),
        **_under_recipe(planned, shared),
        **(joined.as_dict() if joined is not None else {}),
        "output": str(output),
    }
    if joined is not None and joined.overlapping and not as_json:
        err.print(
            f"{joined.overlapping} example(s) of the corpus are left out: the pool has the same tokens "
            f"({joined.overlapping_held_out} of them in held-out examples)"
        )
    if advice is not None and not as_json:
        print_all(advice_tables(advice))
    if verified is not None and not as_json:
        print_all(map(escape, verified.sentences))
    if as_json:
        facts |= {} if advice is None else {"advice": advice.as_dict()}
        facts |= {} if verified is None else {"recipe_advice": verified.as_dict()}
    show(facts, as_json, title="Replay plan")


def _with_share_of_tokens(
    planned: ReplayPlan, share: float, atlas: Atlas, model: str, task: Pool, loading: Loading
) -> ReplayPlan:
    """Give a plan the ratio at which so many of a fine-tune's tokens are replayed ones."""
    from forgetcast.replay import with_share_of_tokens

    assert planned.recipe is not None
    recipe, base = planned.recipe, load_base(model, loading, atlas)
    longest = min(recipe.max_length, base.context)
    by_id: dict[str, int] = {}

    def tokens(id_: str) -> int:
        if id_ not in by_id:
            by_id[id_] = len(base.encode(atlas.pool[int(atlas.pool.positions([id_])[0])], longest, end=True).ids)
        return by_id[id_]

    new = [len(base.encode(example, longest, end=True).ids) for example in task]
    return with_share_of_tokens(planned, share, new, tokens)


def _under_recipe(planned: ReplayPlan, recipe: Recipe | None) -> dict[str, Any]:
    """Return what a plan replays in a fine-tune by the recipe; say on standard error what does not fit."""
    if not planned.ratio:
        return {}
    if recipe is None:
        err.print("note: the atlas has no recipe of ours, so it is not known how many examples are replayed: --recipe")
        return {}
    from forgetcast.replay.plan import achieved_ratio

    facts: dict[str, Any] = {"recipe_steps": recipe.steps, "recipe_batch_size": recipe.batch_size}
    try:
        say_ratios([planned.ratio], recipe)
        facts["replayed"] = planned.count(recipe.steps, recipe.batch_size)
        facts["new"] = recipe.steps * recipe.batch_size
        facts["achieved_ratio"] = achieved_ratio(recipe.steps, planned.ratio)
        facts["share_of_set"] = facts["replayed"] / (facts["replayed"] + facts["new"])
    except ConfigError as error:
        err.print(f"warning: a fine-tune by this recipe is refused: {error}", markup=False, soft_wrap=True)
    return facts


def _check_inputs(
    rule: Strategy, *, truth: Path | None, model: str | None, task: Path | None, advised: bool, counted: bool
) -> None:
    """Raise ConfigError unless the options are those that the strategy, or counting tokens, needs."""
    if (truth is not None) != ("truth" in rule.needs):
        raise ConfigError(
            "strategies that need 'truth', and only they, need --truth: a tuned model's score file of the pool"
        )
    by_gradient = "gradients" in rule.needs
    if counted and (model is None or task is None):
        raise ConfigError("--share-of-tokens needs --model and --task, whose tokens are counted")
    if counted:
        return
    if (model is not None) != by_gradient or (task is None if by_gradient else task is not None and not advised):
        raise ConfigError(
            "strategies that need 'gradients', and only they, need --model and --task; advice may have a --task"
        )


def _advised_ratio(advice: Advice) -> float:
    """Return the advised ratio, if there is one."""
    from forgetcast.replay.law import MAX_RATIO

    if advice.needed is None:
        raise ConfigError(
            f"no ratio up to {MAX_RATIO:g} is expected to keep {advice.target:.0%} with {advice.strategy} replay; "
            f"at {MAX_RATIO:g} it is {1 - advice.most.mean:.0%}. Aim lower, or give --ratio"
        )
    return advice.needed.mean


def _forecast(path: Path | None, atlas: Atlas) -> tuple[tuple[str, ...], np.ndarray | None, str]:
    """Return a forecast file's probes, means in the pool's order and measure; (), None and 'loss' without a file.

    A forecast of exact match is NaN where the base model's answer was not right: there is none to lose.
    """
    import numpy as np

    from forgetcast.completion.forecast import TaskForecast
    from forgetcast.data.ids import ExampleIndex

    if path is None:
        return (), None, "loss"
    forecast = TaskForecast.load(path)
    forecast.check_pool(atlas.pool)
    if forecast.measure == "loss":
        means = forecast.mean[ExampleIndex(forecast.ids).positions(atlas.pool.ids)]
    else:
        means = np.full(len(atlas.examples), np.nan)
        means[atlas.pool.positions(forecast.ids, where="the forecast")] = forecast.mean
    return forecast.probes, means, forecast.measure


def _measured(atlas: Atlas, path: Path) -> np.ndarray:
    """Return the forgetting of every example by a tuned model's scores, shape (N,); NaN where it was not scored."""
    import numpy as np

    from forgetcast.measure import Scores, forgetting

    after: Scores = Scores.load(path)
    measured = np.full(len(atlas.examples), np.nan)
    measured[atlas.columns_of(after)] = forgetting(atlas.baseline, after)
    return measured


def _of_sources(pool: Pool | Candidates, sources: Sequence[str], among: Sequence[str] | None) -> list[str]:
    """Return the ids of the examples of these sources, of those in `among`."""
    if unknown := sorted(set(sources) - set(pool.sources)):
        there = ", ".join(sorted(set(pool.sources)))
        hint = did_you_mean(unknown[0], pool.sources)
        raise ConfigError(f"the pool has no example of the source {unknown[0]!r}; it has {there}{hint}")
    of_sources = [id_ for id_, source in zip(pool.ids, pool.sources, strict=True) if source in sources]
    return of_sources if among is None else sorted(set(of_sources).intersection(among))


def _gradients(atlas: Atlas, model: str, task: Pool, loading: Loading) -> np.ndarray:
    """Return the gradient product of every example with a base loss, shape (N,); NaN elsewhere."""
    import numpy as np

    base = load_base(model, loading, atlas).merged()
    from forgetcast.lm import gradient_products

    scored = np.flatnonzero(~np.isnan(atlas.nll_before))
    products = np.full(len(atlas.examples), np.nan)
    products[scored] = gradient_products(base, task, atlas.subset(atlas.examples[i] for i in scored.tolist()))
    return products


@app.command(rich_help_panel=REPLAY)
def export(
    plan: Annotated[Path, typer.Argument(help="Replay plan.")],
    pool: PoolPath,
    output: Output,
    kind: Annotated[ExportFormat, typer.Option("--format", help="What to write.")] = ExportFormat.JSONL,
    task: Annotated[Path | None, typer.Option(help="Fine-tuning data; not for jsonl and parquet.")] = None,
    model: Annotated[str | None, typer.Option(help="Base model to name in a trainer's configuration.")] = None,
    recipe: RecipeName = None,
    count: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_EXAMPLES,
            help="Replayed examples; default: the ratio times the examples of the task or steps.",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, max=MOST_EXAMPLES, help="Steps on new examples; default: the recipe's.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, max=MOST_EXAMPLES, help="Examples per step; default: the recipe's, else 8.")
    ] = None,
    data_format: Annotated[
        DataFormat | None, typer.Option(help="Format of the task; default: each row's, by its fields.")
    ] = None,
    column: Columns = None,
    pool_format: PoolFormat = None,
    pool_column: PoolColumns = None,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Export a plan for another trainer: weighted examples, a mixture with the task, or a configuration.

    A configuration carries the recipe that the plan was made for, or --recipe. The other formats take the task once,
    unless --recipe or --steps says how long the fine-tune is. Without a task, a count, a recipe or steps, jsonl and
    parquet hold every usable example with its weight.

    Example: forgetcast export plan.parquet pool.jsonl --format axolotl --task task.jsonl --model ./my-model -o run
    """
    from forgetcast.data import Recipe
    from forgetcast.replay import ReplayPlan
    from forgetcast.replay.export import TRAINERS, export_mixture, export_weighted, forms, new_examples, replayed

    check_destination(output, folder=kind not in (ExportFormat.JSONL, ExportFormat.PARQUET))
    replay, upstream = ReplayPlan.load(plan), load_data(pool, pool_format, pool_column, strict)
    examples = load_data(task, data_format, column, strict) if task is not None else None
    trainer = TRAINERS.get(kind.value)
    if batch_size is not None and steps is None and recipe is None and trainer is None:
        raise ConfigError("--batch-size needs --steps or --recipe, which say how many batches there are")
    if count is not None and (steps is not None or recipe is not None or trainer is not None):
        raise ConfigError("--count is for jsonl, parquet and datasets, without --steps and --recipe, which set it")
    given = Recipe.load(recipe) if recipe is not None else replay.recipe if trainer is not None else None
    settings = _fine_tune(given, steps, batch_size)
    new = None if examples is None else len(examples)
    if settings is not None and count is None:
        new, count = settings.steps * settings.batch_size, replay.count(settings.steps, settings.batch_size)
    elif count is None and new is not None:
        count = round(new * replay.ratio)
        if count > replay.usable > 0 and not replay.repeat:
            raise ConfigError(
                f"the ratio {replay.ratio:.4g} of {new} task examples is {count} replayed ones, and the plan has "
                f"{replay.usable}: say with --steps and --batch-size, --recipe or --count how long the fine-tune is"
            )
    facts: dict[str, Any] = {"format": kind.value, "replayed": count}
    if kind in (ExportFormat.JSONL, ExportFormat.PARQUET):
        if (output.suffix == ".parquet") != (kind is ExportFormat.PARQUET):
            raise ConfigError(f"{output}: a file of the format {kind.value} should end in .{kind.value}")
        exported = export_weighted(replay, upstream, output, count)
        facts |= {"usable": exported, "replayed": None} if count is None else {"replayed": exported}
    elif examples is None:
        raise ConfigError(f"the format {kind.value} needs --task: it mixes the replayed examples with those of a task")
    elif trainer is None:
        assert count is not None, "a task gives a count"
        mixed = examples if settings is None else new_examples(examples, count=new or 0, seed=settings.seed)
        export_mixture(replay, upstream, mixed, output, count)
        held_forms = forms([*mixed, *replayed(replay, upstream, count)])
        if len(held_forms) > 1:
            held = ", ".join(f"{number} {form}" for form, number in held_forms.items())
            err.print(
                f"note: the data set holds {held}; TRL reads data of one form only: make the plan with --source, of "
                "sources in the task's form",
                soft_wrap=True,
            )
    elif model is None:
        raise ConfigError(f"the format {kind.value} needs --model: its configuration names the base model")
    elif given is None or settings is None:
        raise ConfigError(
            f"the format {kind.value} needs the recipe of the fine-tune, and the plan has none: give --recipe, or make "
            "the plan again from an atlas with a recipe"
        )
    else:
        trainer(replay, upstream, examples, output, recipe=settings, model=model)
        facts |= {"steps": settings.steps + (count or 0) // settings.batch_size, "method": settings.method}
    if new and count:
        facts |= {"new": new, "ratio": count / new}
        if abs(count / new - replay.ratio) > 1e-9:
            err.print(f"note: the ratio of the plan is {replay.ratio:.4g}; of the export it is {count / new:.4g}")
    show(facts | {"output": str(output)}, as_json, title="Export")


def _fine_tune(recipe: Recipe | None, steps: int | None, batch_size: int | None) -> Recipe | None:
    """Return the recipe with these numbers; None if there is neither a recipe nor steps."""
    from forgetcast.data import Recipe
    from forgetcast.settings import check_settings

    if recipe is None and steps is None:
        return None
    changed = {"steps": steps, "batch_size": batch_size}
    fields = {name: value for name, value in changed.items() if value is not None}
    shared = {} if recipe is None else recipe.model_dump()
    if "batch_size" in fields and (shared.get("micro_batch_size") or 1) > fields["batch_size"]:
        shared["micro_batch_size"] = None
    return check_settings(shared | fields, Recipe, where="--steps and --batch-size")
