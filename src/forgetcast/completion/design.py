"""The sampling design of random probes: by which weights they are drawn, and how probable each draw was.

Examples whose forgetting is uncertain decide how wide a guaranteed interval is, so they are measured more often: one
example after the other is drawn from those that remain, with probability proportional to its weight (successive
sampling; Rosen 1997). Given all the others, the probability of each draw is known exactly, so that an estimate which
divides by it is unbiased. Weights are rounded to a few levels, in which it follows from counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import scipy  # submodules load lazily, so that starting is fast

from forgetcast.errors import DataError

LEAST = 0.3
"""Least weight, relative to the mean: no example may hardly be measured, however sure the atlas is of it."""

PER_DOUBLING = 2
"""Levels for each doubling of the weight."""


def checked_weights(weights: Any, size: int) -> np.ndarray:
    """Return weights as an array of shape (size,).

    Raises
    ------
    DataError
        If they have another shape, or one is negative or not finite.
    """
    weights = np.asarray(weights, dtype=np.float64)
    if weights.shape != (size,) or not (np.isfinite(weights) & (weights >= 0)).all():
        raise DataError(f"a weight is needed for each of the {size} examples, finite and not negative")
    return np.asarray(weights)


@dataclass(frozen=True)
class Design:
    """Weights that random probes are drawn by.

    Attributes
    ----------
    levels : array of uint8, shape (N,)
        Level of each example.
    weights : array, shape (L,)
        Of the levels.
    """

    levels: np.ndarray
    weights: np.ndarray

    @classmethod
    def equal(cls, size: int) -> Self:
        """Give all examples the same weight."""
        return cls(np.zeros(size, dtype=np.uint8), np.ones(1))

    @classmethod
    def of(cls, weights: np.ndarray) -> Self:
        """Round weights, shape (N,), to levels; those below LEAST of the mean become that."""
        if not weights.any():
            return cls.equal(len(weights))
        doublings = np.log2(np.maximum(weights / weights.mean(), LEAST))
        found, levels = np.unique(np.round(PER_DOUBLING * doublings), return_inverse=True)
        return cls(levels.astype(np.uint8), 2.0 ** (found / PER_DOUBLING))

    def draw(self, columns: np.ndarray, count: int, seed: int) -> np.ndarray:
        """Draw so many of these columns, one after the other; the first of them are a draw of fewer."""
        # The earliest of independent exponential times are successive draws by their rates.
        times = np.random.default_rng(seed).exponential(size=len(columns)) / self.weights[self.levels[columns]]
        return columns[np.argsort(times, kind="stable")[:count]]

    def chances(self, candidates: np.ndarray, drawn: np.ndarray, among: np.ndarray) -> np.ndarray:
        """Return the probability of each draw, given all others and that it is of a part.

        Parameters
        ----------
        candidates : array of bool, shape (N,)
            Examples that were drawn from.
        drawn : array of int, shape (n,)
            Columns, in the order of the draws.
        among : array of bool, shape (N,)
            The part.

        Returns
        -------
        array, shape (n,)
            NaN for draws outside the part.

        Notes
        -----
        Had example i been drawn in place of example j, every later draw l would have had its probability from a
        remaining weight that is larger by ``w_j - w_i``. So, given the others, i has the probability
        ``w_i / prod_l (R_l + w_j - w_i)``, up to a constant; R_l is the weight that remained before draw l.
        """
        own = self.levels[drawn]
        remaining = self.weights[self.levels[candidates]].sum() - np.cumsum(self.weights[own]) + self.weights[own]
        inside = among[drawn]
        left = np.bincount(self.levels[candidates & among], minlength=len(self.weights))
        left -= np.bincount(own[inside], minlength=len(self.weights))
        found = np.full(len(drawn), np.nan)
        for level in np.unique(own[inside]).tolist():
            without = remaining + self.weights[level] - self.weights[:, None]
            later = np.zeros((len(self.weights), len(drawn) + 1))  # sums over the draws from each on
            # A level of which nothing remains may leave no weight: it is left out below.
            logs = np.log(np.maximum(without, 1e-9))
            later[:, :-1] = np.cumsum(logs[:, ::-1], axis=1)[:, ::-1]
            at = np.flatnonzero(inside & (own == level))
            relative = np.log(self.weights)[:, None] - later[:, at + 1]
            counts = left + (np.arange(len(self.weights)) == level)
            there = counts > 0
            found[at] = 1.0 / (counts[there] @ np.exp(relative[there] - relative[level]))
        return found

    def inclusion(self, columns: np.ndarray, count: int) -> np.ndarray:
        """Return the probability, by level (L,), of being among so many draws from these columns; approximate.

        It is that of a time before the one at which so many draws are expected (Rosen 1997).
        """
        sizes = np.bincount(self.levels[columns], minlength=len(self.weights))
        if count >= len(columns):
            return np.ones(len(self.weights))

        def excess(time: float) -> float:
            return float(sizes @ -np.expm1(-self.weights * time)) - count

        latest = -np.log1p(-count / len(columns)) / self.weights[sizes > 0].min()
        time = latest if excess(latest) <= 0 else scipy.optimize.brentq(excess, 0.0, latest, xtol=1e-12 * latest)
        return np.asarray(-np.expm1(-self.weights * time))
