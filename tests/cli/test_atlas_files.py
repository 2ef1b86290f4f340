"""The commands that look after an atlas: info, drop, compact, convert."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from forgetcast import Atlas
from support.cli import RunCommand
from support.data import make_atlas, make_pool, make_scores

POOL = make_pool(20)


@pytest.fixture
def atlas(tmp_path: Path) -> Path:
    """An atlas of three rows and a fourth in two parts, of which half is measured."""
    opened = make_atlas(tmp_path / "runs.atlas", POOL, tasks=3)
    after = make_scores(POOL, np.full(len(POOL), 3.25))
    opened.add("half", after, examples=POOL.ids[:4], provenance={"kind": "scores"})
    opened.add("half", after, examples=POOL.ids[4:10])
    return tmp_path / "runs.atlas"


def test_info(atlas: Path, run: RunCommand) -> None:
    code, out, _ = run("atlas", "info", atlas, "--json")
    facts = json.loads(out)
    assert code == 0
    assert {name: facts[name] for name in ("format", "model", "examples", "tasks", "dropped", "answers")} == {
        "format": 2, "model": "base", "examples": 20, "tasks": 4, "dropped": 0, "answers": False,
    }  # fmt: skip
    assert facts["pool"] == POOL.fingerprint
    assert facts["bytes"] == sum(file.stat().st_size for file in atlas.rglob("*") if file.is_file())
    assert [row["task"] for row in facts["rows"]] == ["t0", "t1", "t2", "half"]
    half = facts["rows"][-1]
    assert (half["measured"], half["parts"], half["mean_forgetting"]) == (0.5, 2, 0.25)
    assert half["provenance"]["kind"] == "scores"
    code, out, _ = run("atlas", "info", atlas)
    assert code == 0
    assert "50.0%" in out
    assert "+0.2500" in out


def test_drop_and_compact(atlas: Path, run: RunCommand) -> None:
    code, out, _ = run("atlas", "drop", atlas, "t1", "--reason", "wrong file")
    assert (code, "t1 dropped, 3 tasks left" in out) == (0, True)
    assert json.loads(run("atlas", "info", atlas, "--json")[1])["dropped"] == 2
    assert "wrong file" in next(atlas.glob("rows/t1/dropped-*.json")).read_text()
    values = Atlas.open(atlas).matrix().values
    code, out, _ = run("atlas", "compact", atlas)
    assert (code, "3 tasks" in out) == (0, True)
    facts = json.loads(run("atlas", "info", atlas, "--json")[1])
    assert (facts["dropped"], [row["parts"] for row in facts["rows"]]) == (0, [1, 1, 1])
    assert not (atlas / "rows" / "t1").exists()
    np.testing.assert_array_equal(Atlas.open(atlas).matrix().values, values)
    code, _, err = run("atlas", "drop", atlas, "t1")
    assert (code, "has no task 't1'" in err) == (2, True)


def test_convert_leaves_an_atlas_of_today_as_it_is(atlas: Path, run: RunCommand) -> None:
    content = {file: file.read_bytes() for file in atlas.rglob("*") if file.is_file()}
    code, out, _ = run("atlas", "convert", atlas)
    assert (code, "is of format 2 already" in out) == (0, True)
    assert {file: file.read_bytes() for file in atlas.rglob("*") if file.is_file()} == content


@pytest.mark.parametrize("command", ["info", "compact", "convert"])
def test_a_folder_that_is_no_atlas(command: str, tmp_path: Path, run: RunCommand) -> None:
    code, _, err = run("atlas", command, tmp_path)
    assert (code, "is not an atlas" in err, err.count("\n")) == (2, True, 1)
