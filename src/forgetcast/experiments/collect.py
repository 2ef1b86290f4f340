"""Collect an atlas: fine-tune the base model on every task in turn, score the pool after each, add a row.

Complete rows are skipped, so an interrupted sweep continues where it stopped, within the row in hand. A row does not
depend on the others, nor on the process that makes it, so any number of processes share the rows: each claims the one
that it makes.
"""

from __future__ import annotations

import errno
import gc
import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from forgetcast.atlas.index import check_writable, is_atlas
from forgetcast.atlas.matrix import check_fingerprint
from forgetcast.atlas.storage import beside, is_url
from forgetcast.atlas.store import Atlas, check_name, check_share
from forgetcast.data.pool import Pool, load_task
from forgetcast.data.reader import SUFFIXES, data_name, is_data_file
from forgetcast.data.recipe import Recipe
from forgetcast.data.rendering import Rendering
from forgetcast.defaults import ANSWER_TOKENS
from forgetcast.errors import ConfigError, DataError, ForgetcastError, IncompleteError, MismatchError
from forgetcast.experiments.claims import claimed
from forgetcast.experiments.command import CommandTrainer, TrainerSettings
from forgetcast.experiments.kept import KeptModels
from forgetcast.experiments.meter import Meter, OnFigures, Work, scoring_work, training_work, tuning_work
from forgetcast.experiments.runs import (
    AtlasRows,
    FineTune,
    answer_settings,
    base_scores_file,
    check_base,
    check_recipe,
    ensure_all,
    score_base,
    without_curve,
)
from forgetcast.files import check_destination, neighbour
from forgetcast.progress import OnProgress
from forgetcast.settings import read_settings
from forgetcast.text import did_you_mean

if TYPE_CHECKING:
    from forgetcast.lm import FineTuner, LanguageModel
    from forgetcast.lm.generate import Metric
    from forgetcast.measure.scores import Scores


FEWEST_FOR_A_SHARE = 16
"""With fewer tasks of which a share is scored, forecasts were worse than from no history (`benchmarks/cost.py`)."""

_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class PlannedRow:
    """A row that is to be in the atlas.

    Attributes
    ----------
    name : str
        The task's name; with the seed, unless it is the first one.
    task : str
    seed : int
    order : int
        Place among the rows, whatever process makes it.
    """

    name: str
    task: str
    seed: int
    order: int


@dataclass(frozen=True)
class Sweep:
    """Which rows are made, and how.

    Attributes
    ----------
    seeds : sequence of int
        A row per task and seed; default: the recipe's seed. The first one's row has the name of the task, the others
        "TASK seed 1".
    only : collection of str
        Tasks or rows to make, by name; default: all.
    score_share : float
        Share of the pool, in (0, 1], that is scored for a task: a random sample, the same for all seeds.
    retries : int
        How often a row is tried again after a failure that may pass: of memory, or of a file system.
    checkpoints : sequence of float
        Shares of the steps, in (0, 1), after which the examples are scored too. A row is complete with these.
    keep_models : Path, optional
        Folder in which the tuned models stay; default: they go once their rows are stored.
    """

    seeds: Sequence[int] = ()
    only: Collection[str] = ()
    score_share: float = 1.0
    retries: int = 1
    checkpoints: Sequence[float] = ()
    keep_models: Path | None = None

    def rows(self, tasks: Iterable[str], seed: int = 0) -> list[PlannedRow]:
        """Return the rows to make.

        Parameters
        ----------
        tasks : iterable of str
        seed : int
            That of the recipe.

        Raises
        ------
        ConfigError
            If `only` names something else.
        DataError
            If a row cannot have its name, or two would have the same.
        """
        names, seeds = list(tasks), tuple(dict.fromkeys(self.seeds)) or (seed,)
        rows = [
            PlannedRow(name if i == 0 else f"{name} seed {seed}", name, seed, place * len(seeds) + i)
            for place, name in enumerate(names)
            for i, seed in enumerate(seeds)
        ]
        taken = dict[str, PlannedRow]()
        for row in rows:
            check_name(row.name)
            if row.name in taken:
                raise DataError(f"two rows would be called {row.name!r}: rename the file of the task {row.name!r}")
            taken[row.name] = row
        if unknown := [name for name in self.only if name not in names and name not in taken]:
            hint = did_you_mean(unknown[0], [*names, *taken])
            raise ConfigError(f"--only {unknown[0]}: there is no such task; there are {', '.join(names)}{hint}")
        return [row for row in rows if not self.only or row.name in self.only or row.task in self.only]


