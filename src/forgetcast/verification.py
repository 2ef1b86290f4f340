"""Verify a replay plan: fine-tune with and without it, several seeds, and judge on examples that were never replayed.

Every finished run is one score file, so an interrupted verification goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from forgetcast.atlas import Atlas
from forgetcast.collect import TRAINING_UNITS, Meter, OnProgress, measure
from forgetcast.completion import Bayesian
from forgetcast.coverage import correlation_loadings
from forgetcast.errors import ConfigError, DataError, MismatchError
from forgetcast.evaluation import worst_part, worst_tenth
from forgetcast.paired import Compared
from forgetcast.pool import Pool, train_and_test
from forgetcast.replay import STRATEGIES, ReplayPlan, make_plan
from forgetcast.scores import Scores

if TYPE_CHECKING:
    from forgetcast.lm import Chooser, Workbench
    from forgetcast.recipe import Recipe

METRIC_NAMES = {
    "mean": "mean forgetting",
    "worst_tenth": "worst tenth",
    "new_task_loss": "new-task loss",
    "worst_hundredth": "worst hundredth",
    "right_to_wrong": "right, now wrong",
}
"""Fields of `Run` that are compared, and what people call them; lower is better for each."""

TEST_SHARE = 0.1
"""Share of a task's examples that only its loss is judged on, where nothing else is asked for."""

METRICS = ("mean", "worst_tenth", "new_task_loss")
"""Those that every run has; `Verification.metrics` are those that its runs have."""


@dataclass(frozen=True)
class Run:
    """One fine-tune, judged.

    Attributes
    ----------
    task, arm : str
    seed : int
    mean, worst_tenth : float
        Forgetting of the judged upstream examples, nats per token: all of them, and the most forgotten tenth.
    new_task_loss : float
        Mean loss on examples of the task that were not trained on, nats per target token.
    replayed, steps : int
    seconds : float
        Wall time of the training.
    worst_hundredth : float or None
        As `worst_tenth`; None in files of earlier versions.
    right_to_wrong : int or None
        Judged examples that the base model answered right and the tuned one wrong; None where exact match was not
        measured of both.
    strategy : str or None
        That of the replay plan, with "online" behind it where the plan was made anew during training; as the following,
        None in files of earlier versions.
    ratio : float or None
        Replayed examples per new one.
    setup : str or None
        Hash of all that the runs of a comparison share: base model, data, judged examples, recipe but for its seed.
    """

    task: str
    arm: str
    seed: int
    mean: float
    worst_tenth: float
    new_task_loss: float
    replayed: int
    steps: int
    seconds: float
    worst_hundredth: float | None = None
    right_to_wrong: int | None = None
    strategy: str | None = None
    ratio: float | None = None
    setup: str | None = None


