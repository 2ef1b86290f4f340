from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from forgetcast import ConfigError, DataError, Example, MismatchError, Pool
from forgetcast.interruption import Interrupted
from forgetcast.lm import FineTuner, LanguageModel, Recipe, ReplayMixture, load, score, train
from forgetcast.lm.mixture import spread
from support.data import make_pool
from support.dying import tune_with_replay
from support.models import save, tiny
from support.plans import plan_for
from support.processes import exit_code
from support.training import TASK, make_recipe

RECIPE = make_recipe(steps=8, batch_size=4, max_length=64)


def same_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    state = model.state_dict()
    return state.keys() == weights.keys() and all(torch.equal(state[name], weights[name]) for name in weights)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_tuning_learns_the_task_and_restoring_undoes_it(method: str) -> None:
    base = tiny()
    weights = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    before = score(base, TASK).nll.mean()
    tuner = FineTuner(base)
    recipe = RECIPE.model_copy(update={"method": method})
    seen: list[tuple[int, int]] = []
    tuned = tuner.tune(TASK, recipe, on_step=lambda *step: seen.append(step))
    assert seen == [(i, 8) for i in range(1, 9)]
    assert tuned.steps == 8
    assert tuned.replayed == ()
    after = score(tuned.language_model, TASK).nll
    assert after.mean() < before - 0.3
    tuner.restore()
    assert same_weights(base.model, weights)
    # The same seed gives the same model, whatever was tuned before it.
    tuner.tune(TASK, RECIPE.model_copy(update={"seed": 9, "method": "lora" if method == "full" else "full"}))
    np.testing.assert_allclose(score(tuner.tune(TASK, recipe).language_model, TASK).nll, after, rtol=1e-4)
    tuner.restore()
    assert same_weights(base.model, weights)


def test_micro_batches_give_the_same_model() -> None:
    whole = FineTuner(tiny()).tune(TASK, RECIPE).language_model
    in_parts = FineTuner(tiny()).tune(TASK, RECIPE.model_copy(update={"micro_batch_size": 2})).language_model
    np.testing.assert_allclose(score(in_parts, TASK).nll, score(whole, TASK).nll, rtol=1e-3)
    with pytest.raises(ConfigError, match="does not divide"):
        FineTuner(tiny()).tune(TASK, RECIPE.model_copy(update={"micro_batch_size": 3}))


def test_training_is_that_of_a_plain_loop() -> None:
    """Oracle: AdamW with a linear decay, one batch after another, the mean loss over target tokens."""
    recipe = RECIPE.model_copy(update={"steps": 3})
    tuned = FineTuner(tiny()).tune(TASK, recipe).language_model
    plain = tiny()
    mixture = ReplayMixture(TASK, plain.tokenizer, steps=3, batch_size=4, max_length=64)
    plain.model.train()
    optimizer = torch.optim.AdamW(plain.model.parameters(), lr=5e-3, weight_decay=0.0)
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * (1 - step / 3)
        batch = mixture.collate([mixture[4 * step + i] for i in range(4)])
        logits = plain.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.model.parameters(), 1.0)
        optimizer.step()
    np.testing.assert_allclose(score(tuned, TASK).nll, score(plain, TASK).nll, rtol=1e-4)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_saved_model_scores_as_the_one_in_memory(tmp_path: Path, method: str) -> None:
    base = tiny()
    save(base, tmp_path / "base")
    tuner = FineTuner(load(tmp_path / "base"))
    tuned = tuner.tune(TASK, RECIPE.model_copy(update={"method": method}))
    tuned.save(tmp_path / "tuned")
    expected = score(tuned.language_model, TASK).nll
    np.testing.assert_allclose(score(load(tmp_path / "tuned"), TASK).nll, expected, rtol=1e-5)


