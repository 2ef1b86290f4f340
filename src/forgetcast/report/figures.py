"""The report's plots, as HTML fragments for a page that includes plotly.js.

Every string from data goes through `labels` before it reaches plotly, which renders a small subset of HTML in labels.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import plotly.graph_objects as go

from forgetcast.atlas.matrix import ForgettingMatrix
from forgetcast.completion.errors import ProbabilityErrors
from forgetcast.completion.forecast import TaskForecast
from forgetcast.completion.structure import Structure
from forgetcast.completion.watch import WatchedRun
from forgetcast.experiments.sequence_result import SequenceResult
from forgetcast.experiments.verify import Verification
from forgetcast.replay.outcome import ANSWERS, METRICS, NATS
from forgetcast.text import shorten

MOST_COLUMNS = 2_000
"""Limit on the columns of a plot; beyond it, neighbouring examples of one source are averaged."""

SHOWN_METRICS = ("mean", "worst_tenth", "new_task_loss")
"""Those of `METRICS` that every verification has."""

BLUE, ORANGE, GREY = "#2f6690", "#d1603d", "#8a8f98"

LONGEST_LABEL = 22
"""So that on a telephone, where all of a plot is 380 pixels wide, more than half of it is left to the plot."""

LONGEST_ID = 60
"""What is shown under the pointer may be longer."""

LEAST_SHARE = 0.09
"""Of a plot's width, that a source needs so that its number stands beside that of the next."""


def labels(texts: Sequence[str], longest: int = LONGEST_LABEL) -> list[str]:
    """Return labels for strings from data: escaped, shortened in the middle if long, and all different."""
    if len(set(texts)) < len(texts):
        texts = [f"{text} ({i})" for i, text in enumerate(texts, 1)]
    return [html.escape(text) for text in shorten(texts, longest)]


def forgetting_by_task(means: Mapping[str, float], new: Sequence[str]) -> str:
    """Plot the mean forgetting of each task, highest first; `new` tasks in another colour."""
    names = sorted(means, key=lambda name: -means[name])
    label_of = dict(zip(names, labels(names), strict=True))
    figure = go.Figure()
    for legend, colour, shown in (
        ("in the atlas", BLUE, [name for name in names if name not in new]),
        ("new to the forecast", ORANGE, [name for name in names if name in new]),
    ):
        if shown:
            figure.add_bar(
                x=[means[name] for name in shown],
                y=[label_of[name] for name in shown],
                orientation="h",
                name=legend,
                marker_color=colour,
                hovertemplate="%{y}: %{x:.3f}<extra></extra>",
            )
    figure.update_yaxes(
        type="category", categoryorder="array", categoryarray=list(label_of.values()), autorange="reversed"
    )
    figure.update_xaxes(title="mean forgetting<br>(nats per token)", zeroline=True)
    return _html(figure, height=110 + 22 * len(names), legend=bool(new), label="Mean forgetting by task")


