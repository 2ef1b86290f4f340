"""Verify a replay plan: fine-tune with and without it, with several seeds, and judge on examples never replayed.

Every finished run is one score file, so an interrupted verification continues where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import ConfigDict

from forgetcast.atlas.store import Atlas
from forgetcast.data.pool import Pool, split_task
from forgetcast.defaults import LOSS_MARGIN, TEST_SHARE
from forgetcast.errors import ConfigError, DataError
from forgetcast.experiments.interpolation import ALPHAS, ChosenAlpha, choose_alpha
from forgetcast.experiments.meter import Meter, Work, scoring_work
from forgetcast.experiments.runs import (
    FineTune,
    RunFacts,
    ScoreFiles,
    answer_settings,
    check_base,
    check_unseen,
    ensure_all,
    keeping,
)
from forgetcast.experiments.tradeoff import RecipeAdvice, Tradeoff, recipe_advice, tradeoffs
from forgetcast.experiments.variants import Interpolating, Variant
from forgetcast.interruption import Stop
from forgetcast.measure.scores import Scores, count_flips, forgetting
from forgetcast.progress import OnProgress
from forgetcast.replay.outcome import ANSWERS, METRICS, PARTS, Run
from forgetcast.replay.plan import ReplayPlan, achieved_ratio, make_plan
from forgetcast.replay.signals import FROM_ATLAS, Signals
from forgetcast.replay.strategies import NoReplay, Random, Strategy, check_available
from forgetcast.results import Result, plain
from forgetcast.stats import Compared, Comparison, differences_by_task, supports_part, worst_part, worst_tenth

if TYPE_CHECKING:
    from forgetcast.data.recipe import Recipe
    from forgetcast.lm import FineTuner, Interpolation, ReplaySelector, Tuned


@dataclass(frozen=True, repr=False)
class Verification(Result, Compared):
    """Runs of all arms.

    Attributes
    ----------
    runs : tuple of Run
    judged : int
        Upstream examples that each run was judged on.
    ratio : float
        Replayed examples per new one.
    summaries : mapping of str to str
        What each arm replays; empty in files of earlier versions.
    replayed : mapping of str to sequence of str
        Ids that each run replayed, in order, by its name TASK.ARM.SEED; empty in files of earlier versions.
    held_out : mapping of str to sequence of str
        Ids that the plans of each task hold out, on which its runs are judged; empty in files of earlier versions.
    margin : float
        Nats by which a new-task loss may be higher than that without replay and still count as equal.

    Raises
    ------
    DataError
        If there are no runs, the ids of a run are not as many as it replayed, or a held-out one is among them.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)  # of a file
    kind: ClassVar[str] = "verification"

    runs: tuple[Run, ...]
    judged: int
    ratio: float
    summaries: Mapping[str, str] = field(default_factory=dict)
    replayed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    held_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    margin: float = LOSS_MARGIN

    def __post_init__(self) -> None:
        """Check that there are runs, and that none replayed what it was judged on."""
        if not self.runs:
            raise DataError("a verification has at least one run")
        if not self.replayed:
            return
        for run in self.runs:
            ids = self.replayed.get(name := run_name(run.task, run.arm, run.seed))
            if ids is None or len(ids) != run.replayed or run.task not in self.held_out:
                raise DataError(f"the run {name} does not say which {run.replayed} examples it replayed")
            check_unseen(name, ids, self.held_out[run.task])

    def audit(self) -> str:
        """State in a sentence that no run replayed an example that it was judged on, or that this is not known."""
        if not self.replayed:
            return "What each run replayed is not in this file, so it was not checked against the held-out examples."
        held_out = len(set().union(*self.held_out.values()))
        replayed = sum(map(len, self.replayed.values()))
        return (
            f"Checked by the ids of all {replayed:,} replayed examples of {len(self.runs)} runs: none is among the "
            f"{held_out:,} held-out ones."
        )

    def __repr__(self) -> str:
        """Return the arms and the number of runs."""
        return f"Verification({len(self.runs)} runs, arms {', '.join(self.arms)}, {self.judged} examples judged)"

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of the arms, in the order they were run."""
        return tuple(dict.fromkeys(run.arm for run in self.runs))

    def _said(self, arm: str) -> str:
        """Return what sentences call an arm: one that replays nothing is no replay."""
        replays = any(run.replayed or run.strategy in (None, "padding") for run in self.runs if run.arm == arm)
        return f"{arm} replay" if replays else arm

    def average(self, arm: str, metric: str) -> float:
        """Mean of a metric over an arm's runs."""
        return float(np.mean([getattr(run, metric) for run in self.runs if run.arm == arm]))

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics that every run has, and that so many judged examples support."""
        return tuple(
            name
            for name in METRICS
            if all(getattr(run, name, None) is not None for run in self.runs)
            and supports_part(self.judged, PARTS.get(name, 1))
        )

    def notes(self) -> tuple[str, ...]:
        """Say in sentences which metrics are left out because the judged examples do not support them."""
        notes = [
            f"The {METRICS[name]} is left out: it takes {parts} judged examples, and there are {self.judged}."
            for name, parts in PARTS.items()
            if not supports_part(self.judged, parts)
        ]
        flips = [run for run in self.runs if run.right_to_wrong is not None]
        if flips and ANSWERS not in self.metrics:
            without = next(run for run in self.runs if run.lost_answers is None)
            name = run_name(without.task, without.arm, without.seed)
            why = (
                f"of the examples that {without.task} is judged on, the base model answers none right"
                if without.right_before == 0
                else f"the run {name} does not say how many were right before"
            )
            notes.append(f"The {METRICS[ANSWERS]} is left out: {why}.")
        return tuple(notes)

    @cached_property
    def tradeoffs(self) -> tuple[Tradeoff, ...]:
        """Each arm's new-task loss and forgetting against no replay, and what it costs."""
        return tradeoffs(self)

    @cached_property
    def advice(self) -> RecipeAdvice:
        """The simplest arm at equal new-task loss that is not shown to forget more than the best."""
        return recipe_advice(self)

    @cached_property
    def _compared(self) -> dict[tuple[str, str, str], Comparison | None]:
        return {}

    def compare(self, arm: str, baseline: str, metric: str) -> Comparison | None:
        """Compare two arms, see `Compared.compare`; each comparison is computed once."""
        key = (arm, baseline, metric)
        if key not in self._compared:
            self._compared[key] = super().compare(*key)
        return self._compared[key]

    def _differences(self, arm: str, baseline: str, metric: str) -> list[np.ndarray]:
        """Return the paired differences of each task, one per seed."""
        values = {(run.task, run.seed, run.arm): getattr(run, metric) for run in self.runs}
        return differences_by_task(values, arm, baseline)

    def as_dict(self) -> dict[str, Any]:
        """Return the runs, each arm's averages and the comparisons, ready for JSON."""
        derived = {
            "arms": {
                arm: {name: self.average(arm, name) for name in (*self.metrics, "replayed", "steps", "seconds")}
                for arm in self.arms
            },
            "comparisons": [comparison.as_dict() for comparison in self.comparisons()],
            "tradeoffs": plain(self.tradeoffs),
            "advice": self.advice.as_dict(),
        }
        return super().as_dict() | derived


