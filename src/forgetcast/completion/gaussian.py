"""The linear-Gaussian model, which most completion methods are.

A new task's forgetting of example j is modelled as

    z_j = mean_j + loadings_j . c + e_j,    c ~ N(0, diag(prior)),    e_j ~ N(0, noise_j)

A method estimates these four (`estimate`); given the probes, the posterior of c and of every z_j follows in
closed form (Bishop, Pattern Recognition and Machine Learning, sections 3.3 and 2.3.7).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from forgetcast.completion.base import BLOCK, Completion
from forgetcast.completion.whole import Component, Joint
from forgetcast.errors import DataError

SCALE_DEGREES = 3.0
"""Prior degrees of freedom of a new task's scale of the variances; few, because tasks differ much."""

OUT_OF_FAMILY = ((0.0, 0.0), (1.0, 0.0), (3.0, 0.0), (0.0, 1.0), (0.0, 3.0))
"""Classes of tasks whose coefficients follow the common prior.

The first follows the atlas. The others, out-of-family tasks, add independent variance to every example: a multiple of
the variance that the factors explain of this example (first number), or of the average one (second number)."""

BANDWIDTHS = (0.3, 0.6, 1.0)
"""Classes of tasks that resemble one of the atlas: a kernel density of the coefficients around the atlas's tasks, with
these multiples of the prior's standard deviations as bandwidths."""

CLASSES = len(OUT_OF_FAMILY) + len(BANDWIDTHS)


class Mixture(NamedTuple):
    """Classes of tasks that a new one may belong to: those of OUT_OF_FAMILY, then those of BANDWIDTHS.

    Attributes
    ----------
    family : array, shape (r,)
        Prior variances of the coefficients whose factors an out-of-family task may not follow.
    family_mean : float
        Mean over the examples of ``loadings**2 @ family``.
    centres : array, shape (M, r)
        Coefficients of the atlas's tasks.
    around : array, shape (r,)
        Prior variances around a centre at bandwidth one.
    log_weights : array, shape (CLASSES,)
        Logarithms of the prior weights, up to a constant.
    power : float
        The likelihood of the probes counts by this power of it: below one where it is too sure.
    """

    family: np.ndarray
    family_mean: float
    centres: np.ndarray
    around: np.ndarray
    log_weights: np.ndarray
    power: float


