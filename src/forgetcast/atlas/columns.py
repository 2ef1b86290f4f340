"""Columns of an atlas on disk: those of its Parquet files, and those of its forgetting matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from forgetcast.atlas.matrix import ForgettingMatrix

if TYPE_CHECKING:
    import pyarrow as pa
    import zarr

BLOCK = 65_536
"""Columns in a chunk of a row: 256 KiB, so that appending a row touches few files and a block of columns is cheap."""


def read_column(path: Path, name: str) -> pa.ChunkedArray:
    """Read one column of a Parquet file; the others stay on disk."""
    import pyarrow.parquet as pq

    return pq.read_table(path, columns=[name])[name]


def has_column(path: Path, name: str) -> bool:
    """Say whether a Parquet file has a column."""
    import pyarrow.parquet as pq

    return name in pq.read_schema(path).names


class StoredMatrix:
    """Rows of a forgetting matrix on disk, read by blocks of columns.

    Parameters
    ----------
    array : zarr array, shape (tasks, N)
    rows : list of int, length M
        Rows of `array` that belong to this matrix, in its order.
    tasks : sequence of str, length M
    examples : sequence of str, length N
    sources : callable
        Returns the source of each example; called by `load` only.
    pool_fingerprint : str

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
        array: zarr.Array[Any],
        rows: list[int],
        *,
        tasks: Sequence[str],
        examples: Sequence[str],
        sources: Callable[[], Sequence[str]],
        pool_fingerprint: str,
    ) -> None:
        self._array, self._rows = array, rows
        self.tasks, self.examples, self.pool_fingerprint = tasks, examples, pool_fingerprint
        self._sources = sources
        self.shape = (len(rows), array.shape[1])
        self.size = self.shape[0] * self.shape[1]

    def load(self) -> ForgettingMatrix:
        """Read the whole matrix into memory."""
        return ForgettingMatrix(
            self[:, :] if self._rows else np.empty(self.shape),
            tasks=self.tasks,
            examples=self.examples[:],
            sources=self._sources(),
            pool_fingerprint=self.pool_fingerprint,
        )

    def __getitem__(self, item: tuple[slice, slice | np.ndarray]) -> np.ndarray:
        """Read a slice of the columns, or columns at sorted positions, of all rows (a full slice): shape (M, n)."""
        all_rows, columns = item
        if all_rows != slice(None):
            raise IndexError("a stored matrix is read by columns: values[:, columns]")
        if isinstance(columns, slice):
            first, last, _ = columns.indices(self.shape[1])
            if self._rows == list(range(len(self._rows))):  # contiguous rows are read twice as fast
                return np.asarray(self._array[: len(self._rows), first:last])
            return np.stack([np.asarray(self._array[row, first:last]) for row in self._rows])
        # Whole chunks, which have to be read in any case; indexing on disk is eight times slower.
        ends = np.searchsorted(columns, np.arange(0, self.shape[1] + BLOCK, BLOCK))
        parts = [
            self[:, i * BLOCK : (i + 1) * BLOCK][:, columns[first:last] - i * BLOCK]
            for i, (first, last) in enumerate(pairwise(ends))
            if first < last
        ]
        return np.concatenate(parts, axis=1) if parts else np.empty((len(self._rows), 0), self.dtype)
