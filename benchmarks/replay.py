"""Replay strategies side by side on the demo model: what is forgotten of examples that were never replayed.

    python benchmarks/replay.py --quick              # 2 tasks, 1 seed, 17 arms: some minutes
    python benchmarks/replay.py --json result.json   # 12 tasks; 3 seeds at ratio 1/8, one along them: 95 minutes
    python benchmarks/replay.py --known 7 --ratios 1/8 --seeds 1 --strategies top         # another regime
    python benchmarks/replay.py --quick --demo DEMO  # on what `forgetcast demo --full -o DEMO` wrote: no atlas to make

An atlas of reasoning-gym tasks is collected first. Each new task is then fine-tuned without replay and with every
strategy, several seeds, at the first ratio; with random replay and the leading strategies at the other ratios. All are
judged on the held-out half of the pool. Forecasts are made from 30 chosen probes of a run without replay unless the
name says otherwise: from the mean of the atlas, from the probes of a pilot of a quarter of the steps, or online.

Beside the strategies there are arms that do something else than replay, or replay otherwise: weights interpolated with
the base model's, a lower learning rate, fewer steps, easy samples weighted, the model's own continuations of the
pool's texts (on-policy), and `top` with the divergence from the base model as loss, a heavier loss, or another spacing.
All are compared at equal new-task loss.

Two processes of one thread each share the work. Everything that was finished is kept in the folder --work, and the
same command goes on from there.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, cached_property
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from forgetcast import Atlas, Example, Pool, ReplayPlan, make_plan, probes
from forgetcast.cli.tables import tradeoff_tables
from forgetcast.completion import Bayesian
from forgetcast.defaults import ALPHA_PROBES
from forgetcast.demo.corpus import demo_pool
from forgetcast.experiments.collect import collect, prepare_atlas
from forgetcast.experiments.interpolation import draw_probes
from forgetcast.experiments.procedural import KNOWN_TASKS, NEW_TASKS, procedural_task
from forgetcast.experiments.variants import OF_REPLAY, ON_POLICY, Interpolating, add_arms, parse_arm
from forgetcast.experiments.verify import ReplayComparison, Verification, verify
from forgetcast.lm import (
    FineTuner,
    LanguageModel,
    MostForgottenSelector,
    OnlineSelector,
    Recipe,
    ReplaySelector,
    answer_prompts,
    gradient_products,
    load,
    sample_texts,
    score,
)
from forgetcast.measure.scores import Scores
from forgetcast.replay.coverage import correlation_loadings
from forgetcast.replay.law import ReplayLaw
from forgetcast.replay.signals import Signals
from forgetcast.replay.strategies import STRATEGIES, get_strategy
from shared import conclude, figure_of, output, save_figure, target

UPSTREAM, SELF_GENERATED, TASK_SIZE, TEST_SIZE, PROBES = 600, 300, 400, 64, 30
STEPS, PILOT_STEPS, BATCH = 64, 16, 4
BY_ATLAS, BY_PILOT, ONLINE, BY_TRUTH, OWN = "atlas-mean", "pilot", "online", "truth", "self-generated"
ARMS = (
    *STRATEGIES,
    *(f"top {source}" for source in (BY_ATLAS, BY_PILOT, ONLINE)),
    f"top {BY_TRUTH}",
    f"random {OWN}",
    f"top {OWN}",
)
"""Strategies, and some of them by another forecast, or on texts that the model wrote itself."""
ASKED = (
    *("interpolation", "interpolation=0.5", "interpolation=0.8", "learning-rate=0.5", "learning-rate=0.25"),
    *("steps=0.5", "easy", "spacing", "weight=4", "kl=1"),
)
"""What `verify --arm` takes; some of them are arms of `top`."""
VARIANTS = (
    *(a.name if a.kind not in OF_REPLAY else f"top {a.name}" for a in map(parse_arm, ASKED)),
    *(f"{name} {ON_POLICY}" for name in ("random", "top")),
)
QUICK = ("none", "random", "forecast", "top", "top truth", *VARIANTS)
LEADING = ("top", "coverage-herding", "top truth")
CEILING = "top truth"
METRICS = ("mean", "worst_tenth")
PILOT_RATIOS = (1 / 32, 1 / 8)
questions = cache(procedural_task)  # some tasks take long to make up, and are asked for again at every ratio and seed


@dataclass(frozen=True)
class Study:
    """What is compared: everything that a worker process needs to know."""

    work: Path
    known: tuple[str, ...]
    learning_rate: float
    replayable: int | None = None
    demo: Path | None = None
    steps: int | None = None

    @property
    def recipe(self) -> Recipe:
        """How all tasks are tuned."""
        if self.demo is not None:
            return Recipe(**self.atlas.recipe | ({} if self.steps is None else {"steps": self.steps}))
        return Recipe(steps=self.steps or STEPS, batch_size=BATCH, learning_rate=self.learning_rate, max_length=128)

    @cached_property
    def base(self) -> LanguageModel:
        """The demo model."""
        with as_file(files("forgetcast.demo") / "model") as directory:
            return replace(load(directory), name="the demo model")

    @cached_property
    def pool(self) -> Pool:
        """Upstream examples, and after them texts that the model wrote itself; those of a demo are upstream only."""
        if self.demo is not None:
            return self.atlas.pool
        file = self.work / "pool.jsonl"
        if not file.exists():
            own = sample_texts(self.base, SELF_GENERATED, max_new_tokens=96)
            Pool([*demo_pool(UPSTREAM), *own]).save(file)
        return Pool.load(file)

    @cached_property
    def atlas(self) -> Atlas:
        """Of known and new tasks; the new ones' rows are looked at only where the truth is asked for."""
        return Atlas.open(
            self.work / f"lr-{self.learning_rate:g}.atlas" if self.demo is None else self.demo / "demo.atlas"
        )

    def task(self, name: str) -> Pool:
        """Return the examples to train on."""
        return questions(name, TASK_SIZE) if self.demo is None else Pool.load(self.demo / "tasks" / f"{name}.jsonl")

    @cached_property
    def model(self) -> Bayesian:
        """Fitted to the known tasks."""
        return Bayesian().fit(self.atlas.matrix(self.known))

    @cached_property
    def loadings(self) -> np.ndarray:
        """For coverage."""
        return correlation_loadings(self.model)

    @cached_property
    def own_answers(self) -> Pool:
        """How the model itself continues the first third of each text that is not held out, under the text's id."""
        file = self.work / "on-policy.jsonl"
        if not file.exists():
            prompts, held_out = [], set(self.held_out)
            for example in self.pool:
                words = (example.text or "").split(" ")
                if example.id in self.upstream and example.id not in held_out and len(words) >= 6:
                    third = len(words) // 3
                    begun, rest = " ".join(words[:third]), " " + " ".join(words[third:])
                    # Two lines, so that the continuation may have several.
                    prompts.append(Example(example.id, prompt=begun, completion=f"{rest}\n", source=example.source))
            own = answer_prompts(self.base, Pool(prompts), max_new_tokens=64, temperature=1.0, keep_unfinished=True)
            own.pool.save(file)
        return Pool.load(file)

    @cached_property
    def upstream(self) -> tuple[str, ...]:
        """Ids of the examples that are no texts of the model itself."""
        return tuple(id_ for id_ in self.pool.ids if not id_.startswith("self-"))

    @cached_property
    def held_out(self) -> tuple[str, ...]:
        """Ids of the half of them that is judged on."""
        return self.pool.subset(self.upstream).hold_out(0.5)

    def comparison(self, task: str, ratio: Fraction, names: tuple[str, ...]) -> ReplayComparison:
        """The plans of a new task."""
        upstream, held_out = self.upstream, self.held_out
        own = self.pool.ids[len(upstream) :]
        usable = np.setdiff1d(self.pool.positions(upstream), self.pool.positions(held_out))
        if self.replayable is not None:
            usable = np.sort(np.random.default_rng(0).choice(usable, self.replayable, replace=False))
        truth = self.atlas.matrix([task]).values[0]
        plans: dict[str, ReplayPlan] = {}
        selectors: dict[str, ReplaySelector] = {}
        for arm in (name for name in names if name not in VARIANTS):
            name, _, source = arm.partition(" ")
            strategy = get_strategy(name)
            among = self.pool.positions(own) if source == OWN else usable
            chosen = probes.choose(self.model, PROBES, among)
            known: dict[str, Any] = {"losses": self.atlas.nll_before, "loadings": self.loadings, "truth": truth}
            if "gradients" in strategy.needs:
                known["gradients"] = self._gradients(task)
            if source in (BY_ATLAS, ONLINE):
                known["forecast"] = self.model.predict([], []).mean
            elif source == BY_PILOT:
                known["forecast"] = self.model.predict(chosen, self._pilot(task, chosen)).mean
            elif source == BY_TRUTH:
                known["forecast"] = truth
            else:
                known["forecast"] = self.model.predict(chosen, truth[chosen]).mean
            plans[arm] = make_plan(
                self.pool,
                strategy,
                Signals(self.pool.ids, **known),
                ratio=0.0 if strategy.phase == "never" else float(ratio),
                held_out=held_out,
                among=[self.pool.ids[i] for i in among.tolist()],
            )
            if source == ONLINE:
                selectors[arm] = OnlineSelector(self.model, self.pool, self.atlas.nll_before, chosen)
            elif strategy.phase == "in-training":
                selectors[arm] = MostForgottenSelector(self.pool, self.atlas.nll_before)
        # The simplest first.
        core = {name: plan for name, plan in plans.items() if name in ("none", "random", "top")}
        drawn = draw_probes(self.pool.ids, self.atlas.nll_before, {*held_out, *own}, ALPHA_PROBES, 0)
        choosing = Interpolating(None, drawn, questions(task, TEST_SIZE, seed=2))
        asked = [parse_arm(text) for text in ASKED] if "top" in plans else []
        texts = self.own_answers if any(name.endswith(ON_POLICY) for name in names) else None
        every, variants = add_arms(asked, core, self.recipe, choosing=choosing, texts=texts)
        every = {name: plan for name, plan in every.items() if name in names} | plans
        return ReplayComparison(
            task,
            self.task(task),
            questions(task, TEST_SIZE, seed=1),
            every,
            selectors,
            {name: variant for name, variant in variants.items() if name in every},
        )

    def _gradients(self, task: str) -> np.ndarray:
        """Gradient product of each example, computed once."""
        file = self.work / f"{task}.gradient.npy"
        if not file.exists():
            np.save(file, gradient_products(self.base, self.task(task), self.pool))
        return np.asarray(np.load(file))

    def _pilot(self, task: str, chosen: np.ndarray) -> np.ndarray:
        """Forgetting of the probes after a short run, made once."""
        file = self.work / f"{task}.{self.learning_rate:g}.pilot.parquet"
        asked = self.pool.subset([self.pool.ids[i] for i in chosen.tolist()])
        if not file.exists() or Scores.load(file).ids != asked.ids:
            tuner = FineTuner(self.base)
            short = self.recipe.model_copy(update={"steps": PILOT_STEPS})
            tuned = tuner.tune(self.task(task), short).language_model
            score(tuned, asked).save(file)
            tuner.restore()
        scores = Scores.load(file)
        forgetting = dict(zip(scores.ids, scores.nll - self.atlas.before.at(scores.ids), strict=True))
        return np.array([forgetting[self.pool.ids[i]] for i in chosen.tolist()])

    def directory(self, ratio: Fraction) -> Path:
        """Where the runs of a ratio are kept."""
        regime = f"{len(self.known)}-{self.learning_rate:g}" + (f"-{self.replayable}" if self.replayable else "")
        regime += ("-demo" if self.demo is not None else "") + (f"-{self.steps}-steps" if self.steps else "")
        return self.work / f"runs-{regime}" / f"{ratio.numerator}-{ratio.denominator}"

    def verify(self, tasks: list[str], ratio: Fraction, names: tuple[str, ...], seeds: range) -> Verification:
        """Make the runs that are missing."""
        comparisons = [self.comparison(task, ratio, names) for task in tasks]
        return verify(
            FineTuner(self.base), self.atlas, self.recipe, comparisons, seeds=seeds, directory=self.directory(ratio)
        )


