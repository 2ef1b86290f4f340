"""Forecasts of new tasks as wholes: how often their intervals hold, how wide they are, and what they cost.

    python benchmarks/forecast.py --quick             # two splits: about a minute
    python benchmarks/forecast.py --json result.json  # ten splits: some minutes

The figures of a whole (its mean, its most forgotten tenth) are known for the tasks of a measured matrix. Each new task
is forecast from its probes, a few of them chosen and the others drawn at random; an interval holds if the true figure
lies inside. The random ones are drawn by what the atlas is unsure of (`probes.weights`), and for comparison with equal
probabilities. The yardstick is the interval from as many random probes alone, without any atlas. New tasks are those of
the paper's splits, and of each matrix every task in turn without the most similar third of the others ("unlike").
The matrices are the authors' measurements; FORGETCAST_DATA names their folder (default ../shared/data).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy
from rich.console import Console
from rich.table import Table

from forgetcast import ForgettingMatrix, probes
from forgetcast.completion import Bayesian, Completion, Forecast
from forgetcast.completion.base import correlation, exclude_similar
from forgetcast.stats import worst_tenth
from shared import conclude, output, target

MATRICES = {"olmo-7b": "olmo-7b-dolma.json", "olmo-7b-instruct": "olmo-7b-instruct.json"}
REFERENCES = ("olmo-7b-reference.json", "olmo-7b-instruct-reference.json")
LEVEL, PROBES = 0.9, 30
SIMILAR = 1 / 3
"""Share of the other tasks, the most similar, that the unlike tasks are forecast without."""

CHOSEN = (0, 5, 10)
"""Numbers of the probes that are chosen; the others are random. The second is what `forgetcast forecast` does."""


class Setting(NamedTuple):
    """Tasks that are known and tasks that are new, of shapes (M, N) and (B, N)."""

    name: str
    known: np.ndarray
    new: np.ndarray


def settings(folder: Path, quick: bool) -> Iterator[tuple[str, list[Setting]]]:
    """Yield the paper's splits, and the unlike tasks of each matrix, each with a fit of its own."""
    matrices = {name: np.array(json.loads((folder / file).read_text())["arr"]) for name, file in MATRICES.items()}
    for file in REFERENCES:
        content = json.loads((folder / file).read_text())
        for name, split in content.get("settings", content).items():
            values = matrices[name.split("/")[0]]
            yield name, [Setting(name, values[split["train"]], values[split["test"]])]
    for name, values in matrices.items():
        correlations = correlation(values)
        tasks = range(0, len(values), 8 if quick else 1)
        kept = {task: exclude_similar(correlations, [task], SIMILAR) for task in tasks}
        yield f"{name}/unlike", [Setting(name, values[rows], values[[task]]) for task, rows in kept.items()]


def whole(folder: Path, seeds: int, quick: bool, console: Console) -> list[dict[str, Any]]:
    """Coverage and width of the intervals of whole tasks, on the same random probes for all."""
    rows = []
    for name, parts in settings(folder, quick):
        console.print(name, style="dim")
        found: dict[tuple[str, str, int], list[np.ndarray]] = {}
        for part in parts:
            model = Bayesian().fit(part.known)
            truths = {"mean": part.new.mean(axis=1), "worst tenth": np.array([worst_tenth(row) for row in part.new])}
            for seed in range(seeds):
                for figure, kind, chosen, (value, lower, upper) in intervals(model, part.new, seed):
                    truth = truths[figure]
                    held = (lower <= truth) & (truth <= upper)
                    figures = np.array([held, upper - lower, value - truth])
                    found.setdefault((figure, kind, chosen), []).append(figures)
        together = {key: np.concatenate(each, axis=1) for key, each in found.items()}
        plain = together["mean", "plain", 0]
        for (figure, kind, chosen), (held, width, error) in together.items():
            rows.append(
                {
                    "part": "whole",
                    "setting": name,
                    "figure": figure,
                    "kind": kind,
                    "chosen": chosen,
                    "random": PROBES - chosen,
                    "coverage": float(held.mean()),
                    "coverage_error": float(held.std() / np.sqrt(len(held))),
                    "width": float(np.median(width)),
                    "width_to_plain": float(np.median(width) / np.median(plain[1])),
                    "error": float(np.median(np.abs(error))),
                    "error_to_plain": float(np.median(np.abs(error)) / np.median(np.abs(plain[2]))),
                    "tasks": sum(len(part.new) for part in parts),
                }
            )
    return rows


