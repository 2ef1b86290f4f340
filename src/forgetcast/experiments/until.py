"""Measure examples in batches until a guaranteed interval is narrow enough, and no longer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import scipy  # submodules load lazily, so that starting is fast

from forgetcast.atlas.matrix import ForgettingMatrix
from forgetcast.atlas.store import Atlas
from forgetcast.completion.base import Completion, Forecast
from forgetcast.completion.forecast import answered_probes, measured_probes
from forgetcast.completion.probes import choose, weights
from forgetcast.defaults import CHOSEN_SHARE
from forgetcast.errors import ConfigError, DataError, MismatchError
from forgetcast.experiments.meter import Meter, scoring_work
from forgetcast.experiments.runs import answer_settings, check_text, score_with_progress
from forgetcast.measure.scores import Scores, length_settings
from forgetcast.progress import OnProgress

if TYPE_CHECKING:
    from forgetcast.lm import LanguageModel

OF_ONE_FILE = ("pool", "tokens", "audit", "audit_weights")
"""Metadata that scores of other examples do not share."""

GROWTH = 2
"""Each look has so many times the examples of the one before."""

Measure = Callable[[np.ndarray], np.ndarray]
"""Returns the forgetting of the examples in some columns; what was measured before is not measured again."""


@dataclass(frozen=True)
class Width:
    """Width, upper minus lower end, that an interval is to have.

    Attributes
    ----------
    figure : 'mean' or 'worst_tenth'
    width : float
        Nats per token.
    """

    figure: str
    width: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a width of the mean, such as "0.02", or of another figure, such as "worst_tenth:0.1".

        Raises
        ------
        ConfigError
            If the text is none of these, or the width is not above zero: no sample of a pool reaches that.
        """
        figure, sign, number = text.rpartition(":")
        figure = figure if sign else "mean"
        try:
            width = float(number)
        except ValueError:
            width = np.nan
        if figure not in ("mean", "worst_tenth") or not np.isfinite(width):
            raise ConfigError(f"--until-width {text}: write a width such as 0.02, or worst_tenth:0.1")
        if width <= 0:
            raise ConfigError(f"--until-width {text}: no sample reaches this; a width must be above zero")
        return cls(figure, width)

    def interval(self, forecast: Forecast, level: float) -> tuple[float, float, float]:
        """Return the guaranteed interval of the figure."""
        found = (
            forecast.mean_interval(level, True) if self.figure == "mean" else forecast.tail_interval(0.1, level, True)
        )
        return tuple(float(each) for each in found)  # type: ignore[return-value]


@dataclass(frozen=True)
class Look:
    """One look at the interval.

    Attributes
    ----------
    measured : int
        Examples.
    width : float
        Of the interval at the level of a look.
    needed : int
        Examples that the wanted width would need in all, by this look's errors.
    """

    measured: int
    width: float
    needed: int


@dataclass(frozen=True)
class Stopped:
    """Where the measurement of a new task stopped.

    Attributes
    ----------
    forecast : Forecast
    looks : tuple of Look
    interval : tuple of float, or None
        Value, lower and upper end of the wanted figure, at the last look. It has the level over all looks together;
        None if no width was asked for.
    level : float
        Of a single look.
    everything : bool
        Whether it was cheaper to measure all examples than to be sure.
    """

    forecast: Forecast
    looks: tuple[Look, ...] = ()
    interval: tuple[float, float, float] | None = None
    level: float = 0.9
    everything: bool = False


def schedule(k: int, examples: int) -> list[int]:
    """Return the numbers of examples at the looks: k, doubled each time; the last is all of them."""
    sizes = []
    while k < examples:
        sizes.append(k)
        k *= GROWTH
    return [*sizes, examples]


