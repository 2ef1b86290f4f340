"""Forecasters that learn from the atlas's rows what a similarity says of a new one, alone and joined with completion.

All know each example's mean over the known tasks, and learn the rest by ridge regression on the known rows. Penalties,
the weight of the joined forecast and the widths of intervals come from left-out tasks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import numpy as np

from forgetcast.atlas.matrix import ForgettingMatrix
from forgetcast.completion.base import Completion, Forecast, clone
from forgetcast.completion.bayesian import Bayesian
from forgetcast.completion.whole import LEVELS
from forgetcast.errors import DataError, MismatchError
from forgetcast.similarity.signals import SAMPLE, Vectors

PENALTIES = tuple(10.0**power for power in range(-3, 5))
"""Ridge penalties to choose from, in units of the mean squared feature."""

WEIGHTS = np.linspace(0, 1, 11)
"""Weights of the side information to choose from."""

PROBES = (0, 3, 10, 30)
"""Numbers of random probes at which the weight is chosen; between them it is interpolated."""

FOLDS = 5
"""Groups of known tasks that are left out."""


@dataclass(frozen=True)
class SideInformation:
    """What is known of tasks and examples before anything is measured.

    Attributes
    ----------
    tasks : sequence of str, length M
        Known ones and new ones.
    similarities : mapping of str to array, shape (M, N)
    vectors : Vectors or None
        Representations of the tasks and the examples.
    facts : array, shape (N, F)
        Of each example, such as its loss and its source.
    sample : int
        At most so many examples stood for a task.
    notes : tuple of str
        What was cut.
    """

    tasks: Sequence[str]
    similarities: Mapping[str, np.ndarray]
    vectors: Vectors | None = None
    facts: np.ndarray | None = None
    sample: int = SAMPLE
    notes: tuple[str, ...] = ()

    @cached_property
    def basis(self) -> tuple[np.ndarray, np.ndarray]:
        """Left singular vectors (N, d) and squared singular values (d,) of the examples' centred representations."""
        assert self.vectors is not None
        examples = self.vectors.examples.astype(np.float64)
        U, S, _ = np.linalg.svd(examples - examples.mean(axis=0), full_matrices=False)
        kept = S / max(float(S.max(initial=0.0)), 1e-300) > 1e-9
        return U[:, kept], S[kept] ** 2

    def rows(self, tasks: Sequence[str]) -> np.ndarray:
        """Return the positions of tasks; MismatchError if one is unknown."""
        known = {name: row for row, name in enumerate(self.tasks)}
        if missing := [name for name in tasks if name not in known]:
            raise MismatchError(f"nothing is known of the task {missing[0]!r}; add its data to --tasks")
        return np.array([known[name] for name in tasks], dtype=np.intp)


class RowForecaster(ABC):
    """Forecasts a row from side information alone."""

    side: SideInformation

    @abstractmethod
    def forecast(self, values: np.ndarray, known: np.ndarray, new: np.ndarray) -> np.ndarray:
        """Learn from the rows `values` (M, N), NaN legal, of the tasks `known` (M,); forecast the rows `new` (B, N)."""


@dataclass(frozen=True)
class OnSimilarity(RowForecaster):
    """A straight line on one similarity: z_ij = a + slope * s_ij; with `means`, z_ij = b_j + slope * (s_ij - s_.j).

    b_j and s_.j are the example's means over the known tasks. The second takes from the similarity what differs
    between tasks, and from the atlas what is common to them.
    """

    side: SideInformation
    name: str
    means: bool = False

    def forecast(self, values: np.ndarray, known: np.ndarray, new: np.ndarray) -> np.ndarray:
        """Fit the line by least squares."""
        similarity = np.nan_to_num(self.side.similarities[self.name])
        x, centre = similarity[known], similarity[known].mean(axis=0)
        seen = ~np.isnan(values)
        columns = _column_means(values) if self.means else np.full(values.shape[1], np.nanmean(values))
        if not self.means:
            centre = np.full(values.shape[1], x[seen].mean())
        deviation = np.where(seen, x - centre, 0.0)
        total = float((deviation**2).sum())
        slope = float((deviation * np.nan_to_num(values - columns)).sum()) / total if total > 0 else 0.0
        return columns + slope * (similarity[new] - centre)


