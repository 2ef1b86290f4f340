"""What carries a figure: the same figure without the most influential source, and what examples of few tokens move."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from forgetcast.measure.diff import FEW_TOKENS


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


@dataclass(frozen=True)
class FewTokens:
    """Examples with fewer than `FEW_TOKENS` target tokens: their mean losses move far, and count as much as others.

    Attributes
    ----------
    examples : int
    mean : float
        Mean forgetting of these, over tasks too; nats per token.
    share : float
        Of the variation that these have: of the sum of squares around the grand mean.
    """

    examples: int
    mean: float
    share: float

    def sentence(self, of: int) -> str:
        """Say it, for a matrix with so many examples."""
        return (
            f"{self.examples} of {of} examples have fewer than {FEW_TOKENS} target tokens: mean forgetting "
            f"{self.mean:.3f}, and {self.share:.0%} of the variation."
        )


def few_tokens(values: np.ndarray, tokens: np.ndarray) -> FewTokens | None:
    """Return what the examples of few tokens move in a matrix (M, N), by the tokens (N,); None if there are none."""
    few = (tokens > 0) & (tokens < FEW_TOKENS)
    squares = (values - np.nanmean(values)) ** 2
    if not few.any() or np.isnan(values[:, few]).all() or not np.nansum(squares):
        return None
    return FewTokens(
        int(few.sum()), float(np.nanmean(values[:, few])), float(np.nansum(squares[:, few]) / np.nansum(squares))
    )


def mean_per_token(values: np.ndarray, tokens: np.ndarray) -> float | None:
    """Return the mean of a matrix (M, N) with examples weighted by their tokens (N,), then over tasks.

    None where a number of tokens is not known.
    """
    measured = ~np.isnan(values)
    if not (tokens[measured.any(axis=0)] > 0).all():
        return None
    weights = measured * tokens
    return float(np.mean(np.where(measured, values * tokens, 0.0).sum(axis=1) / weights.sum(axis=1)))


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
