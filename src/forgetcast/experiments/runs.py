"""Resumable fine-tuning runs: each is made once, stored with its settings, reused, and refused if they differ."""

from __future__ import annotations

import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, Field

from forgetcast.atlas.rows import folder_of
from forgetcast.atlas.storage import beside
from forgetcast.atlas.store import Atlas
from forgetcast.data.pool import Pool
from forgetcast.data.recipe import Recipe
from forgetcast.data.rendering import Rendering
from forgetcast.defaults import ANSWER_TOKENS
from forgetcast.errors import DataError, MismatchError
from forgetcast.experiments.claims import claimed
from forgetcast.experiments.kept import KeptModels
from forgetcast.experiments.meter import Meter, Work, scoring_work, tuning_work
from forgetcast.files import check_destination, make_folder
from forgetcast.interruption import Interrupted, Stop, stoppable
from forgetcast.measure.scores import Scores, check_tokens, length_settings
from forgetcast.progress import OnProgress
from forgetcast.replay.plan import ReplayPlan
from forgetcast.results import plain, validated

if TYPE_CHECKING:
    from forgetcast.lm import FineTuner, InitialState, LanguageModel, ReplaySelector, Tuned


Curve = Mapping[float, Callable[[Scores], None]]
"""Shares of the steps after which the judged examples are scored too, and what is done with the scores."""


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
    memory : Pool, optional
        Further examples, whose losses are stored one by one.
    kept : KeptModels, optional
        Where the tuned model stays; default: it goes.
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
    memory: Pool | None = None
    kept: KeptModels | None = None

    def work(self, context: int) -> Work:
        """Return the work of the run with a model of this context, in characters.

        Raises
        ------
        ConfigError
            If the plan cannot be replayed under the recipe.
        """
        replayed = 0 if self.plan is None else self.plan.count(self.recipe.steps, self.recipe.batch_size)
        work = tuning_work(self.task, self.recipe, context, pool=self.pool, replayed=replayed)
        work += scoring_work(self.judged, context, answered=self.answers is not None)
        more = [*self.tests.values(), *([] if self.memory is None else [self.memory])]
        return sum((scoring_work(each, context) for each in more), work)

    def run(
        self,
        tuner: FineTuner,
        settings: Mapping[str, Any],
        meter: Meter,
        folder: Path,
        curve: Curve | None = None,
    ) -> Scores:
        """Fine-tune, and judge the tuned model.

        Parameters
        ----------
        tuner : FineTuner
        settings : mapping
            What the outcome depends on; kept in its metadata.
        meter : Meter
        folder : Path
            Keeps what is unfinished, from which the next call goes on.
        curve : Curve, optional
            What is done with the scores of the judged examples after shares of the steps.

        Returns
        -------
        Scores
            See `judge`.

        Raises
        ------
        Interrupted
            If Ctrl-C or SIGTERM came, once the training has a checkpoint, or the scores in hand are written.
        MismatchError
            If another model is where the tuned one is to stay.
        """
        if self.kept is not None:
            run = {"base": tuner.base.weights_hash, "task": self.task.fingerprint, "recipe": self.recipe.model_dump()}
            self.kept.check(self.name, run)
        with self.stopping(folder) as stop:
            tuned = self.tune(tuner, meter, folder, curve)
            with keeping(tuner, folder, lambda: tuned):
                if self.kept is not None:
                    self.kept.save(self.name, tuned)
                return self.judge(tuned, settings, meter, folder, stop)

    @contextmanager
    def stopping(self, folder: Path) -> Iterator[Stop]:
        """Make the folder, and stop the block on a signal where it can go on; the error names the run."""
        make_folder(folder)
        with stoppable("stopping after this step") as stop:
            try:
                yield stop
            except Interrupted as stopped:
                raise stop.interrupted(f"in {self.name}, {stopped}") from None

    def tune(self, tuner: FineTuner, meter: Meter, folder: Path, curve: Curve | None = None) -> Tuned:
        """Fine-tune, from what the folder keeps of this run if there is any; that of another run is removed."""
        from forgetcast.lm.curve import LearningCurve

        def measure(language_model: LanguageModel, share: float) -> None:
            scores = score_with_progress(language_model, self.judged, meter, f"{self.name}: {share:.0%} of the steps")
            (curve or {})[share](scores)

        meter.report(f"{self.name}: starting")  # until the first step, the run before it would stand there
        show, training = meter.on_figures, self.work(tuner.base.context).training
        tune = partial(
            tuner.tune,
            self.task,
            self.recipe,
            plan=self.plan,
            pool=self.pool,
            selector=self.selector,
            initial=self.initial,
            checkpoints=folder,
            on_step=lambda _, steps: meter.advance(f"{self.name}: fine-tuning", "training", training / steps),
            on_loss=None if show is None else lambda loss: show(self.name, {"loss": loss}),
            callbacks=[LearningCurve(tuner.base, curve, measure)] if curve else (),
        )
        try:
            return tune()
        except MismatchError:  # what is unfinished there is of another model, task or recipe, and of no use
            shutil.rmtree(folder)
            make_folder(folder)
            return tune()

    def judge(
        self, tuned: Tuned, settings: Mapping[str, Any], meter: Meter, folder: Path, stop: Stop | None = None
    ) -> Scores:
        """Score the judged examples and the tests; the folder keeps finished scores until the run is stored.

        Returns
        -------
        Scores
            Metadata: the fields of `RunFacts`, and 'cost', see `cost`.

        Raises
        ------
        Interrupted
            If `stop` says so.
        """
        measured = tuned.language_model
        # Of these weights: a training that is repeated on a GPU may not end in the same ones.
        unfinished = folder / f"scores-{measured.weights_hash[:16]}"
        resumed, started = unfinished.exists(), time.monotonic()
        after = score_with_progress(
            measured, self.judged, meter, self.name, self.answers, unfinished=unfinished, keep=True, stop=stop
        )
        scoring = None if resumed else time.monotonic() - started
        tests = {
            task: score_with_progress(measured, test, meter, self.name, stop=stop) for task, test in self.tests.items()
        }
        facts: dict[str, Any] = {
            "settings": dict(settings),
            "losses": {task: float(np.nanmean(scores.nll)) for task, scores in tests.items()},
            "replayed": list(tuned.replayed),
            "steps": tuned.steps,
            "precision": tuned.precision,
            "seconds": tuned.seconds,
            "cost": cost(tuned.seconds, tuned.tokens, scoring, after),
        }
        if self.memory is not None:
            scores = score_with_progress(measured, self.memory, meter, self.name, stop=stop)
            facts["memory"] = dict(zip(self.memory.ids, map(plain, scores.nll.tolist()), strict=True))
        return replace(after, metadata={**after.metadata, **facts})


