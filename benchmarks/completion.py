"""Completion against the paper's three algorithms, in one run: error, interval coverage, time per new task, scaling.

    python benchmarks/completion.py --quick             # one split, three new tasks a domain: about a minute
    python benchmarks/completion.py --json result.json  # ten splits, all new tasks: about four minutes
    python benchmarks/completion.py --refit             # the same, and refit the paper's algorithms: an hour

With --plot FILE.svg it draws error against the number of probes, and time against size.

The paper's algorithms are scikit-surprise's with the paper's settings, refitted for every new task as its code does.
Their errors on the ten splits are read from olmo-7b-reference.json, next to the data, and only their
time is measured, on three tasks, unless they are to be refitted. The matrix is the authors' OLMo-7B measurement;
FORGETCAST_DATA names its folder (default ../shared/data).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy
import surprise
from rich.console import Console
from rich.table import Table

from forgetcast import ForgettingMatrix, probes
from forgetcast.completion import KNN, Additive, Bayesian, LogisticMF, MatrixFactorization
from forgetcast.completion.logistic import BIAS_PRECISION, factor_logistic
from shared import conclude, figure_of, output, save_figure, target

IN_DOMAIN = (6, 65, 18, 8, 60, 13, 37, 22, 30, 19, 64, 50, 25, 31, 32, 61, 16, 5, 53, 49)
OUT_OF_DOMAIN = tuple(range(66, 76))
KNOWN = tuple(row for row in range(66) if row not in IN_DOMAIN)
DOMAINS = {"in domain": IN_DOMAIN, "out of domain": OUT_OF_DOMAIN}
REFERENCE = {"in domain": "olmo-7b/in-domain", "out of domain": "olmo-7b/flan-to-tulu"}
CURVE = (3, 5, 10, 20, 30, 50, 100)
"""Numbers of probes on the plot."""

TIMED = 3
"""New tasks that the paper's algorithms are timed on where they are not all refitted."""

PAPER: dict[str, Callable[[], Any]] = {
    "additive": lambda: surprise.BaselineOnly(verbose=False),
    "knn": lambda: surprise.KNNBaseline(k=40, sim_options={"name": "msd"}, verbose=False),
    "svd": lambda: surprise.SVD(
        n_factors=5, n_epochs=1000, lr_all=0.005, reg_all=0.0, init_std_dev=0.001, random_state=0
    ),
}
OURS = {"additive": Additive, "KNN": KNN, "MF": MatrixFactorization, "Bayesian": Bayesian}

FOUR = {
    "olmo-7b/in-domain": (0.930, 0.906, 0.930),
    "olmo-7b/flan-to-tulu": (0.968, 0.983, 1.014),
    "olmo-7b-instruct/in-domain": (0.948, 0.926, 1.066),
    "olmo-7b-instruct/mmlu-to-bbh-truthfulqa": (1.010, 0.962, 1.048),
}
"""Two matrices, each with new tasks like the known ones and unlike them, and the most that Bayesian's error may be
there: with 30 random, 30 chosen and 10 chosen probes, relative to the best of the paper's three with 30 random."""

KINDS = ("30 random", "30 chosen", "10 chosen")
SPLITS = 5

MUST = {
    ("in domain", "30 random"): 0.95,
    ("out of domain", "30 random"): 0.98,
    ("in domain", "30 chosen"): 0.92,
    ("out of domain", "30 chosen"): 0.99,
    ("in domain", "10 chosen"): 0.98,
    ("out of domain", "10 chosen"): 1.05,
}
"""Most that Bayesian's error may be, relative to the best of the paper's three with 30 random probes."""


