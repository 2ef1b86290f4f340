"""How far a run is: its work in characters of text, by kind, and how long each kind takes on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from forgetcast.data.pool import Pool
from forgetcast.data.recipe import Recipe
from forgetcast.progress import OnProgress

OnFigures = Callable[[str, Mapping[str, float]], None]
"""Called with the name of a run and some of its figures: `loss` of the last steps of the training, nats per
target token; when it has ended, mean `forgetting`, and tokens per second of `training` (if known) and `scoring`."""

CHARACTERS_OF_A_TOKEN = 4
"""About so many: by it, the longest input in tokens is one in characters."""

_GUESSES = {"scoring": 1.0, "training": 3.0, "answering": 10.0}
"""What a character of each kind of work takes relative to scoring, until it has been measured."""


@dataclass(frozen=True)
class Work:
    """Characters of text to be processed, by kind: read once for scores, trained on, or answered."""

    scoring: float = 0.0
    training: float = 0.0
    answering: float = 0.0

    def __add__(self, other: Work) -> Work:
        """Sum by kind."""
        return Work(self.scoring + other.scoring, self.training + other.training, self.answering + other.answering)

    def __mul__(self, times: float) -> Work:
        """Multiple of each kind."""
        return Work(self.scoring * times, self.training * times, self.answering * times)


def scoring_work(pool: Pool, max_length: int | None, *, answered: bool = False) -> Work:
    """Return the work of scoring a pool, of inputs of at most so many tokens, and of answering it too."""
    characters = float(_lengths(pool, max_length).sum())
    return Work(scoring=characters, answering=characters if answered else 0.0)


def training_work(task: Pool, examples: int, max_length: int | None) -> Work:
    """Return the work of training on so many examples of a task."""
    return Work(training=examples * float(_lengths(task, max_length).mean()))


def tuning_work(task: Pool, recipe: Recipe, context: int, *, pool: Pool | None = None, replayed: int = 0) -> Work:
    """Return the work of a fine-tune of a model of this context, which replays so many examples of a pool."""
    longest = min(recipe.max_length, context)
    work = training_work(task, recipe.steps * recipe.batch_size, longest)
    return work if pool is None or not replayed else work + training_work(pool, replayed, longest)


def _lengths(pool: Pool, max_length: int | None) -> np.ndarray:
    """Return the characters of each example that are read, shape (N,): at least one, for what every example costs."""
    most = np.inf if max_length is None else max_length * CHARACTERS_OF_A_TOKEN
    return np.clip(pool.lengths, 1, most)


class Meter:
    """Adds up the work that is done, learns how long it takes, and reports the progress in milliseconds.

    What is done is the time it took, and the total adds what is left by the pace of each kind of work so far. So the
    total changes while the pace is learned; it is 0, unknown, until anything is done.

    Parameters
    ----------
    on_progress : callable, optional
        Gets descriptions, and milliseconds of what is done and of everything.
    on_figures : callable, optional
        Passed on to runs.
    """

    def __init__(self, on_progress: OnProgress | None = None, on_figures: OnFigures | None = None) -> None:
        self._on_progress, self.on_figures = on_progress, on_figures
        self.left, self.later = dict.fromkeys(_GUESSES, 0.0), Work()
        self._done, self._seconds = dict.fromkeys(_GUESSES, 0.0), dict.fromkeys(_GUESSES, 0.0)
        self._marked = time.monotonic()

    @classmethod
    def of(cls, on_progress: OnProgress | Meter | None, on_figures: OnFigures | None = None) -> Meter:
        """Return a meter that reports to a function; one that several stages share, as it is."""
        if isinstance(on_progress, Meter):
            on_progress.on_figures = on_figures or on_progress.on_figures
            return on_progress
        return cls(on_progress, on_figures)

    def begin(self, work: Work, *, later: Work | None = None) -> None:
        """Begin a stage of so much work; `later`, if given, is the work of the stages after it."""
        self.left = vars(work).copy()
        self.later = self.later if later is None else later
        self._marked = time.monotonic()

    def advance(self, what: str, kind: str, characters: float) -> None:
        """Count work of a kind as done, in the time since the last call."""
        now = time.monotonic()
        self._seconds[kind] += now - self._marked
        self._done[kind] += characters
        self._marked = now
        self.left[kind] = max(self.left[kind] - characters, 0.0)
        self.report(what)

    def waiting(self, what: str) -> None:
        """Report what is waited for, for a time that nobody knows."""
        if self._on_progress is not None:
            self._on_progress(what, 0, 0)

    def report(self, what: str) -> None:
        """Report a description without further work."""
        if self._on_progress is None:
            return
        elapsed, left = sum(self._seconds.values()), self.seconds_left
        done = round(1000 * elapsed)
        self._on_progress(what, done, done + round(1000 * left) if left is not None else 0)

    @property
    def seconds_left(self) -> float | None:
        """Estimate of the time for all that is left; None until anything is done."""
        spent = sum(self._seconds.values())
        usual = sum(_GUESSES[kind] * done for kind, done in self._done.items())
        if not spent or not usual:
            return None
        later = vars(self.later)
        return sum(
            (left + later[kind])
            * (self._seconds[kind] / self._done[kind] if self._done[kind] else _GUESSES[kind] * spent / usual)
            for kind, left in self.left.items()
        )

    def settle(self, before: Mapping[str, float], work: Work, what: str) -> None:
        """Count a part of the stage as done, whatever was done of it since `left` was `before`, and report it."""
        self.left = {kind: max(left - vars(work)[kind], 0.0) for kind, left in before.items()}
        self._marked = time.monotonic()
        self.report(what)

    def scored(self, pool: Pool, max_length: int | None, what: str, kind: str = "scoring") -> Callable[[int], None]:
        """Return a function that counts examples of a pool as done, which are taken longest first."""
        ends = np.cumsum(np.sort(_lengths(pool, max_length))[::-1])
        done = 0

        def count(examples: int) -> None:
            nonlocal done
            before = ends[done - 1] if done else 0.0
            done = min(done + examples, len(ends))
            self.advance(what, kind, float((ends[done - 1] if done else 0.0) - before))

        return count
