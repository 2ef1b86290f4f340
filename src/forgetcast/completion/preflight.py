"""A forecast before anything is run, or from a pilot: a prior of a new task's coefficients, which probes sharpen."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import scipy

from forgetcast.atlas.matrix import ForgettingMatrix
from forgetcast.completion.base import (
    SIMILAR_SHARE,
    Forecast,
    Split,
    calibration_columns,
    interval_widths,
    task_splits,
)
from forgetcast.completion.gaussian import OUT_OF_FAMILY, Estimate, LinearGaussian
from forgetcast.completion.ridge import Fit, Ridge
from forgetcast.completion.whole import LEVELS
from forgetcast.errors import ConfigError, DataError, MismatchError

FEWEST = 8
"""Tasks of the atlas with evidence that a regression needs."""

Evidence = Literal["text", "pilot", "growth"]
"""What a forecast is made from: the task's text; a pilot, by a regression on its probes; or a pilot whose probes, times
the growth that the atlas's tasks show, are noisy measurements of the end."""

ATLAS_MEAN = "atlas mean"
"""The forecast without evidence."""


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
    """Forecasts a task before its fine-tune, or from a pilot: the first part of it.

    The coefficients of the atlas's tasks are regressed on what is known of each by then, its evidence, by ridge, each
    with a penalty chosen by left-out tasks. The prediction for a new task is the mean of its prior; the prior's
    variance is the model's, times the share of a coefficient's variance that the evidence leaves unexplained. Whole
    folds of tasks are then left out, model and all. The evidence with the least error there is used; none, if it is not
    below that of the atlas's mean.

    The same is done with tasks that are left out together with their kind: their family, where the tasks' families are
    given, else the third of the other tasks that is most similar. These errors say how wide the forecast of a task must
    be that is unlike the atlas.

    Parameters
    ----------
    model : LinearGaussian
        Fitted.

    Attributes
    ----------
    uses_ : 'text', 'pilot', 'growth' or None
        The evidence that is used. A pilot is used in the better of two ways: its probes as features, or, times the
        growth until the end, as measurements of the end whose errors are those on the atlas's tasks.
    errors_, unlike_errors_ : dict of str to float
        Root mean squared error, nats per token, of the 'atlas mean' and of each evidence that was given, on tasks left
        out with others of their kind in the atlas, and without. NaN where too few tasks were left to learn from.
    kinds_ : int
        Families that were left out; 0: the most similar tasks were.
    """

    uses_: Evidence | None
    errors_: dict[str, float]
    unlike_errors_: dict[str, float]
    kinds_: int

    def __init__(self, model: LinearGaussian) -> None:
        self.model = model

    def fit(
        self,
        features: np.ndarray | None = None,
        *,
        pilot: np.ndarray | None = None,
        probes: np.ndarray | None = None,
        families: Sequence[str] | None = None,
    ) -> Self:
        """Learn from what is known of the atlas's tasks, all in the order that the model was fitted on.

        Parameters
        ----------
        features : array, shape (M, p), optional
            Of the tasks' texts; NaN for a task whose text is unknown.
        pilot : array, shape (M, k), optional
            Forgetting of some examples after a share of the fine-tune; NaN for a task that was not measured then.
        probes : array of int, shape (k,), optional
            Columns of these examples; without them, growth is not used.
        families : sequence of str, length M, optional
            Tasks of one family are of a kind. With fewer than two families, similarity decides.

        Raises
        ------
        MismatchError
            If evidence is given of another number of tasks.
        """
        matrix = self.model._fitted_on
        values = matrix.values if isinstance(matrix, ForgettingMatrix) else matrix
        self._probes = None if probes is None else np.asarray(probes, dtype=np.intp)
        named: dict[Evidence, np.ndarray | None]
        named = {"text": features, "pilot": pilot, "growth": None if probes is None else pilot}
        given = {name: np.asarray(table, dtype=np.float64) for name, table in named.items() if table is not None}
        for name, table in given.items():
            if table.shape[:1] != (values.shape[0],):
                count = table.shape[0]
                raise MismatchError(f"features of {count} tasks ({name}), and the atlas has {values.shape[0]}")
        self.kinds_ = len(set(families)) if families is not None and len(set(families)) > 1 else 0
        with_probes: dict[str, Any] = {"always": self._probes}
        like = self._leave_out(given, task_splits(values, matrix.groups, **with_probes))
        apart = self._leave_out(
            given,
            task_splits(values, families, fewest=2, **with_probes)
            if self.kinds_
            else task_splits(values, matrix.groups, similar=SIMILAR_SHARE, **with_probes),
        )
        self.errors_, self.unlike_errors_ = (
            {name: left.error for name, left in each.items()} for each in (like, apart)
        )
        usable = [name for name in given if self.errors_[name] < self.errors_[ATLAS_MEAN]]
        usable.sort(key=lambda name: self.errors_[name])
        self.uses_ = usable[0] if usable else None
        used = self.uses_ or ATLAS_MEAN
        self._calibrated = {False: _Calibrated.of(like[used]), True: _Calibrated.of(apart[used])}
        self._learned: _Learned | None = None
        if self.uses_ is not None:
            table = given[self.uses_]
            known = np.isfinite(table).all(axis=1)
            columns = calibration_columns(values.shape[1], np.random.default_rng(0), self._probes)
            part = values[:, columns][known].astype(np.float64)
            state = self.model.state_
            state = state._replace(
                mean=state.mean[columns], loadings=state.loadings[columns], noise=state.noise[columns]
            )
            self._learned = self._learn(self.uses_, state, part, table[known], columns)
        return self

    def _learn(
        self, name: Evidence, state: Estimate, rows: np.ndarray, evidence: np.ndarray, columns: np.ndarray
    ) -> _Learned | None:
        """Learn from the rows (m, n) of tasks at some columns and their evidence (m, p); None of too few tasks."""
        if len(rows) < FEWEST:
            return None
        if name != "growth":
            return _Regression(Ridge(evidence).fit(_coefficients(state, rows)))
        assert self._probes is not None
        places = np.searchsorted(columns, self._probes)
        there = columns[np.minimum(places, len(columns) - 1)] == self._probes
        return _Grown.of(evidence[:, there], rows[:, places[there]], there, state, places[there])

    def _leave_out(self, given: Mapping[Evidence, np.ndarray], splits: Iterable[Split]) -> dict[str, _Left]:
        """Forecast left-out tasks from the atlas's mean, and from each evidence."""
        names: list[str] = [ATLAS_MEAN, *given]
        found = {name: _Left() for name in names}
        for split in splits:
            state = self.model.estimate(split.rest)
            for row in split.rows:
                found[ATLAS_MEAN].add(state, row)
            for name, table in given.items():
                known = np.isfinite(table).all(axis=1)
                use = known[split.kept]
                learned = self._learn(name, state, split.rest[use], table[split.kept[use]], split.columns)
                for task, row in zip(split.left_out.tolist(), split.rows, strict=True):
                    if learned is not None and known[task]:
                        found[name].add(_with_prior(state, *learned.prior(state, table[task])), row)
                    else:
                        found[name].add(state, row, known=bool(known[task]), fitted=learned is not None)
        return found

    def model_for(self, features: np.ndarray | None = None, *, pilot: np.ndarray | None = None) -> LinearGaussian:
        """Return the model with the prior that a task's evidence gives; the model itself where none helps.

        Its `predict` sharpens the prior with probes.

        Parameters
        ----------
        features : array, shape (p,), optional
        pilot : array, shape (k,), optional

        Raises
        ------
        DataError
            If the evidence that is used is not given, or not finite.
        """
        if self._learned is None:
            return self.model
        own = features if self.uses_ == "text" else pilot
        if own is None or not np.isfinite(own).all():
            what = "text" if self.uses_ == "text" else "pilot"
            raise DataError(f"the forecast uses the task's {what}: give it, without missing values")
        return with_prior(self.model, *self._learned.prior(self.model.state_, np.asarray(own, dtype=np.float64)))

    def forecast(
        self, features: np.ndarray | None = None, *, pilot: np.ndarray | None = None, unlike: bool = False
    ) -> Forecast:
        """Forecast a task from its evidence alone, as `model_for`, with intervals as wide as left-out tasks say.

        `unlike`: as wide as for tasks that are left out with their kind, if that is wider.
        """
        model, widths = self.model_for(features, pilot=pilot), self._calibrated[unlike]
        if unlike and widths.scale < self._calibrated[False].scale:
            widths = self._calibrated[False]
        mean, variance = _without_probes(model.state_)
        return Forecast(mean, widths.scale * np.sqrt(variance), np.empty(0, dtype=np.intp), 1.0, widths.widths)

    def mean_half_width(self, level: float = 0.9, *, unlike: bool = False) -> float:
        """Return the half-width of the interval of the pool's mean, nats per token, by conformal prediction.

        It is the quantile of the left-out tasks' errors that covers a new task with probability `level` if it is as
        likely to come next as they were (Vovk, Gammerman and Shafer 2005). Infinite with too few tasks for the level.
        With `unlike`, of the errors on tasks that are left out with their kind, if that is wider; tasks of one family
        are not independent of each other, so with few families it is an estimate.

        Raises
        ------
        ConfigError
            If `level` is not between 0 and 1.
        """
        if not 0 < level < 1:
            raise ConfigError(f"an interval's level must be between 0 and 1, not {level}")
        return max(self._calibrated[kind].half(level) for kind in (False, unlike))


