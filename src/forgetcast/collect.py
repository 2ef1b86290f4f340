"""Collect an atlas: fine-tune the base model on every task in turn, score the pool after each, add a row.

A task whose row is complete is passed over, so an interrupted sweep goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from forgetcast.atlas import Atlas
from forgetcast.errors import DataError, MismatchError
from forgetcast.matrix import check_fingerprint
from forgetcast.pool import Pool, load_task
from forgetcast.recipe import Recipe
from forgetcast.settings import read_settings

if TYPE_CHECKING:
    from forgetcast.lm import LanguageModel
    from forgetcast.lm.generate import Metric
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
    exact_match : bool
        Whether the models answer the pool's prompts too.
    max_new_tokens : int
        Longest answer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    pool: Path
    tasks: Path | list[Path]
    atlas: Path
    recipe: Recipe = Recipe()
    exact_match: bool = False
    max_new_tokens: int = Field(default=32, ge=1)

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
        return load_tasks(self.tasks)


def load_tasks(where: Path | Sequence[Path]) -> dict[str, Pool]:
    """Read every task of a folder, or of a list of files, by the name of its file without the ending.

    Raises
    ------
    DataError
        If there are none, or two have the same name.
    """
    if not isinstance(where, Path):
        files = list(where)
    elif where.is_dir():
        files = sorted(path for path in where.iterdir() if path.suffix in _TASK_FILES)
    else:
        raise DataError(f"{where}: there is no such folder of tasks")
    if not files:
        raise DataError(f"{where} holds no task: no .jsonl or .parquet file")
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
    exact_match: bool = False,
    max_new_tokens: int = 32,
    metric: Metric | None = None,
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
    exact_match : bool
        Whether the models answer the pool's prompts too, so that right answers that become wrong are counted.
    max_new_tokens : int
        Longest answer.
    metric : callable, optional
        From an answer and the expected one to 1 or 0; default: exact match.
    on_progress : callable, optional

    Raises
    ------
    MismatchError
        If the atlas is there and is of another model, pool or recipe, or was measured in another way.
    """
    from forgetcast.lm import Workbench

    workbench = Workbench(base)
    answers = {"max_new_tokens": max_new_tokens, **({} if metric is None else {"metric": metric})}
    asked = answers if exact_match else None
    opened = Atlas.open(atlas) if Path(atlas).exists() else None
    if opened is not None:
        _check_same(opened, base, pool, recipe)
        _check_answers(opened, max_new_tokens if exact_match else None)
    todo = [name for name in tasks if opened is None or not opened.is_complete(name)]
    per_pool = len(pool) * (2 if exact_match else 1)
    per_task = recipe.steps * recipe.batch_size * TRAINING_UNITS + per_pool
    meter = Meter(len(todo) * per_task + (per_pool if opened is None else 0), on_progress)
    if opened is None:
        before = measure(base, pool, meter, "base model", asked)
        opened = Atlas.create(atlas, pool, before, model=base.name, recipe=recipe.model_dump())
    units = recipe.batch_size * TRAINING_UNITS
    for name in todo:
        tuned = workbench.tune(
            tasks[name], recipe, on_step=lambda *_, name=name: meter.advance(f"{name}: fine-tuning", units)
        )
        opened.add(name, measure(tuned.language_model, pool, meter, name, asked), recipe=recipe.model_dump())
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


def measure(
    language_model: LanguageModel, pool: Pool, meter: Meter, name: str, answers: Mapping[str, Any] | None = None
) -> Scores:
    """Score a pool with progress, and answer its prompts, if there are arguments for `exact_match`."""
    from forgetcast.lm import exact_match, score

    scores = score(language_model, pool, on_progress=lambda count: meter.advance(f"{name}: scoring", count))
    if answers is None:
        return scores
    left = len(pool)

    def answered(count: int) -> None:
        nonlocal left
        left -= count
        meter.advance(f"{name}: answering", count)

    right, predictions = exact_match(language_model, pool, on_progress=answered, **answers)
    meter.advance(f"{name}: answering", left)  # what is no question
    metadata = {**scores.metadata, "max_new_tokens": answers["max_new_tokens"]}
    return replace(scores, exact_match=right, predictions=predictions, metadata=metadata)


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


def _check_answers(atlas: Atlas, max_new_tokens: int | None) -> None:
    """Raise MismatchError if the atlas has answers and none are asked for, or the other way round, or longer ones."""
    known = atlas.before.metadata.get("max_new_tokens") if atlas.has_answers else None
    if atlas.has_answers != (max_new_tokens is not None) or known not in (None, max_new_tokens):
        has = f"exact_match: true and max_new_tokens: {known}" if atlas.has_answers else "exact_match: false"
        raise MismatchError(f"the atlas {atlas.path} was collected with {has}; keep to that, or begin a new one")


def check_base(atlas: Atlas, base: LanguageModel) -> None:
    """Raise MismatchError if the atlas was measured on other weights than `base` has."""
    if atlas.model_hash is not None and atlas.model_hash != base.weights_hash:
        raise MismatchError(f"the atlas {atlas.path} was measured on another base model ({atlas.model})")
