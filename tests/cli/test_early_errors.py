"""Errors that are told before anything slow is imported, each in a process of its own, and words for mistakes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from support.cli import RunCommand
from support.data import make_pool, make_task

RUN = """
import sys
sys.argv = ["forgetcast", *{words!r}]
from forgetcast.__main__ import main
try:
    main()
finally:
    slow = {{"torch", "transformers", "scipy.optimize", "ray"}} & set(sys.modules)
    sys.stdout.write(" ".join(sorted(slow)))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A configuration that is right but for what a test changes; the model is a folder that looks like one."""
    make_pool().save(tmp_path / "pool.jsonl")
    (tmp_path / "tasks").mkdir()
    make_task("adding", 6).save(tmp_path / "tasks" / "adding.jsonl")
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "model" / name).write_text("{}")
    (tmp_path / "config.yaml").write_text(
        "model: ./model\npool: pool.jsonl\ntasks: tasks\natlas: a.atlas\nrecipe: {steps: 3}\n"
    )
    return tmp_path


def run_in(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN.format(words=words)],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


COLLECT = ["collect", "config.yaml"]


@pytest.mark.parametrize(
    ("change", "words", "said"),
    [
        (("pool.jsonl", "pol.jsonl"), COLLECT, "pol.jsonl: there is no such file; did you mean pool.jsonl?"),
        (("steps", "stepz"), COLLECT, "config.yaml: there is no field 'recipe.stepz'; did you mean steps?"),
        (("./model", "./modle"), COLLECT, "./modle: there is no such directory; did you mean model?"),
        (("./model", "no/hub-model"), COLLECT, "no/hub-model: there is no such directory, nor a copy in the cache"),
        (("a.atlas", "pool.jsonl/a.atlas"), COLLECT, "pool.jsonl"),
        (None, [*COLLECT, "--only", "ading"], "--only ading: there is no such task; there are adding; did you mean"),
        (None, ["train", "./model", "no.jsonl", "-o", "x"], "no.jsonl: there is no such file"),
        (None, ["collect", "confg.yaml"], "confg.yaml: No such file or directory; did you mean config.yaml?"),
        (None, ["train", "./model", "pool.jsonl", "-o", "x", "--recipe", "config.yml"], "did you mean config.yaml?"),
        (None, ["train", "./model", "law.jsonl", "-o", "x"], "law.jsonl: there is no such file"),
        (None, ["analyze", "pool.json"], "pool.json: there is no such atlas; did you mean pool.jsonl?"),
        (None, ["forecast", "pool.jsonl", "--model", "x", "-o", "x"], "pool.jsonl is a file, and an atlas is a folder"),
        (None, ["pool", "pool.jsonk", "-o", "x.jsonl"], "pool.jsonk: there is no such file; did you mean pool.jsonl?"),
        (
            None,
            ["pool", "pool.jsonl", "-o", "x.jsonl", "--max-tokens", "9", "--tokenizer", "./modle"],
            "did you mean model?",
        ),
        (None, ["train", "./model", "pool.jsonl", "-o", "x", "--recipe", "papr"], "one of lora, paper; did you mean"),
        (None, ["score", "./modell", "pool.jsonl", "-o", "x"], "./modell: there is no such directory; did you mean"),
    ],
)
def test_a_mistake_is_told_without_pytorch(
    folder: Path, change: tuple[str, str] | None, words: list[str], said: str
) -> None:
    if change is not None:
        config = folder / "config.yaml"
        config.write_text(config.read_text().replace(*change))
    done = run_in(folder, *words)
    assert (done.returncode, done.stdout) == (2, "")
    *_, last = done.stderr.splitlines()
    assert last.startswith("error: ")
    assert said in last
    assert ("did you mean" in last) == ("did you mean" in said)  # of other names with the same ending


def test_a_hub_that_does_not_answer_is_told_in_one_line(folder: Path) -> None:
    """It takes connections, and says nothing; neither does the library that asks it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = f"http://127.0.0.1:{server.getsockname()[1]}"
        done = run_in(
            folder, "score", "some/model", "pool.jsonl", "-o", "x", HF_ENDPOINT=where, HF_HUB_OFFLINE="0", HF_HOME="hub"
        )
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1  # nothing was read before
    assert "some/model: there is no such directory, nor a copy in the cache of the Hub, and the Hub " in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["colect"], "there is no command 'colect'; did you mean collect?"),
        (["atlas", "mrge"], "there is no command 'mrge'; did you mean merge?"),
        (["collect", "c.yaml", "--onyl", "x"], "there is no option --onyl; did you mean --only?"),
        (["collect", "c.yaml", "--engine", "rai"], "'rai' is not one of 'local', 'ray'; did you mean ray?"),
        (["plan", "a.atlas", "--strategy", "tpo", "-o", "p"], "did you mean top?"),
        (["bench", "a.atlas", "--methods", "bayesain"], "did you mean bayesian?"),
    ],
)
def test_words_that_are_meant_are_named(folder: Path, run: RunCommand, words: list[str], said: str) -> None:
    from forgetcast import Atlas
    from support.data import make_atlas

    if words[1:2] == ["a.atlas"]:
        atlas: Atlas = make_atlas(folder / "a.atlas", make_pool())
        words = [words[0], str(atlas.path), *words[2:]]
    code, _, err = run(*words)
    assert code == 2
    assert said in err