class Estimate(NamedTuple):
    """The parts of a linear-Gaussian model.

    Attributes
    ----------
    mean : array, shape (N,)
    loadings : array, shape (N, r)
        Preferably in Fortran order, in which one coefficient's loadings are contiguous.
    prior : array, shape (r,)
        Prior variances of the coefficients.
    noise : array, shape (N,)
        Variances.
    mixture : Mixture, optional
        Classes of tasks that are mixed by their posterior weights; without it there is one, the first.
    """

    mean: np.ndarray
    loadings: np.ndarray
    prior: np.ndarray
    noise: np.ndarray
    mixture: Mixture | None = None

    def posterior(self, probes: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Condition on rows (B, k) measured at the probes (k,): mean (B, N), variance (B, N), log_misfit (B,).

        A task's variances share a scale with a prior of SCALE_DEGREES degrees of freedom, so the posterior is Student's
        t: with the squared residual s of the probes, standardised by their joint covariance, all variances are
        multiplied by (SCALE_DEGREES + s) / (SCALE_DEGREES + k).

        Raises
        ------
        DataError
            If the probes leave a coefficient undetermined: an infinite prior and no probe.
        """
        found = self.condition(probes, rows)
        average = np.einsum("hb,hbr->br", found.weights, found.means)
        # Covariance of the coefficients, for each row (B, r, r): within each class, and between their means.
        scaled = found.weights * found.scales
        apart = np.sqrt(found.weights)[:, :, None] * (found.means - average)
        spread = np.einsum("hb,hbrs->brs", found.weights, found.covariances) + np.einsum("hbr,hbs->brs", apart, apart)
        floor = np.zeros(len(rows))
        if self.mixture is not None:
            proportional, uniform = _ADDED[:, :1], _ADDED[:, 1:]
            added = np.einsum("hb,r->br", proportional * scaled, self.mixture.family)
            spread += added[:, :, None] * np.eye(len(self.prior))
            floor = (uniform * scaled).sum(axis=0) * self.mixture.family_mean
        mean, variance = self._project(average, spread, scaled.sum(axis=0), floor)
        return mean, variance, found.log_misfit

    def joint(self, probes: np.ndarray, row: np.ndarray) -> Joint:
        """Return the joint posterior of one row: a component for each class of tasks; see `State`."""
        found = self.condition(probes, row[None])
        added = self._added(self.loadings)
        return tuple(
            Component(
                weight=float(found.weights[h, 0]),
                mean=self.mean,
                loadings=self.loadings,
                centre=found.means[h, 0],
                covariance=found.covariances[h, 0],
                noise=found.scales[h, 0] * (self.noise + added[h]),
                degrees=SCALE_DEGREES + len(probes),
            )
            for h in range(len(found.weights))
        )

    def condition(self, probes: np.ndarray, rows: np.ndarray) -> Conditioned:
        """Condition the coefficients on rows (B, k) measured at the probes (k,), for each class of tasks."""
        at_probes = self.loadings[probes].astype(np.float64)
        noise = self.noise[probes] + self._added(at_probes)
        residual = (rows - self.mean[probes])[None]
        if self.mixture is None:
            return _collapse([_condition(at_probes, self.prior, noise, residual)], np.zeros(1), 1.0)
        mixture, family = self.mixture, len(OUT_OF_FAMILY)
        parts = [_condition(at_probes, self.prior, noise[:family], residual)]
        apart = residual - (mixture.centres @ at_probes.T)[:, None, :]
        for bandwidth in BANDWIDTHS:
            near = _condition(at_probes, bandwidth**2 * mixture.around, noise[-1:], apart)
            parts.append(near._replace(means=near.means + mixture.centres[:, None, :]))
        return _collapse(parts, mixture.log_weights, mixture.power)

    def expected_noise(self) -> np.ndarray:
        """Return the noise variance of each example that is expected of a new task, over its classes, shape (N,)."""
        if self.mixture is None:
            return self.noise
        weights = np.exp(self.mixture.log_weights - self.mixture.log_weights.max())
        proportional, uniform = weights / weights.sum() @ _ADDED
        # Without an array of classes by examples, or of coefficients by examples: there may be millions.
        explained = np.einsum("nr,nr,r->n", self.loadings, self.loadings, self.mixture.family)
        added = proportional * explained + uniform * self.mixture.family_mean
        return np.asarray(self.noise + added, dtype=self.noise.dtype)

    def choose(
        self, k: int, candidates: np.ndarray, *, measured: np.ndarray | None = None, cost: np.ndarray | None = None
    ) -> np.ndarray:
        """Choose examples to measure greedily: each minimises the summed posterior variance over all (A-optimal).

        Parameters
        ----------
        k : int
        candidates : array of int, shape (n,)
            Columns to choose from, sorted; at least k.
        measured : array of int, optional
            Columns that the model is conditioned on first.
        cost : array, shape (n,), optional
            Of measuring each candidate; then each maximises the reduction per cost.

        Returns
        -------
        array of int, shape (k,)
            Columns, best first; none if the model has no loadings.

        Notes
        -----
        With the posterior covariance S of the coefficients, measuring column j lowers the summed variance by
        ``l' S G S l / (noise_j + l' S l)`` with ``l = loadings_j``, ``G = loadings' loadings`` and the noise that is
        expected over the classes of tasks; and S becomes ``S - S l l' S / (noise_j + l' S l)``. Both forms are kept for
        every candidate and updated by two products with its loadings, so a probe costs 4 N r operations; memory is
        about 50 bytes per candidate in addition to the model.
        """
        if not self.loadings.shape[1]:
            return np.empty(0, dtype=np.intp)
        expected = self.expected_noise()
        noise, total = expected[candidates], self.loadings.T @ self.loadings
        # An infinite prior has no finite covariance; a very wide one leads to the same choice.
        widest = 1e6 * (noise.max() + np.abs(self.mean).max() ** 2 + 1.0)
        covariance = np.diag(np.minimum(self.prior, widest))
        for column in () if measured is None else measured:
            loading = self.loadings[column]
            projection = covariance @ loading
            covariance -= np.outer(projection, projection) / (expected[column] + loading @ projection)
        size = len(candidates)
        spread, gain = np.empty(size), np.empty(size)  # l' S l and l' S G S l
        free, price = np.ones(size, dtype=bool), np.ones(size) if cost is None else cost
        chosen: list[int] = []
        scale, curvature, towards = 0.0, 0.0, np.empty((2, len(total)))
        for i in range(k):
            best, most = -1, -np.inf
            for part, loadings in _blocks(self.loadings, candidates):
                if i < 2:  # an update from a very wide prior would lose precision
                    projected = loadings.astype(np.float64) @ covariance
                    spread[part] = np.einsum("nr,nr->n", projected, loadings)
                    gain[part] = np.einsum("nr,nr->n", projected @ total, projected)
                else:
                    along, weighed = towards.astype(loadings.dtype) @ loadings.T
                    spread[part] -= scale * along**2
                    gain[part] += scale * along * (scale * curvature * along - 2 * weighed)
                score = np.where(free[part], gain[part] / ((noise[part] + spread[part]) * price[part]), -np.inf)
                at = int(np.argmax(score))
                if score[at] > most:
                    best, most = part.start + at, float(score[at])
            free[best] = False
            chosen.append(best)
            projection = covariance @ self.loadings[candidates[best]]
            scale, curvature = 1 / (noise[best] + spread[best]), projection @ total @ projection
            towards = np.array([projection, covariance @ (total @ projection)])
            covariance -= np.outer(projection, projection) * scale
        return candidates[np.array(chosen, dtype=np.intp)]

    def _added(self, loadings: np.ndarray) -> np.ndarray:
        """Return what each class adds to the variance of examples with these loadings (n, r), shape (H, n)."""
        if self.mixture is None:
            return np.zeros((1, 1))
        explained = np.square(loadings) @ self.mixture.family
        return np.asarray(_ADDED[:, :1] * explained + _ADDED[:, 1:] * self.mixture.family_mean)

    def _project(
        self, coefficients: np.ndarray, spread: np.ndarray, noise: np.ndarray, floor: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Compute mean and variance (B, N) of the examples from those of the coefficients, (B, r) and (B, r, r).

        `noise` (B,) multiplies the noise of the examples; `floor` (B,) is added to all.
        """
        dtype = self.loadings.dtype
        size, count = len(self.mean), len(coefficients)
        mean, variance = np.empty((count, size), dtype), np.empty((count, size), dtype)
        values, directions = np.linalg.eigh(spread)
        # The squares of these give the variance, so one product yields mean and variance.
        halves = np.sqrt(np.maximum(values, 0.0))[:, :, None] * directions.transpose(0, 2, 1)
        factors = np.concatenate([coefficients[:, None, :], halves], axis=1).astype(dtype)  # (B, 1 + r, r)
        projection = np.empty((factors.shape[1], min(BLOCK, size)), dtype)
        for start in range(0, size, BLOCK):  # blocks fit the cache
            part = slice(start, min(start + BLOCK, size))
            block = projection[:, : part.stop - start]
            for row in range(count):
                np.matmul(factors[row], self.loadings[part].T, out=block)
                np.add(block[0], self.mean[part], out=mean[row, part])
                np.einsum("rn,rn->n", block[1:], block[1:], out=variance[row, part])
                np.multiply(self.noise[part], dtype.type(noise[row]), out=block[0])
                block[0] += dtype.type(floor[row])
                variance[row, part] += block[0]
        return mean, variance

    def extend(self, observed: np.ndarray) -> Estimate:
        """Give unobserved examples the average parameters, and a noise that covers the spread of all; see `State`."""
        mean = np.full(len(observed), self.mean.mean())
        loadings = np.tile(self.loadings.mean(axis=0)[:, None], len(observed)).T
        # Their mean and loadings are as uncertain as the examples differ.
        priors = np.where(np.isinf(self.prior), 0.0, self.prior)
        noise = np.full(len(observed), self.noise.mean() + self.mean.var() + self.loadings.var(axis=0) @ priors)
        mean[observed], loadings[observed], noise[observed] = self.mean, self.loadings, self.noise
        return self._replace(mean=mean, loadings=loadings, noise=noise)


