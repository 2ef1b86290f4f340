"""The atlas: a forgetting matrix on disk, with its pool, its base scores and the provenance of every row.

    NAME.atlas/
      atlas.json       the base model, the pool's fingerprint, the seals of the two files below; written once
      pool.parquet     the upstream examples
      before.parquet   scores of the base model
      rows/TASK/       immutable parts of a row (see `atlas.rows`), and receipts/, by which a lost part is noticed
      curves/SHARE/    the same two folders for the same fine-tunes after a share of their steps
      replays/         outcomes of fine-tunes with and without replay, one file each, the basis of advised ratios

There is no index that changes: a row is added by one atomic operation, so writers of different rows need no lock, in
a folder, on a shared file system or in an object store.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from forgetcast.atlas import rows, zarr_format
from forgetcast.atlas.index import BEFORE, FORMAT, INDEX, POOL, Index, check_free, now, parse_index
from forgetcast.atlas.matrix import ForgettingMatrix, check_fingerprint
from forgetcast.atlas.replays import read_replays, write_replay
from forgetcast.atlas.rows import FLIPPED, FORGETTING, Row, StoredMatrix
from forgetcast.atlas.storage import Storage, beside, storage_of
from forgetcast.data.formats import read_example
from forgetcast.data.ids import ExampleIndex, labels
from forgetcast.data.pool import Pool
from forgetcast.errors import ConfigError, DataError, MismatchError, MissingExtraError
from forgetcast.files import check_seal, json_bytes, opened_parquet, read_metadata, with_digest
from forgetcast.measure.scores import Baseline, Scores, check_tokens, flips, forgetting

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

Measure = Literal["loss", "exact_match"]

CURVES = "curves"
"""Folder of what was measured after shares of the fine-tunes' steps."""


