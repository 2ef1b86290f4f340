"""Losses other than the plain one, and where replayed batches come."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerState

from forgetcast import ConfigError, MismatchError
from forgetcast.data import Recipe
from forgetcast.experiments.runs import check_recipe
from forgetcast.lm import FineTuner, ReplayMixture, score
from forgetcast.lm.loss import WeightedTrainer, easy_weights
from forgetcast.lm.mixture import spread, spread_by
from forgetcast.lm.train import _learning_rates
from forgetcast.replay import export_axolotl
from support.models import tiny
from support.plans import plan_for
from support.training import POOL, TASK, make_recipe

PLAN = plan_for(POOL, "random", 1.0)
RECIPE = make_recipe(steps=4, learning_rate=1e-2)


def weights_of(recipe: Recipe, **given: Any) -> dict[str, torch.Tensor]:
    tuned = FineTuner(tiny()).tune(TASK, recipe, plan=PLAN, pool=POOL, **given)
    return {name: value.clone() for name, value in tuned.language_model.model.state_dict().items()}


class TestRecipe:
    def test_what_was_stored_before_stays_equal(self) -> None:
        plain = make_recipe().model_dump()
        assert not {"kl_weight", "replay_weight", "easy_samples", "spacing"} & set(plain)
        assert make_recipe(kl_weight=0.5).model_dump() == {**plain, "kl_weight": 0.5}
        assert Recipe(**make_recipe(kl_weight=0.5, spacing="updates").model_dump()).spacing == "updates"
        assert "spacing" not in make_recipe().model_dump_json()

    def test_rows_of_another_recipe_are_refused_in_both_directions(self) -> None:
        plain, other = make_recipe().model_dump(), make_recipe(kl_weight=0.5).model_dump()
        check_recipe("a row", plain, plain)
        for stored, wanted in ((plain, other), (other, plain)):
            with pytest.raises(MismatchError, match="kl_weight differ"):
                check_recipe("a row", stored, wanted)

    def test_other_trainers_do_not_have_them(self, tmp_path: Any) -> None:
        with pytest.raises(ConfigError, match="the recipe's kl_weight cannot be exported"):
            export_axolotl(PLAN, POOL, TASK, tmp_path / "run", recipe=make_recipe(kl_weight=1), model="m")


class TestDistanceToTheStart:
    @pytest.mark.parametrize("method", ["full", "lora"])
    def test_it_is_zero_at_the_start_and_has_no_gradient(self, method: str) -> None:
        """With a weight of one the first replayed batch alone would change nothing: no loss, no gradient."""
        seen: list[tuple[bool, float]] = []
        original = WeightedTrainer.compute_loss

        def spied(self: Any, *args: Any, **given: Any) -> Any:
            loss = original(self, *args, **given)
            seen.append((self._mixture.replays(self.state.global_step), float(loss.detach())))
            return loss

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(WeightedTrainer, "compute_loss", spied)
            # A learning rate of almost nothing: the model stays where it started.
            weights_of(make_recipe(steps=3, learning_rate=1e-12, kl_weight=1.0, method=method))
        assert [loss for replayed, loss in seen if replayed] == pytest.approx([0, 0, 0], abs=1e-6)
        assert all(loss > 1 for replayed, loss in seen if not replayed)

    @pytest.mark.parametrize("method", ["full", "lora"])
    def test_it_is_the_divergence_from_the_base_model(self, method: str) -> None:
        """Oracle: both distributions of every target token in double precision, the base model's from a fresh copy."""
        base, checked = tiny().model, []
        original = WeightedTrainer.compute_loss

        def spied(self: Any, model: Any, inputs: Any, **given: Any) -> Any:
            loss = original(self, model, inputs, **given)
            if self._mixture.replays(self.state.global_step):
                parts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
                with torch.no_grad():
                    before, now = (each(**parts).logits[:, :-1].double().log_softmax(-1) for each in (base, model))
                divergence = (before.exp() * (before - now)).sum(-1)[inputs["labels"][:, 1:] != -100].mean()
                checked.append((float(loss.detach()), float(divergence)))
            return loss

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(WeightedTrainer, "compute_loss", spied)
            weights_of(make_recipe(steps=4, learning_rate=2e-2, kl_weight=1.0, method=method))
        assert checked[-1][0] > 1e-4
        for loss, divergence in checked:
            assert loss == pytest.approx(divergence, rel=1e-3, abs=1e-6)

    def test_replay_with_it_keeps_the_model_nearer_to_its_start(self) -> None:
        base, texts = tiny(), POOL.subset(PLAN.order(8))
        recipe = make_recipe(steps=8, learning_rate=1e-2)
        moved = {}
        for kl in (0.0, 1.0):
            tuned = FineTuner(tiny()).tune(TASK, recipe.model_copy(update={"kl_weight": kl}), plan=PLAN, pool=POOL)
            moved[kl] = np.abs(score(tuned.language_model, texts).nll - score(base, texts).nll).mean()
        assert moved[1.0] < moved[0.0]


