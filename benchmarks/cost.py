"""What a history costs, and what it is worth: forecast error on new tasks against tasks, steps, share scored, method.

    python benchmarks/cost.py --quick                                # 4 tasks of 10 steps: 90 seconds
    python benchmarks/cost.py --json benchmarks/results/cost.json    # 28 tasks, 4 ways to tune: half an hour

The demo model is tuned on reasoning-gym tasks, with every weight or with LoRA, for 10 or 40 steps. Each history is the
first tasks of one of these atlases, with the whole pool or a random quarter of it scored for each task. It forecasts
the rows of four tasks that are in none of them, which were tuned for 40 steps by the same method, or by the other one.
One half of the pool gives 30 chosen probes, the other is judged; mean of ten such halves. Errors are RMSE relative to
no history: the mean of 30 random probes stands for all other examples.

Rows are kept in the folder --work, and the same command goes on from there. Seconds are those of this machine while it
ran, of training and scoring, without the base model's scores.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace
from importlib.resources import as_file, files
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
from rich.console import Console
from rich.table import Table

from forgetcast import Atlas, ForgettingMatrix, Pool, Recipe, probes
from forgetcast.completion import Bayesian
from forgetcast.demo.corpus import demo_pool
from forgetcast.experiments.collect import collect, prepare_atlas
from forgetcast.experiments.procedural import KNOWN_TASKS, NEW_TASKS, procedural_task
from forgetcast.experiments.start import Speed, StartSettings, choose_plan
from forgetcast.lm import FineTuner, load
from shared import conclude, output, target

TASKS, SHARES, STEPS, METHODS = (2, 4, 8, 16, 28), (1.0, 0.25), (10, 40), ("lora", "full")
JUDGED_STEPS, PROBES, SPLITS, DRAWS, SUBSETS = 40, 30, 10, 20, 5
BUDGETS = (30, 60, 120, 240, 600)
"""Seconds, for LoRA on the demo model."""
Rows = list[dict[str, Any]]


def recipe(method: str, steps: int) -> Recipe:
    """How all tasks of an atlas are tuned: as `forgetcast start` does by default, but for method and steps."""
    return Recipe(method=method, steps=steps, learning_rate=1e-3, batch_size=8, max_length=128)


def measure(work: Path, pool: Pool, tasks: int, steps: tuple[int, ...], console: Console) -> None:
    """Make an atlas for each method and number of steps, with the new tasks' rows where they are judged on."""
    with as_file(files("forgetcast.demo") / "model") as directory:
        tuner = FineTuner(replace(load(directory), name="the demo model"))
    started = time.monotonic()
    for method, n in product(METHODS, sorted({*steps, JUDGED_STEPS}, reverse=True)):
        names = (*KNOWN_TASKS[:tasks],) * (n in steps) + (NEW_TASKS if n == JUDGED_STEPS else ())
        rows = {name: procedural_task(name, n * 8) for name in names}
        settings = recipe(method, n)
        atlas = prepare_atlas(path_of(work, method, n), tuner.base, pool, settings)
        collect(tuner, atlas, settings, rows)
        console.print(f"{time.monotonic() - started:6.0f} s  {method}, {n} steps: {len(names)} rows")


def path_of(work: Path, method: str, steps: int) -> Path:
    """Where an atlas is kept."""
    return work / f"{method}-{steps}.atlas"


def errors(history: ForgettingMatrix | None, truth: np.ndarray) -> np.ndarray:
    """Error on each new task, nats per token; without a history, of the mean of random probes.

    Parameters
    ----------
    history : ForgettingMatrix or None
    truth : ndarray, shape (tasks, examples)

    Returns
    -------
    ndarray, shape (tasks,)
    """
    model = None if history is None else Bayesian().fit(history)
    found = []
    for split in range(SPLITS):
        rng = np.random.default_rng(split)
        candidates, judged = np.array_split(rng.permutation(truth.shape[1]), 2)
        if model is None:
            drawn = [rng.choice(candidates, min(PROBES, len(candidates)), replace=False) for _ in range(DRAWS)]
            constant = np.array([truth[:, each].mean(axis=1) for each in drawn])
            error = np.sqrt(((constant[:, :, None] - truth[:, judged]) ** 2).mean(axis=2)).mean(axis=0)
        else:
            chosen = probes.choose(model, min(PROBES, len(candidates)), candidates)
            forecast = model.predict(chosen, truth[:, chosen]).mean
            error = np.sqrt(((forecast[:, judged] - truth[:, judged]) ** 2).mean(axis=1))
        found.append(error)
    return np.mean(found, axis=0)


def scored(atlas: Atlas, names: tuple[str, ...], share: float) -> ForgettingMatrix:
    """Return rows of which a random share is measured, another one for each."""
    values = atlas.matrix(names).values.copy()
    if share < 1:
        for row, name in zip(values, names, strict=True):
            row[~np.isin(np.arange(len(row)), atlas.pool.positions(atlas.hold_out(share, seed=rank(name))))] = np.nan
    return ForgettingMatrix(values)