def run_name(task: str, arm: str, seed: int) -> str:
    """Return the name of a run and of its score file."""
    return f"{task}.{arm}.{seed}"


@dataclass(frozen=True)
class ReplayComparison:
    """A task to compare replay on: its training and test examples, and a plan for each arm.

    Arms with a selector decide during training which examples of their plan come next; those with a variant do more
    than replay by their plan.
    """

    name: str
    train: Pool
    test: Pool
    plans: Mapping[str, ReplayPlan]
    selectors: Mapping[str, ReplaySelector] = field(default_factory=dict)
    variants: Mapping[str, Variant] = field(default_factory=dict)


def arm_label(arm: str) -> str:
    """Return what a progress display calls an arm."""
    return "no replay" if arm == NoReplay.name else f"{arm} replay"


def arms(plans: Sequence[ReplayPlan], pool: Pool) -> dict[str, ReplayPlan]:
    """Return the arms to compare plans in: no replay, random replay at the same ratio, and each plan by its strategy.

    Raises
    ------
    ConfigError
        If the plans have different ratios or held-out examples, or two have the same strategy.
    """
    if len({(plan.ratio, plan.held_out_ids) for plan in plans if plan.ratio}) > 1:
        raise ConfigError("plans that are compared need the same ratio and the same held-out examples")
    by_name = {plan.strategy: plan for plan in plans}
    if len(by_name) < len(plans):
        raise ConfigError("two of the plans have the same strategy; verify them one after the other")
    held_out, ratio = plans[0].held_out_ids, max(plan.ratio for plan in plans)
    baselines = {NoReplay.name: make_plan(pool, NoReplay(), ratio=0.0, held_out=held_out)}
    if ratio:
        repeat = any(plan.repeat for plan in plans)
        baselines[Random.name] = make_plan(pool, Random(), ratio=ratio, held_out=held_out, repeat=repeat)
    return baselines | {name: plan for name, plan in by_name.items() if name not in baselines}


