"""Commands on what the base model makes of texts: features of a corpus, and a forecast before anything is run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from forgetcast.cli.app import app, column_names, err, load_base, numbers, progress, require_single_process, show
from forgetcast.cli.options import MEASURE, AsJson, Columns, Format, Loading, ModelName, Output, Strict, loads_a_model
from forgetcast.files import check_destination


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
    from forgetcast.data.reader import Reader, ReadOptions
    from forgetcast.experiments.runs import length_settings
    from forgetcast.lm.features import feature_settings, write_features
    from forgetcast.measure.features import FeatureFolder

    require_single_process("features")
    check_destination(output, folder=True)
    opened = None if atlas is None else Atlas.open(atlas)
    base = load_base(model, loading, opened)
    folder = FeatureFolder.begin(
        output,
        feature_settings(
            base,
            layers=None if layers is None else numbers(layers, "--layers"),
            **({} if opened is None else length_settings(opened, base)),
        ),
    )
    facts: dict[str, Any] = {"layers": list(folder.settings.layers), "numbers": folder.settings.dimensions}
    if folder.settings.projected:
        facts["projected_from"] = len(folder.settings.layers) * folder.settings.width
    with progress() as report:
        if opened is not None:
            done = 0

            def count(finished: int) -> None:
                nonlocal done
                done += finished
                report("features of the pool", done, len(opened.examples))

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
