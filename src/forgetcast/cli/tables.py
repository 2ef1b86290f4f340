"""Tables and sentences that the commands print, with rich or as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Column, Table

from forgetcast.cli.columns import Beginning, FigureTable, Name, Words
from forgetcast.completion.forecast import GUARANTEED, MODEL_BASED, TaskForecast, WholeFigure
from forgetcast.completion.structure import Structure
from forgetcast.data import Pool
from forgetcast.defaults import ORDERS
from forgetcast.evaluation import BenchRow
from forgetcast.experiments.add import Outcome
from forgetcast.experiments.dry_run import DryRun
from forgetcast.experiments.interpolation import ChosenAlpha
from forgetcast.experiments.sequence_result import SequenceResult
from forgetcast.experiments.start import duration
from forgetcast.experiments.tradeoff import COSTS, Estimate
from forgetcast.experiments.verify import Verification
from forgetcast.measure.diff import FEW_TOKENS, Difference, Summary
from forgetcast.measure.gates import Judgement
from forgetcast.replay.law import Advice, ratio_text
from forgetcast.replay.outcome import ANSWERS, LAW_METRICS, METRICS, unit_of
from forgetcast.similarity import Association, Correlation, SimilarityStudy
from forgetcast.stats import FEWEST_RANKS, MOST_PAIRS, Comparison, supports_part
from forgetcast.text import markdown_text

LABELS = {
    "mean_nll": "mean loss (nats per token)",
    "mean_kl": "mean KL (nats per token)",
    "misfit": "misfit (p-value)",
    "achieved_ratio": "ratio in whole batches",
    "steps": "steps, replay included",
    "forgetting": "mean forgetting (nats per token)",
    "forgetting_lower": "lower end (90% interval)",
    "forgetting_upper": "upper end (90% interval)",
}
"""What a fact is called beside its value, where its name does not say what the value is."""


BEGINNING = 60
"""Characters of a text that are shown at most."""


def facts_table(title: str, facts: Mapping[str, Any]) -> Table:
    """Return a table with a row per fact that is not None."""
    table = Table("", Column(overflow="fold"), title=title, show_header=False)
    for name, value in facts.items():
        if value is not None:
            label = LABELS.get(name, name.replace("_", " "))
            table.add_row(label, f"{value:.4g}" if isinstance(value, float) else escape(str(value)))
    return table


def whole_table(forecast: TaskForecast) -> FigureTable:
    """Return the figures of all examples and of the sources, with both kinds of interval."""
    table = FigureTable(
        Name("examples"),
        Words("figure"),
        "value",
        MODEL_BASED,
        GUARANTEED,
        title=f"The whole ({forecast.unit}, {forecast.level:.0%} intervals)",
        caption=" ".join(_whole_notes(forecast)),
    )

    def interval(figure: WholeFigure | None) -> str:
        return "" if figure is None else f"{figure.lower:.3f} to {figure.upper:.3f}"

    for each in forecast.whole:
        if each.kind == MODEL_BASED:
            label = f"share above {forecast.threshold:g}" if each.figure == "share_above" else each.figure
            table.add_row(
                Name("all" if each.source is None else each.source or "no source", f" ({each.examples})"),
                label.replace("_", " "),
                f"{each.value:.3f}",
                interval(each),
                interval(forecast.figure(each.figure, GUARANTEED, each.source)),
            )
    return table


def _whole_notes(forecast: TaskForecast) -> Iterator[str]:
    """Yield what a reader of the figures should know."""
    if forecast.audit:
        yield "The value is the model's; a guaranteed interval has an estimate of its own, and may exclude it."
    if any(not supports_part(each.examples, 10) for each in forecast.whole):
        yield "Of fewer than 10 examples there is no worst tenth."


def risk_table(forecast: TaskForecast, rows: Sequence[Mapping[str, Any]], pool: Pool) -> FigureTable:
    """Return the examples with the highest forecasts: id, probed, mean, lower and upper of each, and their texts."""
    table = FigureTable(
        Name("example"),
        "forecast",
        f"{forecast.level:.0%} interval",
        Beginning("text"),
        title=f"Most at risk ({forecast.unit})",
    )
    texts = _beginnings(pool, [row["id"] for row in rows])
    for row, text in zip(rows, texts, strict=True):
        interval = "measured" if row["probed"] else f"{row['lower']:.3f} to {row['upper']:.3f}"
        table.add_row(row["id"], f"{row['mean']:.3f}", interval, text)
    return table


def _beginnings(pool: Pool, ids: Sequence[str]) -> list[str]:
    """Return how the texts of examples begin, on a line each: an id that was made says nothing to a reader."""
    return [" ".join(pool[int(i)].full_text.split())[:BEGINNING] for i in pool.positions(ids)]


def atlas_tables(info: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Yield what `Atlas.info` says: the atlas, and a row per task."""
    names = (
        "format",
        "model",
        "model_hash",
        "pool",
        "examples",
        "unscored",
        "tasks",
        "priors",
        "bytes",
        "dropped",
        "created",
    )
    facts = {name: info[name] for name in names} | {"answers": "yes" if info["answers"] else "no"}
    for name in ("dropped", "priors"):
        if not info[name]:
            del facts[name]
    if info["curves"]:
        facts["rows at shares of the steps"] = ", ".join(f"{share}: {tasks}" for share, tasks in info["curves"].items())
    yield facts_table(info["atlas"], facts | {"bytes": f"{info['bytes']:,}"})
    if not info["rows"]:
        return
    columns = [Name("task"), "measured", "mean forgetting", "parts", Words("kind"), "added"]
    table = FigureTable(*columns, *([Name("prior, of the base")] if info["priors"] else []), title="Rows")
    for row in info["rows"]:
        mean, origin = row["mean_forgetting"], row["provenance"]
        table.add_row(
            row["task"],
            f"{row['measured']:.1%}",
            "" if mean is None else f"{mean:+.4f}",
            str(row["parts"]),
            str(origin.get("kind", "")),
            str(origin["added"])[:10],
            *([_prior_base(origin)] if info["priors"] else []),
        )
    yield table


