from __future__ import annotations

import copy
import json
import os
import signal
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forgetcast import Atlas, ConfigError, DataError, Example, MismatchError, Pool
from forgetcast.experiments.collect import CollectConfig
from forgetcast.files import with_digest
from forgetcast.lm import FineTuner, Recipe, exact_match, score
from support.cli import RunCommand
from support.data import make_pool
from support.experiments import collect_into
from support.models import tiny
from support.training import QUESTIONS, TASKS, Interruption, make_recipe, stop_at

RECIPE = make_recipe()


def test_the_atlas_holds_after_minus_before(tmp_path: Path) -> None:
    base, pool = tiny(), make_pool()
    atlas = collect_into(tmp_path / "a.atlas", base, pool, TASKS, RECIPE)
    assert atlas.tasks == tuple(TASKS)
    np.testing.assert_allclose(atlas.before.nll, score(base, pool).nll)
    tuned = FineTuner(tiny()).tune(TASKS["naming"], RECIPE).language_model
    expected = score(tuned, pool).nll - score(tiny(), pool).nll
    row = atlas.matrix(["naming"]).values[0]
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(row, expected, atol=1e-5)
    kept = atlas.provenance("naming")
    assert kept["recipe"] == RECIPE.model_dump()
    assert kept["model_hash"] not in (None, atlas.model_hash)


def test_interrupted_collection_resumes(tmp_path: Path) -> None:
    pool = make_pool()
    with pytest.raises(Interruption):
        collect_into(tmp_path / "a.atlas", tiny(), pool, TASKS, RECIPE, on_progress=stop_at("spelling"))
    assert Atlas.open(tmp_path / "a.atlas").tasks == ("adding", "naming")
    done: list[str] = []
    atlas = collect_into(
        tmp_path / "a.atlas", tiny(), pool, TASKS, RECIPE, on_progress=lambda what, *_: done.append(what)
    )
    assert {what.partition(":")[0] for what in done} == {"spelling"}
    straight = collect_into(tmp_path / "b.atlas", tiny(), pool, TASKS, RECIPE)
    np.testing.assert_allclose(atlas.matrix().values, straight.matrix().values, atol=1e-6)


