"""A pool of many short texts: processor time and peak memory of the commands that need no model.

    python benchmarks/large_pool.py --quick   # 10^5 texts: about half a minute
    python benchmarks/large_pool.py           # 10^6 texts: a few minutes, 500 MB of disk

Every command runs in a process of its own, on an atlas that was written before.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from forgetcast import Atlas, Example, Pool, Scores
from shared import conclude, output, target

TASKS, RANK, SOURCES = 12, 3, 8
MEMORY_BOUND = 2.0
"""GB, of 10^9 bytes, that any of the commands may take."""

WORDS = (
    "the",
    "loss",
    "of",
    "a",
    "model",
    "is",
    "measured",
    "on",
    "every",
    "token",
    "and",
    "averaged",
    "over",
    "texts",
)


def examples(count: int) -> list[Example]:
    """Make short texts from a seed."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(WORDS), size=(count, 12))
    return [
        Example(f"e{i}", text=f"{' '.join(WORDS[w] for w in words)} {i}", source=f"source {i % SOURCES}")
        for i, words in enumerate(drawn.tolist())
    ]


def make(folder: Path, count: int) -> None:
    """Write the pool, an atlas of low-rank forgetting, and the scores of one more model."""
    pool = Pool(examples(count))
    pool.save(folder / "pool.jsonl")
    fields = (np.full(count, 12), np.zeros(count, bool))
    metadata = {"pool": pool.fingerprint}
    Atlas.create(folder / "bench.atlas", pool, Scores(pool.ids, np.full(count, 3.0), *fields), model="synthetic")
    rng = np.random.default_rng(0)
    forgetting = 0.1 * rng.standard_normal((TASKS, RANK)) @ rng.standard_normal((RANK, count))
    atlas = Atlas.open(folder / "bench.atlas")
    for task, row in enumerate(np.abs(forgetting)):
        atlas.add(f"t{task}", Scores(pool.ids, 3.0 + row, *fields, metadata=metadata))
    Scores(pool.ids, 3.0 + np.abs(forgetting[0]), *fields, metadata=metadata).save(folder / "after.parquet")
    assert Atlas.open(folder / "bench.atlas").stored().shape == (TASKS, count)


JOBS = {
    "read JSONL": "from forgetcast import Pool; Pool.load('pool.jsonl')",
    "read Parquet": "from forgetcast import Pool; Pool.load('bench.atlas/pool.parquet')",
    "plan": "main('plan', 'bench.atlas', '-o', 'plan.parquet')",
    "report": "main('report', 'bench.atlas', '-o', 'report.html')",
    "probes": "main('probes', 'bench.atlas', '-k', '30', '-o', 'probes.jsonl')",
    "add": "from forgetcast import Atlas, Scores; Atlas.open('bench.atlas').add('new', Scores.load('after.parquet'))",
}
MAIN = """
import sys
from forgetcast import cli
def main(*words):
    sys.argv = ["forgetcast", *words]
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code
"""


def measure(folder: Path, code: str) -> tuple[float, float]:
    """Run code in a process of its own; seconds of processor time, and the peak memory in GB."""
    with subprocess.Popen([sys.executable, "-c", MAIN + code], cwd=folder, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{code} failed")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10^5 texts")
    parser.add_argument("--folder", type=Path, help="where the atlas is written; default: a temporary directory")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--make", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make(arguments.folder, arguments.make)
        return
    count = 10**5 if arguments.quick else 10**6
    console, rows = output(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        console.print(f"writing an atlas of {TASKS} x {count:,}", style="dim")
        # In another process: what a parent takes counts as its children's, from before they start their program.
        subprocess.run([sys.executable, __file__, "--make", str(count), "--folder", name], check=True)
        nothing = measure(folder, "import numpy, scipy.linalg, pyarrow.parquet, forgetcast.completion")[1]
        for job, code in JOBS.items():
            seconds, gigabytes = measure(folder, code)
            rows.append({"examples": count, "job": job, "seconds": seconds, "gigabytes": gigabytes})
    table = Table(
        "job", "processor time, s", "peak memory, GB", title=f"{count:,} short texts; imports alone: {nothing:.2f} GB"
    )
    for row in rows:
        table.add_row(row["job"], f"{row['seconds']:.1f}", f"{row['gigabytes']:.2f}")
    console.print(table)
    worst = max(rows, key=lambda row: float(row["gigabytes"]))
    targets = [target(f"peak memory of {worst['job']}, GB", worst["gigabytes"], MEMORY_BOUND)]
    conclude(console, rows, targets, arguments.json)


if __name__ == "__main__":
    main()
