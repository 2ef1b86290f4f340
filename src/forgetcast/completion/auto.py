"""Let the atlas choose the method."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forgetcast.completion.additive import Additive
from forgetcast.completion.base import Completion, State, left_out
from forgetcast.completion.bayesian import Bayesian
from forgetcast.completion.factorisation import MatrixFactorization
from forgetcast.completion.logistic import LogisticMF
from forgetcast.completion.neighbours import KNN
from forgetcast.errors import ConfigError


class Auto(Completion):
    """Use the method that forecasts left-out tasks of this atlas best, by mean squared error from ten random probes.

    Candidates are `Bayesian`, `Additive`, `KNN` and `MatrixFactorization`; for an atlas of zeros and ones, `LogisticMF`
    too. With fewer than four tasks there is nothing to choose by, and the first candidate is used.

    Parameters
    ----------
    candidates : sequence of Completion, optional

    Attributes
    ----------
    chosen_ : Completion
    errors_ : dict of str to float
        Root mean squared error of each candidate on the left-out tasks, nats per token.

    Examples
    --------
    >>> import numpy as np
    >>> from forgetcast.completion import Auto
    >>> atlas = np.outer(np.arange(1.0, 9.0), np.linspace(-1, 1, 40) ** 3)
    >>> type(Auto().fit(atlas).chosen_).__name__
    'Bayesian'
    """

    chosen_: Completion
    errors_: dict[str, float]

    def __init__(self, *, candidates: Sequence[Completion] | None = None) -> None:
        self.candidates = candidates

    def _prepare(self, values: np.ndarray) -> None:
        candidates: list[Completion] = list(self.candidates or ())
        if self.candidates is None:
            candidates = [Bayesian(), Additive(), KNN(), MatrixFactorization()]
            if np.isin(values[~np.isnan(values)], (0.0, 1.0)).all():
                candidates.append(LogisticMF())
        if not candidates:
            raise ConfigError("Auto needs at least one candidate")
        parts = list(left_out(values))
        self.errors_ = {}
        for candidate in candidates:
            candidate._prepare(values)
            squares = []
            for rest, rows, probes in parts:
                mean, _, _ = candidate._estimate(rest).posterior(probes, rows[:, probes])
                squares.extend(np.mean(np.delete(rows - mean, probes, axis=1) ** 2, axis=1))
            self.errors_[type(candidate).__name__] = float(np.sqrt(np.mean(squares))) if squares else float("nan")
        errors = list(self.errors_.values())
        self.chosen_ = candidates[int(np.argmin(errors))] if parts else candidates[0]

    def _estimate(self, values: np.ndarray) -> State:
        return self.chosen_._estimate(values)
