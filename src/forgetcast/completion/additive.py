"""The two baselines: each example's average, and that plus one shift per task."""

from __future__ import annotations

import numpy as np

from forgetcast.completion.gaussian import Estimate, LinearGaussian, column_variance


class Mean(LinearGaussian):
    """Predict each example's mean over the tasks of the atlas, independent of the probes.

    Examples
    --------
    >>> from forgetcast.completion import Mean
    >>> forecast = Mean().fit([[0.0, 1.0, 2.0], [2.0, 1.0, 4.0]]).predict([0], [5.0])
    >>> forecast.mean
    array([5., 1., 3.])
    """

    def estimate(self, values: np.ndarray) -> Estimate:
        """Compute the examples' means."""
        mean = np.nanmean(values, axis=0)
        noise = column_variance(values - mean, lost=1.0, shrinkage=0.0)
        return Estimate(mean, np.empty((len(mean), 0)), np.empty(0), noise)


class Additive(LinearGaussian):
    """Predict z_ij = a_i + b_j: the example's effect plus a shift of the task, the mean residual at the probes.

    The same as the paper's additive predictor (arXiv 2406.14026), without its slight regularisation.

    Examples
    --------
    >>> from forgetcast.completion import Additive
    >>> forecast = Additive().fit([[0.0, 1.0, 2.0], [2.0, 3.0, 4.0]]).predict([0], [5.0])
    >>> forecast.mean
    array([5., 6., 7.])
    """

    def estimate(self, values: np.ndarray) -> Estimate:
        """Compute the examples' effects and the pooled residual variance."""
        rows, columns = additive_effects(values)
        pooled = column_variance(values - rows[:, None] - columns, lost=1.0, shrinkage=1.0)
        return Estimate(columns, np.ones((len(columns), 1)), np.array([np.inf]), pooled)


def additive_effects(values: np.ndarray, *, tolerance: float = 1e-10) -> tuple[np.ndarray, np.ndarray]:
    """Fit a_i + b_j to the observed entries by least squares: row effects (M,) of mean zero, column effects (N,).

    Alternates the two exact conditional solutions; without NaN the first round converges.
    """
    observed = ~np.isnan(values)
    filled = np.where(observed, values, 0.0)
    in_row, in_column = np.maximum(observed.sum(axis=1), 1), np.maximum(observed.sum(axis=0), 1)
    rows, columns = np.zeros(len(values)), np.zeros(values.shape[1])
    scale = max(float(np.abs(filled).max(initial=0.0)), 1e-300)
    for _ in range(1000):
        before = rows
        columns = (filled - observed * rows[:, None]).sum(axis=0) / in_column
        rows = (filled - observed * columns).sum(axis=1) / in_row
        if np.abs(rows - before).max(initial=0.0) <= tolerance * scale:
            break
    shift = rows.mean()
    return rows - shift, columns + shift