def _prior_base(provenance: Mapping[str, Any]) -> str:
    """Return the base model of a row that is a prior; empty if it is none."""
    base = provenance.get("prior_base")
    known = base if isinstance(base, dict) else {}
    return str(known.get("model", "unknown")) if provenance.get("prior") is True else ""


def priors_line(priors: int, rows: int) -> str:
    """Say that rows are of another version of the base model."""
    return f"{priors} of {rows} rows are priors: measured on another version of the base model"


def added_tables(atlas: str, outcomes: Sequence[Outcome]) -> Iterator[RenderableType]:
    """Yield what became of each model that was to be added."""
    table = FigureTable(
        Name("row"), "measured", "mean forgetting", "of", "seconds", Words("outcome"), title=f"Added to {atlas}"
    )
    if any(outcome.mean_of < outcome.examples for outcome in outcomes):
        table.caption = (
            "A mean of some examples is not that of the pool, the less so where they were chosen as probes: "
            "`forgetcast forecast` estimates the pool's."
        )
    for outcome in outcomes:
        table.add_row(
            outcome.name,
            str(outcome.measured) if outcome.measured else "",
            "" if outcome.mean is None else f"{outcome.mean:+.4f}",
            _mean_of(outcome),
            "" if outcome.seconds is None else f"{outcome.seconds:.1f}",
            outcome.status if outcome.reason is None else f"{outcome.status}: {outcome.reason}",
        )
    yield table


def _mean_of(outcome: Outcome) -> str:
    """Say what a mean is the mean of: all examples, or as many as were measured."""
    if outcome.mean is None:
        return ""
    whole = outcome.mean_of == outcome.examples
    return f"all {outcome.examples:,}" if whole else f"{outcome.mean_of:,} of {outcome.examples:,}"


def runs_table(figures: Mapping[str, Mapping[str, float]], last: int = 10) -> FigureTable:
    """Return a table of the last runs of a sweep, and the mean forgetting of all; see `experiments.meter.OnFigures`."""
    table = FigureTable(Name("task"), "training loss", "tokens/s, training", "tokens/s, scoring", "forgetting")
    formats = {"loss": ".3f", "training": ",.0f", "scoring": ",.0f", "forgetting": "+.3f"}
    for name, found in list(figures.items())[-last:]:
        table.add_row(name, *(f"{found[key]:{form}}" if key in found else "" for key, form in formats.items()))
    if so_far := [found["forgetting"] for found in figures.values() if "forgetting" in found]:
        rows = f"{len(so_far)} rows" if len(so_far) > 1 else "1 row"
        # An earlier start of the same sweep may have made others.
        table.caption = f"mean forgetting of {rows} made since this start: {np.mean(so_far):+.3f} nats per token"
    return table