def test_replay_adds_whole_batches_without_held_out_examples() -> None:
    pool, base = make_pool(24), tiny()
    plan = plan_for(pool, "random", 0.5, held_out=pool.ids[:12], repeat=True, seed=3)
    mixture = ReplayMixture(TASK, base.tokenizer, steps=8, batch_size=4, max_length=64, plan=plan, pool=pool)
    alone = ReplayMixture(TASK, base.tokenizer, steps=8, batch_size=4, max_length=64)
    assert len(mixture) == 48
    assert mixture.replayed == plan.order(16)
    assert not set(mixture.replayed) & set(plan.held_out_ids)
    batches = [[mixture[4 * step + i].ids for i in range(4)] for step in range(12)]
    new = [[alone[4 * step + i].ids for i in range(4)] for step in range(8)]
    is_old = list(spread(8, 4))
    assert [batch for batch, old in zip(batches, is_old, strict=True) if not old] == new
    tuned = FineTuner(base).tune(TASK, RECIPE, plan=plan, pool=pool)
    assert tuned.replayed == mixture.replayed
    assert tuned.steps == 12
    assert repr(tuned) == f"Tuned(steps=12, replayed=16, seconds={tuned.seconds:.1f})"


@pytest.mark.parametrize(("new", "old"), [(8, 4), (40, 8), (5, 0), (3, 7), (1, 1), (100, 3)])
def test_replayed_batches_are_evenly_spread(new: int, old: int) -> None:
    marks = np.array(list(spread(new, old)))
    assert len(marks) == new + old
    assert marks.sum() == old
    share = old / (new + old)
    counted = np.cumsum(marks) - share * np.arange(1, new + old + 1)
    assert np.abs(counted).max() <= 0.5 + 1e-9


def test_padding_repeats_the_task() -> None:
    pool, base = make_pool(24), tiny()
    sizes = {"steps": 8, "batch_size": 4, "max_length": 64}
    padded = ReplayMixture(TASK, base.tokenizer, **sizes, plan=plan_for(pool, "padding", 0.5), pool=pool)
    alone = ReplayMixture(TASK, base.tokenizer, **sizes)
    assert padded.replayed == ()
    assert padded.steps == 12
    is_more = [more for more in spread(8, 4) for _ in range(4)]
    assert [padded[i] for i, more in enumerate(is_more) if not more] == [alone[i] for i in range(32)]
    known = [alone[i].ids for i in range(32)]
    extra = [padded[i].ids for i, more in enumerate(is_more) if more]
    assert len(extra) == 16
    assert all(ids in known for ids in extra)
    assert len(set(map(tuple, extra[:12]))) == 12, "a pass over all of the task"
    tuned = FineTuner(base).tune(TASK, RECIPE, plan=plan_for(pool, "padding", 0.5), pool=pool)
    assert (tuned.steps, tuned.replayed) == (12, ())


def test_replay_reduces_forgetting_of_replayed_examples() -> None:
    """Examples that are replayed are forgotten less than without replay; else the mixture is not trained on."""
    pool = make_pool(16)
    plan = plan_for(pool, "random", 1.0, repeat=True)
    tuner = FineTuner(tiny())
    without = score(tuner.tune(TASK, RECIPE).language_model, pool).nll.mean()
    with_replay = score(tuner.tune(TASK, RECIPE, plan=plan, pool=pool).language_model, pool).nll.mean()
    assert with_replay < without - 0.3


def test_invalid_replay_is_rejected() -> None:
    pool, base = make_pool(24), tiny()
    plan = plan_for(pool, "random", 0.01)
    sizes = {"steps": 8, "batch_size": 4, "max_length": 64}
    with pytest.raises(ConfigError, match=r"replays no batch; use at least 0\.125"):
        ReplayMixture(TASK, base.tokenizer, **sizes, plan=plan, pool=pool)
    with pytest.raises(ConfigError, match="28 examples are to be replayed, and the plan has 24"):
        ReplayMixture(TASK, base.tokenizer, **sizes, plan=plan_for(pool, "random", 0.9), pool=pool)
    with pytest.raises(ConfigError, match="needs the pool"):
        ReplayMixture(TASK, base.tokenizer, **sizes, plan=plan)
    with pytest.raises(MismatchError, match="another pool"):
        ReplayMixture(TASK, base.tokenizer, **sizes, plan=plan_for(pool, "random", 0.5), pool=make_pool(23))


