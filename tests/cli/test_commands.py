"""The command line end to end, on small files that a user could have."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import typer

from forgetcast import Atlas, Example, Pool, ReplayPlan, Scores
from forgetcast.cli import app
from support.cli import RunCommand, run_command
from support.data import make_pool, make_task
from support.models import save, tiny
from support.training import make_recipe

COMMANDS = (
    "pool",
    "strategies",
    "score",
    "diff",
    "features",
    "preflight",
    "start",
    "add",
    "atlas",
    "collect",
    "analyze",
    "probes",
    "forecast",
    "plan",
    "export",
    "generate",
    "train",
    "interpolate",
    "verify",
    "pilot",
    "sequence",
    "bench",
    "report",
    "reproduce",
    "demo",
)


RECIPE = make_recipe().model_dump_json()  # which is YAML too


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a pool, four tasks and a fifth that is new, a configuration and a recipe."""
    folder = tmp_path_factory.mktemp("work")
    save(tiny(), folder / "model")
    make_pool(30).save(folder / "pool.jsonl")
    for name in ("adding", "naming", "spelling", "sorting"):
        make_task(name, 12).save(folder / "tasks" / f"{name}.jsonl")
    make_task("rhyming", 12).save(folder / "rhyming.parquet")
    (folder / "config.yaml").write_text(
        f"model: model\npool: pool.jsonl\ntasks: tasks/\natlas: runs.atlas\nrecipe: {RECIPE}\n"
    )
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


class TestWorkflow:
    """Every command in the order of the README, each fed with the files of those before it; all read one run."""

    @pytest.fixture(scope="class")
    @staticmethod
    def said(work: Path) -> dict[str, str]:
        """Standard output of every command by its name."""
        recipe = ("--recipe", work / "recipe.yaml")
        task = (work / "model", work / "rhyming.parquet")
        commands: dict[str, tuple[object, ...]] = {
            "score": ("score", work / "model", work / "pool.jsonl", "-o", work / "before.parquet", "--json"),
            "collect": ("collect", work / "config.yaml"),
            "analyze": ("analyze", work / "runs.atlas", "--json"),
            "analyze as a table": ("analyze", work / "runs.atlas"),
            "probes": ("probes", work / "runs.atlas", "-k", 5, "-o", work / "probes.jsonl"),
            "train": ("train", *task, *recipe, "-o", work / "tuned", "--json"),
            "score the probes": ("score", work / "tuned", work / "probes.jsonl", "-o", work / "after.parquet"),
            "forecast": (
                "forecast", work / "runs.atlas", "--scores", work / "after.parquet", "-o", work / "forecast.parquet",
                "--task", "rhyming", "--json",
            ),
            "plan": (
                "plan", work / "runs.atlas", "--forecast", work / "forecast.parquet", "--ratio", 0.7, "-o",
                work / "plan.parquet", "--json",
            ),
            "train with replay": (
                "train", *task, *recipe, "--plan", work / "plan.parquet", "--pool", work / "pool.jsonl",
                "-o", work / "replayed", "--json",
            ),
            "verify": (
                "verify", *task, "--atlas", work / "runs.atlas", "--plan", work / "plan.parquet",
                "-o", work / "verification.json", "--json",
            ),
            "report": (
                "report", work / "runs.atlas", "--forecast", work / "forecast.parquet",
                "--verification", work / "verification.json", "-o", work / "report.html",
            ),
        }  # fmt: skip
        said = {}
        for name, words in commands.items():
            code, said[name], err = run_command(*words)
            assert code == 0, f"{name}: {err}"
        return said

    def test_score(self, work: Path, said: dict[str, str]) -> None:
        before = Scores.load(work / "before.parquet")
        facts = json.loads(said["score"])
        assert facts["examples"] == 30
        assert facts["mean_nll"] == pytest.approx(before.nll.mean())
        assert pq.read_table(work / "before.parquet").column_names[:4] == ["id", "nll", "tokens", "truncated"]

    @pytest.mark.usefixtures("said")
    def test_collect(self, work: Path, run: RunCommand) -> None:
        atlas = Atlas.open(work / "runs.atlas")
        assert atlas.tasks == ("adding", "naming", "sorting", "spelling")
        np.testing.assert_allclose(atlas.before.nll, Scores.load(work / "before.parquet").nll)
        written = (work / "runs.atlas" / "atlas.json").stat().st_mtime_ns
        assert run("collect", work / "config.yaml")[0] == 0
        assert (work / "runs.atlas" / "atlas.json").stat().st_mtime_ns == written

    def test_analyze(self, said: dict[str, str]) -> None:
        structure = json.loads(said["analyze"])
        assert structure["tasks"] == 4
        assert structure["rank_r2"][3] == pytest.approx(1, abs=1e-6)
        assert "component 1" in said["analyze as a table"]

    @pytest.mark.usefixtures("said")
    def test_probes(self, work: Path) -> None:
        assert len(Pool.load(work / "probes.jsonl")) == 5

    def test_train(self, said: dict[str, str]) -> None:
        assert json.loads(said["train"])["steps"] == 3

    def test_forecast(self, work: Path, said: dict[str, str]) -> None:
        table = pq.read_table(work / "forecast.parquet").to_pydict()
        assert set(table) >= {"id", "mean", "std", "lower", "upper"}
        forecast = dict(zip(table["id"], table["mean"], strict=True))
        before, after = Scores.load(work / "before.parquet"), Scores.load(work / "after.parquet")
        for id_, value in zip(after.ids, after.nll, strict=True):
            assert forecast[id_] == pytest.approx(value - before.at([id_])[0], abs=1e-9)
        assert json.loads(said["forecast"])["most_at_risk"][0]["mean"] == pytest.approx(max(table["mean"]))

    @pytest.mark.usefixtures("said")
    def test_plan(self, work: Path) -> None:
        plan = ReplayPlan.load(work / "plan.parquet")
        assert (plan.strategy, plan.ratio) == ("top", 0.7)
        assert not set(plan.held_out_ids) & set(Pool.load(work / "probes.jsonl").ids)
        assert 0 < len(plan.held_out_ids) <= 6

    def test_train_with_replay(self, work: Path, said: dict[str, str]) -> None:
        assert json.loads(said["train with replay"])["replayed"] == 4
        assert not (work / "replayed.partial").exists()

    def test_verify(self, work: Path, said: dict[str, str]) -> None:
        verification = json.loads(said["verify"])
        assert set(verification["arms"]) == {"none", "random", "top"}
        assert json.loads((work / "verification.json").read_text()) == verification

    @pytest.mark.usefixtures("said")
    def test_report(self, work: Path) -> None:
        assert "Did replay help?" in (work / "report.html").read_text()


