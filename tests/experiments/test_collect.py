from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forgetcast import Atlas, ConfigError, DataError, Example, MismatchError, Pool, Scores
from forgetcast.evaluation import paired_difference, worst_tenth
from forgetcast.experiments.collect import CollectConfig
from forgetcast.experiments.verify import ReplayComparison, Verification, arms
from forgetcast.lm import FineTuner, Recipe, exact_match, score
from forgetcast.replay import Run
from support.cli import RunCommand
from support.data import make_pool, make_task
from support.experiments import collect_into, verify_on
from support.models import tiny
from support.plans import plan_for
from support.training import Interruption, make_recipe, stop_at

RECIPE = make_recipe()
TASKS = {name: make_task(name, 6) for name in ("adding", "naming", "spelling")}


def test_the_atlas_holds_after_minus_before(tmp_path: Path) -> None:
    base, pool = tiny(), make_pool()
    atlas = collect_into(tmp_path / "a.atlas", base, pool, TASKS, RECIPE)
    assert atlas.tasks == tuple(TASKS)
    np.testing.assert_allclose(atlas.before.nll, score(base, pool).nll)
    tuned = FineTuner(tiny()).tune(TASKS["naming"], RECIPE).language_model
    expected = score(tuned, pool).nll - score(tiny(), pool).nll
    row = atlas.matrix(["naming"]).values[0]
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(row, expected, atol=1e-5)
    kept = atlas.provenance("naming")
    assert kept["recipe"] == RECIPE.model_dump()
    assert kept["model_hash"] not in (None, atlas.model_hash)


def test_an_interrupted_sweep_goes_on_where_it_stopped(tmp_path: Path) -> None:
    pool = make_pool()
    with pytest.raises(Interruption):
        collect_into(tmp_path / "a.atlas", tiny(), pool, TASKS, RECIPE, on_progress=stop_at("spelling"))
    assert Atlas.open(tmp_path / "a.atlas").tasks == ("adding", "naming")
    done: list[str] = []
    atlas = collect_into(
        tmp_path / "a.atlas", tiny(), pool, TASKS, RECIPE, on_progress=lambda what, *_: done.append(what)
    )
    assert {what.partition(":")[0] for what in done} == {"spelling"}
    straight = collect_into(tmp_path / "b.atlas", tiny(), pool, TASKS, RECIPE)
    np.testing.assert_allclose(atlas.matrix().values, straight.matrix().values, atol=1e-6)


QUESTIONS = Pool([Example(f"q{i}", prompt=f"Item {i} is", completion=f" {w}") for i, w in enumerate("abcdefgh")])


