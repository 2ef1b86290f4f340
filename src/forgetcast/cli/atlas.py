"""Commands that make an atlas and look at it: collect, analyze."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forgetcast.cli.app import (
    app,
    check_models,
    err,
    import_torch,
    load_data,
    load_matrix,
    load_tasks,
    out,
    print_all,
    print_json,
    progress,
    require_single_process,
)
from forgetcast.cli.options import (
    ATLAS,
    AsJson,
    ByAnswers,
    Engine,
    Format,
    Loading,
    MatrixPath,
    NamedColumns,
    Strict,
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
from forgetcast.errors import ConfigError, IncompleteError
from forgetcast.files import check_destination
from forgetcast.results import plain

if TYPE_CHECKING:
    from forgetcast.data import Pool
    from forgetcast.experiments import CollectConfig
    from forgetcast.lm import LanguageModel


@app.command(rich_help_panel=ATLAS)
@loads_a_model
def collect(
    config: Annotated[Path, typer.Argument(help="YAML file: model, pool, tasks, atlas, recipe.")],
    format: Format = None,
    column: NamedColumns = None,
    strict: Strict = False,
    only: Annotated[
        list[str] | None, typer.Option(help="Task or row to make, of those in the configuration; repeatable.")
    ] = None,
    engine: Annotated[Engine, typer.Option(help="Make the rows in this process, or by Ray, a task for each.")] = (
        Engine.LOCAL
    ),
    address: Annotated[str | None, typer.Option(help="Ray: an existing cluster; default: this machine.")] = None,
    gpus: Annotated[float, typer.Option(min=0, help="Ray: GPUs that a row needs.")] = 0.0,
    memory: Annotated[float, typer.Option(min=0, help="Ray: memory that a row needs, in GiB.")] = 0.0,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Time a few steps and scores, say what would be done, and store nothing."),
    ] = False,
    as_json: AsJson = False,
    *,
    loading: Loading,
) -> None:
    """Fine-tune on every task, score the pool after each, and store the forgetting in an atlas. Resumable.

    --format and --column are about the tasks. Exit code 1: rows failed; each is named, and the others were made.

    Example: forgetcast collect config.yaml --dry-run

    Example: forgetcast collect config.yaml
    """
    from forgetcast.atlas import Atlas
    from forgetcast.atlas.index import check_writable
    from forgetcast.cli.tables import runs_table
    from forgetcast.experiments.collect import FEWEST_FOR_A_SHARE, CollectConfig, run_sweep
    from forgetcast.experiments.on_ray import run_on_ray

    require_single_process("collect")
    if engine is Engine.LOCAL and (address is not None or gpus or memory):
        raise ConfigError("--address, --gpus and --memory are for --engine ray")
    if dry_run and engine is Engine.RAY:
        raise ConfigError("--dry-run plans and times one process; leave out --engine ray")
    settings = CollectConfig.load(config)
    check_writable(settings.atlas)
    if settings.keep_models is not None:
        check_destination(settings.keep_models, folder=True)
    check_models(loading, settings.model)
    pool = load_data(settings.pool, strict=strict)
    tasks = load_tasks(settings.tasks, format, column, strict)
    if settings.score_share < 1 and len(tasks) < FEWEST_FOR_A_SHARE:
        err.print(
            f"warning: score_share {settings.score_share:g} with {len(tasks)} tasks: with fewer than "
            f"{FEWEST_FOR_A_SHARE}, forecasts may be worse than from no history (docs/how-to/cluster.md)",
            markup=False,
            soft_wrap=True,
        )
    rows = settings.sweep(only or ()).rows(tasks, settings.recipe.seed)  # an unknown name is an error at once
    import_torch()
    from forgetcast.lm import load

    if dry_run:
        _dry_run(settings, pool, tasks, partial(load, **loading.arguments()), only or (), as_json)
        return
    failures: dict[str, str] = {}
    figures: dict[str, dict[str, float]] = {}
    with progress(above=lambda: runs_table(figures) if figures else "") as report:
        try:
            if engine is Engine.RAY:
                resources: dict[str, Any] = {"address": address, "gpus": gpus, "memory": memory}
                run_on_ray(settings, pool, tasks, loading.arguments(), **resources, only=only or (), on_progress=report)
            else:
                run_sweep(
                    settings,
                    pool,
                    tasks,
                    partial(load, **loading.arguments()),
                    only=only or (),
                    on_progress=report,
                    on_figures=lambda name, found: figures.setdefault(name, {}).update(found),
                )
        except IncompleteError as error:
            failures = error.failures
    atlas = Atlas.open(settings.atlas)
    if as_json:
        facts = {"atlas": str(atlas.path), "tasks": list(atlas.tasks), "examples": len(pool)}
        print_json(facts | {"failures": failures})
    else:
        out.print(f"{atlas.path}: {len(atlas.tasks)} tasks x {len(pool)} examples", markup=False)
    if settings.keep_models is not None:
        _say_kept(settings.keep_models, [row.name for row in rows if row.name in atlas])
    for name, reason in failures.items():
        err.print(f"failed: {name}: {reason}", markup=False, soft_wrap=True)
    if failures:
        raise typer.Exit(1)


def _say_kept(folder: Path, rows: list[str]) -> None:
    """Say where the models of rows are, and which rows were made without keeping theirs."""
    from forgetcast.experiments.kept import KeptModels

    lacking = KeptModels(folder).lacking(rows)
    err.print(f"models kept in {folder}: {len(rows) - len(lacking)}", markup=False, soft_wrap=True)
    if lacking:
        names = ", ".join(lacking[:5]) + (f" and {len(lacking) - 5} more" if len(lacking) > 5 else "")
        err.print(
            f"note: rows whose models are not there, because they were stored without keeping them: {len(lacking)} "
            f"({names}); drop such a row with `forgetcast atlas drop`, and it is made again",
            markup=False,
            soft_wrap=True,
        )


def _dry_run(
    settings: CollectConfig,
    pool: Pool,
    tasks: dict[str, Pool],
    load: Callable[[str | Path], LanguageModel],
    only: list[str] | tuple[()],
    as_json: bool,
) -> None:
    """Print what a sweep would do; exit with code 1 if rows would fail."""
    from forgetcast.cli.tables import dry_run_tables
    from forgetcast.experiments import plan_sweep

    with progress(resumable=False) as report:
        found = plan_sweep(settings, pool, tasks, load, only=only, on_progress=report)
    print_json(found.as_dict()) if as_json else print_all(dry_run_tables(found))
    faults = {row.name: row.fault for row in found.rows if row.fault is not None}
    for name, reason in faults.items():
        err.print(f"would fail: {name}: {reason}", markup=False, soft_wrap=True)
    if faults:
        raise typer.Exit(1)


@app.command(rich_help_panel=ATLAS)
def analyze(
    matrix: MatrixPath,
    exact_match: ByAnswers = False,
    similarity: Similarities = None,
    tasks: TasksFolder = None,
    format: TasksFormat = None,
    column: TasksColumns = None,
    model: BaseOption = None,
    embedding: EmbeddingOption = None,
    tuned: TunedOption = None,
    as_json: AsJson = False,
) -> None:
    """Show how nearly low-rank the forgetting is, and what its components load on.

    Where tasks have several seeds, also how much of what the structure leaves is noise from run to run. With
    --similarity, also how similarities of task and example correlate with the forgetting.

    Example: forgetcast analyze runs.atlas --similarity tfidf,loss --tasks tasks/
    """
    from forgetcast.atlas import Atlas
    from forgetcast.cli.tables import association_tables, structure_tables
    from forgetcast.completion.structure import analyze as analyze_matrix

    replicates, priors, counted = dict[str, str](), tuple[str, ...](), None
    if not Path(matrix).is_file():  # a matrix alone does not say which rows are of one task
        atlas = Atlas.open(matrix)
        replicates = {row: str(atlas.provenance(row).get("task", row)) for row in atlas.tasks}
        priors, counted = atlas.priors, None if exact_match else atlas.before.tokens
    values = load_matrix(matrix, exact_match=exact_match)
    associations = []
    if similarity is not None:
        from forgetcast.similarity import associate

        side = gather_side(matrix, values, similarity, TaskData(tasks, format, column), model, embedding, tuned)
        associations = associate(values, side.similarities)
        for note in side.notes:
            err.print(note, markup=False, soft_wrap=True)
    structure = analyze_matrix(values, replicates=replicates, priors=priors, tokens=counted)
    if as_json:
        found = structure.as_dict()
        print_json(found | {"similarity": plain(associations)} if similarity is not None else found)
        return
    print_all(structure_tables(structure))
    if associations:
        print_all(association_tables(associations))
