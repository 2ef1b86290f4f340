"""An atlas that is larger than the memory it may take: time and peak memory of a fit, 30 chosen probes, and a forecast.

And the form on disk: the time to open it, and to read all numbers by blocks of columns, beside a Zarr array of the same
numbers in chunks of the same size (as atlases were kept before), which has no checksums.

    python benchmarks/out_of_core.py --quick   # 100 tasks x 10^5 and 10^6 examples: about a minute, 400 MB of disk
    python benchmarks/out_of_core.py           # 10^7 as well: about ten minutes, 5 GB of disk and 8 GB to make it

Every size is measured in a process of its own, on numbers that were written to the disk before.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
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
from forgetcast.atlas.rows import BLOCK, FORGETTING, write_part
from forgetcast.atlas.storage import storage_of
from forgetcast.completion import Bayesian
from forgetcast.files import check_seal
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
    # Straight into parts: `Atlas.add` would look up every id of every row.
    storage, base = storage_of(path), str(check_seal(path / "before.parquet", pages=False))
    array = None
    if not partly:
        array = zarr.create_array(
            path.with_suffix(".zarr"), shape=(TASKS, examples), chunks=(1, min(examples, BLOCK)), dtype="float32"
        )
    for task in range(TASKS):
        row = rng.standard_normal(RANK, dtype=np.float32) @ loadings
        row += 0.1 * rng.standard_normal(examples, dtype=np.float32)
        info = {"name": f"t{task}", "base": base, "examples": examples, "added": "2026-01-01T00:00:00+00:00"}
        if partly and task >= TASKS - 2:
            row[PROBES:] = np.nan
        write_part(storage, info, task, {FORGETTING: row})
        if array is not None:
            array[task] = row


def read_blocks(path: Path) -> dict[str, float]:
    """Open the atlas, and read it and the array by blocks in turns; seconds, the best of three."""
    seconds: dict[str, list[float]] = {"open": [], "parquet": [], "zarr": []}

    def clock(name: str, started: float) -> None:
        seconds[name].append(time.perf_counter() - started)

    for _ in range(3):
        started = time.perf_counter()
        atlas = Atlas.open(path)
        assert len(atlas.tasks) == TASKS
        clock("open", started)
        stored = atlas.stored()
        array: Any = zarr.open_array(path.with_suffix(".zarr"), mode="r")
        for name, matrix in (("parquet", stored), ("zarr", array)):
            started = time.perf_counter()
            total = 0.0
            for start in range(0, stored.shape[1], BLOCK):
                total += float(np.asarray(matrix[:, start : start + BLOCK])[0, 0])
            clock(name, started)
    return {name: min(values) for name, values in seconds.items()}


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
    parser.add_argument("--job", choices=["make", "measure", "read"], help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--examples", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--partly", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job == "make":
        make(arguments.path, arguments.examples, arguments.partly)
        return
    if arguments.job:
        print(json.dumps((measure if arguments.job == "measure" else read_blocks)(arguments.path)))
        return
    console, rows, reads = output(), [], []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for examples in (10**5, 10**6) if arguments.quick else (10**5, 10**6, 10**7):
            for kind in ("complete", "partly measured"):
                path = Path(folder) / "bench.atlas"
                console.print(f"{TASKS} x {examples:,}, {kind}", style="dim")
                alone("make", path, "--examples", str(examples), *(["--partly"] if kind != "complete" else []))
                rows.append({"examples": examples, "atlas": kind, **alone("measure", path)})
                if kind == "complete":
                    reads.append({"examples": examples, **alone("read", path)})
                for made in Path(folder).iterdir():
                    shutil.rmtree(made)
    table = Table("examples", "atlas", "fit, s", "30 probes, s", "forecast, s", "µs per example", "peak memory, GB")
    for r in rows:
        seconds = [r[name] for name in ("fit", "choose", "forecast")]
        r["microseconds_per_example"] = 1e6 * sum(seconds) / r["examples"]
        figures = [f"{s:.2f}" for s in seconds] + [f"{r['microseconds_per_example']:.2f}", f"{r['gigabytes']:.2f}"]
        table.add_row(f"{r['examples']:,}", r["atlas"], *figures)
    console.print(table)
    table = Table("examples", "open, s", "read by blocks, s", "Zarr, s")
    for r in reads:
        table.add_row(f"{r['examples']:,}", *(f"{r[name]:.2f}" for name in ("open", "parquet", "zarr")))
    console.print(table)
    targets = [
        target(f"open, {TASKS} x {reads[-1]['examples']:,}, s", reads[-1]["open"], 1.0),
        target("blocks read, Parquet to Zarr", reads[-1]["parquet"] / reads[-1]["zarr"], 1.0),
    ]
    for kind in ("complete", "partly measured"):
        own = [r for r in rows if r["atlas"] == kind]
        peak = own[-1]["gigabytes"]
        name = f"peak memory, {TASKS} x {own[-1]['examples']:,}, {kind}, GB"
        targets.append(target(name, peak, MEMORY_BOUND))
        grown = own[-1]["microseconds_per_example"] / own[-2]["microseconds_per_example"]
        name = f"time per example, last size to the one before, {kind}"
        targets.append(target(name, grown, LINEAR_BOUND))
    conclude(console, rows + reads, targets, arguments.json)


if __name__ == "__main__":
    main()