def test_forgetting_by_exact_match(tmp_path: Path, run: RunCommand) -> None:
    """Oracle: the answers of the base model and of each tuned model, asked for by hand."""
    teach = Recipe(steps=80, learning_rate=1e-2, batch_size=8, max_length=48)
    base = FineTuner(tiny()).tune(QUESTIONS, teach).language_model
    pool = Pool([*QUESTIONS, Example("unknown", prompt="Item 9 is", completion=" nothing"), *make_pool(3)])
    # Other answers to some of the questions.
    tasks = {
        name: Pool([Example(f"{i}", prompt=f"Item {i} is", completion=" z") for i in items])
        for name, items in (("early", range(3)), ("middle", range(3, 6)), ("late", range(6, 8)))
    }
    recipe = Recipe(steps=8, learning_rate=1e-2, batch_size=2, max_length=48)
    with pytest.raises(Interruption):
        collect_into(tmp_path / "a.atlas", copy.deepcopy(base), pool, tasks, recipe, exact_match=True, max_new_tokens=4,
            on_progress=stop_at("late: answering"),
        )  # fmt: skip
    options: dict[str, Any] = {"exact_match": True, "max_new_tokens": 4}
    atlas = collect_into(tmp_path / "a.atlas", copy.deepcopy(base), pool, tasks, recipe, **options)
    right = exact_match(copy.deepcopy(base), pool, max_new_tokens=4)[0]
    assert (right[:8] == 1).all()
    matrix = atlas.matrix(measure="exact_match")
    assert matrix.examples == QUESTIONS.ids
    for name, task_ in tasks.items():
        tuned = FineTuner(copy.deepcopy(base)).tune(task_, recipe).language_model
        expected = 1 - exact_match(tuned, pool, max_new_tokens=4)[0][:8]
        np.testing.assert_array_equal(matrix.values[matrix.tasks.index(name)], expected)
    assert 0 < matrix.values.mean() < 1
    always = collect_into(
        tmp_path / "b.atlas", copy.deepcopy(base), pool, tasks, recipe, **options, metric=lambda *_: 1.0
    )
    np.testing.assert_array_equal(always.matrix(measure="exact_match").values, 0)
    for wrong in ({}, {"exact_match": True, "max_new_tokens": 5}):
        with pytest.raises(MismatchError, match="exact_match: true and max_new_tokens: 4"):
            collect_into(tmp_path / "a.atlas", copy.deepcopy(base), pool, tasks, recipe, **wrong)
    code, out, _ = run("analyze", tmp_path / "a.atlas", "--exact-match", "--json")
    assert code == 0
    assert json.loads(out)["mean_by_task"] == {n: matrix.values[i].mean() for i, n in enumerate(matrix.tasks)}
    code, out, err = run(
        "bench", tmp_path / "a.atlas", "--exact-match", "--methods", "mean,additive", "-k", 2, "--json"
    )
    assert (code, {row["method"] for row in json.loads(out)}) == (0, {"mean", "additive"})
    plain = collect_into(tmp_path / "c.atlas", copy.deepcopy(base), pool, {}, recipe)
    code, _, err = run("analyze", plain.path, "--exact-match")
    assert code == 2
    assert "has no answers" in err


@pytest.mark.parametrize("answers", [False, True])
def test_progress_ends_at_its_total(tmp_path: Path, answers: bool) -> None:
    seen: list[tuple[int, int]] = []
    collect_into(tmp_path / "a.atlas", tiny(), make_pool(), TASKS, RECIPE, exact_match=answers, max_new_tokens=2,
        on_progress=lambda _, *n: seen.append(n),
    )  # fmt: skip
    assert seen[-1][0] == seen[-1][1]
    assert all(a[0] <= b[0] and a[1] == b[1] for a, b in pairwise(seen))


def test_an_atlas_of_something_else_does_not_grow(tmp_path: Path) -> None:
    collect_into(tmp_path / "a.atlas", tiny(), make_pool(), {"adding": TASKS["adding"]}, RECIPE)
    before = Atlas.open(tmp_path / "a.atlas").matrix().values
    with pytest.raises(MismatchError, match="another pool"):
        collect_into(tmp_path / "a.atlas", tiny(), make_pool(20), TASKS, RECIPE)
    with pytest.raises(MismatchError, match="another base model"):
        collect_into(tmp_path / "a.atlas", tiny(seed=1), make_pool(), TASKS, RECIPE)
    with pytest.raises(MismatchError, match=r"another recipe \(steps differ\)"):
        collect_into(tmp_path / "a.atlas", tiny(), make_pool(), TASKS, RECIPE.model_copy(update={"steps": 4}))
    np.testing.assert_array_equal(Atlas.open(tmp_path / "a.atlas").matrix().values, before)


def test_an_atlas_from_before_a_field_of_the_recipe_grows(tmp_path: Path) -> None:
    collect_into(tmp_path / "a.atlas", tiny(), make_pool(), {"adding": TASKS["adding"]}, RECIPE)
    file = tmp_path / "a.atlas" / "atlas.json"
    index = json.loads(file.read_text())
    del index["recipe"]["gradient_checkpointing"]
    file.write_text(json.dumps(index))
    assert collect_into(tmp_path / "a.atlas", tiny(), make_pool(), TASKS, RECIPE).tasks == tuple(TASKS)


