"""Replay strategies: from what is known of the examples to their weights, or to the order in which they are replayed.

Everything here sees only the examples that may be replayed, so that no strategy can look at those that are held out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy

from forgetcast.coverage import Diminishing, Facility, coverage, herding
from forgetcast.errors import ConfigError, DataError


class Strategy(NamedTuple):
    """What a strategy does, in a line, and what it has to be given: forecast, truth, losses, gradients, loadings."""

    text: str
    needs: tuple[str, ...] = ()


STRATEGIES: Mapping[str, Strategy] = {
    "none": Strategy("replay nothing"),
    "padding": Strategy("control: as many extra steps, but on new examples instead of replayed ones"),
    "random": Strategy("draw all alike"),
    "stratified": Strategy("draw at random, every source in its share of the pool at any time"),
    "forecast": Strategy("draw by softmax of the forecast", ("forecast",)),
    "ranked": Strategy("draw by softmax of the forecast's normal scores, which outliers cannot rule", ("forecast",)),
    "top": Strategy("the highest forecasts first", ("forecast",)),
    "half": Strategy("in turn the highest forecast and one drawn by softmax of the forecast", ("forecast",)),
    "coverage": Strategy(
        "next what protects most of the forecast forgetting that is left, each protection counting less than the last",
        ("forecast", "loadings"),
    ),
    "coverage-facility": Strategy(
        "next what gives most of the forecast forgetting a more similar replayed example", ("forecast", "loadings")
    ),
    "coverage-herding": Strategy(
        "next what brings the replayed examples closest to the softmax of the forecast, as a whole",
        ("forecast", "loadings"),
    ),
    "loss": Strategy("the base model's highest losses first", ("losses",)),
    "median-loss": Strategy("the losses closest to the base model's median first", ("losses",)),
    "gradient": Strategy(
        "first what the task's gradient at the base model, followed a little way, makes worst", ("gradients",)
    ),
    "mir": Strategy("during training: before each batch, of every few drawn at random, the one forgotten most"),
    "truth": Strategy("draw by softmax of measured forgetting: the upper bound of 'forecast'", ("truth",)),
}
"""All strategies by name."""

EFFECTIVE_SHARE = 0.25
"""Effective sample size that the default temperature aims at, as a share of the examples that may be replayed.

The paper's fixed temperature of 0.1 leaves about 1 % on real rows: a few outliers are then all that is replayed."""


class Selection(NamedTuple):
    """What a strategy makes of the examples that may be replayed.

    Attributes
    ----------
    weights : array, shape (n,)
        Summing to one; zero for what is never replayed.
    order : array of int or None, shape (m,)
        Examples with a weight, in the order of their replay; None where they are drawn by weight.
    ranked_share : float
        Share of what is replayed that follows `order`; the rest is drawn by weight.
    """

    weights: np.ndarray
    order: np.ndarray | None = None
    ranked_share: float = 1.0


def select(strategy: str, n: int, known: Mapping[str, np.ndarray], temperature: float | None = None) -> Selection:
    """Apply a strategy to n examples.

    Parameters
    ----------
    strategy : str
        One of `STRATEGIES`.
    n : int
    known : mapping of name to array, shape (n,) or (n, r) for 'loadings'
        What the strategy needs. NaN in 'truth', 'losses' and 'gradients' is "not measured", and is never replayed.
    temperature : float, optional
        Of the softmax; as in `softmax_weights`.

    Raises
    ------
    DataError
        If nothing was measured.
    """
    weights = np.zeros(n)
    if strategy in ("none", "padding"):
        return Selection(weights)
    by = next((known[name] for name in ("forecast", "truth", "losses", "gradients") if name in known), np.zeros(n))
    measured = np.flatnonzero(~np.isnan(by))
    if not len(measured):
        raise DataError(f"the strategy {strategy!r} has nothing to go by: no example that may be replayed was measured")
    by = by[measured]
    weights[measured] = 1 / len(measured)
    order: np.ndarray | None = None
    if strategy in ("forecast", "half", "truth", "coverage-herding"):
        weights[measured] = softmax_weights(by, temperature)
    elif strategy == "ranked":
        weights[measured] = softmax_weights(normal_scores(by), temperature)
    if strategy in ("top", "half", "loss", "gradient"):
        order = np.argsort(-by, kind="stable")
    elif strategy == "median-loss":
        order = np.argsort(np.abs(by - np.median(by)), kind="stable")
    elif strategy == "coverage-herding":
        return Selection(np.full(n, 1 / n), herding(known["loadings"], weights))
    elif strategy in ("coverage", "coverage-facility"):
        order = coverage(known["loadings"], by, Diminishing if strategy == "coverage" else Facility)
    if order is None:
        return Selection(weights)
    order = measured[order]
    # A low temperature leaves some without any weight: they are not replayed by rank either.
    return Selection(weights, order[weights[order] > 0], 0.5 if strategy == "half" else 1.0)


def softmax_weights(forecast: np.ndarray, temperature: float | None = None) -> np.ndarray:
    """Softmax of forecast / temperature, shape (n,), summing to one.

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
    """Standard normal quantiles of the ranks, shape (n,): the same order, but no value is far from the others.

    Equal values share their mean rank; the k-th smallest of n is at the level (k - 1/2) / n.
    """
    ranks = scipy.stats.rankdata(values)
    return np.asarray(scipy.special.ndtri((ranks - 0.5) / len(values)))


def in_turn(first: np.ndarray, second: np.ndarray, share: float) -> np.ndarray:
    """Merge two orders of the same examples, each passing over what was taken already.

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


def by_stratum(order: np.ndarray, strata: Sequence[str]) -> np.ndarray:
    """Rearrange an order so that every prefix has each stratum in its share of the whole, shape (n,).

    The k first are shared out by Webster's method: the j-th of a stratum of n comes at the time (j - 1/2) / n. Within a
    stratum the order is kept.

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