def pilot_comparison(
    atlas: Atlas,
    name: str,
    examples: Pool,
    *,
    strategies: Sequence[Strategy] = (),
    ratios: Sequence[float],
    hold_out: float,
    repeat: bool = False,
) -> ReplayComparison:
    """Set up a comparison from the atlas alone: no replay, and random replay and each strategy at each ratio.

    Parameters
    ----------
    atlas : Atlas
    name : str
        Name of the task.
    examples : Pool
        Fine-tuning data; TEST_SHARE of it is held out for the new-task loss.
    strategies : sequence of Strategy
        In addition to random replay.
    ratios : sequence of float
    hold_out : float
        Fraction of the pool that is never replayed, so that it can be judged on.
    repeat : bool
        As in `make_plan`.

    Raises
    ------
    ConfigError
        If a strategy does not replay, or needs signals that the atlas lacks.
    """
    wanted = list({strategy.name: strategy for strategy in (Random(), *strategies)}.values())
    for strategy in wanted:
        check_available(strategy, FROM_ATLAS, "in a pilot")
    signals = Signals.from_atlas(atlas, needs={need for strategy in wanted for need in strategy.needs})
    held_out = atlas.hold_out(hold_out)
    plans = {NoReplay.name: make_plan(atlas.pool, NoReplay(), ratio=0.0, held_out=held_out)}
    for strategy in wanted:
        for ratio in ratios:
            plans[f"{strategy.name} {ratio:.4g}"] = make_plan(
                atlas.pool, strategy, signals, ratio=ratio, held_out=held_out, repeat=repeat
            )
    train, test = split_task(examples, TEST_SHARE)
    return ReplayComparison(name, train, test, plans)


