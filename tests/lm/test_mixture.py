"""Replay through Trainers of the user's own."""

from __future__ import annotations

import pickle
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from forgetcast import ConfigError, Example, Pool
from forgetcast.lm import FineTuner, LanguageModel, Recipe, ReplayCallback, ReplayMixture, ReplaySelector, load, score
from forgetcast.lm.tokens import encode
from forgetcast.replay.export import export_mixture, replayed
from support.data import make_pool
from support.models import save, tiny
from support.plans import plan_for
from support.training import TASK, trainer

# SFTConfig's own default goes by the name of before.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")  # the Trainer's default
@pytest.mark.parametrize(
    ("name", "learning_rate"),  # the Trainer's own
    [("replay_in_your_trainer.py", 5e-5), ("replay_in_sft_trainer.py", 2e-5)],
)
def test_the_examples_train_as_the_command_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, learning_rate: float
) -> None:
    example = EXAMPLES / name
    assert len(example.read_text().splitlines()) < 25
    base, pool = tiny(), make_pool(24)
    save(base, tmp_path / "model")
    plan = plan_for(pool, "random", 0.5, held_out=pool.ids[:12], repeat=True, seed=3)
    TASK.save(tmp_path / "task.jsonl")
    pool.save(tmp_path / "pool.jsonl")
    plan.save(tmp_path / "plan.parquet")
    words = [tmp_path / name for name in ("model", "task.jsonl", "pool.jsonl", "plan.parquet", "tuned")]
    monkeypatch.setattr(sys, "argv", [str(example), *map(str, words)])
    runpy.run_path(str(example))
    base.tokenizer.save_pretrained(tmp_path / "tuned")
    recipe = Recipe(steps=8, batch_size=4, max_length=96, learning_rate=learning_rate)
    tuned = FineTuner(tiny()).tune(TASK, recipe, plan=plan, pool=pool).language_model
    found = score(load(tmp_path / "tuned"), pool).nll
    np.testing.assert_allclose(found, score(tuned, pool).nll, rtol=1e-5)
    assert np.abs(found - score(tiny(), pool).nll).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_sampling_strategy": "random"}, 'set train_sampling_strategy="sequential"'),
        ({"per_device_train_batch_size": 2}, "a step of the Trainer is 2 examples, the mixture's 4"),
        ({"gradient_accumulation_steps": 2}, "a step of the Trainer is 8 examples, the mixture's 4"),
        ({"max_steps": 5}, "set max_steps=6: the Trainer would take 5 steps"),
    ],
)
def test_incompatible_trainer_settings_are_rejected(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    base, pool = tiny(), make_pool(24)
    plan = plan_for(pool, "random", 0.5)
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
def test_held_out_examples_never_reach_a_batch(
    tmp_path_factory: pytest.TempPathFactory, held: set[int], strategy: str, ratio: float, seed: int
) -> None:
    base, pool = tiny(), make_pool(24)
    forecast = np.where(np.isin(np.arange(24), list(held)), 9.0, np.arange(24) / 24)  # what tempts a strategy most
    held_out = [pool.ids[i] for i in held]
    plan = plan_for(pool, strategy, ratio, held_out=held_out, forecast=forecast, repeat=True, seed=seed)
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


def sft_trainer(
    language_model: LanguageModel,
    mixture: ReplayMixture,
    folder: Path,
    selector: ReplaySelector | None = None,
    data: datasets.Dataset | None = None,
    **options: Any,
) -> SFTTrainer:
    settings_ = {
        "max_steps": mixture.steps,
        "per_device_train_batch_size": mixture.batch_size,
        "train_sampling_strategy": "sequential",
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }
    return SFTTrainer(
        language_model.model,
        SFTConfig(output_dir=str(folder), **(settings_ | options)),
        train_dataset=mixture.dataset() if data is None else data,
        processing_class=language_model.tokenizer,
        callbacks=[ReplayCallback(mixture, selector)],
    )


LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {},
    "packing": {"packing": True},
    "wrapped": {"packing": True, "packing_strategy": "wrapped"},
    "padding-free": {"padding_free": True, "max_length": None},
    "in parts": {"packing": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
}


class Gradients(TrainerCallback):
    def __init__(self) -> None:
        self.found: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.found.append({name: weight.grad.clone() for name, weight in model.named_parameters()})


def plain_gradients(base: LanguageModel, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Of the mean loss of the tokens that count, one example and one token at a time, without padding."""
    tokens, losses = base.tokenizer, list[torch.Tensor]()
    for example in examples:
        ids = tokens(example.text if example.text is not None else example.prompt).input_ids
        first = 1 if example.text is not None else len(ids)
        ids = [*ids, *tokens(example.completion or "", add_special_tokens=False).input_ids, tokens.eos_token_id]
        predicted = base.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        losses += [-predicted[i - 1, ids[i]] for i in range(first, len(ids))]
    base.model.zero_grad()
    torch.stack(losses).mean().backward()
    return {name: weight.grad.clone() for name, weight in base.model.named_parameters()}


@pytest.mark.parametrize(
    ("family", "layout"), [*(("llama", layout) for layout in LAYOUTS), ("gpt2", "packing"), ("gemma", "packing")]
)
def test_sft_trainer_trains_on_completions_only_in_every_layout(tmp_path: Path, family: str, layout: str) -> None:
    base, twin, pool, task = tiny(family), tiny(family), make_pool(24), Pool(TASK[:4])
    plan = plan_for(pool, "random", 1.0, seed=3)
    mixture = ReplayMixture(task, base.tokenizer, steps=1, batch_size=4, max_length=96, plan=plan, pool=pool)
    old = [pool[i] for i in pool.positions(mixture.replayed).tolist()]
    assert {example.text is None for example in old} == {True, False}
    for module in base.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    gradients, options = Gradients(), {"learning_rate": 0.0, "max_grad_norm": 0.0} | LAYOUTS[layout]
    sft = sft_trainer(base, mixture, tmp_path, **options)
    sft.add_callback(gradients)
    sft.train()
    assert len(gradients.found) == mixture.steps == 2
    for step, found in enumerate(gradients.found):
        expected = plain_gradients(twin, old if mixture.replays(step) else list(task))
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


class Backwards:
    """A selector that turns round what is left."""

    def settings(self) -> dict[str, Any]:
        return {}

    def check(self, mixture: ReplayMixture) -> None:
        pass

    def due(self, step: int, _: ReplayMixture) -> bool:
        return step == 2

    def select(self, _: LanguageModel, mixture: ReplayMixture, replayed: Sequence[str]) -> Sequence[str]:
        return mixture.replayed[: len(replayed) - 1 : -1]


@pytest.mark.parametrize("packing", [False, True])
def test_selection_during_training_reaches_an_sft_trainer(tmp_path: Path, packing: bool) -> None:
    base, pool = tiny(), make_pool(24)
    plan = plan_for(pool, "random", 1.0, seed=3)
    mixture = ReplayMixture(TASK, base.tokenizer, steps=4, batch_size=2, max_length=96, plan=plan, pool=pool)
    before, seen = mixture.replayed, list[list[int]]()

    def look(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        seen.append((ids.flatten() if mask is None else ids[mask.bool()]).tolist())

    base.model.register_forward_pre_hook(look, with_kwargs=True)
    sft_trainer(base, mixture, tmp_path, Backwards(), packing=packing).train()
    assert mixture.replayed != before
    assert seen == [mixture[i].ids + mixture[i + 1].ids for i in range(0, len(mixture), 2)]


def test_sft_trainer_with_other_data_is_rejected(tmp_path: Path) -> None:
    base, pool = tiny(), make_pool(24)
    plan = plan_for(pool, "random", 0.5)
    mixture, twin = (
        ReplayMixture(TASK, base.tokenizer, steps=4, batch_size=4, max_length=64, plan=plan, pool=pool) for _ in "ab"
    )
    rows = [{"input_ids": mixture[i].ids, "labels": mixture[i].labels} for i in range(len(mixture))]
    copy = datasets.Dataset.from_list(rows)
    for other in (copy, twin.dataset(), mixture.dataset().shuffle(seed=1), mixture.dataset().select(range(20))):
        with pytest.raises(ConfigError, match="does not train on the mixture"):
            sft_trainer(base, mixture, tmp_path, data=other).train()
    # TRL packs what it prepares by length, over all batches: new and old examples would share rows.
    packed = sft_trainer(base, mixture, tmp_path, data=copy, packing=True, dataset_kwargs=None, max_length=64)
    assert len(packed.train_dataset) < len(mixture)
    with pytest.raises(ConfigError, match="does not train on the mixture"):
        packed.train()
    with pytest.raises(ValueError, match="skip_prepare_dataset"):
        sft_trainer(base, mixture, tmp_path, packing=True, dataset_kwargs=None)
    with pytest.raises(ConfigError, match="set dataloader_num_workers=0"):
        pickle.loads(pickle.dumps(mixture.dataset()))


def test_an_exported_data_set_keeps_its_completions_when_trl_packs_it(tmp_path: Path) -> None:
    base = tiny()
    pool = Pool([Example(f"e{i}", prompt=f"Say {i}:", completion=f" yes {i}") for i in range(24)])
    plan = plan_for(pool, "random", 0.5)
    export_mixture(plan, pool, TASK, tmp_path / "data", count=6)
    data = datasets.load_from_disk(tmp_path / "data")
    mixture = ReplayMixture(TASK, base.tokenizer, steps=4, batch_size=4, max_length=64)
    sft = sft_trainer(base, mixture, tmp_path, data=data, packing=True, max_length=64, dataset_kwargs=None)
    assert len(sft.train_dataset) < len(data) == 18
    counted = sorted(label for row in sft.train_dataset for label in row["labels"] if label != -100)
    encoded = [encode(example, base.tokenizer, None, end=True) for example in (*TASK, *replayed(plan, pool, 6))]
    assert counted == sorted(label for one in encoded for label in one.labels if label != -100)
