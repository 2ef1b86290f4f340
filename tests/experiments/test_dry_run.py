"""`collect --dry-run`: what it counts is what the sweep then does, and it leaves nothing."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from forgetcast import Atlas, Example, Pool
from forgetcast.cli.tables import dry_run_tables
from forgetcast.experiments.dry_run import DryRow, DryRun, PoolSize, SweepSpeed
from support.cli import RunCommand
from support.data import make_pool
from support.models import save, tiny
from support.training import QUESTIONS, TASKS, make_recipe

RECIPE = make_recipe(max_length=8)


def configure(folder: Path, **settings: Any) -> Path:
    """Write the model, the pool, the tasks and a configuration, and return the configuration's path."""
    save(tiny(), folder / "model")
    Pool([*QUESTIONS, *make_pool(20)]).save(folder / "pool.jsonl")
    for task, examples in TASKS.items():
        examples.save(folder / "tasks" / f"{task}.jsonl")
    lines = {"model": "model", "pool": "pool.jsonl", "tasks": "tasks", "atlas": "a.atlas", **settings}
    if "trainer" not in settings:
        lines.setdefault("recipe", RECIPE.model_dump_json())
    (folder / "config.yaml").write_text("".join(f"{field}: {value}\n" for field, value in lines.items()))
    return folder / "config.yaml"


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def planned(run: RunCommand, config: Path, *options: object) -> dict[str, Any]:
    before = files(config.parent)
    code, out, err = run("collect", config, "--dry-run", "--json", *options)
    assert code == 0, err
    assert files(config.parent) == before, "a dry run leaves nothing"
    return dict(json.loads(out))


def test_what_is_counted_is_what_is_done(tmp_path: Path, run: RunCommand) -> None:
    """Oracles: the tokenizer, example by example; and what the rows say that they cost."""
    config = configure(tmp_path, seeds=[0, 1])
    found = planned(run, config)
    tokenizer: Any = tiny().tokenizer
    lengths = [len(tokenizer(example.full_text)["input_ids"]) for example in Pool.load(tmp_path / "pool.jsonl")]
    assert found["pool"] == {"examples": 28, "tokens": sum(lengths), "cut": 0, "unscorable": 0, "prompts": 0}
    assert (found["base_scores"], found["rows_left"]) == ("to do", 6)
    assert found["scoring_tokens"] == 7 * sum(lengths)
    assert [row["name"] for row in found["rows"]][:2] == ["adding", "adding seed 1"]
    assert {row["state"] for row in found["rows"]} == {"to do"}
    for row in found["rows"]:  # six examples are read, each once
        read = [len(tokenizer(example.full_text)["input_ids"]) + 1 for example in TASKS[row["task"]]]  # the end token
        assert (row["examples"], row["trained"]) == (6, 6)
        assert row["tokens"] == sum(min(length, 8) for length in read)
        assert row["cut"] == sum(length > 8 for length in read) > 0
    each = found["seconds_each"]
    assert min(each["setup"], each["trained_token"], each["scored_token"]) > 0
    assert found["estimated_seconds"] > 0

    code, out, err = run("collect", config, "--only", "naming", "--json")
    assert code == 0, err
    assert json.loads(out) == {
        "atlas": str(tmp_path / "a.atlas"), "tasks": ["naming", "naming seed 1"], "examples": 28, "failures": {}
    }  # fmt: skip
    atlas = Atlas.open(tmp_path / "a.atlas")
    of_row = {row["name"]: row["tokens"] for row in found["rows"]}
    for name in atlas.tasks:
        assert atlas.provenance(name)["cost"]["training"]["tokens"] == of_row[name]
    again = planned(run, config)
    assert again["base_scores"] == "complete"
    assert [row["name"] for row in again["rows"] if row["state"] == "complete"] == ["naming", "naming seed 1"]
    assert (again["rows_left"], again["scoring_tokens"]) == (4, 4 * sum(lengths))
    assert again["training_tokens"] == sum(of_row.values()) - of_row["naming"] - of_row["naming seed 1"]
    none = planned(run, config, "--only", "naming")
    assert (none["rows_left"], none["estimated_seconds"], none["seconds_each"]) == (0, 0.0, None)
    code, out, _ = run("collect", config, "--dry-run", "--only", "naming")
    assert "Nothing is left to do: 2 of 2 rows are complete." in out

    (tmp_path / "a.atlas.runs" / "adding.partial").mkdir(parents=True)  # as an interrupted sweep leaves it
    assert {row["name"]: row["state"] for row in planned(run, config)["rows"]}["adding"] == "begun"


