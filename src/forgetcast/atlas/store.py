"""The atlas: a forgetting matrix on disk, with its pool, its base scores and the provenance of every row.

    NAME.atlas/
      atlas.json       the base model, the pool's fingerprint, and the tasks in row order
      pool.parquet     the upstream examples
      before.parquet   scores of the base model
      numbers.zarr/    forgetting: (task, example) float32, nats per token, NaN where not measured
      answers.zarr/    flipped: (task, example) float32, 1 where a right answer became wrong, 0 where it stayed right,
                       NaN where it was not right before or not measured; only if the base model has exact match
      replays.json     outcomes of fine-tunes with and without replay, the basis of advised ratios; only if any

A row is written first and then named in atlas.json, by one atomic replacement. So a crash at any byte leaves an atlas
that opens: a row that is not named is ignored and overwritten; a named row whose new entries were cut short keeps the
old ones. There is one writer at a time; a second one is refused.
"""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from forgetcast.atlas.columns import BLOCK, StoredMatrix, has_column, read_column
from forgetcast.atlas.matrix import ForgettingMatrix, check_fingerprint
from forgetcast.data.formats import read_example
from forgetcast.data.ids import ExampleIndex, labels
from forgetcast.data.pool import Pool
from forgetcast.errors import DataError, MismatchError
from forgetcast.files import read_json, read_metadata, umask, write_json
from forgetcast.measure.scores import Baseline, Scores, check_tokens, flips, forgetting

if TYPE_CHECKING:
    import xarray as xr
    import zarr

FORMAT = 1

LOSSES, FLIPS = ("numbers.zarr", "forgetting"), ("answers.zarr", "flipped")
"""Group and array of the two measures of forgetting: by the loss, and by exact match."""

Measure = Literal["loss", "exact_match"]