@pytest.fixture
def atlas(work: Path, run: RunCommand) -> Path:
    assert run("collect", work / "config.yaml")[0] == 0
    return work / "runs.atlas"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_bad_pools_give_one_line_and_exit_code_2(work: Path, run: RunCommand, tmp_path: Path) -> None:
    good = '{"id": "a", "text": "some text"}\n'
    cases = {
        "an id of no type": (good + '{"id": 1.5, "text": "x y"}\n', "line 2: the id must be a string"),
        "the same id": (good + good, "the id 'a' occurs twice: "),
        "empty text": ('{"id": "b", "text": " "}\n', "line 1: example 'b' has an empty text"),
        "no JSON": (good + "not json\n", "line 2: not JSON"),
        "nothing": ("", "has no examples"),
    }
    (tmp_path / "out.parquet").write_bytes(b"what was here before")
    for text, message in cases.values():
        (tmp_path / "bad.jsonl").write_text(text)
        code, out, err = run("score", work / "model", tmp_path / "bad.jsonl", "-o", tmp_path / "out.parquet")
        assert code == 2
        assert err.startswith("error: ")
        assert str(tmp_path / "bad.jsonl") in err
        assert message in err
        assert err.count("\n") == 1
        assert "Traceback" not in out + err
    assert (tmp_path / "out.parquet").read_bytes() == b"what was here before"