@pytest.mark.parametrize(("number", "answers"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_signal_at_any_stage_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, answers: bool
) -> None:
    """Signals one after another, in each stage; what comes out is what an uninterrupted run gives."""
    monkeypatch.setattr(sys.modules["forgetcast.lm.score"], "BATCH_TOKENS", 64)  # so that there are several batches
    pool, tasks = Pool([*QUESTIONS, *make_pool(30)]), {"adding": TASKS["adding"]}
    options: dict[str, Any] = {"exact_match": answers, "max_new_tokens": 2}
    path, before = tmp_path / "a.atlas", signal.signal(signal.SIGTERM, signal.default_int_handler)
    places = ["base model: scoring", "adding: fine-tuning", "adding: scoring"]
    if answers:
        places = [*places[:1], "base model: answering", *places[1:], "adding: answering"]
    seen: list[str] = []

    def interrupt(at: str) -> Any:
        def on_progress(what: str, *_: int) -> None:
            seen.append(what)
            if what == at:
                os.kill(os.getpid(), number)

        return on_progress

    try:
        for place in places:
            with pytest.raises(KeyboardInterrupt):
                collect_into(path, tiny(), pool, tasks, RECIPE, **options, on_progress=interrupt(place))
    finally:
        signal.signal(signal.SIGTERM, before)
    figures: dict[str, float] = {}
    shown = {"on_progress": interrupt("nowhere"), "on_figures": lambda _, found: figures.update(found)}
    atlas = collect_into(path, tiny(), pool, tasks, RECIPE, **options, **shown)
    assert {"forgetting", "training"} <= figures.keys()
    assert "scoring" not in figures  # how long the rest took says no speed
    assert seen.count("adding: fine-tuning") == RECIPE.steps  # none was taken twice
    # Each start said so, before its first step: the run before would stand there.
    assert seen.index("adding: starting") < seen.index("adding: fine-tuning")
    assert atlas.provenance("adding")["cost"]["scoring"]["seconds"] is None  # known of a part of them only
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.atlas"]
    straight = collect_into(tmp_path / "b.atlas", tiny(), pool, tasks, RECIPE, **options)
    np.testing.assert_allclose(atlas.nll_before, straight.nll_before, atol=1e-6)
    np.testing.assert_allclose(atlas.matrix().values, straight.matrix().values, atol=1e-6)
    assert atlas.provenance("adding")["model_hash"] == straight.provenance("adding")["model_hash"]  # bit by bit
    assert atlas.before.predictions == straight.before.predictions


def test_forgetting_by_exact_match(tmp_path: Path, run: RunCommand) -> None:
    """Oracle: the answers of the base model and of each tuned model, asked for by hand."""
    teach = Recipe(steps=80, learning_rate=1e-2, batch_size=8, max_length=48)
    base = FineTuner(tiny()).tune(QUESTIONS, teach).language_model
    pool = Pool([*QUESTIONS, Example("unknown", prompt="Item 9 is", completion=" nothing"), *make_pool(3)])
    # Other answers to some of the questions.
    tasks = {
        name: Pool([Example(f"{i}", prompt=f"Item {i} is", completion=" z") for i in items])
        for name, items in (("early", range(3)), ("middle", range(3, 6)), ("late", range(6, 8)))
    }
    recipe = Recipe(steps=8, learning_rate=1e-2, batch_size=2, max_length=48)
    with pytest.raises(Interruption):
        collect_into(tmp_path / "a.atlas", copy.deepcopy(base), pool, tasks, recipe, exact_match=True, max_new_tokens=4,
            on_progress=stop_at("late: answering"),
        )  # fmt: skip
    options: dict[str, Any] = {"exact_match": True, "max_new_tokens": 4}
    atlas = collect_into(tmp_path / "a.atlas", copy.deepcopy(base), pool, tasks, recipe, **options)
    right = exact_match(copy.deepcopy(base), pool, max_new_tokens=4)[0]
    assert (right[:8] == 1).all()
    matrix = atlas.matrix(measure="exact_match")
    assert matrix.examples == QUESTIONS.ids
    for name, task_ in tasks.items():
        tuned = FineTuner(copy.deepcopy(base)).tune(task_, recipe).language_model
        expected = 1 - exact_match(tuned, pool, max_new_tokens=4)[0][:8]
        np.testing.assert_array_equal(matrix.values[matrix.tasks.index(name)], expected)
    assert 0 < matrix.values.mean() < 1
    always = collect_into(
        tmp_path / "b.atlas", copy.deepcopy(base), pool, tasks, recipe, **options, metric=lambda *_: 1.0
    )
    np.testing.assert_array_equal(always.matrix(measure="exact_match").values, 0)
    for wrong in ({}, {"exact_match": True, "max_new_tokens": 5}):
        with pytest.raises(MismatchError, match="exact_match: true and max_new_tokens: 4"):
            collect_into(tmp_path / "a.atlas", copy.deepcopy(base), pool, tasks, recipe, **wrong)
    code, out, _ = run("analyze", tmp_path / "a.atlas", "--exact-match", "--json")
    assert code == 0
    assert json.loads(out)["mean_by_task"] == {n: matrix.values[i].mean() for i, n in enumerate(matrix.tasks)}
    code, out, err = run(
        "bench", tmp_path / "a.atlas", "--exact-match", "--methods", "mean,additive", "-k", 2, "--json"
    )
    assert (code, {row["method"] for row in json.loads(out)}) == (0, {"mean", "additive"})
    plain = collect_into(tmp_path / "c.atlas", copy.deepcopy(base), pool, {}, recipe)
    code, _, err = run("analyze", plain.path, "--exact-match")
    assert code == 2
    assert "has no answers" in err


@pytest.mark.parametrize("answers", [False, True])
def test_progress_ends_at_its_total(tmp_path: Path, answers: bool) -> None:
    seen: list[tuple[int, int]] = []
    collect_into(tmp_path / "a.atlas", tiny(), make_pool(), TASKS, RECIPE, exact_match=answers, max_new_tokens=2,
        on_progress=lambda _, *n: seen.append(n),
    )  # fmt: skip
    assert seen[-1][0] == seen[-1][1]
    assert all(a[0] <= b[0] for a, b in pairwise(seen))


def test_mismatched_atlas_is_rejected(tmp_path: Path) -> None:
    collect_into(tmp_path / "a.atlas", tiny(), make_pool(), {"adding": TASKS["adding"]}, RECIPE)
    before = Atlas.open(tmp_path / "a.atlas").matrix().values
    with pytest.raises(MismatchError, match="another pool"):
        collect_into(tmp_path / "a.atlas", tiny(), make_pool(20), TASKS, RECIPE)
    with pytest.raises(MismatchError, match="another base model"):
        collect_into(tmp_path / "a.atlas", tiny(seed=1), make_pool(), TASKS, RECIPE)
    with pytest.raises(MismatchError, match=r"another recipe \(steps differ\)"):
        collect_into(tmp_path / "a.atlas", tiny(), make_pool(), TASKS, RECIPE.model_copy(update={"steps": 4}))
    np.testing.assert_array_equal(Atlas.open(tmp_path / "a.atlas").matrix().values, before)


def test_atlas_without_a_newer_recipe_field_can_grow(tmp_path: Path) -> None:
    collect_into(tmp_path / "a.atlas", tiny(), make_pool(), {"adding": TASKS["adding"]}, RECIPE)
    file = tmp_path / "a.atlas" / "atlas.json"
    index = json.loads(file.read_text())
    del index["recipe"]["gradient_checkpointing"], index["digest"]
    file.write_text(json.dumps(with_digest(index)))
    assert collect_into(tmp_path / "a.atlas", tiny(), make_pool(), TASKS, RECIPE).tasks == tuple(TASKS)


@pytest.mark.parametrize("name", ["m.gguf", "m", "hub/id"])
def test_the_model_is_beside_the_configuration(tmp_path: Path, name: str) -> None:
    """A file as a directory is found from any working directory; a hub id stays one."""
    (tmp_path / "config.yaml").write_text(f"model: {name}\npool: p\ntasks: t\natlas: a\n")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "m").mkdir()
    expected = name if name == "hub/id" else str(tmp_path / name)
    assert CollectConfig.load(tmp_path / "config.yaml").model == expected


