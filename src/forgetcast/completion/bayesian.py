"""Factor analysis of the atlas with a task's shift and scale and per-example noise; the posterior in closed form."""

from __future__ import annotations

import numpy as np
import scipy

from forgetcast.atlas.rows import StoredMatrix
from forgetcast.completion.gaussian import Estimate, LinearGaussian
from forgetcast.completion.low_rank import IncompleteError, LowRank, factor_complete, factor_incomplete
from forgetcast.errors import ConfigError

TASKS_PER_FACTOR = 4


class Bayesian(LinearGaussian):
    """Low-rank Gaussian model of a new task's row.

    The row is the examples' means, plus a shift of the whole task, plus a multiple of the means' pattern (a harsher
    task amplifies what is mostly forgotten), plus a few principal factors of the doubly centred atlas, plus noise that
    differs by example. The shift has a wide prior, because a new task may be milder or harsher than all of the atlas;
    the others have a narrow one, because the atlas tasks' coordinates were fitted to their noise. An out-of-family
    task, which adds independent variance to every example, is mixed in by its posterior weight.

    Parameters
    ----------
    factors : int
        Principal factors in addition to shift and scale; at most a quarter of the number of tasks, because more leave
        too few degrees of freedom to separate loadings from noise.
    prior_scale : float
        Prior standard deviation of a factor and of the scale, as a multiple of that of the atlas tasks.
    shift_scale : float
        The same for the shift.

    Notes
    -----
    Factors are determined up to their sign. Where entries of the atlas are missing, alternating ridge regressions on
    the observed ones estimate them. The noise variances are shrunk towards a common value by empirical Bayes (Smyth
    2004).

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

    def prepare(self, values: np.ndarray | StoredMatrix) -> None:  # noqa: ARG002
        """Check the settings."""
        if self.factors < 0 or self.prior_scale <= 0 or self.shift_scale <= 0:
            raise ConfigError("Bayesian: factors >= 0 and positive scales are needed")

    def estimate(self, values: np.ndarray | StoredMatrix) -> Estimate:
        """Factor the atlas and shrink the noise variances."""
        tasks, examples = values.shape
        try:
            low_rank, squares = factor_complete(values, self._rank(tasks))
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
        shift = max(float(low_rank.rows.var(ddof=1)), float(noise.mean()) / 10)
        loadings = np.empty((2 + low_rank.loadings.shape[1], examples), low_rank.columns.dtype).T
        loadings[:, 0] = 1.0
        pattern = low_rank.columns - low_rank.columns.mean()
        loadings[:, 1] = pattern / (float(np.sqrt(np.mean(pattern**2))) or 1.0)
        loadings[:, 2:] = low_rank.loadings
        squares_of_loadings = np.einsum("nr,nr->r", loadings, loadings, dtype=np.float64) / examples
        scales = low_rank.coordinates @ (low_rank.loadings.T @ loadings[:, 1]) / examples
        prior = np.concatenate([[0.0, max(float(scales.var(ddof=1)), 1e-12)], np.ones(low_rank.loadings.shape[1])])
        out_of_family = self.prior_scale**2 * prior
        return Estimate(
            mean=low_rank.columns,
            loadings=loadings,
            prior=out_of_family + self.shift_scale**2 * shift * (np.arange(len(out_of_family)) == 0),
            noise=noise.astype(low_rank.columns.dtype),
            out_of_family=out_of_family,
            out_of_family_mean=float(squares_of_loadings @ out_of_family),
        )


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
