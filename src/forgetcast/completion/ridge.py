"""Ridge regression with the penalty of each target chosen by left-one-out errors, in closed form."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

PENALTIES = np.concatenate([10.0 ** np.arange(-4.0, 4.5, 0.5), [np.inf]])
"""Penalties that are tried, in units of the mean eigenvalue. Infinite: the features are not used."""


class Prediction(NamedTuple):
    """Targets predicted for m rows.

    Attributes
    ----------
    values : array, shape (m, t)
    leverage : array, shape (m, t)
        How much the uncertainty of the coefficients adds to the variance of an error, as a multiple of the noise's.
    """

    values: np.ndarray
    leverage: np.ndarray


class Ridge:
    """Linear regression of targets on features, shrunk towards the targets' mean.

    The decomposition of the features is made once; any number of targets is then fitted by products with it. With its
    penalty, this is the posterior mean of a Gaussian process with a linear kernel.

    Parameters
    ----------
    features : array, shape (n, p)
        Finite. They are centred, and scaled by `weights` over their standard deviations.
    weights : array, shape (p,), optional
        How little each feature is penalised; default: all one.

    Attributes
    ----------
    scores : array, shape (n, r)
        Projections of the rows on the eigenvectors.

    Notes
    -----
    With the eigenvalues e of X'X, projections S = XV and penalty q, the fit is ``S diag(1 / (e + q)) S'y``, the
    leverage of row i is ``1/n + sum(S_i^2 / (e + q))``, and its left-one-out residual is the residual over one minus
    the leverage (Hastie, Tibshirani and Friedman, section 7.10.1).
    """

    def __init__(self, features: np.ndarray, weights: np.ndarray | None = None) -> None:
        features = np.asarray(features, dtype=np.float64)
        deviation = features.std(axis=0)
        self._center = features.mean(axis=0)
        constant = deviation <= 1e-9 * np.maximum(np.abs(self._center), 1e-30)
        self._scale = np.where(constant, 0.0, 1.0 / np.where(constant, 1.0, deviation))
        if weights is not None:
            self._scale = self._scale * weights
        standard = (features - self._center) * self._scale
        n, p = standard.shape
        if n < p:  # by the smaller of the two products
            values, vectors = np.linalg.eigh(standard @ standard.T)
            kept = values > 1e-10 * max(values[-1], 1e-300)
            values, vectors = values[kept], vectors[:, kept]
            self._directions = standard.T @ vectors / np.sqrt(values)
        else:
            values, vectors = np.linalg.eigh(standard.T @ standard)
            kept = values > 1e-10 * max(values[-1], 1e-300)
            values, self._directions = values[kept], vectors[:, kept]
        self._values, self.scores = values, standard @ self._directions
        average = values.sum() / max(min(n, p), 1)
        self._shrunk = [np.zeros_like(values) if np.isinf(q) else 1 / (values + q * average) for q in PENALTIES]
        squares = self.scores**2
        self._leverage = np.array([1 / n + squares @ shrunk for shrunk in self._shrunk])  # (penalties, n)

    def fit(self, targets: np.ndarray) -> Fit:
        """Fit targets (n, t), each with the penalty whose left-one-out errors have the smallest mean square."""
        mean = targets.mean(axis=0)
        projected = self.scores.T @ (targets - mean)
        best, errors = np.full(targets.shape[1], -1), np.full(targets.shape[1], np.inf)
        residuals = np.empty_like(targets, dtype=np.float64)
        for at, (shrunk, leverage) in enumerate(zip(self._shrunk, self._leverage, strict=True)):
            fitted = mean + self.scores @ (shrunk[:, None] * projected)
            left_out = (targets - fitted) / np.maximum(1 - leverage, 1e-6)[:, None]
            squares = np.mean(left_out**2, axis=0)
            better = squares < errors
            best[better], errors[better], residuals[:, better] = at, squares[better], left_out[:, better]
        shrunk = np.array([self._shrunk[at] for at in best]).T  # (p, t)
        return Fit(self, mean, shrunk * projected, shrunk, residuals, PENALTIES[best], self._leverage[best].T)

    def scores_of(self, features: np.ndarray) -> np.ndarray:
        """Return the projections of new rows (m, p)."""
        return ((np.asarray(features, dtype=np.float64) - self._center) * self._scale) @ self._directions

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.scores)


class Fit(NamedTuple):
    """Fitted targets.

    Attributes
    ----------
    ridge : Ridge
    mean : array, shape (t,)
    coefficients, shrunk : array, shape (p, t)
        Of the projections; ``1 / (e + penalty)``.
    residuals : array, shape (n, t)
        Left-one-out.
    penalties : array, shape (t,)
    leverage : array, shape (n, t)
    """

    ridge: Ridge
    mean: np.ndarray
    coefficients: np.ndarray
    shrunk: np.ndarray
    residuals: np.ndarray
    penalties: np.ndarray
    leverage: np.ndarray

    def predict(self, features: np.ndarray) -> Prediction:
        """Predict the targets of new rows (m, p)."""
        scores = self.ridge.scores_of(features)
        return Prediction(self.mean + scores @ self.coefficients, 1 / len(self.ridge) + scores**2 @ self.shrunk)
