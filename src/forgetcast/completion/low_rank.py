"""Low-rank reconstruction of a matrix with missing entries, by the small Gram matrix of its rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from forgetcast.atlas.rows import BLOCK as STORED_BLOCK
from forgetcast.atlas.rows import StoredMatrix
from forgetcast.completion.additive import additive_effects
from forgetcast.completion.base import BLOCK, check_tasks

SKETCH = 16_384
"""Columns that the coordinates of the tasks are learned from, where a large matrix has missing entries."""

ROUNDS, RIDGE = 20, 3.0
"""Of alternating regressions where entries are missing. On OLMo's 46 known tasks with entries removed, five rounds were
as accurate as fifty, and a ridge of three times the noise was better than one or ten times."""

SMALL = 2**22
"""Entries up to which a matrix is factored in double precision; larger ones keep their dtype."""


class LowRank(NamedTuple):
    """Reconstruction of a matrix: rows_i + columns_j + coordinates_i . loadings_j.

    The tasks' coordinates have variance one. Factors without variance are dropped, so r may be less than the rank.

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
        """Reconstructed matrix, shape (M, N)."""
        return sum_of(self.rows, self.columns) + self.coordinates @ self.loadings.T


class IncompleteError(ValueError):
    """An entry is missing where a complete matrix is needed."""


def factor_complete(
    values: np.ndarray | StoredMatrix, rank: int, *, balanced: bool = False
) -> tuple[LowRank, np.ndarray]:
    """Reconstruct a matrix without NaN optimally, around row and column effects, in two passes over its columns.

    Parameters
    ----------
    values : array, shape (M, N)
        Or a matrix on disk, read a few columns at a time.
    rank : int
    balanced : bool
        Divide each column by the root of its standard deviation before the tasks' coordinates are computed, so that
        few columns that vary much do not decide them. The loadings are of the columns as they are.

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
    The first pass sums the Gram matrix of the rows, the second projects the columns on its eigenvectors. Both work on
    blocks that fit the cache: the cost is little more than that of ``values @ values.T``.
    """
    tasks, examples = values.shape
    dtype = np.float64 if values.size <= SMALL else values.dtype
    columns, squares = np.empty(examples, dtype), np.empty(examples, dtype)
    gram, sums = np.zeros((tasks, tasks)), np.zeros(tasks)
    weighted, total = np.zeros(tasks), 0.0  # as `gram` and `sums`, with the columns' weights
    ones = np.full(tasks, 1 / tasks, dtype)
    for part, stored in _blocks(values):
        block = stored.astype(dtype, copy=False)
        columns[part] = ones @ block
        block = block - columns[part]
        sums += block.sum(axis=1)
        squares[part] = np.einsum("mn,mn->n", block, block)
        weights = np.ones(block.shape[1], dtype)
        if balanced:
            weights = np.maximum(squares[part], np.finfo(dtype).tiny) ** -0.5
            block *= np.sqrt(weights)
            weighted += block @ np.sqrt(weights)
        gram += block @ block.T
        total += float(weights.sum())
        if np.isnan(sums).any():
            raise IncompleteError
    rows = sums / examples
    if not balanced:
        weighted = sums
    across = np.outer(rows, weighted)
    U, S = _leading(gram - across - across.T + total * np.outer(rows, rows), min(rank, tasks, examples))
    projector = np.column_stack([U, rows]).astype(dtype)
    shares = projector.sum(axis=0)
    loadings = np.empty((len(S), examples), dtype).T  # one factor's loadings are contiguous
    for part, stored in _blocks(values):
        projection = projector.T @ stored.astype(dtype, copy=False) - shares[:, None] * columns[part]
        projection[:-1] -= (U.T @ rows)[:, None].astype(dtype)
        squares[part] += rows @ rows - 2 * projection[-1] - np.einsum("rn,rn->n", projection[:-1], projection[:-1])
        loadings[part] = projection[:-1].T
    scale = np.sqrt(max(tasks - 1, 1))
    loadings /= scale
    return LowRank(rows, columns, U * scale, loadings), np.maximum(squares, 0.0)


