"""`start` on files: the whole way, again, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forgetcast import Atlas
from forgetcast.cli.app import seconds
from forgetcast.errors import ConfigError
from forgetcast.experiments.procedural import KNOWN_TASKS
from support.cli import RunCommand
from support.data import make_pool
from support.models import save, tiny
from support.training import make_recipe


@pytest.fixture
def given(tmp_path: Path) -> list[object]:
    """A model, a pool and a recipe, and the words of the command."""
    save(tiny(), tmp_path / "model")
    make_pool().save(tmp_path / "pool.jsonl")
    (tmp_path / "recipe.yaml").write_text(make_recipe(method="lora", steps=2).model_dump_json())
    files = [tmp_path / name for name in ("model", "pool.jsonl")]
    return ["start", *files, "-o", tmp_path / "first.atlas", "--recipe", tmp_path / "recipe.yaml"]


def test_a_first_atlas(tmp_path: Path, given: list[object], run: RunCommand) -> None:
    code, out, err = run(*given, "--tasks", 2, "--dry-run", "--json")
    assert code == 0, err
    assert json.loads(out)["tasks"] == list(KNOWN_TASKS[:2])
    assert not list(tmp_path.glob("first.atlas/*"))
    code, out, err = run(*given, "--tasks", 2, "--seed", 3)
    assert code == 0, err
    assert "2 tasks of 2 steps (lora), the whole pool scored after each: about " in err
    atlas = Atlas.open(tmp_path / "first.atlas")
    assert atlas.tasks == KNOWN_TASKS[:2]
    assert (atlas.recipe["method"], atlas.recipe["seed"]) == ("lora", 3)
    assert "times that of no history (benchmarks/cost.py), on the demo model with 10 steps (lora)" in out
    assert f"forgetcast probes {tmp_path / 'first.atlas'} -k 30" in out

    code, out, err = run(*given, "--tasks", 2, "--seed", 3, "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert (facts["estimated_seconds"], facts["failures"], facts["score_share"]) == (0.0, {}, 1.0)
    code, _, err = run(*given, "--tasks", 2)
    assert code == 2
    assert "was begun with" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget", "soon"], "--budget: 'soon' is no time such as 90s, 30m or 2h"),
        (["--budget", "0.001s"], "a budget of 1s is too small: the least is "),
        (["--tasks", 1], "start: tasks: must be at least 2, not 1"),
        (["--recipe", "nothing"], "there is no recipe nothing"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, given: list[object], run: RunCommand, words: list[object], message: str
) -> None:
    code, _, err = run(*given, *words)
    assert (code, message in err) == (2, True), err
    assert not list(tmp_path.glob("first.atlas/*"))
    assert not list(tmp_path.glob("*.start.json"))


def test_times() -> None:
    assert [seconds(text, "--budget") for text in ("90s", "30m", "2h", "1.5h")] == [90, 1800, 7200, 5400]
    for text in ("", "30", "m", "-1m", "0s", "1d", "nan", "1e3s"):
        with pytest.raises(ConfigError, match="is no time"):
            seconds(text, "--budget")
