"""Exports of a replay plan for other training tools: weighted examples, a mixture, configurations."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from forgetcast.data.pool import FIELDS, STRUCTURED, Example, Pool
from forgetcast.data.recipe import OWN_FIELDS, Recipe
from forgetcast.errors import ConfigError, DataError, MissingExtraError
from forgetcast.files import atomic_path, write_json
from forgetcast.replay.plan import ReplayPlan
from forgetcast.replay.sampling import passes, stratified_order


def replayed(plan: ReplayPlan, pool: Pool, count: int) -> list[Example]:
    """Return the first `count` examples that the plan replays, in order.

    Raises
    ------
    MismatchError
        If the plan is of another pool.
    ConfigError
        If `count` is below one or above what the plan may replay, or the plan selects during training.
    """
    plan.check_pool(pool)
    if plan.phase == "in-training":
        raise ConfigError(
            f"the strategy {plan.strategy!r} selects during training, which only forgetcast's callback can"
        )
    if count < 1:
        raise ConfigError(f"with the ratio {plan.ratio:g}, no example would be replayed; ask for at least one")
    plan.check_count(count)
    return [pool[i] for i in pool.positions(plan.order(count)).tolist()]


def new_examples(task: Pool, count: int, *, seed: int = 0) -> list[Example]:
    """Return the examples of a fine-tune that takes `count` new ones, in our trainer's order: pass after pass."""
    return [task[i] for i in islice(passes(len(task), [seed]), count)]


def export_weighted(plan: ReplayPlan, pool: Pool, path: str | Path, count: int | None = None) -> int:
    """Write upstream examples with their weights, and ranks if the plan has any, as Parquet or JSONL.

    Parameters
    ----------
    plan : ReplayPlan
    pool : Pool
    path : path
        Parquet if it ends in `.parquet`, else JSONL.
    count : int, optional
        Number of examples to write, in the order of replay; default: every example that may be replayed, once, in
        the pool's order.

    Returns
    -------
    int
        Number of rows.
    """
    plan.check_pool(pool)
    weights = dict(zip(plan.ids, plan.weights.tolist(), strict=True))
    ranks = dict(zip(plan.ids, plan.rank.tolist(), strict=True)) if plan.rank is not None else {}
    chosen = [e for e in pool if weights[e.id] > 0] if count is None else replayed(plan, pool, count)
    if not chosen:
        raise ConfigError(f"a plan with the strategy {plan.strategy!r} replays nothing that could be exported")
    rows = [asdict(e) | {"weight": weights[e.id], "rank": ranks.get(e.id)} for e in chosen]
    with atomic_path(Path(path)) as temporary:
        if Path(path).suffix == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            for row in rows:
                for name in STRUCTURED:
                    row[name] = row[name] and json.dumps(row[name], ensure_ascii=False)
            types = dict.fromkeys(FIELDS, pa.string()) | {"weight": pa.float64(), "rank": pa.int64()}
            pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(list(types.items()))), temporary)
        else:
            temporary.write_text(_json_lines(rows), encoding="utf-8")
    return len(rows)


def export_mixture(plan: ReplayPlan, pool: Pool, task: Sequence[Example], directory: str | Path, count: int) -> int:
    """Save the new and the replayed examples, evenly interleaved, as a Hugging Face data set.

    Its columns are id, text, prompt, completion, messages (role and content), source, and `replayed`, without those
    that are empty, because trainers choose by the columns that exist. Read it with `datasets.load_from_disk`. The new
    ones are those of `task`, each once: give `new_examples` for a fine-tune of another length.

    Returns
    -------
    int
        Number of rows.
    """
    try:
        from datasets import (
            Dataset,
            Features,
            Value,
            are_progress_bars_disabled,
            disable_progress_bars,
            enable_progress_bars,
        )
    except ImportError as error:
        raise MissingExtraError("lm", error) from error
    old = replayed(plan, pool, count)
    examples = [*task, *old]
    labels = ["new"] * len(task) + ["old"] * len(old)
    order = stratified_order(np.arange(len(examples)), labels).tolist()
    columns: dict[str, list[Any]] = {name: [getattr(examples[i], name) for i in order] for name in FIELDS}
    columns["replayed"] = [labels[i] == "old" for i in order]
    for example, messages in zip((examples[i] for i in order), columns["messages"], strict=True):
        if any(m.keys() != {"role", "content"} for m in messages or ()):
            raise ConfigError(f"example {example.id!r}: in a data set, messages have role and content only; use jsonl")
        if example.tools is not None or example.chat_template_kwargs is not None:
            raise ConfigError(f"example {example.id!r}: a data set has no tools and template arguments; use jsonl")
    types = {name: Value("string") for name in FIELDS}
    features = Features({**types, "messages": [{"role": Value("string"), "content": Value("string")}]})
    features["replayed"] = Value("bool")
    used = [name for name, values in columns.items() if any(value is not None for value in values)]
    data = Dataset.from_dict(columns, features=features).select_columns(used)
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        data.save_to_disk(str(_new_directory(directory)))
    finally:
        if shown:
            enable_progress_bars()
    return len(order)


