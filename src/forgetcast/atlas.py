"""The atlas: a forgetting matrix on disk, with its pool, its base scores and where every row came from.

    NAME.atlas/
      atlas.json       what the base model is, the pool's fingerprint, and the tasks in row order
      pool.parquet     the upstream examples
      before.parquet   scores of the base model
      numbers.zarr/    forgetting: (task, example) float32, nats per token, NaN where not measured
      answers.zarr/    flipped: (task, example) float32, 1 where a right answer became wrong, 0 where it stayed right,
                       NaN where it was not right before or not measured; only if the base model's answers are known
      replays.json     fine-tunes with and without replay, which a ratio is advised from; only if there were any

A row is written first and named in atlas.json after that, in one atomic replacement. So a crash at any byte leaves
an atlas that opens: a row that was not named yet is not seen and is written over; a named row whose new entries were
cut short keeps the old ones. There is one writer at a time; a second one is refused.
"""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import zarr

from forgetcast._files import read_json, umask, write_json
from forgetcast.errors import DataError, MismatchError
from forgetcast.matrix import ForgettingMatrix, check_fingerprint
from forgetcast.pool import Pool, read_example
from forgetcast.scores import Scores

if TYPE_CHECKING:
    import xarray as xr

FORMAT = 1

LOSSES, FLIPS = ("numbers.zarr", "forgetting"), ("answers.zarr", "flipped")
"""Where the two measures of forgetting are: by the loss, and by exact match."""

Measure = Literal["loss", "exact_match"]

BLOCK = 65_536
"""Columns in one chunk of a row: 256 KiB, so that appending a row touches few files and a block of columns is cheap."""


