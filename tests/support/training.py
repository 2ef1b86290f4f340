"""Tasks, a pool and an atlas for fine-tunes of the tiny model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import Trainer, TrainerCallback, TrainingArguments

from forgetcast import Atlas, Example, Pool
from forgetcast.lm import LanguageModel, Recipe, ReplayCallback, ReplayMixture, ReplaySelector, score
from support.data import make_pool, make_task, planted
from support.models import save, tiny

TASK = Pool(
    [Example(f"q{i}", prompt=f"Question: what is {i} + 1?\nAnswer:", completion=f" {i + 1}") for i in range(12)]
)
POOL = make_pool(40)
TASKS = {name: make_task(name, 6) for name in ("adding", "naming", "spelling")}
QUESTIONS = Pool([Example(f"q{i}", prompt=f"Item {i} is", completion=f" {w}") for i, w in enumerate("abcdefgh")])


def make_recipe(**changes: Any) -> Recipe:
    """Return the settings of a fine-tune of the tiny model: enough to change it, and no more, but for `changes`."""
    return Recipe(**{"steps": 3, "batch_size": 2, "learning_rate": 5e-3, "max_length": 48} | changes)


class Interruption(BaseException):  # as KeyboardInterrupt: it stops all work, and no task failed
    pass


def stop_at(words: str) -> Any:
    def on_progress(what: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        if words in what:
            raise Interruption

    return on_progress


def measured_atlas(folder: Path, settings: Recipe | None = None) -> Atlas:
    """Create an atlas of the tiny model's scores on `POOL` and planted rows."""
    before = score(tiny(), POOL)
    given = {} if settings is None else {"recipe": settings.model_dump()}
    atlas = Atlas.create(folder / "a.atlas", POOL, before, model="tiny", **given)
    for i, row in enumerate(np.abs(planted(8, len(POOL), 2, 0.05))):
        atlas.add(f"t{i}", replace(before, nll=before.nll + row))
    return atlas


def model_files(folder: Path) -> None:
    """Save the tiny model, a task, the pool and a recipe."""
    save(tiny(), folder / "model")
    TASK.save(folder / "task.jsonl")
    POOL.save(folder / "pool.jsonl")
    (folder / "recipe.yaml").write_text(make_recipe(steps=8, max_length=96, learning_rate=1e-2).model_dump_json())


def trainer(
    language_model: LanguageModel,
    mixture: ReplayMixture,
    folder: Path,
    selector: ReplaySelector | None = None,
    *,
    before: Sequence[TrainerCallback] = (),
    after: Sequence[TrainerCallback] = (),
    **options: Any,
) -> Trainer:
    settings_ = {
        "max_steps": mixture.steps,
        "per_device_train_batch_size": mixture.batch_size,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
    }
    return Trainer(
        model=language_model.model,
        args=TrainingArguments(output_dir=str(folder), **(settings_ | options)),
        train_dataset=mixture,
        data_collator=mixture.collate,
        callbacks=[*before, ReplayCallback(mixture, selector), *after],
    )
