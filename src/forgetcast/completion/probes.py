"""Choice of the examples to measure after a new task: the most informative about all others."""

from __future__ import annotations

from typing import Any

import numpy as np

from forgetcast.completion.base import Completion
from forgetcast.completion.design import Design, checked_weights
from forgetcast.errors import DataError

__all__ = ["choose", "random", "weights"]


def choose(
    model: Completion,
    k: int,
    candidates: Any = None,
    cost: Any = None,
    *,
    measured: Any = (),
    audit: int = 0,
    weights: Any = None,
    seed: int = 0,
) -> np.ndarray:
    """Choose probes greedily: each minimises the summed posterior variance over all examples (A-optimal).

    Parameters
    ----------
    model : Completion
        A fitted method. The choice is made with its `gaussian_`: itself if it is linear-Gaussian with loadings,
        otherwise a `Bayesian` model of the same data.
    k : int
    candidates : array-like of int, optional
        Columns to choose from; default all.
    cost : array-like, shape (N,), optional
        Cost of measuring each example, such as its tokens; then each probe maximises the reduction per cost.
    measured : array-like of int
        Columns that were measured already: they are not chosen, and the model is conditioned on them.
    audit : int
        Number of the k probes that are drawn at random instead, without replacement from the candidates that were not
        chosen. They come last. Their errors are an unbiased sample, which guaranteed intervals need: pass the same
        number to `Completion.predict`. The first of them are a random sample, too.
    weights : array-like, shape (N,), optional
        Draw the random ones one after the other with probabilities proportional to these, such as `weights(model)`, and
        pass the same to `Completion.predict`. Default: equal.
    seed : int
        Of the random ones.

    Returns
    -------
    array of int, shape (k,)
        Columns, best first: the first m of them are the choice of m.

    Raises
    ------
    DataError
        If there are fewer candidates than probes, the model is not fitted, a cost is not a positive number, or a weight
        is negative or not finite.
    """
    model = model.gaussian_
    n = len(model.mean_)
    observed = np.flatnonzero(_among(n, measured))
    pool = _candidates(n, k, candidates, measured)
    price = np.ones(n) if cost is None else np.asarray(cost, dtype=np.float64)
    if price.shape != (n,) or not (np.isfinite(price) & (price > 0)).all():
        raise DataError(f"a cost is needed for each of the {n} examples, finite and above zero")
    if not 0 <= audit <= k:
        raise DataError(f"of {k} probes, {audit} cannot be drawn at random")
    chosen = model.state_.choose(k - audit, pool, measured=observed, cost=price[pool])
    rest = np.setdiff1d(pool, chosen, assume_unique=True)
    if weights is None:
        drawn = np.random.default_rng(seed).permutation(rest)[:audit]
    else:
        drawn = Design.of(checked_weights(weights, n)).draw(rest, audit, seed)
    return np.concatenate([chosen, drawn])


def weights(model: Completion) -> np.ndarray:
    """Return weights for random probes, shape (N,): how far each example is expected to be from the model, nats.

    Drawn by them, as many probes give a narrower guaranteed interval (`benchmarks/forecast.py`). They follow from the
    atlas alone: the standard deviation of the noise, expected over the classes of tasks of a `Bayesian` model.
    """
    return np.sqrt(model.gaussian_.state_.expected_noise(), dtype=np.float64)


def random(n: int, k: int, *, seed: int = 0, candidates: Any = None) -> np.ndarray:
    """Draw `k` different columns of `n`, or of `candidates`, with equal probability, shape (k,)."""
    return np.random.default_rng(seed).choice(_candidates(n, k, candidates), size=k, replace=False)


def _candidates(n: int, k: int, candidates: Any, excluded: Any = ()) -> np.ndarray:
    """Return the columns among `candidates` and not among `excluded`, sorted and unique; at least k of them."""
    usable = ~_among(n, excluded)
    pool = np.flatnonzero(usable if candidates is None else usable & _among(n, candidates))
    if not 1 <= k <= len(pool):
        raise DataError(f"{k} probes cannot be chosen from {len(pool)} candidates")
    return pool


def _among(n: int, columns: Any) -> np.ndarray:
    """Return the mask of these columns among n, shape (n,)."""
    columns = np.asarray(columns, dtype=np.intp)
    if len(columns) and not (columns.min() >= 0 and columns.max() < n):
        raise DataError(f"a candidate is outside the {n} examples of the atlas")
    mask = np.zeros(n, dtype=bool)
    mask[columns] = True
    return mask
