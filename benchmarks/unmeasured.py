"""Forecasts of examples that were never measured: how much of the measured loadings' accuracy features keep.

Columns of the atlas are held out in folds, and tasks too. The forecast of a held-out task at a held-out column from ten
probes is made with the loadings that were measured there, and with what features predict; each is compared with the
truth. Then each task is left out and forecast from its text alone, from probes, and from both.

    python benchmarks/unmeasured.py DEMO [--quick] [--json results/unmeasured.json]

DEMO is what `forgetcast demo --full -o DEMO` wrote.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from forgetcast import Atlas, Pool
from forgetcast.completion import Bayesian
from forgetcast.completion.preflight import Preflight
from forgetcast.completion.unmeasured import Unmeasured
from forgetcast.measure.features import FeatureFolder, Features
from shared import conclude, output, target

LEVELS = (0.5, 0.8, 0.9, 0.95)
PROBES = 10


def pool_features(pool: Pool) -> Features:
    """Features of the pool by the demo model."""
    from forgetcast.lm import load
    from forgetcast.lm.features import feature_settings, write_features

    with as_file(files("forgetcast.demo") / "model") as folder, tempfile.TemporaryDirectory() as made:
        base = replace(load(folder), name="the demo model")
        opened = FeatureFolder.begin(Path(made) / "features", feature_settings(base))
        total, _ = write_features(base, pool, opened, "pool")
        opened.finish("pool", {"examples": total})
        return opened.all("pool")


def measure(atlas: Atlas, features: Features, folds: int) -> list[dict[str, Any]]:
    """Compare both forecasts on left-out tasks and columns, fold by fold."""
    matrix = atlas.matrix()
    rng = np.random.default_rng(0)
    columns = np.array_split(rng.permutation(matrix.shape[1]), folds)
    tasks = np.array_split(rng.permutation(matrix.shape[0]), folds)
    features = features.take(features.ids.positions(matrix.examples))
    rows: list[dict[str, Any]] = []
    for held in columns:
        known = np.setdiff1d(np.arange(matrix.shape[1]), held)
        new, sources = features.take(held), np.array(features.sources)
        for left_out in tasks:
            past = matrix.select([name for i, name in enumerate(matrix.tasks) if i not in left_out])
            part = type(past)(
                past.values[:, known], tasks=past.tasks, examples=[matrix.examples[i] for i in known.tolist()]
            )
            extended = Unmeasured(Bayesian().fit(part)).fit(features.take(known))
            whole = Bayesian().fit(past)
            probes = rng.choice(len(known), PROBES, replace=False)
            values = matrix.values[left_out].astype(float)
            truth, observed = values[:, held], values[:, known][:, probes]
            by_features = extended.predict(probes, observed, [new])
            in_pool = extended.model.predict(probes, observed)
            means = {
                "measured loadings": whole.predict(known[probes], observed).mean[:, held],
                "features": by_features.mean,
                "mean of the source": np.column_stack(
                    [in_pool.mean[:, sources[known] == source].mean(axis=1) for source in sources[held]]
                ),
                "mean of the pool": np.repeat(in_pool.mean.mean(axis=1)[:, None], len(held), axis=1),
            }
            center, of_rows = past.values.mean(), truth.mean(axis=1, keepdims=True)
            rows.append(
                {f"squares, {name}": float(np.sum((mean - truth) ** 2)) for name, mean in means.items()}
                | {"squares": float(np.sum((truth - center) ** 2)), "within": float(np.sum((truth - of_rows) ** 2))}
                | {"entries": truth.size}
                | {
                    f"covered {level}": float(
                        np.sum((by_features.interval(level)[0] <= truth) & (truth <= by_features.interval(level)[1]))
                    )
                    for level in LEVELS
                }
            )
    return rows


def before_any_run(atlas: Atlas, folder: Path) -> list[dict[str, Any]]:
    """Leave out each task in turn: its row from its text alone, from probes, and from both."""
    from forgetcast.lm import load
    from forgetcast.lm.features import task_features

    matrix = atlas.matrix()
    with as_file(files("forgetcast.demo") / "model") as model_folder:
        base = load(model_folder)
        texts = np.array([task_features(base, Pool.load(folder / "tasks" / f"{name}.jsonl")) for name in matrix.tasks])
    rng, squares = np.random.default_rng(0), dict[str, list[float]]()
    whole = Preflight(Bayesian().fit(matrix)).fit(texts)
    for task in range(len(matrix.tasks)):
        past = np.delete(np.arange(len(matrix.tasks)), task)
        model = Bayesian().fit(matrix.select([matrix.tasks[i] for i in past.tolist()]))
        before = Preflight(model).fit(texts[past])
        truth = matrix.values[task].astype(float)
        means = {
            "the atlas's mean": model.predict([], []).mean,
            "text, where it helped on the others": before.forecast(texts[task]).mean,
        }
        for k in (2, 10):
            probes = rng.choice(len(truth), k, replace=False)
            means[f"{k} probes"] = model.predict(probes, truth[probes]).mean
            means[f"{k} probes and text"] = before.model_for(texts[task]).predict(probes, truth[probes]).mean
        for name, mean in means.items():
            squares.setdefault(name, []).append(float(np.mean((mean - truth) ** 2)))
    rows = [{"before": name, "rmse": float(np.sqrt(np.mean(values)))} for name, values in squares.items()]
    forced = whole.errors_["text"] / whole.errors_["atlas mean"]
    return [*rows, {"before": "text, always (folds of tasks): ratio to the atlas's mean", "rmse": forced}]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--quick", action="store_true", help="Three folds instead of five.")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    atlas, console = Atlas.open(arguments.demo / "demo.atlas"), output()
    folds = measure(atlas, pool_features(atlas.pool), 3 if arguments.quick else 5)
    total = {name: sum(fold[name] for fold in folds) for name in folds[0]}
    table = Table("forecast", "RMSE", "R^2", "R^2 within tasks", title=f"{len(atlas.tasks)} tasks, unmeasured examples")
    rows = []
    for name in ("measured loadings", "features", "mean of the source", "mean of the pool"):
        squares = total[f"squares, {name}"]
        row = {
            "forecast": name,
            "rmse": float(np.sqrt(squares / total["entries"])),
            "r2": 1 - squares / total["squares"],
            "r2_within": 1 - squares / total["within"],
        }
        rows.append(row)
        table.add_row(name, f"{row['rmse']:.4f}", f"{row['r2']:.3f}", f"{row['r2_within']:.3f}")
    console.print(table)
    coverage = {level: total[f"covered {level}"] / total["entries"] for level in LEVELS}
    console.print("coverage: " + ", ".join(f"{level:.0%}: {share:.1%}" for level, share in coverage.items()))
    rows += [{"level": level, "coverage": share} for level, share in coverage.items()]
    worst = max(abs(share - level) for level, share in coverage.items())
    cheap = before_any_run(atlas, arguments.demo)
    table = Table("forecast of a left-out task", "RMSE", title="Before anything is run")
    for row in cheap:
        table.add_row(row["before"], f"{row['rmse']:.4f}")
    console.print(table)
    rows += cheap
    targets = [
        target("share of the measured loadings' R^2", rows[1]["r2"] / rows[0]["r2"], 0.5, least=True),
        target("the same, within tasks", rows[1]["r2_within"] / rows[0]["r2_within"], 0.5, least=True),
        target("RMSE of the text alone, ratio to the atlas's mean", cheap[1]["rmse"] / cheap[0]["rmse"], 0.9),
        target("largest distance of the coverage from nominal", worst, 0.03),
    ]
    conclude(console, rows, targets, arguments.json)


if __name__ == "__main__":
    main()
