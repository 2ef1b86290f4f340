"""Fine-tune on tasks one after another, each from the last one's weights, and measure the forgetting after each.

The tasks come in several random orders, each without replay, with random replay and with replay by forecast. Before
every task, probes of the current model update the forecast. Some training examples of the tasks learned so far are a
further source of replay, beside the pool. Every finished stage is one score file, and its final
weights are kept until the next stage is finished, so an interrupted sequence continues where it stopped.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import scipy
from pydantic import BaseModel, ConfigDict, Field, field_validator

from forgetcast.atlas.store import Atlas
from forgetcast.completion import Bayesian, probes
from forgetcast.data.pool import Example, Pool
from forgetcast.defaults import MEMORY, ORDERS, PROBES, RATIO
from forgetcast.errors import ConfigError, DataError
from forgetcast.experiments.claims import claimed
from forgetcast.experiments.meter import Meter, Work, scoring_work, tuning_work
from forgetcast.experiments.runs import (
    FineTune,
    ScoreFiles,
    check_base,
    check_unseen,
    ensure_all,
)
from forgetcast.experiments.sequence_result import SequenceResult, Stage
from forgetcast.experiments.verify import arm_label
from forgetcast.measure.scores import Scores, forgetting
from forgetcast.progress import OnProgress
from forgetcast.replay.coverage import correlation_loadings
from forgetcast.replay.plan import ReplayPlan, make_plan, replay_steps
from forgetcast.replay.signals import FROM_ATLAS, Signals
from forgetcast.replay.strategies import NoReplay, Random, Strategy, check_available, get_strategy
from forgetcast.settings import Seed
from forgetcast.stats import worst_tenth

if TYPE_CHECKING:
    from forgetcast.data.recipe import Recipe
    from forgetcast.lm import FineTuner

EARLIER_TASKS = "earlier tasks"
"""Source of replayed examples of tasks that were learned before."""


class SequenceSettings(BaseModel):
    """Settings of a sequence except its tasks and recipe. An unknown key is an error.

    Attributes
    ----------
    strategies : tuple of str
        Arms in addition to no replay and random replay.
    ratio : float
        Replayed examples per new one.
    orders : int
        Random orders of the tasks.
    probes : int
        Examples measured before every task but the first, to forecast the others.
    hold_out : float
        Fraction of the pool that is judged on after every task and never replayed. Larger than a plan's default: over
        several tasks the arms replay most of the rest, so only these examples distinguish them.
    memory : int
        Training examples of every learned task, drawn at random, that later tasks may replay beside those of the pool;
        0: none.
    repeat : bool
        Whether one task may replay an example more than once.
    seed : int
        Seed of the orders, the hold-out and the memory.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    strategies: tuple[str, ...] = ("top",)
    ratio: float = Field(default=RATIO, gt=0, allow_inf_nan=False)
    orders: int = Field(default=ORDERS, ge=1, le=10_000)
    probes: int = Field(default=PROBES, ge=1)
    hold_out: float = Field(default=0.5, gt=0, lt=1)
    memory: int = Field(default=MEMORY, ge=0)
    repeat: bool = False
    seed: Seed = 0

    @field_validator("strategies")
    @classmethod
    def _plan_before_every_task(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            check_available(get_strategy(name), FROM_ATLAS, "in a sequence")
        return names

    @cached_property
    def arms(self) -> dict[str, Strategy]:
        """No replay, random replay, and each strategy once, by name."""
        strategies = (NoReplay(), Random(), *map(get_strategy, self.strategies))
        return {strategy.name: strategy for strategy in strategies}


def task_orders(tasks: Sequence[str], count: int, seed: int = 0) -> list[tuple[str, ...]]:
    """Draw random orders of at least two tasks; none repeats until all possible orders were drawn.

    With the same seed, a longer list starts with the shorter one.

    Raises
    ------
    DataError
        If there are fewer than two tasks.
    """
    if len(tasks) < 2:
        raise DataError(f"a sequence needs at least two tasks, not {len(tasks)}")
    rng = np.random.default_rng(seed)
    orders: list[tuple[str, ...]] = []
    while len(orders) < count:
        drawn = tuple(tasks[i] for i in rng.permutation(len(tasks)).tolist())
        if orders.count(drawn) <= len(orders) // math.factorial(len(tasks)):
            orders.append(drawn)
    return orders


def run_sequence(
    tuner: FineTuner,
    atlas: Atlas,
    recipe: Recipe,
    tasks: Mapping[str, tuple[Pool, Pool]],
    settings: SequenceSettings,
    *,
    directory: str | Path,
    on_progress: OnProgress | None = None,
) -> SequenceResult:
    """Fine-tune on the tasks one after another, in every order and with every arm, and judge after each.

    Parameters
    ----------
    tuner : FineTuner
        With the base model that the atlas was measured on.
    atlas : Atlas
        The forecasts are fitted to it; its pool is replayed and judged on. It does not have the earlier tasks'
        examples: their forgetting since they were learned is measured.
    recipe : Recipe
        Used by every fine-tune; its seed is replaced by the number of the order, which also seeds the replay.
    tasks : mapping of str to pair of Pool
        Training and test examples by task name.
    settings : SequenceSettings
    directory : path
        Keeps the score file of every stage, and the weights of the running sequence. Finished stages are not repeated.
    on_progress : callable, optional

    Raises
    ------
    ConfigError
        If the ratio is too small for a batch, or no example remains to judge on or to replay.
    DataError
        If there are fewer than two tasks, or the atlas has fewer and a forecast is needed; or the pool has an example
        with the id that one of a task gets, TASK/ID.
    MismatchError
        If the atlas is of another base model, or a stage in `directory` was made with other settings.
    """
    orders = task_orders(list(tasks), settings.orders, settings.seed)
    runner = _SequenceRunner(tuner, tasks, atlas, recipe, settings, ScoreFiles(directory))
    runner.check()
    chains = [_Chain(order, arm, names) for order, names in enumerate(orders) for arm in settings.arms]
    finished = [runner.finished(chain) for chain in chains]
    todo = [
        runner.work(c, i) for c, done in zip(chains, finished, strict=True) for i in range(done + 1, len(tasks) + 1)
    ]
    meter = Meter.of(on_progress)
    meter.begin(sum(todo, Work()))
    by_name = {f"{chain.arm}.{chain.order}": chain for chain in chains}

    def ensure(name: str, on_wait: Callable[[str], None] | None) -> bool:
        with claimed(runner.runs.directory / name, on_wait) as ours:
            if ours:
                runner.resume(by_name[name], runner.finished(by_name[name]), meter)
            return ours

    unfinished = [name for name, done in zip(by_name, finished, strict=True) if done < len(tasks)]
    ensure_all(unfinished, ensure, meter.waiting)
    if todo:
        tuner.restore()
    stages = [runner.outcome(chain, stage) for chain in chains for stage in range(1, len(tasks) + 1)]
    return SequenceResult(tuple(stages), len(runner.judged), settings.ratio, settings.memory)


class _Chain(NamedTuple):
    """The tasks of one order under one arm."""

    order: int
    arm: str
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class _SequenceRunner:
    """The state that all chains share. Stages count from 1; `weights` None means the base model's."""

    tuner: FineTuner
    tasks: Mapping[str, tuple[Pool, Pool]]
    atlas: Atlas
    recipe: Recipe
    settings: SequenceSettings
    runs: ScoreFiles

    @cached_property
    def judged(self) -> Pool:
        """Upstream examples that are never replayed."""
        fraction, pool = self.settings.hold_out, self.atlas.pool
        held_out = self.atlas.hold_out(fraction, seed=self.settings.seed)
        if not held_out:
            raise ConfigError(f"holding out {fraction:g} of {len(pool)} examples leaves none to judge on")
        return pool.subset(held_out)

    @cached_property
    def memories(self) -> dict[str, tuple[Example, ...]]:
        """Training examples of each task that are kept for later ones, with ids that are theirs alone."""
        most, seed = self.settings.memory, self.settings.seed
        return {
            name: tuple(
                replace(example, id=f"{name}/{example.id}", source=EARLIER_TASKS)
                for example in (training.sample(most, seed=seed) if most else ())
            )
            for name, (training, _) in self.tasks.items()
        }

    @cached_property
    def memory_losses(self) -> dict[str, float]:
        """Losses of the base model on all that is kept of the tasks, nats per token, by id."""
        from forgetcast.lm.score import losses

        examples = [example for kept in self.memories.values() for example in kept]
        found = losses(self.tuner.restore(), examples, self.atlas.before.metadata.get("max_length"))
        return dict(zip((example.id for example in examples), found.tolist(), strict=True))

    def remembered(self, tasks: Iterable[str]) -> list[Example]:
        """Return what is kept of tasks, in their order."""
        return [example for name in tasks for example in self.memories[name]]

    def pool(self, earlier: Sequence[str]) -> Pool:
        """Return what may be replayed after these tasks: the atlas's pool, and what is kept of them."""
        kept, pool = self.remembered(earlier), self.atlas.pool
        return pool.extended(kept, where="the pool with the tasks' examples") if kept else pool

    @cached_property
    def model(self) -> Bayesian:
        """The completion method."""
        return Bayesian().fit(self.atlas)

    @cached_property
    def loadings(self) -> np.ndarray:
        """Correlation loadings, shape (N, r)."""
        return correlation_loadings(self.model)

    @cached_property
    def atlas_hash(self) -> str:
        """Hash of the numbers that the signals are computed from."""
        digest = hashlib.sha256(self.atlas.nll_before.tobytes())
        digest.update(self.atlas.matrix().values.tobytes())
        return digest.hexdigest()

    def ratio(self, arm: str) -> float:
        """Replayed examples per new one."""
        return self.settings.ratio if self.settings.arms[arm].replays else 0.0

    def check(self) -> None:
        """Make the first plan of every arm, so that an impossible plan is an error before any training."""
        check_base(self.atlas, self.tuner.base)
        self.tuner.check_weights()
        self.pool(tuple(self.tasks))
        for arm in self.settings.arms:
            plan = self.plan(_Chain(0, arm, ()), self.atlas.pool, None, ())
            plan.count(self.recipe.steps, self.recipe.batch_size)

    def name(self, chain: _Chain, stage: int) -> str:
        """Name of a stage's score file."""
        return f"{chain.arm}.{chain.order}.{stage}"

    def label(self, chain: _Chain, stage: int) -> str:
        """Return what a progress display calls a stage."""
        return f"{chain.tasks[stage - 1]} ({stage} of {len(chain.tasks)}), {arm_label(chain.arm)}, order {chain.order}"

    def weights_file(self, chain: _Chain, stage: int) -> Path:
        """Return the path of the weights after a stage."""
        return self.runs.directory / f"{self.name(chain, stage)}.safetensors"

    def stage_settings(self, chain: _Chain, stage: int) -> dict[str, Any]:
        """Everything that the stage's outcome depends on."""
        needs = self.settings.arms[chain.arm].needs
        learned = [[name, *(part.fingerprint for part in self.tasks[name])] for name in chain.tasks[:stage]]
        # Files of earlier versions have no memory.
        memory = {"memory": [self.settings.memory, self.settings.seed]} if self.settings.memory else {}
        return (memory if self.ratio(chain.arm) else {}) | {
            "base": self.tuner.base_hash,
            "tasks": learned,
            "pool": self.atlas.pool_fingerprint,
            "judged": self.judged.fingerprint,
            "recipe": self.recipe.model_dump() | {"seed": chain.order},
            "arm": chain.arm,
            "ratio": self.ratio(chain.arm),
            "atlas": self.atlas_hash if needs else None,
            "probes": self.settings.probes if "forecast" in needs else None,
        }

    def work(self, chain: _Chain, stage: int) -> Work:
        """Work of a stage."""
        ratio, recipe, context = self.ratio(chain.arm), self.recipe, self.tuner.base.context
        tests = [self.tasks[name][1] for name in chain.tasks[:stage]]
        replayed = replay_steps(recipe.steps, ratio) * recipe.batch_size if ratio else 0
        task = self.tasks[chain.tasks[stage - 1]][0]
        work = tuning_work(task, recipe, context, pool=self.atlas.pool, replayed=replayed)
        memory = self.memory(chain, stage)
        scored = [self.judged, *tests, *([] if memory is None else [memory])]
        return sum((scoring_work(each, context) for each in scored), work)

    def memory(self, chain: _Chain, stage: int) -> Pool | None:
        """Return the examples whose losses after a stage the next plan needs; None if it needs none."""
        kept = self.remembered(chain.tasks[:stage])
        forecast = "forecast" in self.settings.arms[chain.arm].needs
        return Pool(kept) if kept and forecast and stage < len(chain.tasks) else None

    def finished(self, chain: _Chain) -> int:
        """Count the stages that need not be repeated."""
        done = 0
        while done < len(chain.tasks) and self.runs.has(
            self.name(chain, done + 1), self.stage_settings(chain, done + 1)
        ):
            done += 1
        # A stage without its final weights cannot be followed by another.
        while 0 < done < len(chain.tasks) and not self.weights_file(chain, done).exists():
            done -= 1
        return done

    def resume(self, chain: _Chain, done: int, meter: Meter) -> None:
        """Run the stages after the first `done`."""
        from forgetcast.lm.train import load_weights, save_weights

        last = len(chain.tasks)
        weights = load_weights(self.weights_file(chain, done)) if 0 < done < last else None
        replayed = [id_ for i in range(1, done + 1) for id_ in self.runs.load(self.name(chain, i))[1].replayed]
        for stage in range(done + 1, last + 1):
            folder = self.runs.unfinished(self.name(chain, stage))
            before = dict(meter.left)
            scores = self._learn(chain, stage, weights, replayed, meter, folder)
            if stage < last:
                weights = self.tuner.weights()
                save_weights(weights, self.weights_file(chain, stage))
            # The weights first: a crash in between costs this stage, but not those before it.
            self.runs.save(self.name(chain, stage), scores)
            shutil.rmtree(folder)
            self._remove_weights(chain, keep=stage)
            replayed.extend(scores.metadata["replayed"])
            meter.settle(before, self.work(chain, stage), f"{self.label(chain, stage)}: finished")
        self._remove_weights(chain)

    def _learn(
        self,
        chain: _Chain,
        stage: int,
        weights: Mapping[str, Any] | None,
        replayed: Sequence[str],
        meter: Meter,
        folder: Path,
    ) -> Scores:
        """Fine-tune on a stage's task, and judge; the folder keeps what is unfinished."""
        from forgetcast.lm import InitialState

        name, pool = chain.tasks[stage - 1], self.pool(chain.tasks[: stage - 1])
        job = FineTune(
            name=self.label(chain, stage),
            task=self.tasks[name][0],
            recipe=self.recipe.model_copy(update={"seed": chain.order}),
            judged=self.judged,
            tests={task: self.tasks[task][1] for task in chain.tasks[:stage]},
            plan=self.plan(chain, pool, weights, replayed, chain.tasks[: stage - 1]),
            pool=pool,
            initial=InitialState(weights, tuple(replayed)),
            memory=self.memory(chain, stage),
        )
        return job.run(self.tuner, self.stage_settings(chain, stage), meter, folder)

    def plan(
        self,
        chain: _Chain,
        pool: Pool,
        weights: Mapping[str, Any] | None,
        replayed: Sequence[str],
        earlier: Sequence[str] = (),
    ) -> ReplayPlan:
        """Plan the replay of the next stage from the current model's forecast, given the tasks that it has learned."""
        strategy, kept = self.settings.arms[chain.arm], self.remembered(earlier)
        forecast = loadings = None
        losses = np.full(len(kept), np.nan)
        if kept and "losses" in strategy.needs:
            losses = np.array([self.memory_losses[example.id] for example in kept])
        if "forecast" in strategy.needs:
            forecast = np.concatenate([self._forecast(weights, replayed), self._forgotten(chain, earlier)])
        if "loadings" in strategy.needs:
            loadings = scipy.linalg.block_diag(self.loadings, _of_one_kind([self.memories[name] for name in earlier]))
        losses = np.concatenate([self.atlas.nll_before, losses])
        return make_plan(
            pool,
            strategy,
            Signals(pool.ids, losses=losses, forecast=forecast, loadings=loadings),
            ratio=self.ratio(chain.arm),
            held_out=self.judged.ids,
            repeat=self.settings.repeat,
            seed=chain.order,
        )

    def _forecast(self, weights: Mapping[str, Any] | None, replayed: Sequence[str]) -> np.ndarray:
        """Forecast the forgetting of every example since the base model, shape (N,), nats per token.

        The probes are chosen again among the examples that were not replayed: a replayed one no longer represents the
        others. Without such examples, and before the first task, the forecast is the prior one of the atlas.
        """
        pool, before, excluded = self.atlas.pool, self.atlas.nll_before, {*replayed, *self.judged.ids}
        usable = [i for i, id_ in enumerate(pool.ids) if id_ not in excluded and not np.isnan(before[i])]
        if weights is None or not usable:
            return self.model.predict([], []).mean
        from forgetcast.lm.score import losses

        columns = probes.choose(self.model, min(self.settings.probes, len(usable)), usable)
        # The merged weights, not an adapter on top of them, so that a resumed sequence measures the same.
        tuned, longest = self.tuner.restore(weights), self.atlas.before.metadata.get("max_length")
        measured = losses(tuned, (pool[i] for i in columns.tolist()), longest)
        return self.model.predict(columns, measured - before[columns]).mean

    def _forgotten(self, chain: _Chain, earlier: Sequence[str]) -> np.ndarray:
        """Forecast the forgetting of what is kept of the tasks since each was learned, shape (m,), nats per token.

        It is what each example has lost so far, measured. Of the task learned last nothing can be measured yet: as
        before any measurement, it is what the atlas expects, of an average example.
        """
        if not earlier:
            return np.empty(0)
        learned = [self.runs.load(self.name(chain, i))[1].memory for i in range(1, len(earlier) + 1)]
        now, unmeasured = learned[-1], float(self.model.predict([], []).mean.mean())
        lost: list[float] = []
        for name, then in zip(earlier[:-1], learned, strict=False):
            for example in self.memories[name]:
                after, before = now.get(example.id), then.get(example.id)
                lost.append(math.nan if after is None or before is None else after - before)
        return np.array([*lost, *([unmeasured] * len(self.memories[earlier[-1]]))])

    def outcome(self, chain: _Chain, stage: int) -> Stage:
        """Compute the figures of a finished stage."""
        scores, facts = self.runs.load(self.name(chain, stage), tests=chain.tasks[:stage])
        check_unseen(self.name(chain, stage), facts.replayed, self.judged.ids)
        change = forgetting(self.atlas.baseline, scores)
        return Stage(
            order=chain.order,
            arm=chain.arm,
            position=stage,
            task=chain.tasks[stage - 1],
            mean=float(np.nanmean(change)),
            worst_tenth=worst_tenth(change),
            losses=facts.losses,
            replayed=len(facts.replayed),
            replayed_earlier=int((self.atlas.pool.ids.find(facts.replayed) < 0).sum()),
            steps=facts.steps,
            seconds=facts.seconds,
        )

    def _remove_weights(self, chain: _Chain, keep: int | None = None) -> None:
        """Delete a chain's weights except those after stage `keep`, and files that a killed process left incomplete."""
        pattern = f"{chain.arm}.{chain.order}.*.safetensors"
        for file in (*self.runs.directory.glob(pattern), *self.runs.directory.glob(f".{pattern}")):
            if keep is None or file != self.weights_file(chain, keep):
                file.unlink()


def _of_one_kind(groups: Sequence[Sequence[Example]]) -> np.ndarray:
    """Return correlation loadings, shape (n, groups), of examples of which nothing is known but their group.

    Those of a group are taken to be forgotten together, and independently of all others.
    """
    sizes = [len(group) for group in groups]
    return np.repeat(np.eye(len(groups)), sizes, axis=0)
