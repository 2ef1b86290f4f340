"""`reproduce` from end to end: pages, what is left out, and bad input."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from forgetcast import Atlas, Example, Pool, Scores
from forgetcast.experiments import Reproduction
from forgetcast.replay.outcome import Run
from support.cli import RunCommand
from support.data import make_atlas, make_pool, make_scores, planted
from support.pages import HOSTILE, Page

POOL = make_pool(40)
QUICK = ("-k", "3", "--seeds", "1")


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare two methods, and logistic factorisation of binary forgetting, to save time."""
    monkeypatch.setattr(sys.modules["forgetcast.experiments.reproduce"], "COMPARED", ("additive", "bayesian"))


def answered(losses: np.ndarray, right: np.ndarray) -> Scores:
    return replace(make_scores(POOL, losses), exact_match=right.astype(float))


@pytest.fixture
def atlas(tmp_path: Path) -> Atlas:
    """Two families, with losses, answers, and replay."""
    right = np.arange(len(POOL)) % 5 != 0
    atlas = Atlas.create(tmp_path / "runs.atlas", POOL, answered(np.full(len(POOL), 3.0), right), model="base")
    for i, row in enumerate(planted(8, len(POOL), 1, 0.1)):
        name = f"{'main' if i < 6 else 'other'}/t{i}"
        atlas.add(name, answered(3.0 + row, right & (row < 1)))
    for task in ("a", "b"):
        for strategy, mean in (("none", 0.5), ("random", 0.3), ("forecast", 0.2)):
            ratio = 0.0 if strategy == "none" else 0.125
            mean += 0.01 * len(strategy) * (task == "b")
            run = Run(task, strategy, 0, mean, 1.0, 1.5, 8, 40, 2.0, strategy=strategy, ratio=ratio, setup="x")
            atlas.add_replays([vars(run)])
    return Atlas.open(atlas.path)


def test_an_atlas_with_everything(run: RunCommand, atlas: Atlas, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    page, html, file = (tmp_path / f"r.{suffix}" for suffix in ("md", "html", "json"))
    words = ["reproduce", atlas.path, *QUICK, "-o", page, "--html", html, "--result", file]
    code, out, err = run(*words)
    assert code == 0, err
    assert f"reproduction written to {page}" in out
    found = Reproduction.load(file)
    assert found.name == "runs.atlas"
    assert {row.domain for row in found.losses} == {"in domain", "out of domain"}
    assert found.forgotten is not None
    assert found.forgotten.examples == 32, "those that the base model answers right"
    assert found.forgotten.rank_f1
    text = page.read_text()
    assert "| here | forecast, runs.atlas, 2 pairs | 0.125 | mean forgetting | -0.28" in text
    assert "a right answer that became wrong" in text
    shown = Page(html)
    assert shown.links == []
    assert shown.scripts == 0
    for number in re.findall(r"\b0\.\d{3,4}\b", text):
        assert number in shown.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "r.json", "r.md", "runs.atlas"]
    code, _, err = run("report", atlas.path, "--reproduction", file, "-o", tmp_path / "report.html")
    assert code == 0, err
    report = Page(tmp_path / "report.html")
    assert "The paper's analyses on runs.atlas" in report.text
    assert "OLMo-7B, 85 tasks x 10,000 Dolma examples 0.512 0.633" in report.text


