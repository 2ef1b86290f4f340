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
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import as_file, files
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from forgetcast import Atlas, Example, Pool, Recipe, make_plan
from forgetcast.completion import Bayesian
from forgetcast.completion.preflight import Preflight
from forgetcast.completion.unmeasured import Unmeasured
from forgetcast.demo.corpus import SOURCES, documents
from forgetcast.measure.features import FeatureFolder, Features, Group
from forgetcast.probes import choose
from forgetcast.replay import Signals
from forgetcast.replay.corpus import join_corpus
from shared import conclude, output, target

LEVELS = (0.5, 0.8, 0.9, 0.95)
PROBES = 10
RATIO = 0.2


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
    """Leave out each task in turn: its row from its text, from one virtual step, from probes, and from these together.

    The virtual step is the first-order change of 64 examples' losses along the task's gradient at the base model: one
    gradient of 64 examples of the task, and two forward passes of the 64.
    """
    from forgetcast.lm import gradient_products, load
    from forgetcast.lm.features import task_features

    matrix, seconds = atlas.matrix(), {"text": 0.0, "virtual step": 0.0}
    some = atlas.pool.subset(matrix.examples[i] for i in np.linspace(0, matrix.shape[1] - 1, 64).astype(int).tolist())
    given: dict[str, list[np.ndarray]] = {name: [] for name in seconds}
    with as_file(files("forgetcast.demo") / "model") as model_folder:
        base = load(model_folder)
        for name in matrix.tasks:
            task = Pool.load(folder / "tasks" / f"{name}.jsonl")
            start = time.perf_counter()
            given["text"].append(task_features(base, task))
            middle = time.perf_counter()
            given["virtual step"].append(gradient_products(base, task, some))
            seconds["text"] += middle - start
            seconds["virtual step"] += time.perf_counter() - middle
    features = {name: np.array(rows) for name, rows in given.items()}
    features["text and virtual step"] = np.column_stack(list(features.values()))
    rng, squares = np.random.default_rng(0), dict[str, list[float]]()
    for at in range(len(matrix.tasks)):
        past = np.delete(np.arange(len(matrix.tasks)), at)
        model = Bayesian().fit(matrix.select([matrix.tasks[i] for i in past.tolist()]))
        truth = matrix.values[at].astype(float)
        before = {name: Preflight(model).fit(rows[past]) for name, rows in features.items()}
        means = {"the atlas's mean": model.predict([], []).mean}
        means |= {name: each.forecast(features[name][at]).mean for name, each in before.items()}
        for k in (2, 10):
            probes = rng.choice(len(truth), k, replace=False)
            means[f"{k} probes"] = model.predict(probes, truth[probes]).mean
            for name in ("text", "virtual step"):
                prior = before[name].model_for(features[name][at])
                means[f"{k} probes and {name}"] = prior.predict(probes, truth[probes]).mean
        for name, mean in means.items():
            squares.setdefault(name, []).append(float(np.mean((mean - truth) ** 2)))
    rows = [
        {"before": name, "rmse": float(np.sqrt(np.mean(values))), "seconds": seconds.get(name, np.nan) / len(values)}
        for name, values in squares.items()
    ]
    for name, table in features.items():
        errors = Preflight(Bayesian().fit(matrix)).fit(table).errors_
        rows.append({"before": f"{name}, always: ratio", "rmse": errors["text"] / errors["atlas mean"]})
    return rows


def corpus_for(pool: Pool) -> Pool:
    """Other documents than the pool's, ten times as many examples, as far as there are so many of each source."""
    known = [example.full_text.strip() for example in pool]
    found = []
    for source in SOURCES:
        wanted = 10 * len(pool) // len(SOURCES)
        fresh = (document for document in documents(source) if not document.held_out and not _has(document.text, known))
        for i, document in enumerate(islice(fresh, wanted)):
            found.append(Example(f"corpus:{source}:{i}", document.text[:360], source=source))
    return Pool(found)


def _has(text: str, parts: Sequence[str]) -> bool:
    return any(part in text for part in parts)


