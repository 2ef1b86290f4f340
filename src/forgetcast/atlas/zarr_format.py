"""Atlases of format 1, which kept their numbers in Zarr arrays: reading, and conversion to the format of today."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from forgetcast.atlas import rows
from forgetcast.atlas.rows import FLIPPED, FORGETTING
from forgetcast.atlas.storage import FolderStorage, Storage
from forgetcast.errors import DataError, MissingExtraError
from forgetcast.files import opened_parquet, read_json
from forgetcast.results import validated

if TYPE_CHECKING:
    import zarr

FORMAT = 1

_ARRAYS = {FORGETTING: ("numbers.zarr", "forgetting"), FLIPPED: ("answers.zarr", "flipped")}
"""Group and array of each column."""

_REPLAYS = "replays.json"


class _Task(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    name: str
    added: str
    recipe: dict[str, Any] = {}
    model_hash: str | None = None


class _Index(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    model_hash: str | None = None
    pool: str
    recipe: dict[str, Any] = {}
    created: str
    tasks: list[_Task]


@dataclass
class ZarrRow:
    """A row of an atlas of format 1; it has what `rows.Row` has."""

    path: Path
    number: int
    entry: Mapping[str, Any]

    @property
    def task(self) -> str:
        """Name of the task."""
        return str(self.entry["name"])

    @property
    def order(self) -> tuple[int, str]:
        """Key by which rows are sorted."""
        return self.number, self.task

    @property
    def provenance(self) -> dict[str, Any]:
        """When it was added, recipe, hash of the tuned model."""
        return dict(self.entry)

    @cached_property
    def _arrays(self) -> dict[str, zarr.Array[Any]]:
        return {name: _array(self.path, name) for name, (group, _) in _ARRAYS.items() if (self.path / group).is_dir()}

    def read(self, column: str, first: int, last: int) -> np.ndarray:
        """Return a column for the examples from `first` to `last`, shape (last - first,) of float32."""
        array = self._arrays.get(column)
        if array is None or self.number >= array.shape[0]:
            return np.full(last - first, np.nan, np.float32)
        return _reading(self.path, lambda: np.asarray(array[self.number, first:last], dtype=np.float32))


def _array(path: Path, column: str) -> zarr.Array[Any]:
    try:
        import zarr
    except ImportError as error:
        raise MissingExtraError("zarr", error) from None
    group, name = _ARRAYS[column]
    array = _reading(path, lambda: zarr.open_array(path / group / name, mode="r"))
    if array.dtype != np.dtype("<f4") or array.ndim != 2:
        raise DataError(f"{path / group / name} is not a table of 32-bit numbers; put back a copy of it")
    return array


def _reading(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:  # zarr and its codecs have no common base of their exceptions
        raise DataError(f"{path}: its Zarr arrays cannot be read: {str(error).splitlines()[0]}") from None


def index(storage: Storage, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the index of today, from atlas.json of format 1.

    Raises
    ------
    DataError
        If a field is missing or has another type, or a part of the atlas is missing.
    """
    path = _folder(storage)
    parsed = _parse(path, content)
    _array(path, FORGETTING)
    for name in ("pool.parquet", "before.parquet"):
        if not (path / name).is_file():
            raise DataError(f"{path} is not a whole atlas: {name} is missing; put it back")
    with opened_parquet(path / "pool.parquet") as file:
        examples = file.metadata.num_rows
    return {
        **parsed.model_dump(include={"model", "model_hash", "pool", "recipe", "created"}),
        "format": FORMAT,
        "examples": examples,
        "answers": (path / _ARRAYS[FLIPPED][0]).is_dir(),
        "seals": {},
    }


def group_of(column: str) -> str:
    """Return the name of the folder with a column's array."""
    return _ARRAYS[column][0]


def is_leftover(name: str) -> bool:
    """Say whether a file, by its name in the atlas, is one that only this format has."""
    return name.partition("/")[0] in {*(group for group, _ in _ARRAYS.values()), _REPLAYS, ".lock"}


def _folder(storage: Storage) -> Path:
    if not isinstance(storage, FolderStorage):
        raise DataError(f"{storage}: an atlas of format {FORMAT} is read from a folder; copy it to this machine")
    return storage.location


def _parse(path: Path, content: Any) -> _Index:
    parsed = validated(_Index, content, str(path / "atlas.json"))
    names = [task.name for task in parsed.tasks]
    if len(set(names)) < len(names) or not all(names):
        raise DataError(f"{path / 'atlas.json'}: tasks: a name is empty or occurs twice")
    return parsed


def list_rows(storage: Storage) -> dict[str, ZarrRow]:
    """Return the rows by task."""
    path = _folder(storage)
    tasks = _parse(path, read_json(path / "atlas.json")).tasks
    return {task.name: ZarrRow(path, number, task.model_dump()) for number, task in enumerate(tasks)}


def replays(storage: Storage) -> list[dict[str, Any]]:
    """Return the outcomes of fine-tunes with and without replay."""
    path = _folder(storage) / _REPLAYS
    runs = read_json(path) if path.exists() else []
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        raise DataError(f"{path} is not a list of fine-tunes; remove it, and verify or pilot again")
    return runs


def copy_rows(storage: Storage, base: str, examples: int) -> None:
    """Write each row as a part, in the place of parts that an interrupted conversion left."""
    for folder in ("rows", "receipts"):
        for name in storage.names(folder):
            storage.remove(name)
    for row in list_rows(storage).values():
        columns = [name for name, (group, _) in _ARRAYS.items() if (_folder(storage) / group).is_dir()]
        values = {column: row.read(column, 0, examples) for column in columns}
        if np.isnan(values[FORGETTING]).all():
            continue
        info = {**row.provenance, "base": base, "examples": examples}
        rows.write_part(storage, info, row.number, values)


def remove(storage: Storage) -> int:
    """Remove what a conversion left behind; return how many files or folders."""
    if not isinstance(storage, FolderStorage):
        return 0
    old = [path for group, _ in _ARRAYS.values() if (path := storage.location / group).is_dir()]
    for path in old:
        shutil.rmtree(path)
    (storage.location / ".lock").unlink(missing_ok=True)
    if (file := storage.location / _REPLAYS).exists():
        file.unlink()
        old.append(file)
    return len(old)
