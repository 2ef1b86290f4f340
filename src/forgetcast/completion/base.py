"""What all completion methods share: the contract, calibration on left-out tasks, and the linear-Gaussian model.

Most methods are linear-Gaussian: a new task's forgetting of example j is modelled as

    z_j = mean_j + loadings_j . c + e_j,    c ~ N(0, diag(prior)),    e_j ~ N(0, noise_j)

A method decides what these four are (`_estimate`); given the probes, the posterior of c and of every z_j follows in
closed form (Bishop, Pattern Recognition and Machine Learning, sections 3.3 and 2.3.7).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import numpy as np
from scipy import special

from forgetcast.atlas import Atlas, StoredMatrix
from forgetcast.errors import ConfigError, DataError
from forgetcast.matrix import ForgettingMatrix

LEVELS = np.array([0.0, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99])
"""Interval levels whose width is learned from left-out tasks; levels between are interpolated."""

CALIBRATION_FOLDS, CALIBRATION_TASKS, CALIBRATION_EXAMPLES, CALIBRATION_PROBES = 10, 40, 1_000, 10
"""Of `left_out`: groups of tasks, or single tasks where entries are missing; examples; and probes of each task."""

BLOCK = 8_192
"""Examples that are worked on at once, so that they stay in the cache."""

SCALE_DEGREES = 5.0
"""Observations that what is assumed of a new task's own scale of variances is worth; few, because tasks differ much."""

STRANGER = ((0.0, 0.0), (1.0, 0.0), (3.0, 0.0), (0.0, 1.0), (0.0, 3.0))
"""Kinds of tasks that are averaged over, by how well each explains the probes, with equal weights beforehand.

The first follows the atlas. The others move every example beside on its own, with a variance that is a multiple of
what the factors explain of this example, or of the average one. Known tasks cannot tell how likely such ones are."""


