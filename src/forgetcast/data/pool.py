"""Pools and tasks: examples with unique ids, in a fixed order.

A pool keeps its examples in Arrow columns and makes each `Example` when it is asked for it, so that a million short
texts take the memory of their characters, not of a million Python objects.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, overload

import numpy as np

from forgetcast.data.example import (
    FIELDS as FIELDS,
)
from forgetcast.data.example import (
    STRUCTURED as STRUCTURED,
)
from forgetcast.data.example import (
    Example as Example,
)
from forgetcast.data.example import (
    Messages as Messages,
)
from forgetcast.data.example import (
    digest,
    to_json,
)
from forgetcast.data.ids import ExampleIndex, labels
from forgetcast.errors import DataError
from forgetcast.files import atomic_path, write_table

if TYPE_CHECKING:
    import pyarrow as pa

    from forgetcast.data.reader import ReadReport


CHUNK = 8192
"""Examples that are Python objects at the same time, where all are gone through."""

OnRead = Callable[[int, int], None]
"""Called while a file is read, with the bytes done and all bytes; 0 bytes in all where that is unknown."""


class Pool(Sequence[Example]):
    """Examples with unique ids, in a fixed order.

    Parameters
    ----------
    examples : iterable of Example
    where : str
        What an error message calls the pool; usually its file.

    Attributes
    ----------
    ids : ExampleIndex
        A sequence of the ids.
    report : ReadReport or None
        How the files were understood, and which rows could not be used; None for a pool that was not read.

    Raises
    ------
    DataError
        If there are no examples, or an id occurs twice.
    """

    def __init__(self, examples: Iterable[Example], *, where: str = "the pool") -> None:
        self._set(table_of(examples), where)

    def _set(self, table: pa.Table, where: str, report: ReadReport | None = None) -> None:
        if not len(table):
            raise DataError(f"{where} has no examples")
        self._table, self.report = table, report
        self._batches: list[pa.RecordBatch] = table.to_batches()
        self._ends = np.cumsum([len(batch) for batch in self._batches])
        self.ids = ExampleIndex.from_arrow(table["id"])
        if (repeated := self.ids.first_repeated()) is not None:
            id_ = self.ids[repeated[1]]
            count = Counter(self.ids)[id_]
            raise DataError(f"{where}: the id {id_!r} occurs {count} times; ids must be unique")

    @classmethod
    def from_table(cls, table: pa.Table, *, where: str = "the pool", report: ReadReport | None = None) -> Self:
        """Use columns as `table_of` makes them, without a copy; the caller has checked their values."""
        pool = cls.__new__(cls)
        pool._set(table, where, report)
        return pool

    @overload
    def __getitem__(self, item: int) -> Example: ...
    @overload
    def __getitem__(self, item: slice) -> tuple[Example, ...]: ...
    def __getitem__(self, item: int | slice) -> Example | tuple[Example, ...]:
        """Example at a position, or a slice of them."""
        if isinstance(item, slice):
            return tuple(self[i] for i in range(*item.indices(len(self))))
        position = range(len(self))[item]  # IndexError, and positions from the end
        batch = int(np.searchsorted(self._ends, position, side="right"))
        row = position - int(self._ends[batch]) + len(self._batches[batch])
        return _example(*(column[row].as_py() for column in self._batches[batch].columns))

    def __iter__(self) -> Iterator[Example]:
        """Make one example after another."""
        for rows in self._rows(FIELDS):
            for row in rows:
                yield _example(*row)

    def _rows(self, names: Sequence[str]) -> Iterator[Iterator[tuple[Any, ...]]]:
        """Yield the values of some columns, a few thousand rows at a time."""
        for batch in self._table.select(list(names)).to_batches(max_chunksize=CHUNK):
            yield zip(*(column.to_pylist() for column in batch.columns), strict=True)

    def __len__(self) -> int:
        """Count the examples."""
        return len(self._table)

    def __repr__(self) -> str:
        """Size and fingerprint."""
        return f"Pool({len(self)} examples, fingerprint {self.fingerprint[:12]})"

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the ids and texts of all examples, independent of their order (64 hexadecimal digits)."""
        return fingerprint_of(
            digest(*strings, *_decoded(messages, tools, arguments))
            for *strings, messages, tools, arguments in self._each(FIELDS[:-1])
        )

    def _each(self, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        for rows in self._rows(names):
            yield from rows

    @property
    def sources(self) -> tuple[str, ...]:
        """Source of each example; '' where it has none."""
        return tuple(labels(self._table["source"]))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Characters of text of each example, shape (N,); of a conversation, as it is written in a file."""
        import pyarrow.compute as pc

        columns = [self._table[name] for name in ("text", "prompt", "completion", "messages", "tools")]
        return sum(np.asarray(pc.fill_null(pc.utf8_length(each), 0), dtype=np.int64) for each in columns)  # type: ignore[return-value]

    @property
    def skipped(self) -> tuple[tuple[str, str], ...]:
        """Place and reason of every row that was read and could not be used."""
        return tuple(self.report.skipped) if self.report is not None else ()

    def positions(self, ids: Iterable[str], *, where: str = "the request") -> np.ndarray:
        """Return the positions of `ids` in this pool, shape (len(ids),).

        Raises
        ------
        MismatchError
            If an id is not in the pool.
        """
        return self.ids.positions(ids, where=where)

    def subset(self, ids: Iterable[str], *, where: str = "the request") -> Pool:
        """Return a pool of the examples with these ids, in the order of `ids`."""
        return Pool.from_table(_take(self._table, self._ends, self.positions(ids, where=where)), where=where)

    def extended(self, examples: Iterable[Example], *, where: str = "the pool") -> Pool:
        """Return a pool of these examples and of further ones, which come last; DataError if an id occurs twice."""
        import pyarrow as pa

        return Pool.from_table(pa.concat_tables([self._table, table_of(examples)]), where=where)

    def sample(self, count: int, *, seed: int = 0) -> Pool:
        """Return a pool of at most `count` examples, drawn at random, in their order here."""
        drawn = np.sort(np.random.default_rng(seed).permutation(len(self))[:count])
        return self.subset(self.ids[i] for i in drawn.tolist())

    def hold_out(self, share: float, *, seed: int = 0, exclude: Iterable[str] = ()) -> tuple[str, ...]:
        """Choose ids that are never replayed, only judged on.

        Examples are ranked by a hash of the seed and the id, so the choice does not depend on the pool's order.

        Parameters
        ----------
        share : float
            Fraction of the pool, in [0, 1).
        seed : int
        exclude : iterable of str
            Ids that are never held out, such as the probes, whose forgetting is already measured. The next ones in the
            order of the hashes take their place.

        Raises
        ------
        DataError
            If the share is out of range, or too many are excluded to hold out so many.
        """
        if not 0 <= share < 1:
            raise DataError(f"the held-out share must be in [0, 1), not {share}")
        ranks = np.empty(len(self), dtype="S32")
        for i, id_ in enumerate(self.ids):
            ranks[i] = hashlib.sha256(f"{seed}:{id_}".encode()).digest()
        eligible = np.ones(len(self), dtype=bool)
        excluded = self.ids.find(exclude)
        eligible[excluded[excluded >= 0]] = False
        order, wanted = np.argsort(ranks), round(share * len(self))
        held = order[eligible[order]][:wanted]
        if len(held) < wanted:
            raise DataError(
                f"a held-out share of {share:g} is {wanted} of {len(self)} examples, and only {len(held)} can be held "
                "out: the others are probed, or could not be scored; ask for a smaller share"
            )
        return tuple(self.ids.select(np.sort(held)))

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        format: str | None = None,
        columns: Mapping[str, str] | None = None,
        strict: bool = False,
        on_progress: OnRead | None = None,
    ) -> Pool:
        """Read examples from a file, a folder of files, a saved data set, or a data set of the Hub.

        Files are JSONL, JSON, CSV, TSV (each also `.gz` or `.zst`), Parquet and Arrow. A split of a saved data set is
        named after an @ (`folder@train`), a data set of the Hub as `hf://name:configuration@split`. An example
        without an id gets a hash of its content; a second one with the same content is skipped.

        Parameters
        ----------
        path : path or str
        format : str, optional
            One of `formats.FORMATS`; default: each row's, by its fields.
        columns : mapping of str to str, optional
            What the file calls a field, by the name of the field here, such as ``{"prompt": "frage"}``. An empty name
            means that the field is not read.
        strict : bool
            Whether a row that cannot be used is an error. Else it is in `skipped`.
        on_progress : callable, optional
            Called with the bytes read and all bytes.

        Raises
        ------
        DataError
            If a file cannot be read, its columns are none that are known, an id occurs twice, or no row can be used;
            the message names the file and the line or row.
        """
        from forgetcast.data.reader import Reader, ReadOptions

        reader = Reader(path, ReadOptions(format, columns or {}, strict), on_progress)
        return cls.from_table(reader.read_table(), where=reader.report.where, report=reader.report)

    def save(self, path: str | Path) -> None:
        """Write the pool as JSONL, or as Parquet if the name ends in `.parquet`."""
        if Path(path).suffix == ".parquet":
            write_table(self._table, Path(path), {})
            return
        with atomic_path(Path(path)) as temporary, temporary.open("w", encoding="utf-8") as file:
            for row in self._each(FIELDS):
                kept = {name: value for name, value in zip(FIELDS, row, strict=True) if value is not None}
                kept |= {name: json.loads(kept[name]) for name in STRUCTURED if name in kept}
                file.write(json.dumps(kept, ensure_ascii=False) + "\n")


def load_task(
    path: str | Path,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    strict: bool = False,
    on_progress: OnRead | None = None,
) -> Pool:
    """Read a fine-tuning data set, as `Pool.load` does."""
    return Pool.load(path, format=format, columns=columns, strict=strict, on_progress=on_progress)


def split_task(task: Pool, share: float) -> tuple[Pool, Pool]:
    """Split a task into training examples and a test fraction for the new-task loss.

    Raises
    ------
    DataError
        If either part would be empty.
    """
    test = set(task.hold_out(share))
    if not 0 < len(test) < len(task):
        raise DataError(f"a test share of {share} of {len(task)} examples leaves none to test or to train on")
    train = [id_ for id_ in task.ids if id_ not in test]
    return task.subset(train), task.subset(id_ for id_ in task.ids if id_ in test)


def table_of(examples: Iterable[Example]) -> pa.Table:
    """Return a table with a column of strings for each of `FIELDS`; what is structured is JSON."""
    import pyarrow as pa

    schema = pa.schema([(name, pa.string()) for name in FIELDS])
    rest, tables = iter(examples), []
    while chunk := list(islice(rest, CHUNK)):
        columns: dict[str, list[Any]] = {name: [getattr(example, name) for example in chunk] for name in FIELDS}
        for name in STRUCTURED:
            columns[name] = [value if value is None else to_json(value, name) for value in columns[name]]
        tables.append(pa.table(columns, schema=schema))
    return pa.concat_tables(tables) if tables else schema.empty_table()


def _example(
    id_: str,
    text: str | None,
    prompt: str | None,
    completion: str | None,
    messages: str | None,
    tools: str | None,
    arguments: str | None,
    source: str | None,
) -> Example:
    structured = dict(zip(STRUCTURED, _decoded(messages, tools, arguments), strict=True))
    return Example(id_, text, prompt, completion, source=source, **structured)


def _decoded(*values: str | None) -> Iterator[Any]:
    return (value if value is None else json.loads(value) for value in values)


def _take(table: pa.Table, ends: np.ndarray, positions: np.ndarray) -> pa.Table:
    """Take rows chunk by chunk: Arrow would first copy the whole column into one chunk."""
    import pyarrow as pa

    order = np.argsort(positions, kind="stable")
    chunks = np.searchsorted(ends, positions[order], side="right")
    starts = np.concatenate([[0], ends[:-1]])
    batches = table.to_batches()
    parts = [
        pa.table(batches[chunk].take(pa.array(positions[order][chunks == chunk] - starts[chunk])))
        for chunk in np.unique(chunks).tolist()
    ]
    if not parts:
        return table.slice(0, 0)
    return pa.concat_tables(parts).take(pa.array(np.argsort(order, kind="stable")))


def fingerprint_of(digests: Iterable[bytes]) -> str:
    """Return `Pool.fingerprint` of examples by their `Example.digest`."""
    ordered = np.fromiter(digests, dtype="S32")
    ordered.sort()
    return hashlib.sha256(ordered.tobytes()).hexdigest()