def test_similarities_of_an_atlas_with_texts(run: RunCommand, tmp_path: Path) -> None:
    atlas = make_atlas(tmp_path / "runs.atlas", make_pool())
    (tmp_path / "tasks").mkdir()
    words = ["the loss", "a model", "is measured", "every token", "and averaged", "on the", "the model", "a token"]
    for name, text in zip(atlas.tasks, words, strict=True):
        examples = [Example(f"{i}", prompt=f"{text} {name}", completion=f" {text}") for i in range(4)]
        Pool(examples).save(tmp_path / "tasks" / f"{name}.jsonl")
    similarity = ["--similarity", "tfidf,length", "--tasks", tmp_path / "tasks"]
    code, _, err = run(
        "reproduce", atlas.path, *QUICK, *similarity, "-o", tmp_path / "r.md", "--result", tmp_path / "r.json"
    )
    assert code == 0, err
    assert "left out: losses out of domain: no task is out of domain" in err
    found = Reproduction.load(tmp_path / "r.json")
    assert found.similarity is not None
    assert [each.name for each in found.similarity.associations] == ["tfidf", "length"]
    assert {"tfidf", "mean+tfidf", "bayesian+ridge"} <= {row.method for row in found.losses}
    assert "| here | tfidf of runs.atlas, 8 x 24 | " in (tmp_path / "r.md").read_text()


def test_a_matrix_with_a_split(run: RunCommand, tmp_path: Path) -> None:
    names = [f"<b>{HOSTILE} {i}" for i in range(5)]
    content = {"arr": planted(5, 30, 1, 0.1).tolist(), "ocl_tasks": names, "pt_tasks": [f"d{j}" for j in range(30)]}
    matrix, split = tmp_path / "<i>z|`x`.json", tmp_path / "split.json"
    matrix.write_text(json.dumps(content))
    split.write_text(json.dumps({"known": [0, 1, 2], "in_domain": [names[3]], "out_of_domain": [4]}))
    code, _, err = run(
        "reproduce", matrix, "--split", split, *QUICK, "-o", tmp_path / "r.md", "--result", tmp_path / "j"
    )
    assert code == 0, err
    assert Reproduction.load(tmp_path / "j").split.in_domain == (names[3],)
    assert not re.search(r"(?<!\\)<", (tmp_path / "r.md").read_text())
    pytest.importorskip("plotly")
    code, _, err = run(
        "reproduce", matrix, "--split", split, *QUICK, "-o", tmp_path / "r.md", "--html", tmp_path / "r.html"
    )
    assert code == 0, err
    assert Page(tmp_path / "r.html").scripts == 0
    assert "<i>z" not in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--split", "none.json"], "none.json: No such file"),
        (["--split", "split.json"], "split.json: the matrix has no task 'nobody'"),
        (["-k", "99"], "99 probes cannot be taken from half of the 20 examples"),
        (["--result", "r.md"], "--output, --html and --result need different files"),
        (["--html", "folder"], "folder is a folder"),
        (["--threshold", "nan"], "a finite threshold"),
        (["--similarity", "tfidf"], "--similarity needs an atlas"),
    ],
)
def test_bad_input_is_one_line(
    run: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("split.json").write_text(json.dumps({"known": [0, 1], "in_domain": ["nobody"]}))
    np.save("z.npy", planted(6, 20, 1, 0.1))
    code, out, err = run("reproduce", "z.npy", "-o", "r.md", *words)
    assert (code, out) == (2, "")
    assert said in err.strip().splitlines()[-1]
    assert not Path("r.md").exists()


def test_too_few_tasks(run: RunCommand, tmp_path: Path) -> None:
    np.save(tmp_path / "z.npy", planted(3, 20, 1, 0.1))
    code, _, err = run("reproduce", tmp_path / "z.npy", "-o", tmp_path / "r.md")
    assert code == 2
    assert "3 tasks without a family in their names are too few" in err


def test_a_file_of_parts_that_is_another_one_stays(run: RunCommand, tmp_path: Path) -> None:
    np.save(tmp_path / "z.npy", planted(6, 20, 1, 0.1))
    (tmp_path / "r.md.parts.json").write_text('{"mine": 1}')
    code, _, err = run("reproduce", tmp_path / "z.npy", *QUICK, "-o", tmp_path / "r.md")
    assert code == 2
    assert "r.md.parts.json" in err
    assert (tmp_path / "r.md.parts.json").read_text() == '{"mine": 1}'