def rank(name: str) -> int:
    """Seed of a task's sample."""
    return KNOWN_TASKS.index(name) + 1


def seconds_of(atlas: Atlas, names: tuple[str, ...], share: float) -> float:
    """Seconds that rows took; scoring a share of the pool takes that share of the time."""
    costs = [atlas.provenance(name)["cost"] for name in names]
    return sum(cost["training"]["seconds"] + share * cost["scoring"]["seconds"] for cost in costs)


def curve(work: Path, sizes: tuple[int, ...], steps: tuple[int, ...]) -> Rows:
    """Return the error and the cost of every history."""
    found: Rows = []
    truths = {m: Atlas.open(path_of(work, m, JUDGED_STEPS)).matrix(NEW_TASKS).values for m in METHODS}
    nothing = {method: errors(None, truth) for method, truth in truths.items()}
    for method, n, share, size in product(METHODS, steps, SHARES, sizes):
        atlas, names = Atlas.open(path_of(work, method, n)), KNOWN_TASKS[:size]
        row: dict[str, Any] = {"method": method, "steps": n, "share": share, "tasks": size}
        for judged, truth in truths.items():
            ratio = errors(scored(atlas, names, share), truth) / nothing[judged]
            key = "error" if judged == method else "error_other_method"
            row |= {key: float(ratio.mean()), f"{key}_lowest": float(ratio.min()), f"{key}_highest": float(ratio.max())}
        if size < max(sizes):
            rng, measured = np.random.default_rng(0), KNOWN_TASKS[: max(sizes)]
            drawn = [tuple(rng.choice(measured, size, replace=False).tolist()) for _ in range(SUBSETS)]
            others = [(errors(scored(atlas, d, share), truths[method]) / nothing[method]).mean() for d in drawn]
            row["error_random_tasks"] = float(np.mean(others))
        forgetting = float(np.mean(atlas.matrix(names).values))
        found.append(row | {"seconds": seconds_of(atlas, names, share), "forgetting": forgetting})
    return found


def recommend(work: Path, steps: int) -> Rows:
    """Return what `forgetcast start` would do with budgets on the machine that the rows were made on."""
    atlas = Atlas.open(path_of(work, "lora", steps))
    costs = [atlas.provenance(name)["cost"] for name in NEW_TASKS]
    seconds = {part: float(np.mean([cost[part]["seconds"] for cost in costs])) for part in ("training", "scoring")}
    speed = Speed(0.0, seconds["training"] / steps, seconds["scoring"] / len(atlas.examples))
    found: Rows = []
    for budget in BUDGETS:
        plan = choose_plan(speed, len(atlas.examples), StartSettings(budget=budget))
        facts = {"tasks": len(plan.tasks), "steps": plan.recipe.steps, "share": plan.score_share}
        found.append({"budget": budget, **facts, "seconds": plan.seconds, "error": plan.error})
    return found


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 and 4 tasks of 10 steps, a pool of 120 examples")
    parser.add_argument("--work", type=Path, help="folder for what is finished")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    sizes, steps, examples = ((2, 4), (10,), 120) if options.quick else (TASKS, STEPS, 600)
    work = options.work or Path("benchmark-cost-quick" if options.quick else "benchmark-cost")
    console, pool = output(), demo_pool(examples)
    measure(work, pool, max(sizes), steps, console)
    rows = curve(work, sizes, steps)
    table = Table(
        "method", "steps", "scored", "tasks", "seconds", "error", "lowest", "highest", "random tasks", "other"
    )
    table.title = "Error on four new tasks relative to no history, against the cost of the history"
    for r in rows:
        random = f"{r['error_random_tasks']:.2f}" if "error_random_tasks" in r else ""
        figures = (f"{r[name]:.2f}" for name in ("error", "error_lowest", "error_highest"))
        cells = (*figures, random, f"{r['error_other_method']:.2f}")
        table.add_row(r["method"], f"{r['steps']}", f"{r['share']:.0%}", f"{r['tasks']}", f"{r['seconds']:.0f}", *cells)
    console.print(table)
    advice = recommend(work, JUDGED_STEPS)
    table = Table("budget, s", "tasks", "steps", "scored", "seconds", "error", title="What `forgetcast start` would do")
    for r in advice:
        cells = (f"{r['tasks']}", f"{r['steps']}", f"{r['share']:.0%}", f"{r['seconds']:.0f}", f"{r['error']:.2f}")
        table.add_row(f"{r['budget']}", *cells)
    console.print(table)
    found = {(r["method"], r["steps"], r["share"], r["tasks"]): r["error"] for r in rows}
    few, most = sizes[-2:]
    key = ("lora", max(steps), 1.0)
    targets = [
        target(f"LoRA, {most} tasks, whole pool: error to no history", found[*key, most], 1.0),
        target(
            f"LoRA: {few} tasks, whole pool, to {most} tasks, a quarter",
            found[*key, few] / found["lora", max(steps), 0.25, most],
            1.0,
        ),
    ]
    conclude(console, [*rows, *advice], targets, options.json, "torch", "transformers", "peft", "reasoning-gym")


if __name__ == "__main__":
    main()
