"""Low-rank reconstruction of a matrix with missing entries, by the small Gram matrix of its rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import linalg

from forgetcast.completion.additive import additive_effects


class LowRank(NamedTuple):
    """Reconstruction (M, N) of a matrix, its row effects (M,), column effects (N,) and the factors' loadings (N, r).

    The loadings are scaled so that the known tasks' coordinates have variance one; factors without any variance are
    left out, so r may be less than the rank asked for.
    """

    fit: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    loadings: np.ndarray


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
    return LowRank(fit, rows, columns, (right * strength[:, None] / np.sqrt(max(tasks - 1, 1))).T)


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
    squares, left = linalg.eigh(values @ values.T, subset_by_index=(tasks - rank, tasks - 1))
    squares, left = squares[::-1], left[:, ::-1]
    kept = squares > max(squares[0], 0.0) * 1e-12
    strength, left = np.sqrt(squares[kept]), left[:, kept]
    return left, strength, (left.T @ values) / strength[:, None]
