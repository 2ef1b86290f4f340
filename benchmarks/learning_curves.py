"""Forecasts of the end of a fine-tune from its first tenth, quarter and half: their error, and how often they cover.

The demo model is fine-tuned on procedural tasks, and the pool scored after 10, 25 and 50 % of the steps and at the end.
Then each task is left out, watched as `ForgettingMonitor` does it, from 30 probes of a row of an unfinished fine-tune,
and the mean at the end is forecast from the growth that the other tasks' curves show. Also: whether the intervals of
the mean of the moment cover it in such rows. And what `preflight --pilot` does: the whole row at the end, from the
probes of a pilot, beside the atlas's mean, the task's text, probes of the finished fine-tune, and these with the pilot.

    python benchmarks/learning_curves.py [--quick] [--tasks N] [--work FOLDER] [--json results/learning_curves.json]

The atlas is made in FOLDER, row by row, and kept: an interrupted run goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from forgetcast import Atlas, ForgettingMatrix, Recipe
from forgetcast.completion import Bayesian
from forgetcast.completion.growth import Growth
from forgetcast.completion.preflight import Preflight
from forgetcast.completion.watch import LEVEL
from forgetcast.defaults import CHOSEN_SHARE
from forgetcast.demo.corpus import demo_pool
from forgetcast.experiments.collect import Sweep, collect, prepare_atlas
from forgetcast.experiments.procedural import KNOWN_TASKS, NEW_TASKS, procedural_task
from forgetcast.probes import choose
from shared import conclude, output, target

SHARES = (0.1, 0.25, 0.5)
PROBES, FEW, SEEDS = 30, 10, 5
TASKS, QUICK_TASKS = len(KNOWN_TASKS) + len(NEW_TASKS), 16
EXAMPLES, QUICK_EXAMPLES = 400, 96
FULL = Recipe(steps=40, batch_size=8, learning_rate=1e-3, max_length=128)
QUICK = Recipe(steps=24, batch_size=4, learning_rate=1e-3, max_length=128)


def make_atlas(folder: Path, tasks: int, quick: bool) -> Atlas:
    """Make the atlas with learning curves, or go on making it."""
    from forgetcast.lm import FineTuner, load

    recipe, pool = (QUICK, demo_pool(QUICK_EXAMPLES)) if quick else (FULL, demo_pool(EXAMPLES))
    names = (*KNOWN_TASKS, *NEW_TASKS)[:tasks]
    with as_file(files("forgetcast.demo") / "model") as model:
        base = replace(load(model), name="the demo model")
    atlas = prepare_atlas(folder / f"{'quick' if quick else 'full'}.atlas", base, pool, recipe)
    data = {name: procedural_task(name, recipe.steps * recipe.batch_size, seed=0) for name in names}
    said = set[str]()

    def report(what: str, done: int, total: int) -> None:
        if (name := what.partition(":")[0]) not in said:
            said.add(name)
            print(f"{done / total:4.0%} {name}", flush=True)

    return collect(FineTuner(base), atlas, recipe, data, sweep=Sweep(checkpoints=SHARES), on_progress=report)


def measure(rows: np.ndarray, shares: np.ndarray) -> list[dict[str, Any]]:
    """Watch each left-out task of rows (S + 1, M, N) with several draws of the random probes, at each share."""
    found: list[dict[str, Any]] = []
    tasks = rows.shape[1]
    for task in range(tasks):
        others = np.delete(np.arange(tasks), task)
        growth = Growth.of_rows(shares, rows[:, others], PROBES)
        assert growth is not None
        model = Bayesian().fit(ForgettingMatrix(rows[-1, others]))
        end = float(rows[-1, task].mean())
        for seed in range(SEEDS):
            probes = choose(model, PROBES, audit=PROBES - round(CHOSEN_SHARE * PROBES), seed=seed)
            for at, share in enumerate([*shares.tolist(), 1.0]):
                row = rows[at, task]
                forecast = model.predict(probes, row[probes], audit=PROBES - round(CHOSEN_SHARE * PROBES))
                one = {"task": task, "seed": seed, "share": share, "end": end, "now": float(row.mean())}
                one["average"] = float(rows[-1, others].mean())
                for name, guaranteed in (("model-based", False), ("guaranteed", True)):
                    value, lower, upper = map(float, forecast.mean_interval(LEVEL, guaranteed))
                    one |= {name: value, f"{name} covers": lower <= one["now"] <= upper, f"{name} width": upper - lower}
                value, lower, upper = growth.end(one["model-based"], share, LEVEL) or (np.nan,) * 3
                one |= {"forecast": value, "covers": lower <= end <= upper, "width": upper - lower}
                found.append(one)
    return found


def texts(names: list[str], quick: bool) -> np.ndarray:
    """Features of the tasks' texts, shape (M, p)."""
    from forgetcast.lm import load
    from forgetcast.lm.features import task_features

    recipe = QUICK if quick else FULL
    with as_file(files("forgetcast.demo") / "model") as model:
        base = load(model)
    return np.array(
        [task_features(base, procedural_task(name, recipe.steps * recipe.batch_size, seed=0)) for name in names]
    )