@dataclass(frozen=True)
class RepresentationProduct(RowForecaster):
    """Product of linearly transformed representations: z_ij = b_j + t_i' W e_j, with W by ridge regression.

    The forecaster of Jin and Ren (ICML 2024, arXiv 2402.01865), with the encoder frozen and its last linear map learned
    in closed form: with the Gram matrices K of the tasks and G of the examples, the deviations from the examples' means
    are smoothed on both sides, K (K + p)^-1 R (G + q)^-1 G. The penalties p and q are chosen by left-out tasks.
    """

    side: SideInformation

    def forecast(self, values: np.ndarray, known: np.ndarray, new: np.ndarray) -> np.ndarray:
        """Smooth the known deviations and carry them over to the new tasks."""
        assert self.side.vectors is not None
        tasks = self.side.vectors.tasks.astype(np.float64)
        tasks = tasks - tasks[known].mean(axis=0)
        kernel = tasks @ tasks[known].T
        kernel /= max(float(np.mean(np.diagonal(kernel[known]))), 1e-30)
        columns = _column_means(values)
        residual = np.nan_to_num(values - columns)
        U, S = self.side.basis
        projected = residual @ U  # (M, d): deviations in the span of the representations
        eye, gram = np.eye(len(known)), kernel[known]
        losses = dict[tuple[float, float], float]()
        for p in PENALTIES:
            hat = gram @ np.linalg.inv(gram + p * eye)
            # Leaving out a task of a kernel ridge regression, in closed form.
            left_out = ((hat - np.diag(np.diagonal(hat))) @ projected) / (1 - np.diagonal(hat))[:, None]
            for q in PENALTIES:
                smoothed = left_out * (S / (S + q * S.mean()))
                losses[p, q] = float((smoothed**2 - 2 * smoothed * projected).sum())
        p, q = min(losses, key=lambda penalties: losses[penalties])
        if losses[p, q] >= 0 or not residual.any():  # no better than the examples' means
            return np.tile(columns, (len(new), 1))
        smoothed = (kernel[new] @ np.linalg.solve(gram + p * eye, projected)) * (S / (S + q * S.mean()))
        return columns + smoothed @ U.T


@dataclass(frozen=True)
class Ridge(RowForecaster):
    """Ridge regression of every cell on everything: the example's mean, all similarities, and the example's facts.

    Each similarity counts as it is, as its deviation from its mean over the known tasks, and as its task's mean.
    """

    side: SideInformation

    def forecast(self, values: np.ndarray, known: np.ndarray, new: np.ndarray) -> np.ndarray:
        """Fit by the normal equations; choose the penalty by left-out groups of tasks."""
        features = self._features(values, known)
        seen = ~np.isnan(values)
        grams, moments = [], []
        for row, task in enumerate(known):
            X = features(task)[seen[row]]
            grams.append(X.T @ X)
            moments.append(X.T @ values[row, seen[row]])
        losses = np.zeros(len(PENALTIES))
        for fold in _folds(len(known)):
            rest = np.setdiff1d(np.arange(len(known)), fold)
            gram, moment = sum(grams[i] for i in rest), sum(moments[i] for i in rest)
            for at, penalty in enumerate(PENALTIES):
                w = _ridge(gram, moment, penalty)
                losses[at] += sum(w @ grams[i] @ w - 2 * w @ moments[i] for i in fold)
        w = _ridge(sum(grams), sum(moments), PENALTIES[int(losses.argmin())])
        return np.array([features(task) @ w for task in new])

    def _features(self, values: np.ndarray, known: np.ndarray) -> Any:
        columns = _column_means(values)
        parts = [np.nan_to_num(part) for part in self.side.similarities.values()]
        centres = [part[known].mean(axis=0) for part in parts]
        scales = [float(part[known].std()) or 1.0 for part in parts]
        averages = [float(part[known].mean()) for part in parts]
        facts = np.empty((len(columns), 0)) if self.side.facts is None else np.nan_to_num(self.side.facts)
        facts = (facts - facts.mean(axis=0)) / np.where(facts.std(axis=0) > 0, facts.std(axis=0), 1.0)
        middle, spread = float(columns.mean()), float(columns.std()) or 1.0

        def of(task: int) -> np.ndarray:
            found = [np.ones(len(columns)), (columns - middle) / spread]
            for part, centre, scale, average in zip(parts, centres, scales, averages, strict=True):
                row = part[task]
                shift = np.full(len(columns), (row.mean() - centre.mean()) / scale)
                found += [(row - average) / scale, (row - centre) / scale, shift]
            return np.column_stack([*found, facts])

        return of