class CollectConfig(BaseModel):
    """Contents of the YAML file of `forgetcast collect`; paths are relative to that file.

    Attributes
    ----------
    model : str
        A directory or a hub id.
    pool : Path
    tasks : Path or list of Path
        A folder of JSONL or Parquet files, one task each, or the files.
    atlas : Path
        Created if it does not exist, extended if it does.
    recipe : Recipe
        Its fields, a file with them, or the name of one that ships with the package.
    exact_match : bool
        Whether the models also answer the pool's prompts.
    max_new_tokens : int
        Longest answer.
    rendering : Rendering
        How conversations are rendered: `date`, `thinking`.
    seeds : list of int, optional
        A row per task and seed; default: the recipe's seed.
    score_share : float
        Share of the pool, in (0, 1], that is scored for a task.
    retries : int
        How often a row is tried again after a failure that may pass.
    trainer : TrainerSettings, optional
        A command that fine-tunes, instead of a recipe.
    checkpoints : list of float
        Shares of the steps, in (0, 1), after which the pool is scored too: the learning curves.
    keep_models : Path, optional
        Folder in which the tuned models stay.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    pool: Path
    tasks: Path | list[Path]
    atlas: Path | str
    recipe: Recipe = Recipe()
    exact_match: bool = False
    max_new_tokens: int = Field(default=ANSWER_TOKENS, ge=1)
    rendering: Rendering = Rendering()
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = []
    score_share: float = Field(default=1.0, gt=0, le=1)
    retries: int = Field(default=1, ge=0)
    trainer: TrainerSettings | None = None
    checkpoints: list[float] = []
    keep_models: Path | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_no_recipe(cls, content: Any) -> Any:
        needed = [name for name, field in cls.model_fields.items() if field.is_required()]
        if isinstance(content, dict) and content.keys() & Recipe.model_fields and not content.keys() & set(needed):
            raise ValueError(
                f"this is a recipe, and a configuration is needed: a file with the fields {', '.join(needed)}, in "
                "which the field recipe names this one"
            )
        return content

    @field_validator("checkpoints")
    @classmethod
    def _shares(cls, values: list[float]) -> list[float]:
        for share in values:
            try:
                check_share(share)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return sorted(set(values))

    @model_validator(mode="after")
    def _one_way_to_train(self) -> Self:
        if self.trainer is not None and self.checkpoints:
            raise ValueError("checkpoints: nothing is known of a trainer's command before it ends; leave them out")
        if self.trainer is not None and self.keep_models is not None:
            raise ValueError("keep_models: the models of a trainer's command stay with keep: true below trainer")
        if self.trainer is not None and "recipe" in self.model_fields_set:
            raise ValueError("recipe: the trainer's command does not use it; leave one of the two out")
        if self.trainer is not None and len(self.seeds) > 1 and not self.trainer.has_seed:
            raise ValueError("trainer.command: {seed} is missing, so all seeds would give the same model")
        return self

    @field_validator("recipe", mode="before")
    @classmethod
    def _named(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, str):
            return value
        file = (info.context or Path()) / value
        return Recipe.load(file if file.exists() else value)

    @classmethod
    def load(cls, path: str | Path) -> CollectConfig:
        """Read and check a YAML file.

        Raises
        ------
        ConfigError
            Names the file and the field.
        """
        config = read_settings(Path(path), cls)
        base = Path(path).parent
        tasks = [base / t for t in config.tasks] if isinstance(config.tasks, list) else base / config.tasks
        model = str(base / config.model) if (base / config.model).exists() else config.model
        recipe = config.recipe.model_copy(update={"seed": config.seeds[0]}) if config.seeds else config.recipe
        atlas = str(config.atlas) if is_url(config.atlas) else base / config.atlas
        kept = None if config.keep_models is None else base / config.keep_models
        places = {"pool": base / config.pool, "tasks": tasks, "atlas": atlas, "keep_models": kept}
        return config.model_copy(update={"model": model, "recipe": recipe, **places})

    def sweep(self, only: Collection[str] = ()) -> Sweep:
        """Return which rows are made, and how."""
        return Sweep(
            seeds=tuple(self.seeds),
            only=tuple(only),
            score_share=self.score_share,
            retries=self.retries,
            checkpoints=tuple(self.checkpoints),
            keep_models=self.keep_models,
        )

    def load_tasks(self, read: Callable[[Path], Pool] = load_task) -> dict[str, Pool]:
        """Read every task, by the name of its file without the ending.

        Parameters
        ----------
        read : callable, optional
            Reads a file; default: `load_task`.

        Raises
        ------
        DataError
            If there are none, or two have the same name.
        """
        return load_tasks(self.tasks, read)


def load_tasks(where: Path | Sequence[Path], read: Callable[[Path], Pool] = load_task) -> dict[str, Pool]:
    """Read every task of a folder, or of a list of files, by the name of its file without the ending.

    Parameters
    ----------
    where : Path or sequence of Path
        A folder of files, each of them a task, or the files.
    read : callable, optional
        Reads a file; default: `load_task`.

    Raises
    ------
    DataError
        If there are none, or two have the same name.
    """
    return {name: read(file) for name, file in task_files(where).items()}


def task_files(where: Path | Sequence[Path]) -> dict[str, Path]:
    """Find the files of tasks by their names without the ending; see `load_tasks`."""
    if not isinstance(where, Path):
        files = list(where)
    elif where.is_dir():
        files = sorted(path for path in where.iterdir() if is_data_file(path))
    else:
        raise DataError(f"{where}: there is no such folder of tasks{neighbour(where)}")
    if not files:
        raise DataError(f"{where} holds no task: no {', '.join(SUFFIXES)} file")
    found: dict[str, Path] = {}
    for file in files:
        name = data_name(file)
        if name in found:
            raise DataError(f"two tasks are called {name!r}; give their files different names")
        found[name] = file
    return found


def prepare_atlas(
    path: str | Path,
    base: LanguageModel,
    pool: Pool,
    recipe: Recipe | TrainerSettings,
    *,
    exact_match: bool = False,
    max_new_tokens: int = ANSWER_TOKENS,
    metric: Metric | None = None,
    on_progress: OnProgress | Meter | None = None,
) -> Atlas:
    """Open an atlas and check that it fits, or create it by scoring the base model.

    Parameters
    ----------
    path : path
    base : LanguageModel
    pool : Pool
        Upstream examples.
    recipe : Recipe or TrainerSettings
        How the model of every row is tuned.
    exact_match : bool
        Whether the models also answer the pool's prompts, so that flips are counted.
    max_new_tokens : int
        Longest answer.
    metric : callable, optional
        Maps an answer and the expected one to 1 or 0; default: exact match.
    on_progress : callable or Meter, optional
        A meter is one that later stages share.

    Raises
    ------
    MismatchError
        If the atlas has another model, pool, recipe or way to measure answers.
    DataError, OSError
        If it can be neither created nor written to, before anything is scored.
    """
    check_writable(path)
    if not is_atlas(path):
        unfinished = base_scores_file(path)
        meter = Meter.of(on_progress)
        with claimed(unfinished, lambda who: meter.waiting(f"waiting for {who}, which scores the base model")):
            if not is_atlas(path):
                answers = _answers(max_new_tokens, metric) if exact_match else None
                before = score_base(base, pool, answers, meter, unfinished)
                try:
                    return Atlas.create(path, pool, before, model=base.name, recipe=recipe.model_dump())
                except MismatchError:
                    raise
                except DataError:
                    if not is_atlas(path):
                        raise
                    # A process on another machine, without a common lock, has created it meanwhile.
    atlas = Atlas.open(path)
    check_fits(atlas, base, pool, recipe, max_new_tokens if exact_match else None)
    return atlas


def check_fits(
    atlas: Atlas, base: LanguageModel, pool: Pool, recipe: Recipe | TrainerSettings, max_new_tokens: int | None
) -> None:
    """Check that rows can be added to an atlas; `max_new_tokens` is the longest answer, None if there are none.

    Raises
    ------
    MismatchError
        If it has another model, pool, recipe or way to measure answers.
    """
    check_fingerprint(f"the atlas {atlas.path}", atlas.pool.fingerprint, pool)
    check_base(atlas, base)
    check_recipe(f"the atlas {atlas.path}", atlas.recipe, recipe.model_dump())
    _check_answers(atlas, max_new_tokens)


def collect(
    tuner: FineTuner | CommandTrainer,
    atlas: Atlas,
    recipe: Recipe,
    tasks: Mapping[str, Pool],
    *,
    sweep: Sweep | None = None,
    metric: Metric | None = None,
    on_progress: OnProgress | Meter | None = None,
    on_figures: OnFigures | None = None,
) -> Atlas:
    """Measure the base model's forgetting after each task.

    Parameters
    ----------
    tuner : FineTuner or CommandTrainer
        With the base model.
    atlas : Atlas
        Gets the rows. If it has the base model's answers, the tuned models answer too.
    recipe : Recipe
        Of a CommandTrainer, only the seed is used.
    tasks : mapping of str to Pool
        Fine-tuning data by task name; all of the sweep, because a row's place is that of its task.
    sweep : Sweep, optional
        Which rows are made, and how; default: a row per task.
    metric : callable, optional
        As in `prepare_atlas`.
    on_progress : callable or Meter, optional
        A meter is one that other stages share.
    on_figures : callable, optional

    Raises
    ------
    MismatchError
        If the atlas is of another base model or recipe.
    IncompleteError
        If rows failed; all others were made.
    OSError
        If a disk is full; finished rows are kept.
    """
    sweep = sweep or Sweep()
    if isinstance(tuner, CommandTrainer):
        if sweep.checkpoints:
            raise ConfigError("checkpoints need a recipe: nothing is known of a trainer's command before it ends")
        if sweep.keep_models is not None:
            raise ConfigError("keep_models is for a recipe: a trainer's command has its own setting, keep")
        tuner.check()
        facts = tuner.recipe
    else:
        check_base(atlas, tuner.base)
        facts = recipe.model_dump()
    check_recipe(f"the atlas {atlas.path}", atlas.recipe, facts)
    rows, planned = AtlasRows(atlas), sweep.rows(tasks, recipe.seed)
    answers = _answers(**answer_settings(atlas), metric=metric) if atlas.has_answers else None
    judged = {task: _sample(atlas, task, sweep.score_share) for task in dict.fromkeys(row.task for row in planned)}
    todo = unfinished(atlas, planned, facts, sweep)
    if isinstance(tuner, CommandTrainer):
        for row in set(planned) - set(todo):  # of a process that was stopped after it had stored the row
            tuner.discard(row.name)
    context = None if isinstance(tuner, CommandTrainer) else tuner.base.context
    per_row = {
        row.name: _row_work(recipe, tasks[row.task], judged[row.task], context, atlas.has_answers, tuner)
        + scoring_work(judged[row.task], context) * len(sweep.checkpoints)
        for row in todo
    }
    kept = None if sweep.keep_models is None else KeptModels(sweep.keep_models)
    if kept is not None:
        check_destination(kept.folder, folder=True)
    meter, failures = Meter.of(on_progress, on_figures), dict[str, str]()
    meter.begin(sum(per_row.values(), Work()))

    def make(row: PlannedRow, settings: dict[str, Any], before: dict[str, float], folder: Path) -> Scores:
        meter.left = dict(before)  # where it failed before, and is tried again
        task, sample = tasks[row.task], judged[row.task]
        if isinstance(tuner, CommandTrainer):
            after = tuner.run(row.name, task, sample, settings, meter, answers)
        else:
            seeded = recipe.model_copy(update={"seed": row.seed})
            fine_tune = FineTune(row.name, task, seeded, sample, answers=answers, kept=kept)
            after = fine_tune.run(tuner, settings, meter, folder, _curve(atlas, row.name, settings))
        if meter.on_figures is not None:
            meter.on_figures(row.name, _figures(atlas, after))
        return after

    def ensure(name: str, on_wait: Callable[[str], None] | None) -> bool:
        row, before, finished = by_name[name], dict(meter.left), False
        settings = _settings(row, facts, sweep)

        def make_it() -> None:
            nonlocal finished
            finished = rows.ensure(name, settings, partial(make, row, settings, before), on_wait)

        reason = _try(make_it, sweep.retries)
        if reason is None and not finished:
            return False
        if reason is not None and not rows.has(name, settings):
            failures[name] = reason
        elif isinstance(tuner, CommandTrainer) and rows.has(name, settings):
            tuner.discard(name)
        meter.settle(before, per_row[name], f"{name}: {'failed' if name in failures else 'finished'}")
        return True

    by_name = {row.name: row for row in todo}
    ensure_all(by_name, ensure, meter.waiting)
    if not isinstance(tuner, CommandTrainer):
        tuner.restore()
    if failures:
        done = f"{atlas.path}: {len(todo) - len(failures)} of {len(todo)} rows were made"
        raise IncompleteError(done, failures)
    return atlas


def _curve(atlas: Atlas, name: str, settings: Mapping[str, Any]) -> dict[float, Callable[[Scores], None]]:
    """Return what to do with the scores at each share of the steps that is not measured yet: store them."""

    def store(curves: AtlasRows) -> Callable[[Scores], None]:
        return lambda scores: curves.save(name, replace(scores, metadata={**scores.metadata, "settings": settings}))

    at = {share: AtlasRows(atlas.at(share)) for share in settings.get("checkpoints", ())}
    return {share: store(curves) for share, curves in at.items() if not curves.has(name, without_curve(settings))}


def _figures(atlas: Atlas, after: Scores) -> dict[str, float]:
    """Return the figures of a run that has ended; see `OnFigures`."""
    columns = atlas.examples.positions(after.ids, where="the scores")
    speeds = {
        part: spent["tokens"] / spent["seconds"]
        for part, spent in after.metadata["cost"].items()
        if spent["tokens"] is not None and spent["seconds"]
    }
    return {"forgetting": float(np.nanmean(after.nll - atlas.nll_before[columns])), **speeds}


def _row_work(
    recipe: Recipe, task: Pool, judged: Pool, context: int | None, answered: bool, tuner: object = None
) -> Work:
    """Return the work of a row; of what a command does with the task, once through it."""
    if isinstance(tuner, CommandTrainer):
        return training_work(task, len(task), None) + scoring_work(judged, context, answered=answered)
    assert context is not None
    return tuning_work(task, recipe, context) + scoring_work(judged, context, answered=answered)


def _settings(row: PlannedRow, recipe: Mapping[str, Any], sweep: Sweep) -> dict[str, Any]:
    """Return the settings of a row; see `AtlasRows`."""
    provenance: dict[str, Any] = {"task": row.task, "seed": row.seed}
    if sweep.score_share < 1:
        provenance |= {"score_share": sweep.score_share, "sample_seed": _sample_seed(row.task)}
    return {
        "recipe": {**recipe, "seed": row.seed},
        "share": sweep.score_share,
        "order": row.order,
        "provenance": provenance,
        "checkpoints": list(sweep.checkpoints),
    }


def _sample(atlas: Atlas, task: str, share: float) -> Pool:
    """Return the examples that are scored for a task: a larger share's include those of a smaller one."""
    if share >= 1:
        return atlas.pool
    scorable = int(np.count_nonzero(~np.isnan(atlas.nll_before)))
    ids = atlas.hold_out(min(share, scorable / len(atlas.pool)), seed=_sample_seed(task))
    if not ids:
        raise ConfigError(f"score_share {share:g} of {len(atlas.pool)} examples is not one; choose a larger share")
    return atlas.pool.subset(ids)