def replay(atlas: Atlas, folder: Path, tasks: int) -> list[dict[str, Any]]:
    """Fine-tune tasks with replay from the pool, and from a corpus ten times as large; judge on half of the pool."""
    from forgetcast.lm import FineTuner, load, score
    from forgetcast.lm.features import feature_settings, write_features

    pool, matrix = atlas.pool, atlas.matrix()
    corpus = corpus_for(pool)
    both, held_out = Pool([*pool, *corpus]), list(pool.hold_out(0.5))
    judged = pool.subset(held_out)
    free = np.setdiff1d(np.arange(len(pool)), pool.positions(held_out))
    rows: list[dict[str, Any]] = []
    with as_file(files("forgetcast.demo") / "model") as model_folder, tempfile.TemporaryDirectory() as made:
        tuner = FineTuner(load(model_folder))
        opened = FeatureFolder.begin(Path(made) / "features", feature_settings(tuner.base))
        groups: dict[Group, Pool] = {"pool": pool, "corpus": corpus}
        for group, examples in groups.items():
            total, _ = write_features(tuner.base, examples, opened, group)
            opened.finish(group, {"examples": total})
        before = score(tuner.base, judged).nll
        for task in matrix.tasks[:tasks]:
            model = Bayesian().fit(matrix.select([name for name in matrix.tasks if name != task]))
            probes = choose(model, PROBES, free)
            row = model.predict(probes, matrix.select([task]).values[0, probes].astype(float))
            signals = Signals(pool.ids, forecast=row.mean)
            joined = join_corpus(signals, opened, held_out, needs=["forecast"])
            arms: dict[str, tuple[Any, Pool]] = {}
            for name in ("random", "top"):
                arms[f"{name}, pool"] = (make_plan(pool, name, signals, ratio=RATIO, held_out=held_out), pool)
                plan = make_plan(
                    joined.candidates, name, joined.signals, ratio=RATIO, held_out=joined.held_out, among=joined.among
                )
                arms[f"{name}, pool and corpus"] = (plan, both)
            data = Pool.load(folder / "tasks" / f"{task}.jsonl")
            for arm, (plan, texts) in arms.items():
                tuner.restore()
                tuned = tuner.tune(data, Recipe(**atlas.recipe), plan=plan, pool=texts).language_model
                change = score(tuned, judged).nll - before
                worst = float(np.mean(np.sort(change)[-len(change) // 10 :]))
                rows.append(
                    {"task": task, "arm": arm, "forgetting": float(change.mean()), "worst_tenth": worst}
                    | {"corpus": len(corpus), "left_out": joined.overlapping}
                )
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--quick", action="store_true", help="Three folds instead of five.")
    parser.add_argument(
        "--replay", type=int, default=0, help="Tasks to fine-tune with replay from a corpus, in minutes."
    )
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
    if arguments.replay:
        runs = replay(atlas, arguments.demo, arguments.replay)
        rows += runs
        table = Table("replay", "mean forgetting", "worst tenth", title=f"{arguments.replay} tasks, {RATIO:g} replayed")
        for arm in dict.fromkeys(run["arm"] for run in runs):
            of_arm = [run for run in runs if run["arm"] == arm]
            figures = (np.mean([run[name] for run in of_arm]) for name in ("forgetting", "worst_tenth"))
            table.add_row(arm, *(f"{figure:.4f}" for figure in figures))
        console.print(table)
    targets = [
        target("share of the measured loadings' R^2", rows[1]["r2"] / rows[0]["r2"], 0.5, least=True),
        target("the same, within tasks", rows[1]["r2_within"] / rows[0]["r2_within"], 0.5, least=True),
        target("RMSE of the text alone, ratio to the atlas's mean", cheap[1]["rmse"] / cheap[0]["rmse"], 0.9),
        target("largest distance of the coverage from nominal", worst, 0.03),
    ]
    conclude(console, rows, targets, arguments.json)


if __name__ == "__main__":
    main()
