"""Choose the method on left-out tasks of the atlas."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from forgetcast.completion.additive import Additive
from forgetcast.completion.base import (
    MISFIT_THRESHOLD,
    SIMILAR_SHARE,
    Completion,
    Forecast,
    State,
    clone,
    leave_tasks_out,
)
from forgetcast.completion.bayesian import Bayesian
from forgetcast.completion.factorisation import MatrixFactorization
from forgetcast.completion.logistic import LogisticMF, is_binary
from forgetcast.completion.neighbours import KNN
from forgetcast.errors import ConfigError


class Auto(Completion):
    """Use the method that forecasts left-out tasks of this atlas best, by mean squared error from ten random probes.

    Candidates are `Bayesian`, `Additive`, `KNN` and `MatrixFactorization`; for a binary atlas, also `LogisticMF`. They
    are compared twice: on tasks that are left out alone, and on tasks that are left out together with the most similar
    third of the others. A new task that is unlike the atlas (misfit below 0.05) is forecast by the second winner. With
    fewer than four tasks the first candidate is used, because no comparison is possible.

    On the five left-out families of `benchmarks/unlike.py` it forecast every task as `Bayesian` does.

    Parameters
    ----------
    candidates : sequence of Completion, optional

    Attributes
    ----------
    chosen_, fallback_ : Completion
        The winners for tasks like those of the atlas, and for others.
    errors_, errors_unlike_ : dict of str to float
        Root mean squared error of each candidate in the two comparisons, nats per token. The key is the name of its
        class, or its repr where several are of one class.

    Examples
    --------
    >>> import numpy as np
    >>> from forgetcast.completion import Auto
    >>> rng = np.random.default_rng(0)
    >>> atlas = rng.normal(size=(30, 2)) @ rng.normal(size=(2, 60)) + rng.normal(0, 0.3, (30, 60))
    >>> type(Auto().fit(atlas).chosen_).__name__
    'Bayesian'
    """

    chosen_: Completion
    fallback_: Completion
    errors_: dict[str, float]
    errors_unlike_: dict[str, float]

    def __init__(self, *, candidates: Sequence[Completion] | None = None) -> None:
        self.candidates = candidates

    def prepare(self, values: np.ndarray) -> None:
        """Prepare the candidates and compare them on left-out tasks."""
        candidates: list[Completion] = [clone(candidate) for candidate in self.candidates or ()]
        if self.candidates is None:
            candidates = [Bayesian(), Additive(), KNN(), MatrixFactorization()]
            if is_binary(values):
                candidates.append(LogisticMF())
        if not candidates:
            raise ConfigError("Auto needs at least one candidate")
        for candidate in candidates:
            candidate._groups = self._groups
            candidate.prepare(values)
        self.chosen_, self.errors_ = _best(candidates, list(leave_tasks_out(values, self._groups)))
        unlike = list(leave_tasks_out(values, self._groups, similar=SIMILAR_SHARE))
        self.fallback_, self.errors_unlike_ = _best(candidates, unlike)

    def estimate(self, values: np.ndarray) -> State:
        """Estimate with the chosen method."""
        return self.chosen_.estimate(values)

    def fit(self, matrix: Any) -> Auto:
        """Choose, and learn; see `Completion.fit`."""
        super().fit(matrix)
        if self.fallback_ is not self.chosen_:
            self.fallback_.fit(matrix)
        return self

    def predict(
        self, probes: Any, observed: Any, *, audit: int = 0, weights: Any = None, population: Any = None
    ) -> Forecast:
        """Complete new rows, each by the winner for its misfit; see `Completion.predict`."""
        forecast = super().predict(probes, observed, audit=audit, weights=weights, population=population)
        unlike = np.asarray(forecast.misfit) < MISFIT_THRESHOLD
        if self.fallback_ is self.chosen_ or not unlike.any():
            return forecast
        other = self.fallback_.predict(probes, observed, audit=audit, weights=weights, population=population)
        if unlike.ndim == 0:
            return replace(other, misfit=forecast.misfit)
        mean, std, widths = (
            np.where(unlike[:, None], getattr(other, name), getattr(forecast, name))
            for name in ("mean", "std", "widths")
        )
        pairs = zip(unlike.tolist(), other.wholes, forecast.wholes, strict=True)
        wholes = tuple(second if odd else first for odd, second, first in pairs)
        return Forecast(mean, std, forecast.probes, forecast.misfit, widths, audit, wholes)


def _best(
    candidates: Sequence[Completion], splits: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]
) -> tuple[Completion, dict[str, float]]:
    """Return the candidate with the smallest error, and all errors; the first, and NaN, where there is no split."""
    names = [type(candidate).__name__ for candidate in candidates]
    names = [repr(c) if names.count(name) > 1 else name for c, name in zip(candidates, names, strict=True)]
    errors: list[float] = []
    for candidate in candidates:
        squares: list[float] = []
        for rest, rows, probes in splits:
            mean, _, _ = candidate.estimate(rest).posterior(probes, rows[:, probes])
            squares.extend(np.mean(np.delete(rows - mean, probes, axis=1) ** 2, axis=1))
        errors.append(float(np.sqrt(np.mean(squares))) if squares else float("nan"))
    return candidates[int(np.argmin(errors))], dict(zip(names, errors, strict=True))