def _sample_seed(task: str) -> int:
    return int.from_bytes(hashlib.sha256(task.encode()).digest()[:4])


def _try(make: Callable[[], None], retries: int) -> str | None:
    """Make a row, again after a failure that may pass; return why it failed, None if it did not.

    Raises
    ------
    ConfigError
        If a setting is invalid, which holds for all rows.
    OSError
        If a disk is full.
    """
    for left in range(retries, -1, -1):
        try:
            make()
            return None
        except ConfigError:
            raise
        # Whatever the Trainer, a model's own code or a file system raise, the other tasks do not depend on it.
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _FULL:
                raise
            again = left > 0 and _may_pass(error)
            reason = " ".join(str(error).split())[:300]
            if not isinstance(error, ForgetcastError) or not reason:
                reason = f"{type(error).__name__}: {reason}".removesuffix(": ")
        if not again:
            return reason
        _free_memory()
    return None


def _may_pass(error: Exception) -> bool:
    """Whether a failure is of memory or of a file system. PyTorch has no class for the memory of a CPU."""
    if isinstance(error, RuntimeError):
        return "memory" in str(error)
    return isinstance(error, MemoryError | OSError)


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run_sweep(
    config: CollectConfig,
    pool: Pool,
    tasks: Mapping[str, Pool],
    load: Callable[[str | Path], LanguageModel],
    *,
    only: Collection[str] = (),
    on_progress: OnProgress | None = None,
    on_figures: OnFigures | None = None,
) -> Atlas:
    """Do what the configuration of a sweep says.

    Parameters
    ----------
    config : CollectConfig
    pool : Pool
    tasks : mapping of str to Pool
        All tasks of the configuration.
    load : callable
        Loads the base model, and what a trainer's command leaves.
    only : collection of str
        Tasks or rows to make; default: all.
    on_progress, on_figures : callable, optional

    Raises
    ------
    ForgetcastError, OSError
        As `prepare_atlas` and `collect`.
    """
    from forgetcast.lm import FineTuner

    sweep = config.sweep(only)
    rows = sweep.rows(tasks, config.recipe.seed)
    trainer = command_trainer(config, load)
    meter = Meter.of(on_progress, on_figures)

    def later(context: int) -> Work:
        of_pool = scoring_work(pool, context, answered=config.exact_match) * config.score_share
        of_pool += scoring_work(pool, context) * (config.score_share * len(config.checkpoints))
        each = [_row_work(config.recipe, tasks[row.task], pool, context, False, trainer) for row in rows]
        return sum((replace(work, scoring=0.0) + of_pool for work in each), Work())

    meter.waiting(f"loading {config.model}")
    atlas, base = prepare_sweep(config, pool, load, on_progress=meter, later=later)
    tuner = trainer or FineTuner(base)
    del base  # a command needs the memory
    return collect(
        tuner,
        atlas,
        config.recipe,
        tasks,
        sweep=sweep,
        on_progress=meter,
    )


