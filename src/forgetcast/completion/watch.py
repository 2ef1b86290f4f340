"""A fine-tune watched while it runs: what its probes say of the whole pool at each look, and the series of looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

import numpy as np
import scipy  # submodules load lazily, so that starting is fast
from pydantic import BaseModel, Field, FiniteFloat

from forgetcast.atlas.store import Atlas
from forgetcast.completion.base import Forecast
from forgetcast.completion.bayesian import Bayesian
from forgetcast.completion.forecast import MOST_SOURCES
from forgetcast.completion.growth import Growth
from forgetcast.completion.probes import choose, weights
from forgetcast.completion.whole import LEAST_AUDIT
from forgetcast.data.pool import Pool
from forgetcast.defaults import CHOSEN_SHARE
from forgetcast.errors import ConfigError, DataError
from forgetcast.results import Result

LEVEL = 0.9
"""Level of all intervals."""

MEAN, WORST_TENTH, END = "mean", "worst_tenth", "end_of_run"
FIGURES = (MEAN, WORST_TENTH, END)
OTHERS = ("misfit", "share_of_time", "lower", "upper")
"""Further names that a source cannot have in a log."""


class Estimate(BaseModel, frozen=True):
    """A figure of forgetting, in nats per token, and its 90 % interval; None where there is none."""

    value: FiniteFloat
    lower: FiniteFloat | None = None
    upper: FiniteFloat | None = None


class Reading(BaseModel, frozen=True):
    """What was known of a fine-tune after some of its steps.

    Attributes
    ----------
    step : int
    progress : float
        Share of the steps that were made.
    figures : dict of str to Estimate
        'mean' and 'worst_tenth' of the pool now, and 'end_of_run', the mean that is forecast for the last step; those
        that are known. The intervals of the first two are guaranteed ones, from the random probes.
    sources : dict of str to Estimate
        Mean of the largest sources, with model-based intervals.
    misfit : float or None
        p-value of "the task is like those in the atlas"; None without an atlas, and before the first step.
    share_of_time : float
        Of the run's time so far, what was spent on the monitor.
    """

    step: int = Field(ge=0)
    progress: float = Field(ge=0, le=1)
    figures: dict[str, Estimate]
    sources: dict[str, Estimate] = {}
    misfit: float | None = Field(default=None, ge=0, le=1)
    share_of_time: float = Field(default=0.0, ge=0, le=1)

    def named(self) -> dict[str, float]:
        """Return all figures by the names that conditions and logs have for them, such as 'mean_lower'."""
        found: dict[str, float] = {}
        sources = {log_name(source): estimate for source, estimate in self.sources.items()}
        for name, estimate in {**self.figures, **sources}.items():
            found[name] = estimate.value
            if estimate.lower is not None and estimate.upper is not None:
                found |= {f"{name}_lower": estimate.lower, f"{name}_upper": estimate.upper}
        if self.misfit is not None:
            found["misfit"] = self.misfit
        return found


@dataclass(frozen=True)
class WatchedRun(Result):
    """The series of looks at a fine-tune.

    Attributes
    ----------
    name : str
        Of the task; empty if it has none.
    steps : int
        Of the whole run.
    atlas : str or None
        What the readings were completed from; None: they are of a random sample alone.
    pool : str
        Fingerprint of the pool, or of the sample.
    probes : tuple of str
        Ids of the measured examples.
    readings : tuple of Reading
        In the order of their steps.
    stopped : str or None
        The condition that ended the run early.
    """

    kind: ClassVar[str] = "watched run"

    name: str
    steps: int
    atlas: str | None
    pool: str
    probes: tuple[str, ...]
    readings: tuple[Reading, ...]
    stopped: str | None = None

    def as_dict(self) -> dict[str, object]:
        """Return plain numbers and strings, ready for JSON."""
        return super().as_dict() | {"readings": [reading.model_dump() for reading in self.readings]}


def log_name(source: str) -> str:
    """Return what the mean of a source is called in a log; other figures keep their names."""
    taken = {f"{figure}{end}" for figure in FIGURES for end in ("", "_lower", "_upper")} | set(OTHERS)
    return source if source and source not in taken else f"source_{source or 'none'}"


class Gauge(Protocol):
    """Turns what the probes lost into figures of a pool."""

    @property
    def examples(self) -> Pool:
        """The probes, in their order."""
        ...

    @property
    def names(self) -> frozenset[str]:
        """Names of figures and sources that its readings may have."""
        ...

    def without(self, ids: Sequence[str]) -> Pool:
        """Leave examples out that cannot be scored, and return the others."""
        ...

    def read(
        self, forgetting: np.ndarray, progress: float
    ) -> tuple[dict[str, Estimate], dict[str, Estimate], float | None]:
        """Return figures, sources and misfit after a share of the run, given the probes' forgetting, shape (k,)."""
        ...


