"""What helps the forecast of a task that its probes show to be unlike the atlas: another method, or more probes.

    python benchmarks/unlike.py --quick             # one split
    python benchmarks/unlike.py --json result.json  # five splits: about a minute on an idle core

Each family of tasks in a measured matrix is left out and forecast from the other families. A task is flagged where the
misfit of `Bayesian` is below 0.05, as the command line does. On the flagged tasks, `Auto` is compared with `Bayesian`
from the same probes, and `Bayesian` with itself from more probes; all errors are on examples that no probe is of.
Then the interval of the mean that `preflight` gives before any probe: how often it covers the tasks of the family that
is left out, as wide as the errors on tasks left out alone, and on tasks left out with all of their kind.
Intervals are of a paired bootstrap over tasks. The matrices are the authors' measurements; FORGETCAST_DATA names their
folder (default ../shared/data).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from forgetcast import ForgettingMatrix
from forgetcast.completion import Auto, Bayesian, Completion
from forgetcast.completion.base import MISFIT_THRESHOLD, family_of
from forgetcast.completion.preflight import Preflight
from shared import conclude, output, target

MATRICES = {"olmo-7b": "olmo-7b-dolma.json", "olmo-7b-instruct": "olmo-7b-instruct.json"}
PROBES = (10, 30, 60)
SPLITS = 5
FEWEST = 6
"""Tasks that it takes for an interval."""
LEVEL = 0.9
INTERVALS = ("half-width, like", "coverage, like", "half-width, unlike", "coverage, unlike")
"""Of the mean before any probe."""


def families(matrix: ForgettingMatrix) -> dict[str, np.ndarray]:
    """Rows of each family, by what stands before the slash of a task's name."""
    names = np.array([task.partition("/")[0] for task in matrix.tasks])
    return {name: np.flatnonzero(names == name) for name in dict.fromkeys(names.tolist())}


def errors(known: np.ndarray, new: np.ndarray, splits: int) -> dict[tuple[str, int], np.ndarray]:
    """Return RMSE of each new task and split, shape (T, S), by method and probes; and the misfit of `Bayesian`."""
    fitted: dict[str, Completion] = {"bayesian": Bayesian().fit(known), "auto": Auto().fit(known)}
    found: dict[tuple[str, int], np.ndarray] = {}
    for split in range(splits):
        order = np.random.default_rng(split).permutation(new.shape[1])
        judged = order[max(PROBES) :]
        for k in PROBES:
            at = order[:k]
            for name, model in fitted.items():
                forecast = model.predict(at, new[:, at])
                each = {name: np.sqrt(np.mean((forecast.mean - new)[:, judged] ** 2, axis=1))}
                if name == "bayesian":
                    each["misfit"] = np.asarray(forecast.misfit)
                for what, values in each.items():
                    found.setdefault((what, k), np.empty((len(new), splits)))[:, split] = values
    return found


def ratio(above: np.ndarray, below: np.ndarray, among: np.ndarray) -> dict[str, Any]:
    """Ratio of mean RMSE where `among` (T, S) is true, and its 95 % interval over tasks; None for too few of them."""
    tasks = np.flatnonzero(among.any(axis=1))
    if not len(tasks):
        return {"tasks": 0, "cases": 0, "ratio": None, "lower": None, "upper": None}
    count = among[tasks].sum(axis=1)
    sums = [np.where(among, values, 0.0)[tasks].sum(axis=1) / count for values in (above, below)]
    drawn = np.random.default_rng(0).integers(len(tasks), size=(4000, len(tasks)))
    ratios = sums[0][drawn].mean(axis=1) / sums[1][drawn].mean(axis=1)
    lower, upper = np.quantile(ratios, [0.025, 0.975]) if len(tasks) >= FEWEST else (None, None)
    return {
        "tasks": len(tasks),
        "cases": int(among.sum()),
        "ratio": float(sums[0].mean() / sums[1].mean()),
        "lower": None if lower is None else float(lower),
        "upper": None if upper is None else float(upper),
    }