def prepare_sweep(
    config: CollectConfig,
    pool: Pool,
    load: Callable[[str | Path], LanguageModel],
    *,
    on_progress: OnProgress | Meter | None = None,
    later: Callable[[int], Work] | None = None,
) -> tuple[Atlas, LanguageModel]:
    """Open or create the atlas of a sweep; return it with the base model. Parameters and errors as for `run_sweep`.

    `later`, if given, returns the work after it for a model of a context.
    """
    base = load_base(config, load)
    meter = Meter.of(on_progress)
    if later is not None:
        meter.later = later(base.context)
    atlas = prepare_atlas(
        config.atlas,
        base,
        pool,
        config.trainer or config.recipe,
        exact_match=config.exact_match,
        max_new_tokens=config.max_new_tokens,
        on_progress=meter,
    )
    meter.later = Work()
    return atlas, base


def load_base(config: CollectConfig, load: Callable[[str | Path], LanguageModel]) -> LanguageModel:
    """Load the base model of a sweep."""
    base = replace(load(config.model), rendering=config.rendering)
    return base.merged() if config.trainer is None else base  # as the tuner does


def unfinished(atlas: Atlas, rows: Iterable[PlannedRow], recipe: Mapping[str, Any], sweep: Sweep) -> list[PlannedRow]:
    """Return the rows of a sweep that are not complete; raises MismatchError where one has another recipe."""
    stored = AtlasRows(atlas)
    return [row for row in rows if not stored.has(row.name, _settings(row, recipe, sweep))]