class Atlas:
    """A forgetting matrix on disk that only grows; use `Atlas.create` or `Atlas.open`.

    Attributes
    ----------
    path : Path or str
        The folder, or the URL.
    """

    def __init__(self, storage: Storage, index: Index) -> None:
        self._storage, self._index = storage, index
        self._rows_in = storage
        self.path = storage.location
        self._checked: set[str] = set()

    @classmethod
    def create(
        cls,
        path: str | Path,
        pool: Pool,
        before: Scores,
        *,
        model: str,
        recipe: Mapping[str, Any] | None = None,
    ) -> Atlas:
        """Create an atlas without tasks.

        Parameters
        ----------
        path : path or URL
            A folder that does not exist yet, or holds no atlas and was begun for one.
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
            If `path` exists, or a base loss is larger than a 32-bit number.
        MismatchError
            If `before` is of another pool, or the creation of an atlas of other scores was begun at `path`.

        Notes
        -----
        Where a process that was stopped, or another one right now, has stored its pool and base scores already, these
        count, so that all writers measure against the same base scores.
        """
        check_fingerprint("the score file", before.pool_fingerprint, pool)
        if tuple(before.ids) != tuple(pool.ids):
            raise MismatchError("the score file and the pool have other examples, or another order; score the pool")
        _as_float32("the base loss", before.nll, pool.ids)
        check_free(path)
        storage = storage_of(path)
        seals = {}
        for name, save in ((POOL, pool.save), (BEFORE, before.save)):
            try:
                with storage.write(name, exclusive=True) as file:
                    seals[name] = _sealed(save, file)
            except FileExistsError:
                stored = storage.local(name, version=now())  # not a copy of what another creation began here earlier
                if name == BEFORE:
                    before = _same_base(Scores.load(stored), before, stored)
                else:
                    check_fingerprint(f"{stored}, of an atlas that was begun,", Pool.load(stored).fingerprint, pool)
                if (seal := check_seal(stored)) is None:
                    raise DataError(f"{stored} is not of an atlas that was begun; move it elsewhere") from None
                seals[name] = seal
        index = Index(
            model=model,
            model_hash=before.metadata.get("model_hash"),
            pool=pool.fingerprint,
            examples=len(pool),
            answers=before.exact_match is not None,
            seals=seals,
            recipe=dict(recipe or {}),
            created=now(),
        )
        atlas = cls(storage, index)
        try:
            atlas._write_index(index, exclusive=True)
        except FileExistsError:
            raise DataError(f"{path} exists already; choose another name, or add to it") from None
        atlas.pool, atlas.before = pool, before
        return atlas

    @classmethod
    def open(cls, path: str | Path) -> Atlas:
        """Open an atlas. Its numbers, texts and base scores stay on disk until they are accessed.

        An atlas of an earlier version is opened too; `convert` brings it to this one.

        Raises
        ------
        DataError
            If there is none, a part of it is missing or damaged, or a newer version wrote it.
        MismatchError
            If the pool or the base scores are not those that the atlas was created with.
        """
        storage = storage_of(path)
        index = parse_index(storage)
        atlas = cls(storage, index)
        for name in (POOL, BEFORE):
            _ = atlas._file(name)
        return atlas

    def _file(self, name: str) -> Path:
        """Return the path of a file that is written once, after checking that it is the one that was written."""
        seal = self._index.seals.get(name)
        try:
            path = self._storage.local(name, version=seal or "")
        except FileNotFoundError:
            raise DataError(f"{self.path} is not a whole atlas: {name} is missing; put it back") from None
        if check_seal(path, pages=False) != seal and self.format == FORMAT:
            raise MismatchError(f"{path} is not the file that the atlas was created with; put it back")
        return path

    def _whole(self, name: str) -> Path:
        """Return the path of a file that is written once, whose bytes were all checked; each file is read once."""
        if name not in self._checked:
            check_seal(self._file(name))
            self._checked.add(name)
        return self._file(name)

    @cached_property
    def pool(self) -> Pool:
        """The upstream examples, read on first access.

        Raises
        ------
        MismatchError
            If the pool file is not the pool that was scored.
        """
        pool = Pool.load(self._file(POOL))
        check_fingerprint(f"the atlas {self.path}", self.pool_fingerprint, pool)
        return pool

    @cached_property
    def before(self) -> Scores:
        """Scores of the base model on the pool, read on first access."""
        return Scores.load(self._file(BEFORE))

    @cached_property
    def examples(self) -> ExampleIndex:
        """Ids of the examples, in column order; their texts stay on disk."""
        return ExampleIndex.from_arrow(self._column(POOL, "id"))

    @cached_property
    def nll_before(self) -> np.ndarray:
        """Loss of the base model on each example, shape (N,), nats per token; NaN where it could not be scored."""
        return np.asarray(self._column(BEFORE, "nll").to_numpy())

    def _column(self, file: str, name: str) -> Any:
        """Read one column of a file that is written once; the others stay on disk. None if there is no such column."""
        with opened_parquet(self._whole(file)) as parquet:
            return parquet.read([name])[name] if name in parquet.schema_arrow.names else None

    @property
    def has_answers(self) -> bool:
        """Whether the base model has exact match, so that flips can be measured."""
        return self._index.answers

    @cached_property
    def baseline(self) -> Baseline:
        """Losses and answers of the base model, as `before` but without the rest of the score file."""
        right = self._column(BEFORE, "exact_match").to_pylist() if self.has_answers else None
        digests = self._column(BEFORE, "digest")
        return Baseline(
            self.examples,
            self.nll_before,
            None if right is None else np.array(right, dtype=np.float64),
            None if digests is None else ExampleIndex.from_arrow(digests),
        )

    @property
    def right_before(self) -> np.ndarray:
        """Whether the base model answers each example right, shape (N,)."""
        right = self.baseline.exact_match
        return np.zeros(len(self.examples), dtype=bool) if right is None else np.asarray(right == 1)

    @property
    def pool_fingerprint(self) -> str:
        """Fingerprint of the pool."""
        return self._index.pool

    @property
    def model(self) -> str:
        """Name or path of the base model."""
        return self._index.model

    @property
    def model_hash(self) -> str | None:
        """Hash of the base model's weights, or None if unknown."""
        return self._index.model_hash

    @cached_property
    def scored_with(self) -> dict[str, Any]:
        """Metadata of the base scores: tokenizer, chat template, dtype, context."""
        return read_metadata(self._file(BEFORE))

    @property
    def format(self) -> int:
        """Version of the format on disk."""
        return self._index.format

    @property
    def created(self) -> str:
        """Time of creation, in ISO 8601."""
        return self._index.created

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe shared by the tasks; empty if they have none in common."""
        return dict(self._index.recipe)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in row order."""
        return tuple(self._by_task)

    @cached_property
    def _by_task(self) -> dict[str, Row | zarr_format.ZarrRow]:
        if self.format == zarr_format.FORMAT:
            return dict(zarr_format.list_rows(self._storage))
        return {row.task: row for row in rows.list_rows(self._rows_in, self._base) if row.exists}

    @property
    def _base(self) -> str:
        """Seal of the base scores, which each part names."""
        return self._index.seals[BEFORE]

    @property
    def shares(self) -> tuple[float, ...]:
        """Shares of their steps after which fine-tunes were measured too, ascending; see `at`.

        Raises
        ------
        DataError
            If a folder of `curves/` is not named after a share.
        """
        return tuple(sorted(parse_share(self._storage, folder) for folder in self._storage.folders(CURVES)))

    def at(self, share: float) -> Atlas:
        """Return the same fine-tunes as they were after a share of their steps, in (0, 1): an atlas of its own rows.

        It has the same pool and base scores. A task may be missing in it, and there may be none.

        Raises
        ------
        ConfigError
            If it is no such share.
        """
        check_share(share)
        self._require_this_format()
        view = copy(self)
        view._rows_in = self._storage.below(f"{CURVES}/{share:g}")
        view.refresh()
        return view

    def refresh(self) -> None:
        """Look again which rows there are: other processes may have added some."""
        self.__dict__.pop("_by_task", None)

    def provenance(self, task: str) -> dict[str, Any]:
        """Return when a row was added, its recipe, the hash of the tuned model, and what else is known of it."""
        return self._row(task).provenance

    @property
    def priors(self) -> tuple[str, ...]:
        """Names of the rows that are of another version of the base model: `merge` took them as priors."""
        return tuple(task for task, row in self._by_task.items() if row.provenance.get("prior") is True)

    def info(self) -> dict[str, Any]:
        """Return what an atlas holds, ready for JSON: base model, pool, size, and of each row how much is measured.

        'measured' is the share of the examples with base scores, 'parts' the number of files of a row, 'dropped' that
        of the files that `compact` would remove, 'priors' that of the rows of another version of the base model.
        """
        scorable = ~np.isnan(self.nll_before)
        found = []
        for task, row in self._by_task.items():
            values = row.read(FORGETTING, 0, self._index.examples)[scorable]
            known = values[~np.isnan(values)]
            found.append(
                {
                    "task": task,
                    "measured": len(known) / max(len(values), 1),
                    "mean_forgetting": float(known.mean(dtype=np.float64)) if len(known) else None,
                    "parts": len(row.parts) if isinstance(row, Row) else 1,
                    "provenance": row.provenance,
                }
            )
        all_rows = rows.list_rows(self._rows_in, self._base) if self.format == FORMAT else []
        return {
            "atlas": str(self.path),
            "format": self.format,
            "model": self.model,
            "model_hash": self.model_hash,
            "pool": self.pool_fingerprint,
            "examples": len(self.examples),
            "unscored": int((~scorable).sum()),
            "answers": self.has_answers,
            "scored_with": self.scored_with,
            "recipe": self.recipe,
            "created": self.created,
            "tasks": len(found),
            "priors": len(self.priors),
            "curves": {f"{share:g}": len(self.at(share).tasks) for share in self.shares},
            "bytes": self._storage.size(),
            "dropped": sum(len(row.dropped) for row in all_rows),
            "rows": found,
        }

    def unfinished(self, task: str) -> Path:
        """Return the path of a file on this machine for what is measured of a row before it can be added."""
        return self._rows_in.scratch(f"{rows.folder_of(task)}.partial")

    def beside(self, what: str) -> Path:
        """Return the path of a folder for runs: next to the atlas, or in the current folder if the atlas is a URL."""
        return beside(self.path, what)

    def __repr__(self) -> str:
        """Path and size."""
        return f"Atlas({self.path}, {len(self.tasks)} tasks x {len(self.examples)} examples)"

    def __contains__(self, task: str) -> bool:
        """Whether there is a row of this name now, whatever process added it."""
        return self._find(task) is not None

    def _find(self, task: str) -> Row | zarr_format.ZarrRow | None:
        """Return a row as it is on disk now, None if there is none; of the others, nothing is listed."""
        if self.format == zarr_format.FORMAT:
            return zarr_format.list_rows(self._storage).get(task)
        found = rows.list_rows(self._rows_in, self._base, rows.folder_of(task))
        return next((row for row in found if row.exists), None)

    def _row(self, task: str) -> Row | zarr_format.ZarrRow:
        listed: dict[str, Row | zarr_format.ZarrRow] = self.__dict__.get("_by_task", {})
        row = listed.get(task) or self._find(task)
        if row is None:
            raise MismatchError(f"the atlas {self.path} has no task {task!r}")
        return row

    def _rows(self, tasks: Iterable[str] | None) -> list[Row | zarr_format.ZarrRow]:
        if tasks is None:
            return list(self._by_task.values())
        names = list(tasks)
        if len(names) > 1:
            _ = self._by_task  # one listing serves them all
        return [self._row(task) for task in names]

    def add(
        self,
        task: str,
        after: Scores,
        *,
        examples: Iterable[str] | None = None,
        recipe: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
        order: int | None = None,
        allow_different_tokens: bool = False,
    ) -> int:
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
        provenance : mapping, optional
            What else is known of the row, ready for JSON: seed, versions, cost.
        order : int, optional
            Place of a new row among the others; default: the time in microseconds, which is after the last one.
        allow_different_tokens : bool
            Whether examples may have been scored on other tokens than by the base model; their number is stored.

        Returns
        -------
        int
            How many losses were not measured before.

        Raises
        ------
        MismatchError
            If an example is unknown, its text is not the one in the atlas's pool, or its tokens are not those that the
            base model was scored on.
        DataError
            If no loss could be measured, or a loss is larger than a 32-bit number; or the name is empty.
        """
        check_name(task)
        ids = after.ids if examples is None else tuple(dict.fromkeys(examples))
        columns = self.columns_of(after, ids, allow_different_tokens=allow_different_tokens)
        if examples is not None:
            after = after.subset(ids)
        measured = {FORGETTING: _as_float32("the forgetting", forgetting(self.baseline, after), ids)}
        if self.has_answers and after.exact_match is not None:
            measured[FLIPPED] = flips(self.baseline, after).astype(np.float32)
        if all(np.isnan(values).all() for values in measured.values()):
            raise DataError(f"the scores after {task!r} have no loss of an example that the base model could score")
        self._require_this_format()
        existing, row = self._find(task), dict[str, np.ndarray]()
        for name, values in measured.items():
            row[name] = np.full(self._index.examples, np.nan, np.float32)
            row[name][columns] = values
            if existing is not None:
                row[name][~np.isnan(existing.read(name, 0, self._index.examples))] = np.nan
        if all(np.isnan(values).all() for values in row.values()):
            return 0
        if existing is not None:
            order = existing.order[0]
        elif order is None:
            order = time.time_ns() // 1000  # after all others, without listing them
        info: dict[str, Any] = {
            **(provenance or {}),
            "name": task,
            "base": self._base,
            "examples": self._index.examples,
            "added": now(),
            "recipe": dict(recipe or {}),
            "model_hash": after.metadata.get("model_hash"),
        }
        # Where they are not allowed, there are none.
        if allow_different_tokens and (different := check_tokens(self.baseline, after, allow_different=True)):
            info["different_tokens"] = different
        rows.write_part(self._rows_in, info, order, row)
        self.refresh()
        return int((~np.isnan(row[FORGETTING])).sum())

    def read_row(self, task: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return all that is known of a row, ready for `write_row` of an atlas with the same examples.

        Returns
        -------
        info : dict
            Its provenance; that of further parts under 'parts'.
        values : dict of str to array, shape (N,) of float32
            'forgetting' and, if the base model has answers, 'flipped'.

        Raises
        ------
        MismatchError
            If there is no such row.
        """
        return self._read_row(self._row(task))

    def _read_row(self, row: Row | zarr_format.ZarrRow) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        columns = (FORGETTING, FLIPPED) if self.has_answers else (FORGETTING,)
        return _joined_info(row), {column: row.read(column, 0, self._index.examples) for column in columns}

    def write_row(self, info: Mapping[str, Any], values: Mapping[str, np.ndarray], order: int) -> None:
        """Store a row, or entries of one, as `read_row` of another atlas returned them; nothing is checked."""
        rows.write_part(self._rows_in, {**info, "base": self._base, "examples": self._index.examples}, order, values)
        self.refresh()

    def drop(self, task: str, *, reason: str = "") -> None:
        """Let a row not count any more, so that its name is free, and its learning curve with it.

        The files stay until `compact`.

        Raises
        ------
        MismatchError
            If there is no such row.
        """
        self._require_this_format()
        self.refresh()
        row = self._row(task)
        assert isinstance(row, Row)
        parts = [*(part.file for part in row.parts), *row.lost]
        rows.drop_parts(self._rows_in, row.folder, parts, {"dropped": now(), "reason": reason})
        self.refresh()
        for view in self._curves():
            if task in view:
                view.drop(task, reason=reason)

    def compact(self) -> int:
        """Join the parts of each row, and remove what does not count any more; return how many files were removed."""
        self._require_this_format()
        self.refresh()
        for row in self._by_task.values():
            assert isinstance(row, Row)
            if len(row.parts) < 2:
                continue
            self.write_row(*self._read_row(row), row.order[0])
            rows.drop_parts(
                self._rows_in, row.folder, [p.file for p in row.parts], {"dropped": now(), "reason": "joined"}
            )
        removed = sum(map(rows.remove_dropped, rows.list_rows(self._rows_in, self._base)))
        self.refresh()
        removed += sum(view.compact() for view in self._curves())
        return removed + zarr_format.remove(self._storage)

    def _curves(self) -> Iterator[Atlas]:
        """Yield the atlas at each share; of one that is such a view itself, nothing."""
        if self._rows_in is self._storage:
            yield from map(self.at, self.shares)

    def _require_this_format(self) -> None:
        """Convert an atlas of an earlier version before it is changed."""
        if self.format != FORMAT:
            self.convert()

    def convert(self) -> None:
        """Convert an atlas of an earlier version in its place; what it was made of stays until `compact`.

        An interrupted conversion leaves the old atlas, and can be repeated.
        """
        if self.format == FORMAT:
            return
        pool, before = self.pool, self.before
        seals = {}
        for name, save in ((POOL, pool.save), (BEFORE, before.save)):
            with self._storage.write(name) as file:
                seals[name] = _sealed(save, file)
        zarr_format.copy_rows(self._storage, seals[BEFORE], self._index.examples)
        for run in self.replays:
            write_replay(self._storage, run)
        index = self._index.model_copy(update={"format": FORMAT, "seals": seals})
        self._write_index(index)
        self._index = index
        self.refresh()

    def _write_index(self, index: Index, *, exclusive: bool = False) -> None:
        with self._storage.write(INDEX, exclusive=exclusive) as file:
            file.write_bytes(json_bytes(with_digest(index.model_dump())))

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

        ids = list(ids)
        positions = np.unique(self.examples.positions(ids, where=where))
        tables, start = [], 0
        with opened_parquet(self._whole(POOL)) as file:
            for group in range(file.num_row_groups):
                end = start + file.metadata.row_group(group).num_rows
                if len(inside := positions[(positions >= start) & (positions < end)]):
                    tables.append(file.read_row_group(group).take(pa.array(inside - start)))
                start = end
        return Pool(read_example(row) for table in tables for row in table.to_pylist()).subset(ids)

    def hold_out(self, share: float, *, seed: int = 0, exclude: Iterable[str] = ()) -> tuple[str, ...]:
        """Choose ids as `Pool.hold_out` does, none that the base model could not score; others take their place."""
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

    def _flips(self, chosen: Sequence[Row | zarr_format.ZarrRow]) -> ForgettingMatrix:
        if not self.has_answers:
            raise DataError(f"the atlas {self.path} has no answers; collect one with exact_match: true")
        columns = np.flatnonzero(self.right_before)
        if not len(columns):
            raise DataError(f"the atlas {self.path}: the base model answers nothing right, so it can forget no answer")
        sources = self.sources
        values = [row.read(FLIPPED, 0, self._index.examples)[columns] for row in chosen]
        return ForgettingMatrix(
            np.reshape(values, (len(chosen), len(columns))),
            tasks=[row.task for row in chosen],
            examples=[self.examples[i] for i in columns.tolist()],
            sources=[sources[i] for i in columns.tolist()],
            pool_fingerprint=self.pool_fingerprint,
            groups=[_group(row) for row in chosen],
        )

    def others(self, task: str | None) -> tuple[str, ...]:
        """Return the names of the rows that are not of a task: neither its row nor another seed or checkpoint of it."""
        known = self._by_task.get(task) if task is not None else None
        same = {task} if known is None else {task, _group(known)}
        return tuple(name for name, row in self._by_task.items() if name not in same and _group(row) not in same)

    def stored(self, tasks: Iterable[str] | None = None) -> StoredMatrix:
        """Return all rows, or those of `tasks`, on disk, to be read by blocks of columns."""
        chosen = self._rows(tasks)
        return StoredMatrix(
            chosen,
            examples=self.examples,
            sources=lambda: self.sources,
            pool_fingerprint=self.pool_fingerprint,
            groups=lambda: [_group(row) for row in chosen],
        )

    def to_pandas(self) -> pd.DataFrame:
        """Return the forgetting matrix as a pandas frame, tasks by examples."""
        import pandas as pd

        matrix = self.matrix()
        return pd.DataFrame(
            matrix.values,
            index=pd.Index(matrix.tasks, name="task"),
            columns=pd.Index(matrix.examples, name="example"),
        )

    def to_xarray(self) -> xr.Dataset:
        """Return an xarray data set with `forgetting` and `before`, by task, example and source.

        It has `flipped` too, if the base model has answers: 1 where a right answer became wrong, 0 where it stayed
        right, NaN where it was not right before or not measured.
        """
        try:
            import xarray as xr
        except ImportError as error:
            raise MissingExtraError("xarray", error) from None

        matrix = self.matrix()
        variables: dict[str, Any] = {
            "forgetting": (("task", "example"), matrix.values),
            "before": ("example", self.nll_before),
        }
        if self.has_answers:
            answers = [row.read(FLIPPED, 0, self._index.examples) for row in self._by_task.values()]
            variables["flipped"] = (("task", "example"), np.reshape(answers, matrix.shape))
        dataset = xr.Dataset(variables)
        dataset.forgetting.attrs.update(units="nats per token", sign="positive = forgotten")
        return dataset.assign_coords(
            task=list(matrix.tasks), example=list(matrix.examples), source=("example", list(matrix.sources))
        )

    @property
    def replays(self) -> list[dict[str, Any]]:
        """Outcomes kept by `add_replays`, oldest first."""
        if self.format == zarr_format.FORMAT:
            return zarr_format.replays(self._storage)
        return read_replays(self._storage)

    def add_replays(self, runs: Iterable[Mapping[str, Any]]) -> None:
        """Keep the outcomes of fine-tunes with and without replay.

        Parameters
        ----------
        runs : iterable of mapping
            Fields of `outcome.Run`. A run replaces an earlier one of the same task, setup, seed, strategy and
            ratio.
        """
        self._require_this_format()
        for run in runs:
            write_replay(self._storage, run)

    def is_complete(self, task: str, *, share: float = 1.0) -> bool:
        """Return whether a task is measured.

        It is if every example that the base model could score, or answers right, is measured, or if a part of the row
        says in its provenance that at least `share` of the pool is `finished`: measured as far as the tuned model can
        be scored.
        """
        self.refresh()
        if (row := self._find(task)) is None:
            return False
        if isinstance(row, Row) and row.finished >= share:
            return True
        count = self._index.examples
        if np.isnan(row.read(FORGETTING, 0, count)[~np.isnan(self.nll_before)]).any():
            return False
        return not self.has_answers or not np.isnan(row.read(FLIPPED, 0, count)[self.right_before]).any()

    @property
    def sources(self) -> list[str]:
        """Return the source of each example; '' where it has none."""
        return list(labels(self._column(POOL, "source")))


