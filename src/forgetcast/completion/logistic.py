"""Matrix factorisation of binary forgetting, such as an answer that was right before and is wrong after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy

from forgetcast.completion.base import Completion
from forgetcast.completion.low_rank import truncated_svd
from forgetcast.completion.whole import Component, Joint
from forgetcast.errors import ConfigError, DataError

ROUNDS, HALVINGS = 100, 20
FIT_TOLERANCE, ROW_TOLERANCE = 1e-6, 1e-7
"""When to stop: relative gain in likelihood of a round over the matrix; largest change of a row's coefficients."""

BIAS_PRECISION = 0.01
"""Of a task's and an example's effect: weak, so that it only bounds those always or never forgotten."""


class LogisticMF(Completion):
    """P(z_ij = 1) = 1 / (1 + exp(-(a_i + b_j + p_i . q_j))), for entries that are 0, 1 or NaN.

    Maximises the likelihood with a Gaussian prior on p and q, by Newton steps that alternate between all tasks and all
    examples (each a small convex problem that never gets worse). A new row's a and p are estimated in the same way from
    its probes. The forecast is the probability, averaged over their Laplace posterior (MacKay 1992); its variance is
    that of a Bernoulli variable.

    Parameters
    ----------
    rank : int
        0 for the additive form.
    precision : float
        Of the Gaussian prior on p and q.

    Raises
    ------
    DataError
        When fitted on, or given, values other than 0 and 1.

    Examples
    --------
    >>> from forgetcast.completion import LogisticMF
    >>> atlas = [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]
    >>> model = LogisticMF(rank=1).fit(atlas)
    >>> (model.predict([0, 2], [1, 0]).mean > 0.5).tolist()
    [True, True, False, False]
    """

    def __init__(self, *, rank: int = 5, precision: float = 1.0) -> None:
        self.rank = rank
        self.precision = precision

    def prepare(self, values: np.ndarray) -> None:
        """Check the settings, and that the entries are binary."""
        if self.rank < 0 or not self.precision > 0:
            raise ConfigError("LogisticMF: a rank >= 0 and a positive precision are needed")
        _check_binary(values)

    def estimate(self, values: np.ndarray) -> Bernoulli:
        """Factor the matrix by penalised likelihood."""
        return fit_logistic(values, self.rank, self.precision)