def dry_run_tables(found: DryRun) -> Iterator[RenderableType]:
    """Yield what a sweep would do: a row each, what is to be scored, and the time."""
    table = FigureTable(
        Name("row"), "examples", "read", "cut", "tokens", "time", Words("state"), title=f"Rows of {found.atlas}"
    )
    for row in found.rows:
        left = row.state != "complete" and row.fault is None
        table.add_row(
            row.name,
            f"{row.examples:,}",
            *("" if count is None else f"{count:,}" for count in (row.trained, row.cut, row.tokens)),
            duration(row.seconds) if left and row.seconds is not None else "",
            row.state if row.fault is None else "would fail",
        )
    if found.steps is not None:
        table.caption = (
            f"{found.steps} steps of {found.batch_size} examples each, without replay. read: with repeats; cut: those "
            "that are longer than max_length; tokens: trained on, without padding; time: training and scoring."
        )
    yield table
    yield ""
    size = found.pool
    odd = {f"{size.cut:,} longer than the context": size.cut, f"{size.unscorable:,} without a loss": size.unscorable}
    said = "".join(f", {what}" for what, count in odd.items() if count)
    yield f"Pool: {size.examples:,} examples, {size.tokens:,} tokens{said}; base scores: {found.base}."
    rows = f"{len(found.left)} of {len(found.rows)} rows"
    if found.speed is None:
        yield f"Nothing is left to do: {len(found.rows)} of {len(found.rows)} rows are complete."
        return
    share = "" if found.score_share == 1 else f"about {found.score_share:.0%} of "
    often = f" at the end and at {found.checkpoints} checkpoints" if found.checkpoints else ""
    trained = "" if found.training_tokens is None else f"{found.training_tokens:,} tokens trained on, "
    yield (
        f"To do: {rows}, each with {share}the pool scored{often}: {trained}{'about ' if share else ''}"
        f"{found.scoring_tokens:,} tokens scored."
    )
    what = "scoring and answering" if size.prompts else "scoring"
    once = f"{what} the pool once takes {duration(size.seconds(found.speed))}"
    if found.seconds is None:
        yield f"Time on this machine: {once}; what the trainer's command takes is not known."
    else:
        yield f"Time on this machine, in one process: about {duration(found.seconds)}; {once}. Nothing was stored."


def structure_tables(structure: Structure) -> Iterator[RenderableType]:
    """Yield how much each fit explains, and the components' loadings."""
    mean = np.mean(list(structure.mean_by_task.values()))
    yield (
        f"{structure.tasks} tasks x {structure.examples} examples, {structure.measured:.0%} measured; "
        f"mean forgetting {mean:.3f} nats per token{': the loss fell' if mean < 0 else ''}"
    )
    if structure.mean_per_token is not None:
        yield f"Weighted by target tokens, the mean forgetting is {structure.mean_per_token:.3f}."
    if structure.few_tokens is not None:
        yield structure.few_tokens.sentence(structure.examples)
    if structure.priors:
        yield priors_line(structure.priors, structure.tasks)
    fits = FigureTable(Name("fit"), "R^2", "held out", "rank corr.", "median error", Words(""))
    fits.title = "How much of the forgetting each fit explains"
    fits.add_row("task means", f"{structure.row_r2:.3f}")
    fits.add_row("example means", f"{structure.column_r2:.3f}")
    fits.add_row("additive", f"{structure.additive_r2:.3f}")
    for rank, r2 in enumerate(structure.rank_r2, 1):
        figures = (structure.held_out_r2, structure.rank_correlation, structure.median_error)
        held_out = [each[rank - 1] if rank <= len(each) else None for each in figures]
        worse = held_out[0] is not None and held_out[0] < 0
        word = "worse than the mean" if worse else ""
        if structure.held_out_r2 and held_out[0] is None:
            word = "too few tasks to tell" if structure.tasks <= structure.examples else "too few examples to tell"
        cells = ("" if value is None else f"{value:.3f}" for value in held_out)
        fits.add_row(f"rank {rank}", f"{r2:.3f}", *cells, word)
    if structure.held_out_r2:
        fits.caption = (
            "From the third column on: on a tenth of the entries, which the fit did not see, of a small matrix on "
            "several tenths in turn; the error is absolute."
        )
    yield fits
    if structure.held_out_r2 and max(structure.held_out_r2) <= 0:
        yield (
            "No rank explains entries that the fit did not see, so a structure is not shown: rely on forecasts only if "
            "`forgetcast bench` shows them better than the mean, or collect more tasks."
        )
    if (without := structure.without) is not None:
        best = f" of {max(structure.held_out_r2):.3f} held out" if structure.held_out_r2 else ""
        yield (
            f"Without the source with most of the variation, {escape(without.source) or '(none)'} "
            f"({without.examples} examples, {without.share or 0:.0%}), the best R^2{best} is {without.value:.3f}."
        )
    if (noise := structure.noise) is not None:
        share = f", {noise.residual_share:.0%} of what" if noise.residual_share is not None else "; unknown of what"
        yield (
            f"Noise from run to run: {noise.std:.4f} per entry ({noise.rows} rows of {noise.tasks} tasks with several "
            f"seeds){share} the best rank leaves"
        )
    components = structure.components
    loadings = FigureTable(Name("source"), *(f"component {i}" for i in range(1, len(components) + 1)))
    loadings.title = "Mean loading by source (1 is that of a typical example)"
    for source in components[0].by_source:
        loadings.add_row(source or "(none)", *(f"{c.by_source[source]:+.2f}" for c in components))
    loadings.add_section()
    loadings.add_row("fraction of the fit", *(f"{c.share:.0%}" for c in components))
    loadings.add_row("variance between sources", *(f"{c.between_sources:.0%}" for c in components))
    yield loadings