class AtlasGauge:
    """Completes the forgetting of the probes to that of the pool of an atlas.

    Parameters
    ----------
    atlas : Atlas
        With at least two tasks.
    k : int
        Number of probes; a sixth of them are chosen, the others random.
    """

    def __init__(self, atlas: Atlas, k: int) -> None:
        self.atlas = atlas
        self._population = np.flatnonzero(~np.isnan(atlas.nll_before))
        self._k = min(k, len(self._population))
        if self._k < 2:
            raise ConfigError(f"{k} probes: at least two are needed")
        self.chosen = round(CHOSEN_SHARE * self._k)

    @cached_property
    def model(self) -> Bayesian:
        """The method, fitted when it is first needed."""
        return Bayesian().fit(self.atlas)

    @cached_property
    def _weights(self) -> np.ndarray:
        """What the random probes are drawn by, shape (N,)."""
        return weights(self.model)

    @cached_property
    def growth(self) -> Growth | None:
        """How the mean grows until the end of a fine-tune; None if the atlas has too few learning curves."""
        return Growth.learn(self.atlas, self._k)

    @cached_property
    def probes(self) -> np.ndarray:
        """Columns of the probes, shape (k,); the random ones last."""
        audit = self._k - self.chosen
        return choose(self.model, self._k, self._population, audit=audit, weights=self._weights)

    @property
    def examples(self) -> Pool:
        """The probes, in their order."""
        return self.atlas.subset(self.atlas.examples[i] for i in self.probes.tolist())

    def without(self, ids: Sequence[str]) -> Pool:
        """Raise DataError: the base model could score all probes of an atlas."""
        raise DataError(f"the probe {ids[0]!r} of {self.atlas.path} cannot be scored")

    @cached_property
    def _sources(self) -> dict[str, np.ndarray]:
        """Columns of the largest sources; empty if there is only one."""
        names, codes, counts = np.unique(
            np.asarray(self.atlas.sources, dtype=object)[self._population], return_inverse=True, return_counts=True
        )
        largest = np.argsort(-counts, kind="stable")[: MOST_SOURCES if len(names) > 1 else 0]
        return {str(names[i]): self._population[codes == i] for i in largest.tolist()}

    @property
    def names(self) -> frozenset[str]:
        """Names of figures and sources; see `Gauge`."""
        return frozenset({*FIGURES, *map(log_name, self._sources)} - (set() if self.atlas.shares else {END}))

    def forecast(self, forgetting: np.ndarray) -> Forecast:
        """Complete the row."""
        audit = self._k - self.chosen
        return self.model.predict(
            self.probes, forgetting, audit=audit, weights=self._weights, population=self._population
        )

    def read(
        self, forgetting: np.ndarray, progress: float
    ) -> tuple[dict[str, Estimate], dict[str, Estimate], float | None]:
        """Return figures, sources and misfit; see `Gauge`."""
        if not progress:  # the model is the base: nothing is forgotten, whatever the atlas says of finished fine-tunes
            nothing = _estimate(0.0, 0.0, 0.0)
            return {MEAN: nothing, WORST_TENTH: nothing}, dict.fromkeys(self._sources, nothing), None
        forecast = self.forecast(forgetting)
        # The atlas is of finished fine-tunes, so that what follows from it alone may be too sure of this one.
        figures = {
            MEAN: _estimate(*forecast.mean_interval(LEVEL, guaranteed=True)),
            WORST_TENTH: _estimate(*forecast.tail_interval(0.1, LEVEL, guaranteed=True)),
        }
        if self.growth is not None:
            end = self.growth.end(float(forecast.mean_interval(LEVEL)[0]), progress, LEVEL)
            figures |= {} if end is None else {END: _estimate(*end)}
        sources = {
            source: _estimate(*forecast.mean_interval(LEVEL, among=columns))
            for source, columns in self._sources.items()
        }
        return figures, sources, float(forecast.misfit)