class Atlas:
    """A forgetting matrix on disk that only grows; use `Atlas.create` or `Atlas.open`."""

    def __init__(self, path: Path, index: dict[str, Any]) -> None:
        self.path = path
        self._index = index

    @cached_property
    def pool(self) -> Pool:
        """The upstream examples, read on first access.

        Raises
        ------
        MismatchError
            If the pool file is not the pool that was scored.
        """
        pool = Pool.load(self.path / "pool.parquet")
        check_fingerprint(f"the atlas {self.path}", self.pool_fingerprint, pool)
        return pool

    @cached_property
    def before(self) -> Scores:
        """Scores of the base model on the pool, read on first access."""
        return Scores.load(self.path / "before.parquet")

    @cached_property
    def examples(self) -> ExampleIndex:
        """Ids of the examples, in column order; their texts stay on disk."""
        return ExampleIndex.from_arrow(read_column(self.path / "pool.parquet", "id"))

    @cached_property
    def nll_before(self) -> np.ndarray:
        """Loss of the base model on each example, shape (N,), nats per token; NaN where it could not be scored."""
        return np.asarray(read_column(self.path / "before.parquet", "nll").to_numpy())

    @cached_property
    def has_answers(self) -> bool:
        """Whether the base model has exact match, so that flips can be measured."""
        return (self.path / FLIPS[0]).is_dir()

    @cached_property
    def baseline(self) -> Baseline:
        """Losses and answers of the base model, as `before` but without the rest of the score file."""
        path = self.path / "before.parquet"
        right = read_column(path, "exact_match").to_pylist() if self.has_answers else None
        return Baseline(
            self.examples,
            self.nll_before,
            None if right is None else np.array(right, dtype=np.float64),
            ExampleIndex.from_arrow(read_column(path, "digest")) if has_column(path, "digest") else None,
        )

    @property
    def right_before(self) -> np.ndarray:
        """Whether the base model answers each example right, shape (N,)."""
        right = self.baseline.exact_match
        return np.zeros(len(self.examples), dtype=bool) if right is None else np.asarray(right == 1)

    @classmethod
    def create(
        cls, path: str | Path, pool: Pool, before: Scores, *, model: str, recipe: Mapping[str, Any] | None = None
    ) -> Atlas:
        """Create an atlas without tasks.

        Parameters
        ----------
        path : path
            A directory that does not exist yet.
        pool : Pool
        before : Scores
            Scores of the base model on exactly this pool.
        model : str
            Name or path of the base model.
        recipe : mapping, optional
            The recipe shared by all tasks, for provenance.

        Raises
        ------
        DataError
            If `path` exists.
        MismatchError
            If `before` is of another pool.
        """
        import zarr

        path = Path(path)
        if path.exists():
            raise DataError(f"{path} exists already; open it, or choose another name")
        if before.pool_fingerprint is not None:
            check_fingerprint("the score file", before.pool_fingerprint, pool)
        if before.ids != pool.ids:
            raise MismatchError("the scores before fine-tuning must cover the pool's examples, in its order")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Built next to its place and renamed, so that a partial atlas never has the name.
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
        """Open an atlas. Its numbers, texts and base scores stay on disk until they are accessed.

        Raises
        ------
        DataError
            If there is none, a part of it is missing, or a newer version wrote it.
        MismatchError
            If the pool or the base scores differ from the atlas in the number of examples.
        """
        import pyarrow.parquet as pq

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
        """Name or path of the base model."""
        return str(self._index["model"])

    @property
    def model_hash(self) -> str | None:
        """Hash of the base model's weights, or None if unknown."""
        return self._index["model_hash"]

    @cached_property
    def scored_with(self) -> dict[str, Any]:
        """Metadata of the base scores: tokenizer, chat template, dtype, context."""
        return read_metadata(self.path / "before.parquet")

    @property
    def created(self) -> str:
        """Time of creation, in ISO 8601."""
        return str(self._index["created"])

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe shared by the tasks."""
        return dict(self._index["recipe"])

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in row order."""
        return tuple(task["name"] for task in self._index["tasks"])

    def provenance(self, task: str) -> dict[str, Any]:
        """Return the provenance of a task: name, time of addition, recipe and hash of the tuned model."""
        return dict(self._index["tasks"][self._row(task)])

    def __repr__(self) -> str:
        """Path and size."""
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
        allow_different_tokens: bool = False,
    ) -> None:
        """Add the measurements of a task: a whole row, or some entries of one.

        Parameters
        ----------
        task : str
            A new name, or one whose row is to be completed. Entries that are measured already are kept.
        after : Scores
            Scores of the tuned model on the pool or a part of it.
        examples : iterable of str, optional
            Ids to use of `after`; default all.
        recipe : mapping, optional
            How the model was tuned.
        allow_different_tokens : bool
            Whether examples may have been scored on other tokens than by the base model; their number is stored.

        Raises
        ------
        MismatchError
            If an example is unknown, its text is not the one in the atlas's pool, or its tokens are not those that the
            base model was scored on.
        """
        if not task:
            raise DataError("a task needs a name")
        ids = after.ids if examples is None else tuple(dict.fromkeys(examples))
        columns = self.columns_of(after, ids, allow_different_tokens=allow_different_tokens)
        if examples is not None:
            after = after.subset(ids)
        measured = {LOSSES: forgetting(self.baseline, after)}
        if self.has_answers and after.exact_match is not None:
            measured[FLIPS] = flips(self.baseline, after)
        with self._writing():
            self._index = read_json(self.path / "atlas.json")
            new = task not in self.tasks
            row = len(self.tasks) if new else self._row(task)
            for place, added in measured.items():
                array = self._array("r+", place)
                exists = not new and row < array.shape[0]
                values = np.asarray(array[row]) if exists else np.full(len(self.examples), np.nan, np.float32)
                missing = np.isnan(values[columns])
                values[columns[missing]] = added[missing].astype(np.float32)
                if array.shape[0] <= row:
                    array.resize((row + 1, len(self.examples)))
                array[row] = values
            if new:
                entry: dict[str, Any] = {"name": task, "added": _now(), "recipe": dict(recipe or {})}
                entry["model_hash"] = after.metadata.get("model_hash")
                # Where they are not allowed, there are none.
                if allow_different_tokens and (different := check_tokens(self.baseline, after, allow_different=True)):
                    entry["different_tokens"] = different
                index = {**self._index, "tasks": [*self._index["tasks"], entry]}
                write_json(self.path / "atlas.json", index)
                self._index = index

    def columns_of(
        self, scores: Scores, ids: Iterable[str] | None = None, *, allow_different_tokens: bool = False
    ) -> np.ndarray:
        """Return the columns of the scored examples, shape (k,), after checking their texts and tokens.

        Raises
        ------
        MismatchError
            If an example is unknown, has the text of another pool, or other tokens than the base model was scored on.
        """
        where = "the score file"
        columns = self.examples.positions(scores.ids if ids is None else ids, where=where)
        if scores.pool_fingerprint not in (None, self.pool_fingerprint):
            check_fingerprint(where, scores.pool_fingerprint, self.subset(scores.ids, where=where))
        check_tokens(self.baseline, scores, allow_different=allow_different_tokens)
        return columns

    def subset(self, ids: Iterable[str], *, where: str = "the request") -> Pool:
        """Return a pool of the examples with these ids, in the order of `ids`; only their texts are read.

        Raises
        ------
        MismatchError
            If an id is unknown.
        """
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.dataset as pads

        ids = list(ids)
        self.examples.positions(ids, where=where)
        rows = pads.dataset(self.path / "pool.parquet").to_table(filter=pc.field("id").isin(pa.array(ids, pa.string())))
        return Pool(read_example(row) for row in rows.to_pylist()).subset(ids)

    def hold_out(self, share: float, *, seed: int = 0, exclude: Iterable[str] = ()) -> tuple[str, ...]:
        """Choose ids as `Pool.hold_out` does, without those that the base model could not score."""
        unscored = self.pool.ids.select(np.flatnonzero(np.isnan(self.nll_before)))
        return self.pool.hold_out(share, seed=seed, exclude=[*exclude, *unscored])

    def matrix(self, tasks: Iterable[str] | None = None, *, measure: Measure = "loss") -> ForgettingMatrix:
        """Read all rows, or those of `tasks`, into memory.

        Parameters
        ----------
        tasks : iterable of str, optional
        measure : 'loss' or 'exact_match'
            By exact match, forgetting is 1 where a right answer became wrong and 0 where it stayed right, over the
            examples that the base model answers right (Jin and Ren, 2025).

        Raises
        ------
        DataError
            If exact match was not measured, or the base model answers nothing right.
        """
        return self._flips(self._rows(tasks)) if measure == "exact_match" else self.stored(tasks).load()

    def _flips(self, rows: list[int]) -> ForgettingMatrix:
        if not self.has_answers:
            raise DataError(f"the atlas {self.path} has no answers; collect one with exact_match: true")
        columns = np.flatnonzero(self.right_before)
        if not len(columns):
            raise DataError(f"the atlas {self.path}: the base model answers nothing right, so it can forget no answer")
        values, array = np.full((len(rows), len(columns)), np.nan, np.float32), self._array("r", FLIPS)
        for i, row in enumerate(rows):
            if row < array.shape[0]:  # else no answers were measured for this task or a later one
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
        """Return all rows, or those of `tasks`, on disk, to be read by blocks of columns."""
        rows = self._rows(tasks)
        return StoredMatrix(
            self._array("r"),
            rows,
            tasks=[self.tasks[row] for row in rows],
            examples=self.examples,
            sources=self._sources,
            pool_fingerprint=self.pool_fingerprint,
        )

    def dataset(self) -> xr.Dataset:
        """Return a lazy xarray data set with `forgetting` and `before`, by task, example and source.

        It has `flipped` too, if exact match was measured for all tasks.
        """
        import xarray as xr

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
        """Outcomes kept by `add_replays`, oldest first."""
        path = self.path / "replays.json"
        runs = read_json(path) if path.exists() else []
        if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
            raise DataError(f"{path} is not a list of fine-tunes; remove it, and verify or pilot again")
        return runs

    def add_replays(self, runs: Iterable[Mapping[str, Any]]) -> None:
        """Keep the outcomes of fine-tunes with and without replay.

        Parameters
        ----------
        runs : iterable of mapping
            Fields of `outcome.Run`. A run replaces an earlier one of the same task, setup, seed, strategy and
            ratio.
        """

        def key(run: Mapping[str, Any]) -> tuple[Any, ...]:
            return tuple(run.get(name) for name in ("task", "setup", "seed", "strategy", "ratio"))

        with self._writing():
            kept = {key(run): dict(run) for run in [*self.replays, *runs]}
            write_json(self.path / "replays.json", list(kept.values()))

    def is_complete(self, task: str) -> bool:
        """Return whether every example that the base model could score, or answers right, is measured for the task."""
        if task not in self.tasks:
            return False
        row = self._row(task)
        losses = np.asarray(self._array("r")[row])
        if np.isnan(losses[~np.isnan(self.nll_before)]).any():
            return False
        if not self.has_answers:
            return True
        array = self._array("r", FLIPS)
        return row < array.shape[0] and not np.isnan(np.asarray(array[row])[self.right_before]).any()

    def _sources(self) -> list[str]:
        """Return the source of each example; '' where it has none."""
        return list(labels(read_column(self.path / "pool.parquet", "source")))

    def _array(self, mode: Any, place: tuple[str, str] = LOSSES) -> zarr.Array[Any]:
        import zarr

        return zarr.open_array(self.path / place[0] / place[1], mode=mode)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Lock the atlas for one writer; the lock ends with the process, so a crash leaves none."""
        with (self.path / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"{self.path} is being written by another process; wait for it to end") from None
            yield


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
