"""Nearest neighbours among the tasks of the atlas."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from forgetcast.completion.additive import additive_effects
from forgetcast.completion.base import Completion
from forgetcast.completion.gaussian import column_variance
from forgetcast.completion.whole import Component, Joint
from forgetcast.errors import ConfigError


class KNN(Completion):
    """Complete a new task from the tasks of the atlas that are most similar to it at the probes.

    On the residuals e_ij of the additive model, a task i has the weight 1 / (d_i + softening), with d_i the mean
    squared difference of its residuals and the new task's at the probes (arXiv 2406.14026, where softening is 1, in
    squared nats). The forecast is a + b_j plus the weighted mean of the k nearest tasks' residuals.

    Parameters
    ----------
    k : int
        Tasks to average over; all of them if there are fewer.
    softening : float or None
        In squared nats. None: the mean squared residual, so that the unit does not matter.

    Notes
    -----
    A missing residual counts as zero: the entry's additive prediction.

    Examples
    --------
    >>> from forgetcast.completion import KNN
    >>> atlas = [[0.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0]]
    >>> KNN(k=2, softening=0.0).fit(atlas).predict([0, 1], [0.0, 1.0]).mean.round(3)
    array([0., 1., 0., 1.])
    """

    def __init__(self, *, k: int = 40, softening: float | None = None) -> None:
        self.k = k
        self.softening = softening

    def prepare(self, values: np.ndarray) -> None:  # noqa: ARG002
        """Check the settings."""
        if self.k < 1 or (self.softening is not None and not self.softening >= 0):
            raise ConfigError("KNN: k >= 1 and a softening that is not negative are needed")

    def estimate(self, values: np.ndarray) -> Neighbours:
        """Compute the additive residuals of the tasks."""
        rows, columns = additive_effects(values)
        residuals = values - rows[:, None] - columns
        noise = column_variance(residuals, lost=1.0, shrinkage=0.0)
        softening = float(np.nanmean(residuals**2)) if self.softening is None else self.softening
        return Neighbours(columns, np.nan_to_num(residuals), noise, self.k, max(softening, 1e-12))


@dataclass(frozen=True)
class Neighbours:
    """Example effects (N,), the tasks' residuals (M, N), their variance (N,), and how neighbours are weighted."""

    columns: np.ndarray
    residuals: np.ndarray
    noise: np.ndarray
    k: int
    softening: float

    def posterior(self, probes: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Complete rows (B, k) measured at the probes (k,); the variance (N,) is that of the additive residuals."""
        mean, log_misfit = self._complete(probes, rows)
        return mean, self.noise, log_misfit

    def joint(self, probes: np.ndarray, row: np.ndarray) -> Joint:
        """Return the joint posterior of one row: a shift as uncertain as a mean of the probes, and the noise."""
        mean, _ = self._complete(probes, row[None])
        known = self.noise[probes] if len(probes) else self.noise
        shift = float(known.mean()) / max(len(probes), 1)
        ones = np.ones((len(self.columns), 1))
        return (Component(1.0, mean[0], ones, np.zeros(1), np.full((1, 1), shift), self.noise),)

    def _complete(self, probes: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Complete rows (B, k) measured at the probes (k,): mean (B, N) and log_misfit (B,)."""
        residual = rows - self.columns[probes]
        shift = residual.mean(axis=1, keepdims=True) if len(probes) else np.zeros((len(rows), 1))
        centred = residual - shift
        count = max(len(probes), 1)
        distance = ((centred[:, None, :] - self.residuals[None, :, probes]) ** 2).sum(axis=2) / count  # (B, M)
        weights = 1.0 / (distance + self.softening)
        if self.k < weights.shape[1]:
            farther = np.argsort(distance, axis=1, kind="stable")[:, self.k :]
            np.put_along_axis(weights, farther, 0.0, axis=1)
        weights /= weights.sum(axis=1, keepdims=True)
        mean = self.columns + shift + weights @ self.residuals
        log_misfit = np.log(np.maximum((centred**2 / self.noise[probes]).sum(axis=1) / count, 1e-12))
        return mean, log_misfit

    def choose(self, k: int, candidates: np.ndarray) -> np.ndarray:  # noqa: ARG002
        """Return no columns: there are no loadings to choose by."""
        return np.empty(0, dtype=np.intp)

    def extend(self, observed: np.ndarray) -> Neighbours:
        """Give unobserved examples the average effect, and a noise that covers the spread of all."""
        columns = np.full(len(observed), self.columns.mean())
        residuals = np.zeros((len(self.residuals), len(observed)))
        noise = np.full(len(observed), self.noise.mean() + self.columns.var())
        columns[observed], residuals[:, observed], noise[observed] = self.columns, self.residuals, self.noise
        return Neighbours(columns, residuals, noise, self.k, self.softening)
