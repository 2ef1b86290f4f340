"""Weights of the classes of tasks: those whose averaged forecast is best on left-out tasks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import scipy

from forgetcast.atlas.rows import StoredMatrix
from forgetcast.completion.base import SIMILAR_SHARE, leave_tasks_out
from forgetcast.completion.gaussian import CLASSES

if TYPE_CHECKING:
    from forgetcast.completion.gaussian import LinearGaussian

PROBES = (10, 30)
"""Numbers of random probes that left-out tasks are forecast from."""

PENALTY = np.array([2.0, *(0.2 for _ in range(CLASSES))])
"""Of the squared logarithms of the power and of the weights, as a share of the loss of one left-out task: few tasks
leave the weights near equal, and the power near one."""


MOST_SPLITS = 20
"""So many splits of each kind are looked at."""


class LeftOut(NamedTuple):
    """Forecasts of a left-out task by each class.

    Attributes
    ----------
    evidence : array, shape (CLASSES,)
        Log-likelihood of the probes.
    products : array, shape (CLASSES, CLASSES)
        Mean products of the errors of each two classes, over the examples that were not probed.
    weight : float
        Of the task in the loss.
    """

    evidence: np.ndarray
    products: np.ndarray
    weight: float


def left_out_errors(model: LinearGaussian, values: np.ndarray | StoredMatrix) -> Iterator[LeftOut]:
    """Forecast each left-out task by each class: tasks left out alone, and with those that resemble them.

    Both kinds of leaving out have the same total weight, however many tasks they are of.
    """
    rng = np.random.default_rng(0)
    for similar in (0.0, SIMILAR_SHARE):
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for rest, rows, _ in islice(leave_tasks_out(values, model._groups, similar=similar), MOST_SPLITS):
            state = model.estimate(rest)
            for count in PROBES:
                probes = rng.permutation(rows.shape[1])[: min(count, rows.shape[1] // 2)]
                judged = np.delete(np.arange(rows.shape[1]), probes)
                conditioned = state.condition(probes, rows[:, probes])
                errors = conditioned.means @ state.loadings[judged].T + (state.mean - rows)[:, judged]
                products = np.einsum("hbn,gbn->bhg", errors, errors, optimize=True) / len(judged)
                found.extend(zip(conditioned.evidence.T, products, strict=True))
        yield from (LeftOut(*each, 1 / len(found)) for each in found)


def stack(left_out: Iterable[LeftOut]) -> tuple[np.ndarray, float]:
    """Choose the classes' log-weights and the power of the evidence that minimise the error on left-out tasks.

    The loss of a task is its mean squared error relative to the root of the product of its classes' average and of the
    average over all tasks: between errors in nats, which few tasks rule, and relative ones, which ignore how much is
    forgotten.

    Returns
    -------
    log_weights : array, shape (CLASSES,)
    power : float
        Zeros and one where there is no left-out task.
    """
    tasks = list(left_out)
    if not tasks:
        return np.zeros(CLASSES), 1.0
    evidence = np.array([task.evidence for task in tasks])
    products = np.array([task.products for task in tasks])
    typical = np.trace(products, axis1=1, axis2=2) / CLASSES
    if not typical.mean() > 0:
        return np.zeros(CLASSES), 1.0
    weights = np.array([task.weight for task in tasks]) / np.sqrt(np.maximum(typical, 1e-12) * typical.mean())
    weights /= sum(task.weight for task in tasks)
    penalty = PENALTY / len(tasks)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        power = np.exp(parameters[0])
        logits = power * evidence + parameters[1:]
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        along = np.einsum("dhg,dg->dh", products, shares)
        squared = np.einsum("dh,dh->d", along, shares)
        slope = 2 * shares * (along - squared[:, None]) * weights[:, None]
        gradient = np.concatenate([[power * (slope * evidence).sum()], slope.sum(axis=0)])
        return (
            float(weights @ squared + penalty @ parameters**2),
            gradient + 2 * penalty * parameters,
        )

    best = scipy.optimize.minimize(loss, np.zeros(1 + CLASSES), jac=True, method="L-BFGS-B").x
    return best[1:], float(np.exp(best[0]))
