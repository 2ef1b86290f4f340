"""What a sweep would do: its rows and tokens, and the time by a few steps and scores that are timed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from forgetcast.atlas.index import check_writable, is_atlas
from forgetcast.atlas.store import Atlas
from forgetcast.data.pool import Pool
from forgetcast.errors import DataError
from forgetcast.experiments.collect import (
    CollectConfig,
    PlannedRow,
    check_fits,
    command_trainer,
    load_base,
    unfinished,
)
from forgetcast.experiments.command import CommandTrainer
from forgetcast.experiments.runs import AtlasRows, base_scores_file
from forgetcast.experiments.speed import time_answers, time_scoring, time_training, timed_sample
from forgetcast.progress import OnProgress

if TYPE_CHECKING:
    from forgetcast.lm import LanguageModel

State = Literal["complete", "begun", "to do"]


@dataclass(frozen=True)
class DryRow:
    """A row of a sweep.

    Attributes
    ----------
    name, task : str
    seed : int
    state : 'complete', 'begun' or 'to do'
    examples : int
        Of the task.
    trained : int or None
        Examples that the fine-tune reads, those that come again counted again; None: a command trains.
    tokens : int or None
        Tokens that it reads, cut as the recipe says, without padding.
    cut : int or None
        How many of `trained` are longer than the recipe's max_length.
    fault : str or None
        Why the row would fail.
    seconds : float or None
        Estimate for the whole row, training and scoring; 0 if it is complete, None if it is not known.
    """

    name: str
    task: str
    seed: int
    state: State
    examples: int
    trained: int | None = None
    tokens: int | None = None
    cut: int | None = None
    fault: str | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class SweepSpeed:
    """How fast this machine is with the model of a sweep, in seconds.

    Attributes
    ----------
    setup : float or None
        Of a fine-tune, besides its steps; None: a command trains.
    trained_token, scored_token, answered_prompt : float
        Of one each.
    """

    scored_token: float
    answered_prompt: float = 0.0
    setup: float | None = None
    trained_token: float | None = None


@dataclass(frozen=True)
class PoolSize:
    """What is to be scored.

    Attributes
    ----------
    examples : int
    tokens : int
        That the model reads, without padding.
    cut : int
        Examples that are longer than the model's context.
    unscorable : int
        Examples without a loss, such as those of a single token.
    prompts : int
        That are answered, with `exact_match`.
    """

    examples: int
    tokens: int
    cut: int
    unscorable: int
    prompts: int = 0

    def seconds(self, speed: SweepSpeed) -> float:
        """Estimate of scoring and answering all of it once."""
        return self.tokens * speed.scored_token + self.prompts * speed.answered_prompt


@dataclass(frozen=True)
class DryRun:
    """What a sweep would do.

    Attributes
    ----------
    atlas, model : str
    base : 'complete', 'begun' or 'to do'
        The base model's scores.
    pool : PoolSize
    rows : tuple of DryRow
    steps, batch_size : int or None
        Of each fine-tune; none of them replays anything. None: a command trains.
    score_share : float
        Share of the pool that is scored for a row, at its end and at each of the checkpoints.
    checkpoints : int
        How many a row has.
    speed : SweepSpeed or None
        None if nothing is left to do, so that nothing was timed.
    """

    atlas: str
    model: str
    base: State
    pool: PoolSize
    rows: tuple[DryRow, ...]
    steps: int | None
    batch_size: int | None
    score_share: float
    checkpoints: int
    speed: SweepSpeed | None = None

    @property
    def left(self) -> list[DryRow]:
        """Rows that would be made."""
        return [row for row in self.rows if row.state != "complete" and row.fault is None]

    @property
    def training_tokens(self) -> int | None:
        """Tokens that the rows left train on; None if a command trains."""
        return None if self.steps is None else sum(row.tokens or 0 for row in self.left)

    @property
    def scoring_tokens(self) -> int:
        """Tokens that are scored, the base model's included; about so many where a share of the pool is scored."""
        times = self.score_share * (1 + self.checkpoints) * len(self.left)
        return round(self.pool.tokens * ((self.base != "complete") + times))

    @property
    def seconds(self) -> float | None:
        """Estimate for everything that is left, in one process and without loading the model; None if not known.

        Of what was begun, all of it is counted.
        """
        if self.speed is None:
            return 0.0
        of_rows = [row.seconds for row in self.left]
        if any(seconds is None for seconds in of_rows):
            return None
        of_base = 0.0 if self.base == "complete" else self.pool.seconds(self.speed)
        return of_base + sum(seconds for seconds in of_rows if seconds is not None)

    def timed(self, speed: SweepSpeed) -> DryRun:
        """Return the same with the times by a speed; at checkpoints the pool is scored, and not answered."""
        on_the_way = self.checkpoints * self.pool.tokens * speed.scored_token
        scoring = self.score_share * (self.pool.seconds(speed) + on_the_way)

        def seconds(row: DryRow) -> float | None:
            if row.state == "complete":
                return 0.0
            if row.tokens is None or speed.setup is None or speed.trained_token is None:
                return None
            return speed.setup + row.tokens * speed.trained_token + scoring

        return replace(self, rows=tuple(replace(row, seconds=seconds(row)) for row in self.rows), speed=speed)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields and sums, ready for JSON; seconds are rounded."""

        def rounded(value: float | None, digits: int = 1) -> float | None:
            return None if value is None else round(value, digits)

        speed = None if self.speed is None else {name: rounded(value, 9) for name, value in vars(self.speed).items()}
        return {
            "atlas": self.atlas,
            "model": self.model,
            "base_scores": self.base,
            "pool": dict(vars(self.pool)),
            "steps": self.steps,
            "batch_size": self.batch_size,
            "rows": [{**vars(row), "seconds": rounded(row.seconds)} for row in self.rows],
            "rows_left": len(self.left),
            "training_tokens": self.training_tokens,
            "scoring_tokens": self.scoring_tokens,
            "score_share": self.score_share,
            "checkpoints": self.checkpoints,
            "seconds_each": speed,
            "estimated_seconds": rounded(self.seconds),
        }


def plan_sweep(
    config: CollectConfig,
    pool: Pool,
    tasks: Mapping[str, Pool],
    load: Callable[[str | Path], LanguageModel],
    *,
    only: Collection[str] = (),
    on_progress: OnProgress | None = None,
) -> DryRun:
    """Find out what `run_sweep` would do, and time a few steps and scores; parameters as there. Nothing is stored.

    Raises
    ------
    ForgetcastError, OSError
        As `run_sweep`; a row that would fail because of its task has a `fault` instead.
    """
    report = on_progress or (lambda *_: None)
    check_writable(config.atlas)
    sweep = config.sweep(only)
    rows = sweep.rows(tasks, config.recipe.seed)
    trainer = command_trainer(config, load)
    report(f"loading {config.model}", 0, 0)
    base = load_base(config, load)
    atlas = Atlas.open(config.atlas) if is_atlas(config.atlas) else None
    todo = rows
    if atlas is not None:
        recipe = config.trainer or config.recipe
        check_fits(atlas, base, pool, recipe, config.max_new_tokens if config.exact_match else None)
        todo = unfinished(atlas, rows, recipe.model_dump(), sweep)
    report("counting tokens", 0, 0)
    scorable, size = _size(base, pool, answered=config.exact_match)
    counted = _Rows(config, tasks, base, trainer, atlas, {row.name for row in todo})
    found = DryRun(
        atlas=str(config.atlas),
        model=config.model,
        base="complete" if atlas is not None else "begun" if base_scores_file(config.atlas).exists() else "to do",
        pool=size,
        rows=tuple(counted.row(row) for row in rows),
        steps=None if trainer else config.recipe.steps,
        batch_size=None if trainer else config.recipe.batch_size,
        score_share=config.score_share,
        checkpoints=len(config.checkpoints),
    )
    if not found.left and found.base == "complete":
        return found
    report("timing a few steps and scores", 0, 0)
    return found.timed(_speed(config, found, tasks, base, scorable))


def _size(base: LanguageModel, pool: Pool, *, answered: bool) -> tuple[Pool, PoolSize]:
    """Count what is to be scored; return the examples that can be, too.

    Raises
    ------
    DataError
        If there is none.
    """
    from forgetcast.lm.score import prepare
    from forgetcast.lm.tokens import question

    inputs = prepare(base, pool, None, None)
    ids = [id_ for id_, reason in zip(pool.ids, inputs.reasons, strict=True) if not reason]
    if not ids:
        raise DataError(f"{base.name} scores no example; of {pool.ids[0]!r}: {inputs.reasons[0]}")
    asked = (question(example, base.tokenizer, base.rendering) for example in pool) if answered else ()
    return pool.subset(ids), PoolSize(
        examples=len(pool),
        tokens=sum(len(piece.ids) for _, piece in inputs.pieces),
        cut=sum(encoded.truncated for encoded in inputs.encoded),
        unscorable=len(pool) - len(ids),
        prompts=sum(each is not None for each in asked),
    )


@dataclass(frozen=True)
class _Rows:
    """Counts the rows of a sweep."""

    config: CollectConfig
    tasks: Mapping[str, Pool]
    base: LanguageModel
    trainer: CommandTrainer | None
    atlas: Atlas | None
    todo: Collection[str]

    def row(self, planned: PlannedRow) -> DryRow:
        """Count the tokens of a row."""
        from forgetcast.lm import ReplayMixture

        task, recipe = self.tasks[planned.task], self.config.recipe
        row = DryRow(planned.name, planned.task, planned.seed, self._state(planned.name), len(task))
        if self.trainer is not None:
            return row
        try:
            mixture = ReplayMixture(
                task,
                self.base.tokenizer,
                steps=recipe.steps,
                batch_size=recipe.batch_size,
                max_length=min(recipe.max_length, self.base.context),
                seed=planned.seed,
                rendering=self.base.rendering,
            )
        except DataError as error:  # of this task alone
            return replace(row, fault=str(error))
        cut = sum(mixture[i].truncated for i in range(len(mixture)))
        return replace(row, trained=len(mixture), tokens=mixture.tokens_before(mixture.steps), cut=cut)

    def _state(self, name: str) -> State:
        if name not in self.todo:
            return "complete"
        begun = self.atlas is not None and AtlasRows(self.atlas).unfinished(name).exists()
        return "begun" if begun or (self.trainer is not None and self.trainer.has_model(name)) else "to do"


def _speed(
    config: CollectConfig, found: DryRun, tasks: Mapping[str, Pool], base: LanguageModel, scorable: Pool
) -> SweepSpeed:
    """Time the fine-tune of the task whose tokens are in the middle, and the scores of some examples."""
    from forgetcast.lm import FineTuner

    sample = timed_sample(scorable, config.recipe.seed)
    _, size = _size(base, sample, answered=config.exact_match)
    speed = SweepSpeed(time_scoring(base, sample) / size.tokens)
    if size.prompts:
        seconds = time_answers(base, sample, config.max_new_tokens)
        speed = replace(speed, answered_prompt=seconds / size.prompts)
    if config.trainer is None and found.left:
        ordered = sorted(found.left, key=lambda row: (row.tokens or 0, row.name))
        middle = ordered[len(ordered) // 2]
        recipe = config.recipe.model_copy(update={"seed": middle.seed})
        timed = time_training(FineTuner(base), tasks[middle.task], recipe)
        speed = replace(speed, setup=timed.setup, trained_token=timed.step / timed.tokens)
    return speed