def factor_incomplete(values: np.ndarray | StoredMatrix, rank: int) -> tuple[LowRank, np.ndarray, np.ndarray]:
    """Reconstruct a matrix with missing entries; a large one is read in two passes over its columns.

    `alternate` estimates the tasks' effects and coordinates from at most SKETCH columns drawn at random, plus up to
    SKETCH / M columns in which each partly observed task has entries: for a hundred tasks, more columns add little.
    Given those, each column's mean and loadings are a ridge regression on its entries.

    Returns
    -------
    LowRank
        Tasks without entries are dropped; columns without entries are zero.
    squares, counts : array, shape (N,)
        Sum of squared residuals and number of entries of each column.
    """
    tasks, examples = values.shape
    drawn = np.zeros(examples, dtype=bool)
    drawn[np.random.default_rng(0).choice(examples, min(SKETCH, examples), replace=False)] = True
    wanted, sketch = np.full(tasks, SKETCH // tasks), []
    for part, block in _blocks(values):
        observed, taken = ~np.isnan(block), drawn[part]
        for task in np.flatnonzero(~observed.all(axis=1) & (wanted > 0)):
            added = np.flatnonzero(observed[task])[: wanted[task]]
            taken[added] = True
            wanted[task] -= len(added)
        sketch.append(block[:, taken & observed.any(axis=0)])
    sketched = np.concatenate(sketch, axis=1).astype(np.float64)
    usable = ~np.isnan(sketched).all(axis=1)
    check_tasks(int(usable.sum()))
    learned, ridge = alternate(sketched[usable], rank)

    dtype = np.float64 if values.size <= SMALL else np.float32
    columns, squares, counts = (np.zeros(examples, dtype) for _ in range(3))
    loadings = np.zeros((learned.loadings.shape[1], examples), dtype).T
    for part, stored in _blocks(values):
        block = stored[usable] - learned.rows[:, None]
        observed = ~np.isnan(block)
        block[~observed] = 0.0
        counts[part] = observed.sum(axis=0)
        coefficients = _ridge(block, observed, learned.coordinates, ridge)
        columns[part], loadings[part] = coefficients[:, 0], coefficients[:, 1:]
        residual = np.where(observed, block - coefficients[:, 0] - learned.coordinates @ coefficients[:, 1:].T, 0.0)
        squares[part] = np.einsum("mn,mn->n", residual, residual)
    return LowRank(learned.rows, columns, learned.coordinates, loadings), squares, counts


def alternate(values: np.ndarray, rank: int) -> tuple[LowRank, np.ndarray]:
    """Factor a matrix with missing entries by alternating ridge regressions of its columns and of its rows.

    The penalty is RIDGE times that of the Gaussian prior of `Bayesian`, times the share of the row or column that is
    missing, so a complete one has none.

    Parameters
    ----------
    values : array, shape (M, N)
        NaN where missing; no row or column is all NaN.
    rank : int

    Returns
    -------
    LowRank
    ridge : array, shape (r,)
        Penalty on a column's loadings.
    """
    tasks, examples = values.shape
    observed = ~np.isnan(values)
    low_rank = fit_low_rank(np.where(observed, values, sum_of(*additive_effects(values))), rank, centred=True)
    filled = np.where(observed, values, 0.0)
    for _ in range(ROUNDS):
        before = low_rank.fit
        parameters = (tasks + examples) * (low_rank.loadings.shape[1] + 1)
        noise = ((filled - before)[observed] ** 2).sum() / max(observed.sum() - parameters, 0.1 * observed.sum())
        ridge = RIDGE * noise / np.maximum(np.mean(low_rank.loadings**2, axis=0), 1e-30)
        of_columns = _ridge(filled - low_rank.rows[:, None] * observed, observed, low_rank.coordinates, ridge)
        columns, loadings = of_columns[:, 0], of_columns[:, 1:]
        narrow = np.full(loadings.shape[1], RIDGE * noise)
        of_rows = _ridge((filled - columns * observed).T, observed.T, loadings, narrow)
        low_rank = _centred(of_rows, of_columns)
        if np.abs(low_rank.fit - before).max() <= 1e-3 * np.abs(low_rank.fit).max():
            break
    return low_rank, RIDGE * noise / np.maximum(np.mean(low_rank.loadings**2, axis=0), 1e-30)


def _ridge(values: np.ndarray, observed: np.ndarray, design: np.ndarray, ridge: np.ndarray) -> np.ndarray:
    """Regress each column of `values` (m, n), where observed, on a design (m, r): intercepts and slopes (n, r + 1)."""
    design = np.column_stack([np.ones(len(design)), design])
    size = design.shape[1]
    products = (design[:, :, None] * design[:, None, :]).reshape(len(design), -1)
    gram = (observed.T @ products).reshape(-1, size, size)
    penalty = np.multiply.outer(1 - observed.mean(axis=0), np.concatenate([[0.0], ridge]))
    # Coefficients that the entries do not determine stay at zero.
    penalty += 1e-9 * np.trace(gram, axis1=1, axis2=2)[:, None] + 1e-30
    gram += penalty[:, :, None] * np.eye(size)
    return np.asarray(np.linalg.solve(gram, (design.T @ values).T[:, :, None])[:, :, 0])


def _centred(of_rows: np.ndarray, of_columns: np.ndarray) -> LowRank:
    """Centre the effects and orthogonalise the factors of a reconstruction; the arrays hold effects, then factors."""
    rows, columns = of_rows[:, 0], of_columns[:, 0]
    coordinates, loadings = of_rows[:, 1:], of_columns[:, 1:]
    columns = columns + loadings @ coordinates.mean(axis=0) + rows.mean()
    coordinates, rows = coordinates - coordinates.mean(axis=0), rows - rows.mean()
    rows = rows + coordinates @ loadings.mean(axis=0)
    loadings = loadings - loadings.mean(axis=0)
    (Q_rows, R_rows), (Q_columns, R_columns) = np.linalg.qr(coordinates), np.linalg.qr(loadings)
    U, S, Vt = np.linalg.svd(R_rows @ R_columns.T)
    negligible = 1e-6 * max(S.max(initial=0.0), 1e-30)
    keep = negligible < S
    scale = np.sqrt(max(len(rows) - 1, 1))
    return LowRank(rows, columns, Q_rows @ U[:, keep] * scale, Q_columns @ Vt[keep].T * (S[keep] / scale))


def _blocks(values: np.ndarray | StoredMatrix) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield blocks of columns that fit the cache, read from disk in the wider blocks that are contiguous there."""
    examples = values.shape[1]
    for wide in range(0, examples, STORED_BLOCK):
        stored = values[:, wide : wide + STORED_BLOCK]
        for start in range(0, stored.shape[1], BLOCK):
            block = stored[:, start : start + BLOCK]
            yield slice(wide + start, wide + start + block.shape[1]), block


def fit_low_rank(values: np.ndarray, rank: int, *, centred: bool, penalty: float = 0.0, rounds: int = 500) -> LowRank:
    """Reconstruct the observed entries by the best rank-`rank` fit, around row and column effects if `centred`.

    With a penalty l it minimises the squared error plus 2 l times the sum of the singular values, which is alternating
    ridge regression with the ridge l on both factors (Hastie, Mazumder, Lee and Zadeh 2015, theorem 1): every singular
    value is lowered by l, and those below l vanish.

    Parameters
    ----------
    values : array, shape (M, N)
        NaN where missing. Such entries are filled with the reconstruction until it stops changing.
    rank : int
    centred : bool
        Whether the factors are added to a_i + b_j (effects of rows and columns) or are the whole fit.
    penalty : float
        In the values' unit.
    """
    tasks, examples = values.shape
    observed = ~np.isnan(values)
    rows, columns = np.zeros(tasks), np.zeros(examples)
    filled = values if observed.all() else np.where(observed, values, sum_of(*additive_effects(values)))
    fit = filled
    for _ in range(1 if observed.all() else rounds):
        before = fit
        if centred:
            columns = filled.mean(axis=0)
            rows = filled.mean(axis=1) - columns.mean()
        U, S, Vt = truncated_svd(filled - sum_of(rows, columns), rank)
        keep = penalty < S
        U, S, Vt = U[:, keep], S[keep] - penalty, Vt[keep]
        fit = sum_of(rows, columns) + (U * S) @ Vt
        if np.abs(fit - before).max() <= 1e-5 * np.abs(fit).max():
            break
        filled = np.where(observed, values, fit)
    scale = np.sqrt(max(tasks - 1, 1))
    return LowRank(rows, columns, U * scale, (Vt * S[:, None] / scale).T)


def sum_of(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return a_i + b_j, shape (M, N)."""
    return np.asarray(rows[:, None] + columns)


def truncated_svd(values: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute U (M, r), S (r,) and Vt (r, N) of a wide matrix by its small Gram matrix, without zero singular values.

    Costs one product of the matrix with its transpose. Exact enough for factors well above rounding error: singular
    values below 1e-6 of the first are dropped.
    """
    tasks = len(values)
    rank = min(rank, tasks, values.shape[1])
    if rank == 0:
        return np.empty((tasks, 0)), np.empty(0), np.empty((0, values.shape[1]))
    U, S = _leading(values @ values.T, rank)
    return U, S, (U.T @ values) / S[:, None]


def _leading(gram: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute leading eigenvectors (M, r) of a Gram matrix and the roots (r,) of their eigenvalues, without zeros."""
    tasks = len(gram)
    if rank == 0:
        return np.empty((tasks, 0)), np.empty(0)
    # NumPy computes all of them, and SciPy could stop at the rank; but SciPy starts a second pool of BLAS threads,
    # which competes with the first for the cores.
    squares, U = np.linalg.eigh(gram)
    squares, U = squares[: -rank - 1 : -1], U[:, : -rank - 1 : -1]
    keep = squares > max(squares[0], 0.0) * 1e-12
    return U[:, keep], np.sqrt(squares[keep])