class TestWeights:
    def test_a_weight_of_one_is_the_plain_loss(self) -> None:
        """The loss is computed by hand there, and by the model here."""
        plain = weights_of(RECIPE)
        nearly = weights_of(RECIPE.model_copy(update={"kl_weight": 1e-12}))
        for name, value in plain.items():
            torch.testing.assert_close(nearly[name], value, rtol=1e-4, atol=2e-5)

    @pytest.mark.parametrize("micro", [None, 1])
    def test_replayed_batches_weigh_more(self, micro: int | None) -> None:
        """Oracle: of losses that the Trainer is told, those of replayed batches alone are multiplied."""
        seen: dict[float, list[tuple[bool, float]]] = {}
        original = WeightedTrainer.compute_loss
        for weight in (1.5, 3.0):
            found = seen.setdefault(weight, [])

            def spied(self: Any, *args: Any, found: list[tuple[bool, float]] = found, **given: Any) -> Any:
                loss = original(self, *args, **given)
                found.append((self._mixture.replays(self.state.global_step), float(loss.detach())))
                return loss

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(WeightedTrainer, "compute_loss", spied)
                weights_of(make_recipe(steps=2, learning_rate=1e-12, replay_weight=weight, micro_batch_size=micro))
        assert [old for old, _ in seen[1.5]] == [old for old, _ in seen[3.0]]
        for (old, one), (_, two) in zip(seen[1.5], seen[3.0], strict=True):
            assert two == pytest.approx(one * (2 if old else 1), rel=1e-5)

    def test_easy_examples_weigh_more(self) -> None:
        losses = np.array([1.0, 2.0, 4.0, np.nan])
        raw = np.exp(-np.array([1.0, 2.0, 4.0, 2.0]) / 2)
        np.testing.assert_allclose(easy_weights(losses), raw / raw.mean())

    def test_weights_reach_the_loss_of_their_example(self) -> None:
        """Oracle: with a weight of zero, an example's tokens change nothing but how many tokens there are."""
        few = TASK.subset(TASK.ids[:2])
        weights = {few.ids[0]: 2.0, few.ids[1]: 0.0}
        model = tiny()
        mixture = ReplayMixture(few, model.tokenizer, steps=1, batch_size=2, max_length=48, weights=weights)
        batch = mixture.collate([mixture[0], mixture[1]])
        trainer = WeightedTrainer.__new__(WeightedTrainer)
        trainer._mixture, trainer._recipe = mixture, make_recipe(easy_samples=True)
        trainer.state = TrainerState()
        found = trainer.compute_loss(model.model, batch)
        encoded = {example.id: model.encode(example, 48, end=True) for example in few}
        counts = {id_: each.targets for id_, each in encoded.items()}
        with torch.no_grad():
            ids = torch.tensor([encoded[few.ids[0]].ids])
            labels = torch.tensor([encoded[few.ids[0]].labels])
            alone = float(model.model(input_ids=ids, labels=labels).loss)
        assert float(found.detach()) == pytest.approx(2 * alone * counts[few.ids[0]] / sum(counts.values()), rel=1e-5)


class TestSpacing:
    @given(st.integers(1, 30), st.integers(0, 30))
    def test_equal_sizes_are_even(self, new: int, old: int) -> None:
        chosen = spread_by([1.0] * (new + old), old)
        assert sum(chosen) == old
        at = np.flatnonzero(chosen)
        even = np.flatnonzero(list(spread(new, old)))
        assert np.abs(at - even).max(initial=0) <= 1

    @given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.data())
    def test_every_old_batch_has_a_place(self, sizes: list[float], data: Any) -> None:
        old = data.draw(st.integers(0, len(sizes)))
        assert sum(spread_by(sizes, old)) == old

    def test_a_falling_learning_rate_brings_replay_forward(self) -> None:
        sizes = _learning_rates(Recipe(schedule="linear"), 40)
        np.testing.assert_allclose(sizes, 1 - np.arange(40) / 40)
        early = np.flatnonzero(spread_by(sizes, 8))
        assert early.mean() < np.flatnonzero(list(spread(32, 8))).mean() - 2
        np.testing.assert_allclose(_learning_rates(Recipe(schedule="constant", warmup_steps=2), 4), [0, 0.5, 1, 1])

    def test_a_fine_tune_sees_the_same_examples_at_other_times(self) -> None:
        recipe = make_recipe(steps=16, learning_rate=1e-3)
        tuner = FineTuner(tiny())
        plan = plan_for(POOL, "random", 0.25)
        replayed = {
            spacing: tuner.tune(TASK, recipe.model_copy(update={"spacing": spacing}), plan=plan, pool=POOL).replayed
            for spacing in ("even", "updates")
        }
        assert replayed["even"] == replayed["updates"]
