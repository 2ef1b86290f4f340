"""Commands on what the base model makes of texts: features of a corpus, and a forecast before anything is run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from forgetcast.cli.app import (
    app,
    check_models,
    column_names,
    err,
    load_base,
    load_tuned,
    numbers,
    progress,
    require_single_process,
    show,
    task_reader,
)
from forgetcast.cli.options import (
    FORECAST,
    MEASURE,
    AsJson,
    AtlasOption,
    Columns,
    Format,
    Loading,
    ModelName,
    NamedColumns,
    Output,
    Strict,
    TaskPath,
    loads_a_model,
)
from forgetcast.errors import ConfigError, DataError
from forgetcast.files import check_destination
from forgetcast.progress import counted
from forgetcast.text import did_you_mean

if TYPE_CHECKING:
    import numpy as np

    from forgetcast.atlas import Atlas


@app.command(rich_help_panel=MEASURE)
@loads_a_model
def features(
    model: ModelName,
    corpus: Annotated[Path, typer.Argument(help="Examples that were never measured, in any format of a pool.")],
    output: Output,
    atlas: Annotated[
        str | None, typer.Option(help="Atlas whose pool gets features too, which forecasts of the corpus need.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers, such as 6,12 (0: the embeddings); default: the middle one and the last.")
    ] = None,
    batch_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens in a batch, with padding.")] = None,
    format: Format = None,
    column: Columns = None,
    strict: Strict = False,
    as_json: AsJson = False,
    *,
    loading: Loading,
) -> None:
    """Compute what forecasts of unmeasured examples need: hidden states and losses by one pass of the base model.

    The corpus is read as a stream, and takes less than 1 KB an example in the folder. An interrupted run continues with
    the same command.

    Example: forgetcast features ./my-model corpus.jsonl --atlas runs.atlas -o corpus.features
    """
    from forgetcast.atlas import Atlas
    from forgetcast.data.build import check_sources
    from forgetcast.data.reader import Reader, ReadOptions
    from forgetcast.measure.features import FeatureFolder
    from forgetcast.measure.scores import length_settings

    require_single_process("features")
    check_destination(output, folder=True)
    check_sources([corpus])
    opened = None if atlas is None else Atlas.open(atlas)
    base = load_base(model, loading, opened)
    from forgetcast.lm.features import feature_settings, write_features

    folder = FeatureFolder.begin(
        output,
        feature_settings(
            base,
            layers=None if layers is None else numbers(layers, "--layers"),
            **({} if opened is None else length_settings(opened.scored_with, base.context)),
        ),
    )
    facts: dict[str, Any] = {"layers": list(folder.settings.layers), "numbers": folder.settings.dimensions}
    if folder.settings.projected:
        facts["projected_from"] = len(folder.settings.layers) * folder.settings.width
    with progress() as report:
        if opened is not None:
            count = counted(report, "features of the pool", len(opened.examples))
            total, without = write_features(
                base, opened.pool, folder, "pool", batch_tokens=batch_tokens, on_progress=count
            )
            folder.finish("pool", {"examples": total, "without": without, "fingerprint": opened.pool_fingerprint})
            facts |= {"pool_examples": total, "pool_without_features": without}
        reader = Reader(
            corpus,
            ReadOptions(format.value if format is not None else None, column_names(column), strict),
            lambda read, size: report("features of the corpus", read, size),
        )
        total, without = write_features(base, reader.unique(), folder, "corpus", batch_tokens=batch_tokens)
        folder.finish("corpus", {"examples": total, "without": without, "read": reader.report.as_dict()})
    err.print(reader.report.line(), markup=False, soft_wrap=True)
    if without:
        err.print(f"warning: {without} example(s) have no features: no target token, or no finite loss")
    size = sum(file.stat().st_size for file in folder.parts("corpus"))
    facts |= {
        "examples": total,
        "without_features": without,
        "duplicates": reader.report.duplicates,
        "bytes_each": round(size / total),
    }
    show(facts | {"output": str(output)}, as_json, title="Features")


@app.command(rich_help_panel=FORECAST)
@loads_a_model
def preflight(
    model: ModelName,
    task: TaskPath,
    atlas: AtlasOption,
    tasks: Annotated[
        Path | None, typer.Option(help="Folder with the data of the atlas's tasks, each named as its row: NAME.jsonl.")
    ] = None,
    pilot: Annotated[
        str | None, typer.Option(help="The model after a share of the fine-tune: its probes are scored, as evidence.")
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(help="With --pilot: the share of the steps, one that the atlas has curves of; default: the only."),
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="With --pilot: number of probes.")] = 30,
    family: Annotated[
        list[str] | None,
        typer.Option(
            help="Tasks of the atlas that are of a kind, as a,b,c; repeatable, the others are another kind. Default: "
            "what their names have before the first slash."
        ),
    ] = None,
    level: Annotated[float, typer.Option(help="Level of the intervals.")] = 0.9,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Forecast to write (Parquet).")] = None,
    format: Format = None,
    column: NamedColumns = None,
    strict: Strict = False,
    as_json: AsJson = False,
    *,
    loading: Loading,
) -> None:
    """Forecast what a task would make the model forget, before any fine-tune and any probe, or from a pilot.

    The atlas's mean is the forecast, shifted by what the task's text says if texts have helped on left-out tasks of the
    atlas; for this, the data of its tasks are needed. With --pilot, it is shifted by what the first part of the
    fine-tune has made the model forget, if that has helped more. The width is that of the errors on left-out tasks: of
    tasks left out alone, and of tasks left out with all of their kind, for a task unlike those of the atlas.

    --format and --column are about the new task and the tasks of the atlas.

    Example: forgetcast preflight ./my-model task.jsonl --atlas runs.atlas --tasks tasks/
    """
    import numpy as np

    from forgetcast.atlas import Atlas
    from forgetcast.completion import Bayesian
    from forgetcast.completion.base import MISFIT_THRESHOLD, SIMILAR_SHARE
    from forgetcast.completion.forecast import TaskForecast
    from forgetcast.completion.preflight import ATLAS_MEAN, FEWEST, Preflight
    from forgetcast.completion.whole import check_level
    from forgetcast.data.reader import data_name
    from forgetcast.experiments.collect import task_files

    require_single_process("preflight")
    check_level(level)
    if output is not None:
        check_destination(output)
    opened = Atlas.open(atlas)
    if pilot is None and share is not None:
        raise ConfigError("--share is that of a --pilot; give the model, too")
    name = data_name(task)
    past = opened.others(name)
    paths = {} if tasks is None else {each: path for each, path in task_files(tasks).items() if each in past}
    if tasks is not None and not paths:
        raise DataError(f"{tasks} has no file of a task of the atlas, such as {past[0]}.jsonl")
    read = task_reader([name, *paths], format, column, strict)
    new, texts = read(task), {each: read(path) for each, path in paths.items()}
    learned = len(texts) > FEWEST  # else nothing can be learned from the others once one is left out
    if texts and not learned:
        err.print(
            f"note: the texts of {len(texts)} tasks are too few to learn from, and are not used: it takes {FEWEST + 1}",
            soft_wrap=True,
        )
    families = _families(past, family)
    begun_at = None if pilot is None else _share(opened, share, past)
    check_models(loading, pilot)
    base = load_base(model, loading, opened)
    from forgetcast.lm.features import task_features

    fitted = Bayesian().fit(opened.stored(past))
    own = task_features(base, new)
    features: np.ndarray | None = None
    if learned:
        features = np.full((len(past), len(own)), np.nan)
        with progress(resumable=False) as report:
            for i, (each, data) in enumerate(texts.items()):
                report(f"texts of the atlas's tasks: {each}", i, len(texts))
                features[past.index(each)] = task_features(base, data)
    del base  # one model in memory at a time
    begun = None if pilot is None or begun_at is None else _begun(opened, begun_at, past, pilot, k, output, loading)
    before = Preflight(fitted).fit(
        features,
        pilot=None if begun is None else begun.known,
        probes=None if begun is None else begun.probes,
        families=families,
    )
    misfit = 1.0 if begun is None else begun.misfit
    unlike = misfit < MISFIT_THRESHOLD
    row = before.forecast(own, pilot=None if begun is None else begun.own, unlike=unlike)
    completed = TaskForecast.from_forecast(
        replace(row, misfit=misfit), opened, method="preflight", task=name, level=level
    )
    halves = {kind: before.mean_half_width(level, unlike=kind) for kind in (False, True)}
    mean = float(completed.mean.mean())
    if output is not None:
        completed.save(output)
    facts = {
        "task": name,
        "tasks_of_the_atlas": len(past),
        "with_text": len(texts),
        "share": None if begun is None else begun.share,
        "with_pilot": None if begun is None else int(np.isfinite(begun.known).all(axis=1).sum()),
        "pilot_probes": None if begun is None else len(begun.own),
        "misfit": None if begun is None else misfit,
        "uses": before.uses_ or ATLAS_MEAN,
        **{f"rmse_{each.replace(' ', '_')}": _finite(error) for each, error in before.errors_.items()},
        **{f"rmse_{each.replace(' ', '_')}_unlike": _finite(error) for each, error in before.unlike_errors_.items()},
        "kinds": before.kinds_ or None,
        "level": level,
        "mean_forgetting": mean,
        "mean_lower": _finite(mean - halves[unlike]),
        "mean_upper": _finite(mean + halves[unlike]),
        "half_width_like": _finite(halves[False]),
        "half_width_unlike": _finite(halves[True]),
        "example_half_width": float(np.median((completed.upper - completed.lower) / 2)),
        "output": str(output) if output is not None else None,
    }
    show(facts, as_json, title="Before anything is run" if begun is None else "From a pilot")
    if as_json:
        return
    if not np.isfinite(halves[unlike]):
        err.print(f"warning: {len(past)} tasks are too few for an interval of the mean at {level:.0%}")
    if before.uses_ is None:
        unknown = all(math.isnan(error) for name, error in before.errors_.items() if name != ATLAS_MEAN)
        why = (
            "the data of its tasks are not given (--tasks)"
            if not texts and begun is None
            else f"once tasks are left out, fewer than {FEWEST} are known to learn from"
            if unknown or (features is None and begun is None)
            else "what is known of the task does not help on left-out tasks"
        )
        err.print(f"the forecast is the atlas's mean: {why}")
    apart = (
        f"with all of their family ({before.kinds_} families)"
        if before.kinds_
        else f"with the {SIMILAR_SHARE:.0%} of the others that are most similar"
    )
    if begun is None and np.isfinite(halves[False]):
        wide = f"it is mean forgetting +- {halves[True]:.3f}" if np.isfinite(halves[True]) else "there is none"
        err.print(
            f"the interval is for a task like those of the atlas; for another one, {wide}, by tasks left out {apart}. "
            "Nothing measured yet says which it is.",
            soft_wrap=True,
        )
    elif begun is not None and unlike:
        err.print(
            f"the {len(begun.own)} probes say that the task is unlike those in the atlas (p = {misfit:.3f}): the "
            f"interval is as wide as the errors on tasks left out {apart}.",
            soft_wrap=True,
        )


def _families(tasks: Sequence[str], named: Sequence[str] | None) -> list[str]:
    """Return the family of each task: the options' number that names it, else what its name has before a slash."""
    from forgetcast.completion.base import family_of

    if not named:
        return [family_of(task) for task in tasks]
    found: dict[str, str] = {}
    for number, text in enumerate(named, 1):
        for task in (part.strip() for part in text.split(",")):
            if task not in tasks:
                raise ConfigError(f"--family {text}: the atlas has no task {task!r}{did_you_mean(task, tasks)}")
            if task in found:
                raise ConfigError(f"--family {text}: the task {task!r} is named twice")
            found[task] = str(number)
    return [found.get(task, "") for task in tasks]