def measure_until(
    model: Completion,
    measure: Measure,
    population: np.ndarray,
    *,
    k: int = 30,
    chosen: int | None = None,
    width: Width | None = None,
    level: float = 0.9,
    most: int | None = None,
    seed: int = 0,
) -> Stopped:
    """Measure k probes of a new task, and more until a guaranteed interval is narrow enough.

    The first probes are chosen, all others drawn at random, by `probes.weights`. The looks are planned beforehand, and
    each has an equal share of the allowed error: the interval at which it stops holds at the level, however often it
    was looked at (Bonferroni). Where the first look that can be expected to suffice is the last, all examples are
    measured at once.

    Parameters
    ----------
    model : Completion
        Fitted.
    measure : callable
    population : array of int
        Columns that can be measured.
    k : int
        First number of probes.
    chosen : int, optional
        Number of the first probes that are chosen; default: a sixth.
    width : Width, optional
        None: measure k probes.
    level : float
    most : int, optional
        Most examples to measure.
    seed : int
        Of the random probes.

    Raises
    ------
    ConfigError
        If there are fewer than two random probes.
    DataError
        If `most` examples cannot be expected to suffice, or did not; what was measured remains with `measure`.
    """
    chosen = round(CHOSEN_SHARE * k) if chosen is None else chosen
    if k > len(population):
        raise DataError(
            f"{k} probes cannot be drawn: {len(population)} examples can be measured; ask for fewer with -k"
        )
    if width is not None and k - chosen < 2 and k < len(population):
        raise ConfigError(f"of {k} probes {chosen} are chosen: a guaranteed interval needs at least two random ones")
    drawn_by = weights(model)
    order = choose(model, len(population), population, audit=len(population) - chosen, weights=drawn_by, seed=seed)

    def predict(size: int) -> Forecast:
        columns = order[:size]
        return model.predict(columns, measure(columns), audit=size - chosen, weights=drawn_by, population=population)

    if width is None:
        return Stopped(predict(k), level=level)
    sizes = schedule(k, len(population))
    # The last look measures all: it cannot err.
    of_look = 1 - (1 - level) / max(len(sizes) - 1, 1)
    looks: list[Look] = []
    everything = False
    for size in sizes:
        if everything and size < sizes[-1]:
            continue
        forecast = predict(size)
        interval = width.interval(forecast, of_look)
        needed = _needed(interval[2] - interval[1], width.width, size - chosen, len(population) - chosen, of_look)
        looks.append(Look(size, interval[2] - interval[1], chosen + needed))
        if interval[2] - interval[1] <= width.width or size == sizes[-1]:
            break
        expected = next(each for each in sizes if each >= chosen + needed)
        if most is not None and (expected > most):
            raise DataError(
                f"a width of {width.width:g} of the {width.figure.replace('_', ' ')} needs about {expected} of the "
                f"{len(population)} examples, and {most} may be measured; after {size} it is {looks[-1].width:.3g}"
            )
        everything = expected == sizes[-1]
    return Stopped(forecast, tuple(looks), interval, of_look, everything)


def _needed(width: float, wanted: float, drawn: int, examples: int, level: float) -> int:
    """Return how many of the examples random probes must be for a width, by the errors of those drawn already."""
    if width <= wanted:
        return drawn

    def relative(n: np.ndarray) -> np.ndarray:
        """Width relative to one standard deviation."""
        quantile = scipy.special.stdtrit(n - 1, 0.5 + level / 2)
        return np.asarray(quantile * np.sqrt(np.maximum(1 / n - 1 / examples, 0.0)))

    sizes = np.arange(drawn, examples + 1)
    widths = width * relative(sizes) / relative(sizes[:1])
    return int(sizes[np.argmax(widths <= wanted)])