def _with_interval(part: Summary) -> str:
    """Mean and 95 % interval, which a single example or cluster has none of."""
    return f"{part.mean:+.4f} ({_interval(part)})"


def _interval(part: Summary) -> str:
    return "no interval" if part.lower is None else f"{part.lower:+.4f} to {part.upper:+.4f}"


def _part(value: float, examples: int, parts: int) -> str:
    """Return the mean of the worst part, or how many examples it takes."""
    return f"{value:+.4f}" if supports_part(examples, parts) else f"takes {parts}"


def _difference_rows(result: Difference) -> Iterator[tuple[str, str]]:
    """Yield name and value of each statistic, for the terminal and for Markdown."""
    if (loss := result.loss) is not None:
        yield "examples with both losses", f"{loss.examples}"
        if loss.clusters is not None:
            yield "clusters", f"{loss.clusters}"
        yield "mean (95 % interval)", _with_interval(loss)
        yield "median", f"{loss.median:+.4f}"
        if loss.per_token is not None:
            yield "mean, weighted by tokens", f"{loss.per_token:+.4f}"
        if loss.few_tokens_mean is not None:
            yield f"fewer than {FEW_TOKENS} target tokens", f"{loss.few_tokens}, mean {loss.few_tokens_mean:+.4f}"
        yield "worst tenth", _part(loss.worst_tenth, loss.examples, 10)
        yield "worst hundredth", _part(loss.worst_hundredth, loss.examples, 100)
        yield "examples that got worse", f"{loss.share_worse:.1%}"
        if (units := loss.clusters or loss.examples) >= FEWEST_RANKS:
            yield "Wilcoxon signed-rank test", f"p = {result.wilcoxon_p:.2g}"
        else:
            yield "Wilcoxon signed-rank test", f"takes {FEWEST_RANKS}, and there are {units}"
    if (noise := result.noise) is not None:
        sides = ((noise.before_rms, "before"), (noise.after_rms, "after"))
        yield (
            "noise of an example (RMS)",
            ", ".join(f"{rms:.1e} {side}" if rms is not None else f"unknown {side}" for rms, side in sides),
        )
        larger = ": the change may be noise alone" if noise.exceeds_change else ""
        yield "noise of the mean", f"{noise.mean:.1e}{larger}"
    if (kl := result.kl) is not None:
        yield "KL divergence (95 % interval)", _with_interval(kl)
        yield "KL divergence, worst tenth", f"{kl.worst_tenth:+.4f}"
        yield "KL divergence from", kl.reference or "an unknown model"
    if result.unscored:
        yield "examples without both losses", f"{result.unscored}"
    if result.different_tokens:
        yield "examples of different tokens", f"{result.different_tokens}"
    if result.lost:
        yield "scored before, not after", f"{result.lost}"
    if (flips := result.flips) is not None:
        yield "right answers", f"{flips.right_before:.1%} before, {flips.right_after:.1%} after"
        yield "right, now wrong", f"{flips.right_to_wrong}"
        yield "wrong, now right", f"{flips.wrong_to_right}"
        if flips.mcnemar_p is not None:
            yield "McNemar's test", f"p = {flips.mcnemar_p:.2g}"


