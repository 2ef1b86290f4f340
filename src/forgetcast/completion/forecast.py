"""The forecast of one task by example id, and its file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, Field

from forgetcast.atlas.matrix import check_fingerprint
from forgetcast.atlas.store import Atlas
from forgetcast.completion import Forecast
from forgetcast.data.pool import Pool
from forgetcast.errors import DataError, MismatchError
from forgetcast.files import read_table, write_table
from forgetcast.measure.scores import Scores, forgetting
from forgetcast.results import validated

_NUMBERS = ("mean", "std", "lower", "upper")
_COLUMNS = (*_NUMBERS, "probed")


class _Metadata(BaseModel):
    """Metadata of the file."""

    level: float
    misfit: float = Field(ge=0, le=1)
    method: str
    pool: str = Field(min_length=1)
    task: str | None
    different_tokens: int | None = Field(default=None, ge=0)  # files of earlier versions have none
    rows: int | None = Field(default=None, ge=0)
    prior_rows: int | None = Field(default=None, ge=0)


@dataclass(frozen=True)
class TaskForecast:
    """Forecast forgetting of every example of a pool for one task.

    Attributes
    ----------
    ids : sequence of str, length N
    mean, std, lower, upper : array, shape (N,)
        Nats per token; lower and upper bound the interval at `level`.
    probed : array of bool, shape (N,)
        Mask of the probes, where the forecast is the measurement.
    level : float
    misfit : float
        p-value of "the task is like those in the atlas".
    method : str
        Name of the completion method.
    pool_fingerprint : str
    task : str or None
    different_tokens : int or None
        Number of probes that were measured on other tokens than the base model was; None if that is unknown.
    rows, prior_rows : int or None
        How many rows it was learned from, and how many of them were measured on another version of the base model; None
        if that is unknown.
    """

    ids: Sequence[str]
    mean: np.ndarray
    std: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    probed: np.ndarray
    level: float
    misfit: float
    method: str
    pool_fingerprint: str
    task: str | None = None
    different_tokens: int | None = None
    rows: int | None = None
    prior_rows: int | None = None

    @classmethod
    def from_forecast(
        cls, forecast: Forecast, pool: Pool | Atlas, *, method: str, task: str | None = None, level: float = 0.9
    ) -> TaskForecast:
        """Make a task forecast from a completed row and the pool or atlas that it is of."""
        ids, fingerprint = (
            (pool.ids, pool.fingerprint) if isinstance(pool, Pool) else (pool.examples, pool.pool_fingerprint)
        )
        lower, upper = forecast.interval(level)
        probed = np.zeros(len(ids), dtype=bool)
        probed[forecast.probes] = True
        misfit = float(forecast.misfit)
        made = cls(ids, forecast.mean, forecast.std, lower, upper, probed, level, misfit, method, fingerprint, task)
        made.check()
        return made

    def __repr__(self) -> str:
        """Task, size, number of probes and mean forecast."""
        return (
            f"TaskForecast(task {self.task!r}, {len(self.ids)} examples, {int(self.probed.sum())} probes, "
            f"mean {self.mean.mean():.2f})"
        )

    @property
    def probes(self) -> tuple[str, ...]:
        """Ids of the probes."""
        return tuple(id_ for id_, probed in zip(self.ids, self.probed, strict=True) if probed)

    def check(self) -> None:
        """Check the numbers.

        Raises
        ------
        DataError
            If lengths differ, a number is not finite or exceeds what the atlas's 32 bits hold, a standard deviation is
            negative, an interval is upside down, or the level is not between 0 and 1.
        """
        if any(len(getattr(self, name)) != len(self.ids) for name in _COLUMNS):
            raise DataError("a forecast needs every number for every id")
        if not 0 < self.level < 1:
            raise DataError(f"the level of a forecast's intervals must be between 0 and 1, not {self.level}")
        for name in _NUMBERS:
            if not (np.abs(getattr(self, name)) <= np.finfo(np.float32).max).all():
                raise DataError(f"a value of {name!r} is not a finite number, or too large for 32 bits")
        for wrong, what in (
            (np.asarray(self.std) < 0, "a negative standard deviation"),
            (np.asarray(self.lower) > self.upper, "an interval whose lower end is above its upper end"),
        ):
            if wrong.any():
                raise DataError(f"the forecast of {self.ids[int(np.argmax(wrong))]!r} has {what}")

    def check_pool(self, pool: Pool) -> None:
        """Raise MismatchError if the forecast is of a pool with another fingerprint."""
        check_fingerprint("the forecast", self.pool_fingerprint, pool)

    def save(self, path: str | Path) -> None:
        """Write a Parquet file with the columns id, mean, std, lower, upper and probed."""
        import pyarrow as pa

        table = pa.table({"id": pa.array(self.ids, pa.string()), **{name: getattr(self, name) for name in _COLUMNS}})
        metadata = {
            "level": self.level,
            "misfit": self.misfit,
            "method": self.method,
            "pool": self.pool_fingerprint,
            "task": self.task,
            "different_tokens": self.different_tokens,
            "rows": self.rows,
            "prior_rows": self.prior_rows,
        }
        write_table(table, Path(path), metadata)

    @classmethod
    def load(cls, path: str | Path) -> TaskForecast:
        """Read a file that `save` wrote.

        Raises
        ------
        DataError
            If the file is not a forecast; the message names what is missing or invalid.
        """
        columns = {"id": str, **dict.fromkeys(_NUMBERS, float), "probed": bool}
        table, content = read_table(Path(path), columns, kind="forecast")
        metadata = validated(_Metadata, content, f"{path} is not a forecast: its metadata")
        try:
            loaded = cls(
                ids=table.column("id").to_pylist(),
                **{name: table.column(name).to_numpy(zero_copy_only=False) for name in _COLUMNS},
                level=metadata.level,
                misfit=metadata.misfit,
                method=metadata.method,
                pool_fingerprint=metadata.pool,
                task=metadata.task,
                different_tokens=metadata.different_tokens,
                rows=metadata.rows,
                prior_rows=metadata.prior_rows,
            )
            loaded.check()
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        return loaded


def measured_probes(
    atlas: Atlas, scores: Scores, *, allow_different_tokens: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return the columns of the probes in a score file, and their forgetting, both of shape (k,).

    Raises
    ------
    MismatchError
        If an example is not in the atlas, differs in its text or tokens, or has no score of the base model.
    DataError
        If a probe has no score.
    """
    columns = atlas.columns_of(scores, allow_different_tokens=allow_different_tokens)
    for id_, value, reason in zip(scores.ids, scores.nll, scores.reasons, strict=True):
        if np.isnan(value):
            raise DataError(f"the probe {id_!r} has no score: {reason}")
    measured = forgetting(atlas.baseline, scores)
    if np.isnan(measured).any():
        bad = scores.ids[int(np.argmax(np.isnan(measured)))]
        raise MismatchError(f"the base model has no score for the probe {bad!r}")
    return columns, measured
