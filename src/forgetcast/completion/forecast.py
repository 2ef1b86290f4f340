"""The forecast of one task by example id, and its file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, Field, FiniteFloat

from forgetcast.atlas.matrix import ForgettingMatrix, check_fingerprint
from forgetcast.atlas.store import Atlas, Measure
from forgetcast.completion import Forecast
from forgetcast.completion.base import MISFIT_THRESHOLD
from forgetcast.completion.whole import LEAST_AUDIT, Above, Interval, MeanOf, Statistic, Tail
from forgetcast.data.pool import Pool
from forgetcast.errors import DataError, MismatchError
from forgetcast.files import read_table, write_table
from forgetcast.measure.scores import Scores, flips, forgetting
from forgetcast.results import validated
from forgetcast.stats import supports_part

_NUMBERS = ("mean", "std", "lower", "upper")
_COLUMNS = (*_NUMBERS, "probed")

THRESHOLD = 0.1
"""Forgetting in nats per token above which examples are counted, by default."""

MOST_SOURCES = 20
"""Sources, the largest, that get figures of their own."""

MODEL_BASED: Literal["model-based"] = "model-based"
GUARANTEED: Literal["guaranteed"] = "guaranteed"
"""Kinds of intervals; see `completion.whole`."""

UNITS: dict[Measure, str] = {"loss": "nats per token", "exact_match": "probability of being answered wrong"}
"""Unit of a forecast by its measure."""


Figure = Literal["mean", "worst_tenth", "share_above"]


class WholeFigure(BaseModel, frozen=True):
    """A figure of all examples or of those of a source, with its interval.

    Attributes
    ----------
    figure : 'mean', 'worst_tenth' or 'share_above'
        The last is the share of the examples above the forecast's threshold; the others are nats per token.
    source : str or None
        None: all examples.
    examples : int
        That the figure is of.
    kind : 'model-based' or 'guaranteed'
    value, lower, upper : float
    """

    figure: Figure
    source: str | None
    examples: int = Field(ge=1)
    kind: Literal["model-based", "guaranteed"]
    value: FiniteFloat
    lower: FiniteFloat
    upper: FiniteFloat


class _Metadata(BaseModel):
    """Metadata of the file."""

    level: float
    misfit: float = Field(ge=0, le=1)
    method: str
    pool: str = Field(min_length=1)
    task: str | None
    # Files of earlier versions have none of these.
    different_tokens: int | None = Field(default=None, ge=0)
    audit: int = Field(default=0, ge=0)
    threshold: FiniteFloat = THRESHOLD
    whole: tuple[WholeFigure, ...] = ()
    rows: int | None = Field(default=None, ge=0)
    prior_rows: int | None = Field(default=None, ge=0)
    calibration_tasks: int | None = Field(default=None, ge=0)
    measure: Measure = "loss"


_ATTRIBUTES = {"pool": "pool_fingerprint"}
"""Attributes of a `TaskForecast` that have other names than in the metadata."""


@dataclass(frozen=True)
class TaskForecast:
    """Forecast forgetting of every example of a pool for one task.

    Attributes
    ----------
    ids : sequence of str, length N
    mean, std, lower, upper : array, shape (N,)
        Nats per token, or probabilities by `measure`; lower and upper bound the interval at `level`.
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
    audit : int
        Number of probes that were drawn at random.
    threshold : float
        Of the figure 'share_above', nats per token.
    whole : tuple of WholeFigure
        All examples, then the largest sources; of each, the figures with a model-based interval, and with a guaranteed
        one where at least five random probes are among the examples. Of fewer than ten there is no worst tenth.
    rows, prior_rows : int or None
        How many rows it was learned from, and how many of them were measured on another version of the base model; None
        if that is unknown.
    calibration_tasks : int or None
        Left-out tasks that the model-based intervals of the whole are calibrated on; None if that is unknown.
    measure : 'loss' or 'exact_match'
        The second forecasts the probability that a right answer became wrong, only for examples that the base model
        answers right.
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
    audit: int = 0
    threshold: float = THRESHOLD
    whole: tuple[WholeFigure, ...] = ()
    rows: int | None = None
    prior_rows: int | None = None
    calibration_tasks: int | None = None
    measure: Measure = "loss"

    @classmethod
    def from_forecast(
        cls,
        forecast: Forecast,
        pool: Pool | Atlas | ForgettingMatrix,
        *,
        method: str,
        task: str | None = None,
        level: float = 0.9,
        threshold: float = THRESHOLD,
        measure: Measure = "loss",
    ) -> TaskForecast:
        """Make a task forecast from a completed row and the pool, atlas or matrix that it is of.

        By exact match, means and intervals are cut to [0, 1]: no probability lies outside, so that an interval covers
        as often as before. Of the whole, only means are kept: the share of flips is the mean, and the worst tenth of
        zeros and ones follows from it.

        Raises
        ------
        DataError
            If a number is invalid (see `check`), or a matrix does not say which pool it is of.
        """
        ids, fingerprint = (
            (pool.ids, pool.fingerprint) if isinstance(pool, Pool) else (pool.examples, pool.pool_fingerprint)
        )
        if fingerprint is None:
            raise DataError("the matrix does not say which pool it is of, so that its forecast cannot be stored")
        mean, (lower, upper) = forecast.mean, forecast.interval(level)
        statistics: dict[Figure, Statistic] = {"mean": MeanOf()}
        if measure == "loss":
            statistics |= {"worst_tenth": Tail(), "share_above": Above(threshold)}
        whole = tuple(_figures(forecast, pool.sources or (), level, statistics))
        if measure == "exact_match":
            mean, lower, upper = (np.clip(each, 0, 1) for each in (mean, lower, upper))
            whole = tuple(each.model_copy(update=_cut(each)) for each in whole)
        probed = np.zeros(len(ids), dtype=bool)
        probed[forecast.probes] = True
        misfit = float(forecast.misfit)
        made = cls(
            ids,
            *(mean, forecast.std, lower, upper, probed, level, misfit, method, fingerprint, task),
            audit=forecast.audit,
            threshold=threshold,
            whole=whole,
            calibration_tasks=forecast.wholes[0].left_out.count if forecast.wholes else None,
            measure=measure,
        )
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
            negative, an interval is upside down, the level is not between 0 and 1, or a probability is not in [0, 1].
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
            (self._outside(), "a probability outside [0, 1]"),
        ):
            if wrong.any():
                raise DataError(f"the forecast of {self.ids[int(np.argmax(wrong))]!r} has {what}")

    def _outside(self) -> np.ndarray:
        """Mask of the examples with a probability outside [0, 1], shape (N,)."""
        if self.measure == "loss":
            return np.zeros(len(self.ids), dtype=bool)
        numbers = np.stack([self.mean, self.lower, self.upper])
        return np.asarray(((numbers < 0) | (numbers > 1)).any(axis=0))

    @property
    def unit(self) -> str:
        """Unit of the forecast."""
        return UNITS[self.measure]

    def likeness(self) -> str:
        """Say whether the probes show the task to be unlike the atlas, and what helps then: `benchmarks/unlike.py`."""
        probes = len(self.probes)
        if not probes:
            return "No probe was measured for this task: this is the forecast for any new task."
        if self.misfit >= MISFIT_THRESHOLD:
            return (
                f"The {probes} probes give no evidence that this task is unlike those in the atlas "
                f"(p = {self.misfit:.2f})."
            )
        return (
            f"The {probes} probes suggest that this task is unlike those in the atlas (p = {self.misfit:.3f}): trust "
            "the forecast less, and measure more probes. On 32 such tasks, 30 instead of 10 lowered the error by 7 %, "
            "and 60 instead of 30 by 3 %; a method chosen on left-out tasks (auto) did not lower it. Guaranteed "
            "intervals hold for any task."
        )

    def figure(self, figure: str, kind: str = MODEL_BASED, source: str | None = None) -> WholeFigure | None:
        """Return a figure of all examples or of a source; None if there is none of this kind."""
        wanted = (figure, kind, source)
        return next((each for each in self.whole if (each.figure, each.kind, each.source) == wanted), None)

    def check_pool(self, pool: Pool) -> None:
        """Raise MismatchError if the forecast is of a pool with another fingerprint."""
        check_fingerprint("the forecast", self.pool_fingerprint, pool)

    def save(self, path: str | Path) -> None:
        """Write a Parquet file with the columns id, mean, std, lower, upper and probed."""
        import pyarrow as pa

        table = pa.table({"id": pa.array(self.ids, pa.string()), **{name: getattr(self, name) for name in _COLUMNS}})
        fields = {name: getattr(self, _ATTRIBUTES.get(name, name)) for name in _Metadata.model_fields}
        metadata = fields | {"whole": [each.model_dump() for each in self.whole]}
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
                **{_ATTRIBUTES.get(name, name): getattr(metadata, name) for name in _Metadata.model_fields},
            )
            loaded.check()
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        return loaded


