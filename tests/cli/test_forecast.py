"""The command `forecast`, end to end on tiny models: from a score file, from a model, until an interval is narrow."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from forgetcast import Atlas, Example, Pool, Scores
from forgetcast.completion.forecast import TaskForecast
from forgetcast.lm import exact_match, load, score
from forgetcast.lm import score as score_pool
from support.adapters import adapted_model, lora, save_adapter
from support.cli import RunCommand, run_command
from support.data import make_pool
from support.models import save, tiny

POOL = make_pool(40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An atlas of four adapters of a base model, and a fifth adapter that is new."""
    folder = tmp_path_factory.mktemp("forecast")
    base = tiny()
    save(base, folder / "base")
    for seed in range(5):
        adapted = adapted_model(load(folder / "base").model, lora(r=4), seed=seed)
        save_adapter(adapted, base.tokenizer, folder / ("new" if seed == 4 else f"old/{seed}"))
    Atlas.create(folder / "runs.atlas", POOL, score(load(folder / "base"), POOL), model=str(folder / "base"))
    code, _, err = run_command("add", folder / "runs.atlas", folder / "old")
    assert code == 0, err
    return folder


@pytest.fixture(scope="module")
def truth(folder: Path) -> np.ndarray:
    atlas = Atlas.open(folder / "runs.atlas")
    return np.asarray(score(load(folder / "new"), POOL).nll - atlas.nll_before)


