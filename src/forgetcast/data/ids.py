"""Example ids and their positions: the one place where two things with ids are aligned."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self, overload

import numpy as np

from forgetcast.errors import MismatchError

if TYPE_CHECKING:
    import pyarrow as pa

_CHUNK = 65_536
"""Ids that are Python strings at the same time; so many may have a dictionary."""

_FEW = 16
"""So few are looked up one by one among many, where a hash table of all would be made for each request."""


class ExampleIndex(Sequence[str]):
    """Unique ids in a fixed order, with a lookup of their positions.

    Ids are kept as a tuple, or as an Arrow column: ten bytes an id, where a Python string takes sixty.
    """

    def __init__(self, ids: Iterable[str]) -> None:
        self._column: pa.ChunkedArray | None = ids._column if isinstance(ids, ExampleIndex) else None
        self._ids = () if self._column is not None else tuple(ids)

    @classmethod
    def from_arrow(cls, column: pa.ChunkedArray) -> Self:
        """Use a column of strings without a copy."""
        index = cls(())
        index._column = column
        return index

    def __len__(self) -> int:
        return len(self._ids if self._column is None else self._column)

    @overload
    def __getitem__(self, item: int) -> str: ...
    @overload
    def __getitem__(self, item: slice) -> tuple[str, ...]: ...
    def __getitem__(self, item: int | slice) -> str | tuple[str, ...]:
        if self._column is None:
            return self._ids[item]
        values = self._column[item]
        return tuple(values.to_pylist()) if isinstance(item, slice) else str(values.as_py())

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _CHUNK):
            yield from self[start : start + _CHUNK]

    def __repr__(self) -> str:
        return f"ExampleIndex({len(self)} ids)"

    def __arrow_array__(self, type: Any = None) -> pa.ChunkedArray | pa.Array:  # Arrow's protocol
        import pyarrow as pa

        if self._column is None:
            return pa.array(self._ids, type or pa.string())
        return self._column if type is None else self._column.cast(type)

    def __eq__(self, other: object) -> bool:
        """Whether another sequence has the same ids in the same order."""
        if not isinstance(other, ExampleIndex | tuple | list):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def select(self, positions: np.ndarray) -> list[str]:
        """Return the ids at these positions."""
        if self._column is None:
            return [self._ids[i] for i in positions.tolist()]
        import pyarrow as pa

        return list(self._column.take(pa.array(positions)).to_pylist())

    def first_repeated(self) -> tuple[int, int] | None:
        """Return the positions of the first id that occurred before, (before, again); None if all are unique."""
        import pyarrow as pa
        import pyarrow.compute as pc

        column = pa.chunked_array([pa.array(self._ids, pa.string())]) if self._column is None else self._column
        if pc.count_distinct(column).as_py() == len(self):
            return None
        first = pc.index_in(column, value_set=column).to_numpy()
        again = int(np.argmax(first != np.arange(len(self))))
        return int(first[again]), again

    @cached_property
    def _lookup(self) -> dict[str, int]:
        return {id_: i for i, id_ in enumerate(self)}

    @cached_property
    def _sorted(self) -> np.ndarray:
        """Positions in the order of the ids, for a few lookups among many ids."""
        import pyarrow.compute as pc

        return np.asarray(pc.sort_indices(self._column))

    def _search(self, id_: str) -> int:
        at = bisect_left(self._sorted, id_, key=lambda i: self[int(i)])
        return int(self._sorted[at]) if at < len(self) and self[int(self._sorted[at])] == id_ else -1

    def find(self, ids: Iterable[str]) -> np.ndarray:
        """Return the position of each id, -1 where it is unknown, shape (len(ids),) of intp."""
        ids = ids if isinstance(ids, Sequence) else list(ids)
        if self._column is None or len(self) <= _CHUNK:
            return np.array([self._lookup.get(id_, -1) for id_ in ids], dtype=np.intp)
        if len(ids) <= _FEW:
            return np.array([self._search(id_) for id_ in ids], dtype=np.intp)
        import pyarrow as pa
        import pyarrow.compute as pc

        positions = pc.index_in(pa.array(ids, self._column.type), value_set=self._column)
        return np.asarray(positions.fill_null(-1).to_numpy(zero_copy_only=False), dtype=np.intp)

    def positions(self, ids: Iterable[str], *, where: str = "the request") -> np.ndarray:
        """Return the position of each id, shape (len(ids),) of intp.

        Parameters
        ----------
        ids : iterable of str
        where : str
            What an error message calls the owner of `ids`.

        Raises
        ------
        MismatchError
            If an id is unknown.
        """
        ids = ids if isinstance(ids, Sequence) else list(ids)
        positions = self.find(ids)
        unknown = np.flatnonzero(positions < 0)
        if len(unknown):
            raise MismatchError(
                f"{where} has {len(unknown)} example(s) that the pool doesn't know, e.g. {str(ids[unknown[0]])!r}"
            )
        return positions


def labels(column: pa.ChunkedArray) -> Iterator[str]:
    """Yield the label of each row, '' where there is none; rows with the same label share one string."""
    known: dict[str | None, str] = {None: ""}
    for chunk in column.chunks:
        for label in chunk.to_pylist():
            yield known.setdefault(label, label)
