"""Rows of an atlas on disk: immutable parts, each bound by its name to its bytes and to its row.

    rows/TASK/000004-SEAL.parquet     a part: `forgetting` and, with answers, `flipped`, float32, NaN = not measured;
                                      of all examples in the pool's order, or with a column `example` of positions
    rows/TASK/dropped-DIGEST.json     names parts that do not count any more
    receipts/TASK/FILE                empty; for each file above, so that a lost one is an error and not a lost row

A part is stored by one atomic operation, so writers need no lock. Where two parts measured the same entry, the first
one added counts.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol
from urllib.parse import quote, unquote

import numpy as np
from pydantic import BaseModel, ConfigDict

from forgetcast.atlas.matrix import ForgettingMatrix
from forgetcast.atlas.storage import Storage
from forgetcast.errors import DataError
from forgetcast.files import (
    check_digest,
    check_groups,
    check_seal,
    json_bytes,
    opened_parquet,
    parse_json,
    read_metadata,
    with_digest,
    write_parquet,
)
from forgetcast.results import validated

BLOCK = 65_536
"""Examples in a row group, so that a block of columns is read alone."""

CHECKED_WHOLE = 1 << 23
"""Bytes up to which a part is checked as a whole when it is opened; of a larger one, the footer, and each row group
that is read."""

OTHERS = "~replays"
"""Folder of receipts of what is no row; no task's folder starts so."""

FORGETTING, FLIPPED, POSITION = "forgetting", "flipped", "example"

_LONGEST = 100
_PART = re.compile(r"(\d{6,})-([0-9a-f]{32})\.parquet")
_DROPPED = re.compile(r"dropped-[0-9a-f]{16}\.json")


def folder_of(task: str) -> str:
    """Return the name of a task's folder: its own, with signs that file systems refuse as %XX, and long ones cut."""
    folder = quote(task, safe="").replace("~", "%7E")
    if folder[:1] == ".":
        folder = f"%2E{folder[1:]}"
    if len(folder) <= _LONGEST:
        return folder
    return f"{folder[: _LONGEST // 2].rstrip('%')}~{hashlib.sha256(task.encode()).hexdigest()[:16]}"


