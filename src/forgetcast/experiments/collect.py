"""Collect an atlas: fine-tune the base model on every task in turn, score the pool after each, add a row.

Complete rows are skipped, so an interrupted sweep continues where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from forgetcast.atlas.matrix import check_fingerprint
from forgetcast.atlas.store import Atlas
from forgetcast.data.pool import Pool, load_task
from forgetcast.data.reader import SUFFIXES, data_name, is_data_file
from forgetcast.data.recipe import Recipe
from forgetcast.data.rendering import Rendering
from forgetcast.errors import DataError, MismatchError
from forgetcast.experiments.runs import (
    AtlasRows,
    FineTune,
    Meter,
    OnProgress,
    check_base,
    check_recipe,
    score_with_progress,
    units,
)
from forgetcast.settings import read_settings

if TYPE_CHECKING:
    from forgetcast.lm import FineTuner, LanguageModel
    from forgetcast.lm.generate import Metric


class CollectConfig(BaseModel):
    """Contents of the YAML file of `forgetcast collect`; paths are relative to that file.

    Attributes
    ----------
    model : str
        A directory or a hub id.
    pool : Path
    tasks : Path or list of Path
        A folder of JSONL or Parquet files, one task each, or the files.
    atlas : Path
        Created if it does not exist, extended if it does.
    recipe : Recipe
        Its fields, a file with them, or the name of one that ships with the package.
    exact_match : bool
        Whether the models also answer the pool's prompts.
    max_new_tokens : int
        Longest answer.
    rendering : Rendering
        How conversations are rendered: `date`, `thinking`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    pool: Path
    tasks: Path | list[Path]
    atlas: Path
    recipe: Recipe = Recipe()
    exact_match: bool = False
    max_new_tokens: int = Field(default=32, ge=1)
    rendering: Rendering = Rendering()

    @field_validator("recipe", mode="before")
    @classmethod
    def _named(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, str):
            return value
        file = (info.context or Path()) / value
        return Recipe.load(file if file.exists() else value)

    @classmethod
    def load(cls, path: str | Path) -> CollectConfig:
        """Read and check a YAML file.

        Raises
        ------
        ConfigError
            Names the file and the field.
        """
        config = read_settings(Path(path), cls)
        base = Path(path).parent
        tasks = [base / t for t in config.tasks] if isinstance(config.tasks, list) else base / config.tasks
        model = str(base / config.model) if (base / config.model).is_dir() else config.model
        return config.model_copy(
            update={"model": model, "pool": base / config.pool, "tasks": tasks, "atlas": base / config.atlas}
        )

    def load_tasks(self, read: Callable[[Path], Pool] = load_task) -> dict[str, Pool]:
        """Read every task, by the name of its file without the ending.

        Parameters
        ----------
        read : callable, optional
            Reads a file; default: `load_task`.

        Raises
        ------
        DataError
            If there are none, or two have the same name.
        """
        return load_tasks(self.tasks, read)


def load_tasks(where: Path | Sequence[Path], read: Callable[[Path], Pool] = load_task) -> dict[str, Pool]:
    """Read every task of a folder, or of a list of files, by the name of its file without the ending.

    Parameters
    ----------
    where : Path or sequence of Path
        A folder of files, each of them a task, or the files.
    read : callable, optional
        Reads a file; default: `load_task`.

    Raises
    ------
    DataError
        If there are none, or two have the same name.
    """
    if not isinstance(where, Path):
        files = list(where)
    elif where.is_dir():
        files = sorted(path for path in where.iterdir() if is_data_file(path))
    else:
        raise DataError(f"{where}: there is no such folder of tasks")
    if not files:
        raise DataError(f"{where} holds no task: no {', '.join(SUFFIXES)} file")
    tasks: dict[str, Pool] = {}
    for file in files:
        name = data_name(file)
        if name in tasks:
            raise DataError(f"two tasks are called {name!r}; give their files different names")
        tasks[name] = read(file)
    return tasks


