"""Replay through Trainers of the user's own."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Trainer, TrainingArguments

from conftest import make_pool
from forgetcast import ConfigError, make_plan
from forgetcast.lm import Chooser, LanguageModel, Recipe, ReplayCallback, ReplayMixture, Workbench, load, score
from forgetcast.lm.text import encode
from models import tiny
from test_lm_train import TASK

EXAMPLE = Path(__file__).parents[1] / "examples" / "replay_in_your_trainer.py"


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")  # the Trainer's default
def test_the_example_trains_as_the_command_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 25
    base, pool = tiny(), make_pool(24)
    base.model.save_pretrained(tmp_path / "model")
    base.tokenizer.save_pretrained(tmp_path / "model")
    plan = make_plan(pool, "random", 0.5, held_out=pool.ids[:12], seed=3)
    TASK.save(tmp_path / "task.jsonl")
    pool.save(tmp_path / "pool.jsonl")
    plan.save(tmp_path / "plan.parquet")
    words = [tmp_path / name for name in ("model", "task.jsonl", "pool.jsonl", "plan.parquet", "tuned")]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *map(str, words)])
    runpy.run_path(str(EXAMPLE))
    base.tokenizer.save_pretrained(tmp_path / "tuned")
    recipe = Recipe(steps=8, batch_size=4, max_length=96, learning_rate=5e-5)  # the Trainer's own learning rate
    tuned = Workbench(tiny()).tune(TASK, recipe, plan=plan, pool=pool).language_model
    found = score(load(tmp_path / "tuned"), pool).nll
    np.testing.assert_allclose(found, score(tuned, pool).nll, rtol=1e-5)
    assert np.abs(found - score(tiny(), pool).nll).max() > 1e-3


def trainer(
    language_model: LanguageModel, mixture: ReplayMixture, folder: Path, chooser: Chooser | None = None, **options: Any
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
        callbacks=[ReplayCallback(mixture, chooser)],
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_sampling_strategy": "random"}, 'set train_sampling_strategy="sequential"'),
        ({"per_device_train_batch_size": 2}, "a step of the Trainer is 2 examples, the mixture's 4"),
        ({"gradient_accumulation_steps": 2}, "a step of the Trainer is 8 examples, the mixture's 4"),
        ({"max_steps": 5}, "set max_steps=6: the Trainer would take 5 steps"),
    ],
)
def test_a_trainer_that_would_not_keep_to_the_mixture(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    base, pool = tiny(), make_pool(24)
    plan = make_plan(pool, "random", 0.5)
    mixture = ReplayMixture(TASK, base.tokenizer, steps=4, batch_size=4, max_length=64, plan=plan, pool=pool)
    with pytest.raises(ConfigError, match=message):
        trainer(base, mixture, tmp_path, **options).train()
    in_parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert trainer(base, mixture, tmp_path, **in_parts).train().global_step == 6


@settings(max_examples=8, deadline=None)
@given(
    held=st.sets(st.integers(0, 23), min_size=1, max_size=20),
    strategy=st.sampled_from(["random", "forecast", "top", "half", "stratified"]),
    ratio=st.sampled_from([0.25, 1.0, 3.0]),
    seed=st.integers(0, 9),
)
def test_what_is_held_out_never_reaches_a_batch(
    tmp_path_factory: pytest.TempPathFactory, held: set[int], strategy: str, ratio: float, seed: int
) -> None:
    base, pool = tiny(), make_pool(24)
    forecast = np.where(np.isin(np.arange(24), list(held)), 9.0, np.arange(24) / 24)  # what tempts a strategy most
    plan = make_plan(pool, strategy, ratio, held_out=[pool.ids[i] for i in held], forecast=forecast, seed=seed)
    mixture = ReplayMixture(TASK, base.tokenizer, steps=4, batch_size=2, max_length=96, plan=plan, pool=pool)
    seen: list[tuple[int, ...]] = []

    def look(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            seen.append(tuple(ids[mask.bool()].tolist()))

    handle = base.model.register_forward_pre_hook(look, with_kwargs=True)
    trainer(base, mixture, tmp_path_factory.mktemp("run")).train()
    handle.remove()
    assert len(seen) == 2 * mixture.steps
    texts = [tuple(encode(example, base.tokenizer, 96, end=True).ids) for example in pool]
    assert len(set(texts)) == 24
    assert not {texts[i] for i in held} & set(seen)
    assert [texts.index(ids) for ids in seen if ids in texts] == [pool.ids.index(id_) for id_ in mixture.replayed]
