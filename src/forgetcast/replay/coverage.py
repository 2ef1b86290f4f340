"""Coverage: choose examples that together represent everything forecast to be forgotten.

Replaying an example protects those with similar forgetting. The similarity of two examples is the product of their rows
of loadings, so no N x N array is made: choosing among 10^5 examples takes their loadings and some thousand targets.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from forgetcast.completion.gaussian import LinearGaussian

TARGETS = 2048
"""Maximum number of target examples; more are reduced to a systematic sample in proportion to the demand."""

DEPTH = 4096
"""Number of examples chosen greedily; the others follow by forecast."""

HALVING_SHARE = 0.05
"""Fraction of the examples that, replayed at random, is assumed to halve the forgetting of a typical one."""

FIRST_BATCH = 16


def correlation_loadings(model: LinearGaussian) -> np.ndarray:
    """Return loadings whose products are the correlations between examples that the model expects in a new task.

    The task's mean, which shifts all examples equally, is removed first: it would make all of them similar.

    Parameters
    ----------
    model : LinearGaussian
        Fitted, such as `completion.Bayesian().fit(atlas)`.

    Returns
    -------
    array, shape (N, r)
        Rows have norm one at most; the squared norm is the fraction of the example's variance that the factors
        explain.
    """
    varying = np.ptp(model.loadings_, axis=0) > 0
    loadings = model.loadings_[:, varying].astype(np.float64)
    scaled = (loadings - loadings.mean(axis=0)) * np.sqrt(model.prior_[varying])
    return np.asarray(scaled / np.sqrt((scaled**2).sum(axis=1) + model.noise_)[:, None])


class Objective(Protocol):
    """A monotone submodular function of the chosen examples: an example's gain never grows as others are chosen."""

    def gains(self, rows: np.ndarray) -> np.ndarray:
        """Return the gain of choosing each of these next, shape (len(rows),)."""
        ...

    def take(self, row: int) -> None:
        """Add an example to the chosen ones."""
        ...


class _Similarity:
    """Similarity of candidates to targets: all examples with a positive demand, or a sample of them.

    Parameters
    ----------
    loadings : array, shape (n, r)
        The similarity of two examples is the product of their rows, clipped at zero.
    demand : array, shape (n,)
        Non-negative weight of each example.
    """

    def __init__(self, loadings: np.ndarray, demand: np.ndarray) -> None:
        targets, self.demand = sample_targets(demand)
        self._loadings, self._targets = loadings, loadings[targets]

    def similarity(self, rows: np.ndarray) -> np.ndarray:
        """Return the similarity of these candidates to the targets, shape (len(rows), m)."""
        return np.maximum(self._loadings[rows] @ self._targets.T, 0.0)


class Facility(_Similarity):
    """Facility location: sum over examples of demand times similarity to the most similar chosen one.

    References
    ----------
    Nemhauser, Wolsey and Fisher (1978), An analysis of approximations for maximizing submodular set functions.
    """

    def __init__(self, loadings: np.ndarray, demand: np.ndarray) -> None:
        super().__init__(loadings, demand)
        self._nearest = np.zeros(len(self.demand))

    def gains(self, rows: np.ndarray) -> np.ndarray:
        """As in `Objective`."""
        return np.asarray(np.maximum(self.similarity(rows) - self._nearest, 0.0) @ self.demand)

    def take(self, row: int) -> None:
        """As in `Objective`."""
        self._nearest = np.maximum(self._nearest, self.similarity(np.array([row]))[0])


