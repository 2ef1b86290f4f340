"""Commands that make an atlas from what exists, and keep it: add, atlas create, info, drop, compact, convert."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from forgetcast.cli.app import (
    app,
    arguments_as_scored,
    atlas_app,
    check_models,
    err,
    import_torch,
    load_data,
    out,
    print_all,
    print_json,
    progress,
    require_single_process,
)
from forgetcast.cli.options import (
    ATLAS,
    AllowDifferentTokens,
    AsJson,
    AtlasPath,
    Columns,
    Date,
    Format,
    Loading,
    ModelName,
    NewAtlas,
    NoThinking,
    PoolPath,
    Strict,
    loads_a_model,
)
from forgetcast.defaults import ANSWER_TOKENS
from forgetcast.errors import ConfigError

if TYPE_CHECKING:
    from forgetcast.atlas import Atlas
    from forgetcast.experiments import Outcome


@atlas_app.command()
@loads_a_model
def create(
    model: ModelName,
    pool: PoolPath,
    output: NewAtlas,
    exact_match: Annotated[
        bool, typer.Option("--exact-match", help="Also answer the prompts, so that lost answers are counted.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens, with --exact-match.")] = (
        ANSWER_TOKENS
    ),
    date: Date = None,
    no_thinking: NoThinking = False,
    format: Format = None,
    column: Columns = None,
    strict: Strict = False,
    *,
    loading: Loading,
) -> None:
    """Score a base model on a pool, and create an atlas without rows, to which `add` and `collect` add them.

    Example: forgetcast atlas create ./my-model pool.jsonl -o runs.atlas
    """
    from forgetcast.data import Rendering
    from forgetcast.experiments import create_atlas

    require_single_process("atlas create")
    check_models(loading, model)
    examples, rendering = load_data(pool, format, column, strict), Rendering(date or Rendering.date, not no_thinking)
    import_torch()
    from forgetcast.lm import load

    with progress() as report:
        atlas = create_atlas(
            output,
            lambda: replace(load(model, **loading.arguments()), rendering=rendering),
            examples,
            exact_match=exact_match,
            max_new_tokens=max_new_tokens,
            on_progress=report,
        )
    out.print(
        f"{atlas.path}: {len(examples)} examples, no rows; next: forgetcast add {atlas.path} MODEL",
        markup=False,
        soft_wrap=True,
    )


@app.command(rich_help_panel=ATLAS)
@loads_a_model
def add(
    atlas: AtlasPath,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL...",
            help="Fine-tuned models or adapters: directories, GGUF files, hub ids, or a folder of such directories.",
        ),
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(help="Score file that `forgetcast score` wrote for a fine-tuned model, instead of a model."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the row; default: that of the folder or file.")] = None,
    probes: Annotated[
        int | None,
        typer.Option(min=1, help="Measure only so many examples, chosen for what they say about the others."),
    ] = None,
    allow_different_tokens: AllowDifferentTokens = False,
    as_json: AsJson = False,
    *,
    loading: Loading,
) -> None:
    """Add rows to an atlas from models that exist: score each on the pool. What is measured already is not repeated.

    A folder that is no model stands for the models directly in it. Adapters of one base model share it in memory. The
    type of the weights defaults to that of the base scores.

    Exit code 0: all are in the atlas. 1: some failed, and are named; the rest is added. 2: nothing could be added.

    Example: forgetcast add runs.atlas ./adapters
    """
    from forgetcast.atlas import Atlas
    from forgetcast.experiments import add_models, find_models
    from forgetcast.experiments.runs import rendering_of

    require_single_process("add")
    if (scores is None) == (not models):
        raise ConfigError("give models, or --scores FILE")
    opened = Atlas.open(atlas)
    if scores is not None:
        if probes is not None:
            raise ConfigError("--probes is for models; of a score file, all examples are added")
        _show(opened, [_add_scores(opened, scores, name, allow_different_tokens)], as_json)
        return
    found = find_models(models or (), name)
    for ignored in found.ignored:
        err.print(f"{ignored} is no model: ignored", markup=False, soft_wrap=True)
    for row, model in found.models.items():
        if row != Path(model).name:
            err.print(f"{model} is called {row!r}", markup=False, soft_wrap=True)

    import_torch()
    from forgetcast.lm import SharedBase

    with progress() as report:
        outcomes = add_models(
            opened,
            found.models,
            SharedBase(rendering_of(opened), **arguments_as_scored(loading, opened)),
            probes=probes,
            allow_different_tokens=allow_different_tokens,
            on_progress=report,
        )
    _show(opened, outcomes, as_json)


def _add_scores(atlas: Atlas, scores: Path, name: str | None, allow_different_tokens: bool) -> Outcome:
    from forgetcast.experiments import add_scores
    from forgetcast.measure import Scores

    if scores.is_dir() or (scores.is_file() and scores.suffix in (".json", ".jsonl", ".eval")):
        raise ConfigError(
            f"{scores} is no score file, which is what `forgetcast score MODEL POOL -o SCORES.parquet` writes; logs of "
            "evaluation tools become an atlas with `forgetcast atlas import --logs BASE_LOGS LOGS... -o NEW.atlas`"
        )
    return add_scores(
        atlas,
        name or scores.stem,
        Scores.load(scores),
        source=str(scores),
        allow_different_tokens=allow_different_tokens,
    )


def _show(atlas: Atlas, outcomes: list[Outcome], as_json: bool) -> None:
    """Print what became of each model; exit with code 1 if some failed, and 2 if all did."""
    from forgetcast.cli.tables import added_tables

    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    if as_json:
        print_json({"atlas": str(atlas.path), "rows": [outcome.as_dict() for outcome in outcomes]})
    else:
        print_all(added_tables(str(atlas.path), outcomes))
    for outcome in outcomes:
        for note in outcome.notes:
            err.print(f"{outcome.name}: {note}", markup=False, soft_wrap=True)
    for outcome in failed:
        err.print(f"failed: {outcome.name}: {outcome.reason}", markup=False, soft_wrap=True)
    if failed:
        raise typer.Exit(2 if len(failed) == len(outcomes) else 1)


@atlas_app.command()
def info(atlas: AtlasPath, as_json: AsJson = False) -> None:
    """Show what an atlas holds: base model, pool, size, and how much of each row is measured.

    Example: forgetcast atlas info runs.atlas
    """
    from forgetcast.atlas import Atlas
    from forgetcast.cli.tables import atlas_tables

    facts = Atlas.open(atlas).info()
    if as_json:
        print_json(facts)
    else:
        print_all(atlas_tables(facts))


@atlas_app.command()
def drop(
    atlas: AtlasPath,
    task: Annotated[str, typer.Argument(help="Name of the row.")],
    reason: Annotated[str, typer.Option(help="Why, to be stored.")] = "",
) -> None:
    """Remove a row, for example to measure it again. Its files are kept until `atlas compact`.

    Example: forgetcast atlas drop runs.atlas law --reason "trained on the wrong file"
    """
    from forgetcast.atlas import Atlas

    opened = Atlas.open(atlas)
    opened.drop(task, reason=reason)
    out.print(f"{opened.path}: {task} dropped, {len(opened.tasks)} tasks left", markup=False, soft_wrap=True)


@atlas_app.command()
def compact(atlas: AtlasPath) -> None:
    """Join the parts of each row into one file, and remove what was dropped. Cannot be undone.

    Example: forgetcast atlas compact runs.atlas
    """
    from forgetcast.atlas import Atlas

    opened = Atlas.open(atlas)
    removed = opened.compact()
    out.print(f"{opened.path}: {removed} files removed, {len(opened.tasks)} tasks", markup=False, soft_wrap=True)


@atlas_app.command()
def convert(atlas: AtlasPath) -> None:
    """Convert an atlas of an earlier version in its place. What it was made of is kept until `atlas compact`.

    Example: forgetcast atlas convert runs.atlas
    """
    from forgetcast.atlas import Atlas

    opened = Atlas.open(atlas)
    before = opened.format
    opened.convert()
    if opened.format == before:
        out.print(f"{opened.path} is of format {before} already", markup=False, soft_wrap=True)
    else:
        out.print(f"{opened.path}: converted from format {before} to {opened.format}", markup=False, soft_wrap=True)