def command_trainer(config: CollectConfig, load: Callable[[str | Path], LanguageModel]) -> CommandTrainer | None:
    """Return the trainer of a sweep whose models a command tunes; raises ConfigError if there is no such program."""
    if config.trainer is None:
        return None
    trainer = CommandTrainer(config.trainer, config.model, beside(config.atlas, "runs"), load, config.rendering)
    trainer.check()
    return trainer


def collection_work(tasks: Iterable[Pool], pool: Pool, recipe: Recipe, context: int, *, answered: bool = False) -> Work:
    """Return the work of a row for each task, with a model of this context."""
    return sum((_row_work(recipe, task, pool, context, answered) for task in tasks), Work())


def _answers(max_new_tokens: int, metric: Metric | None) -> dict[str, Any]:
    """Return the arguments of `lm.exact_match`."""
    return {"max_new_tokens": max_new_tokens, **({} if metric is None else {"metric": metric})}


def _check_answers(atlas: Atlas, max_new_tokens: int | None) -> None:
    """Raise MismatchError if the atlas was collected with other settings of the answers."""
    stored = atlas.before.metadata.get("max_new_tokens") if atlas.has_answers else None
    if atlas.has_answers != (max_new_tokens is not None) or stored not in (None, max_new_tokens):
        has = f"exact_match: true and max_new_tokens: {stored}" if atlas.has_answers else "exact_match: false"
        raise MismatchError(f"the atlas {atlas.path} was collected with {has}; use that, or create a new atlas")