def verify(
    tuner: FineTuner,
    atlas: Atlas,
    recipe: Recipe,
    comparisons: Sequence[ReplayComparison],
    *,
    seeds: Iterable[int] = (0, 1),
    directory: str | Path,
    margin: float = LOSS_MARGIN,
    on_progress: OnProgress | Meter | None = None,
) -> Verification:
    """Fine-tune on every comparison with every arm and seed, and judge on the examples that its plans hold out.

    Parameters
    ----------
    tuner : FineTuner
        With the base model.
    atlas : Atlas
        Provides the pool and the base scores. If it has the base model's answers, the tuned models answer too, and
        flips are counted.
    recipe : Recipe
        Its seed is replaced by each of `seeds`, which also sets the order of replay.
    comparisons : sequence of ReplayComparison
        The plans of a comparison must hold out the same examples.
    seeds : iterable of int
    directory : path
        Keeps the score file of every run. Finished runs are not repeated.
    margin : float
        See `Verification`.
    on_progress : callable, optional

    Raises
    ------
    MismatchError
        If the atlas is of another base model, a plan of another pool, or a run in `directory` has other settings.
    ConfigError
        If the plans of a comparison hold out different examples, or the recipe cannot replay one: `ReplayPlan.count`.
    """
    check_base(atlas, tuner.base)
    seeds, before, runs = tuple(seeds), atlas.before, ScoreFiles(directory)
    answers = answer_settings(atlas) if atlas.has_answers else None
    jobs = [
        _Job(comparison, arm, _recipe(recipe, comparison, arm, seed), _judged(comparison, atlas.pool), answers)
        for comparison in comparisons
        for seed in seeds
        for arm in comparison.plans
    ]
    # Raises for a plan that cannot be replayed, before any training.
    work = {job.name: job.work(atlas.pool, tuner.base.context) for job in jobs}
    missing = [job for job in jobs if not runs.has(job.name, job.settings(tuner))]
    trained = {job.without_replay for job in missing if job.is_shared}
    for job in missing:
        if job.variant.interpolation is not None:
            if job.without_replay in trained:
                work[job.name] = replace(work[job.name], training=0.0)
            trained.add(job.without_replay)
    last, meter = _LastTuned(tuner), Meter.of(on_progress)
    meter.begin(sum((work[job.name] for job in missing), Work()))
    by_name = {job.name: job for job in jobs}

    def ensure(name: str, on_wait: Callable[[str], None] | None) -> bool:
        job, left = by_name[name], dict(meter.left)
        if not runs.ensure(name, job.settings(tuner), partial(job.run, last, atlas, meter), on_wait):
            return False
        if job in missing:
            meter.settle(left, work[name], f"{name}: finished")
        return True

    ensure_all(by_name, ensure, meter.waiting)
    if missing:
        tuner.restore()
    finished = {job.name: runs.load(job.name, tests=[job.comparison.name]) for job in jobs}
    return Verification(
        tuple(job.outcome(before, *finished[job.name]) for job in jobs),
        judged=min(len(job.judged) for job in jobs),
        ratio=max(plan.ratio for comparison in comparisons for plan in comparison.plans.values()),
        summaries={arm: _summary(comparison, arm) for comparison in comparisons for arm in comparison.plans},
        replayed={name: tuple(facts.replayed) for name, (_, facts) in finished.items()},
        held_out={job.comparison.name: tuple(job.judged.ids) for job in jobs},
        margin=margin,
    )


def _recipe(recipe: Recipe, comparison: ReplayComparison, arm: str, seed: int) -> Recipe:
    variant = comparison.variants.get(arm)
    return recipe.model_copy(update={"seed": seed} | ({} if variant is None else dict(variant.recipe)))


def _judged(comparison: ReplayComparison, pool: Pool) -> Pool:
    of_pool, of_texts = list[ReplayPlan](), list[ReplayPlan]()
    for arm, plan in comparison.plans.items():
        texts = comparison.variants[arm].texts if arm in comparison.variants else None
        plan.check_pool(pool if texts is None else texts)
        (of_pool if texts is None else of_texts).append(plan)
    held_out = {plan.held_out_ids for plan in of_pool}
    if len(held_out) != 1 or not (ids := held_out.pop()):
        raise ConfigError(f"{comparison.name}: the arms' plans must hold out the same examples, and at least one")
    for plan in of_texts:
        used = (id_ for id_, weight in zip(plan.ids, plan.weights.tolist(), strict=True) if weight)
        check_unseen(f"{comparison.name} of other texts", used, ids)
    return pool.subset(ids)


def _summary(comparison: ReplayComparison, arm: str) -> str:
    if arm in comparison.variants:
        return comparison.variants[arm].summary
    plan = comparison.plans[arm]
    revised = arm in comparison.selectors and plan.phase == "planned"
    return plan.summary + (", revised during training" if revised else "")