def heatmap(matrix: ForgettingMatrix) -> str:
    """Plot the matrix: tasks by mean forgetting, examples by source and within it by mean forgetting.

    On the axis, sources have their numbers in `matrix_sources`; those too narrow for it have none.
    """
    values = matrix.values
    column_means = mean_of_observed(values, 0)
    source_of = np.array(matrix.sources)
    order = np.lexsort((-np.nan_to_num(column_means, nan=-np.inf), source_of))
    rows = np.argsort(-np.nan_to_num(mean_of_observed(values, 1), nan=-np.inf), kind="stable")
    step = -(-len(order) // MOST_COLUMNS)
    blocks: list[np.ndarray] = []
    edges = [0]
    for source in matrix_sources(matrix):
        members = order[source_of[order] == source]
        blocks += [members[i : i + step] for i in range(0, len(members), step)]
        edges.append(len(blocks))
    shown = np.column_stack([mean_of_observed(values[np.ix_(rows, block)], 1) for block in blocks])
    measured = np.abs(shown[~np.isnan(shown)])
    limit = float(np.quantile(measured, 0.99)) if measured.size else 1.0
    first = labels([matrix.examples[int(block[0])] for block in blocks], LONGEST_ID)
    names = [
        name + (f" and {len(block) - 1} more" if len(block) > 1 else "")
        for name, block in zip(first, blocks, strict=True)
    ]
    figure = go.Figure(
        go.Heatmap(
            z=shown.astype(np.float32),
            x=names,
            y=labels([matrix.tasks[int(i)] for i in rows]),
            colorscale="RdBu_r",
            zmid=0,
            zmin=-(limit or 1.0),
            zmax=limit or 1.0,
            colorbar={
                "title": {"text": "nats per token", "side": "top"},
                "orientation": "h",
                "thickness": 10,
                "len": 0.9,
                "y": 1.02,
                "yanchor": "bottom",
            },
            hovertemplate="%{y}<br>%{x}<br>%{z:.3f} nats per token<extra></extra>",
        )
    )
    for edge in edges[1:-1]:
        figure.add_vline(x=edge - 0.5, line_width=1, line_color="#333")
    middles = [((start + end) // 2, number) for number, (start, end) in enumerate(pairwise(edges), 1)]
    numbered = _apart(middles, LEAST_SHARE * edges[-1])
    figure.update_xaxes(
        type="category",
        tickvals=[names[middle] for middle, _ in numbered],
        ticktext=[str(number) for _, number in numbered],
        tickangle=0,
        title="examples, by source",
    )
    figure.update_yaxes(type="category", autorange="reversed")
    return _html(figure, height=170 + max(18 * len(rows), 120), label="The forgetting matrix", grid=False)


def matrix_sources(matrix: ForgettingMatrix) -> list[str]:
    """Return the sources in the order of the heatmap, from left to right."""
    return sorted(set(matrix.sources))


def _apart(positions: Sequence[tuple[float, int]], gap: float) -> list[tuple[Any, int]]:
    """Return the positions that are at least a gap from the one before that is kept."""
    kept: list[tuple[float, int]] = []
    for position, number in positions:
        if not kept or position - kept[-1][0] >= gap:
            kept.append((position, number))
    return kept


def spectrum(structure: Structure) -> str:
    """Plot R^2 by rank, with that of task means, example means and their sum."""
    ranks = list(range(1, len(structure.rank_r2) + 1))
    figure = go.Figure(
        go.Scatter(
            x=ranks,
            y=structure.rank_r2,
            mode="lines+markers",
            line_color=BLUE,
            name="measured entries",
            hovertemplate="rank %{x}: %{y:.3f}<extra></extra>",
        )
    )
    if structure.held_out_r2:
        figure.add_scatter(
            x=ranks[: len(structure.held_out_r2)],
            y=structure.held_out_r2,
            mode="lines+markers",
            line={"color": ORANGE, "dash": "dash"},
            name="held-out entries",
            hovertemplate="rank %{x}, held out: %{y:.3f}<extra></extra>",
        )
    lines = sorted(
        ((structure.row_r2, "task means"), (structure.column_r2, "example means"), (structure.additive_r2, "their sum"))
    )
    lowest, highest = max(min(0.0, lines[0][0], *structure.held_out_r2), -0.5) - 0.08, 1.1
    # Right of the plot, where no curve is, each beside its line.
    gap = (highest - lowest) / 13
    heights = _spread([r2 - gap / 2 for r2, _ in lines], gap, highest)
    for (r2, name), height in zip(lines, heights, strict=True):
        figure.add_hline(y=r2, line_dash="dot", line_color=GREY)
        figure.add_annotation(
            text=f"{name} {r2:.2f}",
            y=height + gap / 2,
            yanchor="middle",
            x=1,
            xref="paper",
            xanchor="left",
            showarrow=False,
        )
    figure.update_xaxes(title="rank", dtick=1)
    figure.update_yaxes(title="fraction explained (R²)", range=[lowest, highest])
    label = "How much of the forgetting each rank explains"
    return _html(figure, height=380, legend=True, right=_BESIDE, label=label)


def _spread(heights: Sequence[float], gap: float, highest: float) -> list[float]:
    """Move ascending heights up as far as there is less than a gap between two, and down below the highest."""
    spread: list[float] = []
    for height in heights:
        spread.append(max(height, spread[-1] + gap) if spread else height)
    top = highest - gap
    for i in reversed(range(len(spread))):
        spread[i] = min(spread[i], top)
        top = spread[i] - gap
    return spread


def loadings(structure: Structure) -> str:
    """Plot the mean loading of each component on each source."""
    sources = list(structure.components[0].by_source)
    values = np.array([[c.by_source[source] for source in sources] for c in structure.components])
    figure = go.Figure()
    for i, row in enumerate(values):
        figure.add_bar(
            y=_source_labels(sources),
            x=row,
            orientation="h",
            name=f"component {i + 1}",
            marker_color=[BLUE, ORANGE, GREY][i % 3],
            hovertemplate="%{y}: %{x:.2f}<extra></extra>",
        )
    figure.update_yaxes(type="category", autorange="reversed")
    figure.update_xaxes(title="mean loading<br>(1: a typical example's)", zeroline=True)
    height = max(380, 110 + 15 * len(sources) * len(values))
    return _html(figure, height=height, legend=True, label="What the components load on")


def forecast_and_truth(forecast: TaskForecast, truth: np.ndarray) -> str:
    """Plot forecast against measured forgetting, with an interval per example and the line of a perfect forecast."""
    others = ~forecast.probed & ~np.isnan(truth)
    figure = go.Figure()
    ends = _range(forecast.mean, truth)
    figure.add_scatter(
        x=ends, y=ends, mode="lines", line={"color": GREY, "dash": "dot"}, hoverinfo="skip", name="exact"
    )
    figure.add_scatter(
        x=truth[others],
        y=forecast.mean[others],
        error_y={
            "type": "data",
            "symmetric": False,
            "array": (forecast.upper - forecast.mean)[others],
            "arrayminus": (forecast.mean - forecast.lower)[others],
            "color": "rgba(47,102,144,.18)",
            "thickness": 1,
            "width": 0,
        },
        customdata=_ids(forecast, others),
        mode="markers",
        marker={"color": BLUE, "size": 4, "opacity": 0.75},
        name="forecast",
        hovertemplate="%{customdata}<br>measured %{x:.3f}, forecast %{y:.3f}<extra></extra>",
    )
    figure.add_scatter(
        x=truth[forecast.probed],
        y=forecast.mean[forecast.probed],
        customdata=_ids(forecast, forecast.probed),
        mode="markers",
        marker={"color": ORANGE, "size": 8, "symbol": "diamond"},
        name="probes",
        hovertemplate="%{customdata} (probe): %{x:.3f}<extra></extra>",
    )
    figure.update_xaxes(title="measured (nats per token)", range=ends, nticks=6)
    figure.update_yaxes(title="forecast (nats per token)")
    return _html(figure, height=380, legend=True, label=f"Forecast and measurement for {forecast.task}")


def forecast_only(forecast: TaskForecast) -> str:
    """Plot forecasts in descending order with their intervals, for a task without measurements."""
    order = np.argsort(-forecast.mean, kind="stable")
    order = order[:: -(-len(order) // MOST_COLUMNS)]
    rank = np.arange(len(order))
    figure = go.Figure()
    figure.add_scatter(x=rank, y=forecast.upper[order], mode="lines", line_width=0, hoverinfo="skip", showlegend=False)
    figure.add_scatter(
        x=rank,
        y=forecast.lower[order],
        mode="lines",
        line_width=0,
        fill="tonexty",
        fillcolor="rgba(47,102,144,.2)",
        hoverinfo="skip",
        name=f"{forecast.level:.0%} interval",
    )
    figure.add_scatter(
        x=rank,
        y=forecast.mean[order],
        customdata=labels([forecast.ids[int(i)] for i in order], LONGEST_ID),
        mode="lines",
        line_color=BLUE,
        name="forecast",
        hovertemplate="%{customdata}: %{y:.3f}<extra></extra>",
    )
    margin = 0.03 * len(order)  # or the first label of this axis would be below the last of the other
    figure.update_xaxes(title="examples, most at risk first", range=[-margin, len(order) - 1 + margin])
    title = f"forecast ({forecast.unit})"
    if forecast.measure == "exact_match":  # on one line it would be longer than the axis
        title = "probability of being<br>answered wrong"
    figure.update_yaxes(title=title, zeroline=True)
    return _html(figure, height=340, legend=True, label="Forecast of every example")


def reliability(errors: ProbabilityErrors, name: str) -> str:
    """Plot how many answers were lost against the probability that was forecast, by bins, and the exact line."""
    bins = errors.bins
    highest = 1.05 * max(max(each.upper, each.forecast) for each in bins)
    figure = go.Figure()
    figure.add_scatter(
        x=[0, highest],
        y=[0, highest],
        mode="lines",
        line={"color": GREY, "dash": "dot"},
        hoverinfo="skip",
        name="exact",
    )
    figure.add_scatter(
        x=[each.forecast for each in bins],
        y=[each.share for each in bins],
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [each.upper - each.share for each in bins],
            "arrayminus": [each.share - each.lower for each in bins],
            "thickness": 1,
            "width": 3,
        },
        customdata=[each.count for each in bins],
        mode="markers",
        marker={"color": BLUE, "size": 9},
        name="measured (95% interval)",
        hovertemplate="%{customdata} examples: forecast %{x:.3f}, lost %{y:.3f}<extra></extra>",
    )
    figure.update_xaxes(title="forecast probability of being lost", range=[0, highest], nticks=6)
    figure.update_yaxes(title="share that was lost", range=[0, highest])
    return _html(figure, height=380, legend=True, label=f"Reliability of the forecast of lost answers for {name}")


def replay_differences(verification: Verification, metrics: Sequence[str] = SHOWN_METRICS) -> str:
    """Plot the paired differences between the arms, in at most three metrics of one unit, with their intervals."""
    figure = go.Figure()
    names = list(dict.fromkeys(f"{c.arm} − {c.baseline}" for c in verification.comparisons()))
    offsets = (-0.2, 0.0, 0.2) if len(metrics) > 1 else (0.0,)
    for metric, colour, offset in zip(metrics, (BLUE, ORANGE, GREY), offsets, strict=False):
        shown = [c for c in verification.comparisons() if c.metric == metric]
        figure.add_scatter(
            x=[c.difference.mean for c in shown],
            y=[names.index(f"{c.arm} − {c.baseline}") + offset for c in shown],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [c.difference.upper - c.difference.mean for c in shown],
                "arrayminus": [c.difference.mean - c.difference.lower for c in shown],
            },
            mode="markers",
            marker={"color": colour, "size": 9},
            name=METRICS[metric],
            hovertemplate="%{x:+.3f}<extra>" + METRICS[metric] + "</extra>",
        )
    figure.add_vline(x=0, line_width=1, line_color="#333")
    figure.update_yaxes(tickvals=list(range(len(names))), ticktext=labels(names), autorange="reversed")
    unit = METRICS[ANSWERS] if ANSWERS in metrics else NATS
    figure.update_xaxes(title=f"difference ({unit};<br>below zero is better)")
    label = "Differences between the replay strategies" + (f" in the {unit}" if ANSWERS in metrics else "")
    return _html(figure, height=max(320, 130 + 45 * len(names)), legend=True, label=label)


SIGNS = ("circle", "square", "diamond", "cross", "x", "triangle-up", "triangle-down", "star", "hexagon", "pentagon")


def tradeoff(verification: Verification) -> str:
    """Plot new-task loss against mean forgetting, both relative to no replay, an arm a point with its intervals."""
    arms = verification.tradeoffs
    figure = go.Figure()
    front = sorted((a for a in arms if a.on_front), key=lambda a: a.new_task_loss.mean)
    figure.add_scatter(
        x=[a.new_task_loss.mean for a in front],
        y=[a.mean.mean for a in front],
        mode="lines",
        line={"color": GREY, "dash": "dot"},
        name="no arm is better in both",
        hoverinfo="skip",
    )
    for i, (arm, label) in enumerate(zip(arms, labels([a.arm for a in arms]), strict=True)):
        bars = {}
        for axis, name in (("error_x", "new_task_loss"), ("error_y", "mean")):
            e = getattr(arm, name)
            bars[axis] = {
                "type": "data",
                "symmetric": False,
                "array": [0 if e.upper is None else e.upper - e.mean],
                "arrayminus": [0 if e.lower is None else e.mean - e.lower],
                "thickness": 1,
                "width": 2,
            }
        # Names beside the points would overlap; they are in the legend, and an arm is told by its sign.
        figure.add_scatter(
            x=[arm.new_task_loss.mean],
            y=[arm.mean.mean],
            mode="markers",
            marker={"color": BLUE if arm.equal else ORANGE, "size": 9, "symbol": SIGNS[i % len(SIGNS)]},
            name=label,
            legendgroup=str(bool(arm.equal)),
            legendgrouptitle_text="equal new-task loss" if arm.equal else "not shown to be equal",
            hovertemplate=f"{label}: loss %{{x:+.3f}}, forgetting %{{y:+.3f}}<extra></extra>",
            **bars,
        )
    figure.add_vline(x=verification.margin, line_width=1, line_dash="dash", line_color="#333")
    figure.update_xaxes(
        title="new-task loss minus that without replay<br>(nats per token; dashed: the margin)", zeroline=True
    )
    figure.update_yaxes(title="mean forgetting, likewise", zeroline=True)
    return _html(figure, height=420, legend=True, label="New-task loss against forgetting, by arm")


def forgetting_by_position(sequence: SequenceResult, metric: str) -> str:
    """Plot upstream forgetting, or that of the earlier tasks, against the number of tasks learned, a line per arm.

    Bars span the orders.
    """
    figure, of_tasks = go.Figure(), metric == "earlier_tasks"
    positions = list(range(2 if of_tasks else 1, sequence.length + 1))
    for i, (arm, name) in enumerate(zip(sequence.arms, labels(sequence.arms), strict=True)):
        by_order = np.array(
            [[sequence.value(arm, order, metric, p) for p in positions] for order in sequence.orders(arm)]
        )
        mean = by_order.mean(axis=0)
        figure.add_scatter(
            x=positions,
            y=mean,
            error_y={
                "type": "data",
                "symmetric": False,
                "array": by_order.max(axis=0) - mean,
                "arrayminus": mean - by_order.min(axis=0),
                "thickness": 1,
                "width": 3,
            },
            mode="lines+markers",
            line={"color": [GREY, ORANGE, BLUE][i % 3], "dash": ["solid", "dash", "dot"][i // 3 % 3]},
            name=name,
            hovertemplate="%{y:.3f} after %{x}<extra>" + name + "</extra>",
        )
    figure.update_xaxes(title="tasks learned", dtick=1)
    what = "forgetting of the<br>earlier tasks" if of_tasks else "upstream forgetting"
    figure.update_yaxes(title=f"{what}<br>(nats per token)", zeroline=True)
    label = "Forgetting of the earlier tasks" if of_tasks else "Upstream forgetting"
    return _html(figure, height=360, legend=True, label=f"{label} after each task of a sequence")


def watched_run(run: WatchedRun) -> str:
    """Plot mean and worst tenth against the steps, and what was forecast for the end; bands and bars are intervals."""
    figure = go.Figure()
    mean = [(reading.step, reading.figures["mean"]) for reading in run.readings]
    steps = [step for step, _ in mean]
    for end in ("upper", "lower"):
        figure.add_scatter(
            x=steps,
            y=[getattr(estimate, end) for _, estimate in mean],
            mode="lines",
            line_width=0,
            fill="tonexty" if end == "lower" else None,
            fillcolor="rgba(47,102,144,.2)",
            hoverinfo="skip",
            showlegend=False,
        )
    for name, legend, colour, dash in (
        ("mean", "mean", BLUE, "solid"),
        ("worst_tenth", "worst tenth", ORANGE, "dash"),
        ("end_of_run", f"forecast of the mean at step {run.steps}", GREY, "dot"),
    ):
        found = [(reading.step, reading.figures[name]) for reading in run.readings if name in reading.figures]
        if not found:
            continue
        value = np.array([estimate.value for _, estimate in found])
        lower = np.array([np.nan if estimate.lower is None else estimate.lower for _, estimate in found])
        upper = np.array([np.nan if estimate.upper is None else estimate.upper for _, estimate in found])
        figure.add_scatter(
            x=[step for step, _ in found],
            y=value,
            error_y={
                "type": "data",
                "symmetric": False,
                "array": upper - value,
                "arrayminus": value - lower,
                "thickness": 1,
                "width": 3,
                "visible": name == "end_of_run",
            },
            mode="lines+markers",
            line={"color": colour, "dash": dash},
            name=legend,
            hovertemplate="%{y:.3f} after %{x}<extra>" + legend + "</extra>",
        )
    figure.update_xaxes(title="steps", range=[0, run.steps])
    figure.update_yaxes(title="forgetting (nats per token)", zeroline=True)
    return _html(figure, height=340, legend=True, label="Forgetting during a fine-tune")


def _ids(forecast: TaskForecast, mask: np.ndarray) -> list[str]:
    return labels([id_ for id_, selected in zip(forecast.ids, mask, strict=True) if selected], LONGEST_ID)


def _source_labels(sources: Sequence[str]) -> list[str]:
    return labels([source or "(no source)" for source in sources])


def _range(*values: np.ndarray) -> list[float]:
    low, high = (float(end(np.concatenate(values))) for end in (np.nanmin, np.nanmax))
    margin = 0.04 * (high - low) or 1.0
    return [low - margin, high + margin]


def mean_of_observed(values: np.ndarray, axis: int) -> np.ndarray:
    """Return the mean of the observed entries; NaN, without a warning, where there are none."""
    observed = ~np.isnan(values)
    counts = observed.sum(axis=axis)
    sums = np.where(observed, values, 0.0).sum(axis=axis)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


_BESIDE = 150
"""Pixels right of a plot for the names of its lines."""


def _html(
    figure: go.Figure, *, height: int, label: str, legend: bool = False, grid: bool = True, right: int = 10
) -> str:
    figure.update_layout(
        height=height,
        template="plotly_white",
        plot_bgcolor="white" if grid else "#e4e5e8",  # background of a heatmap: the colour of missing entries
        paper_bgcolor="white",
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#222"},
        margin={"l": 10, "r": right, "t": 34 if legend else 12, "b": 10},
        showlegend=legend,
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0},
    )
    figure.update_xaxes(automargin=True, showgrid=grid)
    figure.update_yaxes(automargin=True, showgrid=grid)
    config: dict[str, Any] = {"displaylogo": False, "responsive": True, "displayModeBar": False}
    drawn = figure.to_html(full_html=False, include_plotlyjs=False, config=config)
    return f'<figure role="img" aria-label="{html.escape(label)}">{drawn}</figure>'
