"""Commands that say what to replay: plan, export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from forgetcast.atlas.store import Atlas
from forgetcast.cli.app import AsJson, AtlasPath, Repeat, app, print_all, print_json, show
from forgetcast.cli.tables import advice_tables
from forgetcast.completion.forecast import TaskForecast
from forgetcast.data.ids import ExampleIndex
from forgetcast.data.pool import Pool, load_task
from forgetcast.errors import ConfigError
from forgetcast.experiments.runs import check_base
from forgetcast.measure.scores import Scores, forgetting
from forgetcast.replay.export import FORMATS, TRAINERS, export_mixture, export_weighted
from forgetcast.replay.law import MOST, Advice
from forgetcast.replay.plan import HOLD_OUT, RATIO, ReplayPlan, make_plan
from forgetcast.replay.signals import Signals
from forgetcast.replay.strategies import STRATEGIES, get_strategy

_STRATEGY_HELP = "What to replay; FILE.py:NAME for a strategy of your own. " + " ".join(
    f"**{name}**: {strategy.summary}." for name, strategy in STRATEGIES.items()
)


@app.command(name="plan")
def plan_(
    atlas: AtlasPath,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Replay plan to write (Parquet).")] = None,
    strategy: Annotated[str, typer.Option(help=_STRATEGY_HELP)] = "top",
    ratio: Annotated[float | None, typer.Option(help=f"Replayed examples per new one; default: {RATIO:g}.")] = None,
    target_retention: Annotated[
        float | None,
        typer.Option(help="Take the ratio that is expected to avoid this share of the forgetting without replay."),
    ] = None,
    advise: Annotated[bool, typer.Option("--advise", help="Print advice from past runs first.")] = False,
    forecast: Annotated[Path | None, typer.Option(help="Forecast file; default: the atlas's own mean.")] = None,
    truth: Annotated[
        Path | None, typer.Option(help="For the strategy truth: the tuned model's score file of the pool.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="For the strategy gradient: the base model.")] = None,
    task: Annotated[
        Path | None,
        typer.Option(
            help="The fine-tuning data: for the strategy gradient, and for advice on a task that had a pilot."
        ),
    ] = None,
    source: Annotated[
        list[str] | None, typer.Option(help="Replay only examples of this source; may be repeated.")
    ] = None,
    hold_out: Annotated[float, typer.Option(help="Fraction of the pool never replayed, to judge on.")] = HOLD_OUT,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Of the softmax, in nats (ranked: in standard deviations); default: effective sample size of 25 %."
        ),
    ] = None,
    repeat: Repeat = False,
    seed: Annotated[int, typer.Option(help="Of the hold-out and of the order.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Plan what to mix into the fine-tune, and what to keep aside for judging.

    How much is enough is learned from the fine-tunes that `pilot` and `verify` have kept in the atlas.

    Example: forgetcast plan runs.atlas --forecast forecast.parquet --ratio 0.125 -o plan.parquet

    Example: forgetcast plan runs.atlas --advise --target-retention 0.5 --strategy top -o plan.parquet
    """
    rule = get_strategy(strategy, temperature=temperature)
    if ratio is not None and target_retention is not None:
        raise ConfigError("give --ratio or --target-retention, not both")
    opened = Atlas.open(atlas)
    advice = None
    if advise or target_retention is not None:
        named = task.stem if task is not None else None
        advice = advise(opened, rule.name, target=target_retention, task=named)
        if target_retention is not None:
            ratio = _enough(advice)
    if output is None:
        if advice is None:
            raise ConfigError("give -o, the plan to write, or --advise")
        print_json(advice.as_dict()) if as_json else print_all(advice_tables(advice))
        return
    needs = rule.needs
    if (truth is not None) != ("truth" in needs):
        raise ConfigError("the strategy 'truth', and only it, needs --truth: a tuned model's score file of the pool")
    by_gradient = "gradients" in needs
    if (model is not None) != by_gradient or (task is None if by_gradient else task is not None and advice is None):
        raise ConfigError("the strategy 'gradient', and only it, needs --model and --task; advice may have a --task")
    given = TaskForecast.load(forecast) if forecast is not None else None
    if given is not None:
        given.check_pool(opened.pool)
    signals = Signals.from_atlas(
        opened,
        needs=needs,
        forecast=None if given is None else given.mean[ExampleIndex(given.ids).positions(opened.pool.ids)],
        truth=_measured(opened, Scores.load(truth)) if truth is not None else None,
        gradients=_gradients(opened, model, task) if model is not None and task is not None else None,
    )
    plan = make_plan(
        opened.pool,
        rule,
        signals,
        ratio=(RATIO if ratio is None else ratio) if rule.phase != "never" else 0.0,
        held_out=opened.hold_out(hold_out, seed=seed, exclude=given.probes if given is not None else ()),
        among=_of_sources(opened.pool, source) if source else None,
        repeat=repeat,
        seed=seed,
    )
    plan.save(output)
    facts = {
        "strategy": rule.name,
        "ratio": plan.ratio,
        "forecast": str(forecast) if given is not None else "the atlas's mean" if "forecast" in needs else None,
        "usable": plan.usable,
        "effective_size": round(plan.effective_size, 1) if plan.rank is None or plan.ranked_share < 1 else None,
        "held_out": len(plan.held_out_ids),
        "output": str(output),
    }
    if advice is not None and not as_json:
        print_all(advice_tables(advice))
    show(facts | ({"advice": advice.as_dict()} if advice is not None and as_json else {}), as_json, title="Replay plan")


