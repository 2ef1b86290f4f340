"""Exports of a plan, read back by the tools that they are for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import load_dataset, load_from_disk

from forgetcast import ConfigError, DataError, Example, MismatchError, Pool, ReplayPlan
from forgetcast.replay.export import (
    FORMATS,
    TRAINERS,
    export_axolotl,
    export_llama_factory,
    export_mixture,
    export_weighted,
)
from support.cli import RunCommand
from support.plans import plan_for

# Names as the trainers document them: axolotl's pydantic schema (utils/schemas: config.py, training.py, model.py,
# datasets.py), LLaMA-Factory's data/README.md, hparams/data_args.py and examples/train_full/llama3_full_sft.yaml, and
# the arguments of the Hugging Face trainer.
AXOLOTL = {
    *("base_model", "datasets", "shuffle_merged_datasets", "train_on_inputs", "val_set_size", "output_dir"),
    *("sequence_len", "micro_batch_size", "gradient_accumulation_steps", "num_epochs", "learning_rate", "seed"),
}
AXOLOTL_DATASET = {"path", "ds_type", "type", "field", "data_files", "split", "name"}
AXOLOTL_PROMPT = {
    *("system_prompt", "system_format", "field_system", "field_instruction", "field_input", "field_output"),
    *("format", "no_input_format"),
}
LLAMA_FACTORY = {
    *("model_name_or_path", "stage", "do_train", "finetuning_type", "dataset", "dataset_dir", "mix_strategy"),
    *("interleave_probs", "template", "cutoff_len", "output_dir", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "num_train_epochs", "learning_rate", "seed"),
}
LLAMA_FACTORY_COLUMNS = {"prompt", "query", "response", "history", "system"}


@pytest.fixture
def plan(pool: Pool) -> ReplayPlan:
    forecast = np.random.default_rng(0).normal(size=24)
    return plan_for(pool, "half", 0.5, held_out=pool.ids[:7], forecast=forecast, seed=2)


@pytest.fixture
def task() -> Pool:
    pairs = [Example(f"n{i}", prompt=f"what is {i}? ", completion=f"{i}") for i in range(6)]
    return Pool([*pairs, *(Example(f"n{i}", text=f"the number {i} is näive\u2028 here") for i in range(6, 10))])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_weighted_examples(tmp_path: Path, pool: Pool, plan: ReplayPlan, suffix: str) -> None:
    path = tmp_path / f"replay.{suffix}"
    assert export_weighted(plan, pool, path) == 17
    kind = "json" if suffix == "jsonl" else "parquet"
    rows = load_dataset(kind, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")).to_list()
    assert [row["id"] for row in rows] == [id_ for id_ in pool.ids if id_ not in plan.held_out_ids]
    assert plan.rank is not None
    for row in rows:
        at = pool.ids.index(row["id"])
        assert row["weight"] == plan.weights[at]
        assert row["rank"] == plan.rank[at]
        assert row["text"] == pool[at].text
        assert row["completion"] == pool[at].completion
    again = Pool.load(path)  # what is exported is a pool again
    assert again.fingerprint == pool.subset(again.ids).fingerprint


def test_drawn_examples_come_in_the_order_of_replay(tmp_path: Path, pool: Pool, plan: ReplayPlan) -> None:
    with pytest.raises(ConfigError, match="25 examples are to be replayed, and the plan has 17"):
        export_weighted(plan, pool, tmp_path / "replay.jsonl", 25)
    assert export_weighted(replace(plan, repeat=True), pool, tmp_path / "replay.jsonl", 25) == 25
    assert [row["id"] for row in lines(tmp_path / "replay.jsonl")] == list(plan.order(25))
    export_weighted(plan_for(pool, "random", 0.5), pool, tmp_path / "random.jsonl")
    assert "rank" not in lines(tmp_path / "random.jsonl")[0]
    export_weighted(plan_for(pool, "random", 0.5), pool, tmp_path / "random.parquet")
    assert pq.read_table(tmp_path / "random.parquet")["rank"].null_count == 24


def test_mixture_is_evenly_spread(tmp_path: Path, pool: Pool, plan: ReplayPlan, task: Pool) -> None:
    assert export_mixture(plan, pool, task, tmp_path / "mixed", 5) == 15
    mixed = load_from_disk(str(tmp_path / "mixed"))
    # Texts and prompts, but no conversation: a column of nothing but None would mislead a trainer.
    assert mixed.column_names == ["id", "text", "prompt", "completion", "source", "replayed"]
    old = [row["id"] for row in mixed if row["replayed"]]
    assert old == list(plan.order(5))
    assert [row["id"] for row in mixed if not row["replayed"]] == list(task.ids)
    marks = np.array(mixed["replayed"])
    for start in range(0, 15, 3):  # two new ones to each replayed one, over any such stretch
        assert marks[start : start + 3].sum() == 1
    assert not set(old) & set(plan.held_out_ids)


def test_axolotl(tmp_path: Path, pool: Pool, plan: ReplayPlan, task: Pool) -> None:
    export_axolotl(plan, pool, task, tmp_path / "run", count=8, model="base")
    settings = yaml.safe_load((tmp_path / "run" / "axolotl.yaml").read_text())
    assert set(settings) <= AXOLOTL
    assert settings["base_model"] == "base"
    assert isinstance(settings["learning_rate"], float)
    seen: list[str] = []
    for entry in settings["datasets"]:
        assert set(entry) <= AXOLOTL_DATASET
        rows = load_dataset(entry["ds_type"], data_files=entry["path"], split="train", cache_dir=str(tmp_path / "c"))
        if entry["type"] == "completion":
            seen += rows[entry["field"]]
            continue
        kind = entry["type"]
        assert set(kind) <= AXOLOTL_PROMPT
        for row in rows:  # joined as axolotl joins them
            prompt = kind["no_input_format"].format(instruction=row[kind["field_instruction"]])
            seen.append(prompt + row[kind["field_output"]])
    wanted = [e.full_text for e in task] + [pool[pool.ids.index(id_)].full_text for id_ in plan.order(8)]
    assert sorted(seen) == sorted(wanted)


def test_llama_factory(tmp_path: Path, pool: Pool, plan: ReplayPlan, task: Pool) -> None:
    export_llama_factory(plan, pool, task, tmp_path / "run", count=8, model="base")
    settings = yaml.safe_load((tmp_path / "run" / "llama-factory.yaml").read_text())
    assert set(settings) <= LLAMA_FACTORY
    assert settings["mix_strategy"] in ("concat", "interleave_under", "interleave_over")
    assert "interleave_probs" not in settings  # which its arguments refuse beside concat
    folder = Path(settings["dataset_dir"])
    info = json.loads((folder / "dataset_info.json").read_text())
    seen: list[str] = []
    for name in settings["dataset"].split(","):
        assert info[name]["formatting"] == "alpaca"
        columns = info[name]["columns"]
        assert set(columns) <= LLAMA_FACTORY_COLUMNS
        file = str(folder / info[name]["file_name"])
        rows = load_dataset("json", data_files=file, split="train", cache_dir=str(tmp_path / "c"))
        seen += [row[columns["prompt"]] + row[columns["response"]] for row in rows]
    assert seen == [e.full_text for e in task] + [pool[pool.ids.index(id_)].full_text for id_ in plan.order(8)]


def test_invalid_exports_are_rejected(tmp_path: Path, pool: Pool, plan: ReplayPlan, task: Pool) -> None:
    other = Pool([Example("a", text="b")])
    with pytest.raises(MismatchError, match="another pool"):
        export_weighted(plan, other, tmp_path / "a.jsonl")
    for strategy, ratio in (("none", 0.0), ("padding", 0.5)):
        with pytest.raises(ConfigError, match="replays nothing"):
            export_weighted(plan_for(pool, strategy, ratio), pool, tmp_path / "a.jsonl")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("x")
    for export in TRAINERS.values():
        with pytest.raises(DataError, match="not empty"):
            export(plan, pool, task, tmp_path / "full", count=3, model="m")
    with pytest.raises(ConfigError, match="no example would be replayed"):
        export_mixture(plan, pool, task, tmp_path / "new", 0)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert (tmp_path / "full" / "kept").read_text() == "x"


@pytest.mark.parametrize("kind", FORMATS)
def test_the_command(tmp_path: Path, pool: Pool, plan: ReplayPlan, task: Pool, run: RunCommand, kind: str) -> None:
    plan.save(tmp_path / "plan.parquet")
    pool.save(tmp_path / "pool.jsonl")
    task.save(tmp_path / "task.jsonl")
    output = tmp_path / (f"out.{kind}" if kind in ("jsonl", "parquet") else "out")
    words = ["export", tmp_path / "plan.parquet", tmp_path / "pool.jsonl", "--format", kind, "-o", output, "--json"]
    if kind not in ("jsonl", "parquet"):
        assert "needs --task" in run(*words, "--steps", 4)[2]
    if kind in TRAINERS:
        assert "needs --model" in run(*words, "--task", tmp_path / "task.jsonl")[2]
    assert not output.exists()
    code, out, err = run(*words, "--task", tmp_path / "task.jsonl", "--model", "base")
    assert code == 0, err
    assert json.loads(out)["replayed"] == 5
    written = [output] if output.is_file() else [file for file in output.rglob("*") if file.is_file()]
    assert written
    for text in [e.full_text for e in pool if e.id in plan.held_out_ids]:
        assert not any(text.encode() in file.read_bytes() for file in written)


def test_the_count_of_the_command(tmp_path: Path, pool: Pool, plan: ReplayPlan, run: RunCommand) -> None:
    plan.save(tmp_path / "plan.parquet")
    pool.save(tmp_path / "pool.jsonl")
    words = ["export", tmp_path / "plan.parquet", tmp_path / "pool.jsonl", "-o", tmp_path / "out.jsonl"]
    for more, count in ((), 17), (("--count", 3), 3), (("--steps", 6, "--batch-size", 2), 6):
        assert run(*words, *more)[0] == 0
        assert len(lines(tmp_path / "out.jsonl")) == count
    assert "'csv' is not one of" in run(*words, "--format", "csv")[2]
    assert "should end in .parquet" in run(*words, "--format", "parquet")[2]


def test_conversations_are_exported_where_supported(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "four"}]
    pool = Pool([Example("c", messages=chat), Example("t", text="a text")])
    plan = plan_for(pool, "random", 0.5)
    for name in ("replay.jsonl", "replay.parquet"):
        export_weighted(plan, pool, tmp_path / name)
        assert list(Pool.load(tmp_path / name)) == list(pool)
    task = Pool([Example("n", text="new")])
    export_mixture(plan, pool, task, tmp_path / "mixture", 2)
    rows = load_from_disk(str(tmp_path / "mixture")).to_list()
    assert {row["id"]: row["messages"] for row in rows} == {"c": chat, "t": None, "n": None}
    weighed = Pool([Example("c", messages=[chat[0], chat[1] | {"weight": 1}])])
    with pytest.raises(ConfigError, match="'c': in a data set, messages have role and content only"):
        export_mixture(plan_for(weighed, "random", 0.5), weighed, task, tmp_path / "other", 1)
    for name, export in TRAINERS.items():
        with pytest.raises(ConfigError, match="'c' is a conversation"):
            export(plan, pool, task, tmp_path / name, count=2, model="m")
