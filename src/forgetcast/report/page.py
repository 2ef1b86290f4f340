"""The report's page: what each section shows, and the findings at its top."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import plotly.offline

import forgetcast
from forgetcast.atlas.matrix import ForgettingMatrix, check_fingerprint
from forgetcast.atlas.store import Atlas
from forgetcast.completion.errors import ProbabilityErrors, judge_probabilities
from forgetcast.completion.forecast import GUARANTEED, MODEL_BASED, UNITS, TaskForecast
from forgetcast.completion.influence import most_influential
from forgetcast.completion.structure import Structure, analyze
from forgetcast.completion.watch import WatchedRun
from forgetcast.errors import DataError
from forgetcast.evaluation import ForecastErrors, average, judge, worst_tenth
from forgetcast.experiments import beside
from forgetcast.experiments.reproduce import Reproduction
from forgetcast.experiments.sequence_result import SequenceResult
from forgetcast.experiments.tradeoff import COSTS
from forgetcast.experiments.verify import Verification
from forgetcast.files import atomic_path
from forgetcast.measure.diff import FEW_TOKENS
from forgetcast.replay.outcome import ANSWERS, METRICS, unit_of
from forgetcast.report import figures
from forgetcast.similarity import SimilarityStudy
from forgetcast.stats import Comparison, supports_part

AT_RISK = 10
"""Number of examples listed with their text, per forecast."""

LONGEST_TEXT = 2_000
"""Characters shown of an example."""

REGULARITY = ((0.9, "very regular"), (0.6, "regular"), (0.3, "partly regular"))
"""Lower limit of the best rank's R² on entries that were held out, and the word for it."""


def write_report(
    path: str | Path,
    atlas: Atlas,
    *,
    forecasts: Sequence[TaskForecast] = (),
    accuracies: Mapping[str, Mapping[str, ForecastErrors]] | None = None,
    verification: Verification | None = None,
    sequence: SequenceResult | None = None,
    similarity: SimilarityStudy | None = None,
    reproduction: Reproduction | None = None,
    watched: Sequence[WatchedRun] = (),
    title: str = "What fine-tuning makes the model forget",
) -> None:
    """Write the report as one HTML file.

    Parameters
    ----------
    path : path
    atlas : Atlas
        With at least one task.
    forecasts : sequence of TaskForecast
        Of the loss, or of exact match. Compared with the row of the forecast's task where the atlas has it.
    accuracies : mapping of task to mapping of method to ForecastErrors, optional
        Errors of several methods. Default: those of the forecasts whose tasks the atlas has measured.
    verification : Verification, optional
    sequence : SequenceResult, optional
    similarity : SimilarityStudy, optional
    reproduction : Reproduction, optional
    watched : sequence of WatchedRun
        Fine-tunes that were watched while they ran.
    title : str

    Raises
    ------
    DataError
        If the atlas has no measurements, or no answers and a forecast is of exact match.
    MismatchError
        If a forecast, or what completed the looks at a fine-tune, belongs to another pool.
    """
    matrix = atlas.matrix()
    if not matrix.observed.any():
        raise DataError(f"{atlas.path} has no measurements to report")
    for forecast in forecasts:
        forecast.check_pool(atlas.pool)
    for run in watched:
        if run.atlas is not None:
            check_fingerprint(f"the watched run {run.name!r}", run.pool, atlas.pool)
    sources = dict(zip(matrix.examples, matrix.sources, strict=True))
    by_answers = any(forecast.measure == "exact_match" for forecast in forecasts)
    flips = atlas.matrix(measure="exact_match") if by_answers else matrix
    judged = [(each, _truth(matrix if each.measure == "loss" else flips, each)) for each in forecasts]
    of_loss = [(forecast, truth) for forecast, truth in judged if forecast.measure == "loss"]
    answers = [_answers(*each, sources) for each in judged if each[0].measure == "exact_match"]
    if accuracies is None:
        accuracies = _accuracies(of_loss)
    averages = _averages(accuracies)
    structure = _analyze(matrix, atlas.before.tokens)
    means = {
        name: mean for name, row in zip(matrix.tasks, matrix.values, strict=True) if (mean := _mean(row)) is not None
    }
    findings = (
        _measured_finding(matrix, means, structure),
        _structure_finding(structure) if structure is not None else None,
        _forecast_finding([forecast for forecast, _ in of_loss], averages) if of_loss else None,
        *(_answers_finding(each) for each in answers),
        _replay_finding(verification) if verification is not None else None,
        _sequence_finding(sequence) if sequence is not None else None,
    )
    page = _template().render(
        title=title,
        plotlyjs=plotly.offline.get_plotlyjs(),
        atlas=atlas,
        findings=[finding for finding in findings if finding is not None],
        measured=_measured(atlas, matrix, means, forecasts) | _of_tokens(structure),
        matrix=_matrix(matrix),
        structure=_structure(structure) if structure is not None else None,
        forecast=_forecast(of_loss, accuracies, averages, sources) if of_loss else None,
        answers=answers,
        risks=_risks(atlas, matrix, judged),
        replay=_replay(verification) if verification is not None else None,
        sequence=_sequence(sequence) if sequence is not None else None,
        similarity=similarity,
        reproduction=_reproduction(reproduction, alone=False) if reproduction is not None else "",
        watched=[{"run": run, "figure": figures.watched_run(run)} for run in watched],
        provenance=_provenance(atlas, matrix),
    )
    with atomic_path(Path(path)) as temporary:
        temporary.write_text(page, encoding="utf-8")


