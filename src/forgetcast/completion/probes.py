"""Choice of the examples to measure after a new task: the most informative about all others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from forgetcast.completion.base import BLOCK, Completion
from forgetcast.errors import DataError

__all__ = ["choose", "random"]


def choose(
    model: Completion,
    k: int,
    candidates: Any = None,
    cost: Any = None,
    *,
    measured: Any = (),
    audit: int = 0,
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
    seed : int
        Of the random ones.

    Returns
    -------
    array of int, shape (k,)
        Columns, best first: the first m of them are the choice of m.

    Notes
    -----
    With the posterior covariance S of the coefficients, measuring column j lowers the summed variance by
    ``l' S G S l / (noise_j + l' S l)`` with ``l = loadings_j``, ``G = loadings' loadings`` and the noise that is
    expected over the classes of tasks; and S becomes ``S - S l l' S / (noise_j + l' S l)``. Both forms are kept for
    every candidate and updated by two products with its loadings, so a probe costs 4 N r operations; memory is about
    50 bytes per candidate in addition to the model.

    Raises
    ------
    DataError
        If there are fewer candidates than probes, the model is not fitted, or a cost is not a positive number.
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
    total = model.loadings_.T @ model.loadings_
    expected = model.state_.expected_noise()
    noise = expected[pool]
    # An infinite prior has no finite covariance; a very wide one leads to the same choice.
    widest = 1e6 * (noise.max() + np.abs(model.mean_).max() ** 2 + 1.0)
    covariance = np.diag(np.minimum(model.prior_, widest))
    for loading, variance in zip(model.loadings_[observed], expected[observed], strict=True):
        projection = covariance @ loading
        covariance -= np.outer(projection, projection) / (variance + loading @ projection)
    spread, gain = np.empty(len(pool)), np.empty(len(pool))  # l' S l and l' S G S l
    price, free = price[pool], np.ones(len(pool), dtype=bool)
    chosen: list[int] = []
    scale, curvature, towards = 0.0, 0.0, np.empty((2, len(total)))
    for i in range(k - audit):
        best, most = -1, -np.inf
        for part, loadings in _blocks(model.loadings_, pool):
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
        projection = covariance @ model.loadings_[pool[best]]
        scale, curvature = 1 / (noise[best] + spread[best]), projection @ total @ projection
        towards = np.array([projection, covariance @ (total @ projection)])
        covariance -= np.outer(projection, projection) * scale
    drawn = np.random.default_rng(seed).permutation(np.flatnonzero(free))[:audit]
    return pool[np.concatenate([np.array(chosen, dtype=np.intp), drawn])]


def _blocks(loadings: np.ndarray, columns: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield the loadings of these columns in blocks that fit the cache."""
    for start in range(0, len(columns), BLOCK):
        part = slice(start, start + BLOCK)
        first, last = columns[part][0], columns[part][-1]
        contiguous = last - first == len(columns[part]) - 1  # then a view is enough
        yield part, loadings[first : last + 1] if contiguous else loadings.T[:, columns[part]].T


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
