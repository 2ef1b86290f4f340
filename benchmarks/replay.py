"""Replay strategies side by side on the demo model: what is forgotten of examples that were never replayed.

    python benchmarks/replay.py --quick                        # 2 tasks, 1 seed, 5 strategies: about three minutes
    python benchmarks/replay.py --tasks 6 --seeds 1            # all strategies at one ratio: about a quarter of an hour
    python benchmarks/replay.py --ratios 1/64,1/32,1/16,1/8,1/4 --json result.json   # 12 tasks, 3 seeds: hours

An atlas of reasoning-gym tasks is collected first. Each new task is then fine-tuned without replay and with every
strategy, several seeds; all are judged on the held-out half of the pool. Forecasts are made from 30 chosen probes of a
run without replay, or ("atlas mean") from nothing of the new task. Everything that was finished is kept in the folder
--work, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from fractions import Fraction
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from forgetcast import Atlas, Pool, ReplayPlan, make_plan, probes
from forgetcast.collect import collect
from forgetcast.completion import Bayesian
from forgetcast.coverage import correlation_loadings
from forgetcast.demo.corpus import demo_pool
from forgetcast.demo.tasks import KNOWN_TASKS, NEW_TASKS, demo_task
from forgetcast.lm import Recipe, Workbench, load
from forgetcast.strategies import STRATEGIES
from forgetcast.verification import Trial, Verification, verify
from shared import conclude, target

RECIPE = Recipe(steps=64, batch_size=8, learning_rate=1e-3, max_length=128)
EXAMPLES, TASK_SIZE, TEST_SIZE, PROBES = 600, 400, 64, 30
ATLAS_MEAN = "forecast, atlas mean"
QUICK = ("none", "random", "forecast", "coverage", "truth")


def arms(atlas: Atlas, known: list[str], task: str, pool: Pool, ratio: float) -> dict[str, ReplayPlan]:
    """A plan of every strategy for a new task, and one that knows nothing of it but the atlas's mean."""
    held_out = pool.hold_out(0.5)
    model = Bayesian().fit(atlas.matrix(known))
    usable = np.setdiff1d(np.arange(len(pool)), pool.positions(held_out))
    chosen = probes.choose(model, PROBES, usable)
    truth = atlas.matrix([task]).values[0]
    given: dict[str, Any] = {
        "forecast": model.predict(chosen, truth[chosen]).mean,
        "truth": truth,
        "losses": atlas.nll_before,
        "loadings": correlation_loadings(model),
        "held_out": held_out,
    }
    plans = {name: make_plan(pool, name, 0.0 if name == "none" else ratio, **given) for name in STRATEGIES}
    plans[ATLAS_MEAN] = make_plan(pool, "forecast", ratio, **(given | {"forecast": model.predict([], []).mean}))
    return plans


def run(work: Path, known: int, new: int, seeds: int, ratios: list[Fraction], names: list[str]) -> list[Verification]:
    """Collect the atlas, and verify the strategies at each ratio; whatever is in `work` is not repeated."""
    tasks = [*NEW_TASKS, *reversed(KNOWN_TASKS)][:new], list(KNOWN_TASKS[:known])
    if both := set(tasks[0]) & set(tasks[1]):
        raise SystemExit(f"{len(both)} tasks would be known and new; there are {len(NEW_TASKS + KNOWN_TASKS)} in all")
    if not (work / "pool.jsonl").exists():
        demo_pool(EXAMPLES).save(work / "pool.jsonl")
    pool = Pool.load(work / "pool.jsonl")
    with as_file(files("forgetcast.demo") / "model") as directory:
        base = replace(load(directory), name="the demo model")
    found = []
    with Progress(transient=True) as bar:
        row = bar.add_task("", total=None)

        def report(what: str, done: int, total: int) -> None:
            bar.update(row, description=what, completed=done, total=total)

        data = {name: demo_task(name, TASK_SIZE) for name in (*tasks[1], *tasks[0])}
        atlas = collect(base, pool, data, work / "replay.atlas", RECIPE, on_progress=report)
        workbench = Workbench(base)
        for ratio in ratios:
            trials = []
            for name in tasks[0]:
                plans = arms(atlas, tasks[1], name, pool, float(ratio))
                tests = demo_task(name, TEST_SIZE, seed=1)
                trials.append(Trial(name, data[name], tests, {arm: plans[arm] for arm in names}))
            directory = work / f"runs-{known}" / f"{ratio.numerator}-{ratio.denominator}"
            found.append(
                verify(
                    workbench, trials, pool, atlas.before, RECIPE, seeds=range(seeds), directory=directory,
                    on_progress=report,
                )
            )  # fmt: skip
    return found


