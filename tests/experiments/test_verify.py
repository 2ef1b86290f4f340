from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from forgetcast import ConfigError, DataError, Example, MismatchError, Pool, Scores
from forgetcast.cli.tables import verification_tables
from forgetcast.evaluation import paired_difference, worst_tenth
from forgetcast.experiments.verify import ReplayComparison, Verification, arms
from forgetcast.files import read_json
from forgetcast.lm import FineTuner, Recipe, exact_match, score
from forgetcast.replay import Run
from support.data import make_pool, make_task
from support.experiments import verify_on
from support.models import tiny
from support.plans import plan_for
from support.training import QUESTIONS, TASKS, Interruption, make_recipe, stop_at

RECIPE = make_recipe()


class TestVerify:
    def comparison(self, pool: Pool) -> ReplayComparison:
        plan = plan_for(pool, "forecast", 0.7, held_out=pool.ids[:10], forecast=np.arange(24.0))
        return ReplayComparison("naming", TASKS["naming"], make_task("naming", 2), arms([plan], pool))

    def test_every_arm_is_judged_on_the_held_out_examples(self, tmp_path: Path) -> None:
        pool, base = make_pool(), tiny()
        before = score(base, pool)
        comparison = self.comparison(pool)
        result = verify_on(pool, before, FineTuner(base), [comparison], RECIPE, directory=tmp_path)
        assert result.arms == ("none", "random", "forecast")
        assert result.judged == 10
        assert len(result.runs) == 6
        assert [run.replayed for run in result.runs if run.seed == 0] == [0, 4, 4]
        by_hand = FineTuner(tiny()).tune(TASKS["naming"], RECIPE.model_copy(update={"seed": 1})).language_model
        forgetting = score(by_hand, pool).nll[:10] - before.nll[:10]
        run = next(run for run in result.runs if (run.arm, run.seed) == ("none", 1))
        assert run.mean == pytest.approx(forgetting.mean(), abs=1e-5)
        assert run.worst_tenth == pytest.approx(worst_tenth(forgetting), abs=1e-5)
        assert run.new_task_loss == pytest.approx(score(by_hand, comparison.test).nll.mean(), rel=1e-5)
        assert Verification.from_dict(result.as_dict()) == result

    def test_every_run_keeps_what_it_replayed_and_none_saw_a_held_out_example(self, tmp_path: Path) -> None:
        pool, base = make_pool(), tiny()
        comparison, before = self.comparison(pool), score(base, pool)
        given = {"seeds": [0], "directory": tmp_path / "runs"}
        result = verify_on(pool, before, FineTuner(base), [comparison], RECIPE, **given)
        for arm, plan in comparison.plans.items():
            kept = result.replayed[f"naming.{arm}.0"]
            # By the same fine-tune, made by hand, and in its order.
            tuned = FineTuner(tiny()).tune(TASKS["naming"], RECIPE, plan=plan if plan.ratio else None, pool=pool)
            assert kept == tuned.replayed
            assert not set(kept) & set(result.held_out["naming"])
            tuned.save(tmp_path / arm)
            beside = read_json(tmp_path / arm / "replayed.json")
            assert beside["replayed"] == list(kept)
            assert beside["plan"] == (plan.fingerprint if plan.ratio else None)
        assert result.held_out == {"naming": tuple(pool.ids[:10])}
        assert "all 8 replayed examples of 3 runs: none is among the 10 held-out ones" in result.audit()
        assert result.audit() in " ".join(str(part) for part in verification_tables(result) if isinstance(part, str))
        # A run that saw one cannot be judged: neither from its file nor when it is loaded.
        content = result.as_dict()
        content["replayed"]["naming.random.0"][2] = pool.ids[4]
        with pytest.raises(DataError, match=r"naming\.random\.0 replayed 1 held-out example\(s\), e\.g\. 'e4'"):
            Verification.from_dict(content)
        content["replayed"]["naming.random.0"] = ["e20"]
        with pytest.raises(DataError, match="does not say which 4 examples it replayed"):
            Verification.from_dict(content)
        file = tmp_path / "runs" / "naming.random.0.parquet"
        stored = Scores.load(file)
        odd = [pool.ids[4], *stored.metadata["replayed"][1:]]
        replace(stored, metadata={**stored.metadata, "replayed": odd}).save(file)
        with pytest.raises(DataError, match="replayed 1 held-out example"):
            verify_on(pool, before, FineTuner(base), [comparison], RECIPE, **given)
        # Files of earlier versions do not say, and are told as such.
        old = {name: value for name, value in result.as_dict().items() if name not in ("replayed", "held_out")}
        assert "was not checked" in Verification.from_dict(old).audit()

    def test_flips_are_counted_where_the_base_model_answered(self, tmp_path: Path) -> None:
        """Oracle: the answers of the same fine-tune, asked for by hand."""
        teach = Recipe(steps=80, learning_rate=1e-2, batch_size=8, max_length=48)
        base = FineTuner(tiny()).tune(QUESTIONS, teach).language_model
        pool = Pool([*QUESTIONS, *make_pool(8)])
        new = Pool([Example(f"{i}", prompt=f"Item {i} is", completion=" z") for i in range(3)])
        right = exact_match(base, pool, max_new_tokens=4)[0]
        before = replace(score(base, pool), exact_match=right)
        before = replace(before, metadata={**before.metadata, "max_new_tokens": 4})
        plan = plan_for(pool, "random", 0.5, held_out=QUESTIONS.ids)
        recipe = Recipe(steps=8, learning_rate=1e-2, batch_size=2, max_length=48)
        comparison = ReplayComparison("early", new, new, arms([plan], pool))
        seen: list[tuple[int, int]] = []
        result = verify_on(
            pool,
            before,
            FineTuner(copy.deepcopy(base)),
            [comparison],
            recipe,
            seeds=[0],
            directory=tmp_path,
            on_progress=lambda _, *n: seen.append(n),
        )
        assert seen[-1][0] == seen[-1][1]
        assert "lost_answers" in result.metrics
        for run, replayed in zip(result.runs, (None, plan), strict=True):
            tuned = FineTuner(copy.deepcopy(base)).tune(new, recipe, plan=replayed, pool=pool).language_model
            after = exact_match(tuned, QUESTIONS, max_new_tokens=4)[0]
            assert run.right_to_wrong == (after == 0).sum() > 0
            assert run.right_before == len(QUESTIONS)
            assert run.lost_answers == np.mean(after == 0)

    def test_several_plans_are_arms_side_by_side(self) -> None:
        pool = make_pool()
        given = {"held_out": pool.ids[:10], "forecast": np.arange(24.0)}
        plans = [plan_for(pool, name, 0.5, **given) for name in ("top", "padding", "ranked")]
        assert list(arms(plans, pool)) == ["none", "random", "top", "padding", "ranked"]
        with pytest.raises(ConfigError, match="the same ratio"):
            arms([*plans, plan_for(pool, "forecast", 0.25, **given)], pool)
        with pytest.raises(ConfigError, match="two of the plans have the same strategy"):
            arms([*plans, plans[0]], pool)

    def test_interrupted_verification_resumes(self, tmp_path: Path) -> None:
        pool, base = make_pool(), tiny()
        before, comparison = score(base, pool), self.comparison(pool)
        with pytest.raises(Interruption):
            verify_on(
                pool,
                before,
                FineTuner(base),
                [comparison],
                RECIPE,
                directory=tmp_path,
                on_progress=stop_at("random replay, seed 1"),
            )
        kept = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.parquet")}
        assert len(kept) == 4
        tuner = FineTuner(tiny())
        result = verify_on(pool, before, tuner, [comparison], RECIPE, directory=tmp_path)
        assert len(result.runs) == 6
        assert {name: (tmp_path / name).stat().st_mtime_ns for name in kept} == kept
        with pytest.raises(MismatchError, match="other settings"):
            verify_on(pool, before, tuner, [comparison], RECIPE.model_copy(update={"steps": 4}), directory=tmp_path)
        forged = tmp_path / "naming.none.0.parquet"
        scores = Scores.load(forged)
        without = {name: value for name, value in scores.metadata.items() if name != "losses"}
        replace(scores, metadata=without).save(forged)
        with pytest.raises(DataError, match=f"{forged}.*the field 'losses' is missing.*remove it"):
            verify_on(pool, before, tuner, [comparison], RECIPE, directory=tmp_path)

    def test_arms_must_be_judged_on_the_same_examples(self, tmp_path: Path) -> None:
        pool, base = make_pool(), tiny()
        plans = {
            "none": plan_for(pool, "none", 0.0, held_out=pool.ids[:5]),
            "random": plan_for(pool, "random", 0.5, held_out=pool.ids[:6]),
        }
        comparison = ReplayComparison("naming", TASKS["naming"], make_task("naming", 2), plans)
        with pytest.raises(ConfigError, match="hold out the same examples"):
            verify_on(pool, score(base, pool), FineTuner(base), [comparison], RECIPE, directory=tmp_path)
        assert list(tmp_path.iterdir()) == []


