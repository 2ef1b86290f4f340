"""Low-rank reconstruction of a matrix with missing entries, by the small Gram matrix of its rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from forgetcast.atlas.columns import BLOCK as STORED_BLOCK
from forgetcast.atlas.columns import StoredMatrix
from forgetcast.completion.additive import additive_effects
from forgetcast.completion.base import BLOCK, check_tasks

SKETCH = 16_384
"""Columns that the coordinates of the tasks are learned from, where a large matrix has missing entries."""

ROUNDS, RIDGE = 20, 3.0
"""Of alternating regressions on entries that are not all there. On OLMo's 46 known tasks with entries taken away, five
rounds told as much as fifty, and a ridge of three times the noise more than one or ten."""

SMALL = 2**22
"""Entries up to which a matrix is factored in double precision; larger ones are in the one they come in."""


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
    """Reconstruction of a matrix with missing entries; a large one is read in two passes over its columns.

    The tasks' effects and coordinates are learned by `alternate`, from at most SKETCH columns drawn at random and, for
    each partly measured task, its share of as many that it has entries in: more columns tell little more of a hundred
    tasks. Given those, each column's mean and loadings are a ridge regression of its own entries.

    Returns
    -------
    LowRank
        Tasks without any entry are left out; columns without any are zero.
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
    check_tasks(int(usable.sum()))
    learned, ridge = alternate(known[usable], rank)

    kind = np.float64 if values.size <= SMALL else np.float32
    columns, squares, counts = (np.zeros(examples, kind) for _ in range(3))
    loadings = np.zeros((learned.loadings.shape[1], examples), kind).T
    for part, stored in _blocks(values):
        block = stored[usable] - learned.rows[:, None]
        present = ~np.isnan(block)
        block[~present] = 0.0
        counts[part] = present.sum(axis=0)
        found = _regressed(block, present, learned.coordinates, ridge)
        left = np.where(present, block - found[:, 0] - learned.coordinates @ found[:, 1:].T, 0.0)
        squares[part] = np.einsum("mn,mn->n", left, left)
        columns[part], loadings[part] = found[:, 0], found[:, 1:]
    return LowRank(learned.rows, columns, learned.coordinates, loadings), squares, counts


def alternate(values: np.ndarray, rank: int) -> tuple[LowRank, np.ndarray]:
    """Factor a matrix with missing entries by alternating ridge regressions of its columns and of its rows.

    Where nothing is missing from a row or a column there is no penalty; otherwise it is RIDGE times what the Gaussian
    prior of `Bayesian` asks for, by the share that is missing.

    Parameters
    ----------
    values : array, shape (M, N)
        NaN where not measured; no row or column is all NaN.
    rank : int

    Returns
    -------
    LowRank
    ridge : array, shape (r,)
        Penalty on a column's loadings.
    """
    tasks, examples = values.shape
    present = ~np.isnan(values)
    found = fit_low_rank(np.where(present, values, sum_of(*additive_effects(values))), rank, centred=True)
    known = np.where(present, values, 0.0)
    for _ in range(ROUNDS):
        before = found.fit
        parameters = (tasks + examples) * (found.loadings.shape[1] + 1)
        noise = ((known - before)[present] ** 2).sum() / max(present.sum() - parameters, 0.1 * present.sum())
        ridge = RIDGE * noise / np.maximum(np.mean(found.loadings**2, axis=0), 1e-30)
        of_columns = _regressed(known - found.rows[:, None] * present, present, found.coordinates, ridge)
        columns, loadings = of_columns[:, 0], of_columns[:, 1:]
        narrow = np.full(loadings.shape[1], RIDGE * noise)
        of_rows = _regressed((known - columns * present).T, present.T, loadings, narrow)
        found = _centred(of_rows, of_columns)
        if np.abs(found.fit - before).max() <= 1e-3 * np.abs(found.fit).max():
            break
    return found, RIDGE * noise / np.maximum(np.mean(found.loadings**2, axis=0), 1e-30)


def _regressed(values: np.ndarray, present: np.ndarray, design: np.ndarray, ridge: np.ndarray) -> np.ndarray:
    """Intercept and slopes (n, r + 1) of each column of `values` (m, n) on a design (m, r), by its present entries."""
    design = np.column_stack([np.ones(len(design)), design])
    size = design.shape[1]
    products = (design[:, :, None] * design[:, None, :]).reshape(len(design), -1)
    gram = (present.T @ products).reshape(-1, size, size)
    penalty = np.multiply.outer(1 - present.mean(axis=0), np.concatenate([[0.0], ridge]))
    # What an entry cannot tell is left at zero.
    penalty += 1e-9 * np.trace(gram, axis1=1, axis2=2)[:, None] + 1e-30
    gram += penalty[:, :, None] * np.eye(size)
    return np.asarray(np.linalg.solve(gram, (design.T @ values).T[:, :, None])[:, :, 0])


def _centred(of_rows: np.ndarray, of_columns: np.ndarray) -> LowRank:
    """The same reconstruction with centred effects and orthogonal factors; an array has effects first, then factors."""
    rows, columns = of_rows[:, 0], of_columns[:, 0]
    coordinates, loadings = of_rows[:, 1:], of_columns[:, 1:]
    columns = columns + loadings @ coordinates.mean(axis=0) + rows.mean()
    coordinates, rows = coordinates - coordinates.mean(axis=0), rows - rows.mean()
    rows = rows + coordinates @ loadings.mean(axis=0)
    loadings = loadings - loadings.mean(axis=0)
    (left, upper), (right, lower) = np.linalg.qr(coordinates), np.linalg.qr(loadings)
    outer, strength, inner = np.linalg.svd(upper @ lower.T)
    kept = strength > 1e-6 * max(strength.max(initial=0.0), 1e-30)
    scale = np.sqrt(max(len(rows) - 1, 1))
    return LowRank(rows, columns, left @ outer[:, kept] * scale, right @ inner[kept].T * (strength[kept] / scale))


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