class _Regression(NamedTuple):
    """Coefficients by ridge regression on the evidence."""

    fit: Fit

    def prior(self, state: Estimate, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and variance of the coefficients, (r,) each."""
        return _prior(state, self.fit, own)


class _Grown(NamedTuple):
    """Coefficients by conditioning on the probes of a pilot, times a factor, as noisy measurements of the end.

    Attributes
    ----------
    factor : float
        From the forgetting then to that at the end, by least squares over the atlas's tasks and probes.
    errors : array, shape (k,)
        Mean squared error of each probe's product with it, over these tasks.
    there : array of bool
        Of all probes, the k that are among the columns.
    mean, loadings, noise : arrays, shapes (k,), (k, r) and (k,)
        Of the model, at these.
    """

    factor: float
    errors: np.ndarray
    there: np.ndarray
    mean: np.ndarray
    loadings: np.ndarray
    noise: np.ndarray

    @classmethod
    def of(cls, now: np.ndarray, end: np.ndarray, there: np.ndarray, state: Estimate, at: np.ndarray) -> _Grown | None:
        """Learn from the probes (m, k) of tasks then and at the end; None if one never was, or the prior is flat."""
        both = ~np.isnan(end)
        if not both.any(axis=0).all() or not at.size or not np.isfinite(state.prior).all():
            return None
        finished = np.where(both, end, 0.0)
        factor = float((now * finished).sum() / max(float((now**2 * both).sum()), 1e-300))
        squares = np.where(both, (finished - factor * now) ** 2, 0.0).sum(axis=0) / both.sum(axis=0)
        return cls(factor, squares, there, state.mean[at], state.loadings[at].astype(np.float64), state.noise[at])

    def prior(self, state: Estimate, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and variance of the coefficients, (r,) each; their covariance given the probes is left out."""
        spread = self.loadings * state.prior
        joint = spread @ self.loadings.T + np.diag(self.noise + self.errors)
        gain = np.linalg.solve(joint, spread).T  # (r, k)
        mean = gain @ (self.factor * own[self.there] - self.mean)
        return mean, np.maximum(state.prior - np.einsum("rk,kr->r", gain, spread), 0.0)


_Learned = _Regression | _Grown


class _Left:
    """Errors of forecasts without probes on left-out tasks: standardised ones, their squares, and of the means.

    Of a task without the evidence, the forecast is the model's, and only its squares count, so that errors of different
    evidence are of the same tasks.
    """

    def __init__(self) -> None:
        self.rows: list[np.ndarray] = []
        self.means: list[float] = []
        self.always = True
        self._squares: list[float] = []

    def add(self, state: Estimate, row: np.ndarray, *, known: bool = True, fitted: bool = True) -> None:
        mean, variance = _without_probes(state)
        error = row - mean
        self._squares.append(float(np.mean(error**2)))
        self.always &= fitted
        if known:
            self.rows.append(error / np.sqrt(variance))
            self.means.append(float(error.mean()))

    @property
    def error(self) -> float:
        return float(np.sqrt(np.mean(self._squares))) if self._squares and self.always else math.nan


class _Calibrated(NamedTuple):
    """Scale and widths as of `Completion`, for a forecast without probes, and the sorted errors of left-out means."""

    scale: float
    widths: np.ndarray
    misses: np.ndarray

    @classmethod
    def of(cls, left: _Left) -> _Calibrated:
        scale, widths = 1.0, scipy.special.ndtri(0.5 + LEVELS / 2)
        if left.rows:
            scale, widths = interval_widths(np.concatenate(left.rows))
        return cls(scale, widths, np.sort(np.abs(left.means)))

    def half(self, level: float) -> float:
        """Return the conformal quantile of the errors of the means."""
        rank = math.ceil((len(self.misses) + 1) * level)
        return float(self.misses[rank - 1]) if rank <= len(self.misses) else math.inf


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
