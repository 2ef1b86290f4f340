"""The command `pool`, and what the commands say of the data that they read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from forgetcast import Atlas, Pool, Scores
from forgetcast.lm import LanguageModel, score
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
        (("--tokenizer", "absent-model", "--max-tokens", 9), "absent-model: there is no such directory"),
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


def test_from_long_documents_to_a_gate_over_documents(tmp_path: Path, base: Path, run: RunCommand) -> None:
    """`pool` splits, `score` keeps the pieces' ids, and `diff` clusters them by their document."""
    documents = {f"d{i}": "\n\n".join(f"Paragraph {j} of {i} has words." for j in range(i + 4)) for i in range(5)}
    rows = [{"id": name, "text": text} for name, text in documents.items()]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pool = tmp_path / "pool.jsonl"
    code, out, err = run("pool", tmp_path / "long.jsonl", "-n", 100, "--max-tokens", 20, "-o", pool)
    assert code == 0, err
    assert "5 documents split into" in out
    save(tiny(seed=1), tmp_path / "tuned")
    for model, name in ((base, "before"), (tmp_path / "tuned", "after")):
        code, _, err = run("score", model, pool, "-o", tmp_path / f"{name}.parquet", "--json")
        assert code == 0, err
    words = ("diff", tmp_path / "before.parquet", tmp_path / "after.parquet", "--cluster", "document", "--json")
    code, out, err = run(*words)
    assert code == 0, err
    found = json.loads(out)
    # An independent count of documents and pieces, and the mean over pieces by hand.
    ids = [json.loads(line)["id"] for line in pool.read_text().splitlines()]
    assert {id_.rsplit("#", 1)[0] for id_ in ids} == set(documents)
    assert len(ids) > 2 * len(documents)
    assert (found["loss"]["clusters"], found["loss"]["examples"]) == (len(documents), len(ids))
    before, after = (Scores.load(tmp_path / f"{name}.parquet") for name in ("before", "after"))
    change = dict(zip(before.ids, after.at(before.ids) - before.nll, strict=True))
    assert found["loss"]["mean"] == pytest.approx(np.mean(list(change.values())))
    means = [np.mean([change[i] for i in ids if i.startswith(f"{name}#")]) for name in documents]
    assert found["wilcoxon_p"] == pytest.approx(stats.wilcoxon(means).pvalue)
    unclustered = json.loads(run(*words[:3], "--json")[1])
    assert unclustered["loss"]["clusters"] is None
    assert unclustered["loss"]["lower"] != found["loss"]["lower"]


def test_plan_export_and_train_read_pools_and_tasks_alike(
    tmp_path: Path, data: Path, base: Path, run: RunCommand
) -> None:
    columns = {"prompt": "frage", "completion": "antwort"}
    pool = Pool.load(data, columns=columns)
    before = score(tiny(), pool)
    atlas = Atlas.create(tmp_path / "a.atlas", pool, before, model="tiny")
    for name in ("t0", "t1"):
        atlas.add(name, replace(before, nll=before.nll + 0.1))
    task = tmp_path / "task.jsonl"
    task.write_text("".join(f'{{"q": "{i}?", "a": "{i}!"}}\n' for i in range(4)) + '{"q": "5?", "a": ""}\n')
    of_task = ("--column", "prompt=q", "--column", "completion=a")
    of_pool = ("--pool-column", "prompt=frage", "--pool-column", "completion=antwort")
    plan = ("plan", atlas.path, "--hold-out", 0.2, "--ratio", 0.5, "-o", tmp_path / "plan.parquet")
    by_gradient = ("--strategy", "gradient", "--model", base, "--task", task)
    code, _, err = run(*plan, *by_gradient, *of_task)
    assert code == 0, err
    assert "prompt and completion, 4 examples, 1 row skipped" in err
    assert run(*plan, *by_gradient, *of_task, "--strict")[0] == 2
    code, _, err = run(*plan, *of_task)
    assert code == 2
    assert "--format, --column and --strict are about --task" in err
    (tmp_path / "recipe.yaml").write_text("{steps: 4, batch_size: 2, max_length: 32}")
    train = ("train", base, task, "--recipe", tmp_path / "recipe.yaml", "-o", tmp_path / "tuned")
    export = ("export", tmp_path / "plan.parquet", data, "--task", task, "-o", tmp_path / "out.jsonl")
    for words in ((*train, "--plan", tmp_path / "plan.parquet", "--pool", data), export):
        code, _, err = run(*words, *of_task)
        assert code == 2
        assert "the columns are frage, antwort" in err
        assert run(*words, *of_task, *of_pool, "--strict")[0] == 2
        code, _, err = run(*words, *of_task, *of_pool)
        assert code == 0, err
        assert f"{data}: prompt and completion, 7 examples, 1 row skipped" in " ".join(err.split())
    code, _, err = run(*train[:-1], tmp_path / "other", *of_task, *of_pool)
    assert code == 2
    assert "--pool-format and --pool-column are about --pool" in err


def test_half_a_surrogate_pair_ends_in_a_line(tmp_path: Path, base: Path, run: RunCommand) -> None:
    (tmp_path / "bad.jsonl").write_text('{"id": "a", "text": "half \\ud83d"}\n')
    code, _, err = run("score", base, tmp_path / "bad.jsonl", "-o", tmp_path / "scores.parquet")
    assert code == 2
    assert "bad.jsonl, line 1: example 'a', field 'text': character 6 is '\\ud83d', half of a surrogate pair" in err