def test_a_loss_that_explodes_is_an_error() -> None:
    with pytest.raises(DataError, match="learning_rate"):
        FineTuner(tiny()).tune(TASK, RECIPE.model_copy(update={"learning_rate": 1e30, "steps": 4}))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stepz: 3", "there is no field 'stepz'; did you mean steps?"),
        ("steps: 0", "steps: must be at least 1, not 0"),
        ("learning_rate: -1", "learning_rate: must be greater than 0, not -1"),
        ("method: qlora", "method: must be one of full, lora, not 'qlora'; did you mean lora?"),
    ],
)
def test_invalid_recipes_are_rejected(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "recipe.yaml").write_text(f"batch_size: 4\n{text}\n")
    with pytest.raises(ConfigError, match=re.escape(f"recipe.yaml: {said}")):
        Recipe.load(tmp_path / "recipe.yaml")


def test_built_in_recipes() -> None:
    paper = Recipe.load("paper")
    assert (paper.method, paper.learning_rate, paper.steps, paper.max_length) == ("full", 2e-6, 1000, 1024)
    assert paper.batch_size == 8
    assert Recipe.load("lora").method == "lora"
    with pytest.raises(ConfigError, match=r"no recipe papper: give a YAML file, or one of lora, paper"):
        Recipe.load("papper")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_gradient_checkpointing_gives_the_same_model(method: str) -> None:
    recipe = RECIPE.model_copy(update={"method": method})
    base = tiny()
    calls: list[bool] = []
    base.model.model.layers[0].mlp.register_forward_pre_hook(lambda module, *_: calls.append(module.training))
    tuner = FineTuner(base)
    plain = score(tuner.tune(TASK, recipe).language_model, TASK).nll
    once = sum(calls)
    again = tuner.tune(TASK, recipe.model_copy(update={"gradient_checkpointing": True})).language_model
    np.testing.assert_allclose(score(again, TASK).nll, plain, rtol=1e-5)
    assert sum(calls) == 3 * once  # twice a step
    tuner.tune(TASK, recipe)
    assert sum(calls) == 4 * once


@pytest.mark.parametrize("method", ["full", "lora"])
def test_killed_run_resumes_to_the_same_model(tmp_path: Path, method: str) -> None:
    folder, pool = tmp_path / "out.partial", make_pool(24)
    assert exit_code(tune_with_replay, RECIPE.model_copy(update={"method": method}), folder) == 9
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-6"]
    torn = folder / "checkpoint-7"  # as if the next one had been cut short
    shutil.copytree(folder / "checkpoint-6", torn)
    (torn / "trainer_state.json").write_text('{"global_step": ')
    recipe = RECIPE.model_copy(update={"method": method})
    plan = plan_for(pool, "random", 0.5, seed=3)
    steps: list[int] = []
    tuner = FineTuner(tiny())
    with pytest.raises(MismatchError, match="an unfinished run of another"):
        tuner.tune(TASK, recipe, checkpoints=folder)
    found = tuner.tune(TASK, recipe, plan=plan, pool=pool, checkpoints=folder, on_step=lambda i, _: steps.append(i))
    assert steps == list(range(7, 13))
    after = score(found.language_model, pool).nll
    straight = FineTuner(tiny()).tune(TASK, recipe, plan=plan, pool=pool)
    assert straight.replayed == found.replayed
    np.testing.assert_allclose(after, score(straight.language_model, pool).nll, rtol=1e-5)