def _work(study: Study, *what: Any) -> None:
    """Run in a process of its own, one of two."""
    torch.set_num_threads(1)
    study.verify(*what)


def run(
    study: Study, new: list[str], ratios: list[Fraction], names: tuple[str, ...], seeds: int, curve_seeds: int
) -> list[Verification]:
    """Collect the atlas, and verify the strategies at each ratio; whatever is there already is not repeated."""
    console, started = Console(stderr=True), time.monotonic()
    study.work.mkdir(parents=True, exist_ok=True)
    counted: list[str] = []

    def log(what: str, done: int, total: int) -> None:
        if what.partition(":")[0] not in counted:
            counted.append(what.partition(":")[0])
            console.print(f"{time.monotonic() - started:6.0f} s  atlas {done / total:4.0%}  {what}")

    if study.demo is None:
        tasks = {name: study.task(name) for name in (*study.known, *new)}
        path = study.work / f"lr-{study.learning_rate:g}.atlas"
        atlas = prepare_atlas(path, study.base, study.pool, study.recipe, on_progress=log)
        collect(FineTuner(study.base), atlas, study.recipe, tasks, on_progress=log)
    if any(name.endswith(ON_POLICY) for name in names):
        console.print(f"{len(study.own_answers)} continuations by the model itself")  # before two processes need them
    leading = tuple(name for name in ("random", *LEADING) if name in names)
    wanted = [
        (ratio, names, range(seeds)) if ratio == ratios[0] else (ratio, leading, range(curve_seeds)) for ratio in ratios
    ]
    # One seed of all after the other, so that a run that is cut short has whole ones.
    jobs = [
        ([task], ratio, arms, range(seed, seed + 1))
        for seed in range(max(seeds, curve_seeds))
        for ratio, arms, asked in wanted
        for task in new
        if seed in asked
    ]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as workers:
        # A fresh copy of the study: PyTorch would let all processes train the one model that this one has loaded.
        started_jobs = [workers.submit(_work, replace(study), *job) for job in jobs]
        for done, job in enumerate(as_completed(started_jobs)):
            job.result()
            console.print(f"{time.monotonic() - started:6.0f} s  {done + 1} of {len(jobs)} tasks and ratios")
    return [study.verify(new, *what) for what in wanted]


