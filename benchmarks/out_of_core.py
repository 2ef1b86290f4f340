"""An atlas that is larger than the memory it may take: time and peak memory of a fit, 30 chosen probes, and a forecast.

    python benchmarks/out_of_core.py --quick   # 100 tasks x 10^5 and 10^6 examples: about a minute, 400 MB of disk
    python benchmarks/out_of_core.py           # 10^7 as well: about ten minutes, 5 GB of disk and 8 GB to make it

Every size is measured in a process of its own, on numbers that were written to the disk before.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from rich.table import Table

from forgetcast import Atlas, Example, Pool, Scores, probes
from forgetcast.completion import Bayesian
from shared import conclude, output, target

TASKS, RANK, PROBES = 100, 5, 30
MEMORY_BOUND = 2.0
"""GB, of 10^9 bytes, that the whole process may take."""

LINEAR_BOUND = 1.5
"""Most that the time per example may grow by from one size to the next, ten times larger one."""


def make(path: Path, examples: int, partly: bool) -> None:
    """Write an atlas of low-rank forgetting and noise; if `partly`, its last two tasks have 30 entries each."""
    ids = tuple(f"e{i}" for i in range(examples))
    pool = Pool(Example(id_, text="x") for id_ in ids)
    before = Scores(ids, np.full(examples, 3.0), np.ones(examples, int), np.zeros(examples, bool))
    Atlas.create(path, pool, before, model="synthetic")
    rng = np.random.default_rng(0)
    loadings = 0.1 * rng.standard_normal((RANK, examples), dtype=np.float32)
    # Straight into the array: `Atlas.add` would look up every id of every row.
    array = zarr.open_array(path / "numbers.zarr" / "forgetting", mode="r+")
    array.resize((TASKS, examples))
    for task in range(TASKS):
        row = rng.standard_normal(RANK, dtype=np.float32) @ loadings
        row += 0.1 * rng.standard_normal(examples, dtype=np.float32)
        if partly and task >= TASKS - 2:
            row[PROBES:] = np.nan
        array[task] = row
    index = json.loads((path / "atlas.json").read_text())
    index["tasks"] = [
        {"name": f"t{i}", "added": index["created"], "recipe": {}, "model_hash": None} for i in range(TASKS)
    ]
    (path / "atlas.json").write_text(json.dumps(index))


def measure(path: Path) -> dict[str, float]:
    """Fit, choose, forecast; seconds of each and the peak memory of this process, GB."""
    started = time.perf_counter()
    atlas = Atlas.open(path)
    model = Bayesian().fit(atlas)
    fitted = time.perf_counter()
    at = probes.choose(model, PROBES)
    chosen = time.perf_counter()
    forecast = model.predict(at, np.linspace(-0.1, 0.3, PROBES))
    forecast.interval(0.9)
    done = time.perf_counter()
    return {
        "fit": fitted - started,
        "choose": chosen - fitted,
        "forecast": done - chosen,
        "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


def alone(job: str, path: Path, *arguments: str) -> dict[str, Any]:
    """Run one job of this file in a process of its own."""
    command = [sys.executable, __file__, "--job", job, "--path", str(path), *arguments]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(found.stdout or "{}"))


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10^5 and 10^6 examples only")
    parser.add_argument("--folder", type=Path, help="where the atlases are written; default: a temporary directory")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--job", choices=["make", "measure"], help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--examples", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--partly", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job == "make":
        make(arguments.path, arguments.examples, arguments.partly)
        return
    if arguments.job == "measure":
        print(json.dumps(measure(arguments.path)))
        return
    console, rows = output(), []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for examples in (10**5, 10**6) if arguments.quick else (10**5, 10**6, 10**7):
            for kind in ("complete", "partly measured"):
                path = Path(folder) / "bench.atlas"
                console.print(f"{TASKS} x {examples:,}, {kind}", style="dim")
                alone("make", path, "--examples", str(examples), *(["--partly"] if kind != "complete" else []))
                rows.append({"examples": examples, "atlas": kind, **alone("measure", path)})
                subprocess.run(["rm", "-r", str(path)], check=True)
    table = Table("examples", "atlas", "fit, s", "30 probes, s", "forecast, s", "µs per example", "peak memory, GB")
    for r in rows:
        seconds = [r[name] for name in ("fit", "choose", "forecast")]
        r["microseconds_per_example"] = 1e6 * sum(seconds) / r["examples"]
        figures = [f"{s:.2f}" for s in seconds] + [f"{r['microseconds_per_example']:.2f}", f"{r['gigabytes']:.2f}"]
        table.add_row(f"{r['examples']:,}", r["atlas"], *figures)
    console.print(table)
    targets = []
    for kind in ("complete", "partly measured"):
        own = [r for r in rows if r["atlas"] == kind]
        peak = own[-1]["gigabytes"]
        name = f"peak memory, {TASKS} x {own[-1]['examples']:,}, {kind}, GB"
        targets.append(target(name, peak, MEMORY_BOUND))
        grown = own[-1]["microseconds_per_example"] / own[-2]["microseconds_per_example"]
        name = f"time per example, last size to the one before, {kind}"
        targets.append(target(name, grown, LINEAR_BOUND))
    conclude(console, rows, targets, arguments.json)


if __name__ == "__main__":
    main()