def intervals(
    model: Completion, new: np.ndarray, seed: int
) -> Iterator[tuple[str, str, int, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Yield figure, kind, number of chosen probes, and the intervals of the new tasks."""
    examples = new.shape[1]
    at = probes.random(examples, PROBES, seed=seed)
    yield "mean", "plain", 0, plain_interval(new[:, at], examples)
    weights = probes.weights(model)
    for chosen, (drawn_by, how) in product(CHOSEN, ((weights, ""), (None, ", equal draws"))):
        at = probes.choose(model, PROBES, audit=PROBES - chosen, weights=drawn_by, seed=seed)
        forecast: Forecast = model.predict(at, new[:, at], audit=PROBES - chosen, weights=drawn_by)
        for guaranteed, kind in ((False, "model-based"), (True, "guaranteed")):
            yield "mean", f"{kind}{how}", chosen, forecast.mean_interval(LEVEL, guaranteed)
            yield "worst tenth", f"{kind}{how}", chosen, forecast.tail_interval(0.1, LEVEL, guaranteed)


def plain_interval(sample: np.ndarray, examples: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Student's t interval of the mean from a random sample (B, n) alone, corrected for the finite population."""
    n = sample.shape[1]
    mean = sample.mean(axis=1)
    error = sample.std(axis=1, ddof=1) * np.sqrt((1 - n / examples) / n)
    half = scipy.stats.t.ppf(0.5 + LEVEL / 2, n - 1) * error
    return mean, mean - half, mean + half


def cost(quick: bool) -> list[dict[str, Any]]:
    """Time of a forecast and of its intervals at the paper's size."""
    tasks, examples = (85, 20_000) if quick else (85, 141_871)
    rng = np.random.default_rng(0)
    values = rng.normal(size=(tasks, 5)).astype(np.float32) @ rng.normal(size=(5, examples)).astype(np.float32)
    values += rng.standard_normal(values.shape, dtype=np.float32)
    started = time.perf_counter()
    model = Bayesian().fit(ForgettingMatrix(values))
    rows = [{"part": "cost", "what": "fit", "seconds": time.perf_counter() - started}]
    weights = probes.weights(model)
    at = probes.choose(model, PROBES, audit=25, weights=weights)
    observed = values[0, at].astype(np.float64)
    predict = partial(model.predict, at, observed, audit=25, weights=weights)
    forecast = predict()
    runs: dict[str, Callable[[], Any]] = {
        "forecast": predict,
        "mean, model-based": forecast.mean_interval,
        "mean, guaranteed": partial(forecast.mean_interval, guaranteed=True),
        "worst tenth, model-based": forecast.tail_interval,
        "worst tenth, guaranteed": partial(forecast.tail_interval, guaranteed=True),
    }
    for what, run in runs.items():
        times = []
        for _ in range(10):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        rows.append({"part": "cost", "what": what, "seconds": min(times)})
    return rows


def tables(rows: list[dict[str, Any]]) -> Iterator[Table]:
    """Yield the tables."""
    table = Table("setting", "figure", "interval", "chosen", "random", "coverage", "width", "error")
    table.title = f"{LEVEL:.0%} intervals of whole tasks; width and error relative to the random sample's of the mean"
    for row in rows:
        if row["part"] == "whole":
            table.add_row(
                row["setting"],
                row["figure"],
                row["kind"],
                str(row["chosen"]),
                str(row["random"]),
                f"{row['coverage']:.3f} +- {row['coverage_error']:.3f}",
                f"{row['width_to_plain']:.2f}",
                f"{row['error_to_plain']:.2f}",
            )
    yield table
    table = Table("what", "milliseconds", title="Time")
    for row in rows:
        if row["part"] == "cost":
            table.add_row(row["what"], f"{1e3 * row['seconds']:.1f}")
    yield table


def targets_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare the default, five chosen and twenty-five random probes, with what it has to hold up to."""
    found = []
    for row in rows:
        if row["part"] != "whole" or row["figure"] != "mean" or row["chosen"] != CHOSEN[1]:
            continue
        name = f"{row['setting']}, {row['kind']}"
        if row["kind"] == "guaranteed":
            found.append(target(f"{name}: coverage", row["coverage"], 0.88, least=True))
            found.append(target(f"{name}: coverage", row["coverage"], 0.93))
            found.append(target(f"{name}: width", row["width_to_plain"], 0.7))
        elif row["kind"] == "model-based" and row["setting"].endswith("in-domain"):
            found.append(target(f"{name}: coverage", row["coverage"], 0.86, least=True))
            found.append(target(f"{name}: coverage", row["coverage"], 0.94))
    seconds = {row["what"]: row["seconds"] for row in rows if row["part"] == "cost"}
    return [*found, target("forecast, milliseconds", 1e3 * seconds["forecast"], 5.0)]


def main() -> None:
    """Run all parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two splits, some of the tasks")
    parser.add_argument("--seeds", type=int, default=10, help="draws of the random probes")
    parser.add_argument("--json", type=Path, help="file for all figures")
    arguments = parser.parse_args()
    console = output()
    folder = Path(os.environ.get("FORGETCAST_DATA", Path(__file__).parents[1] / "../shared/data"))
    if not (folder / MATRICES["olmo-7b"]).is_file():
        parser.exit(2, f"{folder} has no matrices; name their folder with FORGETCAST_DATA\n")
    rows = whole(folder, 2 if arguments.quick else arguments.seeds, arguments.quick, console) + cost(arguments.quick)
    for table in tables(rows):
        console.print(table)
    conclude(console, rows, targets_of(rows), arguments.json, "scipy")


if __name__ == "__main__":
    main()
