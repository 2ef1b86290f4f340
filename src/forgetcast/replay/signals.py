"""Signals: what is known of the examples of a pool, checked once, for the strategies to use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from forgetcast.errors import DataError, MismatchError

if TYPE_CHECKING:
    from forgetcast.atlas.store import Atlas

MAY_BE_MISSING = frozenset({"losses", "truth", "gradients"})
"""Signals that may be NaN where they were not measured. Such an example is never replayed."""

FROM_ATLAS = frozenset({"losses", "forecast", "loadings"})
"""Signals that an atlas gives, without any measurement of the new task."""


class Signals:
    """What is known of N examples. Each signal has one value per example, `loadings` one row.

    Parameters
    ----------
    ids : sequence of str, length N
        The examples, in the pool's order.
    losses : array-like, shape (N,), optional
        Losses of the base model, nats per token.
    forecast : array-like, shape (N,), optional
        Expected forgetting, nats per token.
    truth : array-like, shape (N,), optional
        Measured forgetting, nats per token.
    gradients : array-like, shape (N,), optional
        First-order loss increase along the task's gradient: `lm.gradient_products`.
    loadings : array-like, shape (N, r), optional
        Rows whose products are correlations of forgetting: `coverage.correlation_loadings`.

    Raises
    ------
    MismatchError
        If a signal has another shape.
    """

    def __init__(
        self,
        ids: Sequence[str],
        *,
        losses: ArrayLike | None = None,
        forecast: ArrayLike | None = None,
        truth: ArrayLike | None = None,
        gradients: ArrayLike | None = None,
        loadings: ArrayLike | None = None,
    ) -> None:
        given = {"losses": losses, "forecast": forecast, "truth": truth, "gradients": gradients, "loadings": loadings}
        self.ids = ids
        self._arrays = {name: np.asarray(v, dtype=np.float64) for name, v in given.items() if v is not None}
        for name, array in self._arrays.items():
            if array.shape[:1] != (len(ids),) or array.ndim != (2 if name == "loadings" else 1):
                raise MismatchError(f"the {name} has shape {array.shape}; the pool has {len(ids)} examples")

    @classmethod
    def from_atlas(
        cls,
        atlas: Atlas,
        *,
        needs: Iterable[str] = FROM_ATLAS,
        forecast: ArrayLike | None = None,
        truth: ArrayLike | None = None,
        gradients: ArrayLike | None = None,
    ) -> Self:
        """Take losses, forecast and loadings from an atlas.

        Parameters
        ----------
        atlas : Atlas
        needs : iterable of str
            Signals that are wanted. `Bayesian` is fitted to the atlas only if one of them takes it.
        forecast : array-like, shape (N,), optional
            Default: what the atlas expects of any task.
        truth, gradients : array-like, shape (N,), optional
            An atlas cannot give these.
        """
        from forgetcast.completion import Bayesian
        from forgetcast.replay.coverage import correlation_loadings

        wanted, loadings = set(needs), None
        if "loadings" in wanted or ("forecast" in wanted and forecast is None):
            model = Bayesian().fit(atlas.matrix())
            loadings = correlation_loadings(model) if "loadings" in wanted else None
            forecast = model.predict([], []).mean if forecast is None else forecast
        return cls(
            atlas.examples,
            losses=atlas.nll_before,
            forecast=forecast,
            truth=truth,
            gradients=gradients,
            loadings=loadings,
        )

    @property
    def names(self) -> frozenset[str]:
        """Names of the signals that are given."""
        return frozenset(self._arrays)

    @property
    def losses(self) -> NDArray[np.float64]:
        """Losses of the base model, shape (N,), nats per token."""
        return self["losses"]

    @property
    def forecast(self) -> NDArray[np.float64]:
        """Expected forgetting, shape (N,), nats per token."""
        return self["forecast"]

    @property
    def truth(self) -> NDArray[np.float64]:
        """Measured forgetting, shape (N,), nats per token."""
        return self["truth"]

    @property
    def gradients(self) -> NDArray[np.float64]:
        """First-order loss increase along the task's gradient, shape (N,)."""
        return self["gradients"]

    @property
    def loadings(self) -> NDArray[np.float64]:
        """Correlation loadings, shape (N, r)."""
        return self["loadings"]

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        """Return a signal by its name; DataError if it is not given."""
        if name not in self._arrays:
            raise DataError(f"the signal {name!r} is missing; there are {', '.join(sorted(self._arrays)) or 'none'}")
        return self._arrays[name]

    def __len__(self) -> int:
        """Count the examples."""
        return len(self.ids)

    def __repr__(self) -> str:
        """Return the size and the names of the signals."""
        return f"Signals({len(self)} examples, {', '.join(sorted(self._arrays)) or 'no signals'})"

    def restrict(self, rows: NDArray[np.intp], needs: Iterable[str] = ()) -> tuple[Signals, NDArray[np.intp]]:
        """Keep the signals in `needs`, of the examples in `rows` for which all of them are observed.

        Returns
        -------
        Signals
            Of n examples.
        rows : array of int, shape (n,)

        Raises
        ------
        DataError
            If a needed signal is missing, or not finite where it must be.
        """
        wanted = tuple(needs)
        observed = np.ones(len(rows), dtype=bool)
        for name in wanted:
            values = self[name][rows]
            bad = ~np.isfinite(values)
            if name in MAY_BE_MISSING:
                observed &= ~np.isnan(values)
                bad &= ~np.isnan(values)
            if bad.any():
                first = self.ids[int(rows[int(np.argmax(bad.reshape(len(rows), -1).any(axis=1)))])]
                raise DataError(f"the {name} of {first!r} is not a finite number")
        rows = rows[observed]
        kept: dict[str, Any] = {name: self[name][rows] for name in wanted}
        return Signals([self.ids[i] for i in rows.tolist()], **kept), rows
