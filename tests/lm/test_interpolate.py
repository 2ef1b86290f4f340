from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from forgetcast import ConfigError, MismatchError
from forgetcast.experiments import AlphaPoint, ChosenAlpha, choose_alpha
from forgetcast.experiments.interpolation import _best
from forgetcast.lm import FineTuner, Interpolation, load, score
from support.adapters import adapted_model, lora
from support.cli import RunCommand
from support.data import make_pool
from support.models import save, tiny
from support.training import POOL, TASK, make_recipe, measured_atlas, model_files

RECIPE = make_recipe(steps=4, learning_rate=1e-2)


def state(model: object) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}  # type: ignore[attr-defined]


class TestInterpolation:
    @pytest.mark.parametrize("family", ["llama", "gemma"])  # without and with tied embeddings
    def test_its_ends_are_base_and_tuned_model_to_the_last_bit(self, family: str) -> None:
        base = state(tiny(family).model)
        tuned = FineTuner(tiny(family)).tune(TASK, RECIPE).language_model
        end = state(tuned.model)
        between = Interpolation(tuned, base)
        for alpha, expected in ((1.0, end), (0.0, base), (1.0, end)):
            found = state(between.at(alpha).model)
            assert all(torch.equal(found[name], expected[name]) for name in expected)
        found = state(between.at(0.3).model)
        for name in base:
            torch.testing.assert_close(found[name], 0.7 * base[name] + 0.3 * end[name], rtol=1e-6, atol=1e-7)

    def test_of_an_adapter_the_update_is_scaled(self) -> None:
        """Oracle: full weights, base plus alpha times the difference that the merged adapter makes."""
        pool, base = make_pool(6), tiny()
        adapted = FineTuner(tiny()).tune(TASK, make_recipe(method="lora", learning_rate=5e-2)).language_model
        merged = FineTuner(copy.deepcopy(adapted)).base
        between, by_weights = Interpolation(adapted), Interpolation(merged, base.model.state_dict())
        at_end = score(adapted, pool).nll
        assert np.abs(at_end - score(base, pool).nll).max() > 1e-3
        np.testing.assert_array_equal(score(between.at(0), pool).nll, score(base, pool).nll)
        np.testing.assert_allclose(score(between.at(0.4), pool).nll, score(by_weights.at(0.4), pool).nll, rtol=1e-4)
        np.testing.assert_array_equal(score(between.at(1), pool).nll, at_end)

    def test_hash_of_weights_follows(self) -> None:
        base = tiny()
        between = Interpolation(FineTuner(tiny()).tune(TASK, RECIPE).language_model, base.model.state_dict())
        assert between.at(0).weights_hash == base.weights_hash != between.at(0.5).weights_hash

    def test_in_half_precision_rounding_comes_last(self) -> None:
        one, other = tiny(), tiny(seed=1)
        one.model.to(torch.bfloat16)
        other.model.to(torch.bfloat16)
        start, end = state(one.model), state(other.model)
        found = state(Interpolation(other, start).at(0.1).model)
        for name in start:
            wide = 0.9 * start[name].double() + 0.1 * end[name].double()
            torch.testing.assert_close(found[name], wide.to(torch.bfloat16), rtol=2**-7, atol=1e-6)

    def test_models_that_do_not_fit_are_refused(self) -> None:
        tuned = tiny()
        smaller = state(tiny().model)
        smaller["model.norm.weight"] = torch.ones(16)
        with pytest.raises(MismatchError, match=r"differ in shape: model\.norm\.weight is \(32,\), in the base .*16"):
            Interpolation(tuned, smaller)
        with pytest.raises(MismatchError, match="and the base model has"):
            Interpolation(tuned, tiny("qwen").model.state_dict())
        with pytest.raises(ConfigError, match="needs those of its base model"):
            Interpolation(tuned)
        dora = tiny()
        object.__setattr__(dora, "model", adapted_model(dora.model, lora(use_dora=True)))
        with pytest.raises(ConfigError, match="an adapter with DoRA: merge it"):
            Interpolation(dora)
        plain = tiny()
        object.__setattr__(plain, "model", adapted_model(plain.model, lora()))
        Interpolation(plain, tiny().model.state_dict())
        with pytest.raises(MismatchError, match="adapter of another base model"):
            Interpolation(plain, tiny(seed=5).model.state_dict())
        with pytest.raises(ConfigError, match=r"between 0, the base model, and 1.*not 1\.5"):
            Interpolation(plain).at(1.5)


