"""Resumable fine-tuning runs: each is made once, stored with its settings, reused, and refused if they differ."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, Field

from forgetcast.atlas.store import Atlas
from forgetcast.data.pool import Pool
from forgetcast.data.recipe import Recipe
from forgetcast.data.rendering import Rendering
from forgetcast.defaults import ANSWER_TOKENS
from forgetcast.errors import DataError, MismatchError
from forgetcast.files import check_destination
from forgetcast.measure.scores import Scores, check_tokens
from forgetcast.progress import OnProgress as OnProgress  # all drivers take it from here, with the units
from forgetcast.replay.plan import ReplayPlan
from forgetcast.results import validated

if TYPE_CHECKING:
    from forgetcast.lm import FineTuner, InitialState, LanguageModel, ReplaySelector, Tuned

OnFigures = Callable[[str, Mapping[str, float]], None]
"""Called with the name of a run and some of its figures: `loss` of the last steps of the training, nats per
target token; when it has ended, mean `forgetting`, and tokens per second of `training` (if known) and `scoring`."""

TRAINING_UNITS = 3
"""Of a training step on one example; a unit of work is one example's forward pass."""


class Meter:
    """Adds up units of work for a progress display, and passes figures on to it."""

    def __init__(self, total: int, on_progress: OnProgress | None, on_figures: OnFigures | None = None) -> None:
        self.total, self.done, self._on_progress = total, 0, on_progress
        self.on_figures = on_figures

    def advance(self, what: str, units: int) -> None:
        """Count `units` more as done."""
        self.done += units
        if self._on_progress is not None:
            self._on_progress(what, self.done, self.total)


class Stages:
    """Shows several meters as one progress."""

    def __init__(self, on_progress: OnProgress | None) -> None:
        self._on_progress, self._before, self._total = on_progress, 0, 0

    def stage(self, *, later: int) -> OnProgress:
        """Begin the next stage; `later` is the work of the stages after it."""
        self._before = self._total

        def report(what: str, done: int, total: int) -> None:
            self._total = self._before + total
            if self._on_progress is not None:
                self._on_progress(what, self._before + done, self._total + later)

        return report


@dataclass(frozen=True)
class FineTune:
    """A fine-tune to make, and what to score after it.

    Attributes
    ----------
    name : str
        Label in the progress display.
    task : Pool
        New examples to train on.
    recipe : Recipe
    judged : Pool
        Upstream examples that are scored after the training.
    tests : mapping of str to Pool
        Test examples by task; their mean losses are stored.
    plan, pool : optional
        What to replay, and its pool.
    selector : ReplaySelector, optional
        Selects during training which examples of the plan come next.
    initial : InitialState, optional
        Where earlier fine-tunes ended; default: the base model, with nothing replayed.
    answers : mapping, optional
        Arguments of `lm.exact_match` to answer the judged prompts too; default: no answers.
    """

    name: str
    task: Pool
    recipe: Recipe
    judged: Pool
    tests: Mapping[str, Pool] = field(default_factory=dict)
    plan: ReplayPlan | None = None
    pool: Pool | None = None
    selector: ReplaySelector | None = None
    initial: InitialState | None = None
    answers: Mapping[str, Any] | None = None

    def run(self, tuner: FineTuner, settings: Mapping[str, Any], meter: Meter) -> Scores:
        """Fine-tune, and judge the tuned model: see `judge`."""
        return self.judge(self.tune(tuner, meter), settings, meter)

    def tune(self, tuner: FineTuner, meter: Meter) -> Tuned:
        """Fine-tune."""
        show = meter.on_figures
        return tuner.tune(
            self.task,
            self.recipe,
            plan=self.plan,
            pool=self.pool,
            selector=self.selector,
            initial=self.initial,
            on_step=lambda *_: meter.advance(f"{self.name}: fine-tuning", self.recipe.batch_size * TRAINING_UNITS),
            on_loss=None if show is None else lambda loss: show(self.name, {"loss": loss}),
        )

    def judge(self, tuned: Tuned, settings: Mapping[str, Any], meter: Meter) -> Scores:
        """Score the judged examples and the tests.

        Returns
        -------
        Scores
            Metadata: the fields of `RunFacts`.
        """
        started = time.monotonic()
        after = score_with_progress(tuned.language_model, self.judged, meter, self.name, self.answers)
        scoring = time.monotonic() - started
        tests = {
            task: score_with_progress(tuned.language_model, test, meter, self.name) for task, test in self.tests.items()
        }
        facts = {
            "settings": dict(settings),
            "losses": {task: float(np.nanmean(scores.nll)) for task, scores in tests.items()},
            "replayed": list(tuned.replayed),
            "steps": tuned.steps,
            "seconds": tuned.seconds,
            "cost": cost(tuned.seconds, tuned.tokens, scoring, after),
        }
        return replace(after, metadata={**after.metadata, **facts})