def prepare_atlas(
    path: str | Path,
    base: LanguageModel,
    pool: Pool,
    recipe: Recipe,
    *,
    exact_match: bool = False,
    max_new_tokens: int = 32,
    metric: Metric | None = None,
    on_progress: OnProgress | None = None,
) -> Atlas:
    """Open an atlas and check that it fits, or create it by scoring the base model.

    Parameters
    ----------
    path : path
    base : LanguageModel
    pool : Pool
        Upstream examples.
    recipe : Recipe
        Recipe of every row.
    exact_match : bool
        Whether the models also answer the pool's prompts, so that flips are counted.
    max_new_tokens : int
        Longest answer.
    metric : callable, optional
        Maps an answer and the expected one to 1 or 0; default: exact match.
    on_progress : callable, optional

    Raises
    ------
    MismatchError
        If the atlas has another model, pool, recipe or way to measure answers.
    """
    if Path(path).exists():
        atlas = Atlas.open(path)
        check_fingerprint(f"the atlas {atlas.path}", atlas.pool.fingerprint, pool)
        check_base(atlas, base)
        check_recipe(f"the atlas {atlas.path}", atlas.recipe, recipe.model_dump())
        _check_answers(atlas, max_new_tokens if exact_match else None)
        return atlas
    answers = _answers(max_new_tokens, metric) if exact_match else None
    meter = Meter(len(pool) * (2 if exact_match else 1), on_progress)
    before = score_with_progress(base, pool, meter, "base model", answers)
    return Atlas.create(path, pool, before, model=base.name, recipe=recipe.model_dump())


def collect(
    tuner: FineTuner,
    atlas: Atlas,
    recipe: Recipe,
    tasks: Mapping[str, Pool],
    *,
    metric: Metric | None = None,
    on_progress: OnProgress | None = None,
) -> Atlas:
    """Measure the base model's forgetting after each task.

    Parameters
    ----------
    tuner : FineTuner
        With the base model.
    atlas : Atlas
        Gets one row per task. If it has the base model's answers, the tuned models answer too.
    recipe : Recipe
    tasks : mapping of str to Pool
        Fine-tuning data by task name.
    metric : callable, optional
        As in `prepare_atlas`.
    on_progress : callable, optional

    Raises
    ------
    MismatchError
        If the atlas is of another base model or recipe.
    """
    check_base(atlas, tuner.base)
    check_recipe(f"the atlas {atlas.path}", atlas.recipe, recipe.model_dump())
    rows, settings = AtlasRows(atlas), {"recipe": recipe.model_dump()}
    answers = _answers(atlas.before.metadata.get("max_new_tokens", 32), metric) if atlas.has_answers else None
    todo = [name for name in tasks if not rows.has(name, settings)]
    meter = Meter(collection_units(len(todo), atlas.pool, recipe, answered=atlas.has_answers), on_progress)
    for name in todo:
        job = FineTune(name, tasks[name], recipe, atlas.pool, answers=answers)
        rows.ensure(name, settings, lambda job=job: job.run(tuner, settings, meter))  # type: ignore[misc]
    tuner.restore()
    return atlas


def collection_units(tasks: int, pool: Pool, recipe: Recipe, *, answered: bool = False) -> int:
    """Return the units of work of `tasks` rows."""
    return tasks * units(recipe, len(pool) * (1 + answered))


def _answers(max_new_tokens: int, metric: Metric | None) -> dict[str, Any]:
    """Return the arguments of `lm.exact_match`."""
    return {"max_new_tokens": max_new_tokens, **({} if metric is None else {"metric": metric})}


def _check_answers(atlas: Atlas, max_new_tokens: int | None) -> None:
    """Raise MismatchError if the atlas was collected with other settings of the answers."""
    stored = atlas.before.metadata.get("max_new_tokens") if atlas.has_answers else None
    if atlas.has_answers != (max_new_tokens is not None) or stored not in (None, max_new_tokens):
        has = f"exact_match: true and max_new_tokens: {stored}" if atlas.has_answers else "exact_match: false"
        raise MismatchError(f"the atlas {atlas.path} was collected with {has}; use that, or create a new atlas")
