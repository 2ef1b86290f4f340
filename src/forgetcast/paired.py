"""Paired comparisons: the same runs under two arms, grouped where they are not independent, and of several arms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy

from forgetcast.errors import DataError

RESAMPLES = 10_000
"""Of a bootstrap."""


@dataclass(frozen=True)
class PairedDifference:
    """Mean of paired differences, with a Student-t interval and the p-value of "there is none"."""

    mean: float
    lower: float
    upper: float
    p_value: float
    pairs: int


def paired_difference(a: Any, b: Any, *, level: float = 0.95) -> PairedDifference:
    """Interval for the mean of a - b over pairs (Student's t).

    Parameters
    ----------
    a, b : array-like, shape (n,)
        n >= 2.
    """
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    if difference.ndim != 1 or len(difference) < 2:
        raise DataError("a paired interval needs at least two pairs")
    mean = float(difference.mean())
    if np.ptp(difference) == 0:
        return PairedDifference(mean, mean, mean, float(mean == 0), len(difference))
    test = scipy.stats.ttest_1samp(difference, 0.0)
    interval = test.confidence_interval(level)
    return PairedDifference(mean, float(interval.low), float(interval.high), float(test.pvalue), len(difference))


def wilcoxon_p(differences: Any) -> float:
    """p-value of "the differences, shape (n,), are symmetric about zero" (Wilcoxon's signed ranks); 1 if all are 0."""
    differences = np.asarray(differences, dtype=np.float64)
    return float(scipy.stats.wilcoxon(differences).pvalue) if differences.any() else 1.0


def bootstrap_interval(
    groups: Sequence[np.ndarray], *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval for the mean of grouped values: groups are drawn again, then the values within each drawn.

    A single group is not drawn again, only its values.

    Parameters
    ----------
    groups : sequence of array, shape (n_g,)
        Values of one group are not independent of each other, such as the seeds of one task.
    level : float
    resamples : int
    seed : int

    References
    ----------
    Davison and Hinkley (1997), Bootstrap Methods and their Application, section 3.8.
    """
    sizes = np.array([len(group) for group in groups])
    if not len(sizes) or sizes.min() < 1:
        raise DataError("a bootstrap needs at least one value in every group")
    padded = np.zeros((len(sizes), sizes.max()))
    for row, group in zip(padded, groups, strict=True):
        row[: len(group)] = group
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(sizes), size=(resamples, len(sizes)))
    within = (rng.random((*drawn.shape, padded.shape[1])) * sizes[drawn][..., None]).astype(np.intp)
    counted = np.arange(padded.shape[1]) < sizes[drawn][..., None]
    values = padded[drawn[..., None], within]
    means = (values * counted).sum(axis=(1, 2)) / counted.sum(axis=(1, 2))
    lower, upper = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(lower), float(upper)


def holm(p_values: Any) -> np.ndarray:
    """p-values of one family, shape (m,), corrected so that the chance of any false finding stays at the level.

    References
    ----------
    Holm (1979), A simple sequentially rejective multiple test procedure.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return corrected
