"""Commands that make an atlas and look at it: collect, analyze."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from forgetcast.cli.app import app, load_data, load_tuner, out, print_all, print_json, progress, require_single_process
from forgetcast.cli.options import (
    ATLAS,
    AsJson,
    AtlasPath,
    ByAnswers,
    Columns,
    Format,
    Loading,
    Strict,
    loads_a_model,
)
from forgetcast.files import check_destination


@app.command(rich_help_panel=ATLAS)
@loads_a_model
def collect(
    config: Annotated[Path, typer.Argument(help="YAML file: model, pool, tasks, atlas, recipe.")],
    format: Format = None,
    column: Columns = None,
    strict: Strict = False,
    *,
    loading: Loading,
) -> None:
    """Fine-tune on every task, score the pool after each, and store the forgetting in an atlas. Resumable.

    --format and --column are about the tasks.

    Example: forgetcast collect config.yaml
    """
    from forgetcast.experiments.collect import CollectConfig, collection_units, prepare_atlas
    from forgetcast.experiments.collect import collect as collect_rows
    from forgetcast.experiments.runs import Stages

    require_single_process("collect")
    settings = CollectConfig.load(config)
    check_destination(settings.atlas, folder=True)
    pool = load_data(settings.pool, strict=strict)
    tasks = settings.load_tasks(lambda path: load_data(path, format, column, strict))
    tuner = load_tuner(settings.model, loading, rendering=settings.rendering)
    with progress() as report:
        stages, answered = Stages(report), settings.exact_match
        atlas = prepare_atlas(
            settings.atlas,
            tuner.base,
            pool,
            settings.recipe,
            exact_match=answered,
            max_new_tokens=settings.max_new_tokens,
            on_progress=stages.stage(later=collection_units(len(tasks), pool, settings.recipe, answered=answered)),
        )
        collect_rows(tuner, atlas, settings.recipe, tasks, on_progress=stages.stage(later=0))
    out.print(f"{atlas.path}: {len(atlas.tasks)} tasks x {len(pool)} examples", markup=False)


@app.command(rich_help_panel=ATLAS)
def analyze(atlas: AtlasPath, exact_match: ByAnswers = False, as_json: AsJson = False) -> None:
    """Show how nearly low-rank the forgetting is, and what its components load on.

    Example: forgetcast analyze runs.atlas
    """
    from forgetcast.atlas import Atlas
    from forgetcast.cli.tables import structure_tables
    from forgetcast.completion.structure import analyze as analyze_matrix

    structure = analyze_matrix(Atlas.open(atlas).matrix(measure="exact_match" if exact_match else "loss"))
    if as_json:
        print_json(structure.as_dict())
        return
    print_all(structure_tables(structure))