def _ridge(gram: Any, moment: Any, penalty: float) -> np.ndarray:
    """Solve with a penalty relative to the mean diagonal; the first feature, the constant, has none."""
    diagonal = np.full(len(gram), penalty * float(np.mean(np.diagonal(gram))))
    diagonal[0] = 0.0
    return np.linalg.lstsq(gram + np.diag(diagonal), moment, rcond=None)[0]


def _column_means(values: np.ndarray) -> np.ndarray:
    """Mean of each column's entries; of a column without any, the mean of all."""
    seen = ~np.isnan(values)
    counts = seen.sum(axis=0)
    sums = np.where(seen, values, 0.0).sum(axis=0)
    return np.where(counts > 0, sums / np.maximum(counts, 1), sums.sum() / max(counts.sum(), 1))


def _folds(tasks: int) -> list[np.ndarray]:
    order = np.random.default_rng(0).permutation(tasks)
    return np.array_split(order, min(tasks, FOLDS))


class FromSide:
    """An arm of `bench`: forecasts from side information, optionally joined with completion.

    Alone, the probes change nothing but their own entries. Joined, the forecaster's deviation from the examples' means,
    times a weight, shifts the prior mean of the completion method, and the probes do the rest. The weight is chosen on
    left-out tasks, for several numbers of probes. It stays zero unless its error is smaller there by more than one
    standard error of the difference, so that useless side information costs nothing.

    Parameters
    ----------
    forecaster : RowForecaster
    joined : bool
    method : Completion, optional
        Completion method to join with; default `Bayesian`.

    Attributes
    ----------
    weights_ : array, shape (len(PROBES),)
        Learned weights; ones where not joined.
    """

    def __init__(self, *, forecaster: RowForecaster, joined: bool = False, method: Completion | None = None) -> None:
        self.forecaster = forecaster
        self.joined = joined
        self.method = method

    def fit(self, matrix: ForgettingMatrix) -> Self:
        """Learn from a matrix whose tasks the side information knows.

        Raises
        ------
        DataError
            If fewer than four tasks are known.
        MismatchError
            If nothing is known of a task.
        """
        self._known = self.forecaster.side.rows(matrix.tasks)
        if len(self._known) < 4:
            raise DataError(f"forecasts from side information need at least four tasks, not {len(self._known)}")
        self._values = matrix.values.astype(np.float64)
        self._means = _column_means(self._values)
        self._completion = clone(self.method or Bayesian()).fit(matrix)
        self.weights_ = np.ones(len(PROBES))
        self._learn()
        return self

    def _learn(self) -> None:
        """Choose the weights, and learn the standard deviations, on left-out tasks."""
        rng = np.random.default_rng(0)
        errors = np.zeros((len(PROBES), len(WEIGHTS), len(self._known)))
        residuals = []
        order = rng.permutation(self._values.shape[1])
        for fold in _folds(len(self._known)):
            rest = np.setdiff1d(np.arange(len(self._known)), fold)
            rows = self.forecaster.forecast(self._values[rest], self._known[rest], self._known[fold])
            truth = self._values[fold]
            residuals.append(truth - rows)
            if not self.joined or len(rest) < 2:
                continue
            completion = clone(self.method or Bayesian()).fit(self._values[rest])
            deviation = rows - _column_means(self._values[rest])
            # Rows without gaps share their probes, and so one call.
            whole = not np.isnan(truth).any()
            for at in [np.arange(len(fold))] if whole else np.arange(len(fold))[:, None]:
                usable = order[~np.isnan(truth[at[0], order])]
                shifts = WEIGHTS[:, None, None] * deviation[at]  # (W, b, N)
                for number, k in enumerate(PROBES):
                    probes, judged = np.split(usable, [min(k, len(usable) // 2)])
                    rest_of = (truth[at][:, probes] - shifts[:, :, probes]).reshape(len(WEIGHTS) * len(at), len(probes))
                    mean = shifts + completion.predict(probes, rest_of).mean.reshape(shifts.shape)
                    errors[number][:, fold[at]] = ((mean - truth[at])[:, :, judged] ** 2).mean(axis=2)
        residual = np.concatenate(residuals)
        self._std = np.sqrt(np.maximum(np.nan_to_num(np.nanmean(residual**2, axis=0)), 1e-24))
        standardised = np.abs(residual / self._std)
        self._widths = np.nanquantile(standardised, LEVELS)
        self._widths[0] = 0.0
        if self.joined:
            for number, each in enumerate(errors):
                best = int(each.mean(axis=1).argmin())
                gain = each[0] - each[best]
                convincing = gain.mean() > gain.std(ddof=1) / np.sqrt(len(gain))
                self.weights_[number] = WEIGHTS[best] if convincing else 0.0

    def for_tasks(self, tasks: Sequence[str]) -> TaskForecaster:
        """Return a forecaster of new rows, of these tasks in their order."""
        new = self.forecaster.side.rows(tasks)
        return TaskForecaster(self, self.forecaster.forecast(self._values, self._known, new))


@dataclass(frozen=True)
class TaskForecaster:
    """A fitted `FromSide` and its forecasts (B, N) of the rows of new tasks."""

    fitted: FromSide
    rows: np.ndarray = field(repr=False)

    def predict(self, probes: Any, observed: Any) -> Forecast:
        """Forecast the tasks' rows from measurements (B, k) at the probes (k,); as `Completion.predict`."""
        at = np.asarray(probes, dtype=np.intp).reshape(-1)
        measured = np.atleast_2d(np.asarray(observed, dtype=np.float64))
        if self.fitted.joined:
            weight = float(np.interp(len(at), PROBES, self.fitted.weights_))
            shifts = weight * (self.rows - self.fitted._means)
            forecast = self.fitted._completion.predict(at, measured - shifts[:, at])
            return Forecast(forecast.mean + shifts, forecast.std, at, forecast.misfit, forecast.widths)
        mean, std = self.rows.copy(), np.tile(self.fitted._std, (len(self.rows), 1))
        mean[:, at], std[:, at] = measured, 0.0
        return Forecast(mean, std, at, np.ones(len(mean)), self.fitted._widths)


def arms_of(side: SideInformation) -> dict[str, FromSide]:
    """Return the arms of a comparison: each similarity alone and with means, trained forecasters, and joined ones."""
    alone: dict[str, RowForecaster] = {name: OnSimilarity(side, name) for name in side.similarities}
    varying = [name for name, part in side.similarities.items() if np.nanmax(np.ptp(part, axis=0)) > 0]
    trained: dict[str, RowForecaster] = {f"mean+{name}": OnSimilarity(side, name, means=True) for name in varying}
    if side.vectors is not None:
        trained["representation"] = RepresentationProduct(side)
    trained["ridge"] = Ridge(side)
    arms = {name: FromSide(forecaster=each) for name, each in (alone | trained).items()}
    joined = {f"bayesian+{name.removeprefix('mean+')}": each for name, each in trained.items()}
    return arms | {name: FromSide(forecaster=each, joined=True) for name, each in joined.items()}