def forms(examples: Iterable[Example]) -> Counter[str]:
    """Count the examples of each form: "texts", "prompts with completions", "conversations"."""
    return Counter(
        "conversations"
        if each.messages is not None
        else "texts"
        if each.text is not None
        else "prompts with completions"
        for each in examples
    )


def export_axolotl(
    plan: ReplayPlan, pool: Pool, task: Pool, directory: str | Path, *, recipe: Recipe, model: str
) -> dict[str, Any]:
    """Write data files and `axolotl.yaml` for a fine-tune by the recipe; return the configuration.

    The files hold every example as often as it is trained on, so that one pass over them, in any order, has exactly
    the ratio of replayed to new examples that our trainer makes of the plan: whole batches of both. Texts are of the
    type `completion`. Prompts and completions are joined without a template, and only the completion counts. Paths are
    relative to the folder. Batch sizes are of one device.

    Raises
    ------
    MismatchError
        If the plan is of another pool.
    ConfigError
        If the recipe cannot replay the plan (`ReplayPlan.count`), the plan selects during training, or an example is a
        conversation.
    """
    examples = _of_recipe(plan, pool, task, recipe)
    folder = _new_directory(directory)
    datasets = []
    for name, of_kind in examples.items():
        texts = [{"text": e.text} for e in of_kind if e.text is not None]
        pairs = [{"prompt": e.prompt, "completion": e.completion} for e in of_kind if e.text is None]
        for form, rows in (("texts", texts), ("prompts", pairs)):
            if rows:
                file = f"{name}-{form}.jsonl"
                _write(folder / file, _json_lines(rows))
                datasets.append({"path": file, "ds_type": "json", **_AXOLOTL_TYPES[form]})
    micro = _micro_batch_size(recipe)
    settings = {
        "base_model": _from_folder(model, folder),
        "datasets": datasets,
        "shuffle_merged_datasets": True,
        "train_on_inputs": False,
        "val_set_size": 0.0,
        "output_dir": "tuned",
        "sequence_len": recipe.max_length,
        "excess_length_strategy": "truncate",
        "sample_packing": False,
        "micro_batch_size": micro,
        "gradient_accumulation_steps": recipe.batch_size // micro,
        "max_steps": sum(map(len, examples.values())) // recipe.batch_size,
        "num_epochs": 1,
        "optimizer": "adamw_torch",
        "learning_rate": recipe.learning_rate,
        "lr_scheduler": _scheduler(recipe),
        "warmup_steps": recipe.warmup_steps,
        "weight_decay": recipe.weight_decay,
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "seed": recipe.seed,
    }
    if recipe.precision != "auto":
        settings["bf16"] = recipe.precision == "bfloat16"
    if recipe.method == "lora":
        settings |= {"adapter": "lora", "lora_r": recipe.lora_rank, "lora_alpha": recipe.lora_alpha}
        settings |= {"lora_dropout": 0.0, "lora_target_linear": True}
    _write_yaml(folder / "axolotl.yaml", settings)
    return settings


_AXOLOTL_TYPES: Mapping[str, dict[str, Any]] = {
    "texts": {"type": "completion", "field": "text"},
    "prompts": {
        "type": {
            "system_prompt": "",
            "field_instruction": "prompt",
            "field_output": "completion",
            "format": "{instruction}",
            "no_input_format": "{instruction}",
        }
    },
}


