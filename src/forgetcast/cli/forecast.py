"""Commands that forecast: probes, forecast, bench."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from forgetcast.cli.app import app, err, load_matrix, numbers, out, print_all, print_json, progress, show
from forgetcast.cli.options import (
    FORECAST,
    AllowDifferentTokens,
    AsJson,
    AtlasPath,
    ByAnswers,
    MatrixPath,
    Method,
    Output,
)
from forgetcast.cli.similarity import BaseOption, EmbeddingOption, Similarities, TasksFolder, gather_side
from forgetcast.defaults import MAX_SEED
from forgetcast.errors import ConfigError
from forgetcast.files import check_destination

if TYPE_CHECKING:
    from forgetcast.completion import Completion
    from forgetcast.completion.benchmark import Method as ComparedMethod


@app.command(rich_help_panel=FORECAST)
def probes(
    atlas: AtlasPath,
    output: Output,
    k: Annotated[int, typer.Option("-k", min=1, help="Number of probes.")] = 10,
    at_random: Annotated[bool, typer.Option("--random", help="Sample them uniformly instead.")] = False,
    audit: Annotated[
        int, typer.Option(min=0, help="Number of the k that are sampled at random, as an unbiased sample.")
    ] = 0,
    by_tokens: Annotated[bool, typer.Option(help="Use the number of tokens as the cost of an example.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the sample with --random.")] = 0,
) -> None:
    """Choose the few examples to measure after a new fine-tune.

    Example: forgetcast probes runs.atlas -k 10 -o probes.jsonl
    """
    import numpy as np

    from forgetcast import completion
    from forgetcast.atlas import Atlas
    from forgetcast.completion.probes import choose, random

    check_destination(output)
    opened = Atlas.open(atlas)
    # An example without a base loss cannot be a probe.
    usable = np.flatnonzero(~np.isnan(opened.nll_before))
    if at_random:
        chosen = random(len(opened.examples), k, seed=seed, candidates=usable)
    else:
        cost = np.maximum(opened.before.tokens, 1) if by_tokens else None
        chosen = choose(completion.Bayesian().fit(opened), k, usable, cost, audit=audit)
    opened.subset(opened.examples[i] for i in chosen).save(output)
    out.print(
        f"{k} probes written to {output}; next: forgetcast score TUNED_MODEL {output} -o probe_scores.parquet",
        markup=False,
    )


@app.command(rich_help_panel=FORECAST)
def forecast(
    atlas: AtlasPath,
    scores: Annotated[Path, typer.Option(help="Score file of the probes, by the tuned model.")],
    output: Output,
    method: Annotated[Method, typer.Option(help="Completion method.")] = Method.BAYESIAN,
    level: Annotated[float, typer.Option(help="Level of the intervals.")] = 0.9,
    task: Annotated[str | None, typer.Option(help="Name of the new task, for the report.")] = None,
    allow_different_tokens: AllowDifferentTokens = False,
    as_json: AsJson = False,
) -> None:
    """Forecast the forgetting of every example from the probes' scores.

    Example: forgetcast forecast runs.atlas --scores probe_scores.parquet -o forecast.parquet
    """
    import numpy as np

    from forgetcast.atlas import Atlas
    from forgetcast.completion.base import MISFIT_THRESHOLD
    from forgetcast.completion.forecast import TaskForecast, measured_probes
    from forgetcast.measure import Scores, check_tokens

    check_destination(output)
    opened = Atlas.open(atlas)
    measured = Scores.load(scores)
    columns, forgetting = measured_probes(opened, measured, allow_different_tokens=allow_different_tokens)
    different = check_tokens(opened.baseline, measured, allow_different=True)
    if different is None:
        err.print("warning: it is unknown whether the probes were scored on the base model's tokens")
    known = [name for name in opened.tasks if name != task]
    model = _method(method).fit(opened.stored(known))
    completed = TaskForecast.from_forecast(
        model.predict(columns, forgetting), opened, method=method.value, task=task, level=level
    )
    completed = replace(completed, different_tokens=different)
    completed.save(output)
    worst = np.argsort(-completed.mean, kind="stable")[:10]
    facts = {
        "examples": len(completed.ids),
        "probes": len(columns),
        "different_tokens": different,
        "mean_forgetting": float(completed.mean.mean()),
        "level": level,
        "misfit": completed.misfit,
        "output": str(output),
    }
    rows = [
        {"id": completed.ids[i], "probed": bool(completed.probed[i])}
        | {name: float(getattr(completed, name)[i]) for name in ("mean", "lower", "upper")}
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
    if completed.misfit < MISFIT_THRESHOLD:
        out.print(
            "The probes say that this task is unlike those in the atlas: measure more before you rely on the forecast"
            + ("." if method is Method.AUTO else ", or use the method that forecasts unlike tasks best: --method auto.")
        )


@app.command(rich_help_panel=FORECAST)
def bench(
    matrix: MatrixPath,
    test: Annotated[
        str | None,
        typer.Option(
            help="Tasks to forecast: names or row numbers, such as 3,5,10-19; default: those of a split, else each in "
            "turn."
        ),
    ] = None,
    train: Annotated[str | None, typer.Option(help="Tasks to learn from; default: all others.")] = None,
    k: Annotated[str, typer.Option("-k", help="Numbers of probes.")] = "10,30",
    seeds: Annotated[int, typer.Option(min=1, max=10_000, help="Halvings of the examples.")] = 10,
    methods: Annotated[str, typer.Option(help=f"Some of {', '.join(Method)}.")] = "mean,additive,knn,mf,bayesian",
    baseline: Annotated[str, typer.Option(help="Method that the ratios are relative to.")] = "additive",
    exclude_similar: Annotated[
        float, typer.Option(help="Without --test: fraction of the other tasks, the most similar, that is excluded too.")
    ] = 0.0,
    exact_match: ByAnswers = False,
    similarity: Similarities = None,
    tasks: TasksFolder = None,
    model: BaseOption = None,
    embedding: EmbeddingOption = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="With --similarity: JSON file for `report --similarity`.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare completion methods on unseen tasks: errors, rank correlation, interval coverage, time.

    With --similarity, forecasts from similarities of task and example are compared too, alone and joined with
    completion, and each is set against `bayesian` with as many chosen probes, paired by task.

    Example: forgetcast bench runs.atlas --test task-a,task-b -k 10,30
    """
    from forgetcast.atlas.released import PICKLES, read_split
    from forgetcast.cli.tables import bench_table, study_tables
    from forgetcast.evaluation import bench as compare
    from forgetcast.evaluation import bench_left_out

    values = load_matrix(matrix, exact_match=exact_match)
    wanted: dict[str, ComparedMethod] = {name: _method(name) for name in methods.split(",")}
    ks = numbers(k, "-k")
    if output is not None:
        if similarity is None:
            raise ConfigError("--output is for --similarity; print the figures of the methods with --json")
        check_destination(output)
    side = None
    if similarity is not None:
        from forgetcast.similarity import arms_of

        side = gather_side(matrix, values, similarity, tasks, model, embedding)
        wanted.setdefault("bayesian", _method("bayesian"))
        wanted.update(arms_of(side))
    split = read_split(Path(matrix))[1]["tasks"] if Path(matrix).suffix in PICKLES else []
    tested = _tasks(test, values.tasks) if test is not None else split
    known = _tasks(train, values.tasks) if train is not None else [name for name in values.tasks if name not in tested]
    if both := set(tested).intersection(known):
        raise ConfigError(f"the task {min(both)!r} is in --train and in --test")
    if tested:
        if exclude_similar:
            raise ConfigError("--exclude-similar is for leaving out each task in turn; give it without --test")
        rows = compare(values.select(known), values.select(tested), wanted, ks=ks, seeds=seeds, baseline=baseline)
    else:
        left = values.select(known)
        with progress(resumable=False) as report:
            rows = bench_left_out(
                left, wanted, similar=exclude_similar, ks=ks, seeds=seeds, baseline=baseline, on_progress=report
            )
    if side is not None:
        from forgetcast.similarity import study

        found = study(values, side, rows)
        if output is not None:
            found.save(output)
        if as_json:
            print_json({"methods": [row.as_dict() for row in rows], "similarity": found.as_dict()})
            return
        out.print(bench_table(rows, baseline))
        print_all(study_tables(found))
    elif as_json:
        print_json([row.as_dict() for row in rows])
    else:
        out.print(bench_table(rows, baseline))


def _method(name: str) -> Completion:
    """Make a completion method."""
    from forgetcast import completion

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