def compare(setting: str, found: dict[tuple[str, int], np.ndarray]) -> Iterator[dict[str, Any]]:
    """Yield the comparisons of a setting."""
    everyone = np.ones_like(found["misfit", PROBES[0]], dtype=bool)
    for k in PROBES:
        flagged = found["misfit", k] < MISFIT_THRESHOLD
        for who, among in (("flagged", flagged), ("all", everyone)):
            row = ratio(found["auto", k], found["bayesian", k], among)
            yield {"setting": setting, "who": who, "what": f"auto / bayesian, {k} probes", "of": len(flagged)} | row
    for fewer, more in ((10, 30), (30, 60), (10, 60)):
        flagged = found["misfit", fewer] < MISFIT_THRESHOLD
        for who, among in (("flagged", flagged), ("others", ~flagged)):
            row = ratio(found["bayesian", more], found["bayesian", fewer], among)
            yield {"setting": setting, "who": who, "what": f"{more} / {fewer} probes", "of": len(flagged)} | row


def before_probes(setting: str, known: np.ndarray, kinds: list[str], new: np.ndarray) -> dict[str, Any]:
    """Return how often both intervals of the mean cover the tasks of a new family."""
    before = Preflight(Bayesian().fit(known)).fit(families=kinds)
    misses = np.abs(new.mean(axis=1) - float(before.forecast().mean.mean()))
    row: dict[str, Any] = {
        "setting": setting,
        "what": "preflight",
        "who": "all",
        "of": len(new),
        "kinds": before.kinds_,
    }
    for name, unlike in (("like", False), ("unlike", True)):
        half = before.mean_half_width(LEVEL, unlike=unlike)
        row |= {f"half-width, {name}": half, f"coverage, {name}": float(np.mean(misses <= half))}
    return row


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one split")
    parser.add_argument("--json", type=Path, help="file for all figures")
    arguments = parser.parse_args()
    console = output()
    folder = Path(os.environ.get("FORGETCAST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    rows: list[dict[str, Any]] = []
    preflights: list[dict[str, Any]] = []
    for name, file in MATRICES.items():
        if not (folder / file).is_file():
            parser.exit(2, f"{folder / file} is not here; set FORGETCAST_DATA to the folder with the matrices\n")
        matrix = ForgettingMatrix.load(folder / file)
        values = matrix.values.astype(np.float64)
        for family, members in families(matrix).items():
            setting = f"{name}, {family} left out"
            console.print(setting, style="dim")
            known = np.delete(values, members, axis=0)
            rows += compare(setting, errors(known, values[members], 1 if arguments.quick else SPLITS))
            kinds = [family_of(task) for task in np.delete(np.array(matrix.tasks), members).tolist()]
            preflights.append(before_probes(setting, known, kinds, values[members]))
    table = Table("setting", "tasks", "comparison", "n (of)", "ratio of RMSE", "95 %", title="Tasks of another family")
    for row in rows:
        if row["who"] == "flagged" or row["what"].endswith("10 probes"):
            interval = "" if row["lower"] is None else f"{row['lower']:.3f} to {row['upper']:.3f}"
            figure = "" if row["ratio"] is None else f"{row['ratio']:.3f}"
            table.add_row(row["setting"], row["who"], row["what"], f"{row['tasks']} ({row['of']})", figure, interval)
    console.print(table)
    table = Table("setting", "tasks", "kinds", *(f"{name} of {LEVEL:.0%}" for name in INTERVALS))
    table.title = "The interval of the mean before any probe, on a family that is left out"
    for row in preflights:
        figures = (f"{row[name]:.0%}" if name.startswith("coverage") else f"{row[name]:.3f}" for name in INTERVALS)
        table.add_row(row["setting"], str(row["of"]), str(row["kinds"] or "similar"), *figures)
    console.print(table)
    conclude(console, [*rows, *preflights], targets(rows), arguments.json, "scipy")


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """More probes help the flagged tasks of every family, which is what the command line says; `Auto` helps in none."""
    better = [
        row["upper"] < 1
        for row in rows
        if row["who"] == "flagged" and row["what"].startswith("auto") and row["upper"] is not None
    ]
    return [
        target("families and numbers of probes where Auto is shown better on flagged tasks", float(sum(better)), 0.0),
        *(
            target(f"{row['setting']}: flagged, {row['what']}, upper end", row["upper"], 1.0)
            for row in rows
            if row["who"] == "flagged" and row["what"] == "30 / 10 probes" and row["upper"] is not None
        ),
    ]


if __name__ == "__main__":
    main()
