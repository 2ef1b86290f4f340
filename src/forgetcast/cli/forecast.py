"""Commands that forecast: probes, forecast, bench."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forgetcast.cli.app import (
    app,
    check_models,
    err,
    load_matrix,
    load_tuned,
    numbers,
    out,
    print_all,
    print_json,
    progress,
    require_single_process,
    show,
)
from forgetcast.cli.options import (
    FORECAST,
    AllowDifferentTokens,
    AsJson,
    AtlasPath,
    ByAnswers,
    Loading,
    MatrixPath,
    Method,
    Output,
    Seed,
    loads_a_model,
)
from forgetcast.cli.similarity import (
    BaseOption,
    EmbeddingOption,
    Similarities,
    TaskData,
    TasksColumns,
    TasksFolder,
    TasksFormat,
    TunedOption,
    gather_side,
)
from forgetcast.defaults import MAX_SEED
from forgetcast.errors import ConfigError, DataError
from forgetcast.files import check_destination
from forgetcast.progress import OnProgress
from forgetcast.text import did_you_mean

if TYPE_CHECKING:
    import numpy as np

    from forgetcast.atlas import Atlas, ForgettingMatrix
    from forgetcast.completion import Completion, Forecast
    from forgetcast.completion.benchmark import Method as ComparedMethod
    from forgetcast.completion.forecast import TaskForecast
    from forgetcast.experiments.until import Stopped
    from forgetcast.measure import Scores


@app.command(rich_help_panel=FORECAST)
def probes(
    atlas: AtlasPath,
    output: Output,
    k: Annotated[int, typer.Option("-k", min=1, help="Number of probes.")] = 10,
    at_random: Annotated[bool, typer.Option("--random", help="Sample them uniformly instead.")] = False,
    audit: Annotated[
        int, typer.Option(min=0, help="Number of the k that are random, the last ones: for guaranteed intervals.")
    ] = 0,
    by_tokens: Annotated[bool, typer.Option(help="Use the number of tokens as the cost of an example.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the random probes.")] = 0,
    exact_match: ByAnswers = False,
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
    flips = opened.matrix(measure="exact_match") if exact_match else None
    # An example without a base loss, or, by exact match, without a right answer, cannot be a probe.
    usable = np.flatnonzero(~np.isnan(opened.nll_before) if flips is None else opened.right_before)
    if audit > k:
        raise ConfigError(f"--audit {audit}: of {k} probes (-k), not more than {k} can be random")
    if at_random:
        chosen = random(len(opened.examples), k, seed=seed, candidates=usable)
    else:
        cost = np.maximum(opened.before.tokens, 1) if by_tokens else None
        if flips is None:
            chosen = choose(completion.Bayesian().fit(opened), k, usable, cost, audit=audit, seed=seed)
        else:
            fitted = completion.Bayesian().fit(flips)
            chosen = usable[choose(fitted, k, None, None if cost is None else cost[usable], audit=audit, seed=seed)]
    opened.subset(opened.examples[i] for i in chosen).save(output)
    random_ones = k if at_random else audit
    answers = " --exact-match" if exact_match else ""
    out.print(
        f"{k} probes written to {output}; next: forgetcast score TUNED_MODEL {output}{answers} -o probe_scores.parquet"
        + (
            f", then forgetcast forecast {atlas}{answers} --scores probe_scores.parquet --audit {random_ones}"
            if random_ones
            else ""
        ),
        markup=False,
    )


@app.command(rich_help_panel=FORECAST)
@loads_a_model
def forecast(
    atlas: AtlasPath,
    output: Output,
    scores: Annotated[Path | None, typer.Option(help="Score file of the probes, by the tuned model.")] = None,
    model: Annotated[
        str | None, typer.Option(help="The tuned model instead: its probes are chosen and scored here.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="With --model: number of probes.")] = 30,
    audit: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Number of the probes that are random, the last ones. Default with --model: five of six; with "
            "--scores: what the file says, else 0.",
        ),
    ] = None,
    until_width: Annotated[
        str | None,
        typer.Option(
            help="With --model: measure more random probes until the guaranteed interval is so wide (upper minus lower "
            "end, nats per token): 0.02 for the mean, worst_tenth:0.1 for the worst tenth."
        ),
    ] = None,
    most: Annotated[int | None, typer.Option(min=1, help="With --until-width: most examples to measure.")] = None,
    method: Annotated[Method, typer.Option(help="Completion method.")] = Method.BAYESIAN,
    level: Annotated[float, typer.Option(help="Level of the intervals.")] = 0.9,
    threshold: Annotated[
        float, typer.Option(help="Count the examples with more forgetting than this, nats per token.")
    ] = 0.1,
    task: Annotated[str | None, typer.Option(help="Name of the new task, for the report.")] = None,
    seed: Seed = 0,
    corpus: Annotated[
        Path | None,
        typer.Option(help="Features of a corpus (see `forgetcast features`) to forecast too, into a second file."),
    ] = None,
    allow_different_tokens: AllowDifferentTokens = False,
    exact_match: ByAnswers = False,
    as_json: AsJson = False,
    *,
    loading: Loading,
) -> None:
    """Forecast what a tuned model has forgotten, from a few probes: each example, the whole pool, and its worst tenth.

    With --model, the probes are chosen, scored and kept in OUTPUT.scores.parquet; an interrupted run continues with the
    same command. Intervals of the whole are of two kinds. Model-based ones are narrow and hold for tasks like those of
    the atlas; guaranteed ones follow from the random probes and hold for any task.

    Example: forgetcast forecast runs.atlas --model ./tuned -k 30 -o forecast.parquet
    """
    import numpy as np

    from forgetcast.atlas import Atlas
    from forgetcast.cli.tables import priors_line
    from forgetcast.completion.base import MISFIT_THRESHOLD
    from forgetcast.completion.forecast import TaskForecast, answered_probes, measured_probes
    from forgetcast.completion.influence import mean_per_token
    from forgetcast.completion.whole import FEW_TASKS, check_level, check_threshold
    from forgetcast.experiments.until import Stopped, Width, describe
    from forgetcast.measure import Scores, check_tokens

    check_destination(output)
    if (scores is None) == (model is None):
        raise ConfigError("give either --scores, with the probes' scores, or --model, to score them here")
    check_level(level)
    check_threshold(threshold)
    width = Width.parse(until_width) if until_width is not None else None
    if scores is not None and (width is not None or most is not None):
        raise ConfigError("--until-width and --most need --model, because they measure")
    if most is not None and (width is None or most < k):
        raise ConfigError("--most limits --until-width, and may not be less than the probes of -k")
    if exact_match and corpus is not None:
        raise ConfigError("--exact-match is about the pool's answers; leave --corpus out")
    if exact_match and width is not None and width.figure != "mean":
        raise ConfigError(
            "by --exact-match there is no worst tenth; give --until-width a width of the mean, such as 0.1"
        )
    opened = Atlas.open(atlas)
    check_models(loading, model)
    known = list(opened.others(task))
    flips = opened.matrix(known, measure="exact_match") if exact_match else None
    if flips is not None:
        # A row without answers, such as one that was scored elsewhere, says nothing here.
        answered = np.flatnonzero(flips.observed.any(axis=1))
        known = [flips.tasks[i] for i in answered.tolist()]
        if not known:
            raise DataError(f"no task of the atlas {atlas} has answers, so that none can be forecast")
        flips = flips.select(known)
    usable = np.flatnonzero(~np.isnan(opened.nll_before)) if flips is None else np.arange(len(flips.examples))
    fitted = _method(method).fit(opened.stored(known) if flips is None else flips)
    if model is not None:
        chosen = None if audit is None else k - audit
        if chosen is not None and chosen < 0:
            raise ConfigError(f"--audit {audit}: of {k} probes (-k), not more than {k} can be random")
        with progress() as report:
            stopped, measured = _measure(
                opened,
                fitted,
                usable,
                model,
                output.with_name(f"{output.name}.scores.parquet"),
                loading,
                report,
                flips,
                allow_different_tokens=allow_different_tokens,
                k=k,
                chosen=chosen,
                width=width,
                level=level,
                most=most,
                seed=seed,
            )
    else:
        assert scores is not None
        measured = Scores.load(scores)
        columns, forgetting = (
            measured_probes(opened, measured, allow_different_tokens=allow_different_tokens)
            if flips is None
            else answered_probes(opened, flips, measured, allow_different_tokens=allow_different_tokens)
        )
        random, drawn_by = _random_probes(fitted, measured, columns, audit, scores)
        stopped = Stopped(
            fitted.predict(columns, forgetting, audit=random, weights=drawn_by, population=usable), level=level
        )
    different = check_tokens(opened.baseline, measured, allow_different=True)
    if different is None:
        err.print("warning: it is unknown whether the probes were scored on the base model's tokens")
    completed = TaskForecast.from_forecast(
        stopped.forecast,
        opened if flips is None else flips,
        method=method.value,
        task=task,
        level=level,
        threshold=threshold,
        measure="loss" if flips is None else "exact_match",
    )
    priors = len(set(opened.priors).intersection(known))
    completed = replace(completed, different_tokens=different, rows=len(known), prior_rows=priors)
    completed.save(output)
    beyond = {} if corpus is None else _of_corpus(opened, corpus, fitted, stopped.forecast, completed, output)
    worst = np.argsort(-completed.mean, kind="stable")[:10]
    tokens = opened.before.tokens
    facts = {
        "measure": completed.measure,
        "examples": len(completed.ids),
        "probes": len(completed.probes),
        "random_probes": completed.audit,
        "different_tokens": different,
        "rows": len(known),
        "prior_rows": priors,
        "mean_forgetting": float(completed.mean.mean()),
        "mean_weighted_by_tokens": None if flips is not None else mean_per_token(completed.mean[None], tokens),
        "level": level,
        "misfit": completed.misfit,
        "calibration_tasks": completed.calibration_tasks,
        "output": str(output),
        **beyond,
    }
    rows = [
        {"id": completed.ids[i], "probed": bool(completed.probed[i])}
        | {name: float(getattr(completed, name)[i]) for name in ("mean", "lower", "upper")}
        for i in worst
    ]
    said = [] if width is None else list(describe(stopped, width, len(usable)))
    if as_json:
        until = None
        if width is not None:
            until = {
                "figure": width.figure,
                "width": width.width,
                "interval": stopped.interval,
                "everything": stopped.everything,
                "looks": [asdict(look) for look in stopped.looks],
                "said": said,
            }
        whole = [each.model_dump() for each in completed.whole]
        print_json(facts | {"threshold": threshold, "whole": whole, "until": until, "most_at_risk": rows})
        return
    from forgetcast.cli.tables import risk_table, whole_table

    show(facts | {"rows": None, "prior_rows": None}, False, title="Forecast")
    if priors:
        out.print(priors_line(priors, len(known)))
    out.print(whole_table(completed))
    for sentence in said:
        out.print(sentence)
    if stopped.interval is not None and width is not None:
        value, lower, upper = stopped.interval
        out.print(
            f"{width.figure.replace('_', ' ')}: {value:.4f}, between {lower:.4f} and {upper:.4f} with {level:.0%} "
            "confidence over all looks together"
        )
    if (calibrated := completed.calibration_tasks or 0) < FEW_TASKS and not completed.probed.all():
        out.print(
            f"Only {calibrated} tasks could be left out to calibrate the model-based intervals: their widths are "
            "mostly Student's t." + " Rely on the guaranteed ones." * bool(completed.audit)
        )
    if not completed.audit:
        out.print(
            "No probe is known to be random, so that there are no guaranteed intervals: draw random ones with "
            "`probes --audit`, and give the same number here."
        )
    out.print(risk_table(completed, rows, opened.pool))
    if completed.misfit < MISFIT_THRESHOLD:
        out.print(completed.likeness())


def _measure(
    atlas: Atlas,
    fitted: Completion,
    population: np.ndarray,
    model: str,
    path: Path,
    loading: Loading,
    report: OnProgress,
    flips: ForgettingMatrix | None,
    *,
    allow_different_tokens: bool,
    **settings: Any,
) -> tuple[Stopped, Scores]:
    """Load a tuned model and measure its probes."""
    from forgetcast.completion.probes import weights
    from forgetcast.experiments.until import ProbeScores, measure_until

    require_single_process("forecast")
    measure = ProbeScores(
        atlas,
        load_tuned(model, loading, atlas),
        path,
        flips=flips,
        allow_different_tokens=allow_different_tokens,
        on_progress=report,
    )
    stopped = measure_until(fitted, measure, population, **settings)
    return stopped, measure.keep(stopped.forecast.probes, stopped.forecast.audit, weights(fitted))


def _random_probes(
    fitted: Completion, scores: Scores, columns: np.ndarray, audit: int | None, path: Path
) -> tuple[int, np.ndarray | None]:
    """Return how many of the last probes were drawn at random, and by which weights of all examples; None: equal."""
    import numpy as np

    from forgetcast.completion.probes import weights

    stored = scores.metadata.get("audit_weights")
    if stored is None:
        random = int(scores.metadata.get("audit", 0)) if audit is None else audit
        if random > len(columns):
            raise ConfigError(f"--audit {random}: {path} has only {len(columns)} probes")
        return random, None
    if audit not in (None, len(stored)):
        raise ConfigError(f"--audit {audit}: {path} says that its last {len(stored)} probes were drawn at random")
    drawn_by = weights(fitted)
    if len(stored) <= len(columns) and np.allclose(drawn_by[columns[len(columns) - len(stored) :]], stored, rtol=1e-4):
        return len(stored), drawn_by
    err.print(
        f"{path}: its random probes were drawn by what another state of the atlas, or another method, was unsure of; "
        "so no guaranteed intervals follow from them here"
    )
    return 0, None


def _of_corpus(
    atlas: Atlas,
    path: Path,
    model: Completion,
    forecast: Forecast,
    completed: TaskForecast,
    output: Path,
) -> dict[str, Any]:
    """Forecast a corpus into a file beside that of the pool, and return what there is to say."""
    import numpy as np

    from forgetcast.completion.forecast import TaskForecast
    from forgetcast.completion.unmeasured import Unmeasured
    from forgetcast.data.pool import fingerprint_of
    from forgetcast.measure.features import FeatureFolder

    folder = FeatureFolder(path)
    folder.check_model(atlas.model_hash)
    folder.require("corpus")
    extended = Unmeasured(model).fit(folder.all("pool"))
    row = extended.predict(forecast.probes, forecast.mean[forecast.probes], folder.read("corpus"))
    known = np.flatnonzero(np.isfinite(row.mean))
    if not len(known):
        raise DataError(f"{path}: no example of the corpus has features")
    parts = [(part.ids, part.contents.to_pylist()) for part in folder.read("corpus")]
    ids = [id_ for part, _ in parts for id_ in part]
    contents = [content for _, part in parts for content in part]
    lower, upper = row.interval(completed.level)
    target = output.with_suffix(".corpus.parquet")
    TaskForecast(
        [ids[i] for i in known.tolist()],
        row.mean[known],
        row.std[known],
        lower[known],
        upper[known],
        np.zeros(len(known), dtype=bool),
        completed.level,
        completed.misfit,
        completed.method,
        fingerprint_of(contents[i] for i in known.tolist()),
        completed.task,
    ).save(target)
    return {
        "corpus_examples": len(known),
        "corpus_without_features": len(ids) - len(known),
        "corpus_mean_forgetting": float(row.mean[known].mean()),
        "corpus_explained": float(extended.transfer_.explained(completed.mean[:, None])[0]),
        "corpus_output": str(target),
    }


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
    format: TasksFormat = None,
    column: TasksColumns = None,
    model: BaseOption = None,
    embedding: EmbeddingOption = None,
    tuned: TunedOption = None,
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
    from forgetcast.cli.tables import bench_table, robust_bench_table, study_tables
    from forgetcast.evaluation import bench as compare
    from forgetcast.evaluation import bench_left_out

    values = load_matrix(matrix, exact_match=exact_match)
    if not exact_match and not Path(matrix).is_file():
        _say_few_tokens(matrix, values)
    wanted: dict[str, ComparedMethod] = {name: _method(name) for name in methods.split(",")}
    ks = numbers(k, "-k")
    if output is not None:
        if similarity is None:
            raise ConfigError("--output is for --similarity; print the figures of the methods with --json")
        check_destination(output)
    side = None
    if similarity is not None:
        from forgetcast.similarity import arms_of

        side = gather_side(matrix, values, similarity, TaskData(tasks, format, column), model, embedding, tuned)
        wanted.setdefault("bayesian", _method("bayesian"))
        wanted.update(arms_of(side))
    split = read_split(Path(matrix))[1]["tasks"] if Path(matrix).suffix in PICKLES else []
    tested = _tasks(test, values.tasks) if test is not None else split
    group_of = dict(zip(values.tasks, values.groups, strict=True))
    apart = {group_of[name] for name in tested}
    known = (
        _tasks(train, values.tasks)
        if train is not None
        else [name for name, group in group_of.items() if group not in apart]
    )
    if both := set(tested).intersection(known):
        raise ConfigError(f"the task {min(both)!r} is in --train and in --test")
    if same := apart.intersection(group_of[name] for name in known):
        raise ConfigError(f"rows of the task {min(same)!r} are in --train and in --test; leave out all of them in one")
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
        print_all([bench_table(rows, baseline), robust_bench_table(rows, baseline), *study_tables(found)])
    elif as_json:
        print_json([row.as_dict() for row in rows])
    else:
        print_all([bench_table(rows, baseline), robust_bench_table(rows, baseline)])


def _say_few_tokens(atlas: str, values: ForgettingMatrix) -> None:
    """Say on standard error what examples of few target tokens move."""
    from forgetcast.atlas import Atlas
    from forgetcast.completion.influence import few_tokens

    if (found := few_tokens(values.values, Atlas.open(atlas).before.tokens)) is not None:
        err.print(f"note: {found.sentence(len(values.examples))}", soft_wrap=True)


def _method(name: str) -> Completion:
    """Make a completion method."""
    from forgetcast import completion

    if name not in completion.METHODS:
        hint = did_you_mean(name, completion.METHODS)
        raise ConfigError(f"unknown method {name!r}; choose from {', '.join(completion.METHODS)}{hint}")
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
