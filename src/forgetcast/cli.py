"""The command line: parse, call the library, print.

Exit codes: 0 done, 1 a condition of `diff` holds, 2 bad input (one line on standard error says which), 130 interrupted.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from forgetcast import completion, probes
from forgetcast._files import read_json, write_json
from forgetcast.advice import MOST, Advice, advice_on
from forgetcast.atlas import Atlas
from forgetcast.collect import CollectConfig, OnProgress, check_base, collect, load_tasks
from forgetcast.completion.base import UNLIKE
from forgetcast.coverage import correlation_loadings
from forgetcast.diff import Gate, difference
from forgetcast.errors import ConfigError, DataError, ForgetcastError
from forgetcast.evaluation import bench, bench_left_out
from forgetcast.exports import FORMATS, TRAINERS, export_mixture, export_weighted
from forgetcast.forecast import TaskForecast, measured_probes
from forgetcast.importers import read_lm_eval
from forgetcast.matrix import ForgettingMatrix
from forgetcast.pool import Pool, load_task, train_and_test
from forgetcast.recipe import Recipe, check_settings
from forgetcast.replay import STRATEGIES, ReplayPlan, make_plan
from forgetcast.scores import Scores
from forgetcast.sequence import SequenceSettings, learn_in_sequence, task_orders, usable_strategies
from forgetcast.sequence_result import SequenceResult
from forgetcast.structure import analyze
from forgetcast.tables import (
    advice_tables,
    bench_table,
    demo_tables,
    difference_markdown,
    difference_tables,
    facts_table,
    sequence_tables,
    structure_tables,
    verification_tables,
)
from forgetcast.verification import Trial, Verification, arms, pilot_trial, verify

if TYPE_CHECKING:
    from forgetcast.lm import Chooser

app = typer.Typer(
    name="forgetcast",
    help="Forecast what a language model will forget before you fine-tune it, and replay just enough to keep it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
out, err = Console(highlight=False), Console(stderr=True, highlight=False)

SECONDS_BETWEEN_LINES = 15
"""Of progress, where the output is no terminal but a log."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
AtlasPath = Annotated[Path, typer.Argument(help="The atlas's directory.")]
ByAnswers = Annotated[
    bool, typer.Option("--exact-match", help="Forgetting as right answers that became wrong, not by the loss.")
]
ModelName = Annotated[str, typer.Argument(help="A Hugging Face model directory (or a PEFT adapter's), or a hub id.")]
Device = Annotated[
    str | None, typer.Option(help="Such as cpu or cuda:0, or auto: over all GPUs; default: a GPU if there is one.")
]
RecipeName = Annotated[
    str | None, typer.Option(help="YAML file: method, steps, learning_rate, ...; or one that ships: paper, lora.")
]
OnlineAt = Annotated[
    str | None,
    typer.Option(help="Forecast anew from probes of the model in training after these shares of the steps: 0.25,0.5."),
]
NumberOfProbes = Annotated[int, typer.Option("--probes", min=1, help="How many, with --online.")]
TrustCode = Annotated[bool, typer.Option("--trust-remote-code", help="Let code that comes with the model run.")]


def main() -> None:
    """Run the command line; errors raised on purpose become one line and exit code 2."""
    # Between PEFT and Transformers; nothing that a user of the command could act on.
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
    try:
        app()
    except ForgetcastError as error:
        err.print(f"error: {error}", markup=False, soft_wrap=True)
        sys.exit(2)
    except OSError as error:
        err.print(f"error: {error.filename or 'writing'}: {error.strerror or error}", markup=False, soft_wrap=True)
        sys.exit(2)