def rows_of(result: Verification) -> list[dict[str, Any]]:
    """Each strategy's forgetting, beside random replay's."""
    rows = []
    for arm in result.arms:
        row: dict[str, Any] = {"ratio": result.ratio, "strategy": arm}
        for metric in ("mean", "worst_tenth", "worst_hundredth", "new_task_loss"):
            value, random = result.average(arm, metric), result.average("random", metric)
            row |= {metric: value, f"{metric}_to_random": value / random}
            if (gap := result.compare(arm, "random", metric)) is not None and arm != "random":
                row |= {
                    f"{metric}_lower": gap.bootstrap_lower / random,
                    f"{metric}_upper": gap.bootstrap_upper / random,
                }
            ceiling = random - result.average("truth", metric)
            row[f"{metric}_gap_closed"] = (random - value) / ceiling if ceiling else float("nan")
        rows.append(row | {name: result.average(arm, name) for name in ("replayed", "steps", "seconds")})
    return rows


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 new tasks, 8 known, 1 seed, 5 strategies")
    parser.add_argument("--tasks", type=int, default=12, help="new tasks")
    parser.add_argument("--known", type=int, default=28, help="tasks of the atlas")
    parser.add_argument("--seeds", type=int, default=3, help="fine-tunes of each task and strategy")
    parser.add_argument("--ratios", default="1/8", help="replayed examples per new one, such as 1/32,1/8")
    parser.add_argument("--strategies", help="some of them, with none, random and truth always; default: all")
    parser.add_argument("--work", type=Path, default=Path("benchmark-replay"), help="folder for what is finished")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    names = [*STRATEGIES, ATLAS_MEAN]
    if options.quick:
        options.tasks, options.known, options.seeds, names = 2, 8, 1, list(QUICK)
        options.work = options.work / "quick"
    elif options.strategies:
        names = list(dict.fromkeys(["none", "random", "truth", *options.strategies.split(",")]))
    ratios = [Fraction(text) for text in options.ratios.split(",")]
    results = run(options.work, options.known, options.tasks, options.seeds, ratios, names)
    console, rows = Console(), [row for result in results for row in rows_of(result)]
    table = Table("ratio", "strategy", "mean", "to random", "worst tenth", "to random", "new-task loss", "replayed")
    table.title = f"Forgetting of {results[0].judged} never-replayed examples, nats per token (95 % interval)"
    for r in rows:
        cells = []
        for metric in ("mean", "worst_tenth"):
            cells.append(f"{r[metric]:.4f}")
            sure = f" ({1 + r[f'{metric}_lower']:.3f}-{1 + r[f'{metric}_upper']:.3f})" if f"{metric}_lower" in r else ""
            cells.append(f"{r[f'{metric}_to_random']:.3f}{sure}")
        table.add_row(f"{r['ratio']:.4g}", r["strategy"], *cells, f"{r['new_task_loss']:.3f}", f"{r['replayed']:.0f}")
    console.print(table)
    conclude(console, rows, targets(rows), options.json, "torch", "transformers")


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the best strategy that needs no truth has to hold up to, at the first ratio."""
    real = [r for r in rows if r["ratio"] == rows[0]["ratio"] and r["strategy"] not in ("none", "padding", "truth")]
    found = []
    for metric, bound in (("worst_tenth", 0.93), ("mean", 0.97)):
        best = min(real, key=lambda r: r[f"{metric}_to_random"])
        name = f"{metric.replace('_', ' ')} to random replay's, best: {best['strategy']}"
        found.append(target(name, best[f"{metric}_to_random"], bound))
        found.append(target(f"{name}, upper end", 1 + best.get(f"{metric}_upper", 0.0), 1.0))
    loss = max(r["new_task_loss_to_random"] for r in real)
    return [*found, target("new-task loss to random replay's, worst", loss, 1.01)]


if __name__ == "__main__":
    main()