def test_a_recipe_by_its_name_or_its_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("steps: 7")
    for recipe, steps in (("paper", 1000), ("mine.yaml", 7), ("{steps: 5}", 5)):
        (tmp_path / "config.yaml").write_text(f"model: m\npool: p\ntasks: t\natlas: a\nrecipe: {recipe}\n")
        assert CollectConfig.load(tmp_path / "config.yaml").recipe.steps == steps


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\npool: p\ntasks: t\natlas: a\nrecipe: x\n", "config.yaml: recipe: there is no recipe"),
        ("model: m\npool: p\ntasks: t\natlas: a\nrecipe: {stepz: 3}\n", "recipe.stepz: Extra inputs are not permitted"),
        ("model: m\npool: p\natlas: a\n", "tasks: Field required"),
        ("model: m\npool: p\ntasks: t\natlas: a\nsteps: 3\n", "steps: Extra inputs are not permitted"),
        ("model: [", "is not YAML"),
        ("- a\n- b\n", "the content"),
    ],
)
def test_configurations_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        CollectConfig.load(tmp_path / "config.yaml")
    assert "config.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_task_folders(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: m\npool: p.jsonl\ntasks: tasks\natlas: a\n")
    config = CollectConfig.load(tmp_path / "config.yaml")
    with pytest.raises(DataError, match="no such folder"):
        config.load_tasks()
    (tmp_path / "tasks").mkdir()
    with pytest.raises(DataError, match="holds no task"):
        config.load_tasks()
    TASKS["adding"].save(tmp_path / "tasks" / "adding.jsonl")
    TASKS["naming"].save(tmp_path / "tasks" / "naming.parquet")
    assert {name: list(found) for name, found in config.load_tasks().items()} == {
        name: list(TASKS[name]) for name in ("adding", "naming")
    }
    TASKS["naming"].save(tmp_path / "tasks" / "adding.parquet")
    with pytest.raises(DataError, match="two tasks are called 'adding'"):
        config.load_tasks()


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
        assert "right_to_wrong" in result.metrics
        for run, replayed in zip(result.runs, (None, plan), strict=True):
            tuned = FineTuner(copy.deepcopy(base)).tune(new, recipe, plan=replayed, pool=pool).language_model
            after = exact_match(tuned, QUESTIONS, max_new_tokens=4)[0]
            assert run.right_to_wrong == (after == 0).sum() > 0

    def test_several_plans_are_arms_side_by_side(self) -> None:
        pool = make_pool()
        given = {"held_out": pool.ids[:10], "forecast": np.arange(24.0)}
        plans = [plan_for(pool, name, 0.5, **given) for name in ("top", "padding", "ranked")]
        assert list(arms(plans, pool)) == ["none", "random", "top", "padding", "ranked"]
        with pytest.raises(ConfigError, match="the same ratio"):
            arms([*plans, plan_for(pool, "forecast", 0.25, **given)], pool)
        with pytest.raises(ConfigError, match="two of the plans have the same strategy"):
            arms([*plans, plans[0]], pool)

    def test_an_interrupted_verification_goes_on(self, tmp_path: Path) -> None:
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
        kept = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
        assert len(kept) == 4
        tuner = FineTuner(tiny())
        result = verify_on(pool, before, tuner, [comparison], RECIPE, directory=tmp_path)
        assert len(result.runs) == 6
        assert {name: (tmp_path / name).stat().st_mtime_ns for name in kept} == kept
        with pytest.raises(MismatchError, match="other settings"):
            verify_on(pool, before, tuner, [comparison], RECIPE.model_copy(update={"steps": 4}), directory=tmp_path)

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


def test_verdicts_say_no_more_than_the_interval() -> None:
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


def test_a_file_that_is_no_verification() -> None:
    for content in ({}, {"runs": [{"task": "t"}], "judged": 1, "ratio": 0.1}):
        with pytest.raises(DataError, match="not a verification"):
            Verification.from_dict(content)


def test_score_files_of_runs_are_ordinary_score_files(tmp_path: Path) -> None:
    pool, base = make_pool(), tiny()
    plan = plan_for(pool, "random", 0.7, held_out=pool.ids[:10])
    comparison = ReplayComparison("naming", TASKS["naming"], make_task("naming", 2), arms([plan], pool))
    verify_on(pool, score(base, pool), FineTuner(base), [comparison], RECIPE, seeds=[0], directory=tmp_path)
    assert Scores.load(tmp_path / "naming.random.0.parquet").ids == pool.ids[:10]