def rows_of(result: Verification) -> list[dict[str, Any]]:
    """Return each strategy's forgetting, next to random replay's."""
    rows = []
    for arm in result.arms:
        row: dict[str, Any] = {"ratio": result.ratio, "strategy": arm}
        for metric in (*METRICS, "worst_hundredth", "new_task_loss"):
            value, random = result.average(arm, metric), result.average("random", metric)
            row |= {metric: value, f"{metric}_to_random": value / random}
            if arm != "random" and (gap := result.compare(arm, "random", metric)) is not None:
                row |= {
                    f"{metric}_lower": 1 + min(gap.difference.lower, gap.bootstrap_lower) / random,
                    f"{metric}_upper": 1 + max(gap.difference.upper, gap.bootstrap_upper) / random,
                    f"{metric}_corrected_p": gap.corrected_wilcoxon_p,
                }
            if CEILING in result.arms and metric in METRICS:
                row[f"{metric}_gap_closed"] = (random - value) / (random - result.average(CEILING, metric))
        row |= {name: result.average(arm, name) for name in ("replayed", "steps", "seconds")}
        place = next(each for each in result.tradeoffs if each.arm == arm)
        row |= {"equal_loss": place.equal, "on_front": place.on_front, **place.cost}
        for name in ("new_task_loss", *METRICS):
            estimate = getattr(place, name)
            row |= {f"{name}_to_none": estimate.mean, f"{name}_to_none_lower": estimate.lower}
            row |= {f"{name}_to_none_upper": estimate.upper}
        alphas = [run.alpha for run in result.runs if run.arm == arm and run.alpha is not None]
        rows.append(row | ({"alpha": float(np.mean(alphas))} if alphas else {}))
    return rows


