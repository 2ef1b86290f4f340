"""A forecast before anything is run: a new task's coefficients from its text, as a prior that probes sharpen."""

from __future__ import annotations

import copy
import math
from typing import Self

import numpy as np
import scipy

from forgetcast.atlas.matrix import ForgettingMatrix
from forgetcast.completion.base import Forecast, calibration_columns, interval_widths, task_splits
from forgetcast.completion.gaussian import OUT_OF_FAMILY, Estimate, LinearGaussian
from forgetcast.completion.ridge import Fit, Ridge
from forgetcast.completion.whole import LEVELS
from forgetcast.errors import ConfigError, DataError, MismatchError

FEWEST = 8
"""Tasks of the atlas with features that a regression needs."""


def with_prior(model: LinearGaussian, mean: np.ndarray, variance: np.ndarray) -> LinearGaussian:
    """Return a fitted model whose coefficients have another prior, N(mean, diag(variance)); (r,) each.

    The two models share all other parameters.

    Raises
    ------
    MismatchError
        If the model has another number of coefficients.
    DataError
        If a mean is not finite or a variance is negative.
    """
    changed = copy.copy(model)
    changed.state_ = _with_prior(model.state_, np.asarray(mean, np.float64), np.asarray(variance, np.float64))
    return changed


def _with_prior(state: Estimate, mean: np.ndarray, variance: np.ndarray) -> Estimate:
    if mean.shape != state.prior.shape or variance.shape != state.prior.shape:
        raise MismatchError(f"a prior needs a mean and a variance for each of {len(state.prior)} coefficients")
    if not np.isfinite(mean).all() or not (variance >= 0).all():
        raise DataError("a prior needs finite means and variances that are not negative")
    shifted = (state.mean + state.loadings @ mean).astype(state.mean.dtype)
    mixture = state.mixture
    if mixture is not None:
        # The new prior takes the place of the density around the atlas's tasks.
        log_weights = mixture.log_weights.copy()
        log_weights[len(OUT_OF_FAMILY) :] = -np.inf
        mixture = mixture._replace(log_weights=log_weights)
    return state._replace(mean=shifted, prior=variance, mixture=mixture)


class Preflight:
    """Forecasts a task from features of its text alone.

    The coefficients of the atlas's tasks are regressed on their features by ridge, each with a penalty chosen by
    left-out tasks. The prediction for a new task is the mean of its prior; the prior's variance is the model's, times
    the share of a coefficient's variance that the features leave unexplained. Whole folds of tasks are then left out,
    model and all: if the text does not lower the error there, it is not used.

    Parameters
    ----------
    model : LinearGaussian
        Fitted.

    Attributes
    ----------
    uses_text_ : bool
    errors_ : dict of str to float
        Root mean squared error on left-out tasks, nats per token, of the 'atlas mean' and of the 'text'; NaN where it
        could not be measured.
    scale_, widths_
        As of `Completion`, for a forecast without probes.
    """

    uses_text_: bool
    errors_: dict[str, float]
    scale_: float
    widths_: np.ndarray

    def __init__(self, model: LinearGaussian) -> None:
        self.model = model

    def fit(self, features: np.ndarray | None) -> Self:
        """Learn from the features of the atlas's tasks.

        Parameters
        ----------
        features : array or None, shape (M, p)
            In the order of the tasks that the model was fitted on; NaN for a task whose text is unknown. None: of all.
        """
        matrix = self.model._fitted_on
        known = np.zeros(matrix.shape[0], dtype=bool)
        if features is not None:
            features = np.asarray(features, dtype=np.float64)
            if features.shape[:1] != (matrix.shape[0],):
                raise MismatchError(f"features of {features.shape[0]} tasks, and the atlas has {matrix.shape[0]}")
            known = np.isfinite(features).all(axis=1)
        values = matrix.values if isinstance(matrix, ForgettingMatrix) else matrix
        by_mean, by_text = _Left(), _Left()
        for split in task_splits(values, matrix.groups):
            state = self.model.estimate(split.rest)
            use = known[split.kept]
            fitted = None
            if features is not None and use.sum() >= FEWEST:
                fitted = Ridge(features[split.kept[use]]).fit(_coefficients(state, split.rest[use]))
            for task, row in zip(split.left_out.tolist(), split.rows, strict=True):
                by_mean.add(state, row)
                if fitted is not None and features is not None and known[task]:
                    by_text.add(_with_prior(state, *_prior(state, fitted, features[task])), row)
                elif fitted is not None:
                    by_text.add(state, row)
        self.errors_ = {"atlas mean": by_mean.error, "text": by_text.error}
        self.uses_text_ = len(by_text.rows) == len(by_mean.rows) and by_text.error < by_mean.error
        left = by_text if self.uses_text_ else by_mean
        self._misses = np.sort(np.abs(left.means))
        self.scale_, self.widths_ = 1.0, scipy.special.ndtri(0.5 + LEVELS / 2)
        if left.rows:
            self.scale_, self.widths_ = interval_widths(np.concatenate(left.rows))
        self._fitted: Fit | None = None
        if self.uses_text_ and features is not None:
            columns = calibration_columns(values.shape[1], np.random.default_rng(0))
            part = values[:, columns][known].astype(np.float64)
            state = self.model.state_
            state = state._replace(
                mean=state.mean[columns], loadings=state.loadings[columns], noise=state.noise[columns]
            )
            self._fitted = Ridge(features[known]).fit(_coefficients(state, part))
        return self

    def model_for(self, features: np.ndarray | None) -> LinearGaussian:
        """Return the model with the prior that a task's features (p,) give; the model itself where they do not help.

        Its `predict` sharpens the prior with probes.
        """
        if self._fitted is None or features is None:
            return self.model
        return with_prior(self.model, *_prior(self.model.state_, self._fitted, features))

    def forecast(self, features: np.ndarray | None) -> Forecast:
        """Forecast a task from its features (p,) alone, with intervals as wide as left-out tasks say."""
        model = self.model_for(features)
        mean, variance = _without_probes(model.state_)
        return Forecast(mean, self.scale_ * np.sqrt(variance), np.empty(0, dtype=np.intp), 1.0, self.widths_)

    def mean_half_width(self, level: float = 0.9) -> float:
        """Return the half-width of the interval of the pool's mean, nats per token, by conformal prediction.

        It is the quantile of the left-out tasks' errors that covers a new task with probability `level` if it is as
        likely to come next as they were (Vovk, Gammerman and Shafer 2005). Infinite with too few tasks for the level.

        Raises
        ------
        ConfigError
            If `level` is not between 0 and 1.
        """
        if not 0 < level < 1:
            raise ConfigError(f"an interval's level must be between 0 and 1, not {level}")
        rank = math.ceil((len(self._misses) + 1) * level)
        return float(self._misses[rank - 1]) if rank <= len(self._misses) else math.inf