class TestChoice:
    def test_least_forgetting_within_the_bound(self) -> None:
        places = ((0, 0, 9.0), (0.5, 0.1, 0.02), (0.8, 0.2, -0.001), (1, 0.3, 0.0))
        points = [AlphaPoint(alpha, forgetting, 2.0, excess) for alpha, forgetting, excess in places]
        assert _best(points, 0.0) == 0.8
        assert _best(points, 0.02) == 0.5
        assert _best(points, 100) == 0
        # Without a gain, or without an interval, the model as it is.
        assert _best([AlphaPoint(0.5, 0.3, 2, 0.0), AlphaPoint(1, 0.3, 2, 0.0)], 0) == 1
        assert _best([AlphaPoint(0.5, 0.1, 2, None), AlphaPoint(1, 0.3, 2, None)], 9) == 1

    def test_figures_are_those_of_models_interpolated_by_hand(self) -> None:
        base, pool, validation = tiny(), make_pool(8), TASK.subset(TASK.ids[:3])
        tuned = FineTuner(tiny()).tune(TASK.subset(TASK.ids[3:]), RECIPE).language_model
        end, before, at_end = state(tuned.model), score(base, pool), score(tuned, validation).nll
        between = Interpolation(tuned, base.model.state_dict())
        found = choose_alpha(between, pool, validation, before, margin=0.5)
        point = next(each for each in found.points if each.alpha == 0.5)
        by_hand = tiny()
        by_hand.model.load_state_dict(
            {name: 0.5 * value + 0.5 * end[name] for name, value in state(base.model).items()}
        )
        assert point.forgetting == pytest.approx((score(by_hand, pool).nll - before.nll).mean(), abs=1e-5)
        assert point.new_task_loss == pytest.approx(score(by_hand, validation).nll.mean(), abs=1e-5)
        more = score(by_hand, validation).nll - at_end
        upper = stats.ttest_1samp(more, 0).confidence_interval(0.95).high
        assert point.excess == pytest.approx(upper, abs=1e-5)
        assert (found.points[0].alpha, found.points[-1].excess) == (0, 0)
        assert found.points[0].forgetting == pytest.approx(0, abs=1e-7)
        assert ChosenAlpha.from_dict(found.as_dict()) == found
        tokens = int(before.tokens.sum() + score(base, validation).tokens.sum())
        assert found.tokens == 11 * tokens
        assert f"alpha {found.alpha:g}: on the probes" in found.sentence()
        # Without scores of the base model, those of alpha 0 are taken.
        again = choose_alpha(between, pool, validation, alphas=[0.5], margin=0.5)
        assert [each.alpha for each in again.points] == [0, 0.5, 1]
        assert again.points[1].forgetting == pytest.approx(point.forgetting, abs=1e-6)
        with pytest.raises(ConfigError, match="must not be negative"):
            choose_alpha(between, pool, validation, margin=-1)


class TestCommand:
    def test_alpha_is_chosen_on_probes_that_are_not_held_out(self, tmp_path: Path, run: RunCommand) -> None:
        model_files(tmp_path)
        atlas = measured_atlas(tmp_path)
        FineTuner(tiny()).tune(TASK, RECIPE).save(tmp_path / "tuned")
        words = ("interpolate", tmp_path / "model", tmp_path / "tuned", "-o", tmp_path / "between", "--json")
        asked = ("--atlas", atlas.path, "--task", tmp_path / "task.jsonl", "--hold-out", 0.5, "--margin", 0.1)
        code, out, err = run(*words, *asked)
        assert code == 0, err
        facts = json.loads(out)
        assert len(facts["probes"]) == 20
        assert not set(facts["probes"]) & set(atlas.hold_out(0.5))
        assert json.loads((tmp_path / "between" / "interpolation.json").read_text())["alpha"] == facts["alpha"]
        by_hand = Interpolation(load(tmp_path / "tuned"), tiny().model.state_dict()).at(facts["alpha"])
        np.testing.assert_allclose(score(load(tmp_path / "between"), POOL).nll, score(by_hand, POOL).nll, rtol=1e-5)
        # The same from the pool alone.
        shutil.rmtree(tmp_path / "between")
        code, out, err = run(*words, "--pool", tmp_path / "pool.jsonl", *asked[2:])
        assert code == 0, err
        assert json.loads(out)["alpha"] == facts["alpha"]
        assert json.loads(out)["probes"] == facts["probes"]

    def test_an_adapter_stays_an_adapter(self, tmp_path: Path, run: RunCommand) -> None:
        model_files(tmp_path)
        FineTuner(load(tmp_path / "model")).tune(TASK, make_recipe(method="lora", learning_rate=5e-2)).save(
            tmp_path / "tuned"
        )
        words = ("interpolate", tmp_path / "model", tmp_path / "tuned", "-o", tmp_path / "between")
        assert run(*words, "--alpha", 0.5)[0] == 0
        assert (tmp_path / "between" / "adapter_model.safetensors").exists()
        by_hand = Interpolation(load(tmp_path / "tuned")).at(0.5)
        np.testing.assert_allclose(score(load(tmp_path / "between"), POOL).nll, score(by_hand, POOL).nll, rtol=1e-5)

    def test_bad_input_is_one_line(self, tmp_path: Path, run: RunCommand) -> None:
        model_files(tmp_path)
        save(tiny("qwen"), tmp_path / "other")
        words = ("interpolate", tmp_path / "model", tmp_path / "other", "-o", tmp_path / "between")
        pool = ("--pool", tmp_path / "pool.jsonl", "--task", tmp_path / "task.jsonl")
        for given, reason in (
            (("--alpha", 0.5), "take models of one shape"),
            (("--alpha", -1), "for '--alpha'"),
            ((), "give --alpha; or --task with --atlas or --pool"),
            (("--alpha", 0.5, *pool), "leave them out with --alpha"),
            ((*pool, "--margin", "nan"), "margin"),
        ):
            code, _, err = run(*words, *given)
            assert code == 2, given
            assert reason in err, given
            assert err.strip().count("\n") <= 1  # what was understood of the data, and the error
            assert not (tmp_path / "between").exists() or not list((tmp_path / "between").iterdir())