@contextmanager
def keeping(tuner: FineTuner, folder: Path, tuned: Callable[[], Tuned]) -> Iterator[None]:
    """Keep the tuned weights in the folder if the block is interrupted, so that they are not trained again."""
    try:
        yield
    except Interrupted:
        tuner.keep(tuned(), folder)
        raise


def cost(
    training: float | None, trained: int | None, scoring: float | None, after: Scores
) -> dict[str, dict[str, float | None]]:
    """Return what a run took: seconds, and tokens that were trained on or predicted in scoring; None: unknown."""
    return {
        "training": {"seconds": None if training is None else round(training, 3), "tokens": trained},
        "scoring": {"seconds": None if scoring is None else round(scoring, 3), "tokens": int(after.tokens.sum())},
    }


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
    memory : dict of str to float or None
        Loss of each example of a sequence's memory, nats per target token; None where it is not finite.
    """

    settings: dict[str, Any]
    losses: dict[str, float]
    replayed: list[str]
    steps: int = Field(ge=0)
    seconds: float = Field(ge=0, allow_inf_nan=False)
    cost: dict[str, dict[str, float | None]] = Field(default_factory=dict)
    choice: dict[str, Any] | None = None
    generated: int = 0
    memory: dict[str, float | None] = Field(default_factory=dict)


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

    @abstractmethod
    def unfinished(self, name: str) -> Path:
        """Return the path of a folder for what is unfinished of a run."""

    def ensure(
        self,
        name: str,
        settings: Mapping[str, Any],
        run: Callable[[Path], Scores],
        on_wait: Callable[[str], None] | None = None,
    ) -> bool:
        """Make the run unless it is finished.

        Parameters
        ----------
        name : str
        settings : mapping
        run : callable
            Makes it, given a folder for what is unfinished, which is removed once the run is stored.
        on_wait : callable, optional
            Called with the process that makes the same run, before it is waited for; default: it is not waited for.

        Returns
        -------
        bool
            Whether it is finished: not if another process makes it and is not waited for.
        """
        if self.has(name, settings):
            return True
        folder = self.unfinished(name)
        with claimed(folder, on_wait) as ours:
            if not ours:
                return False
            if not self.has(name, settings):
                self.save(name, run(folder))
            shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # not empty
            folder.parent.rmdir()
        return True


def ensure_all(
    names: Iterable[str], ensure: Callable[[str, Callable[[str], None] | None], bool], report: Callable[[str], None]
) -> None:
    """Make runs that processes share: first those that no other process makes, then what is left of the others.

    Parameters
    ----------
    names : iterable of str
    ensure : callable
        As `RunStore.ensure`, given a name and what to call before waiting.
    report : callable
        Told what is waited for.
    """
    for name in [name for name in names if not ensure(name, None)]:
        ensure(name, lambda who, name=name: report(f"{name}: waiting for {who}, which makes it"))  # type: ignore[misc]


class ScoreFiles(RunStore):
    """A folder with one score file per run."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    def path(self, name: str) -> Path:
        """Return the path of a run's file."""
        return self.directory / f"{name}.parquet"

    def unfinished(self, name: str) -> Path:
        """Return the path of a folder beside the run's file."""
        return self.directory / f"{name}.partial"

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
    place among the rows; `provenance`, what else is known of it; `checkpoints`, the shares of the steps after which it
    is measured too.
    """

    def __init__(self, atlas: Atlas) -> None:
        self.atlas = atlas

    def unfinished(self, name: str) -> Path:
        """Return the path of a folder beside the atlas, or in the current folder if it is a URL."""
        return self.atlas.beside("runs") / f"{folder_of(name)}.partial"

    def has(self, name: str, settings: Mapping[str, Any]) -> bool:
        """Say whether the row is complete, by this process or another one; see `RunStore.has`."""
        self.atlas.refresh()
        if name not in self.atlas:
            return False
        stored = self.atlas.provenance(name)
        check_recipe(f"the row {name!r} of {self.atlas.path}", stored["recipe"], settings["recipe"])
        share = settings.get("share", 1.0)
        views = [self.atlas, *(self.atlas.at(each) for each in settings.get("checkpoints", ()))]
        return all(view.is_complete(name, share=share) for view in views)

    def save(self, name: str, scores: Scores) -> None:
        """Add the row."""
        settings = scores.metadata["settings"]
        facts = {
            **settings.get("provenance", {}),
            **{
                what: scores.metadata[what]
                for what in ("cost", "precision", "text", "versions")
                if what in scores.metadata
            },
        }
        if is_final(scores):
            facts["finished"] = settings.get("share", 1.0)
        self.atlas.add(name, scores, recipe=settings["recipe"], order=settings.get("order"), provenance=facts)


def without_curve(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a row at a share of the steps, which has no such shares itself."""
    return {name: value for name, value in settings.items() if name != "checkpoints"}


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

    settings, text = length_settings(atlas.scored_with, language_model.context), language_model.text_settings
    scored_with = atlas.scored_with
    if scored_with.get("text", text) == text and settings["max_length"] == scored_with.get("max_length"):
        return
    # Another tokenizer or template may still give the same tokens.
    before = atlas.before.subset(pool.ids)
    digests = token_digests(language_model, pool, **settings)
    check_tokens(before, replace(before, digests=digests, metadata={"text": text, **settings}))


