"""Collect an atlas: fine-tune the base model on every task in turn, score the pool after each, add a row.

A task whose row is complete is passed over, so an interrupted sweep goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from forgetcast.atlas import Atlas
from forgetcast.errors import DataError, MismatchError
from forgetcast.matrix import check_fingerprint
from forgetcast.pool import Pool, load_task
from forgetcast.recipe import Recipe, read_settings

if TYPE_CHECKING:
    from forgetcast.lm import LanguageModel, Workbench
    from forgetcast.scores import Scores

OnProgress = Callable[[str, int, int], None]
"""Called with what is being done, the units of work done, and the units in all.

A unit is one example's forward pass; training on an example counts as three."""

TRAINING_UNITS = 3
_TASK_FILES = {".jsonl", ".json", ".ndjson", ".parquet"}


class CollectConfig(BaseModel):
    """What `forgetcast collect` reads from its YAML file; paths are relative to that file.

    Attributes
    ----------
    model : str
        A directory or a hub id.
    pool : Path
    tasks : Path or list of Path
        A folder of JSONL or Parquet files, one task each, or the files.
    atlas : Path
        Is made, or grows if it is there.
    recipe : Recipe
        Its fields, a file with them, or the name of one that ships with the package.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    pool: Path
    tasks: Path | list[Path]
    atlas: Path
    recipe: Recipe = Recipe()

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

    def load_tasks(self) -> dict[str, Pool]:
        """Read every task, by the name of its file without the ending.

        Raises
        ------
        DataError
            If there are none, or two have the same name.
        """
        if isinstance(self.tasks, list):
            files = self.tasks
        elif self.tasks.is_dir():
            files = sorted(path for path in self.tasks.iterdir() if path.suffix in _TASK_FILES)
        else:
            raise DataError(f"{self.tasks}: there is no such folder of tasks")
        if not files:
            raise DataError(f"{self.tasks} holds no task: no .jsonl or .parquet file")
        tasks: dict[str, Pool] = {}
        for file in files:
            if file.stem in tasks:
                raise DataError(f"two tasks are called {file.stem!r}; give their files different names")
            tasks[file.stem] = load_task(file)
        return tasks


def collect(
    base: LanguageModel,
    pool: Pool,
    tasks: dict[str, Pool],
    atlas: str | Path,
    recipe: Recipe,
    *,
    on_progress: OnProgress | None = None,
) -> Atlas:
    """Measure what every task makes the base model forget.

    Parameters
    ----------
    base : LanguageModel
    pool : Pool
        Upstream examples.
    tasks : dict of str to Pool
        Fine-tuning data by task name.
    atlas : path
        Is made, or grows if it is there.
    recipe : Recipe
    on_progress : callable, optional

    Raises
    ------
    MismatchError
        If the atlas is there and is of another model, pool or recipe.
    """
    from forgetcast.lm import Workbench

    workbench = Workbench(base)
    opened = Atlas.open(atlas) if Path(atlas).exists() else None
    if opened is not None:
        _check_same(opened, base, pool, recipe)
    todo = [name for name in tasks if opened is None or not opened.is_complete(name)]
    per_task = recipe.steps * recipe.batch_size * TRAINING_UNITS + len(pool)
    meter = Meter(len(todo) * per_task + (len(pool) if opened is None else 0), on_progress)
    if opened is None:
        before = measure(base, pool, meter, "base model")
        opened = Atlas.create(atlas, pool, before, model=base.name, recipe=recipe.model_dump())
    for name in todo:
        after = tune_and_score(workbench, name, tasks[name], pool, recipe, meter)
        opened.add(name, after, recipe=recipe.model_dump())
    workbench.restore()
    return opened


class Meter:
    """Adds up units of work for a progress display."""

    def __init__(self, total: int, on_progress: OnProgress | None) -> None:
        self.total, self.done, self._on_progress = total, 0, on_progress

    def advance(self, what: str, units: int) -> None:
        """Count `units` more as done."""
        self.done += units
        if self._on_progress is not None:
            self._on_progress(what, self.done, self.total)


def measure(language_model: LanguageModel, pool: Pool, meter: Meter, name: str) -> Scores:
    """Score a pool with progress."""
    from forgetcast.lm import score

    return score(language_model, pool, on_progress=lambda count: meter.advance(f"{name}: scoring", count))


def tune_and_score(workbench: Workbench, name: str, task: Pool, pool: Pool, recipe: Recipe, meter: Meter) -> Scores:
    """Fine-tune without replay and score a pool, with progress."""
    units = recipe.batch_size * TRAINING_UNITS
    tuned = workbench.tune(task, recipe, on_step=lambda *_: meter.advance(f"{name}: fine-tuning", units))
    return measure(tuned.language_model, pool, meter, name)


def _check_same(atlas: Atlas, base: LanguageModel, pool: Pool, recipe: Recipe) -> None:
    check_fingerprint(f"the atlas {atlas.path}", atlas.pool.fingerprint, pool)
    check_base(atlas, base)
    # What an older version did not know had its default.
    earlier = {name: field.default for name, field in Recipe.model_fields.items()} | atlas.recipe
    if changed := [name for name, value in recipe.model_dump().items() if atlas.recipe and earlier[name] != value]:
        raise MismatchError(
            f"the atlas {atlas.path} was collected with another recipe ({', '.join(changed)} differ); "
            "rows of one atlas must be comparable: use its recipe, or collect into a new atlas"
        )


def check_base(atlas: Atlas, base: LanguageModel) -> None:
    """Raise MismatchError if the atlas was measured on other weights than `base` has."""
    if atlas.model_hash is not None and atlas.model_hash != base.weights_hash:
        raise MismatchError(f"the atlas {atlas.path} was measured on another base model ({atlas.model})")
