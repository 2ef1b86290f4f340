"""Tasks one after another: each fine-tune starts where the last one ended, and what is lost on the way is measured.

The tasks come in several random orders, each without replay, with random replay and with replay by forecast. Before
every task the forecast is made anew, from probes of the model as it is then. Every finished stage is one score file,
and the weights it ended with are kept until the next one is there, so an interrupted sequence goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from forgetcast import probes
from forgetcast.atlas import Atlas
from forgetcast.collect import TRAINING_UNITS, Meter, OnProgress, check_base, measure
from forgetcast.completion import Bayesian
from forgetcast.coverage import correlation_loadings
from forgetcast.errors import ConfigError, DataError, MismatchError
from forgetcast.evaluation import worst_tenth
from forgetcast.pool import Pool
from forgetcast.replay import STRATEGIES, ReplayPlan, make_plan, replay_steps
from forgetcast.scores import Scores, forgetting
from forgetcast.sequence_result import SequenceResult, Stage

if TYPE_CHECKING:
    from forgetcast.lm import Workbench
    from forgetcast.recipe import Recipe

UNUSABLE = {
    "none": "it is one of the arms anyhow",
    "padding": "it replays no upstream example",
    "truth": "it needs the forgetting of the whole pool, measured before every task",
    "gradient": "it needs the gradients of the whole pool, taken anew before every task",
    "mir": "it chooses during training, while a sequence plans before every task",
}
"""Strategies that are not for a sequence, and why."""


@dataclass(frozen=True)
class SequenceSettings:
    """What a sequence does beside its tasks and recipe.

    Attributes
    ----------
    strategies : tuple of str
        Arms beside no replay and random replay.
    ratio : float
        Replayed examples per new one.
    orders : int
        Random orders of the tasks.
    probes : int
        Examples measured before every task but the first, to forecast the others.
    hold_out : float
        Share of the pool that is never replayed, and is judged on after every task.
    repeat : bool
        Whether one task may replay an example more than once.
    seed : int
        Of the orders and of the hold-out.

    Raises
    ------
    ConfigError
        If one of them cannot be used.
    """

    strategies: tuple[str, ...] = ("top",)
    ratio: float = 0.125
    orders: int = 2
    probes: int = 30
    hold_out: float = 0.5
    repeat: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Check all that can be checked without data."""
        for name in self.strategies:
            if name not in STRATEGIES:
                raise ConfigError(f"unknown replay strategy {name!r}; choose one of {', '.join(usable_strategies())}")
            if name not in usable_strategies():
                why = UNUSABLE.get(name, f"it needs {', '.join(STRATEGIES[name].needs)}")
                raise ConfigError(f"the strategy {name!r} is not for a sequence: {why}")
        if not (math.isfinite(self.ratio) and self.ratio > 0):
            raise ConfigError(f"the replay ratio must be finite and above 0, not {self.ratio}")
        if self.orders < 1 or self.probes < 1:
            raise ConfigError(f"at least 1 order and 1 probe are needed, not {self.orders} and {self.probes}")
        if not 0 < self.hold_out < 1:
            raise ConfigError(f"the share to hold out must be above 0 and below 1, not {self.hold_out}")

    @property
    def arms(self) -> tuple[str, ...]:
        """No replay, random replay, and each strategy once."""
        return tuple(dict.fromkeys(("none", "random", *self.strategies)))


def usable_strategies() -> tuple[str, ...]:
    """Strategies that can plan before every task of a sequence."""
    known = {"forecast", "losses", "loadings"}
    return tuple(name for name, kind in STRATEGIES.items() if name not in UNUSABLE and known.issuperset(kind.needs))


def task_orders(tasks: Sequence[str], count: int, seed: int = 0) -> list[tuple[str, ...]]:
    """Random orders of at least two tasks, none of them twice until all that there are have come.

    More orders from the same seed begin with the fewer.

    Raises
    ------
    DataError
        If there are fewer than two tasks.
    """
    if len(tasks) < 2:
        raise DataError(f"a sequence needs at least two tasks, not {len(tasks)}")
    rng = np.random.default_rng(seed)
    found: list[tuple[str, ...]] = []
    while len(found) < count:
        drawn = tuple(tasks[i] for i in rng.permutation(len(tasks)).tolist())
        if found.count(drawn) <= len(found) // math.factorial(len(tasks)):
            found.append(drawn)
    return found