def test_bench(atlas: Path, run: RunCommand, tmp_path: Path) -> None:
    values = np.vstack([np.outer(np.arange(1.0, 9.0), np.linspace(0, 1, 50)), np.linspace(0, 3, 50)])
    values += np.random.default_rng(0).normal(0, 0.05, values.shape)
    np.save(tmp_path / "z.npy", values)
    words = ("bench", tmp_path / "z.npy", "--test", "6-8", "-k", "5", "--seeds", 2, "--methods", "mean,bayesian")
    code, out, _ = run(*words, "--baseline", "mean", "--json")
    assert code == 0
    rows = json.loads(out)
    assert {(row["method"], row["probes"], row["k"]) for row in rows} == {
        (method, probes, 5) for method in ("mean", "bayesian") for probes in ("random", "chosen")
    }
    assert all(row["f1"] is None for row in rows)
    assert next(row for row in rows if row["method"] == "bayesian")["ratio"] < 0.5
    code, out, _ = run(*words, "--baseline", "mean")
    assert "bayesian" in out
    assert run("bench", atlas, "--test", "adding", "-k", 3, "--seeds", 1)[0] == 0
    in_turn = ("bench", tmp_path / "z.npy", "--exclude-similar", 0.25, "-k", 5, "--seeds", 1, "--json")
    assert len(json.loads(run(*in_turn)[1])) == 10
    for bad, message in (
        (("--test", "nobody"), "'nobody' is unknown"),
        (("--test", "9"), "there is no row 9"),
        (("--test", "1", "--train", "1,2"), "in --train and in --test"),
        (("--test", "1", "--methods", "magic"), "unknown method 'magic'"),
        (("--test", "1", "-k", "many"), "is not a number"),
        (("--test", "1", "--exclude-similar", 0.5), "give it without --test"),
        (("--exclude-similar", 0.9), "too few to learn from"),
    ):
        code, _, err = run("bench", tmp_path / "z.npy", *bad)
        assert code == 2
        assert message in err


def test_bad_probe_scores_change_nothing(atlas: Path, run: RunCommand, tmp_path: Path) -> None:
    before = contents(atlas)
    pool = make_pool(31)
    unknown = pool.subset(["e1", "e30"])
    infinite = {"id": ["e1"], "nll": [float("inf")], "tokens": [3], "truncated": [False]}

    def forecast(scores: Path) -> str:
        code, _, err = run("forecast", atlas, "--scores", scores, "-o", tmp_path / "forecast.parquet")
        assert code == 2
        assert err.count("\n") == 1
        return err

    Scores(unknown.ids, np.ones(2), np.ones(2), np.zeros(2)).save(tmp_path / "unknown.parquet")
    assert "doesn't know, e.g. 'e30'" in forecast(tmp_path / "unknown.parquet")
    import pyarrow as pa

    pq.write_table(pa.table(infinite), tmp_path / "infinite.parquet")
    assert "the loss of example 'e1' is inf" in forecast(tmp_path / "infinite.parquet")
    assert "no such file" in forecast(tmp_path / "nothing.parquet")
    (tmp_path / "text.parquet").write_text("id,nll\n")
    assert "not a readable Parquet file" in forecast(tmp_path / "text.parquet")
    assert contents(atlas) == before
    assert not (tmp_path / "forecast.parquet").exists()


