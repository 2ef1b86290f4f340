"""Run the demo: the complete workflow on the shipped base model, measured on the user's machine."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from forgetcast.completion import Additive, Bayesian, Forecast, LinearGaussian, Mean, probes
from forgetcast.completion.forecast import TaskForecast
from forgetcast.completion.structure import analyze
from forgetcast.data.pool import Pool, load_task
from forgetcast.data.recipe import Recipe
from forgetcast.demo.corpus import demo_pool
from forgetcast.errors import MismatchError
from forgetcast.evaluation import ForecastErrors, accuracy, average
from forgetcast.experiments.collect import collect, collection_work, prepare_atlas
from forgetcast.experiments.meter import Meter, Work, scoring_work, tuning_work
from forgetcast.experiments.procedural import KNOWN_TASKS, NEW_TASKS, procedural_task
from forgetcast.experiments.verify import ReplayComparison, arms, verify
from forgetcast.files import read_json, write_json
from forgetcast.progress import OnProgress
from forgetcast.replay.plan import make_plan
from forgetcast.replay.signals import Signals


class DemoSettings(BaseModel):
    """Size of a demo. An unknown key is an error.

    Attributes
    ----------
    known, new : int
        Number of tasks that the forecast is fitted to, and of new tasks that it is judged on.
    examples : int
        Number of upstream examples; half of them are held out.
    task_size, test_size : int
        Number of training questions of a task, and of questions for the new-task loss.
    steps, batch_size, learning_rate :
        The recipe: full fine-tuning.
    probes : int
    ratio : float
        Replayed examples per new one.
    seeds : int
        Fine-tunes per task and arm.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    known: int = Field(default=12, ge=2, le=len(KNOWN_TASKS))
    new: int = Field(default=4, ge=1, le=len(NEW_TASKS))
    examples: int = Field(default=600, ge=2)
    task_size: int = Field(default=400, ge=1)
    test_size: int = Field(default=64, ge=1)
    steps: int = Field(default=40, ge=1)
    batch_size: int = Field(default=8, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    probes: int = Field(default=10, ge=1)
    ratio: float = Field(default=0.2, gt=0)
    seeds: int = Field(default=2, ge=1)


STANDARD = DemoSettings()
FULL = DemoSettings(known=len(KNOWN_TASKS))
HELD_OUT = 0.5


def run_demo(
    directory: Path, settings: DemoSettings = STANDARD, *, on_progress: OnProgress | None = None
) -> dict[str, Any]:
    """Run the demo, or resume an interrupted one.

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
    from forgetcast.lm import FineTuner, load
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
    tuner = FineTuner(base)
    # The later stages are counted from the start, so that the remaining time is that of the complete demo.
    meter, context = Meter.of(on_progress), base.context
    replays = sum((_replay_work(settings, recipe, tasks[name], pool, context) for name in new), Work())
    meter.later = collection_work(tasks.values(), pool, recipe, context) + replays
    atlas = prepare_atlas(
        directory / "demo.atlas",
        base,
        pool,
        recipe,
        on_progress=meter,
    )
    meter.later = replays
    collect(tuner, atlas, recipe, tasks, on_progress=meter)
    meter.later = Work()

    held_out = pool.hold_out(HELD_OUT)
    judged = pool.positions(held_out)
    past = atlas.matrix([name for name in atlas.tasks if name not in new])
    models: dict[str, LinearGaussian] = {"forecast": Bayesian(), "additive": Additive(), "column mean": Mean()}
    for model in models.values():
        model.fit(past)
    probed = probes.choose(models["forecast"], settings.probes, np.setdiff1d(np.arange(len(pool)), judged))
    pool.subset(pool.ids[i] for i in probed).save(directory / "probes.jsonl")

    forecasts, accuracies, comparisons = [], {}, []
    for name in new:
        truth = atlas.matrix([name]).values[0]
        rows = {method: model.predict(probed, truth[probed]) for method, model in models.items()}
        accuracies[name] = {method: accuracy(row, truth, judged) for method, row in rows.items()}
        forecasts.append(_save_forecast(directory, rows["forecast"], pool, name))
        signals = Signals(pool.ids, forecast=rows["forecast"].mean)
        plan = make_plan(pool, "top", signals, ratio=settings.ratio, held_out=held_out)
        plan.save(directory / "plans" / f"{name}.parquet")
        comparisons.append(ReplayComparison(name, tasks[name], tests[name], arms([plan], pool)))

    verification = verify(
        tuner,
        atlas,
        recipe,
        comparisons,
        seeds=range(settings.seeds),
        directory=directory / "runs",
        on_progress=meter,
    )
    structure = analyze(atlas.matrix())
    summary = {
        "settings": settings.model_dump(),
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
    """Return pool, tasks and their test questions, generated by the first run and read by later ones.

    A resumed demo thus has the same text, even if the installation has changed.
    """
    recorded = directory / "settings.json"
    if recorded.exists():
        if read_json(recorded) != settings.model_dump():
            raise MismatchError(f"{directory} holds a demo with other settings; remove it, or choose another directory")
    else:
        write_json(recorded, settings.model_dump())
    if not (directory / "pool.jsonl").exists():
        demo_pool(settings.examples).save(directory / "pool.jsonl")
    tasks: dict[str, Pool] = {}
    tests: dict[str, Pool] = {}
    for name in (*KNOWN_TASKS[: settings.known], *NEW_TASKS[: settings.new]):
        for folder, loaded, size, seed in (
            ("tasks", tasks, settings.task_size, 0),
            ("tests", tests, settings.test_size, 1),
        ):
            file = directory / folder / f"{name}.jsonl"
            if not file.exists():
                procedural_task(name, size, seed=seed).save(file)
            loaded[name] = load_task(file)
    return Pool.load(directory / "pool.jsonl"), tasks, tests


def _save_forecast(directory: Path, row: Forecast, pool: Pool, name: str) -> TaskForecast:
    forecast = TaskForecast.from_forecast(row, pool, method="bayesian", task=name)
    forecast.save(directory / "forecasts" / f"{name}.parquet")
    return forecast


def _replay_work(settings: DemoSettings, recipe: Recipe, task: Pool, pool: Pool, context: int) -> Work:
    """Return the work of a task's replay runs; the arm without replay has a little less."""
    replayed = round(settings.steps * settings.ratio) * settings.batch_size
    each = tuning_work(task, recipe, context, pool=pool, replayed=replayed)
    each += scoring_work(pool, context) * (settings.examples // 2 / len(pool))
    return each * (3 * settings.seeds)


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
