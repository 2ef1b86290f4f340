"""Forecasts of examples that were never measured, from their features and the forecast of the measured pool."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy

from forgetcast.atlas.matrix import ForgettingMatrix
from forgetcast.completion.base import Completion, Forecast, interval_widths, task_splits
from forgetcast.completion.ridge import Fit, Ridge
from forgetcast.completion.whole import LEVELS
from forgetcast.errors import DataError
from forgetcast.measure.features import Features

SOURCES = 64
"""Sources, the most frequent ones, that are features."""

FEWEST = 30
"""Measured examples with features that a regression needs."""


class Transfer:
    """Predicts what is known of measured examples for new ones, by ridge regression on their features.

    Each target has its own penalty, chosen by left-out examples.

    Parameters
    ----------
    features : Features
        Of at least the measured examples, in any order.
    examples : sequence of str, length N
        Ids of the measured examples, in the order of what is predicted.

    Attributes
    ----------
    columns : array of int, shape (n,)
        Those of the N examples that have features.

    Raises
    ------
    MismatchError
        If an example is not among the features.
    DataError
        If fewer than FEWEST examples have features.
    """

    def __init__(self, features: Features, examples: Sequence[str]) -> None:
        order = features.ids.positions(examples, where="the model")
        self.columns = np.flatnonzero(features.usable[order])
        if len(self.columns) < FEWEST:
            raise DataError(
                f"{len(self.columns)} measured examples have features; at least {FEWEST} are needed to learn from"
            )
        self._sources = _frequent([features.sources[i] for i in order])
        self._inputs = self.inputs(features)[order[self.columns]]
        self.ridge = self.of(np.arange(len(self.columns)))

    def of(self, rows: np.ndarray) -> Ridge:
        """Return the regression on a part of the n examples."""
        others = 2 + len(self._sources)
        width = self._inputs.shape[1]
        weights = np.ones(width)  # loss, length and source together count as all hidden states do
        weights[width - others :] = np.sqrt((width - others) / others)
        return Ridge(self._inputs[rows], weights)

    def inputs(self, features: Features) -> np.ndarray:
        """Return the regressors (m, p): hidden states, loss, logarithm of the length, source."""
        of_source = [[float(source == known) for known in self._sources] for source in features.sources]
        scalars = [features.nll, np.log(np.maximum(features.tokens, 1))]
        return np.column_stack(
            [features.states.astype(np.float64), *scalars, np.reshape(of_source, (len(features), len(self._sources)))]
        )

    def predict(self, values: np.ndarray, parts: Iterable[Features]) -> np.ndarray:
        """Predict values of new examples.

        Parameters
        ----------
        values : array, shape (N,) or (N, t)
            Of the measured examples, such as a forecast or loadings.
        parts : iterable of Features
            M examples in all; read once.

        Returns
        -------
        array, shape (M,) or (M, t)
            NaN where an example has no features.
        """
        targets = np.asarray(values, dtype=np.float64)[self.columns]
        fit = self.ridge.fit(targets.reshape(len(targets), -1))
        predicted = np.concatenate([fit.predict(self.inputs(part)).values for part in parts])
        return predicted.reshape(len(predicted), *targets.shape[1:])

    def explained(self, values: np.ndarray) -> np.ndarray:
        """Return the share of the variance of values (N, t) that is predicted at left-out examples, shape (t,)."""
        targets = np.asarray(values, dtype=np.float64)[self.columns]
        residuals = self.ridge.fit(targets).residuals
        spread = np.mean((targets - targets.mean(axis=0)) ** 2, axis=0)
        return 1 - np.mean(residuals**2, axis=0) / np.where(spread > 0, spread, 1.0)


class Unmeasured:
    """Extends a fitted completion method to examples of which only features are known.

    The model's row of the pool is transferred to new examples (`Transfer`), so that the forecast of one is that of the
    pool's examples that the base model treats alike. Its variance has two parts: what the features do not explain of
    this row, by left-out examples, and what the model is unsure of at such an example. Their sum is scaled, and the
    intervals are as wide, as entries of left-out tasks at left-out examples say.

    Parameters
    ----------
    model : Completion
        Fitted, of any method. Of `Auto`, the winner for tasks like the atlas's.

    Attributes
    ----------
    transfer_ : Transfer
    scale_ : float
    widths_ : array, shape (len(LEVELS),)
        As of `Completion`, for examples that were not measured.
    """

    transfer_: Transfer
    scale_: float
    widths_: np.ndarray

    def __init__(self, model: Completion) -> None:
        self.model = model

    def fit(self, features: Features) -> Unmeasured:
        """Learn from the features of the model's examples; errors as of `Transfer`."""
        self.transfer_ = Transfer(features, self.model.examples_)
        self._calibrate()
        return self

    def predict(self, probes: Any, observed: Any, parts: Iterable[Features]) -> Forecast:
        """Forecast rows at new examples from probes in the pool.

        Parameters
        ----------
        probes, observed
            As of `Completion.predict`.
        parts : iterable of Features
            M examples in all; read once.

        Returns
        -------
        Forecast
            Of the M examples; NaN where an example has no features. It has no probes.
        """
        forecast, columns = self.model.predict(probes, observed), self.transfer_.columns
        probes = np.asarray(probes, dtype=np.intp).reshape(-1)
        rows = np.atleast_2d(np.asarray(observed, dtype=np.float64))
        mean, variance, _ = self.model.state_.posterior(probes, rows)
        variance = np.broadcast_to(variance, mean.shape)
        row = _Row.of(self.transfer_.ridge, mean[:, columns], variance[:, columns])
        predicted = [row.predict(self.transfer_.inputs(part)) for part in parts]
        means = np.concatenate([mean for mean, _ in predicted]).T
        stds = self.scale_ * np.sqrt(np.concatenate([variance for _, variance in predicted])).T
        none = np.empty(0, dtype=np.intp)
        if np.ndim(forecast.misfit) == 0:
            return Forecast(means[0], stds[0], none, forecast.misfit, self.widths_)
        return Forecast(means, stds, none, forecast.misfit, self.widths_)

    def _calibrate(self) -> None:
        """Estimate scale and widths from left-out tasks at left-out examples."""
        self.scale_, self.widths_ = 1.0, scipy.special.ndtri(0.5 + LEVELS / 2)
        matrix = self.model._fitted_on
        at = np.full(len(self.model.examples_), -1)
        at[self.transfer_.columns] = np.arange(len(self.transfer_.columns))
        errors, ridges = [], dict[bytes, Ridge]()
        for split in task_splits(matrix.values if isinstance(matrix, ForgettingMatrix) else matrix, matrix.groups):
            known = np.flatnonzero(at[split.columns] >= 0)
            if len(known) < FEWEST:
                continue
            mean, variance, _ = self.model.estimate(split.rest).posterior(split.probes, split.rows[:, split.probes])
            chosen = at[split.columns[known]]
            key = chosen.tobytes()  # of a complete matrix, all splits have the same columns
            if key not in ridges:
                ridges = {key: self.transfer_.of(chosen)}
            row = _Row.of(ridges[key], mean[:, known], np.broadcast_to(variance, mean.shape)[:, known])
            left_out, spread = row.left_out(mean[:, known])
            errors.append(((split.rows[:, known] - left_out) / np.sqrt(spread)).ravel())
        if errors:
            self.scale_, self.widths_ = interval_widths(np.concatenate(errors))


