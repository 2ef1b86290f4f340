"""Factor analysis of the atlas with a task shift and per-example noise; the posterior of a new row in closed form."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import linalg

from forgetcast.completion.additive import additive_effects
from forgetcast.completion.base import Estimate, LinearGaussian, column_variance
from forgetcast.errors import ConfigError


class Bayesian(LinearGaussian):
    """Low-rank Gaussian model of a new task's row.

    The row is the examples' means, plus a shift of the whole task, plus a few principal factors of the doubly centred
    atlas, plus noise that differs by example. The shift has a wide prior, because a new task may be milder or harsher
    than any known one; the factors a narrow one, because the known tasks' coordinates were fitted to their own noise.

    Parameters
    ----------
    factors : int
        Principal factors beside the shift; at most M - 2 are used.
    prior_scale : float
        Prior standard deviation of a factor, as a multiple of what the known tasks show.
    shift_scale : float
        The same for the shift.
    noise_shrinkage : float
        Weight of the average over examples in each example's noise variance, in [0, 1].

    Notes
    -----
    Factors are determined up to their sign. Missing entries of the atlas are filled with the model's own
    reconstruction until it stops changing (Mazumder, Hastie and Tibshirani 2010 with a rank in place of a penalty).

    Examples
    --------
    >>> import numpy as np
    >>> from forgetcast.completion import Bayesian
    >>> rng = np.random.default_rng(0)
    >>> loadings = rng.normal(size=50)
    >>> atlas = np.outer(rng.normal(size=20), loadings)
    >>> forecast = Bayesian(factors=1).fit(atlas).predict([0, 1, 2], 0.5 * loadings[:3])
    >>> bool(np.allclose(forecast.mean, 0.5 * loadings, atol=0.05))
    True
    """

    def __init__(
        self,
        *,
        factors: int = 5,
        prior_scale: float = 0.5,
        shift_scale: float = 3.0,
        noise_shrinkage: float = 0.3,
    ) -> None:
        self.factors = factors
        self.prior_scale = prior_scale
        self.shift_scale = shift_scale
        self.noise_shrinkage = noise_shrinkage

    def _estimate(self, values: np.ndarray) -> Estimate:
        if self.factors < 0 or self.prior_scale <= 0 or self.shift_scale <= 0 or not 0 <= self.noise_shrinkage <= 1:
            raise ConfigError("Bayesian: factors >= 0, positive scales and a noise_shrinkage in [0, 1] are needed")
        tasks = len(values)
        rank = max(min(self.factors, tasks - 2), 0)
        low_rank = fit_low_rank(values, rank, centred=True)
        loadings = low_rank.loadings
        noise = column_variance(values - low_rank.fit, lost=_lost(values, rank), shrinkage=self.noise_shrinkage)
        shift = max(float(low_rank.rows.var(ddof=1)), float(noise.mean()) / 10)
        return Estimate(
            mean=low_rank.columns,
            loadings=np.column_stack([np.ones(len(loadings)), loadings]),
            prior=np.concatenate([[self.shift_scale**2 * shift], np.full(loadings.shape[1], self.prior_scale**2)]),
            noise=noise,
        )


def _lost(values: np.ndarray, rank: int) -> float:
    """Degrees of freedom a column loses: one to its mean, its loadings, and its part of the tasks' coordinates."""
    tasks, examples = values.shape
    return 1.0 + rank + (rank + 1) * tasks / examples


class LowRank(NamedTuple):
    """Reconstruction (M, N) of a matrix, its row effects (M,), column effects (N,) and the factors' loadings (N, r).

    The loadings are scaled so that the known tasks' coordinates have variance one; factors without any variance are
    left out, so r may be less than the rank asked for.
    """

    fit: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    loadings: np.ndarray


def fit_low_rank(values: np.ndarray, rank: int, *, centred: bool, rounds: int = 500) -> LowRank:
    """Best rank-`rank` reconstruction of the measured entries, around row and column effects if `centred`.

    Parameters
    ----------
    values : array, shape (M, N)
        NaN where not measured. Such entries are filled with the reconstruction until it stops changing.
    rank : int
    centred : bool
        Whether the factors come on top of a_i + b_j (effects of rows and columns) or stand alone.
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
