"""Arms that do otherwise than replay by a plan."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from forgetcast import Atlas, ConfigError, Pool, Scores
from forgetcast.experiments import Interpolating, Variant, add_arms, arms, parse_arm
from forgetcast.experiments.interpolation import draw_probes
from forgetcast.experiments.verify import ReplayComparison, Verification
from forgetcast.interruption import Interrupted
from forgetcast.lm import FineTuner, score
from support.cli import RunCommand
from support.data import make_pool, make_task
from support.experiments import verify_on
from support.models import tiny
from support.plans import plan_for
from support.training import TASKS, make_recipe, measured_atlas, model_files

RECIPE = make_recipe()
VALIDATION, TEST = make_task("spelling", 2), make_task("naming", 2)


def comparison(pool: Pool, *asked: str) -> ReplayComparison:
    plan = plan_for(pool, "top", 0.7, held_out=pool.ids[:10], forecast=np.arange(24.0))
    choosing = Interpolating(None, pool.ids[12:20], VALIDATION, margin=0.05)
    plans, variants = add_arms([parse_arm(a) for a in asked], arms([plan], pool), RECIPE, choosing=choosing)
    return ReplayComparison("naming", TASKS["naming"], TEST, plans, variants=variants)


class TestNames:
    def test_an_arm_has_a_name_and_a_number(self) -> None:
        assert parse_arm("interpolation").name == "interpolation"
        assert parse_arm("interpolation=.7").name == "interpolation 0.7"
        assert parse_arm("learning-rate=0.3").value == 0.3

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("replay", "there is no arm 'replay'; there are interpolation, "),
            ("learning_rate=0.3", "did you mean learning-rate"),
            ("learning-rate", "needs a number, as learning-rate=0.3"),
            ("interpolation=2", "takes alpha, from 0 to 1, not '2'"),
            ("steps=1", "below 1, not '1'"),
            ("steps=many", "not 'many'"),
            ("learning-rate=nan", "above 0, not 'nan'"),
            ("easy=1", "takes no number, not '1'"),
            ("kl=0", "above 0, at most 1, not '0'"),
        ],
    )
    def test_others_are_refused(self, text: str, reason: str) -> None:
        with pytest.raises(ConfigError, match=reason):
            parse_arm(text)

    def test_simple_arms_come_first_and_change_the_recipe(self) -> None:
        found = comparison(
            make_pool(), "steps=.5", "learning-rate=.3", "interpolation", "interpolation=0.5", "steps=.5"
        )
        assert list(found.plans) == [
            "none", "interpolation", "interpolation 0.5", "learning-rate 0.3", "steps 0.5", "random", "top"
        ]  # fmt: skip
        assert found.variants["learning-rate 0.3"].recipe == {"learning_rate": pytest.approx(0.3 * 5e-3)}
        assert found.variants["steps 0.5"].recipe == {"steps": 2}
        assert "random" not in found.variants
        with pytest.raises(ConfigError, match="needs probes and validation examples"):
            add_arms([parse_arm("interpolation")], arms([found.plans["top"]], make_pool()), RECIPE)


def test_probes_are_neither_held_out_nor_without_a_loss() -> None:
    losses = np.arange(9.0)
    losses[4] = np.nan
    ids = list("abcdefghi")
    assert set(draw_probes(ids, losses, "ab", 99, 0)) == set("cdfghi")
    assert len(draw_probes(ids, None, "ab", 3, 0)) == 3
    with pytest.raises(ConfigError, match="every example of the pool is held out"):
        draw_probes(ids, losses, ids, 3, 0)


class TestVerification:
    def test_interpolations_are_of_the_run_without_replay(self, tmp_path: Path) -> None:
        """Oracle: the fine-tune made by hand, and its weights averaged with the base model's."""
        pool, base = make_pool(), tiny()
        before = score(base, pool)
        compared = comparison(
            pool, "interpolation", "interpolation=0", "interpolation=0.5", "interpolation=1", "steps=.5"
        )
        seen: list[tuple[int, int]] = []
        given = {"seeds": [1], "directory": tmp_path / "runs"}
        result = verify_on(
            pool, before, FineTuner(tiny()), [compared], RECIPE, **given, on_progress=lambda _, *n: seen.append(n)
        )
        assert seen[-1][0] == seen[-1][1]
        runs = {run.arm: run for run in result.runs}
        assert runs["interpolation 0"].mean == pytest.approx(0, abs=1e-7)
        for name in ("mean", "worst_tenth", "new_task_loss"):
            assert getattr(runs["interpolation 1"], name) == getattr(runs["none"], name)
        start = {name: value.clone() for name, value in base.model.state_dict().items()}
        tuned = FineTuner(tiny()).tune(TASKS["naming"], RECIPE.model_copy(update={"seed": 1})).language_model
        with torch.no_grad():
            for name, value in tuned.model.state_dict().items():
                value.copy_(0.5 * start[name] + 0.5 * value)
        assert runs["interpolation 0.5"].mean == pytest.approx(
            (score(tuned, pool).nll - before.nll)[:10].mean(), abs=1e-5
        )
        assert runs["interpolation 0.5"].new_task_loss == pytest.approx(score(tuned, TEST).nll.mean(), rel=1e-5)
        assert (
            runs["interpolation"].alpha
            == Scores.load(tmp_path / "runs" / "naming.interpolation.1.parquet").metadata["choice"]["alpha"]
        )
        assert (runs["interpolation"].scored_tokens or 0) > 0 == runs["none"].scored_tokens
        assert runs["none"].alpha is None
        assert (runs["none"].trained_tokens or 0) > (runs["steps 0.5"].trained_tokens or 0) > 0
        assert (runs["top"].trained_tokens or 0) > (runs["none"].trained_tokens or 0)
        assert Verification.from_dict(result.as_dict()) == result
        # One that is asked for later has the weights made again, with the same outcome; the others stay.
        for file in (tmp_path / "runs").glob("naming.interpolation*"):
            file.unlink()
        kept = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "runs").iterdir()}
        again = verify_on(pool, before, FineTuner(tiny()), [compared], RECIPE, **given)
        assert [replace(run, seconds=0) for run in again.runs] == [replace(run, seconds=0) for run in result.runs]
        assert {name: (tmp_path / "runs" / name).stat().st_mtime_ns for name in kept} == kept

    def test_arms_of_a_plan_change_its_recipe(self, tmp_path: Path) -> None:
        """Oracle: the fine-tunes made by hand."""
        pool = make_pool()
        before = score(tiny(), pool)
        compared = comparison(pool, "kl=1", "weight=4", "spacing", "easy")
        assert list(compared.plans) == ["none", "easy", "random", "top", "top spacing", "top weight 4", "top kl 1"]
        result = verify_on(pool, before, FineTuner(tiny()), [compared], RECIPE, seeds=[0], directory=tmp_path)
        runs = {run.arm: run for run in result.runs}
        for arm, changes, plan in (
            ("easy", {"easy_samples": True}, None),
            ("top weight 4", {"replay_weight": 4.0}, compared.plans["top"]),
            ("top kl 1", {"kl_weight": 1.0}, compared.plans["top"]),
        ):
            recipe = RECIPE.model_copy(update=changes)
            tuned = FineTuner(tiny()).tune(TASKS["naming"], recipe, plan=plan, pool=pool).language_model
            assert runs[arm].mean == pytest.approx((score(tuned, pool).nll - before.nll)[:10].mean(), abs=1e-5)
            assert runs[arm].strategy == arm
        assert len({run.mean for run in result.runs}) == len(runs) - (runs["top spacing"].mean == runs["top"].mean)
        # Only random replay: then it is that of random.
        only = plan_for(pool, "random", 0.7, held_out=pool.ids[:10])
        assert "random kl 1" in add_arms([parse_arm("kl=1")], arms([only], pool), RECIPE)[0]
        none = plan_for(pool, "none", 0.0, held_out=pool.ids[:10])
        with pytest.raises(ConfigError, match="the arm 'kl' needs a plan that replays"):
            add_arms([parse_arm("kl=1")], arms([none], pool), RECIPE)

    def test_probes_and_validation_are_none_of_those_judged_on(self, tmp_path: Path) -> None:
        pool = make_pool()
        compared = comparison(pool, "interpolation")
        result = verify_on(
            pool, score(tiny(), pool), FineTuner(tiny()), [compared], RECIPE, seeds=[0], directory=tmp_path
        )
        how = compared.variants["interpolation"].interpolation
        assert how is not None
        assert not set(how.probes) & set(result.held_out["naming"])

    def test_adapters_are_interpolated_too(self, tmp_path: Path) -> None:
        pool = make_pool()
        compared = comparison(pool, "interpolation=0", "interpolation=1")
        recipe = make_recipe(method="lora", learning_rate=5e-2)
        result = verify_on(
            pool, score(tiny(), pool), FineTuner(tiny()), [compared], recipe, seeds=[0], directory=tmp_path
        )
        runs = {run.arm: run for run in result.runs}
        assert runs["interpolation 0"].mean == pytest.approx(0, abs=1e-7)
        assert runs["interpolation 1"].mean == runs["none"].mean != 0

    @pytest.mark.parametrize("method", [pytest.param("full", marks=pytest.mark.slow), "lora"])
    def test_an_interrupted_interpolation_is_not_trained_again(self, tmp_path: Path, method: str) -> None:
        """While alpha is chosen, and while a model between the two is judged, whose weights are not the tuned ones."""
        pool, recipe = make_pool(), make_recipe(method=method)
        before, compared = score(tiny(), pool), comparison(pool, "interpolation", "interpolation=0.5")
        trained: list[str] = []

        def verify_in(folder: str, stop: str = "never") -> Verification:
            def report(what: str, *_: int) -> None:
                if "fine-tuning" in what:
                    trained.append(what)
                if stop in what:
                    os.kill(os.getpid(), signal.SIGINT)

            given = {"seeds": [1], "directory": tmp_path / folder}
            return verify_on(pool, before, FineTuner(tiny()), [compared], recipe, **given, on_progress=report)

        whole, handler = verify_in("whole"), signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(Interrupted, match=r"interpolation, seed 1, choosing alpha, after \d+ of 110"):
                verify_in("runs", "interpolation, seed 1: choosing alpha")
            trained.clear()
            with pytest.raises(Interrupted, match=r"in naming, interpolation 0\.5, seed 1, scoring"):
                verify_in("runs", "interpolation 0.5, seed 1: scoring")
        finally:
            signal.signal(signal.SIGINT, handler)
        assert trained == []
        result = verify_in("runs")
        assert trained
        assert not [what for what in trained if "interpolation" in what]
        assert [replace(run, seconds=0) for run in result.runs] == [replace(run, seconds=0) for run in whole.runs]
        assert {file.suffix for file in (tmp_path / "runs").iterdir()} == {".parquet"}

    def test_a_run_without_a_variant_is_stored_as_in_earlier_versions(self) -> None:
        assert Variant("as it is").settings() == {}