@dataclass(frozen=True)
class _Row:
    """Regressions of B forecast rows, and of the logarithms of their variances, on n examples."""

    means: Fit
    logs: Fit
    unexplained: np.ndarray
    correction: np.ndarray

    @classmethod
    def of(cls, ridge: Ridge, means: np.ndarray, variances: np.ndarray) -> _Row:
        """Regress rows (B, n)."""
        logs = np.log(np.maximum(variances.T.astype(np.float64), 1e-300))
        fitted, fitted_logs = ridge.fit(means.T.astype(np.float64)), ridge.fit(logs)
        # The mean of a logarithm is below the logarithm of the mean.
        smooth = np.exp(logs - fitted_logs.residuals)
        correction = np.mean(variances.T, axis=0) / np.mean(smooth, axis=0)
        unexplained = np.mean(fitted.residuals**2, axis=0) / np.mean(1 + fitted.leverage, axis=0)
        return cls(fitted, fitted_logs, unexplained, correction)

    def predict(self, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return means and variances, (m, B), of new examples."""
        values, leverage = self.means.predict(inputs)
        return values, self._variance(self.logs.predict(inputs).values, leverage)

    def left_out(self, means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return means and variances, (B, n), of each example from the others."""
        logs = self.logs
        own = logs.mean + logs.ridge.scores @ logs.coefficients
        return means - self.means.residuals.T, self._variance(own, self.means.leverage).T

    def _variance(self, logs: np.ndarray, leverage: np.ndarray) -> np.ndarray:
        return np.exp(logs) * self.correction + self.unexplained * (1 + leverage)


def _frequent(sources: Sequence[str]) -> tuple[str, ...]:
    """Return the most frequent sources; none where there is only one."""
    names, counts = np.unique(list(sources), return_counts=True)
    order = np.lexsort([names, -counts])[:SOURCES]
    return tuple(str(names[i]) for i in order) if len(names) > 1 else ()