def test_other_invalid_input_is_rejected(work: Path, atlas: Path, run: RunCommand, tmp_path: Path) -> None:
    def refused(*words: object) -> str:
        code, out, err = run(*words)
        assert code == 2
        assert "Traceback" not in out + err
        return err

    no_tokenizer = tmp_path / "model"
    tiny().model.save_pretrained(no_tokenizer)
    assert "has no tokenizer" in refused("score", no_tokenizer, work / "pool.jsonl", "-o", tmp_path / "s.parquet")
    assert "is not an atlas" in refused("analyze", tmp_path)
    assert "cannot be chosen from 30" in refused("probes", atlas, "-k", 31, "-o", tmp_path / "p.jsonl")
    assert "--plan needs --pool" in refused(
        "train", work / "model", work / "rhyming.parquet", "--plan", "p", "-o", tmp_path / "t"
    )
    assert "not empty" in refused("train", work / "model", work / "rhyming.parquet", "-o", work / "tasks")
    (tmp_path / "recipe.yaml").write_text("stepz: 3")
    words = (
        "train",
        work / "model",
        work / "rhyming.parquet",
        "--recipe",
        tmp_path / "recipe.yaml",
        "-o",
        tmp_path / "t",
    )
    assert "there is no field 'stepz'; did you mean steps?" in refused(*words)
    (tmp_path / "none.jsonl").write_text("")
    assert "has no examples" in refused("train", work / "model", tmp_path / "none.jsonl", "-o", tmp_path / "t")
    # A plan for another pool, in training and in verification.
    make_pool(12).save(tmp_path / "other.jsonl")
    words = ("score", work / "model", work / "pool.jsonl", "-o", work / "pool.jsonl" / "scores.parquet")
    assert "pool.jsonl" in refused(*words)
    assert run("plan", atlas, "--strategy", "random", "-o", tmp_path / "plan.parquet")[0] == 0
    words = ("--plan", tmp_path / "plan.parquet", "--pool", tmp_path / "other.jsonl", "-o", tmp_path / "t")
    assert "another pool" in refused("train", work / "model", work / "rhyming.parquet", *words)
    # More than there is to replay: refused before anything is loaded or trained, unless it may come again.
    model, task, plan = work / "model", work / "rhyming.parquet", ("--plan", tmp_path / "plan.parquet")
    recipe = ("--recipe", work / "recipe.yaml")  # 3 steps of 2
    planning = ("plan", atlas, "--strategy", "random", "--hold-out", 0.9, "--ratio", 2, "-o", plan[1])
    training = (task, *plan, *recipe, "--pool", work / "pool.jsonl", "-o", tmp_path / "kept", "--json")
    assert run(*planning)[0] == 0
    assert "12 examples are to be replayed, and the plan has 3" in refused("train", "no model", *training)
    words = ("--atlas", atlas, *plan, *recipe, "-o", tmp_path / "v.json")
    assert "the plan has 3" in refused("verify", model, task, *words)
    words = ("--atlas", atlas, "--hold-out", 0.9, "--ratios", "2,1", *recipe)
    assert "the plan has 3" in refused("pilot", model, task, *words)
    assert not list(tmp_path.glob("v*"))
    assert run(*planning, "--repeat")[0] == 0
    code, out, _ = run("train", model, *training)
    assert (code, json.loads(out)["replayed"]) == (0, 12)
    (tmp_path / "bad.json").write_text("{")
    assert "is not JSON" in refused("report", atlas, "--verification", tmp_path / "bad.json", "-o", tmp_path / "r.html")
    assert not (tmp_path / "t").exists()


def test_usage_errors_and_help_texts(run: RunCommand) -> None:
    commands = typer.main.get_command(app).commands
    for name, command in commands.items():
        for words in ((name, inner) for inner in command.commands) if hasattr(command, "commands") else ((name,),):
            code, out, _ = run(*words, "--help")
            assert code == 0
            assert f"Example: forgetcast {' '.join(words)}" in " ".join(out.split())
    assert set(commands) == set(COMMANDS)
    assert run("score")[0] == 2
    assert run("no-such-command")[0] == 2


def test_data_is_not_interpreted_as_markup(
    work: Path, run: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Pool([Example("[red]a[/x]", text="the loss of a model"), Example("b", text="t")]).save(tmp_path / "p.jsonl")
    code, out, _ = run("score", work / "model", tmp_path / "p.jsonl", "-o", "[bold]s.parquet")
    assert code == 0
    assert "[bold]s.parquet" in out


def test_an_interrupted_collect_resumes(work: Path, run: RunCommand, tmp_path: Path) -> None:
    """A real process, a real signal: the first tasks are kept, the command says so, and the next run finishes."""
    (tmp_path / "config.yaml").write_text(
        f"model: {work / 'model'}\npool: {work / 'pool.jsonl'}\ntasks: {work / 'tasks'}\natlas: runs.atlas\n"
        + f"recipe: {make_recipe(steps=40).model_dump_json()}\n"
    )
    command = [sys.executable, "-m", "forgetcast.cli", "collect", str(tmp_path / "config.yaml")]
    rows = tmp_path / "runs.atlas" / "rows"
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "80"})
    while not list(rows.glob("*/[0-9]*.parquet")):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    kept = Atlas.open(tmp_path / "runs.atlas")
    assert 1 <= len(kept.tasks) < 4
    assert run("collect", tmp_path / "config.yaml")[0] == 0
    grown = Atlas.open(tmp_path / "runs.atlas")
    assert len(grown.tasks) == 4
    np.testing.assert_array_equal(grown.matrix(kept.tasks).values, kept.matrix().values)