def _group(row: Row | zarr_format.ZarrRow) -> str:
    """Return the name that the rows of one task or one run share: those of several seeds, or of several checkpoints."""
    return str(row.provenance.get("run") or row.provenance.get("task") or row.task)


def _joined_info(row: Row | zarr_format.ZarrRow) -> dict[str, Any]:
    """Return the provenance of a row's first part, with that of the others under 'parts'."""
    if not isinstance(row, Row):
        return row.provenance
    first, *others = [part.info.model_dump() for part in row.by_time]
    return {**first, "finished": row.finished, "parts": [*first.get("parts", []), *others]} if others else first


def _sealed(save: Callable[[Path], None], path: Path) -> str:
    """Save to a path, and return the seal of the file."""
    save(path)
    seal = check_seal(path, pages=False)
    assert seal is not None, "pools and scores are saved as sealed Parquet files"
    return seal


def _same_base(stored: Scores, before: Scores, path: Path) -> Scores:
    """Return the base scores of another process's atlas that was begun, after checking that they are of this model."""

    def facts(scores: Scores) -> list[Any]:
        known = [scores.metadata.get(name) for name in ("pool", "model_hash", "tokens", "dtype", "max_new_tokens")]
        return [*known, tuple(scores.ids), scores.exact_match is not None]

    if facts(stored) != facts(before):
        raise MismatchError(
            f"{path} is of an atlas that was begun with another base model or other settings; remove it"
        )
    return stored


