"""Commands that learn from an atlas: analyze, probes, forecast, bench."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.markup import escape
from rich.table import Table

from forgetcast import completion, probes
from forgetcast.atlas import Atlas
from forgetcast.cli.app import AsJson, AtlasPath, ByAnswers, app, numbers, out, print_all, print_json, progress, show
from forgetcast.completion.base import MISFIT_THRESHOLD
from forgetcast.errors import ConfigError, DataError
from forgetcast.evaluation import bench, bench_left_out
from forgetcast.forecast import TaskForecast, measured_probes
from forgetcast.matrix import ForgettingMatrix
from forgetcast.scores import Scores
from forgetcast.structure import analyze
from forgetcast.tables import bench_table, structure_tables


@app.command(name="analyze")
def analyze_(atlas: AtlasPath, exact_match: ByAnswers = False, as_json: AsJson = False) -> None:
    """Say how nearly low-rank the forgetting is, and what its components load on.

    Example: forgetcast analyze runs.atlas
    """
    structure = analyze(Atlas.open(atlas).matrix(measure="exact_match" if exact_match else "loss"))
    if as_json:
        print_json(structure.as_dict())
        return
    print_all(structure_tables(structure))


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
    forecast = TaskForecast.from_forecast(
        model.predict(columns, forgetting), opened, method=method, task=task, level=level
    )
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
        print_json(facts | {"most_at_risk": rows})
        return
    show(facts, False, title="Forecast")
    table = Table("example", "forecast", f"{level:.0%} interval", title="Most at risk (nats per token)")
    for row in rows:
        interval = "measured" if row["probed"] else f"{row['lower']:.3f} to {row['upper']:.3f}"
        table.add_row(escape(row["id"]), f"{row['mean']:.3f}", interval)
    out.print(table)
    if forecast.misfit < MISFIT_THRESHOLD:
        out.print(
            "The probes say that this task is unlike those in the atlas: measure more of them before you rely on it"
            + (", or use --method auto, which takes what forecasts unlike tasks best." if method != "auto" else ".")
        )


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
    exclude_similar: Annotated[
        float, typer.Option(help="Without --test: share of the other tasks, the most similar ones, to leave out too.")
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
    wanted, ks = {name: _method(name) for name in methods.split(",")}, numbers(k, "-k")
    tested = _tasks(test, values.tasks) if test is not None else []
    known = _tasks(train, values.tasks) if train is not None else [name for name in values.tasks if name not in tested]
    if both := set(tested).intersection(known):
        raise DataError(f"the task {min(both)!r} is in --train and in --test")
    if tested:
        if exclude_similar:
            raise DataError("--exclude-similar is for leaving out each task in turn; give it without --test")
        rows = bench(values.select(known), values.select(tested), wanted, ks=ks, seeds=seeds, baseline=baseline)
    else:
        left = values.select(known)
        with progress(resumable=False) as report:
            rows = bench_left_out(
                left, wanted, similar=exclude_similar, ks=ks, seeds=seeds, baseline=baseline, on_progress=report
            )
    if as_json:
        print_json([_without_nan(row.as_dict()) for row in rows])
    else:
        out.print(bench_table(rows, baseline))


def _method(name: str) -> completion.Completion:
    if name not in completion.METHODS:
        raise ConfigError(f"unknown method {name!r}; choose from {', '.join(completion.METHODS)}")
    return completion.METHODS[name]()


def _tasks(text: str, names: Sequence[str]) -> list[str]:
    """Names of tasks, from names or row numbers and ranges of them."""
    chosen: list[str] = []
    for part in text.split(","):
        if part in names:
            chosen.append(part)
            continue
        rows = numbers(part, f"the task {part!r} is unknown, and as a row number")
        if max(rows) >= len(names):
            raise ConfigError(f"there is no row {max(rows)}: the matrix has {len(names)} tasks, counted from 0")
        chosen.extend(names[row] for row in rows)
    return list(dict.fromkeys(chosen))


def _without_nan(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(value, float) and np.isnan(value) else value for name, value in figures.items()}