def learn_in_sequence(
    workbench: Workbench,
    tasks: Mapping[str, tuple[Pool, Pool]],
    atlas: Atlas,
    recipe: Recipe,
    settings: SequenceSettings,
    *,
    directory: str | Path,
    on_progress: OnProgress | None = None,
) -> SequenceResult:
    """Fine-tune on the tasks one after another, in every order and with every arm, and judge after each.

    Parameters
    ----------
    workbench : Workbench
        With the base model that the atlas was measured on.
    tasks : mapping of str to pair of Pool
        By name, what is trained on and what only the loss is judged on.
    atlas : Atlas
        What the forecasts learn from; its pool is replayed from and judged on.
    recipe : Recipe
        Of every fine-tune; its seed is replaced by the number of the order, which also seeds the replay.
    settings : SequenceSettings
    directory : path
        Where the score file of every stage is kept, and the weights of the sequence that is being run. Stages that are
        there already are not repeated.
    on_progress : callable, optional

    Raises
    ------
    ConfigError
        If the ratio is too small for a batch, or nothing is left to judge on or to replay.
    DataError
        If there are fewer than two tasks, or an atlas to forecast from has fewer.
    MismatchError
        If the atlas is of another base model, or a stage in `directory` was made with other settings.
    """
    orders = task_orders(list(tasks), settings.orders, settings.seed)
    course = _Course(workbench, tasks, atlas, recipe, settings, Path(directory))
    course.check()
    chains = [_Chain(order, arm, names) for order, names in enumerate(orders) for arm in settings.arms]
    finished = [course.finished(chain) for chain in chains]
    todo = [course.units(c, i) for c, done in zip(chains, finished, strict=True) for i in range(len(done), len(tasks))]
    meter = Meter(sum(todo), on_progress)
    stages = [
        course.stage(chain, i, scores)
        for chain, done in zip(chains, finished, strict=True)
        for i, scores in enumerate(course.go_on(chain, done, meter), 1)
    ]
    if todo:
        workbench.restore()
    return SequenceResult(tuple(stages), len(course.judged), settings.ratio)


