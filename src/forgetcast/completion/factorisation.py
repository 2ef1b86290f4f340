"""Matrix factorisation with biases, and its convex form, the nuclear norm."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from forgetcast.completion.additive import additive_effects
from forgetcast.completion.base import CALIBRATION_EXAMPLES
from forgetcast.completion.gaussian import Estimate, LinearGaussian
from forgetcast.completion.low_rank import fit_low_rank, sum_of, truncated_svd
from forgetcast.errors import ConfigError

PENALTIES = 0.5 ** np.arange(1, 9)
"""Penalties to try, as shares of the largest singular value."""

HELD_OUT = 0.1
"""Share of the observed entries that the penalty is chosen on."""


class MatrixFactorization(LinearGaussian):
    """Biased matrix factorisation, z_ij = a_i + b_j + p_i . q_j, with a ridge on p and q.

    The paper's best (arXiv 2406.14026, "SVD" of scikit-surprise, rank 5 and no ridge, by stochastic gradient descent),
    solved exactly: alternating ridge regression converges to the singular value decomposition with every singular value
    lowered by the ridge. A new row's a and p are the ridge regression of its probes on q.

    Parameters
    ----------
    rank : int
    penalty : float or None
        The ridge, as a share of the largest singular value of the doubly centred matrix. None: chosen among PENALTIES
        by the error on a tenth of the entries, held out.

    Attributes
    ----------
    penalty_ : float
        The share that was used.

    Examples
    --------
    >>> import numpy as np
    >>> from forgetcast.completion import MatrixFactorization
    >>> atlas = np.outer([1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 2.0, 3.0, 4.0])
    >>> model = MatrixFactorization(rank=1, penalty=1e-6).fit(atlas)
    >>> model.predict([0, 3], [0.0, 15.0]).mean.round(2)
    array([ 0.,  5., 10., 15., 20.])
    """

    penalty_: float

    def __init__(self, *, rank: int = 5, penalty: float | None = None) -> None:
        self.rank = rank
        self.penalty = penalty

    def prepare(self, values: np.ndarray) -> None:
        """Check the settings and choose the penalty."""
        if self.rank < 1 or (self.penalty is not None and not 0 < self.penalty < 1):
            raise ConfigError(f"{type(self).__name__}: a rank >= 1 and a penalty between 0 and 1 are needed")
        self.penalty_ = choose_penalty(values, self.rank) if self.penalty is None else self.penalty

    def estimate(self, values: np.ndarray) -> Estimate:
        """Factor the matrix with the chosen penalty."""
        penalty = self.penalty_ * _largest(values)
        low_rank = fit_low_rank(values, self.rank, centred=True, penalty=penalty)
        residuals = values - low_rank.fit
        noise = max(float(np.nanmean(residuals**2)), 1e-12)
        # Loadings are scaled to coordinates of variance one; the ridge is on p = U sqrt(S) and q = V sqrt(S).
        S = np.sqrt(len(values) - 1) * np.linalg.norm(low_rank.loadings, axis=0)
        loadings = low_rank.loadings * np.sqrt(len(values) - 1) / np.sqrt(S)
        prior = np.concatenate([[np.inf], np.full(loadings.shape[1], noise / penalty)])
        return Estimate(
            low_rank.columns, np.column_stack([np.ones(len(loadings)), loadings]), prior, np.full(len(loadings), noise)
        )


class SoftImpute(MatrixFactorization):
    """Nuclear-norm completion: matrix factorisation of any rank, regularised by the penalty alone.

    Mazumder, Hastie and Tibshirani 2010; the penalty is chosen on held-out entries along a path from strong to weak.

    Parameters
    ----------
    penalty : float or None
        As a share of the largest singular value; None: chosen.

    Examples
    --------
    >>> import numpy as np
    >>> from forgetcast.completion import SoftImpute
    >>> atlas = np.outer([1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 2.0, 3.0, 4.0])
    >>> SoftImpute(penalty=1e-6).fit(atlas).predict([0, 3], [0.0, 15.0]).mean.round(2)
    array([ 0.,  5., 10., 15., 20.])
    """

    def __init__(self, *, penalty: float | None = None) -> None:
        super().__init__(rank=10_000, penalty=penalty)


def choose_penalty(values: np.ndarray, rank: int) -> float:
    """Choose the penalty, as a share of the largest singular value, by the error on a tenth of the entries, held out.

    On at most CALIBRATION_EXAMPLES columns; the choice is fixed, so that a fit is a function of the matrix alone.
    """
    split = held_out_entries(values)
    if split is None:
        return float(PENALTIES[len(PENALTIES) // 2])
    largest = _largest(split.kept)
    errors = []
    for share in PENALTIES:
        fit = fit_low_rank(split.kept, rank, centred=True, penalty=share * largest, rounds=100).fit
        errors.append(float(np.mean((fit - split.values)[split.held_out] ** 2)))
    return float(PENALTIES[int(np.argmin(errors))])


class HeldOut(NamedTuple):
    """Part of a matrix, which of its entries are held out, and the remaining ones: all of shape (M, n)."""

    values: np.ndarray
    held_out: np.ndarray
    kept: np.ndarray


def held_out_entries(values: np.ndarray, seed: int = 0) -> HeldOut | None:
    """Hold out a tenth, by the seed, of the observed entries of at most CALIBRATION_EXAMPLES columns.

    Return None where nothing could be held out, or a row would become empty.
    """
    rng = np.random.default_rng(seed)
    part = values[:, rng.permutation(values.shape[1])[:CALIBRATION_EXAMPLES]]
    held_out = ~np.isnan(part) & (rng.random(part.shape) < HELD_OUT)
    kept = np.where(held_out, np.nan, part)
    usable = ~np.isnan(kept).all(axis=0)
    held_out, kept, part = held_out[:, usable], kept[:, usable], part[:, usable]
    if not held_out.any() or np.isnan(kept).all(axis=1).any():
        return None
    return HeldOut(part, held_out, kept)


def _largest(values: np.ndarray) -> float:
    """Return the largest singular value of the doubly centred matrix, missing entries set to zero; always positive."""
    residuals = np.nan_to_num(values - sum_of(*additive_effects(values)))
    S = truncated_svd(residuals, 1)[1]
    return float(S[0]) if len(S) and S[0] > 0 else 1e-6