def _cut(figure: WholeFigure) -> dict[str, float]:
    """Cut a figure of probabilities, and its interval, to [0, 1]."""
    return {name: min(max(getattr(figure, name), 0.0), 1.0) for name in ("value", "lower", "upper")}


def _figures(
    forecast: Forecast, sources: Sequence[str], level: float, statistics: Mapping[Figure, Statistic]
) -> Iterator[WholeFigure]:
    """Compute the figures of a single completed row: of all examples, and of the largest sources if there are two."""
    if not forecast.wholes:
        return
    whole = forecast.wholes[0]
    columns = np.arange(whole.size) if whole.population is None else whole.population
    named, codes, counts = np.unique(
        np.asarray(sources, dtype=object)[columns], return_inverse=True, return_counts=True
    )
    largest = np.argsort(-counts, kind="stable")[: MOST_SOURCES if len(named) > 1 else 0]
    parts: list[tuple[str | None, np.ndarray]] = [(None, columns)]
    parts += [(str(named[i]), columns[codes == i]) for i in largest]
    drawn = whole.probes[len(whole.probes) - whole.audit :]
    for source, among in parts:
        least = 2 if source is None else LEAST_AUDIT
        random = int(np.isin(drawn, among).sum())
        supported = {
            figure: statistic
            for figure, statistic in statistics.items()
            if figure != "worst_tenth" or supports_part(len(among), 10)
        }
        computed = list(supported.values())
        kinds: list[tuple[Literal["model-based", "guaranteed"], list[Interval]]] = [
            (MODEL_BASED, whole.model_based(computed, level, among=among))
        ]
        if random >= least:
            kinds.append((GUARANTEED, whole.guaranteed(computed, level, among=among)))
        for kind, intervals in kinds:
            for figure, (value, lower, upper) in zip(supported, intervals, strict=True):
                ends = {"value": value, "lower": lower, "upper": upper}
                yield WholeFigure(figure=figure, source=source, examples=len(among), kind=kind, **ends)


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


def answered_probes(
    atlas: Atlas, matrix: ForgettingMatrix, scores: Scores, *, allow_different_tokens: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return the probes' columns in a matrix of flips, and 1 where the answer became wrong, 0 elsewhere, shape (k,).

    Raises
    ------
    MismatchError
        If an example is not in the atlas, or differs in its text or tokens.
    DataError
        If the base model did not answer a probe right, or the scores have no answer to one.
    """
    atlas.columns_of(scores, allow_different_tokens=allow_different_tokens)
    known = {id_: column for column, id_ in enumerate(matrix.examples)}
    for id_ in scores.ids:
        if id_ not in known:
            raise DataError(f"the base model did not answer the probe {id_!r} right; choose with probes --exact-match")
    measured = flips(atlas.baseline, scores)
    if np.isnan(measured).any():
        bad = scores.ids[int(np.argmax(np.isnan(measured)))]
        raise DataError(f"the probe {bad!r} has no answer: score the probes with forgetcast score --exact-match")
    return np.array([known[id_] for id_ in scores.ids], dtype=np.intp), measured
