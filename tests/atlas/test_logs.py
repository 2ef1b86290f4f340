"""Logs of a base model and its fine-tunes become an atlas: what was asked is the pool, each fine-tune a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forgetcast import Atlas, DataError, MismatchError
from forgetcast.atlas.logs import import_logs
from forgetcast.atlas.validate import validate
from support.cli import RunCommand

HASHES = ("doc_hash", "prompt_hash", "target_hash")


def harness(folder: Path, losses: list[float], right: list[int], task: str = "quiz", **changes: Any) -> Path:
    """Write samples of a multiple-choice task with two choices, of which the second is right."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = [
        {
            "doc_id": i,
            "doc": {"question": f"Q{i}"},
            "target": "1",
            "arguments": [[f"Q{i}:", " no"], [f"Q{i}:", " yes"]],
            "filtered_resps": [[str(-9.0), "False"], [str(-loss), "True"]],
            "acc": float(right[i]),
            **{name: f"{name} {task} {i}" for name in HASHES},
            **changes,
        }
        for i, loss in enumerate(losses)
    ]
    file = folder / f"samples_{task}_2026-01-01T00-00-00.jsonl"
    file.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return folder


def inspect(folder: Path, values: list[str]) -> Path:
    folder.mkdir()
    spec = {
        "run_id": "r1",
        "created": "2026-01-01T00:00:00+00:00",
        "task": "sums",
        "model": f"vllm/{folder.name}",
        "dataset": {"sample_ids": [f"s{i}" for i in range(len(values))]},
        "config": {"epochs": 1},
        "scorers": [{"name": "match"}],
    }
    samples = [
        {
            "id": f"s{i}",
            "epoch": 1,
            "input": [{"role": "user", "content": f"What is {i}?"}],
            "target": ["x", "y"],
            "scores": {"match": {"value": value}},
        }
        for i, value in enumerate(values)
    ]
    (folder / "log.json").write_text(json.dumps({"version": 2, "status": "success", "eval": spec, "samples": samples}))
    return folder


def test_a_row_for_each_fine_tune(tmp_path: Path) -> None:
    base = harness(tmp_path / "base", [1.0, 2.0, 3.0], [1, 1, 0])
    tuned = [
        harness(tmp_path / "law", [1.5, 2.0, 2.5], [0, 1, 1]),
        harness(tmp_path / "code", [1.0, 4.0], [1, 0]),  # asked less
    ]
    atlas, notes = import_logs(base, tuned, tmp_path / "logs.atlas")
    assert notes == []
    assert atlas.tasks == ("law", "code")
    matrix, flips = atlas.matrix(), atlas.matrix(measure="exact_match")
    assert matrix.examples == ("quiz/0", "quiz/1", "quiz/2")
    assert matrix.sources == ("quiz",) * 3
    np.testing.assert_array_equal(matrix.values, [[0.5, 0, -0.5], [0, 2, np.nan]])
    np.testing.assert_array_equal(flips.values, [[1, 0], [0, 1]])
    assert (atlas.pool[1].prompt, atlas.pool[1].completion) == ("Q1:", " yes")
    assert atlas.provenance("law")["origin"] == "lm-evaluation-harness"
    assert validate(atlas.path) == []


def test_logs_of_inspect_have_answers_only(tmp_path: Path) -> None:
    base, tuned = inspect(tmp_path / "base", ["C", "C", "I"]), inspect(tmp_path / "law", ["I", "C", "C"])
    atlas, _ = import_logs(base, [tuned], tmp_path / "logs.atlas")
    np.testing.assert_array_equal(atlas.matrix(measure="exact_match").values, [[1, 0]])
    assert np.isnan(atlas.matrix().values).all()
    assert (atlas.pool[2].prompt, atlas.pool[2].completion) == ("What is 2?", "x, y")
    assert atlas.model == "vllm/base"


def test_what_only_one_side_has_is_counted(tmp_path: Path) -> None:
    base = harness(tmp_path / "base", [1.0, 2.0], [1, 1])
    harness(base, [1.0], [1], task="blank", target="", arguments=[], filtered_resps=["x"])
    tuned = harness(harness(tmp_path / "law", [1.5, 2.5, 3.5], [1, 1, 1]), [1.0], [1], task="more")
    atlas, notes = import_logs(base, [tuned], tmp_path / "logs.atlas")
    assert len(atlas.pool) == 2
    left_out = [note for note in notes if "left out" in note]
    assert [note.split(": ", 1)[1].split(" samples")[0] for note in left_out] == ["1", "2"]
    assert atlas.provenance("law")["not_in_pool"] == 2


def test_what_does_not_fit_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    base = harness(tmp_path / "base", [1.0, 2.0], [1, 1])
    other = harness(tmp_path / "other", [1.0], [1], task="another")
    asked = harness(tmp_path / "asked", [1.0, 2.0], [1, 1], prompt_hash="another prompt")
    again = harness(tmp_path / "sub/asked", [1.0], [1])
    unit = harness(tmp_path / "unit", [1.0, 2.0], [1, 1], filtered_resps=[["-1", "True"]], arguments=[["Q", " yes"]])
    before = sorted(path.name for path in tmp_path.iterdir())
    for tuned, message in (
        ([other], "no sample of"),
        ([asked], "other tokens or targets"),
        ([asked, again], "two logs are called 'asked'"),
        ([unit], "nats per continuation"),
        ([tmp_path / "nothing"], "no samples_"),
    ):
        with pytest.raises(DataError, match=message):
            import_logs(base, tuned, tmp_path / "logs.atlas")
        assert sorted(path.name for path in tmp_path.iterdir()) == before
    with pytest.raises(MismatchError):
        import_logs(base, [other], tmp_path / "logs.atlas")


def test_command(tmp_path: Path, run: RunCommand) -> None:
    base, tuned = harness(tmp_path / "base", [1.0, 2.0], [1, 1]), harness(tmp_path / "law", [1.5, 2.5], [1, 0])
    code, out, _ = run("atlas", "import", "--logs", base, tuned, "-o", tmp_path / "logs.atlas")
    assert code == 0
    assert "1 tasks x 2 examples" in out
    assert Atlas.open(tmp_path / "logs.atlas").tasks == ("law",)
    assert run("atlas", "import", "--logs", base, "-o", tmp_path / "x.atlas")[0] == 2
    assert run("atlas", "import", base, tuned, "-o", tmp_path / "x.atlas")[0] == 2