def curve(results: list[Verification], arm: str, metric: str) -> np.ndarray:
    """Mean of a metric at each ratio of each task, shape (ratios, tasks), over the seeds that all ratios have."""
    common = set.intersection(*({(r.task, r.seed) for r in v.runs} for v in results))
    tasks = sorted({task for task, _ in common})
    value = [{(r.task, r.seed): getattr(r, metric) for r in v.runs if r.arm == arm} for v in results]
    return np.array([[np.mean([v[key] for key in common if key[0] == task]) for task in tasks] for v in value])


def saved(results: list[Verification], arm: str, metric: str, ratio: float) -> tuple[float, float, float]:
    """Share of replayed examples that a strategy saves for the retention that random replay has at a ratio.

    Both curves are of the runs that all ratios have, and are read off between two ratios on a line in the logarithm of
    the ratio. Drawing the tasks again gives the 95 % interval; where a curve does not reach random's forgetting within
    the ratios that were run, the end of the curve counts.

    Returns
    -------
    saved, lower, upper : float
    """
    at = np.log([v.ratio for v in results])
    mine, random = curve(results, arm, metric), curve(results, "random", metric)
    order, here = np.argsort(at), int(np.argmin(np.abs(at - np.log(ratio))))

    def once(which: np.ndarray) -> float:
        falling = np.minimum.accumulate(mine[:, which].mean(axis=1)[order])  # noise may let it rise
        needed = np.interp(-random[here, which].mean(), -falling, at[order])
        return float(1 - np.exp(needed) / ratio)

    rng, tasks = np.random.default_rng(0), mine.shape[1]
    drawn = [once(rng.integers(tasks, size=(tasks,))) for _ in range(2000)]
    return once(np.arange(tasks)), *np.quantile(drawn, (0.025, 0.975)).tolist()