@pytest.mark.parametrize("step", [1, 5, 12])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_ctrl_c_leaves_a_checkpoint_and_the_run_goes_on_to_the_very_same_model(
    tmp_path: Path, method: str, step: int
) -> None:
    recipe, pool = RECIPE.model_copy(update={"method": method}), make_pool(24)
    given: dict[str, Any] = {"plan": plan_for(pool, "random", 0.5, seed=3), "pool": pool}
    straight = FineTuner(tiny()).tune(TASK, recipe, **given)
    expected = {name: value.clone() for name, value in straight.language_model.model.state_dict().items()}

    def interrupt(i: int, _: int) -> None:
        if i == step:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match=f"^after step {step} of 12$"):
        FineTuner(tiny()).tune(TASK, recipe, **given, checkpoints=tmp_path, on_step=interrupt)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{step}"]
    steps: list[int] = []
    tuner = FineTuner(tiny())
    resumed = tuner.tune(TASK, recipe, **given, checkpoints=tmp_path, on_step=lambda i, _: steps.append(i))
    assert steps == list(range(step + 1, 13))
    assert same_weights(resumed.language_model.model, expected)
    assert (resumed.steps, resumed.replayed) == (straight.steps, straight.replayed)
    # Kept, it is found by another tuner without a step.
    tuner.keep(resumed, tmp_path)
    found = FineTuner(tiny()).tune(TASK, recipe, **given, checkpoints=tmp_path, on_step=lambda i, _: steps.append(i))
    assert len(steps) == 12 - step
    assert same_weights(found.language_model.model, expected)
    assert (found.replayed, found.seconds, found.tokens) == (resumed.replayed, resumed.seconds, resumed.tokens)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_saved_model_says_how_it_was_made(tmp_path: Path, method: str) -> None:
    recipe, pool = RECIPE.model_copy(update={"method": method, "steps": 2}), make_pool(24)
    tuned = FineTuner(tiny()).tune(TASK, recipe, plan=plan_for(pool, "random", 0.5, seed=3), pool=pool)
    tuned.save(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "More Information Needed" not in card
    for said in (f"    method: {method}\n", TASK.fingerprint, tiny().weights_hash, "examples by random, ratio 0.5"):
        assert said in card


def test_the_seconds_of_an_interrupted_run_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by one at every step."""
    now = 0.0
    monkeypatch.setattr(train.time, "monotonic", lambda: now)

    def tick(i: int, _: int) -> None:
        nonlocal now
        now += 1
        if i == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        FineTuner(tiny()).tune(TASK, RECIPE, checkpoints=tmp_path, on_step=tick)
    now = 1000.0
    assert FineTuner(tiny()).tune(TASK, RECIPE, checkpoints=tmp_path, on_step=tick).seconds == 8


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    steps: list[int] = []

    def interrupt(i: int, _: int) -> None:
        steps.append(i)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as raised:
        FineTuner(tiny()).tune(TASK, RECIPE, checkpoints=tmp_path, on_step=interrupt)
    assert not isinstance(raised.value, Interrupted)
    assert steps == [1]
    assert not list(tmp_path.glob("checkpoint-*"))


def test_an_example_without_a_token_to_train_on() -> None:
    bare = tiny(bos=False)
    bare.tokenizer.eos_token = None
    with pytest.raises(DataError, match="'one' has no token to train on"):
        FineTuner(bare).tune(Pool([Example("one", text="a")]), RECIPE)


def test_a_tokenizer_without_a_padding_token() -> None:
    plain, bare = tiny(), tiny()
    bare.tokenizer.pad_token = None
    bare.tokenizer.eos_token = None
    assert bare.tokenizer.pad_token_id is None
    np.testing.assert_allclose(score(bare, TASK).nll, score(plain, TASK).nll, rtol=1e-6)
    assert np.isfinite(score(FineTuner(bare).tune(TASK, RECIPE).language_model, TASK).nll).all()


def test_context_falls_back_to_the_tokenizers_limit() -> None:
    language_model: LanguageModel = tiny()
    assert language_model.context == 96
    language_model.tokenizer.model_max_length = 50
    assert language_model.context == 50