@dataclass(frozen=True)
class Verification(Compared):
    """Runs of all arms.

    Attributes
    ----------
    runs : tuple of Run
    judged : int
        Upstream examples that each run was judged on.
    ratio : float
        Replayed examples per new one.
    """

    runs: tuple[Run, ...]
    judged: int
    ratio: float

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of the arms, in the order they were run."""
        return tuple(dict.fromkeys(run.arm for run in self.runs))

    def average(self, arm: str, metric: str) -> float:
        """Mean of a metric over an arm's runs."""
        return float(np.mean([getattr(run, metric) for run in self.runs if run.arm == arm]))

    @property
    def metrics(self) -> tuple[str, ...]:
        """Fields of `Run` that every run has."""
        return tuple(name for name in METRIC_NAMES if all(getattr(run, name) is not None for run in self.runs))

    def _differences(self, arm: str, baseline: str, metric: str) -> list[np.ndarray]:
        """Of each task with pairs, those of its seeds."""
        value = {(run.task, run.seed, run.arm): getattr(run, metric) for run in self.runs}
        groups: dict[str, list[float]] = {}
        for task, seed, name in value:
            if name == arm and (task, seed, baseline) in value:
                groups.setdefault(task, []).append(value[task, seed, arm] - value[task, seed, baseline])
        return [np.array(group) for group in groups.values()]

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        return {
            "judged": self.judged,
            "ratio": self.ratio,
            "arms": {
                arm: {name: self.average(arm, name) for name in (*self.metrics, "replayed", "steps", "seconds")}
                for arm in self.arms
            },
            "comparisons": [comparison.as_dict() for comparison in self.comparisons()],
            "runs": [asdict(run) for run in self.runs],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Verification:
        """Read what `as_dict` wrote.

        Raises
        ------
        DataError
            If a field is missing.
        """
        try:
            return cls(tuple(Run(**run) for run in content["runs"]), content["judged"], content["ratio"])
        except (KeyError, TypeError) as error:
            raise DataError(f"this is not a verification: {error}") from None


@dataclass(frozen=True)
class Trial:
    """A task to verify on: its name, what is trained on, what its loss is judged on, and a plan for each arm.

    Arms that have a chooser decide during training which examples of their plan come next.
    """

    name: str
    train: Pool
    test: Pool
    plans: Mapping[str, ReplayPlan]
    choosers: Mapping[str, Chooser] = field(default_factory=dict)


def arms(plans: Sequence[ReplayPlan], pool: Pool) -> dict[str, ReplayPlan]:
    """Arms to compare plans in: no replay, random replay at the same ratio, and each plan, by its strategy.

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
    arms = {"none": make_plan(pool, "none", 0.0, held_out=held_out)}
    if ratio:
        repeat = any(plan.repeat for plan in plans)
        arms["random"] = make_plan(pool, "random", ratio, held_out=held_out, repeat=repeat)
    return arms | {name: plan for name, plan in by_name.items() if name not in arms}


def pilot_trial(
    atlas: Atlas,
    name: str,
    examples: Pool,
    *,
    strategies: Sequence[str],
    ratios: Sequence[float],
    hold_out: float,
    repeat: bool = False,
) -> Trial:
    """No replay, and random replay and each strategy at each ratio, by what the atlas knows before a new task.

    Parameters
    ----------
    atlas : Atlas
    name : str
        Of the task.
    examples : Pool
        Fine-tuning data, of which a tenth is kept for its loss.
    strategies : sequence of str
        Beside 'random'.
    ratios : sequence of float
    hold_out : float
        Share of the pool that is judged on and never replayed.
    repeat : bool
        As in `make_plan`.

    Raises
    ------
    ConfigError
        If a strategy has to know more than the atlas, or is no way to replay.
    """
    pool, known = atlas.pool, dict[str, Any](losses=atlas.nll_before)
    wanted = tuple(dict.fromkeys(["random", *strategies]))
    for strategy in wanted:
        kind = STRATEGIES.get(strategy)
        if strategy in ("none", "padding", "mir") or kind is None or {"truth", "gradients"}.intersection(kind.needs):
            raise ConfigError(f"the strategy {strategy!r} cannot be piloted: it does not go by the atlas alone")
    if any("forecast" in STRATEGIES[strategy].needs for strategy in wanted):
        model = Bayesian().fit(atlas.matrix())
        known |= {"forecast": model.predict([], []).mean, "loadings": correlation_loadings(model)}
    held_out = atlas.hold_out(hold_out)
    plans = {"none": make_plan(pool, "none", 0.0, held_out=held_out)}
    for strategy in wanted:
        for ratio in ratios:
            plans[f"{strategy} {ratio:.4g}"] = make_plan(
                pool, strategy, ratio, held_out=held_out, repeat=repeat, **known
            )
    train, test = train_and_test(examples, TEST_SHARE)
    return Trial(name, train, test, plans)


def verify(
    workbench: Workbench,
    trials: Sequence[Trial],
    pool: Pool,
    before: Scores,
    recipe: Recipe,
    *,
    seeds: Iterable[int] = (0, 1),
    directory: str | Path,
    on_progress: OnProgress | None = None,
) -> Verification:
    """Fine-tune on every trial with every arm and seed, and judge on the examples that its plans hold out.

    Parameters
    ----------
    workbench : Workbench
        With the base model.
    trials : sequence of Trial
        The plans of a trial must hold out the same examples.
    pool : Pool
    before : Scores
        Of the base model on the pool. With its answers, the tuned models answer too, and flips are counted.
    recipe : Recipe
        Its seed is replaced by each of `seeds`, which also sets the order of replay.
    directory : path
        Where the score file of every run is kept. Runs that are there already are not repeated.
    on_progress : callable, optional

    Raises
    ------
    MismatchError
        If a plan is of another pool, or a run in `directory` was made with other settings.
    ConfigError
        If the plans of a trial hold out other examples, or one cannot be replayed by this recipe: `ReplayPlan.count`.
    """
    seeds = tuple(seeds)
    judged = {trial.name: _judged(trial, pool) for trial in trials}
    todo = [(trial, arm, seed) for trial in trials for seed in seeds for arm in trial.plans]
    files = {(t.name, arm, seed): Path(directory) / f"{t.name}.{arm}.{seed}.parquet" for t, arm, seed in todo}

    asked = before.exact_match is not None
    answers = {"answers": {"max_new_tokens": before.metadata.get("max_new_tokens", 32)}} if asked else {}

    def units(trial: Trial, arm: str) -> int:
        trained = recipe.steps * recipe.batch_size + trial.plans[arm].count(recipe.steps, recipe.batch_size)
        return trained * TRAINING_UNITS + (1 + asked) * len(judged[trial.name]) + len(trial.test)

    missing = [(t, arm, seed) for t, arm, seed in todo if not files[t.name, arm, seed].exists()]
    meter = Meter(sum(units(trial, arm) for trial, arm, _ in missing), on_progress)
    runs = []
    for trial, arm, seed in todo:
        file = files[trial.name, arm, seed]
        seeded = recipe.model_copy(update={"seed": seed})
        settings = _settings(workbench, trial, arm, seeded, judged[trial.name]) | answers
        if not file.exists():
            _run(workbench, trial, arm, seed, recipe, pool, judged[trial.name], meter, settings).save(file)
        runs.append(_read(file, trial, arm, seed, before, settings))
    if missing:
        workbench.restore()
    ratio = max(plan.ratio for trial in trials for plan in trial.plans.values())
    return Verification(tuple(runs), min(len(j) for j in judged.values()), ratio)


def _judged(trial: Trial, pool: Pool) -> Pool:
    for plan in trial.plans.values():
        plan.check_pool(pool)
    held_out = {plan.held_out_ids for plan in trial.plans.values()}
    if len(held_out) != 1 or not (ids := held_out.pop()):
        raise ConfigError(f"{trial.name}: the arms' plans must hold out the same examples, and at least one")
    return pool.subset(ids)


def _settings(workbench: Workbench, trial: Trial, arm: str, recipe: Recipe, judged: Pool) -> dict[str, Any]:
    """Everything that a run's outcome depends on; a stored run with other settings is not this run."""
    plan = trial.plans[arm]
    online = {"chooser": trial.choosers[arm].settings()} if arm in trial.choosers else {}
    return {
        "base": workbench.base_hash,
        "train": trial.train.fingerprint,
        "test": trial.test.fingerprint,
        "judged": judged.fingerprint,
        "recipe": recipe.model_dump(),
        "ratio": plan.ratio,
        "weights": plan.fingerprint,
    } | online


def _run(
    workbench: Workbench,
    trial: Trial,
    arm: str,
    seed: int,
    recipe: Recipe,
    pool: Pool,
    judged: Pool,
    meter: Meter,
    settings: dict[str, Any],
) -> Scores:
    name = f"{trial.name}, {arm} replay, seed {seed}"
    tuned = workbench.tune(
        trial.train,
        recipe.model_copy(update={"seed": seed}),
        plan=replace(trial.plans[arm], seed=seed),
        pool=pool,
        chooser=trial.choosers.get(arm),
        on_step=lambda *_: meter.advance(f"{name}: fine-tuning", recipe.batch_size * TRAINING_UNITS),
    )
    after = measure(tuned.language_model, judged, meter, name, settings.get("answers"))
    test = measure(tuned.language_model, trial.test, meter, name)
    facts = {
        "settings": settings,
        "new_task_loss": float(np.nanmean(test.nll)),
        "replayed": len(tuned.replayed),
        "steps": tuned.steps,
        "seconds": tuned.seconds,
    }
    return replace(after, metadata={**after.metadata, **facts})


def _read(file: Path, trial: Trial, arm: str, seed: int, before: Scores, settings: dict[str, Any]) -> Run:
    scores = Scores.load(file)
    facts = scores.metadata
    if facts.get("settings") != settings:
        raise MismatchError(f"{file} is of a run with other settings; remove it, or use another directory")
    forgetting = scores.nll - before.at(scores.ids)
    plan = trial.plans[arm]
    recipe = {name: value for name, value in settings["recipe"].items() if name != "seed"}
    shared = [*(settings[name] for name in ("base", "train", "test", "judged")), recipe]
    return Run(
        task=trial.name,
        arm=arm,
        seed=seed,
        mean=float(np.nanmean(forgetting)),
        worst_tenth=worst_tenth(forgetting),
        new_task_loss=facts["new_task_loss"],
        replayed=facts["replayed"],
        steps=facts["steps"],
        seconds=facts["seconds"],
        worst_hundredth=worst_part(forgetting, 100),
        right_to_wrong=_right_to_wrong(before, scores),
        strategy=plan.strategy if "chooser" not in settings or plan.strategy == "mir" else f"{plan.strategy} online",
        ratio=plan.ratio,
        setup=hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16],
    )


def _right_to_wrong(before: Scores, after: Scores) -> int | None:
    """Examples of `after` that were answered right before and wrong after; None where one was not asked."""
    if before.exact_match is None or after.exact_match is None:
        return None
    right = dict(zip(before.ids, before.exact_match, strict=True))
    asked = np.array([right[id_] for id_ in after.ids]), after.exact_match
    if np.isnan(asked[0] + asked[1]).all():
        return None
    return int(((asked[0] == 1) & (asked[1] == 0)).sum())
