"""Weights and orders that strategies and plans are made of: softmax, normal scores, interleaving, stratification."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import scipy

from forgetcast.errors import ConfigError

EFFECTIVE_SHARE = 0.25
"""Effective sample size that the default temperature aims at, as a fraction of the usable examples.

The paper's fixed temperature of 0.1 leaves about 1 % on real rows: a few outliers are then all that is replayed."""


def softmax_weights(forecast: np.ndarray, temperature: float | None = None) -> np.ndarray:
    """Compute the softmax of forecast / temperature, shape (n,), summing to one.

    Without a temperature, the one is found at which the effective sample size is EFFECTIVE_SHARE of n.
    """

    def weights(inverse: float) -> np.ndarray:
        w = np.exp(inverse * (forecast - forecast.max()))
        return np.asarray(w / w.sum())

    if temperature is not None:
        if not temperature > 0:
            raise ConfigError(f"the temperature must be positive, not {temperature}")
        return weights(1 / temperature)
    spread = float(np.ptp(forecast))
    target = max(EFFECTIVE_SHARE * len(forecast), 1.0)

    def excess(log_inverse: float) -> float:
        return 1 / float((weights(np.exp(log_inverse)) ** 2).sum()) - target

    if spread == 0:
        return weights(0.0)
    low, high = np.log(1e-3 / spread), np.log(1e6 / spread)
    if excess(low) <= 0 or excess(high) >= 0:  # too few examples, or ties: no temperature reaches the target
        return weights(1 / spread)
    return weights(float(np.exp(scipy.optimize.brentq(excess, low, high))))


def normal_scores(values: np.ndarray) -> np.ndarray:
    """Compute the standard normal quantiles of the ranks, shape (n,): the same order without outliers.

    Equal values share their mean rank; the k-th smallest of n is at the level (k - 1/2) / n.
    """
    ranks = scipy.stats.rankdata(values)
    return np.asarray(scipy.special.ndtri((ranks - 0.5) / len(values)))


def interleave(first: np.ndarray, second: np.ndarray, share: float) -> np.ndarray:
    """Merge two orders of the same examples; each skips what was taken already.

    Of the first k, ceil(k * share) are taken from `first` and the others from `second`.

    Parameters
    ----------
    first, second : array of int, shape (n,)
        The same numbers, each once.
    share : float
        In (0, 1].
    """
    queues = iter(first.tolist()), iter(second.tolist())
    taken: dict[int, None] = {}
    for i in range(len(first)):
        from_first = np.ceil((i + 1) * share) > np.ceil(i * share)
        queue = queues[0] if from_first else queues[1]
        taken[next(item for item in queue if item not in taken)] = None
    return np.fromiter(taken, dtype=np.intp, count=len(first))


def stratified_order(order: np.ndarray, strata: Sequence[str]) -> np.ndarray:
    """Rearrange an order so that every prefix has each stratum in proportion to its size, shape (n,).

    Prefixes follow Webster's method: the j-th of a stratum of n comes at the time (j - 1/2) / n. Within a stratum the
    order is kept.

    Parameters
    ----------
    order : array of int, shape (n,)
    strata : sequence of str
        Label of each example that `order` may name.
    """
    _, codes = np.unique(np.array([strata[i] for i in order.tolist()]), return_inverse=True)
    counts = np.bincount(codes)
    grouped = np.argsort(codes, kind="stable")
    place = np.empty(len(order))
    place[grouped] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    return order[np.argsort((place + 0.5) / counts[codes], kind="stable")]


def passes(n: int, seed: Sequence[int]) -> Iterator[int]:
    """Yield positions of `n` examples without end, each once in every pass, in an order drawn for the pass."""
    rng = np.random.default_rng(list(seed))
    while True:
        yield from rng.permutation(n).tolist()
