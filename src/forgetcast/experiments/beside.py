"""A reproduction beside the published numbers: sections of sentences and tables, and their Markdown.

Every row of a table says what it is of, because the published matrices, models and runs are other ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from forgetcast.experiments import published
from forgetcast.experiments.reproduce import Completed, Forgotten, ReplayArms, Reproduction
from forgetcast.replay.outcome import METRICS
from forgetcast.similarity import Correlation
from forgetcast.text import markdown_text

PUBLISHED, OURS = "published", "here"

NOT_KNOWN = "-"
"""In place of a figure that is not published, or does not apply."""


@dataclass(frozen=True)
class Section:
    """A part of the page: plain texts, to be escaped by whoever shows them.

    Attributes
    ----------
    title : str
    sentences : tuple of str
        A paragraph each, above the table.
    columns : tuple of str
        Empty if there is no table.
    rows : tuple of tuple of str
    labels : int
        So many of the first columns are texts, the others figures.
    """

    title: str
    sentences: tuple[str, ...]
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    labels: int = 2


def sections(found: Reproduction) -> Iterator[Section]:
    """Yield the parts of the page in their order."""
    yield _protocol(found)
    yield _rank(found)
    if found.forgotten is not None:
        yield _rank_f1(found, found.forgotten)
    yield _correlations(found)
    if found.losses:
        yield _losses(found)
    if found.forgotten is not None and found.forgotten.completion:
        yield _f1(found.forgotten)
    yield _replay(found)
    if found.left_out:
        yield Section("What is left out", tuple(f"{reason}." for reason in found.left_out))


def markdown(found: Reproduction) -> str:
    """Return the page as Markdown, names escaped."""
    lines = [f"# {markdown_text(title(found))}", "", markdown_text(summary(found)), ""]
    for section in sections(found):
        lines += [f"## {markdown_text(section.title)}", ""]
        for sentence in section.sentences:
            lines += [markdown_text(sentence), ""]
        if section.columns:
            lines.append(_row(section.columns))
            lines.append("|" + "---|" * section.labels + "---:|" * (len(section.columns) - section.labels))
            lines += [_row(row) for row in section.rows] + [""]
    return "\n".join(lines)


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(map(markdown_text, cells))} |"


def title(found: Reproduction) -> str:
    """Return the title of the page."""
    return f"The paper's analyses on {found.name}"


def summary(found: Reproduction) -> str:
    """Say what is set beside what."""
    return (
        f"Figures of {_matrix(found)} beside those of {published.CITATION}. A published row is of another matrix, "
        "model or protocol, which it names: compare the pattern, not the digits."
    )


def _matrix(found: Reproduction) -> str:
    structure = found.structure
    part = "" if structure.measured == 1 else f", {structure.measured:.1%} measured"
    return f"{found.name} ({structure.tasks} tasks x {structure.examples:,} examples{part})"


def _protocol(found: Reproduction) -> Section:
    split, settings = found.split, found.settings
    domains = (
        f"known: {len(split.known)}, in domain: {len(split.in_domain)}, out of domain: {len(split.out_of_domain)}; "
        f"{split.origin}"
    )
    if split.unused:
        domains += f"; {split.unused} rows of other families are measured in part or on another base, and unused"
    same = " (the same)"
    rows = (
        ("matrix", published.MATRICES, _matrix(found)),
        ("tasks", "known: 46 of FLAN; in domain: 20 of FLAN; out of domain: all of Tulu and Dolly", domains),
        (
            "probes of a new task",
            f"{published.PROBES}, at random",
            f"{settings.k}, at random{same * (settings.k == published.PROBES)}; and as many chosen ones",
        ),
        (
            "seeds",
            str(published.SEEDS),
            f"{settings.seeds}{same * (settings.seeds == published.SEEDS)}; each also halves the examples",
        ),
        (
            "judged on",
            "all entries that were not measured",
            "the half of the examples that no probe is taken from, so that chosen and random probes are judged on the "
            "same ones",
        ),
        (
            "forgetting",
            "increase of the loss, nats per token; binary: exact match",
            "the matrix's" if found.forgotten is None else f"the matrix's; binary: {found.forgotten.measure}",
        ),
    )
    return Section("Protocol", (), ("what", PUBLISHED, OURS), rows, labels=3)


def _rank(found: Reproduction) -> Section:
    structure = found.structure
    ranks = range(len(published.RANK_R2))
    ours = [f"{structure.rank_r2[i]:.3f}" if i < len(structure.rank_r2) else NOT_KNOWN for i in ranks]
    third = ""
    if len(structure.rank_r2) > 2:
        chance = noise_r2(structure.tasks, structure.examples, 3)
        third = (
            f": {structure.rank_r2[2]:.3f} here, where noise of this size (independent normal entries) has {chance:.2f}"
        )
    sentences = [
        "R^2 of the matrix of rank r that is closest to the whole matrix (truncated singular value decomposition, not "
        "centred), on the entries that it is fitted to, around their grand mean. The formula is the paper's, and the "
        "matrix another one.",
        f"For every model of the paper, rank 3 is above {published.RANK_3_R2}{third}.",
    ]
    if structure.measured < 1:
        sentences.append("Entries that were not measured are left out of the fit and of R^2; the paper has none.")
    if structure.held_out_r2:
        best = int(np.argmax(structure.held_out_r2))
        sentences.append(
            f"On entries that were held out, a tenth at a time, R^2 is highest at rank {best + 1}: "
            f"{structure.held_out_r2[best]:.3f}. No such figure is published."
        )
    return Section(
        "Rank of the matrix: R^2",
        tuple(sentences),
        ("", "of", *(f"rank {i + 1}" for i in ranks), "a_i + b_j"),
        (
            (PUBLISHED, published.RANK_R2_OF, *(f"{value:.3f}" for value in published.RANK_R2), NOT_KNOWN),
            (OURS, _matrix(found), *ours, f"{structure.additive_r2:.3f}"),
        ),
    )


def noise_r2(tasks: int, examples: int, rank: int) -> float:
    """Return R^2 of the best matrix of a rank for independent normal entries: what few rows have without a structure.

    By one draw, of at most 4,096 examples or twenty for each task: with more, it hardly changes.
    """
    few, many = sorted((tasks, examples))
    values = np.random.default_rng(0).normal(size=(few, min(many, max(4096, 20 * few))))
    strengths = np.linalg.eigvalsh(values @ values.T)[::-1]
    return float(strengths[:rank].sum() / strengths.sum())


def _rank_f1(found: Reproduction, forgotten: Forgotten) -> Section:
    ranks = range(len(published.RANK_F1))
    f1 = forgotten.rank_f1
    return Section(
        "Rank of binary forgetting: F1",
        (
            "F1 of the entries that logistic factorisation of rank r gives a probability of at least one half, on the "
            "entries that it is fitted to. F1 rises with the share of what is forgotten: compare it with that of "
            "calling everything forgotten.",
        ),
        ("", "of", *(f"rank {i + 1}" for i in ranks)),
        (
            (PUBLISHED, published.RANK_F1_OF, *(f"{value:.3f}" for value in published.RANK_F1)),
            (
                OURS,
                f"{found.name}, {forgotten.tasks} x {forgotten.examples:,}; forgotten: {forgotten.measure}",
                *(f"{f1[i]:.3f}" if i < len(f1) else NOT_KNOWN for i in ranks),
            ),
        ),
    )


def _correlations(found: Reproduction) -> Section:
    rows = [
        (PUBLISHED, f"{each.model}, {each.similarity}", f"{each.pearson:.3f}", f"{each.spearman:.3f}")
        for each in published.CORRELATIONS
    ]
    gradient = f"gradient products, {published.GRADIENT_CORRELATION}"
    rows.append(("second-hand", gradient, NOT_KNOWN, NOT_KNOWN))
    low, high = published.ROW_CORRELATION
    rows.append(("second-hand", "two tasks' rows of the matrix", f"{low} to {high}", NOT_KNOWN))
    if (each := found.row_correlation) is not None:
        what = f"two tasks' rows of {found.name}: median (quartiles) of {each.pairs:,} pairs"
        rows.append(
            (OURS, what, f"{each.median:.3f} ({each.lower_quartile:.3f} to {each.upper_quartile:.3f})", NOT_KNOWN)
        )
    sentences = ["Correlation of a similarity of task and example with forgetting, over all entries of the matrix."]
    if (study := found.similarity) is None:
        sentences.append(
            "No similarity was computed here: that takes an atlas and the data of its tasks (--similarity, --tasks)."
        )
    else:
        sentences.append(
            f"The intervals here are 95 %, over tasks; at most {study.sample} examples stand for a task where a model "
            "is used."
        )
        sentences += [f"{note}." for note in study.notes]
        rows += [
            (
                OURS,
                f"{each.name} of {found.name}, {each.tasks} x {each.examples:,}",
                _interval(each.cells),
                _interval(each.cells_spearman),
            )
            for each in study.associations
        ]
        winners = ", ".join(dict.fromkeys(study.winners))
        sentences.append(
            "In RMSE and rank correlation, completion from chosen probes "
            + (f"does not clearly beat {winners}." if winners else "clearly beats each forecast from similarity alone.")
        )
    return Section("Correlations", tuple(sentences), ("", "of", "Pearson", "Spearman"), tuple(rows))


def _interval(found: Correlation) -> str:
    if found.value is None:
        return NOT_KNOWN
    return f"{found.value:.3f} ({found.lower:.3f} to {found.upper:.3f})"


def _losses(found: Reproduction) -> Section:
    return Section(
        "Completion of new tasks: RMSE",
        (
            "Root mean squared error in nats per token, of tasks that the methods were not fitted to. The ratio is to "
            "the additive method with random probes, in the same domain, with its 95 % interval over tasks. No "
            "published RMSE is set beside these: the paper completes another matrix, and judges on all that was not "
            "measured.",
            "additive, knn and mf are the paper's three algorithms in this package's form: mf is solved exactly, with "
            "a ridge, where the paper uses stochastic gradient descent without one. The others are this package's own.",
        ),
        ("domain", "method", "probes", "RMSE", "ratio", "rank correlation"),
        tuple(
            (
                each.domain,
                each.method,
                f"{each.k} {each.probes}",
                f"{each.rmse:.4f}",
                f"{each.ratio:.3f} ({each.ratio_lower:.3f} to {each.ratio_upper:.3f})",
                NOT_KNOWN if each.spearman is None else f"{each.spearman:.3f}",
            )
            for each in _ordered(found.losses)
        ),
        labels=3,
    )


def _ordered(rows: tuple[Completed, ...]) -> list[Completed]:
    domains = list(dict.fromkeys(each.domain for each in rows))
    return sorted(rows, key=lambda each: (domains.index(each.domain), each.probes == "chosen"))


def _f1(forgotten: Forgotten) -> Section:
    rows = [(PUBLISHED, published.COMPLETION_F1_OF, NOT_KNOWN, f"{published.COMPLETION_F1:.4f}", NOT_KNOWN)]
    for domain, share in forgotten.shares.items():
        # Every entry is predicted, and every forgotten one a hit.
        rows.append((domain, "calling everything forgotten", NOT_KNOWN, f"{2 * share / (1 + share):.4f}", NOT_KNOWN))
        rows += [
            (
                domain,
                each.method,
                f"{each.k} {each.probes}",
                NOT_KNOWN if each.f1 is None else f"{each.f1:.4f}",
                f"{each.rmse:.4f}",
            )
            for each in _ordered(forgotten.completion)
            if each.domain == domain
        ]
    shares = ", ".join(f"{share:.1%} {domain}" for domain, share in forgotten.shares.items())
    return Section(
        "Completion of new tasks: F1",
        (
            f"Forgotten is {forgotten.measure}: {shares} of the entries to forecast, of {forgotten.tasks} tasks x "
            f"{forgotten.examples:,} examples. An entry is predicted to be forgotten at a forecast of at least one "
            "half; F1 is over all judged entries of a seed, and then the mean over seeds. The error is that of the "
            "forecast as a probability (RMSE). As in the paper, the methods know the entries as 0 and 1 only.",
        ),
        ("domain", "method", "probes", "F1", "error"),
        tuple(rows),
        labels=3,
    )


def _replay(found: Reproduction) -> Section:
    base = published.REPLAY["none"]
    ratio = f"1/{1 / published.REPLAY_RATIO:.0f}"
    rows: list[tuple[str, ...]] = [
        (
            PUBLISHED,
            f"{arm}, {published.REPLAY_OF}",
            ratio,
            METRICS["mean"],
            f"{value - base:+.4f}",
            NOT_KNOWN,
            NOT_KNOWN,
        )
        for arm, value in published.REPLAY.items()
        if arm != "none"
    ]
    rows += [row for arms in found.replay for row in _replay_rows(found, arms)]
    sentences = [
        "Replay is compared as a difference from the same fine-tune without replay, nats per token; below zero is "
        "better. The levels are not comparable: model, tasks, training and judged examples are other ones. The "
        "published differences are of the mean log-perplexities of its project page, without intervals.",
    ]
    if found.replay:
        sentences.append(
            "Intervals and p-values here are of one test, Student's t on the tasks' means (of one task: on its seeds), "
            "corrected for the number of arms at the ratio (Holm); an arm with a single pair has none."
        )
        sentences += [
            f"At {arms.ratio:.4g}, on the {METRICS[c.metric]}: {c.verdict()}."
            for arms in found.replay
            for c in arms.comparisons()
            if c.baseline == "random" and c.metric != "new_task_loss"
        ]
    else:
        sentences.append(
            f"{found.name} has no fine-tunes with and without replay; an atlas keeps those of pilot and verify."
        )
    columns = ("", "replay", "ratio", "metric", "minus none", "95 % interval", "p, corrected")
    return Section("Replay", tuple(sentences), columns, tuple(rows), labels=4)


def _replay_rows(found: Reproduction, arms: ReplayArms) -> Iterator[tuple[str, ...]]:
    for arm in arms.arms:
        if arm == "none":
            continue
        for metric in arms.metrics:
            pairs = arms.pairs(arm, metric)
            compared = arms.compare(arm, "none", metric)
            gap = None if compared is None else compared.difference
            yield (
                OURS,
                f"{arm}, {found.name}, {len(pairs)} pair{'s' * (len(pairs) > 1)}",
                f"{arms.ratio:.4g}",
                METRICS[metric],
                f"{np.mean(pairs) if gap is None else gap.mean:+.4f}",
                NOT_KNOWN if gap is None else f"{gap.lower:+.4f} to {gap.upper:+.4f}",
                NOT_KNOWN if compared is None else f"{compared.corrected_p:.2g}",
            )
