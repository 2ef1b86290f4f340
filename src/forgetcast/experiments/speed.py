"""How fast a model is tuned and scored on this machine, by a few steps and examples that are timed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from forgetcast.data.pool import Pool
from forgetcast.data.recipe import Recipe

if TYPE_CHECKING:
    from forgetcast.lm import FineTuner, LanguageModel

TIMED_STEPS = 3

_TIMED_EXAMPLES, _WARM_UP = 64, 8


@dataclass(frozen=True)
class TrainingSpeed:
    """How fast a model is tuned.

    Attributes
    ----------
    setup : float
        Seconds of a fine-tune besides its steps.
    step : float
        Seconds of a step, the mean of those timed.
    tokens : float
        Tokens of such a step, without padding.
    """

    setup: float
    step: float
    tokens: float


def time_training(tuner: FineTuner, task: Pool, recipe: Recipe) -> TrainingSpeed:
    """Time some steps of a fine-tune, after one that does not count; the tuner has the base model again."""
    import torch

    ends: list[float] = []

    def end_of_step(*_: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # its work is only queued until then
        ends.append(time.monotonic())

    first = tuner.tune(task, recipe.model_copy(update={"steps": 1})).tokens
    started = time.monotonic()
    timed = tuner.tune(task, recipe.model_copy(update={"steps": TIMED_STEPS}), on_step=end_of_step)
    total = time.monotonic() - started
    tuner.restore()
    counted = TIMED_STEPS - 1  # the first step begins at a time that is not told
    step = (ends[-1] - ends[0]) / counted
    return TrainingSpeed(max(total - TIMED_STEPS * step, 0.0), step, (timed.tokens - first) / counted)


def timed_sample(pool: Pool, seed: int) -> Pool:
    """Draw the examples of a pool whose scoring is timed."""
    drawn = np.random.default_rng(seed).permutation(len(pool))[:_TIMED_EXAMPLES]
    return pool.subset(pool.ids[i] for i in drawn.tolist())


def time_scoring(base: LanguageModel, sample: Pool) -> float:
    """Return the seconds in which examples are scored, after some that do not count."""
    from forgetcast.lm import score

    score(base, sample.subset(sample.ids[:_WARM_UP]))
    started = time.monotonic()
    score(base, sample)
    return time.monotonic() - started


def time_answers(base: LanguageModel, sample: Pool, max_new_tokens: int) -> float:
    """Return the seconds in which the prompts of examples are answered."""
    from forgetcast.lm import exact_match

    started = time.monotonic()
    exact_match(base, sample, max_new_tokens=max_new_tokens)
    return time.monotonic() - started