SOURCE_COLUMNS = ("source", "examples", "mean", "95 % interval", "worst tenth", "p, corrected")


def _source_rows(result: Difference) -> Iterator[tuple[str, ...]]:
    """Yield what `SOURCE_COLUMNS` names."""
    for name, part in result.by_source.items():
        p = ""
        if name in result.by_source_p:
            units = part.clusters or part.examples
            few = f"takes {FEWEST_RANKS}, not {units}"
            p = f"p = {result.by_source_p[name]:.2g}" if units >= FEWEST_RANKS else few
        worst = _part(part.worst_tenth, part.examples, 10)
        yield name, f"{part.examples}", f"{part.mean:+.4f}", _interval(part), worst, p


def judgement_lines(judgement: Judgement) -> Iterator[str]:
    """Yield the verdict, and the corrected p-values if there are several."""
    if (sentence := judgement.sentence()) is not None:
        yield f"verdict: {sentence}"
    if len(judgement.corrected_p) > 1:
        corrected = ", ".join(f"{name} = {p:.2g}" for name, p in judgement.corrected_p.items())
        yield f"corrected for {len(judgement.corrected_p)} tests (Holm): {corrected}"


def _worst_rows(result: Difference) -> Iterator[tuple[str, ...]]:
    """Yield id, loss before and after, and change."""
    for row in result.worst:
        yield row["id"], f"{row['before']:.3f}", f"{row['after']:.3f}", f"{row['change']:+.3f}"


def difference_tables(result: Difference, pool: Pool | None = None) -> Iterator[RenderableType]:
    """Yield tables of the difference, its values by source, and the most forgotten examples, with texts of a pool."""
    table = FigureTable(
        Words("statistic"),
        Words("after minus before"),
        title=f"Change of the loss ({result.unit}; positive is forgotten)",
    )
    for row in _difference_rows(result):
        table.add_row(*row)
    yield table
    if result.by_source:
        table = FigureTable(Name(SOURCE_COLUMNS[0]), *SOURCE_COLUMNS[1:], title="By source")
        for name, *figures in _source_rows(result):
            table.add_row(name or "(none)", *figures)
        yield table
    if result.worst:
        named = [] if pool is None else [Beginning("text")]
        table = FigureTable(Name("example"), "before", "after", "change", *named, title="Most forgotten")
        texts = [] if pool is None else _beginnings(pool, [row["id"] for row in result.worst])
        for i, cells in enumerate(_worst_rows(result)):
            table.add_row(*cells, *texts[i : i + 1])
        yield table


def difference_markdown(result: Difference, judgement: Judgement) -> str:
    """Return the difference and what is judged of it as Markdown."""

    def row(*cells: str) -> str:
        return f"| {' | '.join(markdown_text(cell) for cell in cells)} |"

    unit = markdown_text(result.unit)
    lines = ["### Forgetting", ""]
    lines += [f"**Failed:** `{text}`  " for text in judgement.failed]
    for line in judgement_lines(judgement):
        name, _, said = line.partition(": ")
        lines.append(f"**{name.capitalize()}:** {said}  ")
    lines += [""] * (len(lines) > 2) + [f"| statistic | after minus before, {unit} |", "|---|---|"]
    lines += [row(name, figure) for name, figure in _difference_rows(result)]
    if result.by_source:
        lines += ["", f"| {' | '.join(SOURCE_COLUMNS)} |", "|---" * len(SOURCE_COLUMNS) + "|"]
        lines += [row(name or "(none)", *figures) for name, *figures in _source_rows(result)]
    if result.worst:
        lines += ["", "| most forgotten | before | after | change |", "|---|---|---|---|"]
        lines += [row(*cells) for cells in _worst_rows(result)]
    return "\n".join(lines)


def bench_table(rows: Sequence[BenchRow], baseline: str) -> FigureTable:
    """Return a table with a row per method, number and selection of probes."""
    binary = any(not np.isnan(row.f1) for row in rows)
    table = FigureTable(
        *(Name("method"), "probes", "RMSE", "ratio (95 %)", "corr.", "recall", "in 90%", "ms"),
        *(["F1"] if binary else []),
        title=f"Forecast of left-out tasks, on examples that were not probed; ratio to {baseline}, random probes",
        caption="corr.: rank correlation with the true forgetting; recall: of the most forgotten tenth; in 90%: true "
        "values in the 90 % interval; ms: to complete the row of a task",
    )
    for row in _sorted_by_probes(rows):
        figures = [
            row.method,
            f"{row.k} {row.probes}",
            f"{row.accuracy.rmse:.4f}",
            f"{row.ratio:.2f} ({row.ratio_lower:.2f}-{row.ratio_upper:.2f})",
            f"{row.accuracy.spearman:.2f}",
            f"{row.accuracy.recall:.2f}",
            f"{row.accuracy.coverage:.0%}",
            f"{1000 * row.seconds:.2f}",
        ]
        table.add_row(*figures, *([f"{row.f1:.3f}"] if binary else []))
    return table