def test_command(tmp_path: Path, run: RunCommand) -> None:
    model_files(tmp_path)
    atlas = measured_atlas(tmp_path, make_recipe(steps=2, batch_size=2))
    assert run("plan", atlas.path, "--ratio", 0.5, "--hold-out", 0.3, "-o", tmp_path / "plan.parquet")[0] == 0
    words = ("verify", tmp_path / "model", tmp_path / "task.jsonl", "--atlas", atlas.path, "--plan")
    words = (*words, tmp_path / "plan.parquet", "-o", tmp_path / "v.json", "--seeds", 2, "--test-share", 0.4)
    code, out, err = run(*words, "--arm", "interpolation", "--arm", "learning-rate=0.5")
    assert code == 0, err
    found = Verification.load(tmp_path / "v.json")
    assert found.arms == ("none", "interpolation", "learning-rate 0.5", "random", "top")
    assert "interpolation is" in out
    assert "interpolation replay" not in out
    assert "learning-rate 0.5 is" in out
    # The law of ratios is about replay under the recipe as it is.
    assert {each["strategy"] for each in Atlas.open(atlas.path).replays} == {"none", "random", "top"}
    code, _, err = run(*words, "--arm", "lower")
    assert code == 2
    assert "there is no arm 'lower'" in err
    assert json.loads((tmp_path / "v.json").read_text())["summaries"]["interpolation"].endswith(
        "alpha chosen on probes"
    )