def draw(results: list[Verification], names: tuple[str, ...], path: Path) -> None:
    """Plot the share of the forgetting without replay that is left, against the ratio."""
    ordered = sorted(results, key=lambda result: result.ratio)
    ratios = [result.ratio for result in ordered]
    seeds = set.intersection(*({run.seed for run in result.runs} for result in results))
    figure = figure_of(9, 3.6)
    panels = figure.subplots(1, 2, sharey=True)
    for panel, metric in zip(panels, METRICS, strict=True):
        none = np.mean([getattr(r, metric) for v in results for r in v.runs if r.arm == "none" and r.seed in seeds])
        for arm in (name for name in ("random", *LEADING) if name in names):
            left = curve(ordered, arm, metric).mean(axis=1) / none
            panel.plot(ratios, left, marker="o", markersize=3, label=arm, color="gray" if arm == "random" else None)
        panel.set(title=metric.replace("_", " "), xlabel="replayed examples per new one", xscale="log")
        panel.set_xticks(ratios, [str(Fraction(ratio)) for ratio in ratios])
        panel.minorticks_off()
    panels[0].set(ylabel="share of the forgetting left")
    panels[1].legend(fontsize=8)
    save_figure(figure, path)


def advice_rows(results: list[Verification]) -> list[dict[str, Any]]:
    """Measure how well random replay's remaining forgetting is predicted at other ratios.

    Of each new task the runs at two ratios and without replay are known (a pilot), or the other tasks' runs, or both.
    Beside the law stands a straight line through the pilot's two points, over the logarithm of the ratio.
    """
    runs = [replace(run, strategy=run.arm) for v in results for run in v.runs if run.arm in ("none", "random")]
    runs = list({(run.task, run.seed, run.ratio): run for run in runs if run.seed == 0}.values())
    rows = []
    for metric in METRICS:
        before = {run.task: getattr(run, metric) for run in runs if not run.ratio}
        found: dict[str, list[tuple[float, float, float, float]]] = {}
        for task in before:
            own = [run for run in runs if run.task == task and run.ratio in (0.0, *PILOT_RATIOS)]
            others = [run for run in runs if run.task != task]
            points = sorted((float(run.ratio or 0), getattr(run, metric) / before[task]) for run in own if run.ratio)
            (x0, y0), (x1, y1) = points
            laws = {
                "a pilot of the task": (ReplayLaw.fit(own, metric), task),
                "runs of the other tasks": (ReplayLaw.fit(others, metric), None),
                "both": (ReplayLaw.fit(own + others, metric), task),
            }
            for run in (r for r in runs if r.task == task and r.ratio and r.ratio not in PILOT_RATIOS):
                truth, ratio = getattr(run, metric) / before[task], float(run.ratio or 0)
                line = y0 + (y1 - y0) * np.log(ratio / x0) / np.log(x1 / x0)
                found.setdefault("a pilot, on a straight line", []).append((truth, line, np.nan, np.nan))
                for name, (law, of) in laws.items():
                    found.setdefault(name, []).append((truth, *law.remaining("random", ratio, task=of)))
        for name, quadruples in found.items():
            truth_, mean, lower, upper = np.array(quadruples).T
            error = float(np.sqrt(((mean - truth_) ** 2).mean()))
            inside = float(((lower <= truth_) & (truth_ <= upper)).mean()) if not np.isnan(lower).any() else np.nan
            rows.append({"advice": name, "metric": metric, "rmse": error, "inside": inside, "runs": len(truth_)})
    return rows


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 new tasks, 8 known, 1 seed, 6 strategies")
    parser.add_argument("--tasks", type=int, default=12, help="new tasks")
    parser.add_argument("--new", help="new tasks by name, such as basic_arithmetic,rotate_matrix; default: --tasks")
    parser.add_argument("--known", type=int, default=28, help="tasks of the atlas")
    parser.add_argument("--seeds", type=int, default=3, help="fine-tunes of each task and strategy at the first ratio")
    parser.add_argument("--curve-seeds", type=int, default=1, help="fine-tunes of each task at the other ratios")
    parser.add_argument("--ratios", default="1/8,1/64,1/32,1/16,1/4", help="replayed examples per new one")
    parser.add_argument("--strategies", help="some of them, with none, random and the ceiling always; default: all")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, help=f"steps on new examples; default: {STEPS}, with --demo the demo's")
    parser.add_argument("--replayable", type=int, help="upstream examples that may be replayed; default: 300")
    parser.add_argument("--work", type=Path, default=Path("benchmark-replay"), help="folder for what is finished")
    parser.add_argument("--demo", type=Path, help="what `forgetcast demo --full` wrote: its atlas, pool and tasks")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--plot", type=Path, help="figure to draw along the ratios, e.g. docs/explanation/replay.svg")
    options = parser.parse_args()
    names = (*ARMS, *VARIANTS)
    if options.quick:
        options.tasks, options.known, options.seeds, options.ratios, names = 2, 8, 1, "1/8", QUICK
    elif options.strategies:
        asked = ["none", "random", CEILING, *options.strategies.split(",")]
        if unknown := set(asked) - set(names):
            raise SystemExit(f"unknown strategies {', '.join(sorted(unknown))}; there are {', '.join(names)}")
        if set(asked) & set(VARIANTS) and "top" not in asked:
            raise SystemExit("the arms that are no strategies need top beside them")
        names = tuple(arm for arm in names if arm in asked)
    new, known = [*NEW_TASKS, *reversed(KNOWN_TASKS)][: options.tasks], KNOWN_TASKS[: options.known]
    if options.new is not None:
        new = options.new.split(",")
        if unknown := set(new) - {*NEW_TASKS, *KNOWN_TASKS}:
            raise SystemExit(
                f"there is no task {', '.join(sorted(unknown))}; there are {', '.join(NEW_TASKS + KNOWN_TASKS)}"
            )
    if both := set(new) & set(known):
        raise SystemExit(f"{len(both)} tasks would be known and new; there are {len(NEW_TASKS + KNOWN_TASKS)} in all")
    if options.demo is not None:
        names = tuple(arm for arm in names if not arm.endswith(OWN))  # the demo's pool has no such texts
    study = Study(options.work, tuple(known), options.learning_rate, options.replayable, options.demo, options.steps)
    ratios = [Fraction(text) for text in options.ratios.split(",")]
    results = run(study, new, ratios, names, options.seeds, options.curve_seeds)
    console, rows = output(), [row for result in results for row in rows_of(result)]
    table = Table("ratio", "strategy", "mean", "to random", "worst tenth", "to random", "new-task loss", "replayed")
    table.title = f"Forgetting of {results[0].judged} never-replayed examples, nats per token (95 % interval)"
    for r in rows:
        cells = []
        for metric in METRICS:
            sure = f" ({r[f'{metric}_lower']:.3f}-{r[f'{metric}_upper']:.3f})" if f"{metric}_lower" in r else ""
            cells += [f"{r[metric]:.4f}", f"{r[f'{metric}_to_random']:.3f}{sure}"]
        table.add_row(f"{r['ratio']:.4g}", r["strategy"], *cells, f"{r['new_task_loss']:.3f}", f"{r['replayed']:.0f}")
    console.print(table)
    for part in tradeoff_tables(results[0]):
        console.print(part)
    savings = []
    if len(results) > 1:
        table = Table("strategy", "ratio", *(f"examples saved, {metric.replace('_', ' ')}" for metric in METRICS))
        table.title = "Fewer replayed examples for the retention of random replay (95 % interval)"
        for arm in (name for name in LEADING if name in names):
            for result in sorted(results, key=lambda result: result.ratio)[1:]:
                row: dict[str, Any] = {"strategy": arm, "ratio": result.ratio}
                for metric in METRICS:
                    found = saved(results, arm, metric, result.ratio)
                    row |= dict(zip((f"{metric}_saved", f"{metric}_lower", f"{metric}_upper"), found, strict=True))
                savings.append(row)
                cells = [
                    f"{row[f'{m}_saved']:.0%} ({row[f'{m}_lower']:.0%} to {row[f'{m}_upper']:.0%})" for m in METRICS
                ]
                table.add_row(arm, f"{result.ratio:.4g}", *cells)
        console.print(table)
        if options.plot:
            draw(results, names, options.plot)
    advised: list[dict[str, Any]] = []
    if {0.0, *PILOT_RATIOS} < {run.ratio for result in results for run in result.runs}:
        advised = advice_rows(results)
        table = Table("known", "metric", "RMSE", "in the 90 % interval", "runs")
        table.title = "Remaining forgetting of random replay, predicted at other ratios"
        for row in advised:
            inside = "" if np.isnan(row["inside"]) else f"{row['inside']:.0%}"
            table.add_row(row["advice"], row["metric"], f"{row['rmse']:.3f}", inside, f"{row['runs']}")
        console.print(table)
        everything = [replace(run, strategy=run.arm) for result in results for run in result.runs]
        for metric in METRICS:
            law = ReplayLaw.fit([run for run in everything if run.arm in ("none", "random", *LEADING)], metric)
            for arm in law.strategies[1:]:
                worth = law.efficiency(arm, level=0.95)
                advised.append({"advice": "efficiency", "strategy": arm, "metric": metric, **worth._asdict()})
                console.print(
                    f"By the law, {metric}: {arm} needs {1 / worth.mean:.2f} times random's examples "
                    f"({1 / worth.upper:.2f} to {1 / worth.lower:.2f})"
                )
    advice = [{"advice": "recipe", **results[0].advice.as_dict()}]
    held_to = [*targets(rows, savings), *advised_target(results[0])]
    conclude(console, [*rows, *savings, *advised, *advice], held_to, options.json, "torch", "transformers")