def _enough(advice: Advice) -> float:
    """The advised ratio, if there is one."""
    if advice.needed is None:
        raise ConfigError(
            f"no ratio up to {MOST:g} is expected to keep {advice.target:.0%} with {advice.strategy} replay; "
            f"at {MOST:g} it is {1 - advice.most.mean:.0%}. Aim lower, or give --ratio"
        )
    return advice.needed.mean


def _measured(atlas: Atlas, after: Scores) -> np.ndarray:
    """Forgetting of every example of an atlas by a tuned model's scores, shape (N,); NaN where it was not scored."""
    measured = np.full(len(atlas.examples), np.nan)
    measured[atlas.columns_of(after)] = forgetting(atlas.baseline, after)
    return measured


def _of_sources(pool: Pool, sources: Sequence[str]) -> list[str]:
    """Ids of the examples of these sources."""
    if unknown := sorted(set(sources) - set(pool.sources)):
        there = ", ".join(sorted(set(pool.sources)))
        raise ConfigError(f"the pool has no example of the source {unknown[0]!r}; it has {there}")
    return [example.id for example, source in zip(pool, pool.sources, strict=True) if source in sources]


def _gradients(atlas: Atlas, model: str, task: Path) -> np.ndarray:
    """Gradient product of every example that the base model can score, shape (N,); NaN elsewhere."""
    from forgetcast.lm import gradient_products, load

    base = load(model)
    check_base(atlas, base)
    scored = np.flatnonzero(~np.isnan(atlas.nll_before))
    products = np.full(len(atlas.examples), np.nan)
    products[scored] = gradient_products(
        base, load_task(task), atlas.subset(atlas.examples[i] for i in scored.tolist())
    )
    return products


@app.command(name="export")
def export_(
    plan: Annotated[Path, typer.Argument(help="Replay plan.")],
    pool: Annotated[Path, typer.Argument(help="The pool that the plan was made for.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write; a directory if it holds a task.")],
    kind: Annotated[str, typer.Option("--format", help=f"One of {', '.join(FORMATS)}.")] = "jsonl",
    task: Annotated[Path | None, typer.Option(help="Fine-tuning data, for all but jsonl and parquet.")] = None,
    model: Annotated[str | None, typer.Option(help="Base model to name in a trainer's configuration.")] = None,
    count: Annotated[
        int | None, typer.Option(help="Replayed examples; default: the plan's ratio times those of the task or steps.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps on new examples, to count the replayed ones by.")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples in a step, with --steps.")] = 8,
    as_json: AsJson = False,
) -> None:
    """Write what a plan replays for another trainer: weighted examples, a mixture with the task, or a configuration.

    Without a task, a count or steps, jsonl and parquet hold every example that may be replayed, with its weight.

    Example: forgetcast export plan.parquet pool.jsonl --format axolotl --task task.jsonl --model ./my-model -o run
    """
    if kind not in FORMATS:
        raise ConfigError(f"unknown format {kind!r}; choose one of {', '.join(FORMATS)}")
    replay, upstream = ReplayPlan.load(plan), Pool.load(pool)
    examples = load_task(task) if task is not None else None
    if count is None and steps is not None:
        count = round(steps * replay.ratio) * batch_size
    elif count is None and examples is not None:
        count = round(len(examples) * replay.ratio)
    facts: dict[str, Any] = {"format": kind, "replayed": count}
    if kind in ("jsonl", "parquet"):
        if (output.suffix == ".parquet") != (kind == "parquet"):
            raise ConfigError(f"{output}: a file of the format {kind} should end in .{kind}")
        facts["replayed"] = export_weighted(replay, upstream, output, count)
    elif examples is None or count is None:
        raise ConfigError(f"the format {kind} needs --task: it mixes the replayed examples with those of a task")
    elif kind == "datasets":
        export_mixture(replay, upstream, examples, output, count)
    elif model is None:
        raise ConfigError(f"the format {kind} needs --model: its configuration names the base model")
    else:
        TRAINERS[kind](replay, upstream, examples, output, count=count, model=model)
    show(facts | {"output": str(output)}, as_json, title="Export")
