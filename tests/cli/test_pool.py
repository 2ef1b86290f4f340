"""The command `pool`, and what the commands say of the data that they read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forgetcast import Pool, Scores
from forgetcast.lm import LanguageModel
from support.cli import RunCommand
from support.models import save, tiny


@pytest.fixture
def base(tmp_path: Path) -> Path:
    model: LanguageModel = tiny()
    save(model, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"frage": f"What is {i}?", "antwort": f"It is {i}"} for i in range(8)]
    rows[3]["antwort"] = " "
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


COLUMNS = ("--column", "prompt=frage", "--column", "completion=antwort")


def test_a_pool_is_made_and_told(tmp_path: Path, data: Path, base: Path, run: RunCommand) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "long.md").write_text("\n\n".join(f"Paragraph {i} has a few words." for i in range(40)))
    words = ("pool", data, tmp_path / "notes", "-n", 10, "--by", "source", "--max-tokens", 40, *COLUMNS)
    code, out, err = run(*words, "-o", tmp_path / "pool.jsonl")
    assert code == 0, err
    assert out.startswith(f"{tmp_path}/pool.jsonl: 10 of ")
    assert "(data 5, notes 5); 1 documents split into" in out
    assert "at most 40 tokens, estimated as 4 characters each" in out
    assert f"data.jsonl: prompt and completion, 7 examples, 1 row skipped ({data}, line 4: the example has an" in err
    code, out, err = run(*words, "--tokenizer", base, "-o", tmp_path / "pool.parquet", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["tokens"] == "at most 40 tokens, by the tokenizer"
    assert told["sources"][0]["skipped_rows"][0]["place"] == f"{data}, line 4"
    assert told["fingerprint"] == Pool.load(tmp_path / "pool.parquet").fingerprint


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tokenizer", "x"), "--tokenizer counts the tokens of --max-tokens"),
        (("--tokenizer", "absent-model", "--max-tokens", 9), "absent-model gives no tokenizer"),
        (("--column", "prompt"), "write it as prompt=NAME"),
        (("--column", "prompt=a", "--column", "prompt=b"), "once for each field"),
        ((), "the columns are frage, antwort; needed are text"),
        ((*COLUMNS, "--strict"), "line 4: the example has an empty completion"),
    ],
)
def test_what_a_pool_cannot_be_made_of(
    tmp_path: Path, data: Path, run: RunCommand, words: tuple[object, ...], message: str
) -> None:
    code, _, err = run("pool", data, *words, "-o", tmp_path / "pool.jsonl")
    assert code == 2
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "pool.jsonl").exists()


def test_score_says_and_stores_what_was_skipped(tmp_path: Path, data: Path, base: Path, run: RunCommand) -> None:
    code, out, err = run("score", base, data, *COLUMNS, "-o", tmp_path / "scores.parquet", "--json")
    assert code == 0, err
    assert "prompt and completion, 7 examples, 1 row skipped" in err
    assert json.loads(out)["skipped"] == 1
    read = Scores.load(tmp_path / "scores.parquet").metadata["read"]
    assert read["skipped_rows"] == [{"place": f"{data}, line 4", "reason": "the example has an empty completion"}]
    code, _, err = run("score", base, data, *COLUMNS, "--strict", "-o", tmp_path / "other.parquet")
    assert code == 2
    assert not (tmp_path / "other.parquet").exists()


def test_half_a_surrogate_pair_ends_in_a_line(tmp_path: Path, base: Path, run: RunCommand) -> None:
    (tmp_path / "bad.jsonl").write_text('{"id": "a", "text": "half \\ud83d"}\n')
    code, _, err = run("score", base, tmp_path / "bad.jsonl", "-o", tmp_path / "scores.parquet")
    assert code == 2
    assert "bad.jsonl, line 1: example 'a', field 'text': character 6 is '\\ud83d', half of a surrogate pair" in err