def _share(atlas: Atlas, share: float | None, past: Sequence[str]) -> float:
    """Return the share of a pilot, one of those that the atlas has curves of enough of the tasks at."""
    from forgetcast.completion.preflight import FEWEST

    there = ", ".join(f"{each:g}" for each in atlas.shares)
    if not there:
        raise ConfigError(
            f"the atlas {atlas.path} has no learning curves, which --pilot is compared with; collect them with "
            "checkpoints: [0.25], or the shares that you want, in the configuration of `collect`"
        )
    if share is None and len(atlas.shares) > 1:
        raise ConfigError(f"--pilot needs --share: the atlas has curves at {there}")
    if share is not None and share not in atlas.shares:
        raise ConfigError(f"--share {share:g}: the atlas has curves at {there}")
    found = atlas.shares[0] if share is None else share
    if (count := len(set(atlas.at(found).tasks).intersection(past))) < FEWEST:
        raise DataError(f"{count} tasks of {atlas.path} have a row at {found:g} of their steps: it takes {FEWEST}")
    return found


class _Begun(NamedTuple):
    """A pilot.

    Attributes
    ----------
    share : float
        Of the steps.
    probes : array of int, shape (k,)
        Columns.
    own : array, shape (k,)
        Forgetting of the probes.
    known : array, shape (M, k)
        The same of the atlas's tasks after this share; NaN where it was not measured.
    misfit : float
        p-value of "the task is like those of the atlas after as much of their fine-tunes".
    """

    share: float
    probes: np.ndarray
    own: np.ndarray
    known: np.ndarray
    misfit: float


