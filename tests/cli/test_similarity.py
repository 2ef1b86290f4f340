from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from forgetcast import Atlas, Example, Pool
from forgetcast.lm import score
from forgetcast.lm.gradients import _gradient
from support.cli import RunCommand
from support.data import make_atlas, make_pool, make_scores
from support.models import save, tiny


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """An atlas and the data of its tasks."""
    atlas = make_atlas(tmp_path / "runs.atlas", make_pool())
    (tmp_path / "tasks").mkdir()
    words = ["the loss", "a model", "is measured", "every token", "and averaged", "on the", "the model", "a token"]
    for name, text in zip(atlas.tasks, words, strict=True):
        examples = [Example(f"{i}", prompt=f"{text} {name}", completion=f" {text}") for i in range(4)]
        Pool(examples).save(tmp_path / "tasks" / f"{name}.jsonl")
    return tmp_path


def test_analyze_correlates_similarities(run: RunCommand, project: Path) -> None:
    words = ["analyze", project / "runs.atlas", "--similarity", "tfidf,length", "--tasks", project / "tasks"]
    code, out, err = run(*words, "--json")
    assert code == 0, err
    found = json.loads(out)["similarity"]
    assert [each["name"] for each in found] == ["tfidf", "length"]
    assert found[0]["tasks"] == 8
    assert found[1]["within_examples"]["value"] is None
    assert -1 <= found[1]["within_tasks"]["lower"] <= found[1]["within_tasks"]["value"]
    code, out, _ = run(*words)
    assert code == 0
    assert "Correlation with forgetting" in out
    assert "-: the similarity does not vary there" in out  # the length, within an example


def test_bench_compares_and_the_report_shows_it(run: RunCommand, project: Path) -> None:
    pytest.importorskip("plotly")
    atlas = Atlas.open(project / "runs.atlas")
    for task in atlas.tasks[5:]:
        atlas.drop(task)
    words = ["bench", project / "runs.atlas", "--similarity", "tfidf", "--tasks", project / "tasks"]
    words += ["-k", "3", "--seeds", "1", "-o", project / "similarity.json"]
    code, out, err = run(*words, "--json")
    assert code == 0, err
    found = json.loads(out)
    arms = {each["arm"] for each in found["similarity"]["versus"]}
    assert {"tfidf", "mean+tfidf", "bayesian+tfidf", "ridge", "bayesian+ridge", "mean"} <= arms
    assert len(found["methods"][0]["rmse_by_task"]) == 5
    assert json.loads((project / "similarity.json").read_text()) == found["similarity"]
    code, out, err = run(
        "report", project / "runs.atlas", "--similarity", project / "similarity.json", "-o", project / "report.html"
    )
    assert code == 0, err
    page = (project / "report.html").read_text()
    assert "What else predicts forgetting" in page
    assert "bayesian+ridge" in page


def test_tasks_that_have_their_own_columns_are_read(run: RunCommand, project: Path) -> None:
    words = ["analyze", project / "runs.atlas", "--similarity", "tfidf", "--tasks", project / "tasks", "--json"]
    expected = run(*words)[1]
    path = project / "tasks" / "t3.jsonl"
    path.write_text(path.read_text().replace('"prompt"', '"frage"'))
    code, _, err = run(*words)
    assert code == 2
    assert "--column TASK:FIELD=NAME" in err
    code, out, err = run(*words, "--column", "t3:prompt=frage")
    assert code == 0, err
    assert json.loads(out) == json.loads(expected)


def test_updates_of_tuned_models(run: RunCommand, project: Path) -> None:
    """Oracle: `update` is the derivative of the losses towards the tuned model; checkpoints are found in its folder."""
    base = tiny()
    folder = save(base, project / "base")
    pool = make_pool()
    before = score(base, pool)
    atlas = Atlas.create(project / "real.atlas", pool, before, model="base")
    tuned = {}
    for at, name in enumerate(("t0", "t1", "t2", "t3")):
        gradient = _gradient(base, [pool[at]], 1, end=False)
        norm = float(torch.cat([part.flatten() for part in gradient]).norm())
        tuned[name] = replace(base, model=copy.deepcopy(base.model))
        with torch.no_grad():
            for parameter, part in zip(tuned[name].model.parameters(), gradient, strict=True):
                parameter.add_(part, alpha=0.01 / norm)
        atlas.add(name, score(tuned[name], pool))
        for where in (name, f"{name}/checkpoint-3"):
            save(tuned[name], project / "tuned" / where)
    words = ["analyze", atlas.path, "--tasks", project / "tasks", "--model", folder, "--similarity"]
    code, out, err = run(*words, "update,gradient-run", "--tuned", project / "tuned", "--json")
    assert code == 0, err
    found = {each["name"]: each for each in json.loads(out)["similarity"]}
    assert set(found) == {"update", "gradient-run"}
    assert found["update"]["cells"]["value"] > 0.9, "so small an update does what its derivative says"
    code, _, err = run(*words, "update")
    assert code == 2
    assert "the similarity 'update' needs --tuned" in " ".join(err.split())
    shutil.rmtree(project / "tuned" / "t2")
    code, _, err = run(*words, "update", "--tuned", project / "tuned")
    assert code == 2
    assert "t2 holds neither a model nor an adapter" in " ".join(err.split())


@pytest.mark.parametrize("case", ["no tasks", "missing task", "empty task", "no model", "matrix", "output alone"])
def test_what_is_not_possible_is_one_line(run: RunCommand, project: Path, case: str) -> None:
    atlas, tasks = project / "runs.atlas", project / "tasks"
    words: list[object] = ["bench", atlas, "--similarity", "tfidf", "--tasks", tasks]
    if case == "no tasks":
        words, message = words[:4], "--similarity needs --tasks"
    elif case == "missing task":
        (tasks / "t3.jsonl").unlink()
        message = "there is no file of the task 't3'"
    elif case == "empty task":
        (tasks / "t3.jsonl").write_text("")
        message = "t3.jsonl"
    elif case == "no model":
        words[3], message = "hidden", "the similarity 'hidden' needs --model"
    elif case == "matrix":
        (project / "matrix.json").write_text("[[1, 2, 3], [1, 2, 4], [0, 1, 1]]")
        words[1], message = project / "matrix.json", "--similarity needs an atlas"
    else:
        words, message = ["bench", atlas, "-o", project / "x.json"], "--output is for --similarity"
    code, out, err = run(*words)
    assert code == 2
    assert not out
    assert message in err.strip().splitlines()[-1]


def test_another_model_than_the_base_is_refused(run: RunCommand, project: Path) -> None:
    pool = Pool.load(project / "tasks" / "t0.jsonl")
    before = make_scores(pool, np.full(len(pool), 3.0), model_hash="0" * 64)
    atlas = Atlas.create(project / "other.atlas", pool, before, model="base")
    for name in ("t0", "t1", "t2", "t3"):
        atlas.add(name, make_scores(pool, np.full(len(pool), 3.5)))
    folder = save(tiny(), project / "model")
    words = ["analyze", project / "other.atlas", "--similarity", "hidden", "--tasks", project / "tasks"]
    code, _, err = run(*words, "--model", folder)
    assert code == 2
    assert "measured on another base model" in err