def write_reproduction(path: str | Path, reproduction: Reproduction) -> None:
    """Write a reproduction as one HTML page, which needs no network and has no scripts."""
    with atomic_path(Path(path)) as temporary:
        temporary.write_text(_reproduction(reproduction, alone=True), encoding="utf-8")


def _reproduction(found: Reproduction, *, alone: bool) -> str:
    """Render a reproduction as a section, or as a page with nothing else."""
    parts = {"title": beside.title(found), "summary": beside.summary(found), "sections": list(beside.sections(found))}
    return _template("reproduction.html").render(parts, alone=alone).lstrip()


def _template(name: str = "template.html") -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(files("forgetcast.report").joinpath(name).read_text(encoding="utf-8"))


def _mean(values: np.ndarray) -> float | None:
    """Mean of the observed entries; None if there are none."""
    return float(np.nanmean(values.astype(np.float64))) if (~np.isnan(values)).any() else None


# What was measured


def _measured_finding(matrix: ForgettingMatrix, means: Mapping[str, float], structure: Structure | None) -> str:
    weighted, mean = None if structure is None else structure.mean_per_token, float(np.mean(list(means.values())))
    sign, verb = (1, "costs") if mean >= 0 else (-1, "lowers the loss by")
    by_token = "" if weighted is None else f" ({sign * weighted:.3f} with examples weighted by their target tokens)"
    most, least = max(means, key=lambda name: means[name]), min(means, key=lambda name: means[name])
    return (
        f"On average a fine-tune {verb} {sign * mean:.3f} nats per token on the upstream examples{by_token}. "
        f"Forgetting is highest after {most} ({means[most]:.3f}), lowest after {least} ({means[least]:.3f}). "
        f"The worst tenth of all measurements averages {worst_tenth(matrix.values[matrix.observed]):.3f}."
    )


def _measured(
    atlas: Atlas, matrix: ForgettingMatrix, means: Mapping[str, float], forecasts: Sequence[TaskForecast]
) -> dict[str, Any]:
    new = [forecast.task for forecast in forecasts if forecast.task is not None and forecast.task in means]
    labels = np.array(matrix.sources)
    sources = []
    for source in sorted(set(matrix.sources)):
        values, before = matrix.values[:, labels == source], atlas.nll_before[labels == source]
        forgetting = _mean(values)
        sources.append(
            {
                "name": source or "(no source)",
                "examples": len(before),
                "before": _mean(before),
                "forgetting": forgetting,
                # Of all entries, but so few examples are no sample of a source.
                "worst": worst_tenth(values) if forgetting is not None and supports_part(len(before), 10) else None,
            }
        )
    return {"by_task": figures.forgetting_by_task(means, new), "sources": sources}