def test_help_has_no_type_for_what_has_no_value(run: RunCommand) -> None:
    for words in (["--help"], ["plan", "--help"], ["atlas", "create", "--help"]):
        code, out, _ = run(*words)
        assert code == 0
        assert "<bool>" not in out
        assert "--help" in out


def test_a_file_of_another_kind_is_told_as_what_it_is(folder: Path, run: RunCommand) -> None:
    from support.data import make_atlas

    atlas = make_atlas(folder / "a.atlas", make_pool()).path
    plan, task = folder / "plan.parquet", folder / "tasks" / "adding.jsonl"
    assert run("plan", atlas, "--strategy", "random", "-o", plan)[0] == 0
    for words, said in (
        (("plan", atlas, "--forecast", plan, "-o", folder / "x"), "; it has the columns of a replay plan"),
        (
            ("verify", "m", task, "--atlas", atlas, "--plan", atlas / "before.parquet", "-o", folder / "x"),
            "a score file",
        ),
        (("train", folder / "model", atlas, "-o", folder / "x"), "a.atlas is an atlas; needed are data"),
        (("report", atlas, "--verification", plan, "-o", folder / "x"), "is not JSON: it is no text in UTF-8"),
        (("diff", atlas / "before.parquet", atlas / "before.parquet", "--fail-if", "maen>1"), "; did you mean mean?"),
    ):
        code, _, err = run(*words)
        assert code == 2
        assert said in err, err


def test_a_recipe_and_a_configuration_are_told_apart(folder: Path, run: RunCommand) -> None:
    config, recipe = folder / "config.yaml", folder / "recipe.yaml"
    for content in ("steps: 3", "method: lora\nstepz: 3"):  # a mistake in it does not make it something else
        recipe.write_text(content)
        code, _, err = run("collect", recipe)
        said = f"error: {recipe}: this is a recipe, and a configuration is needed: a file with the fields model, pool, "
        assert (code, err.startswith(f"{said}tasks, atlas, in which the field recipe names")) == (2, True), err
    recipe.write_text("steps: 3")
    config.write_text(config.read_text().replace("atlas: a.atlas\n", ""))  # with a field forgotten, it is still one
    code, _, err = run("collect", config)
    assert (code, "the field 'atlas' is missing" in err) == (2, True), err
    given = {
        "recipe: {steps: 3}": "put what is below its field recipe into a file of its own",
        "recipe: recipe.yaml": f"give the one that it names, {recipe}",
        "recipe: lora": "give the one that it names, lora",
        "": "it names none, so that it takes the defaults",
    }
    for field, advice in given.items():
        config.write_text(f"model: ./model\npool: pool.jsonl\ntasks: tasks\natlas: a.atlas\n{field}\n")
        words = [folder / "model", folder / "tasks" / "adding.jsonl", "-o", folder / "x"]
        code, _, err = run("train", *words, "--recipe", config)
        said = f"error: {config}: this is a configuration of `collect`, and a recipe is needed: {advice}\n"
        assert (code, err == said) == (2, True), err