@dataclass(frozen=True)
class Forecast:
    """A completed row, or B of them.

    Attributes
    ----------
    mean, std : array, shape (N,) or (B, N)
        Expected forgetting and its standard deviation, nats per token. At a probe: the measurement, and 0.
    probes : array of int, shape (k,)
        Columns that were measured.
    misfit : float or array, shape () or (B,)
        p-value of "this task is like those in the atlas", from how well the model explains the probes together.
        Small (say below .05) says: unlike the atlas, so trust the forecast less. 1.0 where there are no probes.
    widths : array, shape (len(LEVELS),)
        Half-width of the interval at each level of LEVELS, in standard deviations.
    """

    mean: np.ndarray
    std: np.ndarray
    probes: np.ndarray
    misfit: np.ndarray | float
    widths: np.ndarray

    def interval(self, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper end of the interval that should hold `level` of the truths, shapes like `mean`.

        Raises
        ------
        ConfigError
            If `level` is not in [0, .99].
        """
        if not 0 <= level <= LEVELS[-1]:
            raise ConfigError(f"an interval's level must be between 0 and {LEVELS[-1]}, not {level}")
        half = self.std.dtype.type(np.interp(level, LEVELS, self.widths)) * self.std
        return self.mean - half, self.mean + half


class Estimate(NamedTuple):
    """The parts of a linear-Gaussian model.

    Attributes
    ----------
    mean : array, shape (N,)
    loadings : array, shape (N, r)
        Best in Fortran's order, in which one coefficient's loadings lie together.
    prior : array, shape (r,)
        Prior variances of the coefficients.
    noise : array, shape (N,)
        Variances.
    unlike : array, shape (r,), optional
        Prior variances of the coefficients whose factors a task unlike the known ones may not follow. If they are
        given, such tasks are averaged in, as STRANGER says.
    unlike_average : float
        Mean over the examples of ``loadings**2 @ unlike``.
    """

    mean: np.ndarray
    loadings: np.ndarray
    prior: np.ndarray
    noise: np.ndarray
    unlike: np.ndarray | None = None
    unlike_average: float = 0.0

    def posterior(self, probes: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Condition on rows (B, k) measured at the probes (k,): mean (B, N), variance (B, N), log_misfit (B,).

        A task's variances have a scale of their own, known as SCALE_DEGREES observations would tell it, so the
        posterior is Student's t: with the probes' squared surprise s, standardised by their joint covariance, all
        variances are multiplied by (SCALE_DEGREES + s) / (SCALE_DEGREES + k).

        Raises
        ------
        DataError
            If the probes leave a coefficient undetermined: an infinite prior and no probe.
        """
        at_probes = self.loadings[probes].astype(np.float64)
        strange = np.zeros(len(self.prior)) if self.unlike is None else self.unlike
        kinds = np.array(STRANGER if self.unlike is not None else STRANGER[:1])
        own, same = kinds[:, :1], kinds[:, 1:]
        noise = self.noise[probes] + own * (at_probes**2 @ strange) + same * self.unlike_average  # (kinds, k)
        found, covariances, weights, scales, log_misfit = _condition(
            at_probes, self.prior, noise, rows - self.mean[probes]
        )
        average = np.einsum("hb,hbr->br", weights, found)
        # Of the coefficients, for each row (B, r, r): within each kind of task, and between the kinds' means.
        scaled = weights * scales
        apart = np.sqrt(weights)[:, :, None] * (found - average)
        spread = np.tensordot(scaled, covariances, (0, 0)) + np.einsum("hbr,hbs->brs", apart, apart)
        spread += np.einsum("hb,r->br", own * scaled, strange)[:, :, None] * np.eye(len(strange))
        floor = (same * scaled).sum(axis=0) * self.unlike_average
        mean, variance = self._spread_out(average, spread, scaled.sum(axis=0), floor)
        return mean, variance, log_misfit

    def _spread_out(
        self, coefficients: np.ndarray, spread: np.ndarray, noise: np.ndarray, floor: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance (B, N) of the examples from those of the coefficients, (B, r) and (B, r, r).

        `noise` (B,) multiplies the examples' own; `floor` (B,) is added to all.
        """
        kind = self.loadings.dtype
        size, count = len(self.mean), len(coefficients)
        mean, variance = np.empty((count, size), kind), np.empty((count, size), kind)
        values, directions = np.linalg.eigh(spread)
        # Squares of these give the variance, so one product brings both it and the mean.
        halves = np.sqrt(np.maximum(values, 0.0))[:, :, None] * directions.transpose(0, 2, 1)
        factors = np.concatenate([coefficients[:, None, :], halves], axis=1).astype(kind)  # (B, 1 + r, r)
        told = np.empty((factors.shape[1], min(BLOCK, size)), kind)
        for start in range(0, size, BLOCK):  # small enough for the cache
            part = slice(start, min(start + BLOCK, size))
            block = told[:, : part.stop - start]
            for row in range(count):
                np.matmul(factors[row], self.loadings[part].T, out=block)
                np.add(block[0], self.mean[part], out=mean[row, part])
                np.einsum("rn,rn->n", block[1:], block[1:], out=variance[row, part])
                np.multiply(self.noise[part], kind.type(noise[row]), out=block[0])
                block[0] += kind.type(floor[row])
                variance[row, part] += block[0]
        return mean, variance

    def extended(self, known: np.ndarray) -> Estimate:
        """Give examples that were never measured the parameters of the average one, and a noise to match."""
        mean = np.full(len(known), self.mean.mean())
        loadings = np.tile(self.loadings.mean(axis=0), (len(known), 1))
        # What its own mean and loadings would be is as uncertain as the examples differ.
        priors = np.where(np.isinf(self.prior), 0.0, self.prior)
        noise = np.full(len(known), self.noise.mean() + self.mean.var() + self.loadings.var(axis=0) @ priors)
        mean[known], loadings[known], noise[known] = self.mean, self.loadings, self.noise
        return self._replace(mean=mean, loadings=loadings, noise=noise)


class Conditioned(NamedTuple):
    """Coefficients given the probes, for H kinds of noise and B rows.

    Attributes
    ----------
    means : array, shape (H, B, r)
    covariances : array, shape (H, r, r)
        Without the rows' own scale of variances.
    weights, scales : arrays, shape (H, B)
        Posterior probability of each kind of noise, and what its variances are multiplied by.
    log_misfit : array, shape (B,)
        Log of the mean squared surprise under the first kind.
    """

    means: np.ndarray
    covariances: np.ndarray
    weights: np.ndarray
    scales: np.ndarray
    log_misfit: np.ndarray


def _condition(loadings: np.ndarray, prior: np.ndarray, noise: np.ndarray, surprise: np.ndarray) -> Conditioned:
    """Condition the coefficients on probes with loadings (k, r), noise (H, k) and surprises (B, k)."""
    k, r = loadings.shape
    weighted = surprise / noise[:, None, :]  # (H, B, k)
    information = (loadings.T / noise[:, None, :]) @ loadings  # (H, r, r)
    projected = weighted @ loadings  # (H, B, r)
    # In units of the prior's standard deviations, so that the inverse is of matrices near one; where nothing is
    # assumed, in units of what the probes tell.
    flat, told = np.isinf(prior), np.diagonal(information[0])
    if (flat & (told <= 0)).any():
        raise DataError("this method needs at least one probe")
    units = np.sqrt(np.where(flat, 1.0 / np.where(told > 0, told, 1.0), prior))
    both = np.outer(units, units)
    precision = np.diag(1.0 - flat) + information * both
    covariances = np.linalg.inv(precision) * both
    means = projected @ covariances  # (H, B, r)
    # Woodbury: s' (noise + L prior L')^-1 s = s' noise^-1 s - (s' noise^-1 L) covariance (L' noise^-1 s)
    squared = np.maximum((surprise * weighted).sum(axis=2) - (projected * means).sum(axis=2), 1e-12)  # (H, B)
    # Density of the probes under Student's t, without what the kinds of noise share.
    evidence = -0.5 * (np.linalg.slogdet(precision)[1] + np.log(noise).sum(axis=1))[:, None]
    evidence = evidence - 0.5 * (SCALE_DEGREES + k) * np.log(SCALE_DEGREES + squared)
    weights = np.exp(evidence - evidence.max(axis=0))
    weights /= weights.sum(axis=0)
    scales = (SCALE_DEGREES + squared) / (SCALE_DEGREES + k)
    return Conditioned(means, covariances, weights, scales, np.log(squared[0] / max(k, 1)))


class State(Protocol):
    """What a method has learned: enough to complete new rows."""

    def posterior(self, probes: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Condition on rows (B, k) measured at the probes (k,).

        Returns
        -------
        mean : array, shape (B, N)
        variance : array, shape (N,) or (B, N)
        log_misfit : array, shape (B,)
            Log of how badly the probes fit, on any scale that left-out tasks can be compared on.
        """
        ...

    def extended(self, known: np.ndarray) -> State:
        """Give examples that were never measured, where `known` (N,) is False, the parameters of the average one."""
        ...


class Completion(ABC):
    """Base of all completion methods: checks, conditioning on probes, calibration on left-out tasks.

    A method derives from this class and writes `_estimate`; or from `LinearGaussian`, which most methods are.

    Attributes
    ----------
    state_ : State
        What was learned.
    examples_ : tuple of str, length N
    widths_ : array, shape (len(LEVELS),)
        Interval half-widths in standard deviations, from left-out tasks.
    scale_ : float
        What the model's own standard deviation is multiplied by, so that left-out tasks have variance one.
    """

    state_: State
    examples_: tuple[str, ...]
    widths_: np.ndarray
    scale_: float
    _log_misfits: np.ndarray
    _reads_float32: ClassVar[bool] = False

    @abstractmethod
    def _estimate(self, values: np.ndarray) -> State:
        """Learn from `values`, shape (M, N), M >= 2; no row or column is all NaN.

        They are float64, unless the class sets `_reads_float32` to be given the matrix itself.
        """

    def _prepare(self, values: np.ndarray) -> None:  # noqa: B027  # most methods have nothing to prepare
        """Check the settings and choose hyper-parameters once, before `_estimate` is called on parts of `values`."""

    def fit(self, matrix: ForgettingMatrix | Atlas | Any) -> Self:
        """Learn from the tasks of a forgetting matrix; NaN is legal anywhere.

        Of an atlas, all tasks are used. `Bayesian` reads a complete one a few columns at a time, so that it may be
        larger than the memory; any other is read as a whole.

        A row without any entry is passed over. An example that was never measured is given the average example's
        parameters and a noise that covers the spread of all examples.

        Raises
        ------
        DataError
            If fewer than two tasks have measurements.
        """
        if isinstance(matrix, Atlas):
            if self._reads_float32 and len(matrix.tasks) >= 2 and self._fit_stored(matrix):
                return self
            matrix = matrix.matrix()
        if not isinstance(matrix, ForgettingMatrix):
            matrix = ForgettingMatrix(matrix)
        values, known = matrix.values, None
        flat = values.ravel()
        if np.isnan(np.vdot(flat, flat)):  # one pass without a temporary, where most matrices are complete
            values = values[matrix.observed.any(axis=1)]
            known = np.any(~np.isnan(values), axis=0)
            values = values[:, known]
        if len(values) < 2:
            raise DataError(f"completion needs at least two measured tasks; the matrix has {len(values)}")
        if not self._reads_float32:
            values = values.astype(np.float64)
        self._prepare(values)
        state = self._estimate(values)
        self.state_ = state if known is None or known.all() else state.extended(known)
        self.examples_ = matrix.examples
        self._calibrate(values)
        return self

    def _fit_stored(self, atlas: Atlas) -> bool:  # noqa: ARG002
        """Learn from an atlas's numbers where they lie; False if the method needs all of them in memory."""
        return False

    def predict(self, probes: Any, observed: Any) -> Forecast:
        """Complete new rows from their probes.

        Parameters
        ----------
        probes : array-like of int, shape (k,)
            Columns that were measured; all different. k = 0 gives the forecast before anything is measured.
        observed : array-like, shape (k,) or (B, k)
            Forgetting there, nats per token.

        Raises
        ------
        DataError
            If a probe is out of range or repeats, or a measurement is not a finite number.
        """
        if not hasattr(self, "state_"):
            raise DataError(f"{type(self).__name__} is not fitted; call fit first")
        probes = np.asarray(probes, dtype=np.intp).reshape(-1)
        rows = np.asarray(observed, dtype=np.float64)
        single = rows.ndim == 1
        rows = np.atleast_2d(rows)
        if rows.ndim != 2 or rows.shape[1] != len(probes):
            raise DataError(f"{len(probes)} probes, but the measurements have the shape {np.shape(observed)}")
        if len(np.unique(probes)) < len(probes):
            raise DataError("a probe is given twice")
        if len(probes) and not (probes.min() >= 0 and probes.max() < len(self.examples_)):
            raise DataError(f"a probe is outside the {len(self.examples_)} examples of the atlas")
        if not np.isfinite(rows).all():
            bad = self.examples_[probes[np.argwhere(~np.isfinite(rows))[0, 1]]]
            raise DataError(f"the measurement of the probe {bad!r} is not a finite number")
        mean, variance, log_misfit = self.state_.posterior(probes, rows)
        std = np.sqrt(variance, out=variance if variance.shape == mean.shape else np.empty_like(mean))
        std *= self.scale_
        std[:, probes] = 0.0
        mean[:, probes] = rows
        misfit = self._p_value(log_misfit) if len(probes) else np.ones(len(rows))
        if single:
            return Forecast(mean[0], std[0], probes, float(misfit[0]), self.widths_)
        return Forecast(mean, std, probes, misfit, self.widths_)

    def _p_value(self, log_misfit: np.ndarray) -> np.ndarray:
        """One-sided prediction test of a new task's log misfit against those of the left-out tasks."""
        reference = self._log_misfits
        if len(reference) < 3 or (spread := reference.std(ddof=1)) == 0:
            return np.ones_like(log_misfit)
        t = (log_misfit - reference.mean()) / (spread * np.sqrt(1 + 1 / len(reference)))
        return np.asarray(special.stdtr(len(reference) - 1, -t))

    def _calibrate(self, values: np.ndarray | StoredMatrix) -> None:
        """Leave tasks out, forecast them from random probes, and learn the scale and the widths."""
        self.scale_, self.widths_ = 1.0, special.ndtri(0.5 + LEVELS / 2)
        self._log_misfits = np.empty(0)
        ratios: list[np.ndarray] = []
        misfits: list[float] = []
        for rest, rows, probes in left_out(values):
            mean, variance, log_misfit = self._estimate(rest).posterior(probes, rows[:, probes])
            ratios.append(np.delete((rows - mean) / np.sqrt(variance), probes, axis=1).ravel())
            misfits.extend(log_misfit)
        if not ratios:
            return
        pooled = np.abs(np.concatenate(ratios))
        self.scale_ = float(np.sqrt(np.mean(pooled**2))) or 1.0
        self.widths_ = np.quantile(pooled, LEVELS) / self.scale_
        self.widths_[0] = 0.0
        self._log_misfits = np.array(misfits)


def left_out(values: np.ndarray | StoredMatrix) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Leave tasks out, on a part of the columns: the other rows, theirs, and random probes.

    Of a complete matrix, every task is left out once, in at most CALIBRATION_FOLDS groups. Where entries are missing,
    tasks are left out singly, at most CALIBRATION_TASKS of them, each on the columns that it was measured on. At most
    CALIBRATION_EXAMPLES columns are used; nothing is left out of fewer than four tasks. The choice is fixed, so that a
    fit is a function of the matrix alone.
    """
    if values.shape[0] < 4:
        return
    rng = np.random.default_rng(0)
    part = values[:, np.sort(rng.permutation(values.shape[1])[:CALIBRATION_EXAMPLES])].astype(np.float64)
    present, order = ~np.isnan(part), rng.permutation(len(part))
    folds = np.array_split(order, min(len(order), CALIBRATION_FOLDS))
    if not present.all():
        folds = list(order[:CALIBRATION_TASKS, None])
    for fold in folds:
        known = np.delete(np.arange(len(part)), fold)
        usable = np.flatnonzero(present[fold].all(axis=0) & present[known].any(axis=0))
        known = known[present[np.ix_(known, usable)].any(axis=1)]
        if len(usable) >= 2 * CALIBRATION_PROBES and len(known) >= 2:
            probes = rng.permutation(len(usable))[:CALIBRATION_PROBES]
            yield part[np.ix_(known, usable)], part[np.ix_(fold, usable)], probes


class LinearGaussian(Completion):
    """Base of the methods whose new row is `mean + loadings @ c + noise` with Gaussian c and noise.

    Attributes
    ----------
    state_ : Estimate
    mean_ : array, shape (N,)
    loadings_ : array, shape (N, r)
    prior_ : array, shape (r,)
        Prior variances of the coefficients; infinite where nothing is assumed.
    noise_ : array, shape (N,)
        Variance, around the model, of each example.
    """

    state_: Estimate

    @abstractmethod
    def _estimate(self, values: np.ndarray) -> Estimate: ...

    @property
    def mean_(self) -> np.ndarray:
        """Expected row of a task that nothing is known of, shape (N,)."""
        return self.state_.mean

    @property
    def loadings_(self) -> np.ndarray:
        """Loadings of the examples, shape (N, r)."""
        return self.state_.loadings

    @property
    def prior_(self) -> np.ndarray:
        """Prior variances of the coefficients, shape (r,)."""
        return self.state_.prior

    @property
    def noise_(self) -> np.ndarray:
        """Noise variance of each example, shape (N,)."""
        return self.state_.noise


def column_variance(residuals: np.ndarray, lost: float, shrinkage: float) -> np.ndarray:
    """Variance of each column of residuals with NaN, drawn towards the mean of all columns, shape (N,).

    Parameters
    ----------
    residuals : array, shape (M, N)
    lost : float
        Degrees of freedom that each column's residuals have lost to the fit.
    shrinkage : float
        Weight of the mean over columns, in [0, 1].
    """
    counts = (~np.isnan(residuals)).sum(axis=0)
    sums = np.nansum(residuals**2, axis=0)
    average = sums.sum() / max(np.maximum(counts - lost, 0).sum(), 1.0)
    own = np.where(counts > lost, sums / np.maximum(counts - lost, 1e-9), average)
    variance = (1 - shrinkage) * own + shrinkage * average
    # A matrix without any noise still needs a positive variance to divide by.
    return np.maximum(variance, max(1e-12, 1e-9 * average))
