"""The command that does the paper's analyses: reproduce."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from forgetcast.cli.app import app, err, load_matrix, out, progress, require_single_process
from forgetcast.cli.options import REPORT, MatrixPath, Output
from forgetcast.cli.similarity import (
    BaseOption,
    EmbeddingOption,
    Similarities,
    TaskData,
    TasksColumns,
    TasksFolder,
    TasksFormat,
    gather_side,
)
from forgetcast.errors import ConfigError
from forgetcast.files import check_destination


@app.command(rich_help_panel=REPORT)
def reproduce(
    matrix: MatrixPath,
    output: Output,
    split: Annotated[
        Path | None,
        typer.Option(
            help="Known tasks and those to forecast, in domain and out of it: JSON, or a released split (.pkl); "
            "default: part of the largest family is known, other families are out of domain."
        ),
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Probes of a new task.")] = 30,
    seeds: Annotated[int, typer.Option(min=1, max=10_000, help="Halvings of the examples.")] = 10,
    threshold: Annotated[
        float, typer.Option(help="Nats per token: without exact match, what is forgotten more counts as forgotten.")
    ] = 0.0,
    similarity: Similarities = None,
    tasks: TasksFolder = None,
    format: TasksFormat = None,
    column: TasksColumns = None,
    model: BaseOption = None,
    embedding: EmbeddingOption = None,
    html: Annotated[Path | None, typer.Option(help="HTML page to write too.")] = None,
    json: Annotated[
        Path | None, typer.Option("--result", help="JSON file to write too, for `report --reproduction`.")
    ] = None,
) -> None:
    """Do the paper's analyses of an atlas or a matrix, beside its published numbers, as one Markdown page. Resumable.

    R^2 by rank, correlations, completion of new tasks in and out of domain against all baselines, and the replay that
    an atlas has runs of. What cannot be computed is left out, and the page says why.

    Example: forgetcast reproduce runs.atlas -o reproduction.md --result reproduction.json
    """
    require_single_process("reproduce")
    for path in (output, html, json):
        if path is not None:
            check_destination(path)
    if len({path.resolve() for path in (output, html, json) if path is not None}) < 3 - (html, json).count(None):
        raise ConfigError("--output, --html and --result need different files")
    if html is not None:
        from forgetcast.report import write_reproduction  # before the work: it may not be installed

    from dataclasses import replace

    from forgetcast.atlas import Atlas
    from forgetcast.atlas.released import PICKLES
    from forgetcast.experiments.beside import markdown
    from forgetcast.experiments.reproduce import (
        ReproductionSettings,
        draw_split,
        load_split,
        replay_arms,
    )
    from forgetcast.experiments.reproduce import reproduce as analyse
    from forgetcast.files import atomic_path

    settings = ReproductionSettings(k=k, seeds=seeds, threshold=threshold)
    atlas = None if Path(matrix).is_file() else Atlas.open(matrix)
    values = load_matrix(matrix, exact_match=False)
    if split is None and Path(matrix).suffix in PICKLES:
        split = Path(matrix)
    if split is not None:
        domains = load_split(split, values)
    else:
        domains = draw_split(values, () if atlas is None else atlas.priors)
    side = None
    if similarity is not None:
        side = gather_side(matrix, values, similarity, TaskData(tasks, format, column), model, embedding)
    # The tests of the replay take no time; a fault in an outcome is found before the work that does.
    arms = () if atlas is None else replay_arms(atlas.replays)
    parts_file = output.with_name(f"{output.name}.parts.json")
    check_destination(parts_file)
    with progress() as report:
        found = analyse(
            values,
            domains,
            name=Path(matrix).name,
            flips=atlas.matrix(measure="exact_match") if atlas is not None and atlas.has_answers else None,
            side=side,
            settings=settings,
            parts_file=parts_file,
            on_progress=report,
        )
    found = replace(found, replay=arms)
    with atomic_path(output) as temporary:
        temporary.write_text(markdown(found), encoding="utf-8")
    if html is not None:
        write_reproduction(html, found)
    if json is not None:
        found.save(json)
    parts_file.unlink()
    for reason in found.left_out:
        err.print(f"left out: {reason}", markup=False, soft_wrap=True)
    out.print(f"reproduction written to {output}", markup=False, soft_wrap=True)
