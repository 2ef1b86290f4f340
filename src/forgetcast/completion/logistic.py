"""Matrix factorisation of binary forgetting, such as an answer that was right before and is wrong after."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import special

from forgetcast.completion.base import Completion
from forgetcast.errors import ConfigError, DataError

ROUNDS, HALVINGS = 100, 20
FIT_TOLERANCE, ROW_TOLERANCE = 1e-4, 1e-7
"""When to stop: relative gain in likelihood of a round over the matrix; largest change of a row's coefficients."""

BIAS_PRECISION = 0.01
"""Of a task's and an example's own effect: weak, so that only what was always or never forgotten is held back."""


class LogisticMF(Completion):
    """P(z_ij = 1) = 1 / (1 + exp(-(a_i + b_j + p_i . q_j))), for entries that are 0, 1 or NaN.

    Maximises the likelihood with a Gaussian prior on p and q, by Newton steps on all tasks and on all examples in turn
    (each a small convex problem, never left worse than before). A new row's a and p are found in the same way from its
    probes; the forecast is the probability, averaged over their Laplace posterior (MacKay 1992), and its variance that
    of a coin with that probability.

    Parameters
    ----------
    rank : int
        0 for the additive form.
    precision : float
        Of the Gaussian prior on p and q.

    Raises
    ------
    DataError
        When fitted on, or given, anything but 0 and 1.

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

    def _prepare(self, values: np.ndarray) -> None:
        if self.rank < 0 or not self.precision > 0:
            raise ConfigError("LogisticMF: a rank >= 0 and a positive precision are needed")
        _check_binary(values)

    def _estimate(self, values: np.ndarray) -> Bernoulli:
        return fit_logistic(values, self.rank, self.precision)


@dataclass(frozen=True)
class Bernoulli:
    """Logits (N,) of a task that nothing is known of, loadings (N, r + 1), and the coefficients' precision (r + 1,)."""

    logits: np.ndarray
    loadings: np.ndarray
    precision: np.ndarray

    def posterior(self, probes: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Complete rows (B, k) of 0 and 1 measured at the probes (k,); mean and variance are (B, N)."""
        _check_binary(rows)
        design = self.loadings[probes]
        coefficients = np.zeros((len(rows), design.shape[1]))
        for _ in range(ROUNDS):
            before = coefficients
            coefficients = _newton(coefficients, design, self.logits[probes], rows, self.precision)
            if np.abs(coefficients - before).max(initial=0.0) < ROW_TOLERANCE:
                break
        curvature = _curvature(coefficients, design, self.logits[probes], np.ones_like(rows), self.precision)
        logits = self.logits + coefficients @ self.loadings.T
        covariance = np.linalg.inv(curvature)
        spread = np.stack([((self.loadings @ c) * self.loadings).sum(axis=1) for c in covariance])
        mean = special.expit(logits / np.sqrt(1 + np.pi * spread / 8))
        likelihood = _log_likelihood(logits[:, probes], rows).sum(axis=1) / max(len(probes), 1)
        return mean, mean * (1 - mean), np.log(np.maximum(-likelihood, 1e-12))

    def extended(self, known: np.ndarray) -> Bernoulli:
        """Give examples that were never measured the average logit and loadings."""
        logits = np.full(len(known), self.logits.mean())
        loadings = np.tile(self.loadings.mean(axis=0), (len(known), 1))
        logits[known], loadings[known] = self.logits, self.loadings
        return Bernoulli(logits, loadings, self.precision)


def fit_logistic(values: np.ndarray, rank: int, precision: float) -> Bernoulli:
    """Fit by alternating Newton steps until the penalised likelihood stops rising."""
    tasks, examples = values.shape
    rank = min(rank, tasks - 1, examples - 1)
    rng = np.random.default_rng(0)
    base = special.logit(np.clip(np.nanmean(values), 0.01, 0.99))
    prior = np.concatenate([[BIAS_PRECISION], np.full(rank, precision)])
    rows = np.column_stack([np.zeros(tasks), rng.normal(0, 0.1, (tasks, rank))])
    columns = np.column_stack([np.zeros(examples), rng.normal(0, 0.1, (examples, rank))])
    best = -np.inf
    for _ in range(ROUNDS):
        offset = base + columns[:, 0]
        rows = _newton(rows, _with_ones(columns), offset, values, prior)
        columns = _newton(columns, _with_ones(rows), base + rows[:, 0], values.T, prior)
        logits = base + rows[:, :1] + columns[:, 0] + rows[:, 1:] @ columns[:, 1:].T
        reached = float(np.nansum(_log_likelihood(logits, values)))
        reached -= 0.5 * float((prior * rows**2).sum() + (prior * columns**2).sum())
        if reached - best < FIT_TOLERANCE * abs(reached):
            break
        best = reached
    centre = rows[:, 0].mean()
    spread = max(float(rows[:, 0].var()), 1e-6)
    return Bernoulli(
        base + centre + columns[:, 0],
        _with_ones(columns),
        # The shift of a new task is as wide as four times what the known ones show: it may be harsher or milder.
        np.concatenate([[1 / (4.0 * spread)], np.full(rank, precision)]),
    )


def _with_ones(effects_and_factors: np.ndarray) -> np.ndarray:
    """Design of the other side: its effect has the loading one."""
    return np.column_stack([np.ones(len(effects_and_factors)), effects_and_factors[:, 1:]])


def _log_likelihood(logits: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Of each entry; NaN where it is missing."""
    return np.asarray(values * logits - np.logaddexp(0.0, logits))


def _curvature(
    weights: np.ndarray, design: np.ndarray, offset: np.ndarray, present: np.ndarray, precision: np.ndarray
) -> np.ndarray:
    """Negative Hessians (n, r, r) of n logistic regressions on one design (m, r)."""
    probability = special.expit(offset + weights @ design.T)
    size = design.shape[1]
    products = (design[:, :, None] * design[:, None, :]).reshape(len(design), size**2)
    return ((probability * (1 - probability) * present) @ products).reshape(-1, size, size) + np.diag(precision)


def _newton(
    weights: np.ndarray, design: np.ndarray, offset: np.ndarray, values: np.ndarray, precision: np.ndarray
) -> np.ndarray:
    """One Newton step for each of n penalised logistic regressions, shortened where it would not be uphill.

    Parameters
    ----------
    weights : array, shape (n, r)
    design : array, shape (m, r)
    offset : array, shape (m,)
    values : array, shape (n, m)
    precision : array, shape (r,)
    """
    present = ~np.isnan(values)

    def objective(candidate: np.ndarray) -> np.ndarray:
        entries = _log_likelihood(offset + candidate @ design.T, np.where(present, values, 0.0))
        return np.asarray((entries * present).sum(axis=1) - 0.5 * (precision * candidate**2).sum(axis=1))

    residual = np.where(present, values - special.expit(offset + weights @ design.T), 0.0)
    gradient = residual @ design - precision * weights
    step = np.linalg.solve(_curvature(weights, design, offset, present, precision), gradient[:, :, None])[:, :, 0]
    reached = objective(weights)
    slack = 1e-12 * np.abs(reached)  # what rounding alone may take away
    length = np.ones((len(weights), 1))
    for _ in range(HALVINGS):
        worse = objective(weights + length * step) < reached - slack
        if not worse.any():
            return np.asarray(weights + length * step)
        length[worse] /= 2
    length[worse] = 0.0
    return np.asarray(weights + length * step)


def _check_binary(values: np.ndarray) -> None:
    wrong = values[~np.isnan(values) & (values != 0) & (values != 1)]
    if len(wrong):
        raise DataError(f"LogisticMF is for forgetting that is 0 or 1, not {wrong[0]:g}; use Bayesian for losses")