_ADDED = np.array([*OUT_OF_FAMILY, *((0.0, 0.0) for _ in BANDWIDTHS)])


def _blocks(loadings: np.ndarray, columns: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield the loadings of these sorted columns in blocks that fit the cache."""
    for start in range(0, len(columns), BLOCK):
        part = slice(start, start + BLOCK)
        first, last = columns[part][0], columns[part][-1]
        contiguous = last - first == len(columns[part]) - 1  # then a view is enough
        yield part, loadings[first : last + 1] if contiguous else loadings.T[:, columns[part]].T


class Conditioned(NamedTuple):
    """Coefficients given the probes, for H classes of tasks and B rows.

    Attributes
    ----------
    means : array, shape (H, B, r)
    covariances : array, shape (H, B, r, r)
    weights : array, shape (H, B)
        Posterior probability of each class.
    scales : array, shape (H, B)
        Factor of the variances of the noise; the covariances include it.
    evidence : array, shape (H, B)
        Log-likelihood of the probes under each class, up to a constant that all share.
    log_misfit : array, shape (B,)
        Log of the mean squared standardised residual under the first class.
    """

    means: np.ndarray
    covariances: np.ndarray
    weights: np.ndarray
    scales: np.ndarray
    evidence: np.ndarray
    log_misfit: np.ndarray


class _Part(NamedTuple):
    """Coefficients given the probes for H components of noise, each around G centres, and B rows.

    Attributes
    ----------
    means : array, shape (H, G, B, r)
    covariances : array, shape (H, r, r)
        Without the rows' scale of variances.
    squared, evidence : arrays, shape (H, G, B)
        Squared standardised residual of the probes, and their log-likelihood.
    probes : int
    """

    means: np.ndarray
    covariances: np.ndarray
    squared: np.ndarray
    evidence: np.ndarray
    probes: int


def _condition(loadings: np.ndarray, prior: np.ndarray, noise: np.ndarray, residual: np.ndarray) -> _Part:
    """Condition the coefficients on probes with loadings (k, r), noise (H, k) and residuals (G, B, k)."""
    k = len(loadings)
    weighted = residual / noise[:, None, None, :]  # (H, G, B, k)
    information = (loadings.T / noise[:, None, :]) @ loadings  # (H, r, r)
    projected = weighted @ loadings  # (H, G, B, r)
    # In units of the prior's standard deviations, so that the inverse is of matrices near one; where the prior is flat,
    # in units of the information.
    flat, diagonal = np.isinf(prior), np.diagonal(information[0])
    if (flat & (diagonal <= 0)).any():
        raise DataError("this method needs at least one probe")
    units = np.sqrt(np.where(flat, 1.0 / np.where(diagonal > 0, diagonal, 1.0), prior))
    both = np.outer(units, units)
    precision = np.diag(1.0 - flat) + information * both
    covariances = np.linalg.inv(precision) * both
    means = projected @ covariances[:, None]  # (H, G, B, r)
    # Woodbury: s' (noise + L prior L')^-1 s = s' noise^-1 s - (s' noise^-1 L) covariance (L' noise^-1 s)
    squared = np.maximum((residual * weighted).sum(axis=3) - (projected * means).sum(axis=3), 1e-12)
    # Log density of the probes under Student's t, up to a constant that all classes share.
    evidence = -0.5 * (np.linalg.slogdet(precision)[1] + np.log(noise).sum(axis=1))[:, None, None]
    evidence = evidence - 0.5 * (SCALE_DEGREES + k) * np.log(SCALE_DEGREES + squared)
    return _Part(means, covariances, squared, evidence, k)


def _collapse(parts: Sequence[_Part], log_weights: np.ndarray, power: float) -> Conditioned:
    """Replace the centres of each class by one Gaussian with their moments, and weigh the classes."""
    means, covariances, scales, evidence = [], [], [], []
    for part in parts:
        highest = part.evidence.max(axis=1, keepdims=True)
        shares = np.exp(part.evidence - highest)  # of the centres, (H, G, B)
        evidence.append(highest[:, 0] + np.log(shares.mean(axis=1)))
        shares /= shares.sum(axis=1, keepdims=True)
        scale = ((SCALE_DEGREES + part.squared) / (SCALE_DEGREES + part.probes) * shares).sum(axis=1)  # (H, B)
        mean = np.einsum("hgb,hgbr->hbr", shares, part.means)
        covariance = scale[:, :, None, None] * part.covariances[:, None]
        if part.means.shape[1] > 1:
            apart = np.sqrt(shares)[..., None] * (part.means - mean[:, None])
            covariance += np.einsum("hgbr,hgbs->hbrs", apart, apart)
        means.append(mean)
        covariances.append(covariance)
        scales.append(scale)
    total = np.concatenate(evidence)
    weights = power * total + log_weights[:, None]
    weights = np.exp(weights - weights.max(axis=0))
    weights /= weights.sum(axis=0)
    squared = parts[0].squared[0, 0]
    return Conditioned(
        np.concatenate(means),
        np.concatenate(covariances),
        weights,
        np.concatenate(scales),
        total,
        np.log(squared / max(parts[0].probes, 1)),
    )


class LinearGaussian(Completion):
    """Base of the methods whose new row is `mean + loadings @ c + noise` with Gaussian c and noise.

    Attributes
    ----------
    state_ : Estimate
    mean_ : array, shape (N,)
    loadings_ : array, shape (N, r)
    prior_ : array, shape (r,)
        Prior variances of the coefficients; infinite where the prior is flat.
    noise_ : array, shape (N,)
        Variance, around the model, of each example.
    """

    state_: Estimate

    @abstractmethod
    def estimate(self, values: Any) -> Estimate:
        """Learn the four parts of the model; see `Completion.estimate`."""

    @property
    def gaussian_(self) -> LinearGaussian:
        """The method itself, or a `Bayesian` where it has no loadings; see `Completion.gaussian_`."""
        self._check_fitted()
        return self if self.loadings_.shape[1] else super().gaussian_

    @property
    def mean_(self) -> np.ndarray:
        """Expected row of a task without probes, shape (N,)."""
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
    """Compute the variance of each column of residuals with NaN, shrunk towards the mean of all columns, shape (N,).

    Parameters
    ----------
    residuals : array, shape (M, N)
    lost : float
        Degrees of freedom of each column that the fit has used.
    shrinkage : float
        Weight of the mean over columns, in [0, 1].
    """
    counts = (~np.isnan(residuals)).sum(axis=0)
    sums = np.nansum(residuals**2, axis=0)
    average = sums.sum() / max(np.maximum(counts - lost, 0).sum(), 1.0)
    variance = np.where(counts > lost, sums / np.maximum(counts - lost, 1e-9), average)
    variance = (1 - shrinkage) * variance + shrinkage * average
    # A matrix without any noise still needs a positive variance to divide by.
    return np.maximum(variance, max(1e-12, 1e-9 * average))
