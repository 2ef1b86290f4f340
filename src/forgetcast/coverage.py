"""Coverage: choose examples that together stand for all that the forecast says will be lost.

Replaying an example protects those whose forgetting is like its own. How alike two are is the product of their rows of
loadings, so nothing of size N x N is made: choosing among 10^5 examples takes their loadings and some thousand targets.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from forgetcast.completion.gaussian import LinearGaussian

TARGETS = 2048
"""Most examples that a choice is judged by; of more, these are a systematic sample in proportion to the demand."""

DEPTH = 4096
"""Examples that are chosen one by one; should more be replayed, the others follow by forecast."""

HALVING_SHARE = 0.05
"""Share of the examples that, replayed at random, is taken to halve the forgetting of a typical one."""

FIRST_BATCH = 16


def correlation_loadings(model: LinearGaussian) -> np.ndarray:
    """Loadings whose products are the correlations between examples that the model expects in a new task.

    What moves all examples alike, the task's own mean, is taken out before: it would make everything similar.

    Parameters
    ----------
    model : LinearGaussian
        Fitted, such as `completion.Bayesian().fit(atlas)`.

    Returns
    -------
    array, shape (N, r)
        No row is longer than one; the square of its length is the share of the example's variance that the factors
        explain.
    """
    varying = np.ptp(model.loadings_, axis=0) > 0
    loadings = model.loadings_[:, varying].astype(np.float64)
    scaled = (loadings - loadings.mean(axis=0)) * np.sqrt(model.prior_[varying])
    return np.asarray(scaled / np.sqrt((scaled**2).sum(axis=1) + model.noise_)[:, None])


class Objective(Protocol):
    """A monotone submodular function of the chosen examples: what an example adds never grows as others are chosen."""

    def gains(self, rows: np.ndarray) -> np.ndarray:
        """Say what choosing each of these next would add, shape (len(rows),)."""
        ...

    def take(self, row: int) -> None:
        """Choose an example."""
        ...


class _Similarity:
    """Similarity of candidates to targets, which are all examples with a demand or a sample of them.

    Parameters
    ----------
    loadings : array, shape (n, r)
        The similarity of two examples is the product of their rows, and zero where that is negative.
    demand : array, shape (n,)
        Not negative: how much each example counts.
    """

    def __init__(self, loadings: np.ndarray, demand: np.ndarray) -> None:
        targets, self.demand = sample_targets(demand)
        self._loadings, self._targets = loadings, loadings[targets]

    def similarity(self, rows: np.ndarray) -> np.ndarray:
        """Of these candidates to the targets, shape (len(rows), m)."""
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
    """Forgetting that replay takes away: sum over examples of demand times ``1 - 1 / (1 + dose)``.

    An example's dose is the sum of its similarities to the chosen ones, in units in which `HALVING_SHARE` of all
    examples, drawn at random, gives one on average. A power law, unlike ``1 - exp(-dose)``, goes on telling examples
    apart when much is replayed.
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
        # 1 / (1 + dose) - 1 / (1 + dose + more), without the difference of two nearly equal numbers
        return np.asarray((more / (1 + self._dose + more)) @ (self.demand / (1 + self._dose)))

    def take(self, row: int) -> None:
        """As in `Objective`."""
        self._dose += self.similarity(np.array([row]))[0] / self.unit


def sample_targets(demand: np.ndarray, most: int = TARGETS) -> tuple[np.ndarray, np.ndarray]:
    """Examples with a demand and their demand; of more than `most`, a systematic sample with the same total.

    Returns
    -------
    rows : array of int, shape (m,)
        In a sample, one with much demand may occur several times.
    demand : array, shape (m,)
    """
    rows = np.flatnonzero(demand > 0)
    if len(rows) <= most:
        return rows, demand[rows]
    upto = np.cumsum(demand)
    at = np.searchsorted(upto, (np.arange(most) + 0.5) / most * upto[-1])
    return at, np.full(most, upto[-1] / most)


def greedy(objective: Objective, n: int, count: int) -> np.ndarray:
    """Choose one example after another, each time the one that adds most, shape (count,).

    A gain that was computed when fewer were chosen bounds the present one from above, so only those that could still be
    the largest are computed anew (Minoux 1978). Of equal ones, the first is chosen. The value is at least 1 - 1/e of
    that of the best set of the same size (Nemhauser, Wolsey and Fisher 1978).
    """
    blocks = (np.arange(start, min(start + TARGETS, n)) for start in range(0, n, TARGETS))
    bounds = np.concatenate([objective.gains(rows) for rows in blocks])
    chosen = np.empty(count, dtype=np.intp)
    for i in range(count):
        if bounds.max() <= 0:  # nothing is left to gain
            chosen[i:] = np.flatnonzero(bounds > -np.inf)[: count - i]
            break
        exact = np.full(n, i == 0)
        batch = FIRST_BATCH
        while not exact[best := int(np.argmax(bounds))]:
            old = np.where(exact, -np.inf, bounds)
            old[best] = np.inf  # of many equal bounds, the first has to be among those that are looked at
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
    """Order examples so that every prefix covers the forecast forgetting as well as a greedy choice can, shape (n,).

    Parameters
    ----------
    loadings : array, shape (n, r)
        As `correlation_loadings` gives them.
    forecast : array, shape (n,)
        Expected forgetting, nats per token. What is above zero is the demand; of equally good examples the one with the
        higher forecast comes first.
    objective : Facility or Diminishing
    depth : int
        How many are chosen; the others follow by forecast.
    """
    by_forecast = np.argsort(-forecast, kind="stable")
    demand = np.maximum(forecast[by_forecast], 0.0)
    first = greedy(objective(loadings[by_forecast], demand), len(forecast), min(depth, len(forecast)))
    return by_forecast[np.concatenate([first, np.delete(np.arange(len(forecast)), first)])]


def herding(loadings: np.ndarray, weights: np.ndarray, depth: int = DEPTH) -> np.ndarray:
    """Order examples so that every prefix is as close as can be to a weighted distribution, shape (n,).

    Each next example makes the maximum mean discrepancy between the chosen ones and the weights smallest: what sampling
    by these weights does on average, without its chance. The kernel is Gaussian in the loadings, as wide as their
    median distance.

    Parameters
    ----------
    loadings : array, shape (n, r)
    weights : array, shape (n,)
        Not negative, summing to one.
    depth : int
        How many are chosen; the others follow by weight.

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
    """Gaussian kernel of every row of `a` (p, r) with every row of `b` (q, r), shape (p, q)."""
    squared = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
    return np.asarray(np.exp(np.maximum(squared, 0.0) / (-2 * width**2)))


def _median_distance(loadings: np.ndarray, most: int = 512) -> float:
    """Median distance between examples, or between some of them; one where it is zero."""
    some = loadings[:: -(-len(loadings) // most)]
    upper = np.triu_indices(len(some), 1)
    distances = np.sqrt(((some[upper[0]] - some[upper[1]]) ** 2).sum(axis=1))
    return float(np.median(distances)) or 1.0 if len(distances) else 1.0