def advised_target(result: Verification) -> list[dict[str, Any]]:
    """The advised arm forgets no more than the best at equal new-task loss, within the interval of the difference."""
    advice = result.advice
    if advice.arm is None or advice.best is None or advice.arm == advice.best:
        return []
    gaps = {metric: result.compare(advice.arm, advice.best, metric) for metric in METRICS}
    return [
        target(f"advised {advice.arm} minus best {advice.best}: {metric}, lower end", gap.difference.lower, 0.0)
        for metric, gap in gaps.items()
        if gap is not None
    ]


def targets(rows: list[dict[str, Any]], savings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What 'top' by the forecast has to hold up to, at the first ratio."""
    first = {r["strategy"]: r for r in rows if r["ratio"] == rows[0]["ratio"]}
    found = []
    for metric, bound, fewer in (("worst_tenth", 0.93, 0.15), ("mean", 0.97, 0.08)):
        name = metric.replace("_", " ")
        found.append(target(f"top: {name} to random replay's", first["top"][f"{metric}_to_random"], bound))
        if f"{metric}_upper" in first["top"]:
            found.append(target(f"top: {name}, upper end", first["top"][f"{metric}_upper"], 1.0))
        for row in savings:
            if (row["strategy"], row["ratio"]) == ("top", rows[0]["ratio"]):
                found.append(target(f"top: examples saved, {name}", row[f"{metric}_saved"], fewer, least=True))
        if f"top {ONLINE}" in first:
            online, offline = (first[f"top {source}"][metric] for source in (ONLINE, BY_ATLAS))
            found.append(target(f"top online to top from the atlas mean, {name}", online / offline, 1.0))
    found.append(target("top: new-task loss to random replay's", first["top"]["new_task_loss_to_random"], 1.01))
    return found


if __name__ == "__main__":
    main()
