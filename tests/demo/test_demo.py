from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from forgetcast import Atlas, DataError, MismatchError, Pool, ReplayPlan, Scores, load_task
from forgetcast.cli import out
from forgetcast.cli.tables import demo_tables
from forgetcast.completion.forecast import TaskForecast
from forgetcast.demo.corpus import SOURCES, demo_pool, documents
from forgetcast.demo.run import FULL, STANDARD, DemoSettings, run_demo
from forgetcast.evaluation import paired_difference, worst_tenth
from forgetcast.experiments.procedural import KNOWN_TASKS, NEW_TASKS, procedural_task

SMALL = DemoSettings(
    known=4, new=2, examples=56, task_size=32, test_size=8, steps=4, batch_size=4, probes=5, ratio=0.5, seeds=2
)


@pytest.fixture(scope="module")
def progress() -> list[tuple[int, int]]:
    """Steps done and in total, as the demo's run reports them."""
    return []


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, progress: list[tuple[int, int]]) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_demo(folder, SMALL, on_progress=lambda _, done, total: progress.append((done, total)))


def test_every_output_is_there(demo: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = demo
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert "Did replay help?" in (folder / "report.html").read_text()
    atlas = Atlas.open(folder / "demo.atlas")
    assert set(atlas.tasks) == {*KNOWN_TASKS[:4], *NEW_TASKS[:2]}
    assert atlas.matrix().observed.all()
    assert len(Pool.load(folder / "probes.jsonl")) == 5


def test_summary_agrees_with_the_files(demo: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = demo
    atlas = Atlas.open(folder / "demo.atlas")
    values = atlas.matrix().values.astype(float)
    assert summary["base_loss"] == pytest.approx(atlas.before.nll.mean())
    assert summary["forgetting"]["mean"] == pytest.approx(values.mean(), rel=1e-5)
    for name, row in zip(atlas.tasks, values, strict=True):
        assert summary["forgetting"]["by_task"][name] == pytest.approx(row.mean(), rel=1e-5)
    total = ((values - values.mean()) ** 2).sum()
    left, strength, right = np.linalg.svd(values, full_matrices=False)
    for rank in (1, 2, 3):
        fit = (left[:, :rank] * strength[:rank]) @ right[:rank]
        found = summary["structure"]["rank_r2"][rank - 1]
        assert found == pytest.approx(1 - ((values - fit) ** 2).sum() / total, abs=1e-6)
    name = NEW_TASKS[0]
    forecast = TaskForecast.load(folder / "forecasts" / f"{name}.parquet")
    plan = ReplayPlan.load(folder / "plans" / f"{name}.parquet")
    truth = values[atlas.tasks.index(name)]
    figures = summary["forecast"]["by_task"][name]["forecast"]
    assert figures["rmse"] == pytest.approx(np.sqrt(np.mean((truth - forecast.mean)[plan.held_out] ** 2)), rel=1e-5)
    inside = (forecast.lower <= truth) & (truth <= forecast.upper)
    assert figures["coverage"] == pytest.approx(inside[plan.held_out].mean())
    assert set(summary["forecast"]["mean"]) == {"forecast", "additive", "column mean"}
    # The column mean by hand: it looks at no probe.
    means = values[[atlas.tasks.index(known) for known in KNOWN_TASKS[:4]]].mean(axis=0)
    by_hand = np.sqrt(np.mean((truth - means)[plan.held_out] ** 2))
    assert summary["forecast"]["by_task"][name]["column mean"]["rmse"] == pytest.approx(by_hand, rel=1e-5)


def test_replay_is_judged_on_what_was_neither_replayed_nor_probed(demo: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = demo
    probed = set(Pool.load(folder / "probes.jsonl").ids)
    before = Atlas.open(folder / "demo.atlas").before
    runs = {(run["task"], run["arm"], run["seed"]): run for run in summary["replay"]["runs"]}
    assert len(runs) == 2 * 3 * 2
    for (task, arm, seed), run in runs.items():
        plan = ReplayPlan.load(folder / "plans" / f"{task}.parquet")
        scores = Scores.load(folder / "runs" / f"{task}.{arm}.{seed}.parquet")
        assert scores.ids == plan.held_out_ids
        assert not probed & set(scores.ids)
        assert not plan.weights[plan.held_out].any()
        forgetting = scores.nll - before.at(scores.ids)
        assert run["mean"] == pytest.approx(forgetting.mean())
        assert run["worst_tenth"] == pytest.approx(worst_tenth(forgetting))
        assert run["replayed"] == (0 if arm == "none" else 8)
    # The tasks are what is independent; against random replay there is one arm, and nothing to correct for.
    of_tasks = (
        [np.mean([runs[t, arm, s]["mean"] for s in (0, 1)]) for t in NEW_TASKS[:2]] for arm in ("top", "random")
    )
    gaps = {(c["arm"], c["baseline"], c["metric"]): c for c in summary["replay"]["comparisons"]}
    expected = paired_difference(*of_tasks)
    found = gaps["top", "random", "mean"]
    assert (found["mean"], found["lower"], found["upper"]) == pytest.approx(
        (expected.mean, expected.lower, expected.upper)
    )
    says_better = found["verdict"] == "top replay is better than random"
    assert says_better == (expected.upper < 0)


def test_what_is_printed(demo: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    _, summary = demo
    for part in demo_tables(summary):
        out.print(part)
    printed = " ".join(capsys.readouterr().out.split())
    for number in (summary["forgetting"]["mean"], *summary["forgetting"]["by_task"].values()):
        assert f"{number:.3f}" in printed
    for figures in summary["forecast"]["mean"].values():
        assert f"{figures['rmse']:.3f}" in printed


def test_second_run_reuses_all_results(demo: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = demo
    kept = [folder / "pool.jsonl", folder / "demo.atlas" / "atlas.json", *(folder / "runs").iterdir()]
    times = {file: file.stat().st_mtime_ns for file in kept}
    again = run_demo(folder, SMALL)
    assert {file: file.stat().st_mtime_ns for file in kept} == times
    assert {**again, "seconds": 0} == {**summary, "seconds": 0}
    with pytest.raises(MismatchError, match="other settings"):
        run_demo(folder, SMALL.model_copy(update={"steps": 5}))


@pytest.mark.usefixtures("demo")
def test_progress_ends_at_its_total(progress: list[tuple[int, int]]) -> None:
    assert all(a[0] <= b[0] for a, b in pairwise(progress))
    assert 0.9 < progress[-1][0] / progress[-1][1] <= 1


def test_pool_is_deterministic_and_balanced_over_sources() -> None:
    pool = demo_pool(35)
    assert pool.fingerprint == demo_pool(35).fingerprint
    assert set(Counter(pool.sources).values()) == {5}
    assert set(pool.sources) == set(SOURCES)
    assert all(160 <= len(example.full_text) <= 360 for example in pool)
    with pytest.raises(DataError, match="unknown source"):
        documents("the web")


def test_tasks_are_deterministic() -> None:
    for name in (KNOWN_TASKS[0], NEW_TASKS[2], "bf"):  # "bf" writes to the standard output as it is made
        assert list(procedural_task(name, 3)) == list(procedural_task(name, 3))
        assert list(procedural_task(name, 3)) != list(procedural_task(name, 3, seed=1))


def test_tasks_survive_their_files(tmp_path: Path) -> None:
    task = procedural_task(KNOWN_TASKS[0], 4)
    task.save(tmp_path / "task.jsonl")
    assert list(load_task(tmp_path / "task.jsonl")) == list(task)


def test_sizes_of_the_demo() -> None:
    assert not set(KNOWN_TASKS) & set(NEW_TASKS)
    assert STANDARD.known + STANDARD.new == 16
    assert FULL.known + FULL.new == 40


@pytest.mark.parametrize("wrong", [{"known": 1}, {"known": 37}, {"new": 0}, {"new": 5}, {"ratio": 0.0}, {"taskz": 3}])
def test_invalid_settings_are_rejected(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        DemoSettings(**wrong)


@pytest.mark.slow
def test_every_task_of_the_full_demo_can_be_made() -> None:
    for name in (*KNOWN_TASKS, *NEW_TASKS):
        assert len(procedural_task(name, 400)) == 400