class SampleGauge:
    """The mean of a random sample of a pool, with Student's interval for a finite population.

    Parameters
    ----------
    pool : Pool
    k : int
        Size of the sample.
    seed : int
    """

    def __init__(self, pool: Pool, k: int, *, seed: int = 0) -> None:
        if min(k, len(pool)) < 2:
            raise ConfigError(f"a sample of {min(k, len(pool))} examples has no interval: at least two are needed")
        self.size = len(pool)
        self.examples = pool.sample(min(k, len(pool)), seed=seed)
        names, counts = np.unique(np.asarray(pool.sources, dtype=object), return_counts=True)
        self._sizes = dict(zip(map(str, names), counts.tolist(), strict=True))

    @property
    def names(self) -> frozenset[str]:
        """Names of figures and sources; see `Gauge`."""
        return frozenset({MEAN, *map(log_name, self._within())})

    def without(self, ids: Sequence[str]) -> Pool:
        """Leave examples out that cannot be scored, and return the others.

        Raises
        ------
        DataError
            If fewer than two are left.
        """
        kept = [id_ for id_ in self.examples.ids if id_ not in set(ids)]
        if len(kept) < 2:
            raise DataError(f"of the {len(self.examples)} sampled examples {len(kept)} can be scored: two are needed")
        self.examples = self.examples.subset(kept)
        return self.examples

    def _within(self) -> dict[str, np.ndarray]:
        """Places of the examples of the sources that the sample has enough of; empty if there is only one source."""
        sources = np.asarray(self.examples.sources, dtype=object)
        found = {source: np.flatnonzero(sources == source) for source in self._sizes}
        return {source: at for source, at in found.items() if len(at) >= LEAST_AUDIT} if len(self._sizes) > 1 else {}

    def read(
        self,
        forgetting: np.ndarray,
        progress: float,  # noqa: ARG002 - a sample knows nothing of other runs
    ) -> tuple[dict[str, Estimate], dict[str, Estimate], float | None]:
        """Return figures, sources and no misfit; see `Gauge`."""
        sources = {source: _plain(forgetting[at], self._sizes[source]) for source, at in self._within().items()}
        return {MEAN: _plain(forgetting, self.size)}, sources, None


def _plain(values: np.ndarray, size: int) -> Estimate:
    """Mean of a random sample (n,) of a population, with Student's interval."""
    n, mean = len(values), float(values.mean())
    error = float(values.std(ddof=1)) * np.sqrt(max(1 / n - 1 / size, 0.0))
    half = float(scipy.special.stdtrit(n - 1, 0.5 + LEVEL / 2)) * error
    return _estimate(mean, mean - half, mean + half)


def _estimate(value: float | np.ndarray, lower: float | np.ndarray, upper: float | np.ndarray) -> Estimate:
    return Estimate(value=float(value), lower=float(lower), upper=float(upper))


def check_names(known: frozenset[str], name: str, condition: str) -> str:
    """Return the full name of a figure in a condition: 'lower' and 'upper' are those of the mean.

    Raises
    ------
    ConfigError
        If there is no such figure.
    """
    full = {"lower": f"{MEAN}_lower", "upper": f"{MEAN}_upper"}.get(name, name)
    bare = full.removesuffix("_lower").removesuffix("_upper")
    if full in known or bare in known or (full == "misfit" and WORST_TENTH in known):
        return full
    there = ", ".join(["lower", "upper", *sorted(known)])
    raise ConfigError(f"{condition!r}: there is no figure {name!r} here; there are {there}")