@dataclass(frozen=True)
class Bernoulli:
    """Logits (N,) of a task without probes, loadings (N, r + 1), and the coefficients' precision (r + 1,)."""

    logits: np.ndarray
    loadings: np.ndarray
    precision: np.ndarray

    def posterior(self, probes: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Complete rows (B, k) of 0 and 1 measured at the probes (k,); mean and variance are (B, N)."""
        mean, _, _, likelihood = self._complete(probes, rows)
        return mean, mean * (1 - mean), np.log(np.maximum(-likelihood, 1e-12))

    def joint(self, probes: np.ndarray, row: np.ndarray) -> Joint:
        """Return the joint posterior of one row, linear in the coefficients around their mode (the delta method)."""
        mean, slopes, covariances, _ = self._complete(probes, row[None])
        loadings = slopes[0][:, None] * self.loadings
        centre = np.zeros(loadings.shape[1])
        return (Component(1.0, mean[0], loadings, centre, covariances[0], mean[0] * (1 - mean[0]), binary=True),)

    def _complete(self, probes: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Complete rows (B, k): probabilities (B, N), their slopes (B, N) in the logit, covariances, likelihoods."""
        _check_binary(rows)
        design, signs = self.loadings[probes], 2 * rows - 1
        coefficients = np.zeros((len(rows), design.shape[1]))
        fit = _evaluate_at(coefficients, design, self.logits[probes], signs)
        for _ in range(ROUNDS):
            before = coefficients
            coefficients, fit = _newton(coefficients, design, self.logits[probes], signs, self.precision, fit)
            if np.abs(coefficients - before).max(initial=0.0) < ROW_TOLERANCE:
                break
        curvature = _curvature(fit.probability, np.abs(signs), design, self.precision)
        logits = self.logits + coefficients @ self.loadings.T
        covariance = np.linalg.inv(curvature)
        spread = np.stack([((self.loadings @ c) * self.loadings).sum(axis=1) for c in covariance])
        mean = scipy.special.expit(logits / np.sqrt(1 + np.pi * spread / 8))
        likelihood = fit.entries.sum(axis=1) / max(len(probes), 1)
        return mean, mean * (1 - mean) / np.sqrt(1 + np.pi * spread / 8), covariance, likelihood

    def choose(self, k: int, candidates: np.ndarray) -> np.ndarray:  # noqa: ARG002
        """Return no columns: the loadings are of logits, and probes are chosen with a linear model."""
        return np.empty(0, dtype=np.intp)

    def extend(self, observed: np.ndarray) -> Bernoulli:
        """Give unobserved examples the average logit and loadings."""
        logits = np.full(len(observed), self.logits.mean())
        loadings = np.tile(self.loadings.mean(axis=0), (len(observed), 1))
        logits[observed], loadings[observed] = self.logits, self.loadings
        return Bernoulli(logits, loadings, self.precision)


def fit_logistic(values: np.ndarray, rank: int, precision: float) -> Bernoulli:
    """Learn the model of a new task from a matrix (M, N) of 0, 1 and NaN."""
    factors = factor_logistic(values, rank, precision)
    return Bernoulli(
        factors.base + factors.rows[:, 0].mean() + factors.columns[:, 0],
        _with_ones(factors.columns),
        # The shift has four times the variance of the atlas tasks: a new task may be harsher or milder.
        np.concatenate(
            [[1 / (4.0 * max(float(factors.rows[:, 0].var()), 1e-6))], np.full(factors.rows.shape[1] - 1, precision)]
        ),
    )


class Factors(NamedTuple):
    """Logits base + a_i + b_j + p_i . q_j, their probabilities and likelihood.

    Attributes
    ----------
    base : float
    rows, columns : array, shapes (M, r + 1) and (N, r + 1)
        a and p; b and q.
    probability : array, shape (M, N)
    log_likelihood : float
        Summed over the observed entries, nats.
    """

    base: float
    rows: np.ndarray
    columns: np.ndarray
    probability: np.ndarray
    log_likelihood: float


def factor_logistic(values: np.ndarray, rank: int, precision: float) -> Factors:
    """Factor a matrix of 0, 1 and NaN by alternating Newton steps until the penalised likelihood stops rising."""
    tasks, examples = values.shape
    rank = min(rank, tasks - 1, examples - 1)
    signs = np.where(np.isnan(values), 0.0, 2 * values - 1).astype(np.float32)
    base = float(scipy.special.logit(np.clip(np.nanmean(values), 0.01, 0.99)))
    prior = np.concatenate([[BIAS_PRECISION], np.full(rank, precision)])
    rows, columns = _start(signs, base, rank)
    fit = _evaluate(base + rows[:, :1] + columns[:, 0] + rows[:, 1:] @ columns[:, 1:].T, signs)
    best = likelihood = -np.inf
    for _ in range(ROUNDS):
        rows, fit = _newton(rows, _with_ones(columns), base + columns[:, 0], signs, prior, fit)
        columns, transposed = _newton(columns, _with_ones(rows), base + rows[:, 0], signs.T, prior, fit.transposed)
        fit = transposed.transposed
        rows, columns = _balanced(rows, columns)
        likelihood = float(fit.entries.sum(dtype=np.float64))
        reached = likelihood - 0.5 * float((prior * rows**2).sum() + (prior * columns**2).sum())
        if reached - best < FIT_TOLERANCE * abs(reached):
            break
        best = reached
    return Factors(base, rows, columns, fit.probability, likelihood)


def _start(signs: np.ndarray, base: float, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Initialise effects and factors, (M, r + 1) and (N, r + 1), by one Newton step on the margins and an SVD."""
    rows, columns = (
        _newton(np.zeros((len(side), 1)), np.ones((size := side.shape[1], 1)), np.full(size, base), side, np.ones(1))[0]
        for side in (signs, signs.T)
    )
    fit = _evaluate(base + rows + columns.T, signs)
    slopes = fit.probability * (1 - fit.probability)
    # Residuals of the effects, on the scale of the logits.
    residuals = ((signs > 0) - fit.probability) * np.abs(signs) / max(float(slopes.mean()), 1e-6)
    U, S, Vt = truncated_svd(residuals.astype(np.float64), rank)
    scales = np.sqrt(S) / 2  # the fit enlarges it where that is too small
    missing = np.zeros((1, rank - len(S)))
    return (
        np.column_stack([rows, U * scales, np.repeat(missing, len(rows), 0)]),
        np.column_stack([columns, Vt.T * scales, np.repeat(missing, len(columns), 0)]),
    )


def _balanced(rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rebalance effects and factors: the same logits with a smaller penalty, which alternating steps approach slowly.

    The factors' means move to the effects, whose prior is weaker; then, of all factors with the same product, those
    with the smallest sum of squares are used.
    """
    rows, columns = rows.copy(), columns.copy()
    for one, other in ((rows, columns), (columns, rows)):
        mean = one[:, 1:].mean(axis=0)
        one[:, 1:] -= mean
        other[:, 0] += other[:, 1:] @ mean
    (Q_rows, R_rows), (Q_columns, R_columns) = np.linalg.qr(rows[:, 1:]), np.linalg.qr(columns[:, 1:])
    U, S, Vt = np.linalg.svd(R_rows @ R_columns.T)
    rows[:, 1:], columns[:, 1:] = Q_rows @ U * np.sqrt(S), Q_columns @ Vt.T * np.sqrt(S)
    return rows, columns


def _with_ones(effects_and_factors: np.ndarray) -> np.ndarray:
    """Build the design of the other side, whose effect has the loading one."""
    return np.column_stack([np.ones(len(effects_and_factors)), effects_and_factors[:, 1:]])


class _Evaluated(NamedTuple):
    """Log-likelihood of each entry, 0 where it is missing, and the probability of a one there, both (n, m)."""

    entries: np.ndarray
    probability: np.ndarray

    @property
    def transposed(self) -> _Evaluated:
        """The same with tasks and examples swapped."""
        return _Evaluated(self.entries.T, self.probability.T)


def _evaluate(logits: np.ndarray, signs: np.ndarray) -> _Evaluated:
    """Evaluate entries with these logits; `signs` is 1 for a one, -1 for a zero, and 0 where it is missing."""
    logits = logits.astype(signs.dtype, copy=False)
    small = np.exp(-np.abs(logits))
    entries = np.minimum(signs * logits, 0)
    entries -= np.log1p(small)
    entries *= np.abs(signs)
    small += 1
    above = np.subtract(1 / small, 0.5, out=small)  # half of tanh(|logit| / 2)
    return _Evaluated(entries, np.copysign(above, logits, out=above) + signs.dtype.type(0.5))


def _evaluate_at(weights: np.ndarray, design: np.ndarray, offset: np.ndarray, signs: np.ndarray) -> _Evaluated:
    dtype = signs.dtype
    logits = weights.astype(dtype, copy=False) @ design.T.astype(dtype, copy=False)
    logits += offset.astype(dtype, copy=False)
    return _evaluate(logits, signs)


def _curvature(probability: np.ndarray, observed: np.ndarray, design: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """Compute negative Hessians (n, r, r) of n logistic regressions on one design (m, r)."""
    size = design.shape[1]
    products = (design[:, :, None] * design[:, None, :]).reshape(len(design), size**2).astype(probability.dtype)
    slopes = probability * (1 - probability) * observed
    return (slopes @ products).astype(np.float64).reshape(-1, size, size) + np.diag(precision)


def _newton(
    weights: np.ndarray,
    design: np.ndarray,
    offset: np.ndarray,
    signs: np.ndarray,
    precision: np.ndarray,
    fit: _Evaluated | None = None,
) -> tuple[np.ndarray, _Evaluated]:
    """Take one Newton step of each of n penalised logistic regressions, halved until the likelihood does not fall.

    Parameters
    ----------
    weights : array, shape (n, r)
    design : array, shape (m, r)
    offset : array, shape (m,)
    signs : array, shape (n, m)
        As in `_evaluate`.
    precision : array, shape (r,)
    fit : _Evaluated, optional
        At `weights`.

    Returns
    -------
    weights : array, shape (n, r)
    _Evaluated
        There.
    """
    fit = _evaluate_at(weights, design, offset, signs) if fit is None else fit
    observed = np.abs(signs)

    def objective(candidate: np.ndarray, at: _Evaluated) -> np.ndarray:
        return at.entries.sum(axis=1, dtype=np.float64) - 0.5 * (precision * candidate**2).sum(axis=1)

    residual = (signs + observed) / 2  # 1 where the entry is 1
    residual -= fit.probability
    residual *= observed
    gradient = residual @ design.astype(signs.dtype) - precision * weights
    step = np.linalg.solve(_curvature(fit.probability, observed, design, precision), gradient[:, :, None])[:, :, 0]
    reached = objective(weights, fit)
    slack = 10 * np.finfo(signs.dtype).eps * np.abs(reached)  # rounding error
    length = np.ones((len(weights), 1))
    for _ in range(HALVINGS):
        candidate = weights + length * step
        proposal = _evaluate_at(candidate, design, offset, signs)
        worse = objective(candidate, proposal) < reached - slack
        if not worse.any():
            return candidate, proposal
        length[worse] /= 2
    length[worse] = 0.0
    candidate = weights + length * step
    return candidate, _evaluate_at(candidate, design, offset, signs)


def is_binary(values: np.ndarray) -> bool:
    """Return whether every observed entry is 0 or 1."""
    return bool(np.isin(values[~np.isnan(values)], (0.0, 1.0)).all())


def f1(hits: int, forgotten: int, predicted: int) -> float:
    """Compute F1 from the numbers of hits, of forgotten entries, and of entries predicted to be forgotten."""
    return 2 * hits / max(forgotten + predicted, 1)


def _check_binary(values: np.ndarray) -> None:
    wrong = values[~np.isnan(values) & (values != 0) & (values != 1)]
    if len(wrong):
        raise DataError(f"LogisticMF is for forgetting that is 0 or 1, not {wrong[0]:g}; use Bayesian for losses")