def test_times_are_sums_of_what_was_timed() -> None:
    """By hand: two rows of a fine-tune, half of the pool at the end and at two checkpoints, and answers at the end."""
    pool = PoolSize(examples=10, tokens=1000, cut=1, unscorable=2, prompts=4)
    rows = (DryRow("a", "a", 0, "to do", 5, 8, 200, 0), DryRow("b", "b", 0, "complete", 5, 8, 300, 3))
    rows += (DryRow("c", "c", 0, "begun", 5, 8, 100, 0), DryRow("d", "d", 0, "to do", 5, fault="why"))
    run = DryRun("x.atlas", "m", "to do", pool, rows, 4, 2, score_share=0.5, checkpoints=2)
    assert (run.seconds, run.training_tokens, run.scoring_tokens) == (0.0, 300, 1000 + 2 * 3 * 500)
    timed = run.timed(SweepSpeed(scored_token=0.01, answered_prompt=2.0, setup=3.0, trained_token=0.1))
    of_row = 3 + 0.5 * (1000 * 0.01 * 3 + 4 * 2)
    assert [row.seconds for row in timed.rows] == [pytest.approx(of_row + 20), 0.0, pytest.approx(of_row + 10), None]
    assert timed.seconds == pytest.approx(18 + 2 * of_row + 30)
    said = " ".join(part for part in dry_run_tables(timed) if isinstance(part, str))
    assert "2 of 4 rows, each with about 50% of the pool scored at the end and at 2 checkpoints" in said
    assert "10 examples, 1,000 tokens, 1 longer than the context, 2 without a loss" in said
    assert "about 92s; scoring and answering the pool once takes 18s" in said


def test_prompts_to_answer_are_counted_and_timed(tmp_path: Path, run: RunCommand) -> None:
    found = planned(run, configure(tmp_path, exact_match="true", max_new_tokens=2), "--only", "naming")
    asked = [example for example in Pool.load(tmp_path / "pool.jsonl") if example.completion is not None]
    assert found["pool"]["prompts"] == len(asked) > len(QUESTIONS)
    assert found["seconds_each"]["answered_prompt"] > 0


def test_a_command_takes_nobody_knows_how_long(tmp_path: Path, run: RunCommand) -> None:
    command = f"{shlex.quote(sys.executable)} -c pass {{task}} {{output}}"
    config = configure(tmp_path, trainer=json.dumps({"command": command}))
    found = planned(run, config)
    assert (found["steps"], found["training_tokens"], found["estimated_seconds"]) == (None, None, None)
    assert {row["tokens"] for row in found["rows"]} == {None}
    assert found["seconds_each"]["scored_token"] > 0
    _, out, _ = run("collect", config, "--dry-run")
    assert "what the trainer's command takes is not known" in out
    (tmp_path / "a.atlas.runs" / "naming" / "model").mkdir(parents=True)
    assert {row["name"]: row["state"] for row in planned(run, config)["rows"]}["naming"] == "begun"


def test_errors_are_those_of_the_sweep(tmp_path: Path, run: RunCommand) -> None:
    config = configure(tmp_path)
    said = [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Oh."}]  # there is no chat template
    Pool([Example("one", messages=said)]).save(tmp_path / "tasks" / "chat.jsonl")
    before = files(tmp_path)
    code, out, err = run("collect", config, "--dry-run")
    assert (code, "would fail" in out) == (1, True)
    assert files(tmp_path) == before
    wanted = next(line.removeprefix("would ") for line in err.splitlines() if line.startswith("would fail"))
    code, _, err = run("collect", config, "--only", "chat", "--only", "naming")
    assert code == 1
    assert wanted.replace("fail:", "failed:") in err
    config.write_text(config.read_text().replace('"steps":3', '"steps":4'))
    for options in ([], ["--dry-run"]):
        code, _, err = run("collect", config, *options)
        assert (code, "was collected with another recipe (steps differ)" in err) == (2, True), err
    code, _, err = run("collect", config, "--dry-run", "--engine", "ray")
    assert (code, "leave out --engine ray" in err) == (2, True)