def test_one_command_chooses_scores_and_forecasts(folder: Path, truth: np.ndarray, run: RunCommand) -> None:
    output = folder / "one.parquet"
    words = ("forecast", folder / "runs.atlas", "-k", 18, "--task", "new", "-o", output, "--seed", 2)
    code, out, err = run(*words, "--model", folder / "new", "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert (facts["probes"], facts["random_probes"], facts["until"]) == (18, 15, None)
    saved = TaskForecast.load(output)
    assert (saved.audit, saved.threshold, len(saved.probes)) == (15, 0.1, 18)
    np.testing.assert_allclose(saved.mean[saved.probed], truth[saved.probed], atol=1e-5)
    assert [each.model_dump() for each in saved.whole] == facts["whole"]
    whole = {(each["figure"], each["kind"]): each for each in facts["whole"] if each["source"] is None}
    assert len(whole) == 6
    assert {each["source"] for each in facts["whole"]} == {None, "s0", "s1", "s2"}
    guaranteed = whole["mean", "guaranteed"]
    assert guaranteed["lower"] < guaranteed["value"] < guaranteed["upper"]
    scores = folder / "one.parquet.scores.parquet"
    measured = Scores.load(scores)
    assert (len(measured), measured.metadata["audit"]) == (18, 15)

    # The file with the scores says which are random; the same command does not score again.
    again = ("forecast", folder / "runs.atlas", "--scores", scores, "-o", folder / "two.parquet", "--json")
    code, out, err = run(*again)
    assert code == 0, err
    assert json.loads(out)["whole"] == facts["whole"]
    with mock.patch("forgetcast.lm.score", side_effect=AssertionError("scored again")):
        code, out, err = run(*words, "--model", folder / "new")
    assert code == 0, err
    assert "Only 4 tasks could be left out" in " ".join(out.split())
    assert saved.calibration_tasks == facts["calibration_tasks"] == 4
    assert "model-based" in out
    assert "guaranteed" in out
    code, _, err = run("report", folder / "runs.atlas", "--forecast", output, "-o", folder / "report.html")
    assert code == 0, err
    assert "Guaranteed: from random probes" in (folder / "report.html").read_text()


def test_random_probes_drawn_by_another_atlas_give_no_guarantee(folder: Path, tmp_path: Path, run: RunCommand) -> None:
    shutil.copytree(folder / "runs.atlas", tmp_path / "runs.atlas")
    words = ("forecast", tmp_path / "runs.atlas", "-o", tmp_path / "forecast.parquet")
    code, _, err = run(*words, "--model", folder / "new", "-k", 8)
    assert code == 0, err
    scores = tmp_path / "forecast.parquet.scores.parquet"
    again = (*words, "--scores", scores, "--json")
    code, _, err = run(*again, "--audit", 3)
    assert code == 2
    assert "says that its last 7 probes were drawn at random" in err
    code, out, _ = run(*again)
    assert {each["kind"] for each in json.loads(out)["whole"]} == {"model-based", "guaranteed"}
    code, _, err = run("add", tmp_path / "runs.atlas", folder / "new")
    assert code == 0, err
    code, out, err = run(*again)
    assert code == 0, err
    assert {each["kind"] for each in json.loads(out)["whole"]} == {"model-based"}
    assert "another state of the atlas" in err


def test_an_interrupted_measurement_goes_on(folder: Path, run: RunCommand) -> None:
    output = folder / "cut.parquet"
    words = ("forecast", folder / "runs.atlas", "--model", folder / "new", "-k", 6, "--until-width", 1e-9, "-o", output)
    asked = []

    def once(model: object, pool: object, **options: object) -> Scores:
        asked.append(len(pool))  # type: ignore[arg-type]
        if len(asked) == 2:
            raise KeyboardInterrupt
        return score_pool(model, pool, **options)  # type: ignore[arg-type]

    with mock.patch("forgetcast.lm.score", side_effect=once):
        code, _, err = run(*words)
        assert code == 130, err
        assert asked == [6, 34]
        code, out, err = run(*words)
    assert code == 0, err
    assert asked == [6, 34, 34]  # the first six are in the file
    assert "Measuring all 40 examples is cheaper" in " ".join(out.split())


def test_until_width(folder: Path, truth: np.ndarray, run: RunCommand) -> None:
    words = ("forecast", folder / "runs.atlas", "--model", folder / "new", "-k", 10, "-o", folder / "until.parquet")
    code, out, err = run(*words, "--until-width", 10, "--json")
    assert code == 0, err
    until = json.loads(out)["until"]
    assert [look["measured"] for look in until["looks"]] == [10]
    assert until["interval"][1] <= truth.mean() <= until["interval"][2]
    code, _, err = run(*words, "--until-width", 1e-9, "--most", 20)
    assert (code, "needs about 40 of the 40 examples, and 20 may be measured" in " ".join(err.split())) == (2, True)


def test_probes_with_random_ones_go_through_a_score_file(folder: Path, run: RunCommand) -> None:
    chosen = folder / "probes.jsonl"
    code, out, err = run("probes", folder / "runs.atlas", "-k", 12, "--audit", 9, "--seed", 1, "-o", chosen)
    assert code == 0, err
    assert "--audit 9" in " ".join(out.split())
    run("score", folder / "new", chosen, "-o", folder / "probes.parquet")
    words = ("forecast", folder / "runs.atlas", "--scores", folder / "probes.parquet", "-o", folder / "by-file.parquet")
    code, out, err = run(*words)
    assert code == 0, err
    assert "No probe is known to be random" in " ".join(out.split())
    assert "Rely on the guaranteed ones" not in " ".join(out.split())  # there are none
    assert {each.kind for each in TaskForecast.load(folder / "by-file.parquet").whole} == {"model-based"}
    code, out, err = run(*words, "--audit", 9, "--json")
    assert code == 0, err
    kinds = {each["kind"] for each in json.loads(out)["whole"]}
    assert kinds == {"model-based", "guaranteed"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "give either --scores"),
        (("--model", "new", "--scores", "x.parquet"), "give either --scores"),
        (("--scores", "x.parquet", "--until-width", 1), "need --model"),
        (("--model", "new", "--until-width", 0), "must be above zero"),
        (("--model", "new", "--until-width", "wide"), "write a width such as 0.02"),
        (("--model", "new", "--most", 50), "--most limits --until-width"),
        (("--model", "new", "-k", 5, "--audit", 6), "not more than 5 can be random"),
        (("--model", "new", "-k", 41), "41 probes cannot be drawn: 40 examples can be measured"),
        (("--model", "new", "-k", 5, "--audit", 1, "--until-width", 1), "at least two random ones"),
        (("--model", "base"), "is the base model of"),
        (("--model", "new", "--level", 1), "level must be between 0 and 0.99"),
        (("--model", "new", "--threshold", "nan"), "threshold of forgetting must be a finite number"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    folder: Path, run: RunCommand, monkeypatch: pytest.MonkeyPatch, words: tuple[object, ...], expected: str
) -> None:
    monkeypatch.chdir(folder)
    code, _, err = run("forecast", "runs.atlas", "-o", "bad.parquet", *words)
    assert code == 2
    assert expected in err
    assert len(err.strip().splitlines()) == 1
    assert not (folder / "bad.parquet").exists()


def test_more_random_probes_than_probes(folder: Path, run: RunCommand) -> None:
    code, _, err = run("probes", folder / "runs.atlas", "-k", 5, "--audit", 6, "-o", folder / "no.jsonl")
    assert (code, "not more than 5 can be random" in err) == (2, True)
    scores = folder / "few.parquet"
    score(load(folder / "new"), POOL.subset(POOL.ids[:4])).save(scores)
    words = ("forecast", folder / "runs.atlas", "--scores", scores, "-o", folder / "no.parquet")
    code, _, err = run(*words, "--audit", 5)
    assert (code, "has only 4 probes" in " ".join(err.split())) == (2, True)


def test_answers_of_a_model_are_measured_and_kept(folder: Path, tmp_path: Path, run: RunCommand) -> None:
    """The expected answers are the base model's own, so that it answers nearly all of them right."""
    asked = Pool([Example(f"q{i}", prompt=f"question {i}:", completion=" ?") for i in range(40)])
    base, new = load(folder / "base"), load(folder / "new")
    _, answers = exact_match(base, asked, max_new_tokens=3)
    pool = Pool([replace(e, completion=f" {a}") for e, a in zip(asked, answers, strict=True) if a and a.strip()])
    pool.save(tmp_path / "pool.jsonl")
    atlas, output = tmp_path / "runs.atlas", tmp_path / "forecast.parquet"
    words = ("atlas", "create", folder / "base", tmp_path / "pool.jsonl", "--exact-match", "--max-new-tokens", 3)
    code, _, err = run(*words, "-o", atlas)
    assert code == 0, err
    code, _, err = run("add", atlas, folder / "old")
    assert code == 0, err
    words = ("forecast", atlas, "--model", folder / "new", "--exact-match", "-o", output, "--json", "-k")
    code, out, err = run(*words, 6)
    assert code == 0, err
    saved = TaskForecast.load(output)
    right, _ = exact_match(new, pool, max_new_tokens=3)
    wrong = {id_: 1.0 - r for id_, r in zip(pool.ids, right, strict=True)}
    measured = [saved.ids[i] for i in np.flatnonzero(saved.probed)]
    assert len(measured) == 6
    np.testing.assert_allclose(saved.mean[saved.probed], [wrong[id_] for id_ in measured])
    assert {each["figure"] for each in json.loads(out)["whole"]} == {"mean"}
    kept = Scores.load(tmp_path / "forecast.parquet.scores.parquet")
    assert kept.exact_match is not None
    code, _, err = run(*words, 12)  # goes on from what was measured
    assert code == 0, err
    assert TaskForecast.load(output).probed.sum() == 12
    code, _, err = run("score", folder / "new", tmp_path / "pool.jsonl", "-o", tmp_path / "other.parquet")
    Scores.load(tmp_path / "other.parquet").save(tmp_path / "forecast.parquet.scores.parquet")
    code, _, err = run(*words, 6)
    assert code == 2
    assert "scores without answers" in " ".join(err.split())
