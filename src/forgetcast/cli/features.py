"""Commands on what the base model makes of texts: features of a corpus, and a forecast before anything is run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from forgetcast.cli.app import (
    app,
    column_names,
    err,
    load_base,
    load_data,
    numbers,
    progress,
    require_single_process,
    show,
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
    Output,
    Strict,
    TaskPath,
    loads_a_model,
)
from forgetcast.errors import DataError
from forgetcast.files import check_destination
from forgetcast.progress import counted


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
    level: Annotated[float, typer.Option(help="Level of the intervals.")] = 0.9,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Forecast to write (Parquet).")] = None,
    as_json: AsJson = False,
    *,
    loading: Loading,
) -> None:
    """Forecast what a task would make the model forget, before any fine-tune and any probe.

    The atlas's mean is the forecast, shifted by what the task's text says if texts have helped on left-out tasks of the
    atlas; for this, the data of its tasks are needed. The width is that of the errors on left-out tasks.

    Example: forgetcast preflight ./my-model task.jsonl --atlas runs.atlas --tasks tasks/
    """
    import numpy as np

    from forgetcast.atlas import Atlas
    from forgetcast.completion import Bayesian
    from forgetcast.completion.forecast import TaskForecast
    from forgetcast.completion.preflight import Preflight
    from forgetcast.data import Pool
    from forgetcast.data.reader import data_name
    from forgetcast.experiments.collect import task_files

    require_single_process("preflight")
    if output is not None:
        check_destination(output)
    opened = Atlas.open(atlas)
    new = load_data(task)
    base = load_base(model, loading, opened)
    from forgetcast.lm.features import task_features

    name = data_name(task)
    past = opened.others(name)
    fitted = Bayesian().fit(opened.stored(past))
    paths = {} if tasks is None else task_files(tasks)
    texts = [paths.get(each) for each in past]
    if tasks is not None and not any(texts):
        raise DataError(f"{tasks} has no file of a task of the atlas, such as {past[0]}.jsonl")
    own = task_features(base, new)
    features: np.ndarray | None = None
    if any(texts):
        features = np.full((len(past), len(own)), np.nan)
        with progress(resumable=False) as report:
            for i, path in enumerate(texts):
                if path is not None:
                    features[i] = task_features(base, Pool.load(path))
                report("texts of the atlas's tasks", i + 1, len(past))
    before = Preflight(fitted).fit(features)
    row = before.forecast(own)
    completed = TaskForecast.from_forecast(row, opened, method="preflight", task=name, level=level)
    half = before.mean_half_width(level)
    mean = float(completed.mean.mean())
    if output is not None:
        completed.save(output)
    facts = {
        "task": name,
        "tasks_of_the_atlas": len(past),
        "with_text": sum(path is not None for path in texts),
        "uses_text": before.uses_text_,
        "rmse_atlas_mean": _finite(before.errors_["atlas mean"]),
        "rmse_text": _finite(before.errors_["text"]),
        "level": level,
        "mean_forgetting": mean,
        "mean_lower": _finite(mean - half),
        "mean_upper": _finite(mean + half),
        "example_half_width": float(np.median((completed.upper - completed.lower) / 2)),
        "output": str(output) if output is not None else None,
    }
    show(facts, as_json, title="Before anything is run")
    if as_json:
        return
    if not np.isfinite(half):
        err.print(f"warning: {len(past)} tasks are too few for an interval of the mean at {level:.0%}")
    if not before.uses_text_:
        why = (
            "the data of its tasks are not given (--tasks)"
            if features is None
            else "texts do not help on left-out tasks"
        )
        err.print(f"the forecast is the atlas's mean: {why}")


def _finite(value: float) -> float | None:
    """Return a number for JSON; None where there is none."""
    return value if math.isfinite(value) else None