def _of_tokens(structure: Structure | None) -> dict[str, Any]:
    """Return a sentence on the examples with few target tokens; None if there are none."""
    few = None if structure is None else structure.few_tokens
    return {"few_tokens": None if few is None or structure is None else few.sentence(structure.examples)}


# The matrix and its structure


def _matrix(matrix: ForgettingMatrix) -> dict[str, Any]:
    examples = matrix.shape[1]
    averaged = -(-examples // figures.MOST_COLUMNS) if examples > figures.MOST_COLUMNS else 0
    counts = Counter(matrix.sources)
    sources = [(source or "(no source)", counts[source]) for source in figures.matrix_sources(matrix)]
    return {"heatmap": figures.heatmap(matrix), "averaged": averaged, "sources": sources}


def _analyze(matrix: ForgettingMatrix, tokens: np.ndarray) -> Structure | None:
    """Structure of the matrix; None if it has too few entries for one."""
    try:
        return analyze(matrix, tokens=tokens) if len(matrix.tasks) > 1 else None
    except DataError:
        return None


def _structure_finding(structure: Structure) -> str:
    r2 = structure.rank_r2[:3]
    ranks = f"atrices of rank {' / '.join(str(i + 1) for i in range(len(r2)))}"
    explained = (
        f"explain {' / '.join(f'{value:.2f}' for value in r2)} of the variation (R²; task mean plus example mean: "
        f"{structure.additive_r2:.2f})"
    )
    if not structure.held_out_r2:
        return f"M{ranks} {explained}; whether that holds on entries that a fit did not see is not known."
    # Of few tasks, a fit explains nearly all that it saw, whatever that is.
    best = max(structure.held_out_r2)
    regular = next((word for limit, word in REGULARITY if best >= limit), "not shown to be regular")
    return (
        f"Which examples are forgotten after which task is {regular}: m{ranks} {explained}. On entries that were held "
        f"out, R² is at best {_held_out_finding(structure)}."
    )


def _held_out_finding(structure: Structure) -> str:
    """Return the best rank's R² on held-out entries, what is robust beside it, and what it is without a source."""
    best = int(np.argmax(structure.held_out_r2))
    robust = [
        f"{name} {figures[best]:.{digits}f}"
        for name, figures, digits in (
            ("rank correlation", structure.rank_correlation, 2),
            ("median absolute error", structure.median_error, 3),
        )
        if figures
    ]
    found = f"{structure.held_out_r2[best]:.2f}" + f" ({', '.join(robust)})" * bool(robust)
    if (without := structure.without) is None:
        return found
    return (
        f"{found}, and {without.value:.2f} without the source with most of the variation, {without.source or '(none)'} "
        f"({without.examples} examples)"
    )


def _structure(structure: Structure) -> dict[str, Any]:
    return {
        "spectrum": figures.spectrum(structure),
        "loadings": figures.loadings(structure),
        "components": structure.components,
    }


# The forecast and the examples at risk


def _truth(matrix: ForgettingMatrix, forecast: TaskForecast) -> np.ndarray | None:
    """Measured row of the forecast's task in the forecast's order, if it has more entries than the probes."""
    if forecast.task is None or forecast.task not in matrix.tasks:
        return None
    row = matrix.select([forecast.task], forecast.ids).values[0].astype(np.float64)
    return row if (~np.isnan(row[~forecast.probed])).sum() >= 2 else None


Judged = Sequence[tuple[TaskForecast, np.ndarray | None]]
"""Forecasts, each with the measured row of its task in its order, where there is one."""


def _accuracies(judged: Judged) -> dict[str, dict[str, ForecastErrors]]:
    """Errors by task and method on the examples that are not probes."""
    errors: dict[str, dict[str, ForecastErrors]] = {}
    for forecast, truth in judged:
        if truth is not None:
            others = ~forecast.probed
            parts = (forecast.mean, forecast.lower, forecast.upper, truth)
            errors.setdefault(str(forecast.task), {})[forecast.method] = judge(*(part[others] for part in parts))
    return errors


def _averages(accuracies: Mapping[str, Mapping[str, ForecastErrors]]) -> list[dict[str, Any]]:
    """One row per method: its errors averaged over the tasks that it forecast."""
    rows = []
    for method in dict.fromkeys(method for by_method in accuracies.values() for method in by_method):
        errors = [by_method[method] for by_method in accuracies.values() if method in by_method]
        name = next(iter(accuracies)) if len(accuracies) == 1 else f"mean of {len(errors)}"
        rows.append({"task": name, "method": method} | asdict(average(errors)))
    return rows


def _forecast_finding(forecasts: Sequence[TaskForecast], averages: Sequence[Mapping[str, Any]]) -> str:
    if not averages:
        worst = max(forecasts, key=lambda forecast: float(forecast.mean.mean()))
        # Not that of the examples' means, which are closer together than the truth.
        tail = worst.figure("worst_tenth")
        on_tail = "" if tail is None else f", {tail.value:.3f} on the worst tenth"
        return (
            f"Forecast for {worst.task or 'the new task'}: {worst.mean.mean():.3f} nats per token on average{on_tail}."
        )
    errors = ", ".join(f"{row['method']} {row['rmse']:.3f}" for row in averages)
    return (
        f"From {forecasts[0].probed.sum()} probes, the other examples are forecast with a root mean squared error of "
        f"{errors} nats per token; {averages[0]['coverage']:.0%} of the true values lie in the "
        f"{forecasts[0].level:.0%} interval."
    )


def _forecast(
    judged: Judged,
    accuracies: Mapping[str, Mapping[str, ForecastErrors]],
    averages: list[dict[str, Any]],
    sources: Mapping[str, str],
) -> dict[str, Any]:
    by_task = [
        {"task": task, "method": method} | asdict(errors)
        for task, by_method in accuracies.items()
        for method, errors in by_method.items()
    ]
    return {
        "level": judged[0][0].level,
        "any_truth": any(truth is not None for _, truth in judged),
        "errors": averages + (by_task if len(accuracies) > 1 else []),
        "tasks": [_forecast_of(forecast, truth, sources) for forecast, truth in judged],
    }


def _forecast_of(forecast: TaskForecast, truth: np.ndarray | None, sources: Mapping[str, str]) -> dict[str, Any]:
    figure = figures.forecast_only(forecast) if truth is None else figures.forecast_and_truth(forecast, truth)
    return {
        "name": forecast.task or "the new task",
        "figure": figure,
        "robust": None if truth is None else _robust(forecast, truth, [sources[id_] for id_ in forecast.ids]),
        "misfit": forecast.likeness(),
    } | _whole(forecast)


def _whole(forecast: TaskForecast, measured: Mapping[str | None, str] | None = None) -> dict[str, Any]:
    """Return the figures of the whole and its sources; with what was measured of each, where it is given."""
    labels = {"share_above": f"share above {forecast.threshold:g}"}
    labels |= {"mean": "share lost"} if forecast.measure == "exact_match" else {}
    return {
        "whole": [
            {
                "label": labels.get(each.figure, each.figure.replace("_", " ")),
                "estimate": each,
                "guaranteed": forecast.figure(each.figure, GUARANTEED, each.source),
                "measured": (measured or {}).get(each.source, ""),
            }
            for each in forecast.whole
            if each.kind == MODEL_BASED
        ],
        "guaranteed": any(each.kind == GUARANTEED for each in forecast.whole),
        "measured": measured is not None,
        "by_source": any(each.source is not None for each in forecast.whole),
    }


# Lost answers: forecasts of exact match


def _answers(forecast: TaskForecast, truth: np.ndarray | None, sources: Mapping[str, str]) -> dict[str, Any]:
    """Return the expected share of lost answers, and where they were measured, how reliable the probabilities are."""
    name = forecast.task or "the new task"
    errors: ProbabilityErrors | None = None
    measured: dict[str | None, str] | None = None
    if truth is not None:
        others = ~forecast.probed
        errors = judge_probabilities(forecast.mean[others], truth[others])
        labels = np.array([sources[id_] for id_ in forecast.ids], dtype=object)
        measured = {None: _share(truth)} | {source: _share(truth[labels == source]) for source in set(labels.tolist())}
    return {
        "name": name,
        "examples": len(forecast.ids),
        "probes": int(forecast.probed.sum()),
        "level": forecast.level,
        "expected": forecast.figure("mean"),
        "mean": float(forecast.mean.mean()),
        "errors": errors,
        "figure": figures.forecast_only(forecast) if errors is None else figures.reliability(errors, name),
        "misfit": forecast.likeness(),
    } | _whole(forecast, measured)


def _share(truth: np.ndarray) -> str:
    """Return the share of lost answers among those that were measured, and their number if it is not all."""
    count = int((~np.isnan(truth)).sum())
    return "" if not count else f"{np.nanmean(truth):.3f}" + (f" ({count} measured)" if count < len(truth) else "")


def _answers_finding(answers: Mapping[str, Any]) -> str:
    expected, errors = answers["expected"], answers["errors"]
    interval = (
        "" if expected is None else f" ({answers['level']:.0%} interval {expected.lower:.3f} to {expected.upper:.3f})"
    )
    judged = (
        ""
        if errors is None
        else f" Of the {errors.examples} that were not probes and were answered, the share lost is {errors.share:.3f}; "
        f"{errors.forecast:.3f} was forecast of these."
    )
    return (
        f"Of the {answers['examples']} upstream examples that the base model answers right, a share of "
        f"{answers['mean'] if expected is None else expected.value:.3f}{interval} is expected to be answered wrong "
        f"after {answers['name']}.{judged}"
    )


def _robust(forecast: TaskForecast, truth: np.ndarray, sources: Sequence[str]) -> str:
    """State the errors that a few examples or one source cannot carry."""
    judged = ~forecast.probed & ~np.isnan(truth)
    errors = np.abs(forecast.mean - truth)[judged]

    def rmse(kept: np.ndarray) -> float:
        return float(np.sqrt(np.mean(errors[kept] ** 2))) if kept.any() else float("nan")

    whole = rmse(np.ones(len(errors), dtype=bool))
    said = f"Median absolute error {np.median(errors):.3f}, root mean squared error {whole:.3f}"
    named = [source for source, kept in zip(sources, judged.tolist(), strict=True) if kept]
    if (without := most_influential(named, whole, rmse)) is None:
        return f"{said}."
    return (
        f"{said}; {without.value:.3f} without the source that changes it most, {without.source or '(none)'} "
        f"({without.examples} examples)."
    )


def _risks(atlas: Atlas, matrix: ForgettingMatrix, judged: Judged) -> list[dict[str, Any]]:
    """Examples with the highest forecast of each task; without forecasts, those with the highest mean forgetting."""
    if not judged:
        means = figures.mean_of_observed(matrix.values, axis=0)
        worst = np.argsort(-np.nan_to_num(means, nan=-np.inf), kind="stable")[:AT_RISK]
        rows = [_example(atlas, atlas.pool.ids[i]) | {"truth": means[i]} for i in worst]
        return [
            {
                "name": "Mean over the atlas's tasks",
                "unit": UNITS["loss"],
                "forecast": False,
                "truth": True,
                "rows": rows,
            }
        ]
    groups = []
    for forecast, truth in judged:
        worst = np.argsort(-forecast.mean, kind="stable")[:AT_RISK]
        rows = [
            _example(atlas, forecast.ids[i])
            | {name: getattr(forecast, name)[i] for name in ("mean", "lower", "upper", "probed")}
            | {"truth": truth[i] if truth is not None else None}
            for i in worst
        ]
        name = forecast.task or "the new task"
        found = {"name": name, "unit": forecast.unit, "forecast": True, "truth": truth is not None, "rows": rows}
        groups.append(found)
    return groups


def _example(atlas: Atlas, id_: str) -> dict[str, Any]:
    position = int(atlas.pool.positions([id_])[0])
    example = atlas.pool[position]
    text = example.full_text
    shown = text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " …"
    tokens = int(atlas.before.tokens[position])
    few = f"{tokens} target token{'s' if tokens > 1 else ''}" if 0 < tokens < FEW_TOKENS else ""
    return {"id": id_, "source": example.source or "", "text": shown, "few": few}


# Replay, in one fine-tune and in a sequence of them


def _replay_finding(verification: Verification) -> str:
    arms = [arm for arm in verification.arms if arm not in ("none", "random")]
    against_random = [verification.compare(arm, "random", metric) for arm in arms for metric in ("mean", "worst_tenth")]
    return (
        f"Held-out forgetting by replay strategy: {_means(verification, 'mean')} nats per token."
        f"{_verdicts(against_random)} {verification.advice.sentences[-1]}"
    )


def _sequence_finding(sequence: SequenceResult) -> str:
    arms = [arm for arm in sequence.arms if arm not in ("none", "random")]
    against_random = [sequence.compare(arm, "random", "mean") for arm in arms]
    return (
        f"After {sequence.length} tasks one after another, held-out forgetting by replay strategy is "
        f"{_means(sequence, 'mean')} nats per token, and that of the earlier tasks {_means(sequence, 'earlier_tasks')}."
        f"{_verdicts(against_random)}"
    )


def _means(result: Verification | SequenceResult, metric: str) -> str:
    return ", ".join(f"{arm} {result.average(arm, metric):.3f}" for arm in result.arms)


def _verdicts(comparisons: Iterable[Comparison | None]) -> str:
    return "".join(f" On the {METRICS[c.metric]}, {c.verdict()}." for c in comparisons if c is not None)


def _replay(verification: Verification) -> dict[str, Any]:
    comparisons = verification.comparisons()
    return {
        "result": verification,
        "strategies": verification.summaries,
        "runs_per_arm": len(verification.runs) // len(verification.arms),
        "metrics": {name: METRICS[name] for name in verification.metrics},
        "unit": unit_of(verification.metrics),
        "answers": ANSWERS in verification.metrics,
        "comparisons": comparisons,
        "differences": figures.replay_differences(verification) if comparisons else "",
        "differences_of_answers": (
            figures.replay_differences(verification, [ANSWERS])
            if comparisons and ANSWERS in verification.metrics
            else ""
        ),
        "tradeoff": figures.tradeoff(verification) if comparisons and verification.tradeoffs else "",
        "costs": COSTS,
    }


def _sequence(sequence: SequenceResult) -> dict[str, Any]:
    return {
        "result": sequence,
        "orders": len(sequence.orders(sequence.arms[0])),
        "metrics": {name: METRICS[name] for name in sequence.metrics},
        "comparisons": sequence.comparisons(),
        "by_position": figures.forgetting_by_position(sequence, "mean"),
        "of_tasks": figures.forgetting_by_position(sequence, "earlier_tasks"),
    }


# Provenance


def _provenance(atlas: Atlas, matrix: ForgettingMatrix) -> dict[str, Any]:
    recipe = ", ".join(f"{name} {value}" for name, value in atlas.recipe.items() if value is not None)
    facts = {
        "atlas": str(atlas.path),
        "base model": atlas.model,
        "weights (SHA-256)": atlas.model_hash or "unknown",
        "pool fingerprint": atlas.pool.fingerprint,
        "recipe": recipe or "not recorded",
        "created": atlas.created,
        "written with": f"forgetcast {forgetcast.__version__}",
    }
    tasks = []
    for name, values in zip(matrix.tasks, matrix.values, strict=True):
        origin = atlas.provenance(name)
        tasks.append(
            {
                "name": name,
                "added": origin["added"],
                "measured": float((~np.isnan(values)).mean()),
                "mean": _mean(values),
                "model_hash": (origin["model_hash"] or "")[:12],
            }
        )
    return {"facts": facts, "tasks": tasks}