class _LastTuned:
    """The last fine-tune without replay, so that all interpolations of its weights share it."""

    def __init__(self, tuner: FineTuner) -> None:
        self.tuner, self._name = tuner, ""
        self._tuned: Tuned | None = None
        self._between: Interpolation | None = None

    def keep(self, name: str, tuned: Tuned | None) -> None:
        """Note what the tuner's model is now: a fine-tune without replay, or something else."""
        self._name, self._tuned, self._between = name, tuned, None

    def between(self, name: str, tune: Callable[[], Tuned]) -> tuple[Tuned, Interpolation]:
        """Return a fine-tune without replay, made again unless it was the last one, and what lies between."""
        if self._tuned is None or self._name != name:
            self.keep("", None)
            self.keep(name, tune())
        assert self._tuned is not None
        self._between = self._between or self.tuner.interpolation(self._tuned)
        return self._tuned, self._between


@dataclass(frozen=True)
class _Job:
    """One run of a comparison: an arm, with the seed that the recipe has."""

    comparison: ReplayComparison
    arm: str
    recipe: Recipe
    judged: Pool
    answers: Mapping[str, Any] | None

    @property
    def name(self) -> str:
        """Name of the run's file."""
        return run_name(self.comparison.name, self.arm, self.recipe.seed)

    @property
    def plan(self) -> ReplayPlan:
        return self.comparison.plans[self.arm]

    @property
    def variant(self) -> Variant:
        return self.comparison.variants.get(self.arm, Variant(""))

    @property
    def without_replay(self) -> str:
        """Name of the fine-tune without replay of the same task and seed."""
        return f"{self.comparison.name}.{self.recipe.seed}"

    @property
    def is_shared(self) -> bool:
        """Whether it is this fine-tune, whose weights interpolations take."""
        return self.plan.phase == "never" and self.arm not in self.comparison.variants

    def work(self, pool: Pool, context: int) -> Work:
        """Work of the run, the choice of alpha included; of an interpolation, with the training of the weights."""
        return self.fine_tune(pool).work(context) + self._choice_work(pool, context)

    def _choice_work(self, pool: Pool, context: int) -> Work:
        how = self.variant.interpolation
        if how is None or how.validation is None or not how.scored:
            return Work()
        once = scoring_work(pool.subset(how.probes), context) + scoring_work(how.validation, context)
        return once * len(ALPHAS)

    def settings(self, tuner: FineTuner) -> dict[str, Any]:
        """Everything that the outcome depends on."""
        selector = self.comparison.selectors.get(self.arm)
        return {
            "base": tuner.base_hash,
            "train": self.comparison.train.fingerprint,
            "test": self.comparison.test.fingerprint,
            "judged": self.judged.fingerprint,
            "recipe": self.recipe.model_dump(),
            "ratio": self.plan.ratio,
            "weights": self.plan.fingerprint,
            "selector": None if selector is None else selector.settings(),
            "answers": None if self.answers is None else dict(self.answers),
            **self.variant.settings(),  # nothing without a variant, so that runs of earlier versions are taken over
        }

    def fine_tune(self, pool: Pool) -> FineTune:
        """Return the fine-tune of the run; of an interpolation, the one whose weights it takes."""
        said = self.arm if self.arm in self.comparison.variants else arm_label(self.arm)
        return FineTune(
            name=f"{self.comparison.name}, {said}, seed {self.recipe.seed}",
            task=self.comparison.train,
            recipe=self.recipe,
            judged=self.judged,
            tests={self.comparison.name: self.comparison.test},
            plan=replace(self.plan, seed=self.recipe.seed),
            pool=pool if self.variant.texts is None else self.variant.texts,
            selector=self.comparison.selectors.get(self.arm),
            answers=self.answers,
        )

    def run(self, last: _LastTuned, atlas: Atlas, meter: Meter, folder: Path) -> Scores:
        """Make the run; the folder keeps what is unfinished."""
        job, how, settings = self.fine_tune(atlas.pool), self.variant.interpolation, self.settings(last.tuner)
        with job.stopping(folder) as stop:
            if how is None:
                last.keep("", None)
                tuned = job.tune(last.tuner, meter, folder)
                with keeping(last.tuner, folder, lambda: tuned):
                    scores = job.judge(tuned, settings, meter, folder, stop)
                if self.is_shared:
                    last.keep(self.without_replay, tuned)
                return self._with_generated(scores, last.tuner)
            # Where the arm without replay was made earlier, its weights are made again.
            tuned, between = last.between(self.without_replay, lambda: job.tune(last.tuner, meter, folder))
            with keeping(last.tuner, folder, lambda: replace(tuned, language_model=between.at(1.0))):
                alpha, facts, started = how.alpha, dict[str, Any](), time.monotonic()
                if alpha is None:
                    chosen = self._choose_alpha(how, between, atlas, last.tuner.base.context, meter, stop)
                    alpha, facts = chosen.alpha, {"choice": chosen.as_dict()}
                seconds = tuned.seconds + time.monotonic() - started
                at_alpha = replace(tuned, language_model=between.at(alpha), seconds=seconds)
                scores = job.judge(at_alpha, settings, meter, folder, stop)
        return replace(scores, metadata={**scores.metadata, **facts})

    def _with_generated(self, scores: Scores, tuner: FineTuner) -> Scores:
        """Note how many tokens of other texts the model wrote."""
        if (texts := self.variant.texts) is None:
            return scores
        generated = sum(tuner.base.encode(example).targets for example in texts)
        return replace(scores, metadata={**scores.metadata, "generated": generated})

    def _choose_alpha(
        self, how: Interpolating, between: Interpolation, atlas: Atlas, context: int, meter: Meter, stop: Stop
    ) -> ChosenAlpha:
        """Choose alpha on the probes; raises Interrupted if `stop` says so."""
        assert how.validation is not None
        name, done = f"{self.fine_tune(atlas.pool).name}: choosing alpha", 0
        of_one = self._choice_work(atlas.pool, context).scoring / how.scored

        def count(examples: int) -> None:
            nonlocal done
            done += examples
            meter.advance(name, "scoring", examples * of_one)
            if stop:
                raise stop.interrupted(f"choosing alpha, after {done} of {how.scored} scores")

        return choose_alpha(
            between,
            atlas.subset(how.probes),
            how.validation,
            atlas.before.subset(how.probes),
            margin=how.margin,
            on_progress=count,
        )

    def outcome(self, before: Scores, scores: Scores, facts: RunFacts) -> Run:
        """Compute the figures of the finished run."""
        settings = facts.settings
        change, flips = forgetting(before, scores), count_flips(before, scores)
        recipe = {name: value for name, value in settings["recipe"].items() if name != "seed"}
        shared = [*(settings[name] for name in ("base", "train", "test", "judged")), recipe]
        revised = settings["selector"] is not None and self.plan.phase == "planned"
        how, trained = self.variant.interpolation, facts.cost.get("training", {}).get("tokens")
        return Run(
            task=self.comparison.name,
            arm=self.arm,
            seed=self.recipe.seed,
            mean=float(np.nanmean(change)),
            worst_tenth=worst_tenth(change),
            new_task_loss=facts.losses[self.comparison.name],
            replayed=len(facts.replayed),
            steps=facts.steps,
            seconds=facts.seconds,
            worst_hundredth=worst_part(change, 100),
            right_to_wrong=None if flips is None else flips[0],
            right_before=None if flips is None else flips[1],
            strategy=self._strategy(revised=revised),
            ratio=self.plan.ratio,
            achieved_ratio=achieved_ratio(self.recipe.steps, self.plan.ratio),
            setup=hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16],
            trained_tokens=None if trained is None else int(trained),
            generated_tokens=facts.generated,
            scored_tokens=0 if facts.choice is None else int(facts.choice["tokens"]),
            alpha=None if how is None else how.alpha if facts.choice is None else float(facts.choice["alpha"]),
        )

    def _strategy(self, *, revised: bool) -> str:
        if self.arm in self.comparison.variants:
            return self.arm
        return f"{self.plan.strategy} online" if revised else self.plan.strategy
