"""The demo: the whole path on the shipped base model, every stage measured on the user's own machine."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np

from forgetcast import probes
from forgetcast._files import read_json, write_json
from forgetcast.collect import OnProgress, collect
from forgetcast.completion import Additive, Bayesian, Forecast, LinearGaussian, Mean
from forgetcast.demo.corpus import demo_pool
from forgetcast.demo.tasks import KNOWN_TASKS, NEW_TASKS, demo_task
from forgetcast.errors import MismatchError
from forgetcast.evaluation import ForecastErrors, accuracy, average
from forgetcast.forecast import TaskForecast
from forgetcast.pool import Pool, load_task
from forgetcast.replay import make_plan
from forgetcast.structure import analyze
from forgetcast.verification import Trial, arms, verify


@dataclass(frozen=True)
class DemoSettings:
    """Size of a demo.

    Attributes
    ----------
    known, new : int
        Tasks in the atlas that the forecast learns from, and tasks that it has not seen.
    examples : int
        Upstream examples; half of them are held out.
    task_size, test_size : int
        Questions of a task that are trained on, and on which only the loss is judged.
    steps, batch_size, learning_rate :
        The recipe: full fine-tuning.
    probes : int
    ratio : float
        Replayed examples per new one.
    seeds : int
        Fine-tunes per task and replay arm.
    """

    known: int = 12
    new: int = 4
    examples: int = 600
    task_size: int = 400
    test_size: int = 64
    steps: int = 40
    batch_size: int = 8
    learning_rate: float = 1e-3
    probes: int = 10
    ratio: float = 0.2
    seeds: int = 2


STANDARD = DemoSettings()
FULL = DemoSettings(known=len(KNOWN_TASKS))
HELD_OUT = 0.5


def run_demo(
    directory: Path, settings: DemoSettings = STANDARD, *, on_progress: OnProgress | None = None
) -> dict[str, Any]:
    """Run the demo, or go on with one that was interrupted.

    Writes into `directory`: pool.jsonl, tasks/, demo.atlas, probes.jsonl, forecasts/, plans/, runs/, summary.json and
    report.html.

    Returns
    -------
    dict
        The content of summary.json.

    Raises
    ------
    MismatchError
        If `directory` holds a demo with other settings.
    """
    from forgetcast.lm import Recipe, Workbench, load
    from forgetcast.report import write_report

    started = time.monotonic()
    pool, tasks, tests = _data(directory, settings)
    recipe = Recipe(
        method="full",
        steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        max_length=128,
    )
    with as_file(files("forgetcast.demo") / "model") as model_directory:
        base = replace(load(model_directory), name="the demo model")
    new = NEW_TASKS[: settings.new]
    # The replay stage is counted in from the start, so that the time left is the whole demo's.
    meter = _TwoStages(on_progress, len(new) * settings.seeds * 3 * _units(settings))
    atlas = collect(base, pool, tasks, directory / "demo.atlas", recipe, on_progress=meter.first)

    held_out = pool.hold_out(HELD_OUT)
    judged = pool.positions(held_out)
    known = atlas.matrix([name for name in atlas.tasks if name not in new])
    models: dict[str, LinearGaussian] = {"forecast": Bayesian(), "additive": Additive(), "column mean": Mean()}
    for model in models.values():
        model.fit(known)
    chosen = probes.choose(models["forecast"], settings.probes, np.setdiff1d(np.arange(len(pool)), judged))
    pool.subset(pool.ids[i] for i in chosen).save(directory / "probes.jsonl")

    forecasts, accuracies, trials = [], {}, []
    for name in new:
        truth = atlas.matrix([name]).values[0]
        rows = {method: model.predict(chosen, truth[chosen]) for method, model in models.items()}
        accuracies[name] = {method: accuracy(row, truth, judged) for method, row in rows.items()}
        forecasts.append(_keep(directory, rows["forecast"], pool, name))
        plan = make_plan(pool, "top", settings.ratio, held_out=held_out, forecast=rows["forecast"].mean)
        plan.save(directory / "plans" / f"{name}.parquet")
        trials.append(Trial(name, tasks[name], tests[name], arms([plan], pool)))

    verification = verify(
        Workbench(base),
        trials,
        pool,
        atlas.before,
        recipe,
        seeds=range(settings.seeds),
        directory=directory / "runs",
        on_progress=meter.second,
    )
    structure = analyze(atlas.matrix())
    summary = {
        "settings": asdict(settings),
        "examples": {"pool": len(pool), "judged": len(judged), "by_source": _count(pool.sources)},
        "base_loss": float(np.mean(atlas.before.nll)),
        "forgetting": {
            "mean": float(np.mean(list(structure.mean_by_task.values()))),
            "by_task": structure.mean_by_task,
        },
        "structure": structure.as_dict(),
        "forecast": _forecast_summary(accuracies, forecasts),
        "replay": verification.as_dict(),
        "seconds": round(time.monotonic() - started, 1),
        "files": {"report": str(directory / "report.html"), "atlas": str(atlas.path)},
    }
    write_json(directory / "summary.json", summary)
    write_report(
        directory / "report.html",
        atlas,
        forecasts=forecasts,
        accuracies=accuracies,
        verification=verification,
        title="forgetcast demo",
    )
    return summary


def _data(directory: Path, settings: DemoSettings) -> tuple[Pool, dict[str, Pool], dict[str, Pool]]:
    """Pool, tasks and their test questions: made at the first run, read at the next, so that a resumed demo goes on
    with the text it began with even if the installation has changed since.
    """
    recorded = directory / "settings.json"
    if recorded.exists():
        if read_json(recorded) != asdict(settings):
            raise MismatchError(f"{directory} holds a demo with other settings; remove it, or choose another directory")
    else:
        write_json(recorded, asdict(settings))
    if not (directory / "pool.jsonl").exists():
        demo_pool(settings.examples).save(directory / "pool.jsonl")
    tasks: dict[str, Pool] = {}
    tests: dict[str, Pool] = {}
    for name in (*KNOWN_TASKS[: settings.known], *NEW_TASKS[: settings.new]):
        for kind, kept, size, seed in (
            ("tasks", tasks, settings.task_size, 0),
            ("tests", tests, settings.test_size, 1),
        ):
            file = directory / kind / f"{name}.jsonl"
            if not file.exists():
                demo_task(name, size, seed=seed).save(file)
            kept[name] = load_task(file)
    return Pool.load(directory / "pool.jsonl"), tasks, tests


def _keep(directory: Path, row: Forecast, pool: Pool, name: str) -> TaskForecast:
    forecast = TaskForecast.from_forecast(row, pool, method="bayesian", task=name)
    forecast.save(directory / "forecasts" / f"{name}.parquet")
    return forecast


def _units(settings: DemoSettings) -> int:
    """Work of one replay run, as `collect` counts it; the arm without replay has a little less."""
    steps = settings.steps + round(settings.steps * settings.ratio)
    return steps * settings.batch_size * 3 + settings.examples // 2 + settings.test_size


class _TwoStages:
    """Shows two stages as one progress."""

    def __init__(self, on_progress: OnProgress | None, later: int) -> None:
        self._on_progress, self._later, self._earlier = on_progress, later, 0

    def first(self, what: str, done: int, total: int) -> None:
        self._earlier = total
        if self._on_progress is not None:
            self._on_progress(what, done, total + self._later)

    def second(self, what: str, done: int, total: int) -> None:
        if self._on_progress is not None:
            self._on_progress(what, self._earlier + done, self._earlier + total)


def _count(sources: tuple[str, ...]) -> dict[str, int]:
    return {source: sources.count(source) for source in dict.fromkeys(sources)}


def _forecast_summary(
    accuracies: Mapping[str, Mapping[str, ForecastErrors]], forecasts: list[TaskForecast]
) -> dict[str, Any]:
    methods = next(iter(accuracies.values()))
    mean = {method: asdict(average(by_method[method] for by_method in accuracies.values())) for method in methods}
    by_task = {
        forecast.task: {method: asdict(figures) for method, figures in accuracies[str(forecast.task)].items()}
        | {"misfit": forecast.misfit}
        for forecast in forecasts
    }
    return {"level": forecasts[0].level, "mean": mean, "by_task": by_task}