def refit(make: Callable[[], Any], known: np.ndarray, at: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Fit one of the paper's algorithms on the known rows and one new row's probes; complete the new row."""
    tasks, examples = known.shape
    frame = pd.DataFrame(
        {
            "task": np.concatenate([np.repeat(np.arange(tasks), examples), np.full(len(at), tasks)]),
            "example": np.concatenate([np.tile(np.arange(examples), tasks), at]),
            "value": np.concatenate([known.ravel(), observed]),
        }
    )
    reader = surprise.Reader(rating_scale=(float(frame["value"].min()), float(frame["value"].max())))
    algorithm = make()
    algorithm.fit(surprise.Dataset.load_from_df(frame, reader).build_full_trainset())
    return np.array([algorithm.predict(tasks, example, clip=False).est for example in range(examples)])


def split(examples: int, seed: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One half of the columns to take probes from, the other to judge on, and random probes."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(examples)
    candidates = np.sort(order[: examples // 2])
    return candidates, order[examples // 2 :], rng.choice(candidates, count, replace=False)


def quality(
    values: np.ndarray, seeds: int, most_tasks: int | None, reference: dict[str, Any] | None, console: Console
) -> list[dict[str, Any]]:
    """Errors of the paper's algorithms and ours on the same splits, and the time that one new task takes.

    With a `reference`, the errors of the paper's are taken from it.
    """
    known = values[list(KNOWN)]
    fitted = {name: method().fit(known) for name, method in OURS.items()}
    found: dict[tuple[str, str, str], dict[str, list[float]]] = {}

    def add(domain: str, name: str, kind: str, rmse: float, seconds: float, covered: float = np.nan) -> None:
        lists = found.setdefault((domain, name, kind), {"rmse": [], "seconds": [], "coverage": []})
        lists["rmse"].append(rmse)
        lists["seconds"].append(seconds)
        lists["coverage"].append(covered)

    for domain, rows in DOMAINS.items():
        new = values[list(rows[:most_tasks])]
        for seed in range(seeds):
            console.print(f"{domain}, split {seed + 1} of {seeds}", style="dim")
            candidates, judged, at_random = split(values.shape[1], seed, 30)
            for name, make in PAPER.items():
                refitted = new if reference is None else new[: TIMED if seed == 0 else 0]
                started = time.perf_counter()
                completed = [refit(make, known, at_random, row[at_random]) for row in refitted]
                seconds = (time.perf_counter() - started) / len(refitted) if len(refitted) else np.nan
                if reference is None:
                    error = rmse((np.array(completed) - new)[:, judged])
                else:
                    error = reference[REFERENCE[domain]]["seeds"][seed]["rmse"][name]
                add(domain, f"paper: {name}", "30 random", error, seconds)
            kinds = {
                "30 random": at_random,
                "30 chosen": probes.choose(fitted["Bayesian"], 30, candidates),
                "10 chosen": probes.choose(fitted["Bayesian"], 10, candidates),
            }
            for name, model in fitted.items():
                for kind, at in kinds.items():
                    times = []
                    for row in new:
                        started = time.perf_counter()
                        model.predict(at, row[at])
                        times.append(time.perf_counter() - started)
                    forecast = model.predict(at, new[:, at])
                    lower, upper = forecast.interval(0.9)
                    covered = float(np.mean(((lower <= new) & (new <= upper))[:, judged]))
                    add(domain, name, kind, rmse((forecast.mean - new)[:, judged]), float(np.median(times)), covered)
    best = {
        domain: min(float(np.mean(found[domain, f"paper: {name}", "30 random"]["rmse"])) for name in PAPER)
        for domain in DOMAINS
    }
    return [
        {
            "part": "quality",
            "domain": domain,
            "method": name,
            "probes": kind,
            "rmse": float(np.mean(lists["rmse"])),
            "ratio_to_papers_best": float(np.mean(lists["rmse"])) / best[domain],
            "coverage_90": float(np.mean(lists["coverage"])),
            "seconds_per_task": float(np.nanmedian(lists["seconds"])),
        }
        for (domain, name, kind), lists in found.items()
    ]


def four_settings(folder: Path, console: Console) -> list[dict[str, Any]]:
    """Errors and coverage on the splits of the reference files, relative to the paper's best in the same file."""
    rows = []
    files = {"olmo-7b": "olmo-7b-dolma.json", "olmo-7b-instruct": "olmo-7b-instruct.json"}
    references = {name: folder / f"{name}-reference.json" for name in files}
    for setting in FOUR:
        name = setting.partition("/")[0]
        if not (references[name].is_file() and (folder / files[name]).is_file()):
            console.print(f"{setting}: its files are not here; skipped", style="dim")
            continue
        content = json.loads(references[name].read_text())
        reference = content.get("settings", content)[setting]
        values = ForgettingMatrix.load(folder / files[name]).values.astype(np.float64)
        known, new, splits = values[reference["train"]], values[reference["test"]], reference["seeds"][:SPLITS]
        best = min(float(np.mean([split["rmse"][paper] for split in splits])) for paper in PAPER)
        model = Bayesian().fit(known)
        for kind in KINDS:
            errors, covered = [], []
            for split in splits:
                candidates, judged = np.array(split["candidates"]), np.array(split["evaluate"])
                count = int(kind.split()[0])
                chosen = kind.endswith("chosen")
                at = probes.choose(model, count, candidates) if chosen else np.array(split["probes30"])
                forecast = model.predict(at, new[:, at])
                lower, upper = forecast.interval(0.9)
                errors.append(rmse((forecast.mean - new)[:, judged]))
                covered.append(float(np.mean(((lower <= new) & (new <= upper))[:, judged])))
            rows.append(
                {
                    "part": "settings",
                    "setting": setting,
                    "probes": kind,
                    "rmse": float(np.mean(errors)),
                    "ratio_to_papers_best": float(np.mean(errors)) / best,
                    "coverage_90": float(np.mean(covered)),
                }
            )
    return rows


def rmse(error: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(error**2)))


