"""Low-rank reconstruction of a matrix with missing entries, by the small Gram matrix of its rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from forgetcast.atlas import BLOCK as STORED_BLOCK
from forgetcast.atlas import StoredMatrix
from forgetcast.completion.additive import additive_effects
from forgetcast.completion.base import BLOCK

SKETCH = 16_384
"""Columns that the coordinates of the tasks are learned from, where a large matrix has missing entries."""

SMALL = 2**22
"""Entries up to which a matrix is factored in double precision, and filled as a whole where entries are missing.

Larger ones are factored in the precision they come in, and filled by what a part of their columns tells."""


class LowRank(NamedTuple):
    """Reconstruction of a matrix: rows_i + columns_j + coordinates_i . loadings_j.

    The tasks' coordinates have variance one; factors without any variance are left out, so r may be less than the rank
    asked for.

    Attributes
    ----------
    rows, columns : array, shapes (M,) and (N,)
    coordinates, loadings : array, shapes (M, r) and (N, r)
    """

    rows: np.ndarray
    columns: np.ndarray
    coordinates: np.ndarray
    loadings: np.ndarray

    @property
    def fit(self) -> np.ndarray:
        """The reconstruction, shape (M, N)."""
        return sum_of(self.rows, self.columns) + self.coordinates @ self.loadings.T


class IncompleteError(ValueError):
    """An entry is missing where a complete matrix is needed."""


def factor_complete(values: np.ndarray | StoredMatrix, rank: int) -> tuple[LowRank, np.ndarray]:
    """Best reconstruction of a matrix without NaN, around row and column effects, in two passes over its columns.

    Parameters
    ----------
    values : array, shape (M, N)
        Or a matrix on disk, of which a few columns are in memory at a time.
    rank : int

    Returns
    -------
    LowRank
    squares : array, shape (N,)
        Sum of squared residuals of each column.

    Raises
    ------
    IncompleteError
        If an entry is NaN.

    Notes
    -----
    The first pass adds up the Gram matrix of the rows, the second projects the columns on its eigenvectors, both on
    blocks that stay in the cache: the cost is little more than that of ``values @ values.T``.
    """
    tasks, examples = values.shape
    kind = np.float64 if values.size <= SMALL else values.dtype
    columns, squares = np.empty(examples, kind), np.empty(examples, kind)
    gram, sums = np.zeros((tasks, tasks)), np.zeros(tasks)
    ones = np.full(tasks, 1 / tasks, kind)
    for part, stored in _blocks(values):
        block = stored.astype(kind, copy=False)
        columns[part] = ones @ block
        block = block - columns[part]
        gram += block @ block.T
        sums += block.sum(axis=1)
        squares[part] = np.einsum("mn,mn->n", block, block)
        if np.isnan(sums).any():
            raise IncompleteError
    rows = sums / examples
    left, strength = _leading(gram - examples * np.outer(rows, rows), min(rank, tasks, examples))
    projector = np.column_stack([left, rows]).astype(kind)
    shares = projector.sum(axis=0)
    loadings = np.empty((len(strength), examples), kind).T  # so that one factor's lie together
    for part, stored in _blocks(values):
        told = projector.T @ stored.astype(kind, copy=False) - shares[:, None] * columns[part]
        told[:-1] -= (left.T @ rows)[:, None].astype(kind)
        squares[part] += rows @ rows - 2 * told[-1] - np.einsum("rn,rn->n", told[:-1], told[:-1])
        loadings[part] = told[:-1].T
    scale = np.sqrt(max(tasks - 1, 1))
    loadings /= scale
    return LowRank(rows, columns, left * scale, loadings), np.maximum(squares, 0.0)


def factor_incomplete(values: np.ndarray | StoredMatrix, rank: int) -> tuple[LowRank, np.ndarray, np.ndarray]:
    """Reconstruction of a large matrix with missing entries, in two passes over its columns.

    The tasks' coordinates are learned from SKETCH columns drawn at random, and as many on which each partly measured
    task has entries as its share; with some hundred tasks, more columns tell little more of them. Given those, each
    column's mean and loadings are a ridge regression of its own entries, unpenalised where none is missing.

    Returns
    -------
    LowRank
        Rows without any entry are left out; columns without any are zero.
    squares, counts : array, shape (N,)
        Sum of squared residuals and number of entries of each column.
    """
    tasks, examples = values.shape
    drawn = np.zeros(examples, dtype=bool)
    drawn[np.random.default_rng(0).choice(examples, min(SKETCH, examples), replace=False)] = True
    wanted, sketch = np.full(tasks, SKETCH // tasks), []
    for part, block in _blocks(values):
        present, taken = ~np.isnan(block), drawn[part]
        for task in np.flatnonzero(~present.all(axis=1) & (wanted > 0)):
            own = np.flatnonzero(present[task])[: wanted[task]]
            taken[own] = True
            wanted[task] -= len(own)
        sketch.append(block[:, taken & present.any(axis=0)])
    known = np.concatenate(sketch, axis=1).astype(np.float64)
    usable = ~np.isnan(known).all(axis=1)
    learned = fit_low_rank(known[usable], rank, centred=True)
    design = np.column_stack([np.ones(usable.sum()), learned.coordinates])
    products = (design[:, :, None] * design[:, None, :]).reshape(len(design), -1)
    noise = float(np.nanmean((known[usable] - learned.fit) ** 2))
    ridge = np.concatenate([[0.0], noise / np.maximum(np.mean(learned.loadings**2, axis=0), 1e-30)])

    columns, squares, counts = (np.zeros(examples, np.float32) for _ in range(3))
    loadings = np.zeros((len(ridge) - 1, examples), np.float32).T
    for part, stored in _blocks(values):
        block = stored[usable] - learned.rows[:, None]
        present = ~np.isnan(block)
        block[~present] = 0.0
        counts[part] = present.sum(axis=0)
        gram = (present.T @ products).reshape(-1, len(ridge), len(ridge))
        gram += np.multiply.outer(1 - counts[part] / len(design), np.diag(ridge))
        gram[counts[part] == 0] = np.eye(len(ridge))
        found = np.linalg.solve(gram, (design.T @ block).T[:, :, None])[:, :, 0]
        squares[part] = np.einsum("mn,mn->n", *[np.where(present, block - design @ found.T, 0.0)] * 2)
        columns[part], loadings[part] = found[:, 0], found[:, 1:]
    return LowRank(learned.rows, columns, learned.coordinates, loadings), squares, counts


def _blocks(values: np.ndarray | StoredMatrix) -> Iterator[tuple[slice, np.ndarray]]:
    """Blocks of columns that stay in the cache, read from the disk in the wider ones that lie together there."""
    examples = values.shape[1]
    for wide in range(0, examples, STORED_BLOCK):
        stored = values[:, wide : wide + STORED_BLOCK]
        for start in range(0, stored.shape[1], BLOCK):
            block = stored[:, start : start + BLOCK]
            yield slice(wide + start, wide + start + block.shape[1]), block


def fit_low_rank(values: np.ndarray, rank: int, *, centred: bool, penalty: float = 0.0, rounds: int = 500) -> LowRank:
    """Best rank-`rank` reconstruction of the measured entries, around row and column effects if `centred`.

    With a penalty l it minimises the squared error plus 2 l times the sum of the singular values, which is alternating
    ridge regression with the ridge l on both factors (Hastie, Mazumder, Lee and Zadeh 2015, theorem 1): every singular
    value is lowered by l, and those below it are gone.

    Parameters
    ----------
    values : array, shape (M, N)
        NaN where not measured. Such entries are filled with the reconstruction until it stops changing.
    rank : int
    centred : bool
        Whether the factors come on top of a_i + b_j (effects of rows and columns) or stand alone.
    penalty : float
        In the values' unit.
    """
    tasks, examples = values.shape
    present = ~np.isnan(values)
    rows, columns = np.zeros(tasks), np.zeros(examples)
    filled = values if present.all() else np.where(present, values, sum_of(*additive_effects(values)))
    fit = filled
    for _ in range(1 if present.all() else rounds):
        before = fit
        if centred:
            columns = filled.mean(axis=0)
            rows = filled.mean(axis=1) - columns.mean()
        left, strength, right = truncated_svd(filled - sum_of(rows, columns), rank)
        kept = strength > penalty
        left, strength, right = left[:, kept], strength[kept] - penalty, right[kept]
        fit = sum_of(rows, columns) + (left * strength) @ right
        if np.abs(fit - before).max() <= 1e-5 * np.abs(fit).max():
            break
        filled = np.where(present, values, fit)
    scale = np.sqrt(max(tasks - 1, 1))
    return LowRank(rows, columns, left * scale, (right * strength[:, None] / scale).T)


def sum_of(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """a_i + b_j, shape (M, N)."""
    return np.asarray(rows[:, None] + columns)


def truncated_svd(values: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Leading singular triplets of a wide matrix by its small Gram matrix: (M, r), (r,), (r, N); no zero ones.

    Costs one product of the matrix with its transpose, and is as exact as needed for factors that stand clear of
    rounding: singular values below 1e-6 of the first are left out.
    """
    tasks = len(values)
    rank = min(rank, tasks, values.shape[1])
    if rank == 0:
        return np.empty((tasks, 0)), np.empty(0), np.empty((0, values.shape[1]))
    left, strength = _leading(values @ values.T, rank)
    return left, strength, (left.T @ values) / strength[:, None]


def _leading(gram: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Leading eigenvectors (M, r) of a Gram matrix and the square roots (r,) of their eigenvalues, no zero ones."""
    tasks = len(gram)
    if rank == 0:
        return np.empty((tasks, 0)), np.empty(0)
    # All of them and NumPy's, though SciPy could stop at the rank: SciPy brings a second pool of BLAS threads, which
    # fights with the first over the cores.
    squares, left = np.linalg.eigh(gram)
    squares, left = squares[: -rank - 1 : -1], left[:, : -rank - 1 : -1]
    kept = squares > max(squares[0], 0.0) * 1e-12
    return left[:, kept], np.sqrt(squares[kept])