def pilots(rows: np.ndarray, shares: np.ndarray, features: np.ndarray) -> list[dict[str, Any]]:
    """Forecast the final row of each left-out task of rows (S + 1, M, N): RMSE, and how often 90 % intervals cover."""
    tasks, final = rows.shape[1], rows[-1]
    squares: dict[str, list[float]] = {}
    covers: dict[str, list[tuple[bool, float]]] = {}
    for task in range(tasks):
        others = np.delete(np.arange(tasks), task)
        model, truth = Bayesian().fit(ForgettingMatrix(final[others])), final[task]
        means = {"atlas's mean": model.predict([], []).mean}
        before = Preflight(model).fit(features[others])
        means["text"] = before.forecast(features[task]).mean
        ends = np.sort(choose(model, PROBES))
        means[f"{PROBES} probes at the end"] = model.predict(ends, truth[ends]).mean
        few = np.sort(choose(model, FEW))
        means[f"{FEW} probes at the end"] = model.predict(few, truth[few]).mean
        for share, now in zip(shares.tolist(), rows, strict=False):
            at = np.sort(choose(Bayesian().fit(ForgettingMatrix(now[others])), PROBES))
            name = f"pilot, {share:.0%}"
            begun = Preflight(model).fit(pilot=now[others][:, at], probes=at)
            made = begun.forecast(pilot=now[task, at])
            means[name] = made.mean
            sharpened = begun.model_for(pilot=now[task, at])
            means[f"{name}, and {FEW} probes at the end"] = sharpened.predict(few, truth[few]).mean
            for kind in (False, True):
                half = begun.mean_half_width(LEVEL, unlike=kind)
                missed = abs(float(made.mean.mean() - truth.mean()))
                covers.setdefault(f"{name}{', unlike' if kind else ''}", []).append((missed <= half, half))
        for name, mean in means.items():
            squares.setdefault(name, []).append(float(np.mean((mean - truth) ** 2)))
    found = []
    for name, values in squares.items():
        one: dict[str, Any] = {"forecast": name, "RMSE": float(np.sqrt(np.mean(values)))}
        for suffix in ("", ", unlike"):
            if (of_kind := covers.get(f"{name}{suffix}")) is not None:
                one[f"coverage of the mean{suffix}"] = float(np.mean([hit for hit, _ in of_kind]))
                one[f"half-width{suffix}"] = float(np.median([half for _, half in of_kind]))
        found.append(one)
    return found