def export_llama_factory(
    plan: ReplayPlan, pool: Pool, task: Pool, directory: str | Path, *, recipe: Recipe, model: str
) -> dict[str, Any]:
    """Write data files, `dataset_info.json` and `llama-factory.yaml`; return the configuration.

    A text is the response to an empty prompt; the template adds nothing, not even an end of text. The files hold every
    example as often as it is trained on, and are concatenated (and shuffled in training): interleaving by probabilities
    would drop or repeat some of them. Otherwise as `export_axolotl`, whose errors it raises.
    """
    examples = _of_recipe(plan, pool, task, recipe)
    folder = _new_directory(directory)
    info = {}
    for name, of_kind in examples.items():
        rows = [{"prompt": e.prompt or "", "completion": e.completion if e.text is None else e.text} for e in of_kind]
        _write(folder / f"{name}.jsonl", _json_lines(rows))
        columns = {"prompt": "prompt", "response": "completion"}
        info[name] = {"file_name": f"{name}.jsonl", "formatting": "alpaca", "columns": columns}
    write_json(folder / "dataset_info.json", info)
    micro = _micro_batch_size(recipe)
    settings = {
        "model_name_or_path": _from_folder(model, folder),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": recipe.method,
        "dataset": ",".join(examples),
        "dataset_dir": ".",
        "mix_strategy": "concat",
        "template": "empty",
        "cutoff_len": recipe.max_length,
        "packing": False,
        "output_dir": "tuned",
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": recipe.batch_size // micro,
        "max_steps": sum(map(len, examples.values())) // recipe.batch_size,
        "num_train_epochs": 1.0,
        "optim": "adamw_torch",
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": _scheduler(recipe),
        "warmup_steps": recipe.warmup_steps,
        "weight_decay": recipe.weight_decay,
        "disable_gradient_checkpointing": not recipe.gradient_checkpointing,
        "seed": recipe.seed,
    }
    if recipe.precision != "auto":
        settings["bf16"] = recipe.precision == "bfloat16"
    if recipe.method == "lora":
        settings |= {"lora_rank": recipe.lora_rank, "lora_alpha": recipe.lora_alpha, "lora_target": "all"}
    _write_yaml(folder / "llama-factory.yaml", settings)
    return settings


TRAINERS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "axolotl": export_axolotl,
    "llama-factory": export_llama_factory,
}
FORMATS = ("jsonl", "parquet", "datasets", *TRAINERS)
"""Formats of an export."""


def _of_recipe(plan: ReplayPlan, pool: Pool, task: Pool, recipe: Recipe) -> dict[str, list[Example]]:
    """Return the new and the replayed examples of a fine-tune by the recipe, each as often as it is trained on."""
    if odd := [name for name in OWN_FIELDS if recipe.changes(name)]:
        raise ConfigError(f"the recipe's {odd[0]} cannot be exported: only `forgetcast train` has it; leave it out")
    plan.check_pool(pool)
    _micro_batch_size(recipe)
    new = new_examples(task, recipe.steps * recipe.batch_size, seed=recipe.seed)
    old = replayed(plan, pool, plan.count(recipe.steps, recipe.batch_size))
    _without_conversations(task, "of the task")
    _without_conversations(old, "to be replayed", "make the plan with --source, of sources without any, or ")
    return {"task": new, "replay": old}


def _micro_batch_size(recipe: Recipe) -> int:
    """Return the examples of a device at once; ConfigError if they do not divide the batch."""
    micro = recipe.micro_batch_size or recipe.batch_size
    if recipe.batch_size % micro:
        raise ConfigError(f"micro_batch_size {micro} does not divide batch_size {recipe.batch_size}")
    return micro


def _scheduler(recipe: Recipe) -> str:
    """Return the Trainer's name of the schedule, which both trainers take."""
    return "constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule


def _from_folder(model: str, folder: Path) -> str:
    """Return a local model's path from the folder that the trainer is started in; a hub id as it is."""
    return Path(os.path.relpath(model, folder)).as_posix() if Path(model).exists() else model


def _without_conversations(examples: Iterable[Example], which: str, remedy: str = "") -> None:
    """Raise ConfigError for a conversation, which needs a chat template: a trainer has one template for all."""
    found = [example.id for example in examples if example.messages is not None]
    if found:
        raise ConfigError(
            f"{len(found)} example(s) {which} are conversations, such as {found[0]!r}; {remedy}export them as jsonl, "
            "parquet or datasets"
        )


def _new_directory(path: str | Path) -> Path:
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise DataError(f"{path} exists and is not empty; choose another directory")
    path.mkdir(parents=True, exist_ok=True)
    return path


def _json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    lines = (json.dumps({k: v for k, v in row.items() if v is not None}, ensure_ascii=False) for row in rows)
    return "".join(line + "\n" for line in lines)


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _write_yaml(path: Path, settings: Mapping[str, Any]) -> None:
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
            """Write what occurs twice twice: not every reader knows anchors."""
            return True

    _write(path, yaml.dump(dict(settings), Dumper=Dumper, sort_keys=False, allow_unicode=True))