def robust_bench_table(rows: Sequence[BenchRow], baseline: str) -> FigureTable:
    """Return a table of figures that a few examples or one source cannot carry, for rows of `bench_table`."""
    table = FigureTable(Name("method"), "probes", "median error", "ratio", Name("without source"), "ratio then")
    table.title = f"The same without the source that changes the ratio to {baseline} most; median absolute error"
    for row in _sorted_by_probes(rows):
        other = row.without
        named = "" if other is None else Name(other.source or "(none)", f" ({other.examples})")
        ratio = "" if other is None else f"{other.value:.2f}"
        table.add_row(row.method, f"{row.k} {row.probes}", f"{row.median_error:.4f}", f"{row.ratio:.2f}", named, ratio)
    return table


def _sorted_by_probes(rows: Sequence[BenchRow]) -> list[BenchRow]:
    return sorted(rows, key=lambda row: (row.k, row.probes == "chosen"))


def association_tables(associations: Sequence[Association]) -> Iterator[RenderableType]:
    """Yield the correlations of similarities with forgetting."""
    titles = ("all cells", "within tasks", "within examples", "given the additive fit")
    for kind, suffix in (("Pearson's", ""), ("Spearman's", "_spearman")):
        table = FigureTable(Name("similarity"), *titles)
        table.title = f"Correlation with forgetting, {kind} (95 % over tasks)"
        for each in associations:
            named = ("cells", "within_tasks", "within_examples", "partial")
            found = [getattr(each, name + suffix) for name in named]
            table.add_row(each.name, *map(_correlation, found))
            if any(part.value is None for part in found):
                table.caption = "-: the similarity does not vary there"
        yield table


def _correlation(found: Correlation) -> str:
    if found.value is None:
        return "-"
    return f"{found.value:+.2f} ({found.lower:+.2f} to {found.upper:+.2f})"


def study_tables(found: SimilarityStudy) -> Iterator[RenderableType]:
    """Yield what similarities correlate with, what they forecast beside completion, and which baselines it beats."""
    yield from association_tables(found.associations)
    yield from map(escape, found.notes)
    table = FigureTable(Name("arm"), "k", "RMSE", "RMSE, difference", "rank corr.", "rank corr., difference")
    table.title = "Forecasts minus bayesian's with k chosen probes (95 % over tasks)"
    for each in sorted(found.versus, key=lambda each: each.k):
        rmse = _signed(each.rmse_difference, each.rmse_lower, each.rmse_upper, 4)
        ranks = _signed(each.spearman_difference, each.spearman_lower, each.spearman_upper, 3)
        spearman = "-" if each.spearman is None else f"{each.spearman:.3f}"
        table.add_row(each.arm, str(each.k), f"{each.rmse:.4f}", rmse, spearman, ranks)
    yield table
    if not found.winners:
        yield "Completion beats every baseline in RMSE and rank correlation, with intervals clear of zero."
    for name in dict.fromkeys(found.winners):
        for each in found.versus:
            if each.arm == name:
                yield f"Against {escape(name)} with {each.k} probes: {each.verdict()}."


def _signed(value: float | None, lower: float | None, upper: float | None, digits: int) -> str:
    if value is None:
        return "-"
    ends = "" if lower is None else f" ({lower:+.{digits}f} to {upper:+.{digits}f})"
    return f"{value:+.{digits}f}{ends}"


def verification_tables(result: Verification) -> Iterator[RenderableType]:
    """Yield a table of the arms, and their differences with verdicts."""
    table = FigureTable(Name("replay"), *(METRICS[metric] for metric in result.metrics), "replayed", "seconds")
    unit = unit_of(result.metrics)
    table.title = f"After fine-tuning, on {result.judged} examples that were never replayed ({unit})"
    for arm in result.arms:
        figures = (f"{result.average(arm, metric):.3f}" for metric in result.metrics)
        table.add_row(arm, *figures, f"{result.average(arm, 'replayed'):.0f}", f"{result.average(arm, 'seconds'):.1f}")
    yield table
    yield escape(result.audit())
    yield from result.notes()
    yield from _comparison_tables(result.comparisons(), ("seeds of the task", "tasks"))
    yield from tradeoff_tables(result)