def _begun(
    atlas: Atlas, share: float, past: Sequence[str], pilot: str, k: int, output: Path | None, loading: Loading
) -> _Begun:
    """Choose probes by the atlas's rows at a share of the steps, and score them with the model of the pilot."""
    import tempfile

    import numpy as np

    from forgetcast.completion import Bayesian
    from forgetcast.completion.probes import choose
    from forgetcast.experiments.until import ProbeScores

    view = atlas.at(share)
    there = [task for task in past if task in view.tasks]
    rows = view.stored(there)
    model = Bayesian().fit(rows)
    probes = np.sort(choose(model, k, np.flatnonzero(~np.isnan(view.nll_before))))
    begun = load_tuned(pilot, loading, view)
    with tempfile.TemporaryDirectory() as folder, progress() as report:
        kept = Path(folder) / "pilot.parquet" if output is None else output.with_name(f"{output.name}.pilot.parquet")
        own = ProbeScores(view, begun, kept, on_progress=report)(probes)
    known = np.full((len(past), k), np.nan)
    known[[past.index(task) for task in there]] = rows[:, probes]
    return _Begun(share, probes, own, known, float(model.predict(probes, own).misfit))


def _finite(value: float) -> float | None:
    """Return a number for JSON; None where there is none."""
    return value if math.isfinite(value) else None
