"""Which examples to measure after a new task: those that tell most about all the others."""

from __future__ import annotations

from typing import Any

import numpy as np

from forgetcast.completion.base import LinearGaussian
from forgetcast.errors import DataError


def choose(
    model: LinearGaussian,
    k: int,
    candidates: Any = None,
    cost: Any = None,
    *,
    measured: Any = (),
    audit: int = 0,
) -> np.ndarray:
    """Choose probes greedily: each one leaves the smallest summed posterior variance over all examples (A-optimal).

    Parameters
    ----------
    model : LinearGaussian
        A fitted completion method. One without loadings (`Mean`) learns nothing from probes and is refused.
    k : int
    candidates : array-like of int, optional
        Columns to choose from; default all.
    cost : array-like, shape (N,), optional
        What measuring each example costs, such as its tokens; then each probe lowers the variance most for its cost.
    measured : array-like of int
        Columns that were measured already: they are not chosen again, and what they tell is not asked for again.
    audit : int
        How many of the k are drawn at random instead (they come last): they keep the error that is seen at the probes
        an honest sample of the others'.

    Returns
    -------
    array of int, shape (k,)
        Columns, best first: the first m of them are the choice of m.

    Notes
    -----
    With the posterior covariance S of the coefficients, measuring column j lowers the summed variance by
    ``l' S G S l / (noise_j + l' S l)`` with ``l = loadings_j`` and ``G = loadings' loadings``, and S becomes
    ``S - S l l' S / (noise_j + l' S l)``: N r^2 operations a probe.

    Raises
    ------
    DataError
        If there are fewer candidates than probes, the model has no loadings, or a cost is not a positive number.
    """
    if not isinstance(model, LinearGaussian) or model.loadings_.shape[1] == 0:
        raise DataError(f"{type(model).__name__} has no loadings to choose probes by; choose them with Bayesian")
    n = len(model.mean_)
    seen = np.unique(np.asarray(measured, dtype=np.intp))
    pool = _candidates(n, k, np.setdiff1d(np.arange(n) if candidates is None else candidates, seen))
    price = np.ones(n) if cost is None else np.asarray(cost, dtype=np.float64)
    if price.shape != (n,) or not (np.isfinite(price) & (price > 0)).all():
        raise DataError(f"a cost is needed for each of the {n} examples, finite and above zero")
    if not 0 <= audit <= k:
        raise DataError(f"of {k} probes, {audit} cannot be drawn at random")
    loadings, noise = model.loadings_[pool], model.noise_[pool]
    total = model.loadings_.T @ model.loadings_
    # An infinite prior has no finite covariance to start from; a very wide one leads to the same choice.
    widest = 1e6 * (noise.max() + np.abs(model.mean_).max() ** 2 + 1.0)
    covariance = np.diag(np.minimum(model.prior_, widest))
    for loading, own in zip(model.loadings_[seen], model.noise_[seen], strict=True):
        told = covariance @ loading
        covariance -= np.outer(told, told) / (own + loading @ told)
    chosen: list[int] = []
    free = np.ones(len(pool), dtype=bool)
    for _ in range(k - audit):
        projected = loadings @ covariance
        spread = noise + np.einsum("nr,nr->n", projected, loadings)
        gain = np.einsum("nr,rs,ns->n", projected, total, projected, optimize=True) / spread / price[pool]
        best = int(np.argmax(np.where(free, gain, -np.inf)))
        covariance -= np.outer(projected[best], projected[best]) / spread[best]
        free[best] = False
        chosen.append(best)
    drawn = np.random.default_rng(0).choice(np.flatnonzero(free), size=audit, replace=False)
    return pool[np.concatenate([np.array(chosen, dtype=np.intp), drawn])]


def random(n: int, k: int, *, seed: int = 0, candidates: Any = None) -> np.ndarray:
    """Draw `k` different columns of `n`, or of `candidates`, with equal probability, shape (k,)."""
    return np.random.default_rng(seed).choice(_candidates(n, k, candidates), size=k, replace=False)


def _candidates(n: int, k: int, candidates: Any) -> np.ndarray:
    pool = np.arange(n) if candidates is None else np.unique(np.asarray(candidates, dtype=np.intp))
    if len(pool) and not (pool[0] >= 0 and pool[-1] < n):
        raise DataError(f"a candidate is outside the {n} examples of the atlas")
    if not 1 <= k <= len(pool):
        raise DataError(f"{k} probes cannot be chosen from {len(pool)} candidates")
    return pool
