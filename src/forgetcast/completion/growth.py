"""How much of its forgetting a fine-tune has caused after a share of its steps, learned from an atlas's curves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from forgetcast.atlas.store import Atlas
from forgetcast.completion.base import CALIBRATION_FOLDS, calibration_columns
from forgetcast.completion.bayesian import Bayesian
from forgetcast.completion.whole import Interval, MeanOf, Widths

FEWEST = 4
"""Tasks with a curve, below which nothing is said of the end of another one."""

FLOOR = 0.25
"""Means this small, as a multiple of the tasks' root mean square, are as uncertain in nats as ones of this size."""


@dataclass(frozen=True)
class Growth:
    """The factor from the mean forgetting now to that at the end, with an interval from left-out tasks.

    Attributes
    ----------
    shares : array, shape (S,)
        Of the steps, ascending; the last is 1.
    factors : array, shape (S,)
    floors : array, shape (S,)
        Nats per token; see FLOOR.
    scales : array, shape (S,)
        Root mean square of the left-out tasks' errors, as a multiple of the size of the mean.
    widths : tuple of Widths, length S
        Half-widths of intervals, in these.
    tasks : int
        How many it was learned from.

    Notes
    -----
    The mean at the end is y = g x + e, where x is the mean now as the probes of a left-out task give it, so that e is
    of the growth and of the probes. The standard deviation of e is proportional to sqrt(x^2 + floor^2): a task that
    forgets twice as much is twice as uncertain. Between two shares, factor and width are interpolated.
    """

    shares: np.ndarray
    factors: np.ndarray
    floors: np.ndarray
    scales: np.ndarray
    widths: tuple[Widths, ...]
    tasks: int

    @classmethod
    def learn(cls, atlas: Atlas, k: int) -> Growth | None:
        """Learn it from the tasks of an atlas that have a curve, watched by k probes each.

        Returns
        -------
        Growth or None
            None where fewer than FEWEST tasks have a row and, at each share of the atlas, another one.
        """
        shares = atlas.shares
        views = [atlas.at(share) for share in shares]
        tasks = [task for task in atlas.tasks if all(task in view.tasks for view in views)]
        if not shares or len(tasks) < FEWEST:
            return None
        columns = calibration_columns(len(atlas.examples), np.random.default_rng(0))
        rows = [view.stored(tasks)[:, columns].astype(np.float64) for view in (*views, atlas)]
        complete = ~np.isnan(rows).any(axis=(0, 1))
        return cls.of_rows(np.array(shares), np.array([each[:, complete] for each in rows]), k)

    @classmethod
    def of_rows(cls, shares: np.ndarray, rows: np.ndarray, k: int) -> Growth | None:
        """Learn it from rows (S + 1, M, n) at S shares and at the end, without missing entries."""
        count, examples = rows.shape[1:]
        if count < FEWEST or examples < 2:
            return None
        truth = rows[-1].mean(axis=1)
        now = _watched(rows, min(k, examples // 2))
        factors, floors, scales, widths = [], [], [], []
        for x in now:
            floor = FLOOR * float(np.sqrt(np.mean(x**2))) or 1e-6
            size = np.sqrt(x**2 + floor**2)
            left_out = [_factor(np.delete(x, i), np.delete(truth, i), np.delete(size, i)) for i in range(count)]
            errors = (truth - np.array(left_out) * x) / size
            scale = float(np.sqrt(np.mean(errors**2))) or 1e-9
            factors.append(_factor(x, truth, size))
            floors.append(floor)
            scales.append(scale)
            widths.append(Widths.of({MeanOf().name: (errors / scale).tolist()}, count))
        return cls(np.append(shares, 1.0), np.array(factors), np.array(floors), np.array(scales), tuple(widths), count)

    def end(self, mean: float, progress: float, level: float) -> Interval | None:
        """Return the mean forgetting at the end and its interval, given the one after a share of the steps.

        None before the first share that is known.
        """
        if progress < self.shares[0]:
            return None
        halves = self.scales * np.array([widths.at(level, MeanOf()) for widths in self.widths])
        factor, floor, half = (
            float(np.interp(progress, self.shares, each)) for each in (self.factors, self.floors, halves)
        )
        half *= float(np.hypot(mean, floor))
        return factor * mean, factor * mean - half, factor * mean + half


def _factor(now: np.ndarray, end: np.ndarray, size: np.ndarray) -> float:
    """Fit end = factor * now by least squares, each task (M,) weighed by its size."""
    x, y = now / size, end / size
    return float((x @ y) / max(x @ x, 1e-12))


def _watched(rows: np.ndarray, k: int) -> np.ndarray:
    """Return the means (S + 1, M) of the tasks at each share as random probes give them, by a model of other tasks."""
    rng = np.random.default_rng(0)
    ends = rows[-1]
    count, examples = ends.shape
    means = np.empty((len(rows), count))
    model = Bayesian()
    model.prepare(ends)
    for fold in np.array_split(rng.permutation(count), min(count, CALIBRATION_FOLDS)):
        state = model.estimate(np.delete(ends, fold, axis=0))
        for task in fold:
            probes = rng.permutation(examples)[:k]
            mean, _, _ = state.posterior(probes, rows[:, task][:, probes])
            mean[:, probes] = rows[:, task][:, probes]
            means[:, task] = mean.mean(axis=1)
    return means