class ProbeScores:
    """Scores examples of an atlas with a tuned model as they are asked for, and keeps them in a file.

    An interrupted measurement continues where it stopped.

    Parameters
    ----------
    atlas : Atlas
    language_model : LanguageModel
    path : path
        Score file; `path.partial` holds unfinished work.
    flips : ForgettingMatrix, optional
        By exact match: the matrix whose columns are the examples; they are answered too.
    allow_different_tokens : bool
        Whether the model may read examples as other tokens than the base did.
    on_progress : callable, optional
        Gets the progress of each measurement.

    Raises
    ------
    MismatchError
        If the model is the base itself, the file is of another model or other settings, or the model reads the examples
        as other tokens.
    """

    def __init__(
        self,
        atlas: Atlas,
        language_model: LanguageModel,
        path: Path,
        *,
        flips: ForgettingMatrix | None = None,
        allow_different_tokens: bool = False,
        on_progress: OnProgress | None = None,
    ) -> None:
        self._atlas, self._model, self._path, self._flips = atlas, language_model, path, flips
        self._examples = atlas.examples if flips is None else flips.examples
        self._allow, self._meter = allow_different_tokens, Meter.of(on_progress)
        self._answers = None if flips is None else answer_settings(atlas)
        self._settings = length_settings(atlas.scored_with, language_model.context)
        if language_model.weights_hash == atlas.model_hash:
            raise MismatchError(
                f"{language_model.name} is the base model of {atlas.path} itself; give a fine-tuned one"
            )
        self.scores = Scores.load(path) if path.is_file() else None
        if self.scores is None:
            return
        expected = {"model_hash": language_model.weights_hash, "text": language_model.text_settings}
        if any(self.scores.metadata.get(name) != value for name, value in expected.items()):
            raise MismatchError(f"{path} has scores of another model or other settings; remove it, or name another -o")
        if flips is not None and self.scores.exact_match is None:
            raise MismatchError(f"{path} has scores without answers; remove it, or name another -o")

    def __call__(self, columns: np.ndarray) -> np.ndarray:
        """Return the forgetting of the examples in these columns, nats per token, or 1 where an answer became wrong."""
        ids = [self._examples[i] for i in columns.tolist()]
        known = set() if self.scores is None else set(self.scores.ids)
        if missing := [id_ for id_ in ids if id_ not in known]:
            pool = self._atlas.subset(missing)
            if not self._allow:
                check_text(self._atlas, self._model, pool)
            self._meter.begin(scoring_work(pool, self._model.context, answered=self._answers is not None))
            partial = self._path.with_name(f"{self._path.name}.partial")
            new = score_with_progress(
                self._model, pool, self._meter, "probes", self._answers, unfinished=partial, **self._settings
            )
            self.scores = new if self.scores is None else _joined(self.scores, new)
            self.scores.save(self._path)
        assert self.scores is not None
        measured = self.scores.subset(ids)
        at, forgetting = (
            measured_probes(self._atlas, measured, allow_different_tokens=self._allow)
            if self._flips is None
            else answered_probes(self._atlas, self._flips, measured, allow_different_tokens=self._allow)
        )
        assert np.array_equal(at, columns)
        return forgetting

    def keep(self, probes: np.ndarray, audit: int, weights: np.ndarray) -> Scores:
        """Write the probes in their order, with what `forecast --scores` reads.

        That is the number of the random ones, and their weights (of all examples, shape (N,)).
        """
        assert self.scores is not None
        scores = self.scores.subset([self._examples[i] for i in probes.tolist()])
        drawn = [float(f"{weight:.6g}") for weight in weights[probes[len(probes) - audit :]]]
        self.scores = replace(scores, metadata={**scores.metadata, "audit": audit, "audit_weights": drawn})
        self.scores.save(self._path)
        return self.scores


def _joined(one: Scores, other: Scores) -> Scores:
    """Join scores of different examples by one model; the result is of no pool."""
    metadata = {name: value for name, value in one.metadata.items() if name not in OF_ONE_FILE}
    return Scores(
        ids=[*one.ids, *other.ids],
        nll=np.concatenate([one.nll, other.nll]),
        tokens=np.concatenate([one.tokens, other.tokens]),
        truncated=np.concatenate([one.truncated, other.truncated]),
        reasons=[*one.reasons, *other.reasons],
        metadata=metadata,
        digests=None if one.digests is None or other.digests is None else [*one.digests, *other.digests],
        exact_match=(
            None
            if one.exact_match is None or other.exact_match is None
            else np.concatenate([one.exact_match, other.exact_match])
        ),
        predictions=(
            None if one.predictions is None or other.predictions is None else [*one.predictions, *other.predictions]
        ),
    )


def describe(stopped: Stopped, width: Width, population: int) -> Iterator[str]:
    """Say what was measured for a width, and what it would have cost to go on, in sentences."""
    first, last = stopped.looks[0], stopped.looks[-1]
    figure = width.figure.replace("_", " ")
    if stopped.everything:
        yield (
            f"Measuring all {population} examples is cheaper than being sure from a sample: a width of {width.width:g} "
            f"of the {figure} needs about {first.needed} of them."
        )
        return
    yield f"{last.measured} of {population} examples measured: the interval of the {figure} is {last.width:.3g} wide."
    if last.measured < population:
        beyond = min(GROWTH * last.measured, population)
        share = (1 / beyond - 1 / population) / (1 / last.measured - 1 / population)
        yield (
            f"To go on to {beyond} would cost {beyond - last.measured} more, for a width of about "
            f"{last.width * share**0.5:.2g}."
        )