class Diminishing(_Similarity):
    """Forgetting removed by replay: sum over examples of demand times ``1 - 1 / (1 + dose)``.

    An example's dose is the sum of its similarities to the chosen ones, in units in which `HALVING_SHARE` of all
    examples, drawn at random, gives one on average. A power law, unlike ``1 - exp(-dose)``, still distinguishes
    examples when much is replayed.
    """

    def __init__(self, loadings: np.ndarray, demand: np.ndarray) -> None:
        super().__init__(loadings, demand)
        some = np.arange(0, len(loadings), -(-len(loadings) // TARGETS))
        typical = float(self.similarity(some).mean(axis=0) @ self.demand) / (float(self.demand.sum()) or 1.0)
        self.unit = HALVING_SHARE * len(loadings) * typical or 1.0
        self._dose = np.zeros(len(self.demand))

    def gains(self, rows: np.ndarray) -> np.ndarray:
        """As in `Objective`."""
        more = self.similarity(rows) / self.unit
        # 1 / (1 + dose) - 1 / (1 + dose + more), without cancellation
        return np.asarray((more / (1 + self._dose + more)) @ (self.demand / (1 + self._dose)))

    def take(self, row: int) -> None:
        """As in `Objective`."""
        self._dose += self.similarity(np.array([row]))[0] / self.unit


def sample_targets(demand: np.ndarray, most: int = TARGETS) -> tuple[np.ndarray, np.ndarray]:
    """Return the examples with a positive demand, or a systematic sample of `most` with the same total.

    Returns
    -------
    rows : array of int, shape (m,)
        In a sample, one with a high demand may occur several times.
    demand : array, shape (m,)
    """
    rows = np.flatnonzero(demand > 0)
    if len(rows) <= most:
        return rows, demand[rows]
    total = np.cumsum(demand)
    sampled = np.searchsorted(total, (np.arange(most) + 0.5) / most * total[-1])
    return sampled, np.full(most, total[-1] / most)


def greedy(objective: Objective, n: int, count: int) -> np.ndarray:
    """Choose examples one by one, each time the one with the largest gain, shape (count,).

    An earlier gain is an upper bound of the current one, so only those that could still be the largest are recomputed
    (Minoux 1978). Ties go to the first. The value is at least 1 - 1/e of that of the best set of the same size
    (Nemhauser, Wolsey and Fisher 1978).
    """
    blocks = (np.arange(start, min(start + TARGETS, n)) for start in range(0, n, TARGETS))
    bounds = np.concatenate([objective.gains(rows) for rows in blocks])
    chosen = np.empty(count, dtype=np.intp)
    for i in range(count):
        if bounds.max() <= 0:  # no gain remains
            chosen[i:] = np.flatnonzero(bounds > -np.inf)[: count - i]
            break
        exact = np.full(n, i == 0)
        batch = FIRST_BATCH
        while not exact[best := int(np.argmax(bounds))]:
            old = np.where(exact, -np.inf, bounds)
            old[best] = np.inf  # of many equal bounds, the first must be in the batch
            rows = np.argpartition(-old, batch)[:batch] if batch < n else np.arange(n)
            rows = rows[old[rows] > -np.inf]
            bounds[rows] = objective.gains(rows)
            exact[rows] = True
            batch *= 2
        chosen[i] = best
        objective.take(best)
        bounds[best] = -np.inf
    return chosen


def coverage(
    loadings: np.ndarray, forecast: np.ndarray, objective: type[Facility | Diminishing], depth: int = DEPTH
) -> np.ndarray:
    """Order examples so that every prefix is a greedy cover of the forecast forgetting, shape (n,).

    Parameters
    ----------
    loadings : array, shape (n, r)
        From `correlation_loadings`.
    forecast : array, shape (n,)
        Expected forgetting, nats per token. Its positive part is the demand; ties go to the higher forecast.
    objective : Facility or Diminishing
    depth : int
        Number of examples chosen greedily; the others follow by forecast.
    """
    by_forecast = np.argsort(-forecast, kind="stable")
    demand = np.maximum(forecast[by_forecast], 0.0)
    first = greedy(objective(loadings[by_forecast], demand), len(forecast), min(depth, len(forecast)))
    return by_forecast[np.concatenate([first, np.delete(np.arange(len(forecast)), first)])]


def herding(loadings: np.ndarray, weights: np.ndarray, depth: int = DEPTH) -> np.ndarray:
    """Order examples so that every prefix approximates a weighted distribution, shape (n,).

    Each next example minimises the maximum mean discrepancy between the chosen ones and the weights: a deterministic
    counterpart of sampling by these weights. The kernel is Gaussian in the loadings, and its width is their median
    distance.

    Parameters
    ----------
    loadings : array, shape (n, r)
    weights : array, shape (n,)
        Non-negative, summing to one.
    depth : int
        Number of examples chosen by the discrepancy; the others follow by weight.

    References
    ----------
    Chen, Welling and Smola (2010), Super-samples from kernel herding.
    """
    n = len(weights)
    width = _median_distance(loadings)
    targets, mass = sample_targets(weights)
    blocks = (loadings[start : start + TARGETS] for start in range(0, n, TARGETS))
    pull = np.concatenate([gaussian(rows, loadings[targets], width) @ mass for rows in blocks])
    push = np.zeros(n)
    first = np.empty(min(depth, n), dtype=np.intp)
    free = np.ones(n, dtype=bool)
    for i in range(len(first)):
        first[i] = best = int(np.argmax(np.where(free, pull - push / (i + 1), -np.inf)))
        free[best] = False
        push += gaussian(loadings[best : best + 1], loadings, width)[0]
    rest = np.flatnonzero(free)
    return np.concatenate([first, rest[np.argsort(-weights[rest], kind="stable")]])


def gaussian(a: np.ndarray, b: np.ndarray, width: float) -> np.ndarray:
    """Return the Gaussian kernel of every row of `a` (p, r) with every row of `b` (q, r), shape (p, q)."""
    squared = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
    return np.asarray(np.exp(np.maximum(squared, 0.0) / (-2 * width**2)))


def _median_distance(loadings: np.ndarray, most: int = 512) -> float:
    """Return the median distance between at most `most` examples, evenly spaced; 1 where it is zero."""
    some = loadings[:: -(-len(loadings) // most)]
    upper = np.triu_indices(len(some), 1)
    distances = np.sqrt(((some[upper[0]] - some[upper[1]]) ** 2).sum(axis=1))
    return float(np.median(distances)) or 1.0 if len(distances) else 1.0
