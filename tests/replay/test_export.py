"""Exports of a plan, read back by the tools that they are for."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import load_dataset, load_from_disk

from forgetcast import ConfigError, DataError, Example, MismatchError, Pool, ReplayPlan, make_plan
from forgetcast.lm import Recipe, ReplayMixture
from forgetcast.replay.export import (
    FORMATS,
    TRAINERS,
    export_axolotl,
    export_llama_factory,
    export_mixture,
    export_weighted,
)
from forgetcast.replay.plan import achieved_ratio
from support.cli import RunCommand
from support.data import make_pool
from support.models import tiny
from support.plans import plan_for

# Names as the trainers document them: axolotl's pydantic schema (utils/schemas: config.py, training.py, model.py,
# datasets.py), LLaMA-Factory's data/README.md, hparams/data_args.py and examples/train_full/llama3_full_sft.yaml, and
# the arguments of the Hugging Face trainer.
AXOLOTL = {
    *("base_model", "datasets", "shuffle_merged_datasets", "train_on_inputs", "val_set_size", "output_dir"),
    *("sequence_len", "micro_batch_size", "gradient_accumulation_steps", "num_epochs", "learning_rate", "seed"),
    *("excess_length_strategy", "sample_packing", "max_steps", "optimizer", "lr_scheduler", "warmup_steps"),
    *("weight_decay", "gradient_checkpointing", "bf16"),
    *("adapter", "lora_r", "lora_alpha", "lora_dropout", "lora_target_linear"),
}
AXOLOTL_DATASET = {"path", "ds_type", "type", "field", "data_files", "split", "name"}
AXOLOTL_PROMPT = {
    *("system_prompt", "system_format", "field_system", "field_instruction", "field_input", "field_output"),
    *("format", "no_input_format"),
}
LLAMA_FACTORY = {
    *("model_name_or_path", "stage", "do_train", "finetuning_type", "dataset", "dataset_dir", "mix_strategy"),
    *("interleave_probs", "template", "cutoff_len", "output_dir", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "num_train_epochs", "learning_rate", "seed", "packing", "max_steps", "optim"),
    *("lr_scheduler_type", "warmup_steps", "weight_decay", "disable_gradient_checkpointing", "bf16"),
    *("lora_rank", "lora_alpha", "lora_target"),
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


RECIPES = {
    "full": Recipe(steps=5, batch_size=4, micro_batch_size=2, max_length=99, schedule="constant", warmup_steps=3),
    "lora": Recipe(
        method="lora",
        steps=9,
        batch_size=3,
        learning_rate=5e-4,
        lora_rank=4,
        lora_alpha=7,
        seed=6,
        precision="bfloat16",
    ),
}


def trained_on(plan: ReplayPlan, pool: Pool, task: Pool, recipe: Recipe) -> tuple[list[str], list[str]]:
    """Return the texts of all new and replayed examples of a fine-tune by our own trainer's mixture."""
    tokenizer = tiny().tokenizer
    batches = {"steps": recipe.steps, "batch_size": recipe.batch_size, "seed": recipe.seed, "max_length": 96}
    mixture = ReplayMixture(task, tokenizer, **batches, plan=plan, pool=pool)
    new = [id_ for replay, id_ in mixture._order if not replay]
    return (
        [task[task.ids.index(id_)].full_text for id_ in new],
        [pool[pool.ids.index(id_)].full_text for id_ in mixture.replayed],
    )


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_axolotl(
    tmp_path: Path, pool: Pool, plan: ReplayPlan, task: Pool, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_axolotl(plan, pool, task, tmp_path / "run", recipe=recipe, model="base")
    text = (tmp_path / "run" / "axolotl.yaml").read_text()
    assert not re.search(r"(^|\s)[&*]\w", text), "no anchors"
    assert str(tmp_path) not in text
    settings = yaml.safe_load(text)
    assert set(settings) <= AXOLOTL
    assert settings["base_model"] == "base"
    monkeypatch.chdir(tmp_path / "run")  # where the trainer is started
    seen: list[str] = []
    replayed = 0
    for entry in settings["datasets"]:
        assert set(entry) <= AXOLOTL_DATASET
        rows = load_dataset(entry["ds_type"], data_files=entry["path"], split="train", cache_dir=str(tmp_path / "c"))
        replayed += len(rows) * entry["path"].startswith("replay")
        if entry["type"] == "completion":
            seen += rows[entry["field"]]
            continue
        kind = entry["type"]
        assert set(kind) <= AXOLOTL_PROMPT
        for row in rows:  # joined as axolotl joins them
            prompt = kind["no_input_format"].format(instruction=row[kind["field_instruction"]])
            seen.append(prompt + row[kind["field_output"]])
    new, old = trained_on(plan, pool, task, recipe)
    assert sorted(seen) == sorted(new + old)
    # One epoch is what our trainer takes: the same steps, batches and ratio.
    batch = settings["micro_batch_size"] * settings["gradient_accumulation_steps"]
    assert batch == recipe.batch_size
    assert settings["max_steps"] * batch == len(seen)
    assert replayed / (len(seen) - replayed) == achieved_ratio(recipe.steps, plan.ratio)
    assert (settings["learning_rate"], settings["sequence_len"]) == (recipe.learning_rate, recipe.max_length)
    assert (settings["warmup_steps"], settings["seed"]) == (recipe.warmup_steps, recipe.seed)
    assert settings["lr_scheduler"] == ("linear" if recipe.method == "lora" else "constant_with_warmup")
    assert settings.get("bf16") is (True if recipe.precision == "bfloat16" else None)
    lora = (settings.get("adapter"), settings.get("lora_r"), settings.get("lora_alpha"))
    assert lora == (("lora", 4, 7) if recipe.method == "lora" else (None, None, None))


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_llama_factory(
    tmp_path: Path, pool: Pool, plan: ReplayPlan, task: Pool, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    export_llama_factory(plan, pool, task, tmp_path / "run", recipe=recipe, model="base")
    text = (tmp_path / "run" / "llama-factory.yaml").read_text()
    assert str(tmp_path) not in text
    settings = yaml.safe_load(text)
    assert set(settings) <= LLAMA_FACTORY
    assert settings["mix_strategy"] in ("concat", "interleave_under", "interleave_over")
    assert "interleave_probs" not in settings  # which its arguments refuse beside concat
    monkeypatch.chdir(tmp_path / "run")
    assert Path(settings["model_name_or_path"]).samefile(tmp_path / "base")
    folder = Path(settings["dataset_dir"])
    info = json.loads((folder / "dataset_info.json").read_text())
    seen: dict[str, list[str]] = {}
    for name in settings["dataset"].split(","):
        assert info[name]["formatting"] == "alpaca"
        columns = info[name]["columns"]
        assert set(columns) <= LLAMA_FACTORY_COLUMNS
        file = str(folder / info[name]["file_name"])
        rows = load_dataset("json", data_files=file, split="train", cache_dir=str(tmp_path / "c"))
        seen[name] = [row[columns["prompt"]] + row[columns["response"]] for row in rows]
    new, old = trained_on(plan, pool, task, recipe)
    assert seen == {"task": new, "replay": old}
    batch = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    assert batch == recipe.batch_size
    assert settings["max_steps"] * batch == len(new) + len(old)
    assert len(old) / len(new) == achieved_ratio(recipe.steps, plan.ratio)
    assert (settings["finetuning_type"], settings["learning_rate"]) == (recipe.method, recipe.learning_rate)
    assert (settings["cutoff_len"], settings["lr_scheduler_type"]) == (
        recipe.max_length,
        "linear" if recipe.method == "lora" else "constant_with_warmup",
    )
    assert settings.get("bf16") is (True if recipe.precision == "bfloat16" else None)
    lora = (settings.get("lora_rank"), settings.get("lora_alpha"), settings.get("lora_target"))
    assert lora == ((4, 7, "all") if recipe.method == "lora" else (None, None, None))


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
            export(plan, pool, task, tmp_path / "full", recipe=RECIPES["full"], model="m")
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
    words += ["--task", tmp_path / "task.jsonl", "--model", "base"]
    if kind in TRAINERS:
        assert "the plan has none: give --recipe" in run(*words)[2]
        assert "--count is for jsonl" in run(*words, "--count", 3)[2]
        (tmp_path / "recipe.yaml").write_text("{steps: 5, batch_size: 2, micro_batch_size: 2}")
        words += ["--recipe", tmp_path / "recipe.yaml"]
        assert "the ratio of the plan is 0.5; of the export it is 0.4" in run(*words)[2]
        shutil.rmtree(output)
        words += ["--steps", 5, "--batch-size", 1]
        plan = replace(plan, ratio=1.0)
        plan.save(tmp_path / "plan.parquet")
    code, out, err = run(*words)
    assert code == 0, err
    told = json.loads(out)
    assert (told["replayed"], told["ratio"]) == (5, 1.0 if kind in TRAINERS else 0.5)
    assert "note: the ratio" not in err
    written = [output] if output.is_file() else [file for file in output.rglob("*") if file.is_file()]
    assert written
    for text in [e.full_text for e in pool if e.id in plan.held_out_ids]:
        assert not any(text.encode() in file.read_bytes() for file in written)


def test_the_count_of_the_command(tmp_path: Path, pool: Pool, plan: ReplayPlan, run: RunCommand) -> None:
    plan.save(tmp_path / "plan.parquet")
    pool.save(tmp_path / "pool.jsonl")
    words = ["export", tmp_path / "plan.parquet", tmp_path / "pool.jsonl", "-o", tmp_path / "out.jsonl"]
    (tmp_path / "recipe.yaml").write_text("{steps: 4, batch_size: 3}")
    by_recipe = (("--recipe", tmp_path / "recipe.yaml"), 6)
    for more, count in ((), 17), (("--count", 3), 3), (("--steps", 6, "--batch-size", 2), 6), by_recipe:
        assert run(*words, *more)[0] == 0
        assert len(lines(tmp_path / "out.jsonl")) == count
    assert "'csv' is not one of" in run(*words, "--format", "csv")[2]
    assert "should end in .parquet" in run(*words, "--format", "parquet")[2]


def test_a_plan_carries_its_recipe_to_the_trainer(
    tmp_path: Path, pool: Pool, plan: ReplayPlan, task: Pool, run: RunCommand
) -> None:
    replace(plan, recipe=RECIPES["lora"]).save(tmp_path / "plan.parquet")
    assert ReplayPlan.load(tmp_path / "plan.parquet").recipe == RECIPES["lora"]
    pool.save(tmp_path / "pool.jsonl")
    task.save(tmp_path / "task.jsonl")
    words = ["export", tmp_path / "plan.parquet", tmp_path / "pool.jsonl", "--task", tmp_path / "task.jsonl"]
    words += ["--model", "hub/name", "--format", "axolotl", "-o", tmp_path / "out", "--json"]
    code, out, err = run(*words)
    assert code == 0, err
    # Half of nine steps is four batches of three.
    assert {"replayed": 12, "new": 27, "steps": 13, "method": "lora"}.items() <= json.loads(out).items()
    assert "the ratio of the plan is 0.5; of the export it is 0.4444" in err
    assert yaml.safe_load((tmp_path / "out" / "axolotl.yaml").read_text())["base_model"] == "hub/name"


def test_a_data_set_of_several_forms_is_said_to_be_one(tmp_path: Path, run: RunCommand) -> None:
    """TRL reads data of one form; the library that saves the data set draws no bar of its own."""
    chat = [{"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "four"}]
    texts = [Example("t0", text="a text"), Example("t1", text="another")]
    Pool([Example("n", text="new"), Example("m", text="and new")]).save(tmp_path / "task.jsonl")
    for name, examples in (("one", texts), ("two", [*texts, Example("c", messages=chat)])):
        pool = Pool(examples)
        pool.save(tmp_path / f"{name}.jsonl")
        plan_for(pool, "random", len(pool) / 2).save(tmp_path / f"{name}.parquet")
        words = ("export", tmp_path / f"{name}.parquet", tmp_path / f"{name}.jsonl", "--format", "datasets")
        code, _, err = run(*words, "--task", tmp_path / "task.jsonl", "-o", tmp_path / name)
        assert code == 0, err
        assert ("holds 4 texts, 1 conversations; TRL reads data of one form" in err) == (name == "two")
        assert "Saving" not in err


def test_too_long_a_task_names_the_remedy(tmp_path: Path, pool: Pool, plan: ReplayPlan, run: RunCommand) -> None:
    plan.save(tmp_path / "plan.parquet")
    pool.save(tmp_path / "pool.jsonl")
    Pool([Example(f"{i}", text=f"text {i}") for i in range(60)]).save(tmp_path / "task.jsonl")
    words = ["export", tmp_path / "plan.parquet", tmp_path / "pool.jsonl", "--task", tmp_path / "task.jsonl"]
    words += ["--format", "datasets", "-o", tmp_path / "out", "--json"]
    code, _, err = run(*words)
    assert code == 2
    assert "is 30 replayed ones, and the plan has 17: say with --steps and --batch-size, --recipe or --count" in err
    code, out, err = run(*words, "--steps", 8, "--batch-size", 4)
    assert code == 0, err
    assert {"replayed": 16, "new": 32, "ratio": 0.5}.items() <= json.loads(out).items()
    mixed = load_from_disk(str(tmp_path / "out"))
    assert (len(mixed), sum(mixed["replayed"])) == (48, 16)


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
        with pytest.raises(
            ConfigError, match="to be replayed are conversations, such as 'c'; make the plan with --source"
        ):
            export(plan, pool, task, tmp_path / name, recipe=Recipe(steps=2, batch_size=1), model="m")


def test_an_export_without_a_number_says_that_it_has_all_that_may_be_replayed(tmp_path: Path, run: RunCommand) -> None:
    pool = make_pool(12)
    pool.save(tmp_path / "pool.jsonl")
    make_plan(pool, "random", ratio=0.5, held_out=pool.ids[:4]).save(tmp_path / "plan.parquet")
    words = ("export", tmp_path / "plan.parquet", tmp_path / "pool.jsonl", "-o", tmp_path / "out.jsonl", "--json")
    code, out, err = run(*words)
    assert code == 0, err
    assert (json.loads(out)["usable"], json.loads(out)["replayed"]) == (8, None)
    assert json.loads(run(*words, "--count", 3)[1])["replayed"] == 3
