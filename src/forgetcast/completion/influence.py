"""How much of a figure one source carries: the same figure without the most influential source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class WithoutSource:
    """A figure without the most influential source.

    Attributes
    ----------
    source : str
    examples : int
        Number of its examples.
    value : float
    share : float or None
        Of the variation that the source has; None where the source is the one that changes the figure most.
    """

    source: str
    examples: int
    value: float
    share: float | None = None


def largest_share(labels: Sequence[str], squares: np.ndarray) -> WithoutSource | None:
    """Return the source with the largest part of `squares`, shape (n,), without a value; None unless there are two."""
    names, codes, counts = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
    if len(names) < 2 or not squares.sum():
        return None
    parts = np.bincount(codes, squares)
    most = int(np.argmax(parts))
    return WithoutSource(str(names[most]), int(counts[most]), float("nan"), float(parts[most] / parts.sum()))


def most_influential(
    labels: Sequence[str], value: float, without: Callable[[np.ndarray], float]
) -> WithoutSource | None:
    """Return a figure without the source that changes it most; None unless there are two sources.

    Parameters
    ----------
    labels : sequence of str, length n
        Source of each example.
    value : float
        The figure of all examples.
    without : callable
        Computes it from the examples that a mask of shape (n,) keeps; NaN where it cannot be.
    """
    named = np.asarray(labels)
    names, counts = np.unique(named, return_counts=True)
    if len(names) < 2:
        return None
    values = [without(named != name) for name in names]
    change = [abs(each - value) if np.isfinite(each) else -1.0 for each in values]
    most = int(np.argmax(change))
    return WithoutSource(str(names[most]), int(counts[most]), float(values[most])) if change[most] >= 0 else None
