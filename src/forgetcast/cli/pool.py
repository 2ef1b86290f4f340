"""The command that makes a pool: pool."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from forgetcast.cli.app import app, column_names, columns_of, err, naming_columns, out, print_json, progress
from forgetcast.cli.options import MEASURE, AsJson, By, Format, NamedColumns, Output, Seed, Strict
from forgetcast.errors import ConfigError, DataError
from forgetcast.files import check_destination
from forgetcast.model_files import check_name, where_on_hub


@app.command(rich_help_panel=MEASURE)
def pool(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Data files, text files, folders of either, saved data sets, hf://name:configuration@split."
        ),
    ],
    output: Output,
    count: Annotated[int, typer.Option("-n", min=1, help="Number of examples.")] = 2000,
    by: Annotated[By | None, typer.Option(help="Take equally many of each source; default: all texts alike.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Split longer texts, at paragraphs or lines.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Model whose tokenizer counts them; default: an estimate.")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Read only the first rows of each source.")] = None,
    seed: Seed = 0,
    format: Format = None,
    column: NamedColumns = None,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Make a pool from files, folders of text or code, and data sets: split, drop duplicates, sample.

    The same sources and seed give the same pool. A folder of data files is read row by row; in any other folder, each
    file is a text.

    Example: forgetcast pool wiki.parquet src/ hf://allenai/c4:en@validation -n 2000 --by source --max-tokens 512 -o
    pool.jsonl
    """
    from forgetcast.data.build import Splitter, build_pool, check_sources, labels
    from forgetcast.data.reader import ReadOptions

    if tokenizer is not None and max_tokens is None:
        raise ConfigError("--tokenizer counts the tokens of --max-tokens; give both")
    check_destination(output)
    check_sources(sources)
    shared, own = columns_of(column, labels(sources), "source")
    options = ReadOptions(
        format.value if format is not None else None,
        column_names(shared),
        strict,
        {name: column_names(of_source) for name, of_source in own.items()},
    )
    splitter = Splitter(max_tokens, _tokenizer(tokenizer)) if max_tokens is not None else None
    with naming_columns("source", len(own)), progress(resumable=False) as report:
        made, done = build_pool(
            sources,
            count,
            equal_shares=by is By.SOURCE,
            splitter=splitter,
            seed=seed,
            options=options,
            rows=rows,
            on_progress=lambda source, read, total: report(f"reading {source}", read, total),
        )
    made.save(output)
    for source in done.sources:
        err.print(source.line(), markup=False, soft_wrap=True)
    if as_json:
        print_json(done.as_dict() | {"examples": len(made), "fingerprint": made.fingerprint, "output": str(output)})
    else:
        only = f" (there are no more than {len(made):,})" if len(made) < count else ""
        out.print(f"{output}: {done.line()}{only}", markup=False, soft_wrap=True)


def _tokenizer(model: str | None) -> Any:
    """Load a tokenizer, once its name is checked: Transformers takes seconds."""
    if model is None:
        return None
    if not Path(model).is_dir():
        check_name(model)
    err.print("loading Transformers")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, **where_on_hub(model, {}))
    except (OSError, ValueError) as error:
        raise DataError(f"{model} gives no tokenizer: {(str(error).splitlines() or [''])[0]}") from None