class Ids(Sequence[str]):
    """Ids in a column of Arrow's: ten bytes each, where a Python string takes sixty."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    @overload
    def __getitem__(self, item: int) -> str: ...
    @overload
    def __getitem__(self, item: slice) -> tuple[str, ...]: ...
    def __getitem__(self, item: int | slice) -> str | tuple[str, ...]:
        found = self._column[item]
        return tuple(found.to_pylist()) if isinstance(item, slice) else str(found.as_py())

    def positions(self, ids: Iterable[str], *, where: str = "the request") -> np.ndarray:
        """Positions of `ids`, shape (len(ids),); as `Pool.positions`, with its error."""
        wanted = pa.array(ids, self._column.type)
        found = pc.index_in(wanted, value_set=self._column)
        if found.null_count:
            unknown = wanted.filter(found.is_null())
            raise MismatchError(
                f"{where} has {len(unknown)} example(s) that the pool doesn't know, e.g. {unknown[0].as_py()!r}"
            )
        return np.asarray(found.to_numpy(zero_copy_only=False), dtype=np.intp)

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), BLOCK):
            yield from self[start : start + BLOCK]

    def __arrow_array__(self, type: pa.DataType | None = None) -> pa.ChunkedArray:  # Arrow's protocol
        return self._column if type is None else self._column.cast(type)


class StoredMatrix:
    """Rows of an atlas on disk; a slice of columns is read when it is asked for.

    Attributes
    ----------
    atlas : Atlas
    shape : (M, N)
    size : int
    dtype : numpy dtype
    """

    def __init__(self, atlas: Atlas, rows: list[int]) -> None:
        self.atlas = atlas
        self._array, self._rows = atlas._array("r"), rows
        self.shape = (len(rows), self._array.shape[1])
        self.size = self.shape[0] * self.shape[1]
        self.dtype = np.dtype(np.float32)

    def load(self) -> ForgettingMatrix:
        """Read all of it into memory."""
        return self.atlas.matrix([self.atlas.tasks[row] for row in self._rows])

    def __getitem__(self, item: tuple[slice, slice | np.ndarray]) -> np.ndarray:
        """Read all rows (the first part must be a full slice) at a slice of the columns, or at sorted ones: (M, n)."""
        whole, columns = item
        if whole != slice(None):
            raise IndexError("a stored matrix is read by columns: values[:, columns]")
        if isinstance(columns, slice):
            first, last, _ = columns.indices(self.shape[1])
            if self._rows == list(range(len(self._rows))):  # as they lie, which is read twice as fast
                return np.asarray(self._array[: len(self._rows), first:last])
            return np.stack([np.asarray(self._array[row, first:last]) for row in self._rows])
        # Whole chunks: they have to be read anyhow, and picking from them on the disk is eight times slower.
        ends = np.searchsorted(columns, np.arange(0, self.shape[1] + BLOCK, BLOCK))
        parts = [
            self[:, i * BLOCK : (i + 1) * BLOCK][:, columns[first:last] - i * BLOCK]
            for i, (first, last) in enumerate(pairwise(ends))
            if first < last
        ]
        return np.concatenate(parts, axis=1) if parts else np.empty((len(self._rows), 0), self.dtype)


class Atlas:
    """A forgetting matrix on disk that only grows; use `Atlas.create` or `Atlas.open`."""

    def __init__(self, path: Path, index: dict[str, Any]) -> None:
        self.path = path
        self._index = index

    @cached_property
    def pool(self) -> Pool:
        """The upstream examples, read when they are first asked for.

        Raises
        ------
        MismatchError
            If the pool file is not the one that was scored.
        """
        pool = Pool.load(self.path / "pool.parquet")
        check_fingerprint(f"the atlas {self.path}", self.pool_fingerprint, pool)
        return pool

    @cached_property
    def before(self) -> Scores:
        """Scores of the base model on the pool, read when they are first asked for."""
        return Scores.load(self.path / "before.parquet")

    @cached_property
    def examples(self) -> Ids:
        """Ids of the examples, in column order; their texts stay on disk."""
        return Ids(pq.read_table(self.path / "pool.parquet", columns=["id"])["id"])

    @cached_property
    def nll_before(self) -> np.ndarray:
        """Loss of the base model on each example, shape (N,), nats per token; NaN where it could not be scored."""
        return pq.read_table(self.path / "before.parquet", columns=["nll"])["nll"].to_numpy()

    @cached_property
    def has_answers(self) -> bool:
        """Whether the base model's answers are known, so that forgetting by exact match can be measured."""
        return (self.path / FLIPS[0]).is_dir()

    @cached_property
    def right_before(self) -> np.ndarray:
        """Whether the base model answers each example right, shape (N,)."""
        right = self.before.exact_match
        return np.zeros(len(self.examples), dtype=bool) if right is None else np.asarray(right == 1)

    @classmethod
    def create(
        cls, path: str | Path, pool: Pool, before: Scores, *, model: str, recipe: Mapping[str, Any] | None = None
    ) -> Atlas:
        """Make an atlas without tasks.

        Parameters
        ----------
        path : path
            A directory that does not exist yet.
        pool : Pool
        before : Scores
            Scores of the base model on exactly this pool.
        model : str
            What the base model is called, or where it is.
        recipe : mapping, optional
            The recipe that all tasks share, for provenance.

        Raises
        ------
        DataError
            If `path` exists.
        MismatchError
            If `before` is of another pool.
        """
        path = Path(path)
        if path.exists():
            raise DataError(f"{path} exists already; open it, or choose another name")
        if before.pool_fingerprint is not None:
            check_fingerprint("the score file", before.pool_fingerprint, pool)
        if before.ids != pool.ids:
            raise MismatchError("the scores before fine-tuning must cover the pool's examples, in its order")
        path.parent.mkdir(parents=True, exist_ok=True)
        # All of it is made beside its place and renamed, so that a half-made atlas is never found under the name.
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            pool.save(temporary / "pool.parquet")
            before.save(temporary / "before.parquet")
            arrays = {LOSSES: "nats per token"}
            if before.exact_match is not None:
                arrays[FLIPS] = "1 = right before and wrong after, 0 = right before and after"
            for (group, name), units in arrays.items():
                array = zarr.create_group(temporary / group).create_array(
                    name,
                    shape=(0, len(pool)),
                    chunks=(1, min(len(pool), BLOCK)),
                    dtype="float32",
                    fill_value=np.nan,
                    dimension_names=("task", "example"),
                )
                array.attrs.update(units=units, sign="positive = forgotten", missing="NaN")
            index: dict[str, Any] = {
                "format": FORMAT,
                "model": model,
                "model_hash": before.metadata.get("model_hash"),
                "pool": pool.fingerprint,
                "recipe": dict(recipe or {}),
                "created": _now(),
                "tasks": [],
            }
            write_json(temporary / "atlas.json", index)
            temporary.chmod(0o777 & ~umask())
            temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        atlas = cls(path, index)
        atlas.pool, atlas.before = pool, before
        return atlas

    @classmethod
    def open(cls, path: str | Path) -> Atlas:
        """Open an atlas. Its numbers, texts and base scores stay on disk until they are asked for.

        Raises
        ------
        DataError
            If there is none, a part of it is missing, or it was written by a newer version.
        MismatchError
            If the pool or the base scores have another number of examples than the atlas.
        """
        path = Path(path)
        if not (path / "atlas.json").is_file():
            raise DataError(f"{path} is not an atlas: atlas.json is missing")
        index = read_json(path / "atlas.json")
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            raise DataError(f"{path / 'atlas.json'}: format {FORMAT} is needed; upgrade forgetcast or collect it again")
        missing = [name for name in ("pool.parquet", "before.parquet", "numbers.zarr") if not (path / name).exists()]
        if missing:
            raise DataError(f"{path} is not a whole atlas: {missing[0]} is missing")
        atlas = cls(path, index)
        columns = atlas._array("r").shape[1]
        for name in ("pool.parquet", "before.parquet"):
            if (rows := pq.read_metadata(path / name).num_rows) != columns:
                raise MismatchError(f"{path / name} has {rows} examples, but {columns} were scored; put it back")
        return atlas

    @property
    def pool_fingerprint(self) -> str:
        """Fingerprint of the pool."""
        return str(self._index["pool"])

    @property
    def model(self) -> str:
        """What the base model is called, or where it is."""
        return str(self._index["model"])

    @property
    def model_hash(self) -> str | None:
        """Hash of the base model's weights, if it is known."""
        return self._index["model_hash"]

    @property
    def created(self) -> str:
        """When the atlas was begun, in ISO 8601."""
        return str(self._index["created"])

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe that the tasks share."""
        return dict(self._index["recipe"])

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in row order."""
        return tuple(task["name"] for task in self._index["tasks"])

    def provenance(self, task: str) -> dict[str, Any]:
        """What is kept about a task: when it was added, its recipe, and the hash of the tuned model."""
        return dict(self._index["tasks"][self._row(task)])

    def __repr__(self) -> str:
        """Size and place."""
        return f"Atlas({self.path}, {len(self.tasks)} tasks x {len(self.examples)} examples)"

    def _row(self, task: str) -> int:
        try:
            return self.tasks.index(task)
        except ValueError:
            raise MismatchError(f"the atlas {self.path} has no task {task!r}") from None

    def _rows(self, tasks: Iterable[str] | None) -> list[int]:
        return list(range(len(self.tasks))) if tasks is None else [self._row(task) for task in tasks]

    def add(
        self,
        task: str,
        after: Scores,
        *,
        examples: Iterable[str] | None = None,
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        """Add the measurements of a task: a whole row, or some entries of one.

        Parameters
        ----------
        task : str
            A new name, or one whose row is to be filled further. Entries that are measured already are kept.
        after : Scores
            Scores of the tuned model on the pool, or on a part of it.
        examples : iterable of str, optional
            Ids to take from `after`; default all of them.
        recipe : mapping, optional
            How the model was tuned.

        Raises
        ------
        MismatchError
            If an example is unknown, or its text is not the one in the atlas's pool.
        """
        if not task:
            raise DataError("a task needs a name")
        ids = tuple(after.ids if examples is None else examples)
        columns = self.columns_of(after, ids)
        losses = after.nll if examples is None else after.at(ids)
        measured = {LOSSES: losses - self.nll_before[columns]}
        if self.has_answers and after.exact_match is not None:
            positions = {id_: i for i, id_ in enumerate(after.ids)}
            right = after.exact_match[[positions[id_] for id_ in ids]]
            measured[FLIPS] = np.where(self.right_before[columns], 1 - right, np.nan)
        with self._writing():
            self._index = read_json(self.path / "atlas.json")
            new = task not in self.tasks
            row = len(self.tasks) if new else self._row(task)
            for kind, forgetting in measured.items():
                array = self._array("r+", kind)
                there = not new and row < array.shape[0]
                values = np.asarray(array[row]) if there else np.full(len(self.examples), np.nan, np.float32)
                unmeasured = np.isnan(values[columns])
                values[columns[unmeasured]] = forgetting[unmeasured].astype(np.float32)
                if array.shape[0] <= row:
                    array.resize((row + 1, len(self.examples)))
                array[row] = values
            if new:
                entry: dict[str, Any] = {"name": task, "added": _now(), "recipe": dict(recipe or {})}
                entry["model_hash"] = after.metadata.get("model_hash")
                index = {**self._index, "tasks": [*self._index["tasks"], entry]}
                write_json(self.path / "atlas.json", index)
                self._index = index

    def columns_of(self, scores: Scores, ids: Iterable[str] | None = None) -> np.ndarray:
        """Columns of the scored examples, shape (k,), after checking that their texts are this pool's.

        Raises
        ------
        MismatchError
            If an example is unknown, or has the text of another pool.
        """
        where = "the score file"
        columns = self.examples.positions(scores.ids if ids is None else ids, where=where)
        if scores.pool_fingerprint not in (None, self.pool_fingerprint):
            check_fingerprint(where, scores.pool_fingerprint, self.subset(scores.ids, where=where))
        return columns

    def subset(self, ids: Iterable[str], *, where: str = "the request") -> Pool:
        """Make a pool of the examples with these ids, in the order of `ids`; only their texts are read.

        Raises
        ------
        MismatchError
            If an id is unknown.
        """
        ids = list(ids)
        self.examples.positions(ids, where=where)
        rows = pads.dataset(self.path / "pool.parquet").to_table(filter=pc.field("id").isin(pa.array(ids, pa.string())))
        return Pool(read_example(row) for row in rows.to_pylist()).subset(ids)

    def hold_out(self, share: float, *, seed: int = 0, exclude: Iterable[str] = ()) -> tuple[str, ...]:
        """Ids to keep aside, as `Pool.hold_out`; none that the base model could not score: it cannot be judged on."""
        unscored = (self.pool.ids[i] for i in np.flatnonzero(np.isnan(self.nll_before)).tolist())
        return self.pool.hold_out(share, seed=seed, exclude=[*exclude, *unscored])

    def matrix(self, tasks: Iterable[str] | None = None, *, measure: Measure = "loss") -> ForgettingMatrix:
        """Read rows into memory: all of them, or those of `tasks`.

        Parameters
        ----------
        tasks : iterable of str, optional
        measure : 'loss' or 'exact_match'
            By exact match, forgetting is 1 where a right answer became wrong and 0 where it stayed right; only the
            examples that the base model answers right are in it (Jin and Ren, 2025).

        Raises
        ------
        DataError
            If exact match was not measured, or the base model answers nothing right.
        """
        rows = self._rows(tasks)
        if measure == "exact_match":
            return self._flips(rows)
        return ForgettingMatrix(
            StoredMatrix(self, rows)[:, :] if rows else np.empty((0, len(self.examples))),
            tasks=[self.tasks[row] for row in rows],
            examples=self.examples[:],
            sources=self._sources(),
            pool_fingerprint=self.pool_fingerprint,
        )

    def _flips(self, rows: list[int]) -> ForgettingMatrix:
        if not self.has_answers:
            raise DataError(f"the atlas {self.path} has no answers; collect one with exact_match: true")
        columns = np.flatnonzero(self.right_before)
        if not len(columns):
            raise DataError(f"the atlas {self.path}: the base model answers nothing right, so it can forget no answer")
        values, array = np.full((len(rows), len(columns)), np.nan, np.float32), self._array("r", FLIPS)
        for i, row in enumerate(rows):
            if row < array.shape[0]:  # else no answers were measured for it, nor for any later task
                values[i] = np.asarray(array[row])[columns]
        sources = self._sources()
        return ForgettingMatrix(
            values,
            tasks=[self.tasks[row] for row in rows],
            examples=[self.examples[i] for i in columns.tolist()],
            sources=[sources[i] for i in columns.tolist()],
            pool_fingerprint=self.pool_fingerprint,
        )

    def stored(self, tasks: Iterable[str] | None = None) -> StoredMatrix:
        """Rows on disk, all of them or those of `tasks`, to be read a few columns at a time."""
        return StoredMatrix(self, self._rows(tasks))

    def dataset(self) -> xr.Dataset:
        """View the atlas lazily as an xarray data set with `forgetting` and `before`, by task, example and source.

        `flipped` is in it too, if exact match was measured for all tasks.
        """
        import xarray as xr  # half a second, which no other method needs

        dataset = xr.open_zarr(self.path / "numbers.zarr", consolidated=False)
        dataset = dataset.isel(task=slice(0, len(self.tasks)))
        if self.has_answers and self._array("r", FLIPS).shape[0] >= len(self.tasks):
            answers = xr.open_zarr(self.path / FLIPS[0], consolidated=False)
            dataset = dataset.assign(flipped=answers.flipped.isel(task=slice(0, len(self.tasks))))
        return dataset.assign(before=("example", self.nll_before)).assign_coords(
            task=list(self.tasks), example=list(self.examples), source=("example", self._sources())
        )

    @property
    def replays(self) -> list[dict[str, Any]]:
        """What `add_replays` has kept, oldest first."""
        path = self.path / "replays.json"
        found = read_json(path) if path.exists() else []
        if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
            raise DataError(f"{path} is not a list of fine-tunes; remove it, and verify or pilot again")
        return found

    def add_replays(self, runs: Iterable[Mapping[str, Any]]) -> None:
        """Keep the outcomes of fine-tunes with and without replay.

        Parameters
        ----------
        runs : iterable of mapping
            Fields of `verification.Run`. One that is there already, of the same task, setup, seed, strategy and ratio,
            is replaced.
        """

        def key(run: Mapping[str, Any]) -> tuple[Any, ...]:
            return tuple(run.get(name) for name in ("task", "setup", "seed", "strategy", "ratio"))

        with self._writing():
            kept = {key(run): dict(run) for run in [*self.replays, *runs]}
            write_json(self.path / "replays.json", list(kept.values()))

    def is_complete(self, task: str) -> bool:
        """Whether every example that the base model could score, or answers right, is measured for the task."""
        if task not in self.tasks:
            return False
        row = self._row(task)
        losses = np.asarray(self._array("r")[row])
        if np.isnan(losses[~np.isnan(self.nll_before)]).any():
            return False
        if not self.has_answers:
            return True
        flips = self._array("r", FLIPS)
        return row < flips.shape[0] and not np.isnan(np.asarray(flips[row])[self.right_before]).any()

    def _sources(self) -> list[str]:
        """Source of each example, without its text; '' where it has none."""
        return pq.read_table(self.path / "pool.parquet", columns=["source"])["source"].fill_null("").to_pylist()

    def _array(self, mode: Any, kind: tuple[str, str] = LOSSES) -> zarr.Array[Any]:
        return zarr.open_array(self.path / kind[0] / kind[1], mode=mode)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the atlas for one writer; the lock goes with the process, so a crash leaves none behind."""
        with (self.path / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"{self.path} is being written by another process; wait for it to end") from None
            yield


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