def check_name(task: str) -> None:
    """Raise DataError if a row cannot have this name."""
    if not task:
        raise DataError("a task needs a name")
    try:
        task.encode()
    except UnicodeEncodeError:
        raise DataError(f"the name of the task {task!r} is not Unicode text; rename it") from None


def check_share(share: float) -> None:
    """Raise ConfigError if a share of a fine-tune's steps is not between 0 and 1, or is no number of six digits."""
    if not 0 < share < 1 or float(f"{share:g}") != share:
        raise ConfigError(f"a share of the steps is above 0 and below 1, of six digits at most, not {share}")


def parse_share(storage: Storage, folder: str) -> float:
    """Return the share that a folder of `curves/` is of; raise DataError if its name is none."""
    try:
        check_share(share := float(folder))
    except (ValueError, ConfigError):
        share = 0.0
    if f"{share:g}" != folder:
        raise DataError(f"{storage}/{CURVES}/{folder} is not named after a share of a fine-tune; move it elsewhere")
    return share


def _as_float32(what: str, values: np.ndarray, ids: Sequence[str]) -> np.ndarray:
    """Return the values as they are stored; raise DataError if one does not fit."""
    with np.errstate(over="ignore"):
        stored = values.astype(np.float32)
    if np.isinf(stored).any():
        at = int(np.argmax(np.isinf(stored)))
        raise DataError(f"{what} of example {ids[at]!r} is {values[at]:g}: too large to be stored as a 32-bit number")
    return stored
