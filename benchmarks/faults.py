"""What breaks under attack: processes killed at any moment, many writers at a time, damaged files, thousands of rows.

    python benchmarks/faults.py --quick             # few of each: about a minute
    python benchmarks/faults.py --json result.json  # 200 kills, 1,000 rows, 1,000 damages, 2,000 tasks: half an hour

- Kills: `kill -9` of a real `collect` of the demo model at a random moment, again and again until it is finished. After
  each, the atlas opens and the finished rows are as they were; in the end it equals that of an uninterrupted run bit
  for bit, and no temporary file is left.
- Writers: eight processes add rows of their own, four add entries of the same rows, a reader opens the atlas all the
  while. Every entry has a known value.
- Damage: a bit flipped, a file cut, a block zeroed, a file deleted or exchanged with another of its kind, in atlas,
  score, forecast and plan files. What is read afterwards is an error of this package or what was read before.
- Load: the time of an added row, with up to 2,000 others there.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
from rich.table import Table

from forgetcast import Atlas, Example, Pool, ReplayPlan, Scores, make_plan, probes
from forgetcast.completion import Bayesian
from forgetcast.completion.forecast import TaskForecast
from forgetcast.errors import ForgetcastError
from shared import conclude, output, target

CONTEXT = get_context("forkserver")
# The server imports the slow packages once; each process is a fork of it.
CONTEXT.set_forkserver_preload(["forgetcast.lm", "transformers.trainer", "transformers.models.llama.modeling_llama"])

STEPS, TASKS, EXAMPLES = 3, 4, 24

Rows = list[dict[str, Any]]


def pool_of(count: int) -> Pool:
    """Short texts."""
    return Pool(Example(f"e{i}", text=f"Text {i} says {i * i} and {i % 7}.", source=f"s{i % 3}") for i in range(count))


def scores_of(pool: Pool, nll: np.ndarray) -> Scores:
    """Scores with the given losses."""
    count = len(pool)
    return Scores(pool.ids, nll, np.full(count, 9), np.zeros(count, bool), metadata={"pool": pool.fingerprint})


def files_below(path: Path) -> dict[str, bytes]:
    """Return the content of all files of a folder."""
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def collect_in(folder: Path) -> None:
    """Run `forgetcast collect` in this process; what it prints goes to a file."""
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from forgetcast.cli import app

    app(["collect", str(folder / "config.yaml")], standalone_mode=False)


def configure(folder: Path) -> None:
    """Write a pool, tasks, and a configuration that names the demo model."""
    (folder / "tasks").mkdir(parents=True)
    pool_of(EXAMPLES).save(folder / "pool.jsonl")
    for task in range(TASKS):
        rows = (Example(f"{i}", prompt=f"{task} and {i}:", completion=f" {task * i}") for i in range(16))
        Pool(rows).save(folder / "tasks" / f"task{task}.jsonl")
    model = files("forgetcast.demo") / "model"
    recipe = f"{{steps: {STEPS}, batch_size: 4}}"
    (folder / "config.yaml").write_text(
        f"model: {model}\npool: pool.jsonl\ntasks: tasks\natlas: runs.atlas\nrecipe: {recipe}\n"
    )


def kills(folder: Path, count: int, rng: random.Random) -> Rows:
    """Kill `collect` at random moments; start it again each time, and anew when it is finished."""
    whole = folder / "whole"
    configure(whole)
    started = time.monotonic()
    process = CONTEXT.Process(target=collect_in, args=(whole,))
    process.start()
    process.join()
    seconds = time.monotonic() - started
    truth = Atlas.open(whole / "runs.atlas").matrix()
    found: Counter[str] = Counter()
    killed, run = 0, 0
    while killed < count:
        run += 1
        place = folder / f"run{run}"
        configure(place)
        atlas, finished = place / "runs.atlas", dict[str, bytes]()
        while True:
            process = CONTEXT.Process(target=collect_in, args=(place,))
            process.start()
            process.join(rng.uniform(0, seconds))
            if killed >= count:
                process.join()
            if process.is_alive():
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                killed += 1
            elif process.exitcode:
                found["refused to go on"] += 1
                break
            try:
                parts = files_below(atlas / "rows") if (atlas / "atlas.json").exists() else {}
                if parts:
                    Atlas.open(atlas).matrix()
            except ForgetcastError:
                found["unreadable"] += 1
            found["finished rows changed or measured again"] += any(parts.get(n) != c for n, c in finished.items())
            finished = {name: content for name, content in parts.items() if ".tmp-" not in name}
            if process.exitcode == 0:
                break
        end = Atlas.open(atlas).matrix()
        found["ends that differ"] += end.tasks != truth.tasks or not np.array_equal(end.values, truth.values)
        found["files left over"] += sum(".tmp-" in name or "partial" in name for name in files_below(place))
        shutil.rmtree(place)
    names = (
        "unreadable",
        "refused to go on",
        "finished rows changed or measured again",
        "ends that differ",
        "files left over",
    )
    return [{"attack": f"{killed} kills in {run} collects", "what": name, "count": found[name]} for name in names]


def write_rows(path: Path, first: int, count: int) -> None:
    """Add rows whose entries are their number."""
    atlas = Atlas.open(path)
    for row in range(first, first + count):
        atlas.add(f"row {row}", scores_of(atlas.pool, np.full(len(atlas.pool), 1.0 + row)))


def write_parts(path: Path, first: int, step: int, rows: int) -> None:
    """Add entries of the same rows, each the number of its example."""
    atlas = Atlas.open(path)
    for row in range(rows):
        for column in range(first, len(atlas.pool), step):
            part = atlas.pool.subset([f"e{column}"])
            atlas.add(f"shared {row}", scores_of(part, np.array([1.0 + column])))


def writers(folder: Path, rows: int) -> Rows:
    """Write from twelve processes, and read."""
    pool = pool_of(EXAMPLES)
    path = folder / "written.atlas"
    Atlas.create(path, pool, scores_of(pool, np.ones(EXAMPLES)), model="none")
    shared = max(rows // 200, 1)
    jobs = [CONTEXT.Process(target=write_rows, args=(path, rows // 8 * i, rows // 8)) for i in range(8)]
    jobs += [CONTEXT.Process(target=write_parts, args=(path, i, 4, shared)) for i in range(4)]
    for job in jobs:
        job.start()
    reads = wrong = errors = 0
    while any(job.is_alive() for job in jobs):
        try:
            matrix = Atlas.open(path).matrix()
        except ForgetcastError:
            errors += 1
            continue
        reads += 1
        wrong += count_wrong(matrix.tasks, matrix.values)
    for job in jobs:
        job.join()
    matrix = Atlas.open(path).matrix()
    expected = rows // 8 * 8 + shared
    what = {
        "writers refused": sum(job.exitcode != 0 for job in jobs),
        "rows lost": expected - len(matrix.tasks),
        "entries lost": int(np.isnan(matrix.values).sum()),
        "wrong entries in the end": count_wrong(matrix.tasks, matrix.values),
        f"wrong entries in {reads} reads meanwhile": wrong,
        "reads refused": errors,
    }
    attack = f"12 writers, {expected} rows"
    return [{"attack": attack, "what": name, "count": number} for name, number in what.items()]


def count_wrong(tasks: tuple[str, ...], values: np.ndarray) -> int:
    """Count the entries that are neither NaN nor what their writer meant."""
    wrong = 0
    for task, row in zip(tasks, values, strict=True):
        kind, number = task.split()
        meant = np.arange(len(row), dtype=float) if kind == "shared" else np.full(len(row), float(number))
        wrong += int((~np.isnan(row) & (row != meant)).sum())
    return wrong


@dataclass
class Specimen:
    """Files of one kind, and how they are read.

    Attributes
    ----------
    paths : list of Path
        Files that may be damaged.
    read : callable
        Returns all that is read of them, to be compared.
    others : list of Path
        Files of the same kind with other content, one for each of `paths`, for exchanges.
    """

    paths: list[Path]
    read: Callable[[], Any]
    others: list[Path] = field(default_factory=list)


def specimens(folder: Path) -> dict[str, Specimen]:
    """Make an atlas with parts, a score file, a forecast and a plan."""
    pool = pool_of(EXAMPLES * 4)
    rng = np.random.default_rng(0)
    for name in ("one", "other"):
        place = folder / name
        place.mkdir()
        atlas = Atlas.create(place / "a.atlas", pool, scores_of(pool, rng.uniform(2, 3, len(pool))), model="none")
        for i in range(4):
            atlas.add(f"t{i}", scores_of(pool, rng.uniform(2, 4, len(pool))), recipe={"steps": i})
        atlas.add("few", scores_of(pool.subset(["e3", "e8"]), np.array([3.0, 4.0])))
        atlas.add_replays([{"task": "t0", "seed": 0, "ratio": 0.5}])
        atlas.before.save(place / "scores.parquet")
        model = Bayesian().fit(atlas.matrix(["t0", "t1", "t2", "t3"]))
        row = model.predict(probes.choose(model, 5), rng.uniform(0, 1, 5))
        TaskForecast.from_forecast(row, atlas, level=0.9, method="bayesian", task="new").save(
            place / "forecast.parquet"
        )
        make_plan(pool, "random", ratio=0.5, seed=int(rng.integers(9))).save(place / "plan.parquet")

    def read_atlas() -> Any:
        atlas = Atlas.open(folder / "one" / "a.atlas")
        numbers = (atlas.matrix().values.tobytes(), atlas.before.nll.tobytes(), atlas.pool.fingerprint)
        return numbers, atlas.tasks, [atlas.provenance(t) for t in atlas.tasks], atlas.replays, atlas.scored_with

    def read_scores() -> Any:
        scores = Scores.load(folder / "one" / "scores.parquet")
        return scores.ids, scores.nll.tobytes(), scores.tokens.tobytes(), scores.reasons, dict(scores.metadata)

    def read_forecast() -> Any:
        forecast = TaskForecast.load(folder / "one" / "forecast.parquet")
        return [np.asarray(value).tolist() for value in vars(forecast).values()]

    def read_plan() -> Any:
        plan = ReplayPlan.load(folder / "one" / "plan.parquet")
        return [np.asarray(value).tolist() for value in vars(plan).values()]

    atlases = sorted((folder / "one" / "a.atlas").rglob("*"))
    parts = [path for path in atlases if path.is_file() and path.stat().st_size]
    return {
        "atlas": Specimen(parts, read_atlas, [*parts[1:], parts[0]]),
        "scores": Specimen([folder / "one" / "scores.parquet"], read_scores),
        "forecast": Specimen([folder / "one" / "forecast.parquet"], read_forecast),
        "plan": Specimen([folder / "one" / "plan.parquet"], read_plan),
    }


def damage(folder: Path, count: int, rng: random.Random) -> Rows:
    """Damage files one at a time, and read."""
    kinds = specimens(folder)
    intact = {name: kind.read() for name, kind in kinds.items()}
    outcomes: dict[tuple[str, str], Counter[str]] = {}
    for i in range(count):
        name = list(kinds)[i % len(kinds)]
        kind, how = kinds[name], rng.choice(["flip", "truncate", "zero", "delete", "swap"])
        if how == "swap" and not kind.others:
            how = "flip"  # two whole files of a kind in each other's place are what the user put there
        at = rng.randrange(len(kind.paths))
        path = kind.paths[at]
        content = path.read_bytes()
        changed = bytearray(content)
        if how == "flip":
            changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        elif how == "truncate":
            del changed[rng.randrange(len(content)) :]
        elif how == "zero":
            start = rng.randrange(len(content))
            changed[start : start + 64] = bytes(len(changed[start : start + 64]))
        elif how == "swap":
            changed = bytearray(kind.others[at].read_bytes())
        path.unlink()
        if how != "delete":
            path.write_bytes(changed)
        try:
            found = "harmless" if kind.read() == intact[name] else "WRONG, silently"
        except ForgetcastError:
            found = "clear error"
        except Exception as error:  # what is counted here is that there is any
            found = f"traceback: {type(error).__name__}"
        outcomes.setdefault((name, how), Counter())[found] += 1
        path.write_bytes(content)
    return [
        {"attack": f"{how}, {name}", "what": what, "count": number}
        for (name, how), counter in sorted(outcomes.items())
        for what, number in sorted(counter.items())
    ]


def load(folder: Path, rows: int) -> Rows:
    """Time each added row."""
    pool, path = pool_of(2000), folder / "many.atlas"
    Atlas.create(path, pool, scores_of(pool, np.ones(len(pool))), model="none")
    seconds = []
    for row in range(rows):
        atlas = Atlas.open(path)  # as another process would
        scores = scores_of(pool, np.full(len(pool), 2.0 + row))
        atlas.baseline.index.find(pool.ids)  # its lookup is made once for all rows
        started = time.perf_counter()
        atlas.add(f"row {row}", scores)
        seconds.append(time.perf_counter() - started)
    part = max(rows // 10, 1)
    first, last = (1000 * float(np.median(part_)) for part_ in (seconds[:part], seconds[-part:]))
    started = time.perf_counter()
    count = len(Atlas.open(path).tasks)
    opened = time.perf_counter() - started
    return [
        {"attack": f"{count} rows", "what": f"ms an add, first {part}", "count": first},
        {"attack": f"{count} rows", "what": f"ms an add, last {part}", "count": last},
        {"attack": f"{count} rows", "what": "ms to open and list", "count": 1000 * opened},
    ]


def main() -> None:
    """Run the attacks and print what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for all figures")
    arguments = parser.parse_args()
    console, rng = output(), random.Random(arguments.seed)
    sizes = (5, 40, 200, 100) if arguments.quick else (200, 1000, 1000, 2000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        attacks: dict[str, Callable[[Path], Rows]] = {
            "damage": lambda place: damage(place, sizes[2], rng),
            "load": lambda place: load(place, sizes[3]),
            "writers": lambda place: writers(place, sizes[1]),
            "kills": lambda place: kills(place, sizes[0], rng),
        }
        rows: Rows = []
        for attack, run in attacks.items():
            console.print(attack, style="dim")
            (folder / attack).mkdir()
            rows += run(folder / attack)
            shutil.rmtree(folder / attack)
    table = Table("attack", "what", "count")
    for row in rows:
        table.add_row(row["attack"], row["what"], f"{row['count']:.4g}")
    console.print(table)
    times = [row["count"] for row in rows if row["what"].startswith("ms an add")]
    harmless = ("harmless", "clear error", "ms ")
    broken = sum(row["count"] for row in rows if not row["what"].startswith(harmless))
    targets = [
        target("numbers wrong in silence, tracebacks, rows lost or refused", broken, 0),
        target("time of an add, last tenth to the first", times[1] / times[0], 1.5),
    ]
    conclude(console, rows, targets, arguments.json)


if __name__ == "__main__":
    main()