class PartInfo(BaseModel):
    """Metadata of a part: where it belongs, and where its numbers come from.

    With the part, the share `finished` of the pool is measured as far as the tuned model can be scored on it.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    base: str
    examples: int
    added: str
    recipe: dict[str, Any] = {}
    model_hash: str | None = None
    finished: float = 0.0


class Part:
    """One immutable file of a row; its metadata and numbers are read when they are asked for."""

    def __init__(self, storage: Storage, base: str, folder: str, file: str) -> None:
        match = _PART.fullmatch(file)
        if match is None:
            raise DataError(f"{storage}/rows/{folder}/{file} is no part of an atlas; move it elsewhere")
        self.file, self.folder, self.order, self._seal = file, folder, int(match[1]), match[2]
        self._storage, self._base = storage, base
        self._footer: Any = None

    @cached_property
    def path(self) -> Any:
        """Path of the file or of a copy, after checking that its bytes are those that its name says."""
        name = f"rows/{self.folder}/{self.file}"
        try:
            path = self._storage.local(name)
        except FileNotFoundError:
            raise DataError(f"{self._storage}/{name} is missing; put it back") from None
        self._whole = path.stat().st_size <= CHECKED_WHOLE
        seal = check_seal(path, pages=self._whole)
        if seal is None or not seal.startswith(self._seal):
            raise DataError(f"{path} holds other numbers than its name says; put back a copy of it")
        return path

    @cached_property
    def info(self) -> PartInfo:
        """Metadata, after checking that the part belongs to the row in whose folder it is."""
        info = validated(PartInfo, read_metadata(self.path), str(self.path))
        if folder_of(info.name) != self.folder:
            where = f"{self.path} is a part of the row {info.name!r}"
            if folder_of(info.name).casefold() == self.folder.casefold():
                raise DataError(
                    f"{where}, whose name differs in case, which this file system ignores; choose another name, or "
                    "keep the atlas where case counts"
                )
            raise DataError(f"{where}; move it back")
        if info.base != self._base:
            raise DataError(f"{self.path} was measured against other base scores; move it back to its atlas")
        return info

    def overlay(self, column: str, first: int, values: np.ndarray) -> None:
        """Write what the part has of a column into `values`, shape (n,): the examples from `first` on."""
        _ = self.info
        last = first + len(values)
        # Row groups of a large part are checked below, which covers their pages.
        with opened_parquet(self.path, pages=self._whole, metadata=self._footer) as file:
            self._footer = file.metadata
            names = file.schema_arrow.names
            if column not in names:
                return
            dense = POSITION not in names
            groups = (
                list(range(first // BLOCK, -(-last // BLOCK)))
                if dense
                else [group for group in range(file.num_row_groups) if self._overlaps(group, first, last)]
            )
            if not self._whole:
                check_groups(self.path, self._footer.metadata, groups)
            table = file.read_row_groups(groups, columns=[column] if dense else [POSITION, column], use_threads=False)
        found = table[column].to_numpy()
        if dense:
            found = found[first - groups[0] * BLOCK :][: len(values)] if groups else found
            np.copyto(values[: len(found)], found, where=~np.isnan(found))
        else:
            positions = table[POSITION].to_numpy()
            use = (positions >= first) & (positions < last) & ~np.isnan(found)
            values[positions[use] - first] = found[use]

    def _overlaps(self, group: int, first: int, last: int) -> bool:
        statistics = self._footer.row_group(group).column(0).statistics
        return bool(statistics.min < last and statistics.max >= first)


@dataclass
class Row:
    """The files of one row.

    Attributes
    ----------
    folder : str
    parts : list of Part
        Those that count, in the order of their names.
    lost : list of str
        Files that were stored and are not there.
    dropped : list of str
        Files that do not count any more, and those that say so.
    """

    storage: Storage
    folder: str
    parts: list[Part] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    @cached_property
    def task(self) -> str:
        """Name of the task; that of the folder if all parts are lost."""
        return self.parts[0].info.name if "~" in self.folder and self.parts else unquote(self.folder)

    @property
    def exists(self) -> bool:
        """Whether there is something that counts, or was lost."""
        return bool(self.parts or self.lost)

    @property
    def order(self) -> tuple[int, str]:
        """Key by which rows are sorted."""
        files = [*(part.file for part in self.parts), *self.lost]
        return min((int(match[1]) for file in files if (match := _PART.fullmatch(file))), default=0), self.folder

    @cached_property
    def by_time(self) -> list[Part]:
        """Parts in the order in which they were added; raises DataError if one is lost."""
        if self.lost:
            raise DataError(
                f"the row {self.task!r} of {self.storage} has lost rows/{self.folder}/{self.lost[0]}; put back a copy "
                f"of the file, or give the row up with: forgetcast atlas drop {atlas_of(self.storage)} {self.task}"
            )
        return sorted(self.parts, key=lambda part: (part.info.added, part.file)) if len(self.parts) > 1 else self.parts

    @property
    def provenance(self) -> dict[str, Any]:
        """Metadata of the part added first."""
        return self.by_time[0].info.model_dump()

    @property
    def finished(self) -> float:
        """Share of the pool that is measured as far as the tuned model can be scored on it; 0 if no part says so."""
        return max((part.info.finished for part in self.by_time), default=0.0)

    def read(self, column: str, first: int, last: int) -> np.ndarray:
        """Return a column for the examples from `first` to `last`, shape (last - first,) of float32."""
        values = np.full(last - first, np.nan, np.float32)
        for part in reversed(self.by_time):  # what was added first is written last
            part.overlay(column, first, values)
        return values


def atlas_of(storage: Storage) -> str:
    """Return what the user calls the atlas that has a storage of rows; that of a learning curve is a folder of it."""
    return re.sub(r"/curves/[^/]+$", "", str(storage))


def list_rows(storage: Storage, base: str, folder: str = "") -> list[Row]:
    """List the rows, sorted, or the one in `folder`, those without parts that count too.

    Parameters
    ----------
    storage : Storage
    base : str
        Seal of the base scores that the rows were measured against.
    folder : str

    Raises
    ------
    DataError
        If there is a file that does not belong there.
    """
    rows = _listed(storage, base, folder)
    # Compacting removes files while we look: only what is missing twice is lost.
    if rows is None or any(row.lost for row in rows):
        rows = _listed(storage, base, folder)
    if rows is None:
        raise DataError(f"{storage} is being compacted by another process; try again when it has ended")
    return rows


def _listed(storage: Storage, base: str, folder: str) -> list[Row] | None:
    """List the rows; None if a file vanished meanwhile."""
    # Receipts first: each of them is stored after its file.
    receipts: dict[str, set[str]] = defaultdict(set)
    for name in storage.names(f"receipts/{folder}" if folder else "receipts"):
        _, row_folder, file = name.split("/") if name.count("/") == 2 else ("", "", "")
        if not file:
            raise DataError(f"{storage}/{name} is no receipt; move it elsewhere")
        if row_folder != OTHERS:
            receipts[row_folder].add(file)
    present: dict[str, set[str]] = defaultdict(set)
    for name in storage.names(f"rows/{folder}" if folder else "rows"):
        _, row_folder, file = name.split("/", 2) if name.count("/") >= 2 else ("", "", name)
        if not row_folder or not is_row_file(file):
            raise DataError(f"{storage}/{name} is no part of an atlas; move it elsewhere")
        present[row_folder].add(file)
    try:
        rows = [_row(storage, base, name, present[name], receipts[name]) for name in {*present, *receipts}]
    except FileNotFoundError:
        return None
    return sorted(rows, key=lambda row: row.order)


def _row(storage: Storage, base: str, folder: str, present: set[str], receipts: set[str]) -> Row:
    dropped: set[str] = set()
    for file in present:
        if _DROPPED.fullmatch(file):
            dropped |= {file, *read_dropped(storage, folder, file)}
    parts = [Part(storage, base, folder, file) for file in sorted(present - dropped)]
    return Row(storage, folder, parts, sorted(receipts - present - dropped), sorted(dropped & present))


def is_row_file(file: str) -> bool:
    """Say whether a file may be in the folder of a row, by its name."""
    return bool(_PART.fullmatch(file) or _DROPPED.fullmatch(file))


def read_dropped(storage: Storage, folder: str, file: str) -> list[str]:
    """Return the parts of a row that a file says do not count any more; raise DataError if it is damaged."""
    where = f"{storage}/rows/{folder}/{file}"
    content = check_digest(parse_json(storage.read(f"rows/{folder}/{file}"), where), where)
    parts: list[str] = content["parts"]
    return parts


def write_part(
    storage: Storage,
    info: Mapping[str, Any],
    order: int,
    values: Mapping[str, np.ndarray],
) -> None:
    """Store a part: with the positions of what is measured, where that takes less space than a column with gaps.

    Parameters
    ----------
    storage : Storage
    info : mapping
        Fields of `PartInfo`, and more.
    order : int
        Where the row is among the others; those of one place are sorted by name.
    values : mapping of str to array, shape (N,) of float32
        By column; NaN where not measured.
    """
    import pyarrow as pa

    positions = np.flatnonzero(~np.logical_and.reduce([np.isnan(column) for column in values.values()]))
    if 2 * len(positions) < info["examples"]:
        columns = {POSITION: pa.array(positions, pa.int32())}
        columns |= {name: pa.array(column[positions], pa.float32()) for name, column in values.items()}
    else:
        columns = {name: pa.array(column, pa.float32()) for name, column in values.items()}
    table = pa.table(columns, schema=pa.schema([pa.field(n, c.type, nullable=False) for n, c in columns.items()]))
    folder = folder_of(info["name"])
    groups = (table.slice(start, BLOCK) for start in range(0, max(len(table), 1), BLOCK))
    options: dict[str, Any] = {"compression": "lz4", "use_dictionary": False, "write_statistics": [POSITION]}
    file = io.BytesIO()
    seal = write_parquet(groups, table.schema, file, info, **options)
    _store(storage, folder, f"{order:06d}-{seal[:32]}.parquet", file.getbuffer())


def drop_parts(storage: Storage, folder: str, parts: Sequence[str], facts: Mapping[str, Any]) -> None:
    """Let parts of a row not count any more; their files stay."""
    content = json_bytes(with_digest({"parts": sorted(parts), **facts}))
    _store(storage, folder, f"dropped-{hashlib.sha256(content).hexdigest()[:16]}.json", content)


def remove_dropped(row: Row) -> int:
    """Remove the files of a row that do not count any more, and return how many."""
    # What says so goes last: a crash leaves parts that are still known as dropped.
    files = sorted(row.dropped, key=lambda file: _DROPPED.fullmatch(file) is not None)
    for file in files:
        row.storage.remove(f"receipts/{row.folder}/{file}")
        row.storage.remove(f"rows/{row.folder}/{file}")
    return len(files)


def _store(storage: Storage, folder: str, file: str, content: bytes | memoryview) -> None:
    with storage.write(f"rows/{folder}/{file}") as path:
        path.write_bytes(content)
    # A crash before this leaves a part that counts; only its loss would go unnoticed.
    storage.mark(f"receipts/{folder}/{file}")


class ReadableRow(Protocol):
    """What is read of a row, whatever its format on disk."""

    @property
    def task(self) -> str:
        """Name of the task."""

    def read(self, column: str, first: int, last: int) -> np.ndarray:
        """Return a column for the examples from `first` to `last`, shape (last - first,) of float32."""


class StoredMatrix:
    """Rows of a forgetting matrix on disk, read by blocks of columns.

    Parameters
    ----------
    rows : sequence of rows, length M
    examples : sequence of str, length N
    sources : callable
        Returns the source of each example; called by `load` only.
    pool_fingerprint : str
    groups : callable
        Returns the names that rows of one task share; see `ForgettingMatrix`.

    Attributes
    ----------
    examples : sequence of str, length N
    shape : (M, N)
    size : int
    dtype : numpy dtype
    """

    dtype = np.dtype(np.float32)

    def __init__(
        self,
        rows: Sequence[ReadableRow],
        *,
        examples: Sequence[str],
        sources: Callable[[], Sequence[str]],
        pool_fingerprint: str,
        groups: Callable[[], Sequence[str]],
    ) -> None:
        self._rows, self._groups = rows, groups
        self.tasks = [row.task for row in rows]
        self.examples, self.pool_fingerprint = examples, pool_fingerprint
        self._sources = sources
        self.shape = (len(rows), len(examples))
        self.size = self.shape[0] * self.shape[1]

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """Name that rows of one task share, length M; see `ForgettingMatrix`."""
        return tuple(self._groups())

    def load(self) -> ForgettingMatrix:
        """Read the whole matrix into memory."""
        return ForgettingMatrix(
            self[:, :],
            tasks=self.tasks,
            examples=self.examples[:],
            sources=self._sources(),
            pool_fingerprint=self.pool_fingerprint,
            groups=self.groups,
        )

    def __getitem__(self, item: tuple[slice, slice | np.ndarray]) -> np.ndarray:
        """Read a slice of the columns, or columns at sorted positions, of all rows (a full slice): shape (M, n)."""
        all_rows, columns = item
        if all_rows != slice(None):
            raise IndexError("a stored matrix is read by columns: values[:, columns]")
        if isinstance(columns, slice):
            first, last, _ = columns.indices(self.shape[1])
            values = np.empty((len(self._rows), max(last - first, 0)), self.dtype)
            for row, found in zip(self._rows, values, strict=True):
                found[:] = row.read(FORGETTING, first, first + values.shape[1])
            return values
        # Whole row groups, which have to be read in any case.
        parts = [
            self[:, start : start + BLOCK][:, columns[first:last] - start]
            for start, first, last in self._blocks(columns)
        ]
        return np.concatenate(parts, axis=1) if parts else np.empty((len(self._rows), 0), self.dtype)

    def _blocks(self, columns: np.ndarray) -> Iterator[tuple[int, int, int]]:
        """Yield the start of each row group that has some of the columns, and which: first and last + 1."""
        ends = np.searchsorted(columns, np.arange(0, self.shape[1] + BLOCK, BLOCK))
        for i, (first, last) in enumerate(pairwise(ends)):
            if first < last:
                yield i * BLOCK, int(first), int(last)
