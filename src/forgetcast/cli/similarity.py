"""What `analyze --similarity` and `bench --similarity` share: the data that similarities are computed from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from forgetcast.cli.app import load_base, load_tasks, progress
from forgetcast.cli.options import DataFormat, Loading
from forgetcast.errors import ConfigError

if TYPE_CHECKING:
    from forgetcast.atlas import Atlas, ForgettingMatrix
    from forgetcast.lm import LanguageModel
    from forgetcast.similarity import SideInformation

Similarities = Annotated[
    str | None,
    typer.Option(
        "--similarity",
        help="Similarities to compare with, or all: tfidf, embedding, hidden, gradient, gradient-cosine, loss, length. "
        "With --tuned also update and gradient-run, which are known after the fine-tunes only.",
    ),
]
TasksFolder = Annotated[
    Path | None,
    typer.Option("--tasks", help="With --similarity: folder with the data of every task, named as its row."),
]
TasksFormat = Annotated[
    DataFormat | None,
    typer.Option("--format", help="Format of the data of --tasks; default: by each row's fields."),
]
TasksColumns = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        help="What --tasks call a field, such as prompt=frage, or one of them: law:prompt=frage; repeatable.",
    ),
]
BaseOption = Annotated[
    str | None, typer.Option("--model", help="With --similarity: the base model, for hidden and gradient.")
]
EmbeddingOption = Annotated[
    Path | None, typer.Option("--embedding", help="With --similarity: folder of a sentence-transformers model.")
]
TunedOption = Annotated[
    Path | None,
    typer.Option(
        "--tuned",
        help="With --similarity: folder with the tuned model or adapter of every task, TASK, with its checkpoints.",
    ),
]


class TaskData(NamedTuple):
    """Where the data of an atlas's tasks are, and how they are read."""

    folder: Path | None
    format: DataFormat | None = None
    columns: list[str] | None = None


def gather_side(
    location: str,
    matrix: ForgettingMatrix,
    similarity: str,
    tasks: TaskData,
    model: str | None,
    embedding: Path | None,
    tuned: Path | None = None,
) -> SideInformation:
    """Compute the similarities of an atlas's tasks and examples.

    Raises
    ------
    ConfigError
        If the matrix is no atlas, there is no folder of tasks, or a similarity needs a model that is not given.
    MismatchError
        If the model is not the atlas's base, or a task has no file.
    DataError
        If a task has no tuned model, where they are given.
    """
    from forgetcast.atlas import Atlas
    from forgetcast.experiments.add import models_of_run
    from forgetcast.similarity import Material, gather, names_of, tasks_of

    if Path(location).is_file():
        raise ConfigError("--similarity needs an atlas: a matrix in a file has no texts")
    if tasks.folder is None:
        raise ConfigError("--similarity needs --tasks: the folder with the data of the tasks")
    names = names_of(similarity)
    atlas = Atlas.open(location)
    read = load_tasks(tasks.folder, tasks.format, tasks.columns, strict=False)
    data = tasks_of(matrix, read, where=str(tasks.folder))
    runs = None if tuned is None else {name: models_of_run(tuned / name) for name in data}
    base = load_base(model, Loading(), atlas) if model is not None else None
    with progress(resumable=False) as report:
        material = Material(
            data,
            atlas.pool,
            atlas.nll_before,
            language_model=base,
            embedding=embedding,
            tuned=runs,
            load=None if runs is None else _loader(atlas),
            on_progress=report,
        )
        return gather(matrix, material, names)


def _loader(atlas: Atlas) -> Callable[[str], LanguageModel]:
    """Return what loads a tuned model, rendering conversations as the atlas does."""
    from forgetcast.experiments.runs import rendering_of
    from forgetcast.lm import load

    rendering = rendering_of(atlas)
    return lambda name: replace(load(name), rendering=rendering)