def cost(
    training: float | None, trained: int | None, scoring: float, after: Scores
) -> dict[str, dict[str, float | None]]:
    """Return what a run took: seconds, and tokens that were trained on or predicted in scoring; None: unknown."""
    return {
        "training": {"seconds": None if training is None else round(training, 3), "tokens": trained},
        "scoring": {"seconds": round(scoring, 3), "tokens": int(after.tokens.sum())},
    }


def units(recipe: Recipe, scored: int, replayed: int = 0) -> int:
    """Return the units of work of a fine-tune that scores and answers `scored` examples and replays `replayed`."""
    return (recipe.steps * recipe.batch_size + replayed) * TRAINING_UNITS + scored


class RunFacts(BaseModel):
    """What a finished run says of itself, in the metadata of its scores.

    Attributes
    ----------
    settings : dict
        What its outcome depends on.
    losses : dict of str to float
        Mean loss of each test set, nats per target token.
    replayed : list of str
        Ids of the replayed examples, in order.
    steps : int
    seconds : float
        Of the training.
    cost : dict
        See `cost`; without it in files of earlier versions.
    choice : dict or None
        Of an interpolation whose alpha was chosen, see `interpolation.ChosenAlpha`.
    generated : int
        Tokens of the answers that the model wrote for on-policy replay.
    """

    settings: dict[str, Any]
    losses: dict[str, float]
    replayed: list[str]
    steps: int = Field(ge=0)
    seconds: float = Field(ge=0, allow_inf_nan=False)
    cost: dict[str, dict[str, float | None]] = Field(default_factory=dict)
    choice: dict[str, Any] | None = None
    generated: int = 0


class RunStore(ABC):
    """A store of finished runs, each with a name and the settings that its outcome depends on."""

    @abstractmethod
    def has(self, name: str, settings: Mapping[str, Any]) -> bool:
        """Say whether the run is finished.

        Raises
        ------
        MismatchError
            If it was made with other settings.
        DataError
            If it cannot be stored.
        """

    @abstractmethod
    def save(self, name: str, scores: Scores) -> None:
        """Store a finished run; its settings are in the metadata."""

    def ensure(self, name: str, settings: Mapping[str, Any], run: Callable[[], Scores]) -> None:
        """Make the run unless it is finished."""
        if not self.has(name, settings):
            self.save(name, run())


class ScoreFiles(RunStore):
    """A folder with one score file per run."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    def path(self, name: str) -> Path:
        """Return the path of a run's file."""
        return self.directory / f"{name}.parquet"

    def has(self, name: str, settings: Mapping[str, Any]) -> bool:
        """Say whether the run is finished; see `RunStore.has`."""
        check_destination(self.path(name))  # before the run, not when it is to be saved
        if not self.path(name).exists():
            return False
        if self.load(name)[1].settings != settings:
            raise MismatchError(
                f"{self.path(name)} is of a run with other settings; remove it, or use another directory"
            )
        return True

    def save(self, name: str, scores: Scores) -> None:
        """Write the score file."""
        scores.save(self.path(name))

    def load(self, name: str, tests: Iterable[str] = ()) -> tuple[Scores, RunFacts]:
        """Read a finished run.

        Parameters
        ----------
        name : str
        tests : iterable of str
            Test sets whose losses it must have.

        Raises
        ------
        DataError
            If the file is damaged, or is none of a finished run.
        """
        path = self.path(name)
        scores = Scores.load(path)
        try:
            facts = validated(RunFacts, scores.metadata, f"{path}: its metadata")
            if lacking := [test for test in tests if test not in facts.losses]:
                raise DataError(f"{path}: its metadata: losses lacks {lacking[0]!r}")
        except DataError as error:
            raise DataError(f"{error}; this is no finished run: remove it, and the run is made again") from None
        return scores, facts


class AtlasRows(RunStore):
    """The rows of an atlas, one per task, and per seed where there are several.

    The settings of a row are its `recipe`, and where given: `share`, the share of the pool that is scored; `order`, its
    place among the rows; `provenance`, what else is known of it.
    """

    def __init__(self, atlas: Atlas) -> None:
        self.atlas = atlas

    def has(self, name: str, settings: Mapping[str, Any]) -> bool:
        """Say whether the row is complete, by this process or another one; see `RunStore.has`."""
        self.atlas.refresh()
        if name not in self.atlas:
            return False
        stored = self.atlas.provenance(name)
        check_recipe(f"the row {name!r} of {self.atlas.path}", stored["recipe"], settings["recipe"])
        return self.atlas.is_complete(name, share=settings.get("share", 1.0))

    def save(self, name: str, scores: Scores) -> None:
        """Add the row."""
        settings = scores.metadata["settings"]
        facts = {
            **settings.get("provenance", {}),
            **{what: scores.metadata[what] for what in ("cost", "text", "versions") if what in scores.metadata},
        }
        if is_final(scores):
            facts["finished"] = settings.get("share", 1.0)
        self.atlas.add(name, scores, recipe=settings["recipe"], order=settings.get("order"), provenance=facts)


