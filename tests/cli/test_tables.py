"""Every table that a command prints, on long names and awkward numbers: no figure is cut on a narrow terminal."""

from __future__ import annotations

import inspect
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from forgetcast import Atlas, Example, Pool, probes
from forgetcast.cli import tables
from forgetcast.cli.app import _Console, out
from forgetcast.cli.columns import Beginning, FigureTable, Name
from forgetcast.completion import Bayesian
from forgetcast.experiments import AlphaPoint, ChosenAlpha
from forgetcast.experiments.add import Outcome
from forgetcast.experiments.dry_run import DryRow, DryRun, PoolSize, SweepSpeed
from forgetcast.replay.law import Advice, Expected
from forgetcast.text import shorten
from support.cli import run_command
from support.data import make_scores, planted
from support.long_names import ARMS, TASK, long_pool, sequence, verification

WIDTHS = (60, 80, 120)
WHOLE = 1000
"""A terminal so wide that nothing is shortened."""

N, SOURCES, TASKS = 48, 8, 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An atlas, data of its tasks, scores of probes and of two models, all with long names."""
    folder = tmp_path_factory.mktemp("tables")
    pool = long_pool(N, SOURCES)
    pool.save(folder / "pool.jsonl")
    before = make_scores(pool, np.full(N, 30.0))
    before.save(folder / "before.parquet")
    atlas = Atlas.create(folder / "runs.atlas", pool, before, model="some-organisation/some-model-with-a-long-name-7B")
    (folder / "tasks").mkdir()
    for i, row in enumerate(3 * planted(TASKS, N, 2, 0.8) - 2):
        atlas.add(name := TASK.format(i), make_scores(pool, 30.0 + row))
        texts = [Example(f"{j}", prompt=f"question {i} {j}", completion=f" answer {i * j}") for j in range(4)]
        Pool(texts).save(folder / "tasks" / f"{name}.jsonl")
    new = np.where(np.arange(N) % 5, 1e-5, -7.5) + 3 * planted(1, N, 2, 0.8, seed=5)[0]
    make_scores(pool, 30.0 + new).save(folder / "after.parquet")
    at = probes.choose(Bayesian().fit(atlas.matrix()), 16)
    part = pool.subset(pool.ids[i] for i in at)
    make_scores(part, 30.0 + new[at], audit=12).save(folder / "probes.parquet")
    return folder


def expected(mean: float) -> Expected:
    return Expected(mean, mean - 0.12, mean + 12.34)


def advice() -> Advice:
    remaining = {
        (arm, ratio): {metric: expected(ratio) for metric in ("mean", "worst_tenth")}
        for arm in ARMS[1:]
        for ratio in (1 / 128, 1 / 8)
    }
    efficiency = {arm: {metric: expected(1.5) for metric in ("mean", "worst_tenth")} for arm in ARMS[2:]}
    return Advice(ARMS[3], TASK.format(0), 0.5, 12, 3, 0.125, remaining, efficiency, expected(0.2), expected(0.1))


def sweep() -> DryRun:
    rows = [DryRow(TASK.format(i), "a", 0, "to do", 12345, 123456, 12345678, 1234) for i in range(3)]
    done = DryRow(TASK.format(3), "d", 0, "complete", 12345, 123456, 12345678, 0)
    pool = PoolSize(1234567, 123456789, 12, 3)
    run = DryRun("some/where/runs.atlas", "m", "to do", pool, (*rows, done), 1234, 64, 1.0, 0)
    return run.timed(SweepSpeed(scored_token=1e-5, setup=1.0, trained_token=1e-4))


def demo_summary() -> dict[str, Any]:
    accuracy = {"rmse": -0.092, "spearman": -0.71, "recall": 0.51, "coverage": 0.92}
    tasks = {TASK.format(i): -0.001 * i for i in range(4)}
    return {
        "forgetting": {"mean": 0.1, "by_task": tasks},
        "structure": {"tasks": 40, "examples": 600, "rank_r2": [0.5, 0.6, 0.7], "additive_r2": -0.1},
        "forecast": {
            "level": 0.9,
            "by_task": {TASK.format(1): {}},
            "mean": dict.fromkeys(("forecast", "column mean"), accuracy),
        },
        "settings": {"probes": 10},
        "examples": {"judged": 300},
        "base_loss": 3.5,
        "replay": verification().as_dict(),
        "files": {"report": "demo-output/report.html", "atlas": "demo-output/demo.atlas"},
        "seconds": 123.4,
    }


VIEWS: dict[str, Callable[[Path], Sequence[object]] | Callable[[], Iterable[Any]]] = {
    # Commands, from their files.
    "atlas_tables": lambda d: ("atlas", "info", d / "runs.atlas"),
    "structure_tables": lambda d: ("analyze", d / "runs.atlas"),
    "association_tables": lambda d: (
        "analyze",
        d / "runs.atlas",
        "--similarity",
        "tfidf,length",
        "--tasks",
        d / "tasks",
    ),
    "difference_tables": lambda d: ("diff", d / "before.parquet", d / "after.parquet", "--pool", d / "pool.jsonl"),
    "whole_table": lambda d: ("forecast", d / "runs.atlas", "--scores", d / "probes.parquet", "-o", d / "f.parquet"),
    "bench_table": lambda d: ("bench", d / "runs.atlas", "-k", "5", "--seeds", 1),
    "study_tables": lambda d: (
        *("bench", d / "runs.atlas", "-k", 5, "--seeds", 1, "--methods", "additive"),
        *("--similarity", "tfidf,length", "--tasks", d / "tasks"),
    ),
    "facts_table": lambda d: ("plan", d / "runs.atlas", "--strategy", "top", "-o", d / "plan.parquet"),
    "strategies": lambda _: ("strategies",),
    # Of commands that train, what they print.
    "added_tables": lambda: tables.added_tables(
        "some/where/runs.atlas",
        [
            Outcome(TASK.format(0), "m", "added", 1234, -12.3456, 1234.5, mean_of=1234, examples=1234),
            Outcome(TASK.format(2), "m", "added", 30, 0.1234, 12.5, mean_of=30, examples=1234),
            Outcome(TASK.format(1), "m", "failed", reason="the adapter is of another base model, which is not here"),
        ],
    ),
    "dry_run_tables": lambda: tables.dry_run_tables(sweep()),
    "runs_table": lambda: [
        tables.runs_table(
            {TASK.format(i): {"loss": 12.345, "training": 123456, "scoring": 1e6, "forgetting": -1e-3} for i in "ab"}
        )
    ],
    "verification_tables": lambda: tables.verification_tables(verification()),
    "sequence_tables": lambda: tables.sequence_tables(sequence()),
    "alpha_table": lambda: [
        tables.alpha_table(
            ChosenAlpha(
                0.5, tuple(AlphaPoint(a, 0.123 * a, 2.5 - a, None if a == 1 else 0.01) for a in (0.5, 1.0)), 0.02, 99
            )
        )
    ],
    "advice_tables": lambda: tables.advice_tables(advice()),
    "demo_tables": lambda: tables.demo_tables(demo_summary()),
}
WITH = {"robust_bench_table": "bench_table", "risk_table": "whole_table", "tradeoff_tables": "verification_tables"}
"""Tables that are printed by the view of another."""


@pytest.fixture(scope="module")
def shown(folder: Path) -> Callable[[str, int], list[str]]:
    """Return the lines that a view prints on a terminal of a width; the command itself runs once."""

    @cache
    def printed(view: str) -> list[Any]:
        make = VIEWS[view]
        if not inspect.signature(make).parameters:
            return [mock.call(part) for part in make()]
        with mock.patch.object(out, "print") as prints:
            code, _, err = run_command(*make(folder))
        assert code == 0, err
        return prints.call_args_list

    def lines(view: str, width: int) -> list[str]:
        console = _Console()
        console.width, console.file = width, io.StringIO()
        for call in printed(view):
            Console.print(console, *call.args, **call.kwargs)  # sentences are wrapped, as on a terminal
        return console.file.getvalue().splitlines()

    return lines


def rows(lines: Iterable[str]) -> Iterator[list[str]]:
    """Yield the cells of every line that has several."""
    for line in lines:
        cells = re.split(r"\s{2,}", re.sub("[│┃]", "  ", line).strip())
        if len(cells) > 1 and not set(line) <= set("─ ┏┓┗┛━┳┻┡┩╇└┘┴├┤┼"):
            yield cells


def is_figure(cell: str) -> bool:
    return re.match(r"[-+(]?\d|takes \d|no interval", cell) is not None


def short_for(short: str, name: str) -> bool:
    """Whether a name is shown, whole or without some of its parts."""
    said = re.sub(r"( \(\w+\))+$", "", short)  # what stays beside a name is not a part of it
    if "…" not in short:
        return short == name
    name = re.sub(r"( \(\w+\))+$", "", name)
    return re.fullmatch(".*".join(map(re.escape, said.split("…"))), name) is not None


def test_every_table_is_looked_at() -> None:
    printing = {name for name in vars(tables) if re.fullmatch(r"[a-z]\w*_tables?", name)}
    assert printing == VIEWS.keys() - {"strategies"} | WITH.keys()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("view", VIEWS)
def test_every_figure_is_on_the_line_of_its_name(view: str, width: int, shown: Callable[[str, int], list[str]]) -> None:
    whole, lines = list(rows(shown(view, WHOLE))), shown(view, width)
    assert [line for line in lines if cell_len(line) > width] == []
    narrow = list(rows(lines))
    looked_at = 0
    for name, *cells in whole:
        figures = [cell for cell in cells if is_figure(cell)]
        lines_of = [cells for short, *cells in narrow if short_for(short, name)]
        if is_figure(name):  # headings, such as "95 % interval"
            continue
        for figure in figures:
            assert any(figure in cells for cells in lines_of), (name, figure)
            looked_at += 1
    assert looked_at >= 3 or view == "strategies"


def test_a_text_is_cut_at_its_end() -> None:
    table = FigureTable(Name("id"), "figure", Beginning("text"))
    table.add_row("a", "1", "the quick brown fox jumps over the lazy dog")
    console = _Console()
    console.width, console.file = 32, io.StringIO()
    console.print(table)
    assert console.file.getvalue().splitlines()[-1] == "a        1  the quick brown fox…"


@pytest.mark.parametrize("view", ["whole_table", "difference_tables"])
def test_examples_are_shown_with_how_their_texts_begin(view: str, shown: Callable[[str, int], list[str]]) -> None:
    """An id may be a hash, which says nothing."""
    found = [re.search(r"section-(\d+).* text (\d+) of it\s*$", line) for line in shown(view, WHOLE)]
    assert [match[1] == match[2] for match in found if match] == [True] * 10


def test_what_is_measured_as_a_whole_has_no_word_on_calibration(folder: Path) -> None:
    scored = ("forecast", folder / "runs.atlas", "-o", folder / "all.parquet", "--scores")
    assert "could be left out to calibrate" in run_command(*scored, folder / "probes.parquet")[1]
    assert "could be left out to calibrate" not in run_command(*scored, folder / "after.parquet")[1]


@given(
    st.lists(st.text(st.sampled_from("abc日本 "), max_size=40).map(str.strip), max_size=8, unique=True),
    st.integers(8, 30),
)
def test_shortened_names_fit_and_differ(names: list[str], width: int) -> None:
    short = shorten(names, width)
    assert all(cell_len(text) <= width for text in short)
    assert len(set(short)) == len(names)
    for name, text in zip(names, short, strict=True):
        assert text == name if cell_len(name) <= width and "…" not in text else short_for(text, name)


def test_a_shortened_name_keeps_its_ends() -> None:
    assert shorten(["numpy-docs/a/very/long/path.py:function"], 21) == ["numpy-docs…y:function"]
    assert shorten(["aaaa-1-bbbbbbbb", "aaaa-2-bbbbbbbb", "c", "aaaa-1-bbbbbbbb"], 8) == [
        "…a-1-bb…",
        "…a-2-bb…",
        "c",
        "…a-1-bb…",
    ]


def test_cells_are_shown_as_they_are_written() -> None:
    table = FigureTable(Name("[red]name"), "figure", title="[bold]title :warning:")
    table.add_row("\x1b[31m[red]x[/red]", "[1]")
    console = _Console()
    console.width, console.file = 80, io.StringIO()
    console.print(table)
    assert console.file.getvalue().splitlines() == [
        "",
        "[bold]title :warning:",
        "[red]name               figure",
        "─" * 30,
        "\\u001b[31m[red]x[/red]     [1]",
    ]
