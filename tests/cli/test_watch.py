"""`train --watch` and the plot of what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from forgetcast import Atlas, ReplayPlan
from forgetcast.completion import Bayesian
from forgetcast.completion.watch import WatchedRun
from forgetcast.lm import FineTuner, ForgettingMonitor, MonitorSelector, Recipe
from support.cli import RunCommand
from support.data import make_pool
from support.models import save, tiny
from support.plans import plan_for
from support.training import POOL, TASK, make_recipe, measured_atlas

PLANNED = ("--recipe", "recipe.yaml", "--revise")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watch")
    save(tiny(), folder / "model")
    save(tiny(seed=1), folder / "other")
    TASK.save(folder / "task.jsonl")
    (folder / "recipe.yaml").write_text(make_recipe(steps=6, max_length=96, learning_rate=1e-2).model_dump_json())
    atlas, other = measured_atlas(folder), make_pool(41)
    forecast = Bayesian().fit(atlas).predict([], []).mean
    plan_for(POOL, "top", 0.5, held_out=POOL.ids[:8], forecast=forecast).save(folder / "plan.parquet")
    plan_for(other, "top", 0.5, forecast=np.zeros(41)).save(folder / "other.parquet")
    POOL.save(folder / "pool.jsonl")
    other.save(folder / "other.jsonl")
    return folder


@pytest.mark.filterwarnings("always::UserWarning")  # the command line prints them
def test_a_training_is_watched_stopped_and_shown(work: Path, run: RunCommand) -> None:
    words = ("train", work / "model", work / "task.jsonl", "--recipe", work / "recipe.yaml", "--json")
    watch = ("--watch", work / "a.atlas", "--watch-every", 2, "--probes", 12)
    assert run(*words, "-o", work / "plain")[0] == 0
    code, out, err = run(*words, *watch, "-o", work / "watched")
    assert code == 0, err
    plain, watched = (load_file(work / name / "model.safetensors") for name in ("plain", "watched"))
    assert all(torch.equal(value, plain[name]) for name, value in watched.items())
    series = WatchedRun.load(work / "watched" / "forgetting.json")
    assert (series.name, series.steps, len(series.probes)) == ("task", 6, 12)
    assert [reading.step for reading in series.readings] == [0, 2, 4, 6]
    facts = json.loads(out)
    last = series.readings[-1].figures["mean"]
    assert [facts["forgetting"], facts["forgetting_lower"], facts["forgetting_upper"]] == [
        pytest.approx(each) for each in (last.value, last.lower, last.upper)
    ]
    code, out, err = run(*words, *watch, "--stop-if", "upper > -9", "-o", work / "stopped")
    assert code == 0, err
    assert err.count("warning: the training is stopped at step 2: forgetting upper > -9") == 1
    facts = json.loads(out)
    assert facts["steps"] == 2
    assert facts["stopped"].startswith("step 2: forgetting upper > -9 (")
    files = [work / name / "forgetting.json" for name in ("watched", "stopped")]
    code, _, err = run("report", work / "a.atlas", "--watch", files[0], "--watch", files[1], "-o", work / "r.html")
    assert code == 0, err
    page = (work / "r.html").read_text()
    assert "Fine-tunes while they ran" in page
    assert "It was stopped early at step 2: forgetting upper &gt; -9" in page
    assert page.count("Forgetting during a fine-tune") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--stop-if", "lower > .1"), "give an atlas with --watch too"),
        (
            ("--watch", "a.atlas", "--stop-if", "most > .1"),
            "'most > .1': there is no figure 'most' here; there are lower",
        ),
        (("--watch", "none.atlas"), "none.atlas: there is no such atlas"),
        (("--watch", "a.atlas", "--revise"), "--revise needs --watch, and --plan with --pool"),
        (
            (*PLANNED, "--plan", "plan.parquet", "--pool", "pool.jsonl"),
            "--revise needs --watch",
        ),
        (
            (*PLANNED, "--plan", "other.parquet", "--pool", "other.jsonl", "--watch", "a.atlas"),
            "the replay plan belongs to another pool",
        ),
    ],
)
def test_what_cannot_be_watched_is_refused_before_the_model_is_loaded(
    work: Path, run: RunCommand, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(work)
    monkeypatch.setattr("forgetcast.cli.train.load_tuner", lambda *_, **__: pytest.fail("the model is loaded"))
    code, _, err = run("train", "model", "task.jsonl", *words, "-o", "refused")
    assert code == 2
    assert message in err


@pytest.mark.filterwarnings("always::UserWarning")
def test_replay_is_revised_at_every_look(work: Path, run: RunCommand) -> None:
    words = ("train", work / "model", work / "task.jsonl", "--recipe", work / "recipe.yaml", "--json")
    words += ("--plan", work / "plan.parquet", "--pool", work / "pool.jsonl", "--watch", work / "a.atlas")
    code, out, err = run(*words, "--watch-every", 3, "--probes", 12, "--revise", "-o", work / "revised")
    assert code == 0, err
    assert json.loads(out)["held_out_replayed"] == 0
    atlas, plan = Atlas.open(work / "a.atlas"), ReplayPlan.load(work / "plan.parquet")
    monitor = ForgettingMonitor(atlas, probes=12, every=3)
    tuned = FineTuner(tiny()).tune(
        TASK,
        Recipe.load(work / "recipe.yaml"),
        plan=plan,
        pool=POOL,
        selector=MonitorSelector(monitor),
        callbacks=[monitor],
    )
    facts = json.loads((work / "revised" / "replayed.json").read_text())
    assert facts["replayed"] == list(tuned.replayed) != list(plan.order(len(tuned.replayed)))
    assert not set(facts["replayed"]) & set(WatchedRun.load(work / "revised" / "forgetting.json").probes)


def test_another_base_is_refused(work: Path, run: RunCommand) -> None:
    words = ("--recipe", work / "recipe.yaml", "--watch", work / "a.atlas", "-o", work / "refused")
    code, _, err = run("train", work / "other", work / "task.jsonl", *words)
    assert code == 2
    assert "was measured on another base model" in err


def test_a_file_that_is_no_watched_run_is_refused(work: Path, run: RunCommand) -> None:
    (work / "bad.json").write_text('{"name": "a", "steps": 3}')
    code, _, err = run("report", work / "a.atlas", "--watch", work / "bad.json", "-o", work / "r.html")
    assert code == 2
    assert "bad.json: this is not a watched run" in err