def rendering_of(atlas: Atlas) -> Rendering:
    """Return how conversations were rendered for the base scores of an atlas."""
    return Rendering.of(atlas.scored_with)


def base_scores_file(atlas: str | Path) -> Path:
    """Return the path of a file for the unfinished base scores of a new atlas: beside it, or here if it is a URL."""
    return beside(atlas, "before.partial")


def score_base(
    base: LanguageModel,
    pool: Pool,
    answers: Mapping[str, Any] | None,
    on_progress: OnProgress | Meter | None,
    unfinished: Path | None = None,
) -> Scores:
    """Score the pool of a new atlas by its base model, as `score_with_progress`."""
    meter, work = Meter.of(on_progress), scoring_work(pool, base.context, answered=answers is not None)
    meter.begin(work)
    before = dict(meter.left)
    scores = score_with_progress(base, pool, meter, "base model", answers, unfinished=unfinished)
    meter.settle(before, work, "base model: finished")  # examples without a question, too
    return scores


def answer_settings(atlas: Atlas) -> dict[str, Any]:
    """Return the arguments of `lm.exact_match` with which the base model of an atlas answered."""
    return {"max_new_tokens": atlas.scored_with.get("max_new_tokens", ANSWER_TOKENS)}


def score_with_progress(
    language_model: LanguageModel,
    pool: Pool,
    meter: Meter,
    name: str,
    answers: Mapping[str, Any] | None = None,
    *,
    unfinished: Path | None = None,
    keep: bool = False,
    stop: Stop | None = None,
    **settings: Any,
) -> Scores:
    """Score a pool, and answer its prompts.

    Parameters
    ----------
    language_model : LanguageModel
    pool : Pool
    meter : Meter
    name : str
        Label in the progress display.
    answers : mapping, optional
        Arguments of `lm.exact_match`; default: no answers.
    unfinished : Path, optional
        File of finished scores, from which an interrupted call goes on; one for answers is beside it.
    keep : bool
        Whether these files stay at the end.
    stop : Stop, optional
        Looked at after every batch.
    **settings
        Of `lm.score`.

    Raises
    ------
    Interrupted
        If `stop` says so.
    """
    from forgetcast.lm import exact_match, score

    def measured(what: str, kind: str) -> Callable[[int], None]:
        advance, done = meter.scored(pool, language_model.context, f"{name}: {what}", kind), 0

        def count(finished: int) -> None:
            nonlocal done
            done += finished
            advance(finished)
            if stop:
                raise stop.interrupted(f"{what}, after {done} of {len(pool)} examples")

        return count

    scores = score(
        language_model,
        pool,
        **settings,
        partial=unfinished,
        keep_partial=keep or answers is not None,
        on_progress=measured("scoring", "scoring"),
    )
    if answers is None:
        return scores
    file = None if unfinished is None else unfinished.with_name(f"{unfinished.name}.answers")
    right, predictions = exact_match(
        language_model, pool, partial=file, on_progress=measured("answering", "answering"), **answers
    )
    if unfinished is not None and file is not None and not keep:
        unfinished.unlink(missing_ok=True)
        file.unlink(missing_ok=True)
    metadata = {**scores.metadata, "max_new_tokens": answers["max_new_tokens"]}
    return replace(scores, exact_match=right, predictions=predictions, metadata=metadata)