def test_a_recipe_by_its_name_or_its_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("steps: 7")
    for recipe, steps in (("paper", 1000), ("mine.yaml", 7), ("{steps: 5}", 5)):
        (tmp_path / "config.yaml").write_text(f"model: m\npool: p\ntasks: t\natlas: a\nrecipe: {recipe}\n")
        assert CollectConfig.load(tmp_path / "config.yaml").recipe.steps == steps


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\npool: p\ntasks: t\natlas: a\nrecipe: x\n", "config.yaml: recipe: there is no recipe"),
        (
            "model: m\npool: p\ntasks: t\natlas: a\nrecipe: {stepz: 3}\n",
            "there is no field 'recipe.stepz'; did you mean steps?",
        ),
        ("model: m\npool: p\natlas: a\n", "the field 'tasks' is missing"),
        ("model: m\npool: p\ntasks: t\natlas: a\nsteps: 3\n", "there is no field 'steps'"),
        ("model: [", "is not YAML"),
        ("- a\n- b\n", "must be an object, not a list"),
    ],
)
def test_invalid_configurations_are_rejected(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        CollectConfig.load(tmp_path / "config.yaml")
    assert "config.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_task_folders(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: m\npool: p.jsonl\ntasks: tasks\natlas: a\n")
    config = CollectConfig.load(tmp_path / "config.yaml")
    with pytest.raises(DataError, match="no such folder"):
        config.load_tasks()
    (tmp_path / "tasks").mkdir()
    with pytest.raises(DataError, match="holds no task"):
        config.load_tasks()
    TASKS["adding"].save(tmp_path / "tasks" / "adding.jsonl")
    TASKS["naming"].save(tmp_path / "tasks" / "naming.parquet")
    assert {name: list(found) for name, found in config.load_tasks().items()} == {
        name: list(TASKS[name]) for name in ("adding", "naming")
    }
    TASKS["naming"].save(tmp_path / "tasks" / "adding.parquet")
    with pytest.raises(DataError, match="two tasks are called 'adding'"):
        config.load_tasks()