def is_final(scores: Scores) -> bool:
    """Whether another try would score no more: a loss that is not finite stays so, memory may suffice the next time."""
    return "out of memory" not in scores.reasons


def check_recipe(what: str, stored: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
    """Raise MismatchError if a stored recipe is not empty and differs; that of a user's trainer is its command."""
    if not stored:
        return
    # A field that an older version lacked, or that is not written, has its default value.
    defaults = {name: field.default for name, field in Recipe.model_fields.items()}
    earlier, wanted = defaults | dict(stored), defaults | dict(recipe)
    if "command" in stored or "command" in recipe:
        changed = ["command"] if stored.get("command") != recipe.get("command") else []
    else:
        changed = [name for name, value in wanted.items() if earlier.get(name) != value]
    if changed:
        raise MismatchError(
            f"{what} was collected with another recipe ({', '.join(changed)} differ); "
            "rows of one atlas must be comparable: use its recipe, or collect into a new atlas"
        )


def check_unseen(name: str, replayed: Iterable[str], held_out: Iterable[str]) -> None:
    """Raise DataError if a run replayed an example that it is to be judged on."""
    if seen := sorted(set(replayed).intersection(held_out)):
        raise DataError(
            f"the run {name} replayed {len(seen)} held-out example(s), e.g. {seen[0]!r}, so it cannot be judged on them"
        )


def check_base(atlas: Atlas, base: LanguageModel) -> None:
    """Check that the atlas was measured on the weights and tokens of `base`.

    Raises
    ------
    MismatchError
        If it was not.
    """
    if atlas.model_hash is not None and atlas.model_hash != base.weights_hash:
        raise MismatchError(f"the atlas {atlas.path} was measured on another base model ({atlas.model})")
    check_text(atlas, base, atlas.pool)


def check_text(atlas: Atlas, language_model: LanguageModel, pool: Pool) -> None:
    """Check, without a forward pass, that a model reads examples as the tokens that the atlas's base was scored on.

    Raises
    ------
    MismatchError
        If it does not.
    """
    from forgetcast.lm import token_digests

    settings, text = length_settings(atlas, language_model), language_model.text_settings
    scored_with = atlas.scored_with
    if scored_with.get("text", text) == text and settings["max_length"] == scored_with.get("max_length"):
        return
    # Another tokenizer or template may still give the same tokens.
    before = atlas.before.subset(pool.ids)
    digests = token_digests(language_model, pool, **settings)
    check_tokens(before, replace(before, digests=digests, metadata={"text": text, **settings}))


def length_settings(atlas: Atlas, language_model: LanguageModel) -> dict[str, Any]:
    """Return the arguments of `lm.score` that the atlas's base was scored with, as far as a model's context allows."""
    longest, stride = (atlas.scored_with.get(name) for name in ("max_length", "stride"))
    return {
        "max_length": None if longest is None else min(longest, language_model.context),
        "stride": stride,
    }


def rendering_of(atlas: Atlas) -> Rendering:
    """Return how conversations were rendered for the base scores of an atlas."""
    stored = atlas.scored_with.get("text", {})
    return Rendering(**{name: stored[name] for name in ("date", "thinking") if name in stored})


def score_base(
    base: LanguageModel, pool: Pool, answers: Mapping[str, Any] | None, on_progress: OnProgress | None
) -> Scores:
    """Score the pool of a new atlas by its base model, as `score_with_progress`."""
    meter = Meter(len(pool) * (1 if answers is None else 2), on_progress)
    return score_with_progress(base, pool, meter, "base model", answers)


def answer_settings(atlas: Atlas) -> dict[str, Any]:
    """Return the arguments of `lm.exact_match` with which the base model of an atlas answered."""
    return {"max_new_tokens": atlas.scored_with.get("max_new_tokens", ANSWER_TOKENS)}


def score_with_progress(
    language_model: LanguageModel,
    pool: Pool,
    meter: Meter,
    name: str,
    answers: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Scores:
    """Score a pool with `settings` of `lm.score`; answer its prompts if `answers` has arguments of `lm.exact_match`."""
    from forgetcast.lm import exact_match, score

    scores = score(language_model, pool, **settings, on_progress=lambda count: meter.advance(f"{name}: scoring", count))
    if answers is None:
        return scores
    remaining = len(pool)

    def answered(count: int) -> None:
        nonlocal remaining
        remaining -= count
        meter.advance(f"{name}: answering", count)

    right, predictions = exact_match(language_model, pool, on_progress=answered, **answers)
    meter.advance(f"{name}: answering", remaining)  # examples without a question
    metadata = {**scores.metadata, "max_new_tokens": answers["max_new_tokens"]}
    return replace(scores, exact_match=right, predictions=predictions, metadata=metadata)