class _Left:
    """Errors of forecasts without probes on left-out tasks: standardised ones, their squares, and of the means."""

    def __init__(self) -> None:
        self.rows: list[np.ndarray] = []
        self.means: list[float] = []
        self._squares: list[float] = []

    def add(self, state: Estimate, row: np.ndarray) -> None:
        mean, variance = _without_probes(state)
        error = row - mean
        self.rows.append(error / np.sqrt(variance))
        self.means.append(float(error.mean()))
        self._squares.append(float(np.mean(error**2)))

    @property
    def error(self) -> float:
        return float(np.sqrt(np.mean(self._squares))) if self._squares else math.nan


def _without_probes(state: Estimate) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and variance (N,) of a row before anything is measured."""
    mean, variance, _ = state.posterior(np.empty(0, dtype=np.intp), np.empty((1, 0)))
    return mean[0], variance[0]


def _coefficients(state: Estimate, rows: np.ndarray) -> np.ndarray:
    """Return the most probable coefficients (B, r) of rows (B, n), NaN where an entry was not measured."""
    found = np.zeros((len(rows), len(state.prior)))
    free = state.prior > 0
    for at, row in enumerate(rows):
        seen = np.flatnonzero(~np.isnan(row))
        loadings = state.loadings[seen][:, free].astype(np.float64)
        weighted = loadings / state.noise[seen, None]
        precision = weighted.T @ loadings + np.diag(1 / state.prior[free])
        found[at, free] = np.linalg.solve(precision, weighted.T @ (row[seen] - state.mean[seen]))
    return found


def _prior(state: Estimate, fitted: Fit, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and variance (r,) of the coefficients of a task with these features (p,).

    What the atlas's tasks have in common is in the model's mean, so the mean of their coefficients is not added.
    """
    predicted = fitted.predict(np.asarray(features, dtype=np.float64)[None])
    targets = fitted.mean + fitted.ridge.scores @ fitted.coefficients
    in_sample = np.mean((targets - fitted.mean) ** 2, axis=0)
    left_out = np.mean(fitted.residuals**2, axis=0)
    unexplained = np.where(np.isinf(fitted.penalties), 1.0, left_out / np.maximum(in_sample + left_out, 1e-300))
    unexplained = np.minimum(unexplained * (1 + predicted.leverage[0]), 1.0)
    return predicted.values[0] - fitted.mean, state.prior * unexplained