def runs(**means: list[float]) -> Verification:
    return Verification(
        tuple(
            Run("t", arm, seed, value, 2 * value, 1.0, 0, 4, 1.0)
            for arm, values in means.items()
            for seed, value in enumerate(values)
        ),
        judged=10,
        ratio=0.1,
    )


def test_verdicts_agree_with_the_interval() -> None:
    result = runs(none=[1.0, 1.1, 1.05], random=[0.8, 0.91, 0.84], forecast=[0.8, 0.92, 0.83])
    verdicts = {(c.arm, c.baseline, c.metric): c.verdict() for c in result.comparisons()}
    assert verdicts["random", "none", "mean"] == "random replay is better than none"
    assert "not shown to be better than random" in verdicts["forecast", "random", "mean"]
    assert set(verdicts) == {
        (arm, baseline, metric)
        for arm, baseline in (("random", "none"), ("forecast", "none"), ("forecast", "random"))
        for metric in ("mean", "worst_tenth", "new_task_loss")
    }
    worse = runs(none=[1.0, 1.1, 1.05], random=[1.2, 1.3, 1.26])
    found = worse.compare("random", "none", "mean")
    assert found is not None
    assert found.verdict() == "random replay is worse than none"
    assert found.difference == paired_difference([1.2, 1.3, 1.26], [1.0, 1.1, 1.05])
    assert runs(none=[1.0], random=[2.0]).comparisons() == ()


def test_invalid_verification_files_are_rejected() -> None:
    for content in ({}, {"runs": [{"task": "t"}], "judged": 1, "ratio": 0.1}):
        with pytest.raises(DataError, match="not a verification"):
            Verification.from_dict(content)


def test_score_files_of_runs_are_ordinary_score_files(tmp_path: Path) -> None:
    pool, base = make_pool(), tiny()
    plan = plan_for(pool, "random", 0.7, held_out=pool.ids[:10])
    comparison = ReplayComparison("naming", TASKS["naming"], make_task("naming", 2), arms([plan], pool))
    verify_on(pool, score(base, pool), FineTuner(base), [comparison], RECIPE, seeds=[0], directory=tmp_path)
    assert Scores.load(tmp_path / "naming.random.0.parquet").ids == pool.ids[:10]
