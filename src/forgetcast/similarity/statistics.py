"""How a similarity and measured forgetting go together: correlations with intervals over tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy

from forgetcast.atlas.matrix import ForgettingMatrix
from forgetcast.completion.additive import additive_effects
from forgetcast.errors import DataError

RESAMPLES = 2_000
"""Bootstrap resamples of the tasks."""

MOST_EXAMPLES = 5_000
"""Examples that correlations are computed on; of a larger pool, so many are drawn at random."""


class Correlation(NamedTuple):
    """A correlation and its 95 % interval; None where a side is constant."""

    value: float | None
    lower: float | None
    upper: float | None


@dataclass(frozen=True)
class Association:
    """Correlations of a similarity with forgetting.

    Attributes
    ----------
    name : str
    cells, cells_spearman : Correlation
        Pearson's and Spearman's over all measured cells of the matrix.
    within_tasks, within_tasks_spearman : Correlation
        Over the examples of a task, the mean of all tasks: does it say which examples?
    within_examples, within_examples_spearman : Correlation
        Over the tasks of an example, the mean of all examples: does it say which task? None for a similarity that is
        the same for all tasks.
    partial, partial_spearman : Correlation
        Over cells, of what the additive fit a_i + b_j leaves of each side.
    tasks, examples : int
        That it is computed on.
    """

    name: str
    cells: Correlation
    cells_spearman: Correlation
    within_tasks: Correlation
    within_tasks_spearman: Correlation
    within_examples: Correlation
    within_examples_spearman: Correlation
    partial: Correlation
    partial_spearman: Correlation
    tasks: int
    examples: int


def associate(matrix: ForgettingMatrix, similarities: Mapping[str, np.ndarray], *, seed: int = 0) -> list[Association]:
    """Correlate similarities with measured forgetting.

    The intervals are percentiles of a bootstrap that resamples tasks. The ranks of Spearman's correlation are those in
    the whole matrix, not those in a resample, and entries that are missing are left out of both sides.

    Parameters
    ----------
    matrix : ForgettingMatrix, shape (M, N)
    similarities : mapping of str to array, shape (M, N)
        Of the matrix's tasks and examples, in its order. A NaN leaves the entry out.
    seed : int

    Raises
    ------
    DataError
        If there are fewer than three tasks or examples, or a shape differs.
    """
    tasks, examples = matrix.shape
    if min(tasks, examples) < 3:
        raise DataError(f"correlations need at least three tasks and examples, not {tasks} and {examples}")
    rng = np.random.default_rng(seed)
    columns = np.sort(rng.permutation(examples)[:MOST_EXAMPLES])
    drawn = rng.integers(tasks, size=(RESAMPLES, tasks))
    weights = np.array([np.bincount(row, minlength=tasks) for row in drawn], dtype=np.float64)
    weights = np.vstack([np.ones(tasks), weights])  # the first is the sample itself
    found = []
    for name, values in similarities.items():
        if values.shape != matrix.shape:
            raise DataError(f"the similarity {name!r} has the shape {values.shape}, the matrix {matrix.shape}")
        missing = ~matrix.observed[:, columns] | np.isnan(values[:, columns])
        y = np.where(missing, np.nan, matrix.values[:, columns].astype(np.float64))
        x = np.where(missing, np.nan, values[:, columns])
        rest = [_without_effects(side) for side in (x, y)]
        found.append(
            Association(
                name,
                _over_cells(x, y, weights),
                _over_cells(_ranks(x, None), _ranks(y, None), weights),
                _within_tasks(x, y, weights),
                _within_tasks(_ranks(x, 1), _ranks(y, 1), weights),
                _within_examples(x, y, weights),
                _within_examples(_ranks(x, 0), _ranks(y, 0), weights),
                _over_cells(rest[0], rest[1], weights),
                _over_cells(_ranks(rest[0], None), _ranks(rest[1], None), weights),
                tasks,
                len(columns),
            )
        )
    return found


def _ranks(values: np.ndarray, axis: int | None) -> np.ndarray:
    ranks = scipy.stats.rankdata(values, axis=axis, nan_policy="omit")
    return np.asarray(ranks, dtype=np.float64).reshape(values.shape)


def _without_effects(values: np.ndarray) -> np.ndarray:
    """Subtract the additive fit; what is only rounding becomes zero, so that it correlates with nothing."""
    rows, columns = additive_effects(values)
    rest = values - rows[:, None] - columns
    return np.where(np.abs(rest) <= 1e-9 * max(float(np.nanmax(np.abs(values), initial=0.0)), 1e-300), 0 * rest, rest)


def _interval(correlations: np.ndarray) -> Correlation:
    """Make a correlation of those of the sample and of the resamples."""
    if np.isnan(correlations[0]):
        return Correlation(None, None, None)
    lower, upper = np.nanquantile(correlations[1:], [0.025, 0.975])
    return Correlation(float(correlations[0]), float(lower), float(upper))


def _over_cells(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> Correlation:
    """Correlate all cells; the sums of each task, (M,), are enough for any resample."""
    x, y = x - np.nanmean(x), y - np.nanmean(y)
    sums = [np.nansum(part, axis=1) for part in (~np.isnan(x), x, y, x * x, y * y, x * y)]
    return _interval(_pearson(*(weights @ part for part in sums)))


def _within_tasks(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> Correlation:
    """Correlate within each task, and average over the tasks."""
    x, y = (part - np.nanmean(part, axis=1, keepdims=True) for part in (x, y))
    each = _pearson(*(np.nansum(part, axis=1) for part in (~np.isnan(x), x, y, x * x, y * y, x * y)))
    return _interval(_mean_of_defined(np.broadcast_to(each, weights.shape), weights))


def _within_examples(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> Correlation:
    """Correlate within each example, and average over the examples."""
    x, y = (part - np.nanmean(part, axis=0) for part in (x, y))
    x = np.where(np.abs(x) <= 1e-9 * max(float(np.nanmax(np.abs(x), initial=0.0)), 1e-300), 0 * x, x)
    parts = [np.nan_to_num(part) for part in (1.0 - np.isnan(x), x, y, x * x, y * y, x * y)]
    each = _pearson(*(weights @ part for part in parts))
    return _interval(_mean_of_defined(each, np.ones_like(each)))


def _mean_of_defined(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Average each row over its defined entries; NaN where there is none."""
    defined = ~np.isnan(values)
    total = (weights * defined).sum(axis=1)
    return np.where(total > 0, (weights * np.nan_to_num(values)).sum(axis=1) / np.maximum(total, 1e-30), np.nan)


def _pearson(n: np.ndarray, x: np.ndarray, y: np.ndarray, xx: np.ndarray, yy: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Compute correlations from numbers, sums, and sums of products; NaN where a side is constant or n < 3."""
    n = np.maximum(n, 1e-30)
    variances = np.maximum(xx / n - (x / n) ** 2, 0.0), np.maximum(yy / n - (y / n) ** 2, 0.0)
    constant = (n < 3) | (variances[0] <= 1e-12 * xx / n) | (variances[1] <= 1e-12 * yy / n)
    constant |= (xx <= 0) | (yy <= 0)
    scale = np.sqrt(np.where(constant, 1.0, variances[0] * variances[1]))
    return np.where(constant, np.nan, (xy / n - x * y / n**2) / scale)