def scaling(sizes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Time of a fit and of a forecast with intervals, relative to one float32 product of the same size."""
    rows = []
    for tasks, examples in sizes:
        rng = np.random.default_rng(0)
        values = rng.normal(size=(tasks, 5)).astype(np.float32) @ rng.normal(size=(5, examples)).astype(np.float32)
        values += rng.standard_normal(values.shape, dtype=np.float32)
        matrix = ForgettingMatrix(values)
        gram = _median(partial(np.matmul, values, values.T))
        fit = _median(partial(_fit, matrix), rounds=3)
        model = Bayesian().fit(matrix)
        at, weights = np.arange(30), np.ones(model.loadings_.shape[1], dtype=np.float32)
        loadings = np.ascontiguousarray(model.loadings_.T, dtype=np.float32)
        product = _median(partial(np.matmul, weights, loadings))
        forecast = _median(partial(_forecast, model, at, values[0, at]))
        rows.append(
            {
                "part": "scaling",
                "tasks": tasks,
                "examples": examples,
                "fit_seconds": fit,
                "fit_to_gram": fit / gram,
                "forecast_seconds": forecast,
                "forecast_to_product": forecast / product,
            }
        )
    return rows


def curves(values: np.ndarray, seeds: int) -> list[dict[str, Any]]:
    """Error of our methods by the number of probes, on the splits of `quality`."""
    known = values[list(KNOWN)]
    fitted = {name: method().fit(known) for name, method in OURS.items()}
    errors: dict[tuple[str, str, str, int], list[float]] = {}
    for domain, rows in DOMAINS.items():
        new = values[list(rows)]
        for seed in range(seeds):
            candidates, judged, at_random = split(values.shape[1], seed, max(CURVE))
            chosen = probes.choose(fitted["Bayesian"], max(CURVE), candidates)
            for k in CURVE:
                for name, model in fitted.items():
                    for kind, at in (("random", at_random[:k]), ("chosen", chosen[:k])):
                        if kind == "random" or name == "Bayesian":
                            error = rmse((model.predict(at, new[:, at]).mean - new)[:, judged])
                            errors.setdefault((domain, name, kind, k), []).append(error)
    return [
        {"part": "curve", "domain": domain, "method": name, "probes": kind, "k": k, "rmse": float(np.mean(found))}
        for (domain, name, kind, k), found in errors.items()
    ]


def logistic(steps: int) -> list[dict[str, Any]]:
    """Fit of binary forgetting, 142 x 4,764, against plain gradient steps on the same objective and from nothing."""
    rng = np.random.default_rng(0)
    tasks, examples, rank, precision = 142, 4_764, 5, 1.0
    logits = rng.normal(0, 0.7, (tasks, 1)) + rng.normal(0, 0.8, examples) - 2.5
    logits += rng.normal(0, 0.8, (tasks, rank)) @ rng.normal(0, 0.8, (rank, examples))
    values = (rng.random(logits.shape) < scipy.special.expit(logits)).astype(np.float64)
    started = time.perf_counter()
    ours = factor_logistic(values, rank, precision).log_likelihood
    fitted = time.perf_counter() - started
    started = time.perf_counter()
    LogisticMF(rank=rank, precision=precision).fit(values)
    whole = time.perf_counter() - started
    started = time.perf_counter()
    theirs = _gradient_steps(values, rank, precision, steps)
    stepped = time.perf_counter() - started
    rows = (("LogisticMF, the factors", fitted, ours), ("LogisticMF, and calibrated", whole, ours))
    return [
        {"part": "logistic", "method": name, "seconds": seconds, "log_likelihood": found / values.size}
        for name, seconds, found in (*rows, (f"{steps} gradient steps", stepped, theirs))
    ]


def _gradient_steps(values: np.ndarray, rank: int, precision: float, steps: int, rate: float = 0.001) -> float:
    """Log-likelihood after gradient ascent with the paper's learning rate."""
    rng = np.random.default_rng(0)
    base = scipy.special.logit(values.mean())
    a, b = np.zeros((len(values), 1)), np.zeros(values.shape[1])
    p, q = rng.normal(0, 0.1, (len(values), rank)), rng.normal(0, 0.1, (values.shape[1], rank))
    for _ in range(steps):
        left = values - scipy.special.expit(base + a + b + p @ q.T)
        a, b, p, q = (
            a + rate * (left.sum(axis=1, keepdims=True) - BIAS_PRECISION * a),
            b + rate * (left.sum(axis=0) - BIAS_PRECISION * b),
            p + rate * (left @ q - precision * p),
            q + rate * (left.T @ p - precision * q),
        )
    logits = base + a + b + p @ q.T
    return float((values * logits - np.logaddexp(0, logits)).sum())


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot error against probes and time against size."""
    figure = figure_of(11, 3.6)
    panels = figure.subplots(1, 3)
    for panel, domain in zip(panels, DOMAINS, strict=False):
        own = [r for r in rows if r["part"] == "curve" and r["domain"] == domain]
        for name, kind in dict.fromkeys((r["method"], r["probes"]) for r in own):
            line = [r for r in own if (r["method"], r["probes"]) == (name, kind)]
            label = f"{name}, chosen probes" if kind == "chosen" else name
            panel.plot([r["k"] for r in line], [r["rmse"] for r in line], marker="o", markersize=3, label=label)
        papers = {r["method"]: r for r in rows if r["part"] == "quality" and r["domain"] == domain}
        best = min(r["rmse"] for name, r in papers.items() if name.startswith("paper"))
        panel.plot([30], [best], marker="*", markersize=11, linestyle="none", color="black", label="paper's best")
        panel.set(title=f"New tasks {domain}", xlabel="probes", ylabel="RMSE, nats per token", xscale="log")
        panel.set_xticks(CURVE, [str(k) for k in CURVE])
        panel.minorticks_off()
    panels[1].legend(fontsize=8)
    sizes = [r for r in rows if r["part"] == "scaling" and r["tasks"] == 85]
    for key, label in (("fit_seconds", "fit"), ("forecast_seconds", "forecast with intervals")):
        panels[2].loglog([r["examples"] for r in sizes], [r[key] for r in sizes], marker="o", markersize=3, label=label)
    panels[2].set(title="Time, 85 known tasks", xlabel="examples", ylabel="seconds")
    panels[2].legend(fontsize=8)
    save_figure(figure, path)


def _fit(matrix: ForgettingMatrix) -> Bayesian:
    return Bayesian().fit(matrix)


def _forecast(model: Bayesian, at: np.ndarray, observed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return model.predict(at, observed).interval(0.9)


def _median(call: Callable[[], Any], rounds: int = 9) -> float:
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return float(np.median(times))


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the figures have to hold up to."""
    found = []
    quality_of = {(r["domain"], r["method"], r["probes"]): r for r in rows if r["part"] == "quality"}
    for (domain, kind), bound in MUST.items():
        value = quality_of[domain, "Bayesian", kind]["ratio_to_papers_best"]
        found.append(target(f"error, {kind} probes, {domain}", value, bound))
    for domain, (low, high) in {"in domain": (0.87, 0.93), "out of domain": (0.80, 1.0)}.items():
        value = quality_of[domain, "Bayesian", "30 random"]["coverage_90"]
        holds = low <= value <= high
        found.append({"name": f"coverage of 90 % intervals, {domain}", "value": value, "bound": low, "holds": holds})
    for r in (r for r in rows if r["part"] == "settings"):
        bound = FOUR[r["setting"]][KINDS.index(r["probes"])]
        found.append(target(f"error, {r['probes']} probes, {r['setting']}", r["ratio_to_papers_best"], bound))
    paper = quality_of["in domain", "paper: svd", "30 random"]["seconds_per_task"]
    speed = paper / quality_of["in domain", "Bayesian", "30 random"]["seconds_per_task"]
    found.append(target("times faster per new task than the paper's MF (svd)", speed, 10_000, least=True))
    largest = max(
        (r for r in rows if r["part"] == "scaling" and r["examples"] < 10**6), key=lambda r: r["tasks"] * r["examples"]
    )
    for name, key, bound in (
        ("fit / Gram product", "fit_to_gram", 5),
        ("forecast / product", "forecast_to_product", 3),
    ):
        size = f"{largest['tasks']} x {largest['examples']}"
        found.append(target(f"{name}, {size}", largest[key], bound))
    ours, whole, theirs = (r for r in rows if r["part"] == "logistic")
    for name, r in (("factors", ours), ("whole fit", whole)):
        value = theirs["seconds"] / r["seconds"]
        name = f"times faster than {theirs['method']}, {name} of LogisticMF"
        found.append(target(name, value, 50, least=True))
    value = ours["log_likelihood"] - theirs["log_likelihood"]
    name = f"log-likelihood per entry above that of {theirs['method']}"
    found.append(target(name, value, 0, least=True))
    return found


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one split, three new tasks a domain")
    parser.add_argument("--refit", action="store_true", help="run the paper's algorithms on every split and task")
    parser.add_argument("--plot", type=Path, help="figure to draw, such as docs/explanation/completion.svg")
    parser.add_argument("--json", type=Path, help="file for all figures")
    arguments = parser.parse_args()
    console = output()
    folder = Path(os.environ.get("FORGETCAST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    file = folder / "olmo-7b-dolma.json"
    if not file.is_file():
        parser.error(f"{file} is not here; set FORGETCAST_DATA to the folder with the reference data")
    values = ForgettingMatrix.load(file).values.astype(np.float64)

    kept = folder / "olmo-7b-reference.json"
    refit_all = arguments.quick or arguments.refit or not kept.is_file()
    reference = None if refit_all else json.loads(kept.read_text())["settings"]
    rows = quality(values, 1 if arguments.quick else 10, TIMED if arguments.quick else None, reference, console)
    sizes = (
        [(46, 1_000), (85, 20_000)]
        if arguments.quick
        else [(46, 1_000), (85, 1_000), (85, 20_000), (85, 141_871), (85, 1_000_000)]
    )
    rows += four_settings(folder, console)
    rows += scaling(sizes)
    rows += logistic(200 if arguments.quick else 5_000)
    if arguments.plot:
        rows += curves(values, 1 if arguments.quick else 10)
        draw(rows, arguments.plot)
    table = Table(
        "domain", "method", "probes", "RMSE", "to paper's best", "in 90 %", "s per task", title="Quality and time"
    )
    for r in rows:
        if r["part"] == "quality":
            covered = "" if np.isnan(r["coverage_90"]) else f"{r['coverage_90']:.1%}"
            figures = [f"{r['rmse']:.4f}", f"{r['ratio_to_papers_best']:.3f}", covered, f"{r['seconds_per_task']:.2g}"]
            table.add_row(r["domain"], r["method"], r["probes"], *figures)
    console.print(table)
    table = Table("setting", "probes", "RMSE", "to paper's best", "in 90 %", title="Bayesian in four settings")
    for r in rows:
        if r["part"] == "settings":
            figures = [f"{r['rmse']:.4f}", f"{r['ratio_to_papers_best']:.3f}", f"{r['coverage_90']:.1%}"]
            table.add_row(r["setting"], r["probes"], *figures)
    console.print(table)
    table = Table("size", "fit, s", "fit / Gram", "forecast, ms", "forecast / product", title="Scaling (Bayesian)")
    for r in rows:
        if r["part"] == "scaling":
            figures = [f"{r['fit_seconds']:.3f}", f"{r['fit_to_gram']:.1f}", f"{1e3 * r['forecast_seconds']:.2f}"]
            table.add_row(f"{r['tasks']} x {r['examples']}", *figures, f"{r['forecast_to_product']:.1f}")
    console.print(table)
    table = Table("fit of 142 x 4,764 zeros and ones", "s", "log-likelihood per entry", title="Binary forgetting")
    for r in rows:
        if r["part"] == "logistic":
            table.add_row(r["method"], f"{r['seconds']:.2f}", f"{r['log_likelihood']:.6f}")
    console.print(table)
    conclude(console, rows, targets(rows), arguments.json, "scipy", "scikit-surprise")


if __name__ == "__main__":
    main()