def tradeoff_tables(result: Verification) -> Iterator[RenderableType]:
    """Yield a table of what each arm saves and costs against no replay, and the advice."""
    if not result.tradeoffs:
        return
    answers = [METRICS[ANSWERS]] if ANSWERS in result.metrics else []
    table = FigureTable(
        *(Name("arm"), "new-task loss", "equal", "mean forgetting", "worst tenth", *answers, *COSTS.values()),
    )
    unit = unit_of(result.metrics)
    table.title = f"Against no replay, {unit} (95 % intervals, corrected); * : no arm is better in both"
    for each in result.tradeoffs:
        shown = (each.new_task_loss, each.mean, each.worst_tenth, each.lost_answers)
        estimates = [_estimated(e) for e in shown if e is not None]
        equal = "-" if each.equal is None else "yes" if each.equal else "not shown"
        costs = ["-" if cost is None else f"{cost:,.0f}" for cost in each.cost.values()]
        table.add_row(Name(each.arm, " *" * each.on_front), estimates[0], equal, *estimates[1:], *costs)
    yield table
    yield from map(escape, result.advice.sentences)


def _estimated(value: Estimate) -> str:
    if value.lower is None:
        return f"{value.mean:+.3f}"
    return f"{value.mean:+.3f} ({value.lower:+.3f} to {value.upper:+.3f})"


def _comparison_tables(comparisons: Sequence[Comparison], units: tuple[str, str]) -> Iterator[RenderableType]:
    """Yield the differences between arms, and a verdict for each but those in new-task loss.

    `units` are what the differences are between: with one task, and with several.
    """
    if not comparisons:
        return
    count = comparisons[0].difference.pairs
    between = f"{count} {units[comparisons[0].tasks > 1]}"
    gaps = FigureTable(Name("difference"), Words("metric"), "mean", "95 % interval", "p")
    gaps.title = f"Differences over {between}; negative is better; corrected for the number of arms (Student's t)"
    for c in comparisons:
        gap = c.difference
        interval = f"{gap.lower:+.3f} to {gap.upper:+.3f}"
        arms, corrected = f"{c.arm} - {c.baseline}", f"{c.corrected_p:.2g}"
        gaps.add_row(arms, METRICS[c.metric], f"{gap.mean:+.3f}", interval, corrected)
    yield gaps
    for c in comparisons:
        if c.metric != "new_task_loss":
            yield f"On the {METRICS[c.metric]}, {escape(c.verdict())}."
    if count < FEWEST_RANKS:
        yield (
            f"These rest on {between} and on Student's t alone: a test of ranks, which assumes less, takes "
            f"{FEWEST_RANKS}."
        )


def sequence_tables(result: SequenceResult) -> Iterator[RenderableType]:
    """Yield tables of the arms after the last task and after each, and their differences with verdicts."""
    orders = max(len(result.orders(arm)) for arm in result.arms)
    totals = ("replayed", "replayed_earlier", "seconds") if result.memory else ("replayed", "seconds")
    named = {"replayed_earlier": "of earlier tasks"}
    table = FigureTable(
        Name("replay"), *(METRICS[metric] for metric in result.metrics), *(named.get(name, name) for name in totals)
    )
    table.title = (
        f"After {result.length} tasks one after another, mean over {orders} order{'s' if orders > 1 else ''} (nats per "
        f"token; upstream: {result.judged} examples that were never replayed)"
    )
    for arm in result.arms:
        figures = [f"{result.average(arm, metric):.3f}" for metric in result.metrics]
        table.add_row(arm, *figures, *(f"{result.total(arm, name):.0f}" for name in totals))
    yield table
    by_position = FigureTable(Name("tasks learned"), *result.arms)
    by_position.title = "Upstream forgetting after each task: mean (worst tenth)"
    for position in range(1, result.length + 1):
        both = ([result.average(arm, metric, position) for metric in ("mean", "worst_tenth")] for arm in result.arms)
        by_position.add_row(str(position), *(f"{mean:.3f} ({worst:.3f})" for mean, worst in both))
    yield by_position
    of_tasks = FigureTable(Name("tasks learned"), *result.arms)
    of_tasks.title = "Forgetting of the earlier tasks' test examples, since each task was learned"
    for position in range(2, result.length + 1):
        lost = (result.average(arm, "earlier_tasks", position) for arm in result.arms)
        of_tasks.add_row(str(position), *(f"{mean:.3f}" for mean in lost))
    yield of_tasks
    comparisons = result.comparisons()
    yield from _comparison_tables(comparisons, ("orders of the tasks", "orders of the tasks"))
    if needed := _orders_needed(comparisons):
        yield escape(
            "Orders of the tasks that would show a difference as large and as scattered as the one seen, with an even "
            f"chance: {needed}."
        )
    if orders < 2:
        yield f"With one order, arms cannot be compared: use at least two, better {ORDERS}."