@app.command(name="score")
def score_(
    model: ModelName,
    pool: Annotated[Path, typer.Argument(help="JSONL, Parquet, or a saved data set's directory.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Score file to write (Parquet).")],
    max_length: Annotated[int | None, typer.Option(help="Longest input in tokens; default: the context.")] = None,
    answers: Annotated[
        bool,
        typer.Option("--exact-match", help="Let the model answer the prompts too; compare with the completions."),
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, with --exact-match.")] = 32,
    stride: Annotated[
        int | None, typer.Option(help="Read longer texts in windows this many tokens apart; default: cut them.")
    ] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens in a batch, padding included.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 (default), bfloat16 or float16.")] = None,
    device: Device = None,
    trust_remote_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure how well a model predicts each example: nats per target token.

    Example: forgetcast score ./my-model pool.jsonl -o before.parquet
    """
    from forgetcast.lm import exact_match, load, score

    examples = Pool.load(pool)
    language_model = load(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    done = 0

    with _progress() as report:

        def count(finished: int, what: str = "scoring") -> None:
            nonlocal done
            done += finished
            report(what, done, len(examples))

        scores = score(
            language_model,
            examples,
            max_length=max_length,
            stride=stride,
            batch_tokens=batch_tokens,
            partial=output.with_name(f"{output.name}.partial"),
            on_progress=count,
        )
        if answers:
            done = 0
            right, predictions = exact_match(
                language_model, examples, max_new_tokens=max_new_tokens, on_progress=lambda n: count(n, "answering")
            )
            scores = replace(scores, exact_match=right, predictions=predictions)
    if not _is_first():
        return
    scores.save(output)
    unscored = [id_ for id_, reason in zip(scores.ids, scores.reasons, strict=True) if reason]
    right_answers = None
    if scores.exact_match is not None and not np.isnan(scores.exact_match).all():
        right_answers = float(np.nanmean(scores.exact_match))
    facts = {
        "examples": len(scores),
        "unscored": len(unscored),
        "truncated": int(scores.truncated.sum()),
        "tokens": int(scores.tokens.sum()),
        "mean_nll": float(np.nanmean(scores.nll)) if len(unscored) < len(scores) else None,
        "right_answers": right_answers,
        "output": str(output),
    }
    if answers and right_answers is None:
        err.print("warning: no example has a prompt, so there was nothing to answer")
    if unscored:
        err.print(f"warning: {len(unscored)} example(s) could not be scored, e.g. {unscored[0]!r}", markup=False)
    _show(facts, as_json, title="Scores")


@app.command(name="diff")
def diff_(
    before: Annotated[Path, typer.Argument(help="Score file, or samples of lm-evaluation-harness (a file or folder).")],
    after: Annotated[Path, typer.Argument(help="The same, of the changed model.")],
    fail_if: Annotated[
        list[str] | None, typer.Option(help="Exit with code 1 if this holds, such as mean>0.05; may be repeated.")
    ] = None,
    pool: Annotated[Path | None, typer.Option(help="The scored pool, for figures by source.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, for a pull request.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare two models' scores of the same examples: how much was forgotten, how surely, and where.

    A condition names a figure: mean, median, lower or upper (ends of the mean's 95 % interval), worst_tenth,
    worst_hundredth, share_worse, wilcoxon_p, right_before, right_after, right_to_wrong, wrong_to_right, mcnemar_p.

    Exit code 0: no condition holds. 1: one does. 2: the comparison was not possible.

    Example: forgetcast diff before.parquet after.parquet --fail-if "lower>0.02" --fail-if "worst_tenth>0.5"
    """
    gates = [Gate.parse(text) for text in fail_if or ()]
    (left, sources), (right, _) = _scores(before), _scores(after)
    if pool is not None:
        examples = Pool.load(pool)
        named = dict(zip(examples.ids, examples.sources, strict=True))
        sources = tuple(named.get(id_, "") for id_ in left.ids)
    found = difference(left, right, sources=sources)
    failed = [gate.text for gate in gates if gate.fails(found)]
    if as_json:
        _print_json(found.as_dict() | {"failed": failed})
    elif markdown:
        typer.echo(difference_markdown(found, failed))
    else:
        _print_all(difference_tables(found))
    for text in failed:
        err.print(f"failed: {text}", markup=False)
    if failed:
        raise typer.Exit(1)


def _scores(path: Path) -> tuple[Scores, tuple[str, ...] | None]:
    """A score file of ours, or another tool's, and the sources that it names."""
    return (Scores.load(path), None) if path.suffix == ".parquet" else read_lm_eval(path)


@app.command(name="collect")
def collect_(
    config: Annotated[Path, typer.Argument(help="YAML file: model, pool, tasks, atlas, recipe.")],
    device: Device = None,
    trust_remote_code: TrustCode = False,
) -> None:
    """Fine-tune on every task, score the pool after each, and keep the forgetting in an atlas. Resumable.

    Example: forgetcast collect config.yaml
    """
    from forgetcast.lm import load

    _alone("collect")
    settings = CollectConfig.load(config)
    pool, tasks = Pool.load(settings.pool), settings.load_tasks()
    base = load(settings.model, device=device, trust_remote_code=trust_remote_code)
    with _progress() as report:
        atlas = collect(
            base,
            pool,
            tasks,
            settings.atlas,
            settings.recipe,
            exact_match=settings.exact_match,
            max_new_tokens=settings.max_new_tokens,
            on_progress=report,
        )
    out.print(f"{atlas.path}: {len(atlas.tasks)} tasks x {len(pool)} examples", markup=False)


@app.command(name="analyze")
def analyze_(atlas: AtlasPath, exact_match: ByAnswers = False, as_json: AsJson = False) -> None:
    """Say how nearly low-rank the forgetting is, and what its components load on.

    Example: forgetcast analyze runs.atlas
    """
    structure = analyze(Atlas.open(atlas).matrix(measure="exact_match" if exact_match else "loss"))
    if as_json:
        _print_json(structure.as_dict())
        return
    _print_all(structure_tables(structure))


@app.command(name="probes")
def probes_(
    atlas: AtlasPath,
    output: Annotated[Path, typer.Option("-o", "--output", help="Pool file of the chosen examples, for `score`.")],
    k: Annotated[int, typer.Option("-k", help="Number of probes.")] = 10,
    at_random: Annotated[bool, typer.Option("--random", help="Draw them instead of choosing them.")] = False,
    audit: Annotated[int, typer.Option(help="How many of the k to draw at random, as an honest sample.")] = 0,
    by_tokens: Annotated[bool, typer.Option(help="Count an example's tokens as the cost of measuring it.")] = False,
    seed: Annotated[int, typer.Option(help="Of the draw with --random.")] = 0,
) -> None:
    """Choose the few examples to measure after a new fine-tune.

    Example: forgetcast probes runs.atlas -k 10 -o probes.jsonl
    """
    opened = Atlas.open(atlas)
    # An example that the base model could not score cannot be a probe either.
    usable = np.flatnonzero(~np.isnan(opened.nll_before))
    if at_random:
        chosen = probes.random(len(opened.examples), k, seed=seed, candidates=usable)
    else:
        cost = np.maximum(opened.before.tokens, 1) if by_tokens else None
        chosen = probes.choose(completion.Bayesian().fit(opened), k, usable, cost, audit=audit)
    opened.subset(opened.examples[i] for i in chosen).save(output)
    out.print(f"{k} probes written to {output}; next: forgetcast score TUNED_MODEL {output} -o probe_scores.parquet")


@app.command(name="forecast")
def forecast_(
    atlas: AtlasPath,
    scores: Annotated[Path, typer.Option(help="Score file of the probes, by the tuned model.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Forecast file to write (Parquet).")],
    method: Annotated[str, typer.Option(help=f"One of {', '.join(completion.METHODS)}.")] = "bayesian",
    level: Annotated[float, typer.Option(help="Level of the intervals.")] = 0.9,
    task: Annotated[str | None, typer.Option(help="Name of the new task, for the report.")] = None,
    as_json: AsJson = False,
) -> None:
    """Forecast the forgetting of every example from the probes' scores.

    Example: forgetcast forecast runs.atlas --scores probe_scores.parquet -o forecast.parquet
    """
    opened = Atlas.open(atlas)
    columns, forgetting = measured_probes(opened, Scores.load(scores))
    known = [name for name in opened.tasks if name != task]
    model = _method(method).fit(opened.stored(known))
    forecast = TaskForecast.of(model.predict(columns, forgetting), opened, method=method, task=task, level=level)
    forecast.save(output)
    worst = np.argsort(-forecast.mean, kind="stable")[:10]
    facts = {
        "examples": len(forecast.ids),
        "probes": len(columns),
        "mean_forgetting": float(forecast.mean.mean()),
        "level": level,
        "misfit": forecast.misfit,
        "output": str(output),
    }
    rows = [
        {"id": forecast.ids[i], "probed": bool(forecast.probed[i])}
        | {name: float(getattr(forecast, name)[i]) for name in ("mean", "lower", "upper")}
        for i in worst
    ]
    if as_json:
        _print_json(facts | {"most_at_risk": rows})
        return
    _show(facts, False, title="Forecast")
    table = Table("example", "forecast", f"{level:.0%} interval", title="Most at risk (nats per token)")
    for row in rows:
        interval = "measured" if row["probed"] else f"{row['lower']:.3f} to {row['upper']:.3f}"
        table.add_row(escape(row["id"]), f"{row['mean']:.3f}", interval)
    out.print(table)
    if forecast.misfit < UNLIKE:
        out.print(
            "The probes say that this task is unlike those in the atlas: measure more of them before you rely on it"
            + (", or use --method auto, which takes what forecasts unlike tasks best." if method != "auto" else ".")
        )


_STRATEGY_HELP = "What to replay. " + " ".join(f"**{name}**: {kind.text}." for name, kind in STRATEGIES.items())


@app.command(name="plan")
def plan_(
    atlas: AtlasPath,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Replay plan to write (Parquet).")] = None,
    strategy: Annotated[str, typer.Option(help=_STRATEGY_HELP)] = "forecast",
    ratio: Annotated[float | None, typer.Option(help="Replayed examples per new one; default: 0.125.")] = None,
    target_retention: Annotated[
        float | None,
        typer.Option(help="Take the ratio that is expected to avoid this share of the forgetting without replay."),
    ] = None,
    advise: Annotated[
        bool, typer.Option("--advise", help="Say first what the runs in the atlas tell of ratios and strategies.")
    ] = False,
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
    hold_out: Annotated[float, typer.Option(help="Share of the pool never replayed, to judge on.")] = 0.2,
    temperature: Annotated[
        float | None,
        typer.Option(help="Of the softmax, in nats (ranked: in standard deviations); default: spread over a quarter."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the hold-out and of the order.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Plan what to mix into the fine-tune, and what to keep aside for judging.

    How much is enough is learned from the fine-tunes that `pilot` and `verify` have kept in the atlas.

    Example: forgetcast plan runs.atlas --forecast forecast.parquet --ratio 0.125 -o plan.parquet

    Example: forgetcast plan runs.atlas --advise --target-retention 0.5 --strategy top -o plan.parquet
    """
    if strategy not in STRATEGIES:
        raise ConfigError(f"unknown replay strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}")
    advice = None
    if advise or target_retention is not None:
        named = task.stem if task is not None else None
        advice = advice_on(Atlas.open(atlas), strategy, target=target_retention, task=named)
        if target_retention is not None:
            if ratio is not None:
                raise ConfigError("give --ratio or --target-retention, not both")
            ratio = _enough(advice)
    if output is None:
        if advice is None:
            raise ConfigError("give -o, the plan to write, or --advise")
        _print_json(advice.as_dict()) if as_json else _print_all(advice_tables(advice))
        return
    needs = STRATEGIES[strategy].needs
    if (truth is not None) != ("truth" in needs):
        raise ConfigError("the strategy 'truth', and only it, needs --truth: a tuned model's score file of the pool")
    by_gradient = "gradients" in needs
    if (model is not None) != by_gradient or (task is None if by_gradient else task is not None and advice is None):
        raise ConfigError("the strategy 'gradient', and only it, needs --model and --task; advice may have a --task")
    opened = Atlas.open(atlas)
    pool = opened.pool
    given = TaskForecast.load(forecast) if forecast is not None else None
    fitted = None
    if "loadings" in needs or ("forecast" in needs and given is None):
        fitted = completion.Bayesian().fit(opened.matrix())
    mean = None
    if given is not None:
        given.check_pool(pool)
        mean = given.mean[_order(given.ids, pool)]
    elif fitted is not None:
        mean = fitted.predict([], []).mean
    unscored = [id_ for id_, nll in zip(pool.ids, opened.nll_before, strict=True) if np.isnan(nll)]
    excluded = {*(given.probes if given is not None else ()), *unscored}
    plan = make_plan(
        pool,
        strategy,
        0.0 if strategy == "none" else 0.125 if ratio is None else ratio,
        held_out=pool.hold_out(hold_out, seed=seed, exclude=excluded),
        among=_of_sources(pool, source) if source else None,
        forecast=mean,
        truth=_measured(opened, Scores.load(truth)) if truth is not None else None,
        losses=opened.nll_before,
        gradients=_gradients(opened, model, task) if model is not None and task is not None else None,
        loadings=correlation_loadings(fitted) if fitted is not None and "loadings" in needs else None,
        temperature=temperature,
        seed=seed,
    )
    plan.save(output)
    facts = {
        "strategy": strategy,
        "ratio": plan.ratio,
        "forecast": str(forecast) if given is not None else "the atlas's mean" if "forecast" in needs else None,
        "usable": int((plan.weights > 0).sum()),
        "effective_size": round(plan.effective_size, 1),
        "held_out": len(plan.held_out_ids),
        "output": str(output),
    }
    if advice is not None and not as_json:
        _print_all(advice_tables(advice))
    _show(
        facts | ({"advice": advice.as_dict()} if advice is not None and as_json else {}), as_json, title="Replay plan"
    )


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
    forgetting = np.full(len(atlas.examples), np.nan)
    columns = atlas.columns_of(after)
    forgetting[columns] = after.nll - atlas.nll_before[columns]
    return forgetting


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
    _show(facts | {"output": str(output)}, as_json, title="Export")


@app.command(name="train")
def train_(
    model: ModelName,
    task: Annotated[Path, typer.Argument(help="Fine-tuning data: JSONL, Parquet, or a saved data set.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory for the tuned model.")],
    recipe: RecipeName = None,
    plan: Annotated[Path | None, typer.Option(help="Replay plan; default: no replay.")] = None,
    pool: Annotated[Path | None, typer.Option(help="The pool that the plan was made for.")] = None,
    atlas: Annotated[Path | None, typer.Option(help="For --online and plans of the strategy mir.")] = None,
    online: OnlineAt = None,
    probes_: NumberOfProbes = 30,
    device: Device = None,
    trust_remote_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model, with or without replay. An interrupted run goes on from its last checkpoint in OUTPUT.partial.

    Example: forgetcast train ./my-model task.jsonl --plan plan.parquet --pool pool.jsonl -o tuned
    """
    from forgetcast.lm import Workbench, load

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
    opened, chooser = Atlas.open(atlas) if atlas is not None else None, None
    if online is not None or (replay is not None and replay.strategy == "mir"):
        if replay is None or opened is None:
            raise ConfigError("--online and plans of the strategy 'mir' need --plan, --pool and --atlas")
        chooser = _chooser(opened, replay, online, probes_)
    base = load(model, device=device, trust_remote_code=trust_remote_code)
    if opened is not None:
        check_base(opened, base)
    workbench = Workbench(base)
    partial = output.with_name(f"{output.name}.partial")
    with _progress() as report:
        tuned = workbench.tune(
            examples,
            settings,
            plan=replay,
            pool=upstream,
            chooser=chooser,
            checkpoints=partial,
            on_step=lambda i, n: report("fine-tuning", i, n),
        )
    if not _is_first():
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
    _show(facts, as_json, title="Fine-tuned")


def _fractions(text: str, option: str) -> list[float]:
    """Read "1/32,0.125" as numbers."""
    try:
        return [float(Fraction(part)) for part in text.split(",")]
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"{option}: {text!r} is not a share, nor several, such as 0.1,1/2") from None


def _chooser(atlas: Atlas, plan: ReplayPlan, online: str | None, k: int) -> Chooser:
    """What decides during training what comes next: by probes after shares of the steps, or batch by batch."""
    from forgetcast.lm import MostInterfered, Online

    if online is None:
        return MostInterfered(atlas.pool, atlas.nll_before, max_length=atlas.before.metadata.get("max_length"))
    return Online.of(atlas, plan, k=k, at=_fractions(online, "--online"))


@app.command(name="generate")
def generate_(
    model: ModelName,
    output: Annotated[Path, typer.Option("-o", "--output", help="Pool file to write.")],
    count: Annotated[int, typer.Option("-n", help="Number of texts.")] = 1000,
    max_new_tokens: Annotated[int, typer.Option(help="Longest text, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="Of the sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    device: Device = None,
    trust_remote_code: TrustCode = False,
) -> None:
    """Let a model write a pool itself, to replay from where the data that it was trained on is not at hand.

    Example: forgetcast generate ./my-model -n 1000 -o pool.jsonl
    """
    from forgetcast.lm import load, sample_texts

    _alone("generate")
    language_model = load(model, device=device, trust_remote_code=trust_remote_code)
    done = 0
    with _progress(resumable=False) as report:

        def count_(finished: int) -> None:
            nonlocal done
            done += finished
            report("writing", done, count)

        texts = sample_texts(
            language_model,
            count,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            on_progress=count_,
        )
    texts.save(output)
    out.print(
        f"{len(texts)} texts written to {output}; next: name it as the pool of a sweep, see collect", markup=False
    )


@app.command(name="verify")
def verify_(
    model: ModelName,
    task: Annotated[Path, typer.Argument(help="Fine-tuning data.")],
    atlas: Annotated[Path, typer.Option(help="Atlas with the pool and the base model's scores.")],
    plan: Annotated[list[Path], typer.Option(help="Replay plan to verify; may be given several times.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Verification to write (JSON).")],
    recipe: RecipeName = None,
    seeds: Annotated[int, typer.Option(min=1, help="Fine-tunes per arm.")] = 2,
    test_share: Annotated[float, typer.Option(help="Share of the task that only its loss is judged on.")] = 0.1,
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
    from forgetcast.lm import Workbench, load

    _alone("verify")
    opened, replays, examples = Atlas.open(atlas), [ReplayPlan.load(path) for path in plan], load_task(task)
    for replay in replays:
        replay.check_pool(opened.pool)
    shared = _recipe(recipe, opened)
    train, test = train_and_test(examples, test_share)
    plans = arms(replays, opened.pool)
    choosers = {name: _chooser(opened, p, None, probes_) for name, p in plans.items() if p.strategy == "mir"}
    if online is not None:
        again = {f"{p.strategy} online": p for p in replays if "forecast" in STRATEGIES[p.strategy].needs}
        if not again:
            raise ConfigError("--online needs a plan of a strategy that goes by a forecast")
        plans, choosers = plans | again, choosers | {n: _chooser(opened, p, online, probes_) for n, p in again.items()}
    trial = Trial(
        name=task.stem,
        train=train,
        test=test,
        plans=plans,
        choosers=choosers,
    )
    base = load(model, device=device, trust_remote_code=trust_remote_code)
    check_base(opened, base)
    with _progress() as report:
        result = verify(
            Workbench(base),
            [trial],
            opened.pool,
            opened.before,
            shared,
            seeds=range(seeds),
            directory=output.with_suffix(".runs"),
            on_progress=report,
        )
    write_json(output, result.as_dict())
    opened.add_replays(asdict(run) for run in result.runs)
    if as_json:
        _print_json(result.as_dict())
    else:
        _print_all(verification_tables(result))


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
    hold_out: Annotated[float, typer.Option(help="Share of the pool never replayed, to judge on.")] = 0.2,
    device: Device = None,
    trust_remote_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure what replay saves: a fine-tune without it and one at each ratio, kept in the atlas for `plan --advise`.

    Example: forgetcast pilot ./my-model task.jsonl --atlas runs.atlas --ratios 1/32,1/8 --steps 100
    """
    from forgetcast.lm import Workbench, load

    _alone("pilot")
    opened, examples, shares = Atlas.open(atlas), load_task(task), _fractions(ratios, "--ratios")
    settings = _recipe(recipe, opened)
    if steps is not None:
        settings = settings.model_copy(update={"steps": steps})
    trial = pilot_trial(opened, task.stem, examples, strategies=strategy or (), ratios=shares, hold_out=hold_out)
    base = load(model, device=device, trust_remote_code=trust_remote_code)
    check_base(opened, base)
    with _progress() as report:
        result = verify(
            Workbench(base),
            [trial],
            opened.pool,
            opened.before,
            settings,
            seeds=range(seeds),
            directory=opened.path.with_name(f"{opened.path.name}.pilots"),
            on_progress=report,
        )
    opened.add_replays(asdict(run) for run in result.runs)
    advice = advice_on(opened, strategy[0] if strategy else "random", task=task.stem)
    if as_json:
        _print_json({"runs": [asdict(run) for run in result.runs], "advice": advice.as_dict()})
    else:
        _print_all(advice_tables(advice))


def _recipe(name: str | None, atlas: Atlas) -> Recipe:
    """A recipe by its file or name, or that of the atlas."""
    if name is not None:
        return Recipe.load(name)
    return check_settings(atlas.recipe, Recipe, where=f"the recipe of {atlas.path}")


@app.command(name="sequence")
def sequence_(
    model: ModelName,
    tasks: Annotated[list[Path], typer.Argument(help="A folder of task files, or the files.")],
    atlas: Annotated[Path, typer.Option(help="Atlas to forecast from, with the pool and the base model's scores.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Result to write (JSON).")],
    strategy: Annotated[
        list[str] | None,
        typer.Option(help=f"Replay to compare, default top; may be repeated: {', '.join(usable_strategies())}."),
    ] = None,
    ratio: Annotated[float, typer.Option(help="Replayed examples per new one.")] = 0.125,
    orders: Annotated[int, typer.Option(help="Random orders of the tasks, the same for every arm.")] = 2,
    recipe: RecipeName = None,
    probes_: Annotated[int, typer.Option("--probes", help="Examples measured before each task but the first.")] = 30,
    hold_out: Annotated[float, typer.Option(help="Share of the pool never replayed, to judge on.")] = 0.5,
    test_share: Annotated[float, typer.Option(help="Share of each task that only its loss is judged on.")] = 0.1,
    device: Device = None,
    trust_remote_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune on tasks one after another: without replay, with random replay, and by a forecast made anew each time.

    After every task, the upstream examples that are never replayed and all tasks learned so far are judged. The recipe,
    of each task, is the atlas's unless one is given. Finished stages are kept beside the output and not repeated.

    Example: forgetcast sequence ./my-model tasks/ --atlas runs.atlas -o sequence.json
    """
    from forgetcast.lm import Workbench, load

    _alone("sequence")
    settings = SequenceSettings(tuple(strategy or ("top",)), ratio, orders, probes_, hold_out)
    opened = Atlas.open(atlas)
    shared = _recipe(recipe, opened)
    found = load_tasks(tasks[0] if len(tasks) == 1 and tasks[0].is_dir() else tasks)
    task_orders(list(found), orders)  # too few are an error before the model is loaded
    parts = {name: train_and_test(task, test_share) for name, task in found.items()}
    workbench = Workbench(load(model, device=device, trust_remote_code=trust_remote_code))
    with _progress() as report:
        result = learn_in_sequence(
            workbench, parts, opened, shared, settings, directory=output.with_suffix(".runs"), on_progress=report
        )
    write_json(output, result.as_dict())
    if as_json:
        _print_json(result.as_dict())
    else:
        _print_all(sequence_tables(result))


@app.command(name="bench")
def bench_(
    matrix: Annotated[Path, typer.Argument(help="An atlas, or a matrix as .npy or .json.")],
    test: Annotated[
        str | None,
        typer.Option(help="Tasks to forecast: names or row numbers, such as 3,5,10-19; default: each in turn."),
    ] = None,
    train: Annotated[str | None, typer.Option(help="Tasks to learn from; default: all others.")] = None,
    k: Annotated[str, typer.Option("-k", help="Numbers of probes.")] = "10,30",
    seeds: Annotated[int, typer.Option(min=1, help="Halvings of the examples.")] = 10,
    methods: Annotated[str, typer.Option(help=f"Some of {', '.join(completion.METHODS)}.")] = "mean,additive,knn,"
    "mf,bayesian",
    baseline: Annotated[str, typer.Option(help="Method that the ratios are relative to.")] = "additive",
    without_alike: Annotated[
        float, typer.Option(help="Without --test: share of the other tasks, those most alike, that is left out too.")
    ] = 0.0,
    exact_match: ByAnswers = False,
    as_json: AsJson = False,
) -> None:
    """Compare completion methods on unseen tasks: errors, rank correlation, interval coverage, time.

    Example: forgetcast bench runs.atlas --test task-a,task-b -k 10,30
    """
    if matrix.is_dir():
        values = Atlas.open(matrix).matrix(measure="exact_match" if exact_match else "loss")
    elif exact_match:
        raise ConfigError("--exact-match is for an atlas; a matrix in a file is what it is")
    else:
        values = ForgettingMatrix.load(matrix)
    wanted, ks = {name: _method(name) for name in methods.split(",")}, _numbers(k, "-k")
    tested = _tasks(test, values.tasks) if test is not None else []
    known = _tasks(train, values.tasks) if train is not None else [name for name in values.tasks if name not in tested]
    if both := set(tested).intersection(known):
        raise DataError(f"the task {min(both)!r} is in --train and in --test")
    if tested:
        if without_alike:
            raise DataError("--without-alike is for leaving out each task in turn; give it without --test")
        rows = bench(values.select(known), values.select(tested), wanted, ks=ks, seeds=seeds, baseline=baseline)
    else:
        left = values.select(known)
        with _progress(resumable=False) as report:
            rows = bench_left_out(
                left, wanted, alike=without_alike, ks=ks, seeds=seeds, baseline=baseline, on_progress=report
            )
    if as_json:
        _print_json([_without_nan(row.as_dict()) for row in rows])
    else:
        out.print(bench_table(rows, baseline))


@app.command(name="report")
def report_(
    atlas: AtlasPath,
    output: Annotated[Path, typer.Option("-o", "--output", help="HTML file to write.")],
    forecast: Annotated[list[Path] | None, typer.Option(help="Forecast file; may be given several times.")] = None,
    verification: Annotated[Path | None, typer.Option(help="What `verify` wrote.")] = None,
    sequence: Annotated[Path | None, typer.Option(help="What `sequence` wrote.")] = None,
) -> None:
    """Write one HTML file that says what was measured, what is forecast, and whether replay helped.

    Example: forgetcast report runs.atlas --forecast forecast.parquet -o report.html
    """
    from forgetcast.report import write_report

    opened = Atlas.open(atlas)
    forecasts = [TaskForecast.load(path) for path in forecast or ()]
    for given in forecasts:
        given.check_pool(opened.pool)
    verified = Verification.from_dict(read_json(verification)) if verification is not None else None
    in_sequence = SequenceResult.from_dict(read_json(sequence)) if sequence is not None else None
    write_report(output, opened, forecasts=forecasts, verification=verified, sequence=in_sequence)
    out.print(f"report written to {output}", markup=False)


@app.command(name="demo")
def demo_(
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory for everything it writes.")] = Path(
        "demo-output"
    ),
    full: Annotated[bool, typer.Option("--full", help="40 tasks instead of 16.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run the whole path on the demo model: collect, forecast, replay, verify, report. Resumable.

    Example: forgetcast demo -o demo-output
    """
    from forgetcast.demo.run import FULL, STANDARD, run_demo

    _alone("demo")
    with _progress() as report:
        summary = run_demo(output, FULL if full else STANDARD, on_progress=report)
    if as_json:
        _print_json(summary)
    else:
        _print_all(demo_tables(summary))


def _method(name: str) -> completion.Completion:
    if name not in completion.METHODS:
        raise ConfigError(f"unknown method {name!r}; choose from {', '.join(completion.METHODS)}")
    return completion.METHODS[name]()


def _numbers(text: str, option: str) -> list[int]:
    """Read "3,5,10-12" as [3, 5, 10, 11, 12]."""
    numbers: list[int] = []
    for part in text.split(","):
        ends = part.split("-")
        if not 1 <= len(ends) <= 2 or not all(end.strip().isdigit() for end in ends):
            raise ConfigError(f"{option}: {part!r} is not a number, nor a range such as 10-19")
        numbers.extend(range(int(ends[0]), int(ends[-1]) + 1))
    return numbers


def _tasks(text: str, names: Sequence[str]) -> list[str]:
    """Names of tasks, from names or row numbers and ranges of them."""
    chosen: list[str] = []
    for part in text.split(","):
        if part in names:
            chosen.append(part)
            continue
        rows = _numbers(part, f"the task {part!r} is unknown, and as a row number")
        if max(rows) >= len(names):
            raise ConfigError(f"there is no row {max(rows)}: the matrix has {len(names)} tasks, counted from 0")
        chosen.extend(names[row] for row in rows)
    return list(dict.fromkeys(chosen))


def _without_nan(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(value, float) and np.isnan(value) else value for name, value in figures.items()}


def _order(ids: Any, pool: Pool) -> np.ndarray:
    positions = {id_: i for i, id_ in enumerate(ids)}
    return np.array([positions[id_] for id_ in pool.ids])


def _is_first() -> bool:
    """Whether this is the process that writes and prints, of those that `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


def _alone(command: str) -> None:
    """Refuse several processes where they would do the same work twice."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"`{command}` is one process's work; only `score` and `train` share theirs among several")


def _print_all(parts: Iterable[RenderableType]) -> None:
    for part in parts:
        out.print(part)


def _show(facts: dict[str, Any], as_json: bool, *, title: str) -> None:
    if as_json:
        _print_json(facts)
    else:
        out.print(facts_table(title, facts))


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


@contextmanager
def _progress(*, resumable: bool = True) -> Iterator[OnProgress]:
    """Bar with the time left, on standard error; where that is no terminal, a line now and then instead."""
    if not _is_first():
        yield lambda *_: None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, speed_estimate_period=120) as bar:
        row = bar.add_task("starting", total=None)
        printed = time.monotonic()

        def report(what: str, done: int, total: int) -> None:
            nonlocal printed
            bar.update(row, description=what, completed=done, total=total)
            if not err.is_terminal and time.monotonic() - printed > SECONDS_BETWEEN_LINES:
                printed = time.monotonic()
                left = bar.tasks[row].time_remaining
                guess = f", {timedelta(seconds=round(left))} left" if left is not None else ""
                err.print(f"{done / total:4.0%}{guess}  {what}", markup=False)

        try:
            yield report
        except KeyboardInterrupt:
            if resumable:
                err.print("interrupted; what was finished is kept, and the same command goes on from there")
            raise typer.Exit(130) from None


if __name__ == "__main__":
    main()
