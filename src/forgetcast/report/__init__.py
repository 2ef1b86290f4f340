"""The report: one HTML file that needs no network and can be read by someone who has not read the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

import forgetcast
from forgetcast._files import atomic_path
from forgetcast.atlas import Atlas
from forgetcast.completion.base import MISFIT_THRESHOLD
from forgetcast.errors import DataError, MissingExtraError
from forgetcast.evaluation import ForecastErrors, average, judge, worst_tenth
from forgetcast.forecast import TaskForecast
from forgetcast.matrix import ForgettingMatrix
from forgetcast.sequence_result import METRIC_NAMES as SEQUENCE_METRIC_NAMES
from forgetcast.sequence_result import SequenceResult
from forgetcast.strategies import STRATEGIES
from forgetcast.structure import Structure, analyze
from forgetcast.verification import METRIC_NAMES, Verification

try:
    import jinja2
    import plotly.offline

    from forgetcast.report import figures
except ImportError as error:
    raise MissingExtraError("report", error) from error

__all__ = ["write_report"]

AT_RISK = 10
"""Examples that are listed with their text, for each forecast."""

LONGEST_TEXT = 2_000


def write_report(
    path: str | Path,
    atlas: Atlas,
    *,
    forecasts: Sequence[TaskForecast] = (),
    accuracies: Mapping[str, Mapping[str, ForecastErrors]] | None = None,
    verification: Verification | None = None,
    sequence: SequenceResult | None = None,
    title: str = "What fine-tuning makes the model forget",
) -> None:
    """Write the report as one HTML file.

    Parameters
    ----------
    path : path
    atlas : Atlas
        With at least one task.
    forecasts : sequence of TaskForecast
        Where the atlas has the row of a forecast's task, the two are compared.
    accuracies : mapping of task to mapping of method to ForecastErrors, optional
        Errors of several methods. Default: those of the forecasts whose tasks the atlas has measured.
    verification : Verification, optional
    sequence : SequenceResult, optional
    title : str

    Raises
    ------
    DataError
        If the atlas has no measurements.
    MismatchError
        If a forecast is of another pool.
    """
    matrix = atlas.matrix()
    if not matrix.observed.any():
        raise DataError(f"{atlas.path} has no measurements to report")
    for forecast in forecasts:
        forecast.check_pool(atlas.pool)
    truths = [_truth(matrix, forecast) for forecast in forecasts]
    if accuracies is None:
        accuracies = _accuracies(forecasts, truths)
    structure = _structure(matrix)
    means = {name: _mean(row) for name, row in zip(matrix.tasks, matrix.values, strict=True) if _any(row)}
    new = [forecast.task for forecast in forecasts if forecast.task in means]
    comparisons = verification.comparisons() if verification is not None else ()
    rows_of = _averages(accuracies)
    page = _template().render(
        title=title,
        plotlyjs=plotly.offline.get_plotlyjs(),
        atlas=atlas,
        findings=[
            *_findings(matrix, structure, means, forecasts, rows_of, verification),
            *(_sequence_finding(result) for result in (sequence,) if result is not None),
        ],
        by_task=figures.forgetting_by_task(means, [str(name) for name in new]),
        sources=_sources(atlas, matrix),
        heatmap=figures.heatmap(matrix),
        averaged=-(-matrix.shape[1] // figures.MOST_COLUMNS) if matrix.shape[1] > figures.MOST_COLUMNS else 0,
        structure=structure,
        spectrum=figures.spectrum(structure) if structure is not None else "",
        loadings=figures.loadings(structure) if structure is not None else "",
        forecasts=[_shown(forecast, truth) for forecast, truth in zip(forecasts, truths, strict=True)],
        level=forecasts[0].level if forecasts else None,
        any_truth=any(truth is not None for truth in truths),
        accuracy_rows=rows_of + [row for row in _by_task(accuracies) if len(accuracies) > 1],
        accuracy_caption="Errors on examples that were not probed",
        risks=_risks(atlas, matrix, forecasts, truths),
        verification=verification,
        comparisons=comparisons,
        metric_names={name: METRIC_NAMES[name] for name in verification.metrics} if verification is not None else {},
        strategies=_strategies(verification) if verification is not None else {},
        runs_per_arm=len(verification.runs) // len(verification.arms) if verification is not None else 0,
        differences=figures.replay_differences(verification) if verification is not None and comparisons else "",
        sequence=sequence,
        sequence_comparisons=sequence.comparisons() if sequence is not None else (),
        sequence_metric_names=SEQUENCE_METRIC_NAMES,
        orders=len(sequence.orders(sequence.arms[0])) if sequence is not None else 0,
        on_the_way=figures.forgetting_on_the_way(sequence) if sequence is not None else "",
        provenance=_provenance(atlas),
        tasks=_tasks(atlas, matrix),
    )
    with atomic_path(Path(path)) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _strategies(verification: Verification) -> dict[str, str]:
    """What each arm replays, where its name begins with that of a strategy."""
    named = {arm: arm.partition(" ") for arm in verification.arms}
    return {
        arm: STRATEGIES[name].text + (", made anew during training" if more == "online" else "")
        for arm, (name, _, more) in named.items()
        if name in STRATEGIES
    }


def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(files("forgetcast.report").joinpath("template.html").read_text(encoding="utf-8"))


def _any(values: np.ndarray) -> bool:
    return bool((~np.isnan(values)).any())


def _mean(values: np.ndarray) -> float:
    """Mean of what is measured, which is at least one entry."""
    return float(np.nanmean(values.astype(np.float64)))


def _truth(matrix: ForgettingMatrix, forecast: TaskForecast) -> np.ndarray | None:
    """Measured row of the forecast's task in the forecast's order, if it says more than the probes do."""
    if forecast.task is None or forecast.task not in matrix.tasks:
        return None
    row = matrix.select([forecast.task], forecast.ids).values[0].astype(np.float64)
    return row if (~np.isnan(row[~forecast.probed])).sum() >= 2 else None


def _structure(matrix: ForgettingMatrix) -> Structure | None:
    """Analyse the matrix; None where there is too little in it to have a structure."""
    try:
        return analyze(matrix) if len(matrix.tasks) > 1 else None
    except DataError:
        return None


def _accuracies(
    forecasts: Sequence[TaskForecast], truths: Sequence[np.ndarray | None]
) -> dict[str, dict[str, ForecastErrors]]:
    found: dict[str, dict[str, ForecastErrors]] = {}
    for forecast, truth in zip(forecasts, truths, strict=True):
        if truth is not None:
            others = ~forecast.probed
            parts = (forecast.mean, forecast.lower, forecast.upper, truth)
            found.setdefault(str(forecast.task), {})[forecast.method] = judge(*(part[others] for part in parts))
    return found


def _averages(accuracies: Mapping[str, Mapping[str, ForecastErrors]]) -> list[dict[str, Any]]:
    """One row a method: its figures averaged over the tasks that it forecast."""
    rows = []
    for method in dict.fromkeys(method for by_method in accuracies.values() for method in by_method):
        found = [by_method[method] for by_method in accuracies.values() if method in by_method]
        name = next(iter(accuracies)) if len(accuracies) == 1 else f"mean of {len(found)}"
        rows.append({"task": name, "method": method} | asdict(average(found)))
    return rows


def _by_task(accuracies: Mapping[str, Mapping[str, ForecastErrors]]) -> list[dict[str, Any]]:
    return [
        {"task": task, "method": method} | asdict(figures_of)
        for task, by_method in accuracies.items()
        for method, figures_of in by_method.items()
    ]


def _findings(
    matrix: ForgettingMatrix,
    structure: Structure | None,
    means: Mapping[str, float],
    forecasts: Sequence[TaskForecast],
    averages: Sequence[Mapping[str, Any]],
    verification: Verification | None,
) -> list[str]:
    most, least = max(means, key=lambda name: means[name]), min(means, key=lambda name: means[name])
    found = [
        f"On average a fine-tune costs {np.mean(list(means.values())):.3f} nats per token on the upstream examples: "
        f"the most after {most} ({means[most]:.3f}), the least after {least} ({means[least]:.3f}). "
        f"The worst tenth of all measurements averages {worst_tenth(matrix.values[matrix.observed]):.3f}."
    ]
    if structure is not None:
        ranks = " / ".join(f"{r2:.2f}" for r2 in structure.rank_r2[:3])
        names = " / ".join(str(i + 1) for i in range(len(structure.rank_r2[:3])))
        found.append(
            f"Which examples are forgotten after which task is {_regular(structure.rank_r2[:3][-1])}: matrices of rank "
            f"{names} explain {ranks} of the variation (R²; task mean plus example mean: {structure.additive_r2:.2f})."
        )
    if averages and forecasts:
        errors = ", ".join(f"{row['method']} {row['rmse']:.3f}" for row in averages)
        found.append(
            f"From {forecasts[0].probed.sum()} measured examples, the others are forecast with a root mean squared "
            f"error of {errors} nats per token; {averages[0]['coverage']:.0%} of the truths are in the interval that "
            f"should hold {forecasts[0].level:.0%}."
        )
    elif forecasts:
        worst = max(forecasts, key=lambda forecast: float(forecast.mean.mean()))
        found.append(
            f"Forecast for {worst.task or 'the new task'}: {worst.mean.mean():.3f} nats per token on average, "
            f"{worst_tenth(worst.mean):.3f} on the worst tenth."
        )
    if verification is not None:
        figures_of = ", ".join(f"{arm} {verification.average(arm, 'mean'):.3f}" for arm in verification.arms)
        line = f"Held-out forgetting by replay strategy: {figures_of} nats per token."
        arms = [arm for arm in verification.arms if arm not in ("none", "random")]
        shown = [verification.compare(arm, "random", metric) for arm in arms for metric in ("mean", "worst_tenth")]
        verdicts = [f" On the {METRIC_NAMES[c.metric]}, {c.verdict()}." for c in shown if c is not None]
        found.append(line + "".join(verdicts))
    return found


def _sequence_finding(sequence: SequenceResult) -> str:
    upstream = ", ".join(f"{arm} {sequence.average(arm, 'mean'):.3f}" for arm in sequence.arms)
    earlier = ", ".join(f"{arm} {sequence.average(arm, 'earlier_tasks'):.3f}" for arm in sequence.arms)
    shown = [sequence.compare(arm, "random", "mean") for arm in sequence.arms if arm not in ("none", "random")]
    verdicts = [f" On the {SEQUENCE_METRIC_NAMES[c.metric]}, {c.verdict()}." for c in shown if c is not None]
    return (
        f"After {sequence.length} tasks one after another, held-out forgetting by replay strategy is {upstream} nats "
        f"per token, and that of the earlier tasks {earlier}."
    ) + "".join(verdicts)


def _regular(r2: float) -> str:
    return "very regular" if r2 >= 0.9 else "regular" if r2 >= 0.6 else "partly regular" if r2 >= 0.3 else "irregular"


def _sources(atlas: Atlas, matrix: ForgettingMatrix) -> list[dict[str, Any]]:
    labels = np.array(matrix.sources)
    rows = []
    for source in sorted(set(matrix.sources)):
        values, before = matrix.values[:, labels == source], atlas.nll_before[labels == source]
        rows.append(
            {
                "name": source or "(no source)",
                "examples": int((labels == source).sum()),
                "before": _mean(before) if _any(before) else None,
                "forgetting": _mean(values) if _any(values) else None,
                "worst": worst_tenth(values[~np.isnan(values)]) if _any(values) else None,
            }
        )
    return rows


def _shown(forecast: TaskForecast, truth: np.ndarray | None) -> dict[str, str]:
    figure = figures.forecast_alone(forecast) if truth is None else figures.forecast_and_truth(forecast, truth)
    if not forecast.probed.any():
        misfit = "Nothing was measured for this task yet: this is what the atlas expects of any task."
    elif forecast.misfit < MISFIT_THRESHOLD:
        misfit = (
            f"The {int(forecast.probed.sum())} probes say that this task is unlike those in the atlas "
            f"(p = {forecast.misfit:.3f}): trust the forecast less, and measure more of the examples."
        )
    else:
        misfit = (
            f"Nothing in the {int(forecast.probed.sum())} probes says that this task is unlike those in the atlas "
            f"(p = {forecast.misfit:.2f})."
        )
    return {"name": forecast.task or "the new task", "figure": figure, "misfit": misfit}


def _risks(
    atlas: Atlas, matrix: ForgettingMatrix, forecasts: Sequence[TaskForecast], truths: Sequence[np.ndarray | None]
) -> list[dict[str, Any]]:
    """For each forecast the examples with the highest one; without forecasts, those forgotten most so far."""
    if not forecasts:
        means = figures.mean_of_measured(matrix.values, axis=0)
        worst = np.argsort(-np.nan_to_num(means, nan=-np.inf), kind="stable")[:AT_RISK]
        rows = [_example(atlas, atlas.pool.ids[i]) | {"truth": means[i]} for i in worst]
        return [{"name": "Mean over the atlas's tasks", "forecast": False, "truth": True, "rows": rows}]
    groups = []
    for forecast, truth in zip(forecasts, truths, strict=True):
        worst = np.argsort(-forecast.mean, kind="stable")[:AT_RISK]
        rows = [
            _example(atlas, forecast.ids[i])
            | {name: getattr(forecast, name)[i] for name in ("mean", "lower", "upper", "probed")}
            | {"truth": truth[i] if truth is not None else None}
            for i in worst
        ]
        name = forecast.task or "the new task"
        groups.append({"name": name, "forecast": True, "truth": truth is not None, "rows": rows})
    return groups


def _example(atlas: Atlas, id_: str) -> dict[str, Any]:
    example = atlas.pool[int(atlas.pool.positions([id_])[0])]
    text = example.full_text
    cut = text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " …"
    return {"id": id_, "source": example.source or "", "text": cut}


def _provenance(atlas: Atlas) -> dict[str, str]:
    recipe = ", ".join(f"{name} {value}" for name, value in atlas.recipe.items() if value is not None)
    return {
        "atlas": str(atlas.path),
        "base model": atlas.model,
        "weights (SHA-256)": atlas.model_hash or "not known",
        "pool fingerprint": atlas.pool.fingerprint,
        "recipe": recipe or "not kept",
        "begun": atlas.created,
        "written with": f"forgetcast {forgetcast.__version__}",
    }


def _tasks(atlas: Atlas, matrix: ForgettingMatrix) -> list[dict[str, Any]]:
    rows = []
    for name, values in zip(matrix.tasks, matrix.values, strict=True):
        kept = atlas.provenance(name)
        rows.append(
            {
                "name": name,
                "added": kept["added"],
                "measured": float((~np.isnan(values)).mean()),
                "mean": _mean(values) if _any(values) else None,
                "model_hash": (kept["model_hash"] or "")[:12],
            }
        )
    return rows