def _orders_needed(comparisons: Sequence[Comparison]) -> str:
    """Say how many orders each comparison would need that shows nothing, new-task losses aside."""
    return "; ".join(
        f"{c.arm} - {c.baseline}, {METRICS[c.metric]}, {c.pairs_needed() or f'more than {MOST_PAIRS}'}"
        for c in comparisons
        if not c.better and not c.worse and c.metric != "new_task_loss"
    )


def alpha_table(chosen: ChosenAlpha) -> FigureTable:
    """Return a table of the places between base and tuned model that were tried."""
    table = FigureTable(
        Name("model"), "forgetting of the probes", "new-task loss", "above the tuned model's by at most", ""
    )
    table.title = "Between base (0) and tuned model (1), nats per token"
    for point in chosen.points:
        mark = "chosen" if point.alpha == chosen.alpha else ""
        excess = "-" if point.excess is None else f"{point.excess:+.4f}"
        table.add_row(f"alpha {point.alpha:g}", f"{point.forgetting:+.4f}", f"{point.new_task_loss:.4f}", excess, mark)
    return table


def advice_tables(advice: Advice) -> Iterator[RenderableType]:
    """Yield a table of the expected remaining forgetting by ratio and strategy, and the advice."""
    table = FigureTable(
        *(Name("replay"), "ratio", *(METRICS[metric] for metric in LAW_METRICS)),
        title="Remaining forgetting as a fraction (90 % interval of a run)",
    )
    for (strategy, ratio), remaining in advice.remaining.items():
        cells = (remaining[metric] for metric in LAW_METRICS)
        table.add_row(strategy, ratio_text(ratio), *(f"{e.mean:.2f} ({e.lower:.2f} to {e.upper:.2f})" for e in cells))
    yield table
    for sentence in advice.sentences():
        yield escape(sentence)


def demo_tables(summary: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Yield the demo's summary.json in the order of its stages."""
    forgetting, structure, forecast = summary["forgetting"], summary["structure"], summary["forecast"]
    yield (
        f"{structure['tasks']} fine-tunes of the demo model, each scored on {structure['examples']} upstream examples; "
        f"loss before: {summary['base_loss']:.2f} nats per token"
    )
    tasks = FigureTable(
        Name("task"), "mean forgetting", title=f"Forgetting: {forgetting['mean']:.3f} nats per token on average"
    )
    for name, mean in sorted(forgetting["by_task"].items(), key=lambda item: -item[1]):
        tasks.add_row(Name(name, " (new)" if name in forecast["by_task"] else ""), f"{mean:.3f}")
    yield tasks
    ranks = ", ".join(f"{r2:.2f}" for r2 in structure["rank_r2"][:3])
    yield f"Structure: R^2 {ranks} at ranks 1, 2, 3 (additive {structure['additive_r2']:.2f})"
    table = FigureTable(
        Name("method"), "RMSE", "rank correlation", "top-tenth recall", f"in the {forecast['level']:.0%} interval"
    )
    table.title = (
        f"Forecast of {len(forecast['by_task'])} new tasks from {summary['settings']['probes']} probes, "
        f"judged on {summary['examples']['judged']} other examples"
    )
    for method, figures in forecast["mean"].items():
        table.add_row(
            method,
            f"{figures['rmse']:.3f}",
            f"{figures['spearman']:.2f}",
            f"{figures['recall']:.2f}",
            f"{figures['coverage']:.0%}",
        )
    yield table
    yield from verification_tables(Verification.from_dict(summary["replay"]))
    files = escape(f"{summary['files']['report']}, {summary['files']['atlas']}")
    yield f"Written: {files} ({summary['seconds']:.0f} s)"