def summary(found: list[dict[str, Any]], shares: Iterable[float]) -> list[dict[str, Any]]:
    """Errors and coverage at each share, over tasks and draws."""

    def error(name: str, truth: str) -> float:
        return float(np.sqrt(np.mean([(one[name] - one[truth]) ** 2 for one in at])))

    def average(name: str) -> float:
        return float(np.mean([one[name] for one in at]))

    rows = []
    for share in shares:
        at = [one for one in found if one["share"] == share]
        rows.append(
            {
                "share": share,
                "mean now": average("now"),
                "mean at the end": average("end"),
                "RMSE": error("forecast", "end"),
                "RMSE of the mean now": error("model-based", "end"),
                "RMSE of the atlas's mean": error("average", "end"),
                "coverage": average("covers"),
                "width": float(np.median([one["width"] for one in at])),
                "now: RMSE": error("model-based", "now"),
                "now: coverage, model-based": average("model-based covers"),
                "now: width, model-based": float(np.median([one["model-based width"] for one in at])),
                "now: coverage, guaranteed": average("guaranteed covers"),
                "now: width, guaranteed": float(np.median([one["guaranteed width"] for one in at])),
            }
        )
    return rows


def main() -> None:
    """Make the atlas, measure, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tasks", type=int)
    parser.add_argument("--pilots", action="store_true", help="only the forecasts of rows from pilots")
    parser.add_argument("--work", type=Path, default=Path("learning-curves"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    tasks = arguments.tasks or (QUICK_TASKS if arguments.quick else TASKS)
    atlas = make_atlas(arguments.work, tasks, arguments.quick)
    names = [name for name in atlas.tasks if all(name in atlas.at(share).tasks for share in SHARES)]
    matrices = [view.matrix(names).values for view in (*map(atlas.at, SHARES), atlas)]
    values = np.array(matrices, dtype=np.float64)
    complete = ~np.isnan(values).any(axis=(0, 1))
    console, rows = output(), list[dict[str, Any]]()
    if not arguments.pilots:
        rows = summary(measure(values[:, :, complete], np.array(SHARES)), (*SHARES, 1.0))
        table = Table("share", *list(rows[0])[1:], title=f"The end of {len(names)} left-out tasks")
        for row in rows:
            table.add_row(
                *(
                    f"{value:.0%}" if "share" in name or "coverage" in name else f"{value:.4f}"
                    for name, value in row.items()
                )
            )
        console.print(table)
    features = texts(names, arguments.quick)
    begun = pilots(values[:, :, complete], np.array(SHARES), features)
    columns = list(dict.fromkeys(name for row in begun for name in row))
    table = Table(*columns, title="The row at the end, from what is known before")
    for row in begun:
        table.add_row(
            row["forecast"],
            *(
                "" if name not in row else f"{row[name]:.0%}" if "cov" in name else f"{row[name]:.4f}"
                for name in columns[1:]
            ),
        )
    console.print(table)
    error = {row["forecast"]: row["RMSE"] for row in begun}
    targets = [
        target("RMSE of the row, pilot of 25 % / atlas's mean", error["pilot, 25%"] / error["atlas's mean"], 1.0),
        target("RMSE of the row, pilot of 25 % / text", error["pilot, 25%"] / error["text"], 1.0),
    ]
    for quarter in (row for row in rows if row["share"] == 0.25):
        by_mean = quarter["RMSE"] / quarter["RMSE of the atlas's mean"]
        targets += [
            target(
                "coverage at 25 % of the 90 % intervals of the end, at least", quarter["coverage"], 0.85, least=True
            ),
            target("coverage at 25 % of the 90 % intervals of the end, at most", quarter["coverage"], 0.95),
            target("RMSE at 25 % / that of the mean now", quarter["RMSE"] / quarter["RMSE of the mean now"], 1.0),
            target("RMSE at 25 % / that of the atlas's mean", by_mean, 1.0),
        ]
    conclude(
        console,
        [{"tasks": len(names), "examples": len(atlas.examples), **row} for row in (*rows, *begun)],
        targets,
        arguments.json,
        "torch",
    )


if __name__ == "__main__":
    main()