class _Chain(NamedTuple):
    """The tasks of one order under one arm."""

    order: int
    arm: str
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class _Course:
    """What all chains share; a stage is counted from 1, and `weights` are None where they are the base model's."""

    workbench: Workbench
    tasks: Mapping[str, tuple[Pool, Pool]]
    atlas: Atlas
    recipe: Recipe
    settings: SequenceSettings
    directory: Path

    @cached_property
    def judged(self) -> Pool:
        """Upstream examples that are never replayed."""
        share, pool = self.settings.hold_out, self.atlas.pool
        held_out = self.atlas.hold_out(share, seed=self.settings.seed)
        if not held_out:
            raise ConfigError(f"holding out {share:g} of {len(pool)} examples leaves none to judge on")
        return pool.subset(held_out)

    @cached_property
    def model(self) -> Bayesian:
        """What forecasts."""
        return Bayesian().fit(self.atlas)

    @cached_property
    def loadings(self) -> np.ndarray:
        """How alike the forgetting of two examples is, shape (N, r)."""
        return correlation_loadings(self.model)

    @cached_property
    def measured(self) -> str:
        """Hash of the numbers that the strategies go by."""
        digest = hashlib.sha256(self.atlas.nll_before.tobytes())
        digest.update(self.atlas.matrix().values.tobytes())
        return digest.hexdigest()

    def check(self) -> None:
        """Make the first plan of every arm, so that what cannot be planned is an error before anything is trained."""
        check_base(self.atlas, self.workbench.base)
        for arm in self.settings.arms:
            self.plan(_Chain(0, arm, ()), None, ()).count(self.recipe.steps, self.recipe.batch_size)

    def file(self, chain: _Chain, stage: int, kind: str) -> Path:
        """Where a stage's scores (.parquet) or the weights after it (.safetensors) are."""
        return self.directory / f"{chain.arm}.{chain.order}.{stage}{kind}"

    def facts(self, chain: _Chain, stage: int) -> dict[str, Any]:
        """Everything that a stage's outcome depends on; a stored stage with other settings is not this stage."""
        needs, asked = STRATEGIES[chain.arm].needs, self.settings
        learned = [[name, *(part.fingerprint for part in self.tasks[name])] for name in chain.tasks[:stage]]
        return {
            "base": self.workbench.base_hash,
            "tasks": learned,
            "pool": self.atlas.pool_fingerprint,
            "judged": self.judged.fingerprint,
            "recipe": self.recipe.model_dump() | {"seed": chain.order},
            "arm": chain.arm,
            "ratio": 0.0 if chain.arm == "none" else asked.ratio,
            "atlas": self.measured if needs else None,
            "probes": asked.probes if "forecast" in needs else None,
        }

    def units(self, chain: _Chain, before: int) -> int:
        """Work of the stage that comes after so many."""
        steps = self.recipe.steps
        steps += 0 if chain.arm == "none" else replay_steps(steps, self.settings.ratio)
        scored = sum(len(self.tasks[name][1]) for name in chain.tasks[: before + 1])
        return steps * self.recipe.batch_size * TRAINING_UNITS + len(self.judged) + scored

    def finished(self, chain: _Chain) -> list[Scores]:
        """Scores of the stages that need not be repeated."""
        done: list[Scores] = []
        while len(done) < len(chain.tasks) and (file := self.file(chain, len(done) + 1, ".parquet")).exists():
            scores = Scores.load(file)
            if scores.metadata.get("settings") != self.facts(chain, len(done) + 1):
                raise MismatchError(f"{file} is of a sequence with other settings; remove it, or use another directory")
            done.append(scores)
        # Without the weights that it ended with, a stage is of no use to the next one.
        while 0 < len(done) < len(chain.tasks) and not self.file(chain, len(done), ".safetensors").exists():
            done.pop()
        return done

    def go_on(self, chain: _Chain, finished: Sequence[Scores], meter: Meter) -> list[Scores]:
        """Run the stages that are missing; scores of all."""
        from forgetcast.lm.train import load_weights, save_weights

        done, last = list(finished), len(chain.tasks)
        weights = load_weights(self.file(chain, len(done), ".safetensors")) if 0 < len(done) < last else None
        for stage in range(len(done) + 1, last + 1):
            replayed = [id_ for scores in done for id_ in scores.metadata["replayed"]]
            scores = self._learn(chain, stage, weights, replayed, meter)
            if stage < last:
                weights = self.workbench.weights()
                save_weights(weights, self.file(chain, stage, ".safetensors"))
            # The weights first: a crash in between costs this stage, but not those before it.
            scores.save(self.file(chain, stage, ".parquet"))
            self._remove_weights(chain, but=stage)
            done.append(scores)
        self._remove_weights(chain)
        return done

    def _learn(
        self, chain: _Chain, stage: int, weights: Mapping[str, Any] | None, replayed: Sequence[str], meter: Meter
    ) -> Scores:
        """Fine-tune on a stage's task and judge: scores of the upstream examples, with the other figures beside."""
        name = chain.tasks[stage - 1]
        what = f"{name} ({stage} of {len(chain.tasks)}), {chain.arm} replay, order {chain.order}"
        tuned = self.workbench.tune(
            self.tasks[name][0],
            self.recipe.model_copy(update={"seed": chain.order}),
            plan=self.plan(chain, weights, replayed),
            pool=self.atlas.pool,
            start=weights,
            besides=replayed,
            on_step=lambda *_: meter.advance(f"{what}: fine-tuning", self.recipe.batch_size * TRAINING_UNITS),
        )
        after = measure(tuned.language_model, self.judged, meter, what)
        tests = {task: measure(tuned.language_model, self.tasks[task][1], meter, what) for task in chain.tasks[:stage]}
        facts = {
            "settings": self.facts(chain, stage),
            "losses": {task: float(np.nanmean(scores.nll)) for task, scores in tests.items()},
            "replayed": list(tuned.replayed),
            "steps": tuned.steps,
            "seconds": tuned.seconds,
        }
        return replace(after, metadata={**after.metadata, **facts})

    def plan(self, chain: _Chain, weights: Mapping[str, Any] | None, replayed: Sequence[str]) -> ReplayPlan:
        """Plan what the next stage replays, by what is known of the model as it is."""
        needs = STRATEGIES[chain.arm].needs
        return make_plan(
            self.atlas.pool,
            chain.arm,
            0.0 if chain.arm == "none" else self.settings.ratio,
            held_out=self.judged.ids,
            forecast=self._forecast(weights, replayed) if "forecast" in needs else None,
            losses=self.atlas.nll_before,
            loadings=self.loadings if "loadings" in needs else None,
            repeat=self.settings.repeat,
            seed=chain.order,
        )

    def _forecast(self, weights: Mapping[str, Any] | None, replayed: Sequence[str]) -> np.ndarray:
        """Expected forgetting of every example since the base model, shape (N,), nats per token.

        The probes are chosen anew among those that may be replayed and were not: what was replayed says nothing of the
        others any more. Where there is none, and before the first task, it is what the atlas expects of any task.
        """
        pool, before, kept = self.atlas.pool, self.atlas.nll_before, {*replayed, *self.judged.ids}
        usable = [i for i, id_ in enumerate(pool.ids) if id_ not in kept and not np.isnan(before[i])]
        if weights is None or not usable:
            return self.model.predict([], []).mean
        from forgetcast.lm.score import losses

        chosen = probes.choose(self.model, min(self.settings.probes, len(usable)), usable)
        # By the stored weights and not an adapter beside them, so that a resumed sequence measures the same.
        tuned, longest = self.workbench.restore(weights), self.atlas.before.metadata.get("max_length")
        measured = losses(tuned, (pool[i] for i in chosen.tolist()), longest)
        return self.model.predict(chosen, measured - before[chosen]).mean

    def stage(self, chain: _Chain, stage: int, scores: Scores) -> Stage:
        """Read the figures of a stage off its scores."""
        change = forgetting(self.atlas.before, scores)
        return Stage(
            order=chain.order,
            arm=chain.arm,
            position=stage,
            task=chain.tasks[stage - 1],
            mean=float(np.nanmean(change)),
            worst_tenth=worst_tenth(change),
            losses=scores.metadata["losses"],
            replayed=len(scores.metadata["replayed"]),
            steps=scores.metadata["steps"],
            seconds=scores.metadata["seconds"],
        )

    def _remove_weights(self, chain: _Chain, but: int | None = None) -> None:
        """Delete a chain's weights but those after a stage; also what a killed process had half written."""
        pattern = f"{chain.arm}.{chain.order}.*.safetensors"
        for file in (*self.directory.glob(pattern), *self.directory.glob(f".{pattern}")):
            if but is None or file != self.file(chain, but, ".safetensors"):
                file.unlink()
