"""Factor analysis of the atlas with a task's shift and scale and per-example noise; the posterior in closed form."""

from __future__ import annotations

import numpy as np
import scipy

from forgetcast.atlas.rows import StoredMatrix
from forgetcast.completion.gaussian import CLASSES, Estimate, LinearGaussian, Mixture
from forgetcast.completion.low_rank import IncompleteError, LowRank, factor_complete, factor_incomplete
from forgetcast.completion.stacking import left_out_errors, stack
from forgetcast.errors import ConfigError

TASKS_PER_FACTOR = 4

PATTERNS = 3
"""Coefficients in addition to the factors': shift, pattern of the means, pattern of the variability."""

VARIABILITY = 0.5
"""Variance of the coefficient of the variability's pattern, as a multiple of that of the shift between atlas tasks."""

CENTRES_SHRUNK = 0.9
"""Factor of the atlas tasks' coefficients as centres of a kernel density; they were fitted to their noise."""


class Bayesian(LinearGaussian):
    """Low-rank Gaussian model of a new task's row.

    The row is the examples' means, plus a shift of the whole task, plus a multiple of the means' pattern (a harsher
    task amplifies what is mostly forgotten), plus a multiple of the pattern of how much the examples vary (a task
    unlike all others moves most what is easily moved), plus a few principal factors of the doubly centred atlas, plus
    noise that differs by example. The shift has a wide prior, because a new task may be milder or harsher than all of
    the atlas; the others have a narrow one, because the atlas tasks' coordinates were fitted to their noise.

    A new task may belong to several classes: tasks of the atlas's family at large; tasks near one of the atlas's, whose
    coefficients have a kernel density for their prior; and out-of-family tasks, which add independent variance to every
    example. Their prior weights are chosen so that the average of the classes' forecasts, by their posterior weights,
    is best on left-out tasks, and on tasks left out with those that resemble them: stacking (Wolpert 1992; Yao,
    Vehtari, Simpson and Gelman 2018).

    Parameters
    ----------
    factors : int
        Principal factors in addition to shift and patterns; at most a quarter of the number of tasks, because more
        leave too few degrees of freedom to separate loadings from noise.
    prior_scale : float
        Prior standard deviation of a factor and of a pattern, as a multiple of that of the atlas tasks.
    shift_scale : float
        The same for the shift.

    Attributes
    ----------
    log_weights_, power_ : array, shape (CLASSES,), and float
        Of the classes of tasks; see `Mixture`. Equal weights with fewer than four tasks.

    Notes
    -----
    Factors are determined up to their sign. In a complete atlas, examples that vary much count less for the tasks'
    coordinates (`factor_complete`). Where entries are missing, alternating ridge regressions on the observed ones
    estimate the factors, and all examples count alike. The noise variances are shrunk towards a common value by
    empirical Bayes (Smyth 2004).

    Examples
    --------
    >>> import numpy as np
    >>> from forgetcast.completion import Bayesian
    >>> rng = np.random.default_rng(0)
    >>> loadings = rng.normal(size=50)
    >>> atlas = np.outer(rng.normal(size=20), loadings)
    >>> forecast = Bayesian(factors=1).fit(atlas).predict([0, 1, 2], 0.5 * loadings[:3])
    >>> bool(np.allclose(forecast.mean, 0.5 * loadings, atol=0.05))
    True
    """

    _reads_blocks = True
    log_weights_: np.ndarray = np.zeros(CLASSES)
    power_: float = 1.0

    def __init__(
        self,
        *,
        factors: int = 8,
        prior_scale: float = 0.5,
        shift_scale: float = 3.0,
    ) -> None:
        self.factors = factors
        self.prior_scale = prior_scale
        self.shift_scale = shift_scale

    def prepare(self, values: np.ndarray | StoredMatrix) -> None:
        """Check the settings, and choose the weights of the classes of tasks on left-out tasks."""
        if self.factors < 0 or self.prior_scale <= 0 or self.shift_scale <= 0:
            raise ConfigError("Bayesian: factors >= 0 and positive scales are needed")
        self.log_weights_, self.power_ = np.zeros(CLASSES), 1.0
        self.log_weights_, self.power_ = stack(left_out_errors(self, values))

    def estimate(self, values: np.ndarray | StoredMatrix) -> Estimate:
        """Factor the atlas and shrink the noise variances."""
        tasks, examples = values.shape
        try:
            low_rank, squares = factor_complete(values, self._rank(tasks), balanced=True)
        except IncompleteError:
            low_rank, squares, counts = factor_incomplete(values, self._rank(tasks))
        else:
            counts = np.full(examples, tasks, dtype=np.float32)
        observed = counts > 0
        if observed.all():
            return self._of_factors(low_rank, squares, counts)
        low_rank = low_rank._replace(columns=low_rank.columns[observed], loadings=low_rank.loadings[observed])
        return self._of_factors(low_rank, squares[observed], counts[observed]).extend(observed)

    def _rank(self, tasks: int) -> int:
        return min(self.factors, tasks // TASKS_PER_FACTOR)

    def _of_factors(self, low_rank: LowRank, squares: np.ndarray, counts: np.ndarray) -> Estimate:
        """Compute the model from the factors, and from each column's squared residuals and number of entries."""
        tasks, examples, rank = len(low_rank.rows), len(low_rank.columns), self._rank(len(low_rank.rows))
        # A column loses degrees of freedom to its mean, its loadings, and its part of the tasks' coordinates.
        degrees = np.maximum(counts - (1.0 + rank + (rank + 1) * tasks / examples), 0.0)
        noise = shrink_variances(squares, degrees)
        spread = float(low_rank.rows.var(ddof=1))
        shift = max(spread, float(noise.mean()) / 10)
        factors = low_rank.loadings.shape[1]
        loadings = np.empty((PATTERNS + factors, examples), low_rank.columns.dtype).T
        loadings[:, 0] = 1.0
        loadings[:, 1] = _standardised(low_rank.columns)
        deviations = np.log(noise + _variance_explained(low_rank)) / 2
        loadings[:, 2] = deviations - deviations.mean()
        loadings[:, PATTERNS:] = low_rank.loadings
        squares_of_loadings = np.einsum("nr,nr->r", loadings, loadings, dtype=np.float64) / examples
        scales = low_rank.coordinates @ (low_rank.loadings.T @ loadings[:, 1]) / examples
        patterns = [0.0, max(float(scales.var(ddof=1)), 1e-12), max(VARIABILITY * spread, 1e-12)]
        family = self.prior_scale**2 * np.concatenate([patterns, np.ones(factors)])
        first = np.arange(len(family)) == 0
        centres = np.zeros((tasks, len(family)))
        centres[:, 0], centres[:, PATTERNS:] = low_rank.rows, low_rank.coordinates
        return Estimate(
            mean=low_rank.columns,
            loadings=loadings,
            prior=family + self.shift_scale**2 * shift * first,
            noise=noise.astype(low_rank.columns.dtype),
            mixture=Mixture(
                family=family,
                family_mean=float(squares_of_loadings @ family),
                centres=CENTRES_SHRUNK * centres,
                around=family + shift * first,
                log_weights=self.log_weights_,
                power=self.power_,
            ),
        )


def _variance_explained(low_rank: LowRank) -> np.ndarray:
    """Compute the variance of each example over the tasks that their effects and the factors explain, shape (N,)."""
    covariance = np.atleast_2d(np.cov(np.column_stack([low_rank.rows, low_rank.coordinates]), rowvar=False))
    values, directions = np.linalg.eigh(covariance)
    roots = (directions * np.sqrt(np.maximum(values, 0.0))).T.astype(low_rank.loadings.dtype)
    # One direction after the other: an array of examples by factors takes as much memory as the loadings.
    explained = np.zeros(len(low_rank.loadings), low_rank.loadings.dtype)
    for root in roots:
        explained += np.square(root[0] + low_rank.loadings @ root[1:])
    return explained


def _standardised(pattern: np.ndarray) -> np.ndarray:
    """Centre a pattern over the examples and divide it by its standard deviation; zeros if it has none."""
    centred = pattern - pattern.mean()
    deviation = float(np.sqrt(np.mean(np.square(centred, dtype=np.float64))))
    return np.asarray(centred / (deviation if deviation > 1e-6 * (1 + abs(float(pattern.mean()))) else np.inf))


def shrink_variances(squares: np.ndarray, degrees: np.ndarray) -> np.ndarray:
    """Estimate variances (N,) from sums of squares (N,) and degrees of freedom (N,), shrunk towards a common value.

    The prior of the variances is a scaled inverse chi-squared; its two parameters follow from the mean and the variance
    of the logarithms (Smyth 2004, section 6.2), so variances that differ much hardly change.
    """
    average = float(squares.sum(dtype=np.float64) / max(degrees.sum(), 1.0))
    # A matrix without any noise still needs a positive variance to divide by.
    variances = np.maximum(squares / np.maximum(degrees, 1.0), max(1e-12, 1e-9 * average))
    usable = degrees >= 1
    if usable.sum() < 3:
        return np.full_like(variances, max(average, 1e-12))
    # Equal in a complete matrix: then one evaluation of the special functions is enough.
    half = degrees[usable][: 1 if np.ptp(degrees) == 0 else None] / 2
    logs = np.log(variances[usable]) - scipy.special.digamma(half) + np.log(half)
    excess = float(logs.var(ddof=1) - scipy.special.polygamma(1, half).mean())
    prior = 2 * _inverse_trigamma(excess) if excess > 0 else np.inf
    if np.isinf(prior):
        return np.full_like(variances, np.exp(logs.mean()))
    common = np.exp(logs.mean() + scipy.special.digamma(prior / 2) - np.log(prior / 2))
    weights = np.where(usable, degrees, 0.0).astype(variances.dtype)
    return np.asarray(
        (variances.dtype.type(prior * common) + weights * variances) / (variances.dtype.type(prior) + weights)
    )


def _inverse_trigamma(value: float) -> float:
    """Solve trigamma(y) = value by Newton's method on 1 / trigamma, which is convex and nearly linear."""
    y = 0.5 + 1 / value
    for _ in range(50):
        trigamma = float(scipy.special.polygamma(1, y))
        step = trigamma * (1 - trigamma / value) / float(scipy.special.polygamma(2, y))
        y += step
        if abs(step) < 1e-10 * y:
            break
    return y
