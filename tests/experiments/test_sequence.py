"""Tasks one after another: beside fine-tunes chained by hand, killed and resumed, as a command, in the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import stats

from forgetcast import Atlas, ConfigError, DataError, MismatchError, Pool, probes
from forgetcast.cli.tables import sequence_tables
from forgetcast.completion import Bayesian
from forgetcast.data.pool import split_task
from forgetcast.evaluation import worst_tenth
from forgetcast.experiments.runs import RunFacts, ScoreFiles
from forgetcast.experiments.sequence import EARLIER_TASKS, SequenceSettings, _Chain, _SequenceRunner, task_orders
from forgetcast.experiments.sequence_result import SEQUENCE_METRICS, SequenceResult, Stage
from forgetcast.lm import FineTuner, InitialState, LanguageModel, Recipe, score
from forgetcast.lm.train import load_weights, save_weights
from forgetcast.measure.scores import Scores
from forgetcast.report import write_report
from forgetcast.settings import check_settings
from forgetcast.stats import paired_difference
from support.cli import RunCommand
from support.data import make_atlas, make_pool, make_scores, make_task, planted
from support.dying import run_sequence
from support.models import save, tiny
from support.pages import HOSTILE, Page
from support.plans import plan_for
from support.processes import exit_code
from support.sequences import NAMES, RECIPE, SETTINGS, TASKS, run_in
from support.training import POOL, Interruption, measured_atlas, stop_at


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Atlas:
    return measured_atlas(tmp_path_factory.mktemp("atlas"), RECIPE)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, atlas: Atlas) -> tuple[Path, SequenceResult]:
    """A sequence that was never interrupted, and its directory."""
    folder = tmp_path_factory.mktemp("whole")
    seen: list[tuple[int, int]] = []
    result = run_in(folder, atlas, on_progress=lambda _, *n: seen.append(n))
    assert seen[-1][0] == seen[-1][1]
    assert all(a[0] <= b[0] for a, b in pairwise(seen))
    return folder, result


def by_hand(atlas: Atlas, arm: str, recipe: Recipe) -> list[dict[str, Any]]:
    """Each stage on a tuner of its own, whose base is what the last one left; PEFT merges its adapter itself."""
    model, before, base = Bayesian().fit(atlas), atlas.nll_before, tiny()
    held_out, expected = POOL.hold_out(0.5), model.predict([], []).mean
    pool, replayed = POOL, list[str]()
    stages: list[dict[str, Any]] = []
    learned: dict[str, Pool] = {}
    kept: dict[str, Pool] = {}
    then: dict[str, np.ndarray] = {}
    for name in task_orders(NAMES, 1)[0]:
        plan = None
        if arm == "top":
            forecast = expected
            if stages:
                free = [i for i, id_ in enumerate(POOL.ids) if id_ not in {*held_out, *replayed}]
                chosen = probes.choose(model, 6, free)
                measured = score(base, POOL.subset(POOL.ids[i] for i in chosen)).nll - before[chosen]
                forecast = model.predict(chosen, measured).mean
            # What the earlier tasks have lost; of the last one, which has lost nothing yet, the atlas's mean.
            lost = [score(base, kept[task]).nll - then[task] for task in list(kept)[:-1]]
            lost += [np.full(4, expected.mean()) for _ in list(kept)[-1:]]
            forecast = np.concatenate([forecast, *lost])
            pool = Pool([*POOL, *(example for examples in kept.values() for example in examples)])
            among = [id_ for id_ in pool.ids if id_ not in {*held_out, *replayed}]
            plan = plan_for(pool, "top", 0.5, held_out=held_out, among=among, forecast=forecast)
            best = sorted(among, key=lambda id_: -forecast[pool.ids.index(id_)])[:4]
        tuned = FineTuner(base).tune(TASKS[name][0], recipe, plan=plan, pool=pool)
        assert list(tuned.replayed) == (best if arm == "top" else [])
        replayed += tuned.replayed
        learned[name] = TASKS[name][1]
        model_: Any = tuned.language_model.model
        base = LanguageModel(model_.merge_and_unload() if recipe.method == "lora" else model_, base.tokenizer)
        kept[name] = Pool([replace(each, id=f"{name}/{each.id}") for each in TASKS[name][0].sample(4, seed=0)])
        then[name] = score(base, kept[name]).nll
        forgetting = score(base, POOL.subset(held_out)).nll - atlas.before.at(held_out)
        stages.append(
            {
                "task": name,
                "mean": forgetting.mean(),
                "worst_tenth": worst_tenth(forgetting),
                "losses": {name: score(base, test).nll.mean() for name, test in learned.items()},
                "replayed": list(tuned.replayed),
            }
        )
    return stages


def agrees(result: SequenceResult, folder: Path, arm: str, expected: list[dict[str, Any]]) -> None:
    found = [stage for stage in result.stages if stage.arm == arm]
    assert [stage.position for stage in found] == [1, 2, 3]
    for stage, known in zip(found, expected, strict=True):
        assert stage.task == known["task"]
        assert stage.mean == pytest.approx(known["mean"], abs=1e-4)
        assert stage.worst_tenth == pytest.approx(known["worst_tenth"], abs=1e-4)
        assert stage.losses == pytest.approx(known["losses"], abs=1e-4)
        scores = Scores.load(folder / f"{arm}.0.{stage.position}.parquet")
        assert scores.metadata["replayed"] == known["replayed"]
        assert (stage.replayed, stage.steps) == (len(known["replayed"]), 4 + len(known["replayed"]) // 2)


@pytest.mark.parametrize("arm", ["none", "top"])
def test_a_sequence_is_fine_tunes_chained_by_hand(whole: tuple[Path, SequenceResult], atlas: Atlas, arm: str) -> None:
    """The plan before a task is also the one that anyone could make from the last model's scores."""
    folder, result = whole
    assert result.arms == ("none", "random", "top")
    assert result.judged == 20
    expected = by_hand(atlas, arm, RECIPE)
    agrees(result, folder, arm, expected)
    lost = [expected[2]["losses"][s["task"]] - s["losses"][s["task"]] for s in expected[:2]]
    assert result.value(arm, 0, "earlier_tasks") == pytest.approx(np.mean(lost), abs=1e-4)
    assert np.abs(lost).max() > 0.01
    learned = np.mean([stage["losses"][stage["task"]] for stage in expected])
    assert result.value(arm, 0, "new_task_loss") == pytest.approx(learned, abs=1e-4)


def test_adapters_are_chained_too(tmp_path: Path, atlas: Atlas) -> None:
    recipe = RECIPE.model_copy(update={"method": "lora", "learning_rate": 2e-2})
    base = tiny()
    weights = {name: value.clone() for name, value in base.model.state_dict().items()}
    result = run_in(tmp_path, atlas, recipe=recipe, base=base)
    assert all(torch.equal(value, weights[name]) for name, value in base.model.state_dict().items())
    agrees(result, tmp_path, "top", by_hand(atlas, "top", recipe))


def test_held_out_examples_are_never_replayed_and_others_once(whole: tuple[Path, SequenceResult]) -> None:
    folder, result = whole
    held_out = set(POOL.hold_out(0.5))
    for arm in ("random", "top"):
        replayed = [id_ for i in (1, 2, 3) for id_ in Scores.load(folder / f"{arm}.0.{i}.parquet").metadata["replayed"]]
        assert len(replayed) == len(set(replayed)) == 12 == result.total(arm, "replayed")
        assert not held_out.intersection(replayed)
    assert set(Scores.load(folder / "none.0.3.parquet").ids) == held_out
    assert list(folder.glob("*.safetensors")) == []


def test_earlier_tasks_are_a_source_of_replay(whole: tuple[Path, SequenceResult]) -> None:
    folder, result = whole
    assert result.memory == 4
    earlier = 0
    for arm in ("none", "random", "top"):
        stages = [stage for stage in result.stages if stage.arm == arm]
        for i, stage in enumerate(stages):
            replayed = Scores.load(folder / f"{arm}.0.{i + 1}.parquet").metadata["replayed"]
            own = {
                f"{task}/{id_}" for task in [each.task for each in stages[:i]] for id_ in TASKS[task][0].ids
            }  # fmt: skip
            of_tasks = [id_ for id_ in replayed if id_ not in POOL.ids]
            assert set(of_tasks) <= own
            assert not {f"{task}/{id_}" for task in NAMES for id_ in TASKS[task][1].ids} & set(of_tasks)
            assert stage.replayed_earlier == len(of_tasks)
            earlier += len(of_tasks)
    assert earlier
    assert result.total("none", "replayed_earlier") == 0
    # Only what a forecast needs is scored: not after the last task, and not where none is made.
    stored = {file.stem: RunFacts.model_validate(Scores.load(file).metadata) for file in folder.glob("*.parquet")}
    assert {name: len(facts.memory) for name, facts in stored.items() if facts.memory} == {"top.0.1": 4, "top.0.2": 8}


def test_without_a_memory_only_the_pool_is_replayed(atlas: Atlas, tmp_path: Path) -> None:
    result = run_in(tmp_path, atlas, SETTINGS.model_copy(update={"memory": 0}))
    replayed = [id_ for file in tmp_path.glob("*.parquet") for id_ in Scores.load(file).metadata["replayed"]]
    assert len(replayed) == 24
    assert set(replayed) <= set(POOL.ids)
    assert sum(stage.replayed_earlier for stage in result.stages) == 0
    # As files of earlier versions, which had none.
    assert all("memory" not in Scores.load(file).metadata["settings"] for file in tmp_path.glob("*.parquet"))


@pytest.mark.parametrize("strategy", ["top", "forecast", "coverage"])
def test_what_a_task_has_lost_is_replayed(tmp_path: Path, atlas: Atlas, strategy: str) -> None:
    """Planted: after the second task, some examples of the first are lost, others are not."""
    runs, order = ScoreFiles(tmp_path), NAMES
    settings = SequenceSettings(strategies=(strategy,), ratio=0.5, memory=5, hold_out=0.5)
    runner = _SequenceRunner(FineTuner(tiny()), TASKS, atlas, RECIPE, settings, runs)
    chain = _Chain(0, strategy, order)
    first, second = ([example.id for example in runner.memories[name]] for name in order[:2])
    planted_loss = dict(zip(first, [4.0, 0.0, 9.0, -2.0, 6.0], strict=True))
    facts: dict[str, Any] = {"settings": {}, "losses": {}, "replayed": [], "steps": 1, "seconds": 1.0}
    for stage, memory in (
        (1, dict.fromkeys(first, 1.5)),
        (2, {id_: 1.5 + planted_loss[id_] for id_ in first} | dict.fromkeys(second, 0.5)),
    ):
        judged = score(tiny(), runner.judged)
        runs.save(runner.name(chain, stage), replace(judged, metadata=judged.metadata | facts | {"memory": memory}))
    pool = runner.pool(order[:2])
    assert pool.ids[len(POOL) :] == (*first, *second)
    assert set(pool.sources[len(POOL) :]) == {EARLIER_TASKS}
    plan = runner.plan(chain, pool, None, (), order[:2])
    plan.check_pool(pool)
    by_loss = sorted(first, key=lambda id_: -planted_loss[id_])
    if strategy == "top":
        assert plan.order(3) == tuple(by_loss[:3])
        # Of the task learned last, each counts as an average example of the pool in an average fine-tune.
        expected = dict(zip(POOL.ids, runner.model.predict([], []).mean.tolist(), strict=True))
        usual = float(np.mean(list(expected.values())))
        above = [id_ for id_ in POOL.ids if id_ not in runner.judged.ids and expected[id_] > usual]
        assert set(plan.order(3 + len(above))) == {*by_loss[:3], *above}
        assert plan.order(8 + len(above))[3 + len(above) :] == tuple(second)
    elif strategy == "forecast":
        weights = dict(zip(pool.ids, plan.weights.tolist(), strict=True))
        assert sorted(first, key=lambda id_: -weights[id_]) == by_loss
        assert len({weights[id_] for id_ in second}) == 1
    else:  # examples of one task protect each other, so that the first replayed one is of the task
        assert plan.order(1)[0] in first
    lost = json.loads(json.dumps(memory | {first[0]: None}))
    judged = score(tiny(), runner.judged)
    runs.save(runner.name(chain, 2), replace(judged, metadata=judged.metadata | facts | {"memory": lost}))
    with pytest.raises(DataError, match=f"the forecast of '{first[0]}' is not a finite number"):
        runner.plan(chain, pool, None, (), order[:2])


def test_checkpoint_of_other_weights_or_replay_is_rejected(tmp_path: Path) -> None:
    tuner, plan = FineTuner(tiny()), plan_for(POOL, "random", 0.5)
    weights = {name: value + 0.01 for name, value in tuner.weights().items()}
    given: dict[str, Any] = {"plan": plan, "pool": POOL, "checkpoints": tmp_path}
    tuned = tuner.tune(TASKS["adding"][0], RECIPE, initial=InitialState(weights, POOL.ids[:36]), **given)
    assert set(tuned.replayed) == set(POOL.ids[36:])
    for other in (InitialState(already_replayed=POOL.ids[:36]), InitialState(weights)):
        with pytest.raises(MismatchError, match="unfinished run of another model"):
            tuner.tune(TASKS["adding"][0], RECIPE, initial=other, **given)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapter_is_merged_into_the_weights(tmp_path: Path, family: str) -> None:
    """GPT-2 keeps its matrices the other way round."""
    base = tiny(family)
    tuner = FineTuner(base)
    known = tuner.weights()
    recipe = RECIPE.model_copy(update={"method": "lora", "learning_rate": 2e-2})
    tuned = tuner.tune(TASKS["adding"][0], recipe).language_model
    expected = score(tuned, POOL).nll
    weights = tuner.weights()
    np.testing.assert_array_equal(score(tuned, POOL).nll, expected)  # nothing was merged in place
    save_weights(weights, tmp_path / "w.safetensors")
    read = load_weights(tmp_path / "w.safetensors")
    assert read.keys() == known.keys()
    assert all(torch.equal(read[name], weights[name]) for name in read)
    np.testing.assert_allclose(score(tuner.restore(read), POOL).nll, expected, rtol=1e-5)
    assert np.abs(expected - score(tuner.restore(), POOL).nll).max() > 0.05
    assert all(torch.equal(value, known[name]) for name, value in tuner.restore().model.state_dict().items())
    (tmp_path / "w.safetensors").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"w\.safetensors cannot be read"):
        load_weights(tmp_path / "w.safetensors")


def same(found: SequenceResult, expected: SequenceResult) -> None:
    def timeless(result: SequenceResult) -> list[Stage]:
        return [replace(stage, seconds=0.0) for stage in result.stages]

    assert timeless(found) == timeless(expected)


def test_killed_sequence_resumes_after_the_last_stage(
    whole: tuple[Path, SequenceResult], atlas: Atlas, tmp_path: Path
) -> None:
    folder = tmp_path / "runs"
    assert exit_code(run_sequence, atlas.path, folder) == 9
    assert [file.name for file in folder.glob("*.safetensors")] == ["top.0.2.safetensors"]
    (folder / ".top.0.3.safetensors.x.safetensors").write_bytes(b"torn")  # as if killed while it was written
    done: list[str] = []
    result = run_in(folder, atlas, on_progress=lambda what, *_: done.append(what))
    assert {what.partition(",")[0] for what in done} == {f"{result.stages[-1].task} (3 of 3)"}
    same(result, whole[1])
    assert {file.name for file in folder.iterdir()} == {file.name for file in whole[0].iterdir()}
    # Once more: nothing is left to do.
    assert run_in(folder, atlas, on_progress=stop_at("")) == result


def test_an_interruption_between_the_weights_and_the_scores(
    whole: tuple[Path, SequenceResult], atlas: Atlas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        kept = Scores.save

        def save(scores: Scores, path: Path) -> None:
            if path.name == "top.0.2.parquet":
                raise Interruption
            kept(scores, path)

        patch.setattr(Scores, "save", save)
        with pytest.raises(Interruption):
            run_in(tmp_path, atlas)
    assert {file.name for file in tmp_path.glob("*.safetensors")} == {"top.0.1.safetensors", "top.0.2.safetensors"}
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()  # without its weights, the sequence begins anew
    done: list[str] = []
    same(run_in(tmp_path, atlas, on_progress=lambda what, *_: done.append(what)), whole[1])
    assert all(f"({i} of 3), top replay" in " ".join(done) for i in (1, 2, 3))
    assert not any("random" in what for what in done)


def test_runs_with_other_settings_are_not_reused(
    whole: tuple[Path, SequenceResult], atlas: Atlas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = whole
    monkeypatch.setattr(FineTuner, "tune", stop_at(""))  # nothing may be trained
    others: list[dict[str, Any]] = [
        {"recipe": RECIPE.model_copy(update={"steps": 6})},
        {"settings": SETTINGS.model_copy(update={"ratio": 1.0})},
        {"settings": SETTINGS.model_copy(update={"hold_out": 0.4})},
        {"settings": SETTINGS.model_copy(update={"probes": 7})},
        {"settings": SETTINGS.model_copy(update={"memory": 3})},
        {"tasks": {**TASKS, "naming": split_task(make_task("naming", 9), 0.25)}},
    ]
    for other in others:
        with pytest.raises(MismatchError, match=r"(none|random|top)\.0\.\d\.parquet is of a run with other"):
            run_in(folder, atlas, **other)
    grown = measured_atlas(tmp_path, RECIPE)
    grown.add("another", replace(grown.before, nll=grown.before.nll + 0.1))
    with pytest.raises(MismatchError, match=r"top\.0\.1\.parquet"):
        run_in(folder, grown)
    with pytest.raises(MismatchError, match="another base model"):
        run_in(folder, atlas, base=tiny(seed=1))


@pytest.mark.parametrize(("tasks", "count"), [(2, 5), (3, 6), (3, 13), (4, 3), (9, 4)])
def test_orders_are_all_different_where_there_are_enough(tasks: int, count: int) -> None:
    names = [f"t{i}" for i in range(tasks)]
    found = task_orders(names, count, seed=3)
    most = min(count, int(np.prod(np.arange(1, tasks + 1))))
    assert len(found) == count
    assert len(set(found)) == most
    times = [found.count(order) for order in set(found)]
    assert max(times) - min(times) <= 1
    assert all(sorted(order) == names for order in found)
    assert task_orders(names, count + 2, seed=3)[:count] == found


def test_every_arm_has_the_same_orders(tmp_path: Path, atlas: Atlas) -> None:
    recipe, small = RECIPE.model_copy(update={"steps": 2}), {name: TASKS[name] for name in NAMES[:2]}
    settings = SequenceSettings(strategies=("loss", "coverage", "random"), ratio=0.5, orders=2)
    result = run_in(tmp_path, atlas, settings, recipe=recipe, tasks=small)
    assert result.arms == ("none", "random", "loss", "coverage")
    came = {
        (arm, i): tuple(s.task for s in result.stages if (s.arm, s.order) == (arm, i))
        for arm in result.arms
        for i in (0, 1)
    }
    assert all(came[arm, i] == came["none", i] for arm, i in came)
    assert set(came.values()) == {NAMES[:2], NAMES[1::-1]}
    # What was replayed is the base model's highest losses, and then the next ones, with those of the first task.
    held_out, name = set(POOL.hold_out(0.5)), came["loss", 1][0]
    base_losses = dict(zip(POOL.ids, atlas.nll_before.tolist(), strict=True))
    free = [id_ for id_ in POOL.ids if id_ not in held_out]
    first = sorted(free, key=lambda id_: -base_losses[id_])[:2]
    own = TASKS[name][0]
    base_losses |= dict(zip((f"{name}/{id_}" for id_ in own.ids), score(tiny(), own).nll.tolist(), strict=True))
    left = [id_ for id_ in base_losses if id_ not in {*held_out, *first}]
    assert [Scores.load(tmp_path / f"loss.1.{i}.parquet").metadata["replayed"] for i in (1, 2)] == [
        first,
        sorted(left, key=lambda id_: -base_losses[id_])[:2],
    ]


def made(**ends: list[float]) -> SequenceResult:
    """Two tasks in as many orders as an arm has ends: the upstream forgetting and that of the first task."""
    stages = []
    for arm, values in ends.items():
        for order, value in enumerate(values):
            first, second = ("a", "b") if order % 2 else ("b", "a")
            stages += [
                Stage(order, arm, 1, first, value / 2, value, {first: 1.0}, 4, 10, 1.5),
                Stage(order, arm, 2, second, value, 2 * value, {first: 1 + 3 * value, second: 2.0}, 4, 10, 2.5),
            ]
    return SequenceResult(tuple(stages), judged=20, ratio=0.5)


ENDS = {"none": [0.5, 0.62, 0.55, 0.58], "random": [0.3, 0.41, 0.36, 0.38], "top": [0.29, 0.43, 0.33, 0.39]}


def test_the_figures_of_a_sequence() -> None:
    result = made(**ENDS)
    assert result.length == 2
    assert result.value("none", 1, "mean") == 0.62
    assert result.value("none", 1, "mean", 1) == 0.31
    assert result.value("none", 1, "worst_tenth") == 1.24
    assert result.value("none", 1, "earlier_tasks") == pytest.approx(3 * 0.62)  # 1 + 3 x 0.62 now, 1 when learned
    assert np.isnan(result.value("none", 1, "earlier_tasks", 1))
    assert result.value("none", 1, "new_task_loss") == 1.5
    assert result.value("none", 1, "new_task_loss", 1) == 1.0
    assert result.average("random", "mean") == pytest.approx(np.mean(ENDS["random"]))
    assert (result.total("top", "replayed"), result.total("top", "steps"), result.total("top", "seconds")) == (8, 20, 4)


def test_arms_are_compared_at_the_end_paired_by_order() -> None:
    result = made(**ENDS)
    found = {(c.arm, c.baseline, c.metric): c for c in result.comparisons()}
    pairs = (("random", "none"), ("top", "none"), ("top", "random"))
    assert set(found) == {(arm, baseline, metric) for arm, baseline in pairs for metric in SEQUENCE_METRICS}
    for metric, factor in (("mean", 1), ("worst_tenth", 2), ("earlier_tasks", 3)):
        gap, expected = found["top", "random", metric].difference, paired_difference(ENDS["top"], ENDS["random"])
        assert gap.pairs == 4
        np.testing.assert_allclose((gap.mean, gap.lower, gap.upper), factor * np.array(
            (expected.mean, expected.lower, expected.upper)
        ), atol=1e-12)  # fmt: skip
        assert found["random", "none", metric].better
        assert "not shown to be better than random" in found["top", "random", metric].verdict()
    assert made(none=[0.5], random=[0.3]).comparisons() == ()
    one_without = replace(result, stages=tuple(s for s in result.stages if (s.arm, s.order) != ("top", 3)))
    compared = one_without.compare("top", "random", "mean")
    assert compared is not None
    assert compared.difference == paired_difference(ENDS["top"][:3], ENDS["random"][:3])


def test_the_orders_that_would_be_needed_are_said() -> None:
    result = made(**(ENDS | {"top": [0.27, 0.41, 0.37, 0.35]}))
    compared = result.compare("top", "random", "mean")
    assert compared is not None
    gaps = np.subtract([0.27, 0.41, 0.37, 0.35], ENDS["random"])
    needed = compared.pairs_needed()
    assert needed is not None
    assert needed > 4
    for count in (needed - 1, needed):
        rng = np.random.default_rng(count)
        like = stats.zscore(rng.normal(size=count), ddof=1) * gaps.std(ddof=1) + gaps.mean()
        assert (stats.ttest_1samp(like, 0.0).pvalue < 0.05) == (count == needed)
    none = made(**(ENDS | {"top": ENDS["random"]})).compare("top", "random", "mean")
    assert none is not None
    assert none.pairs_needed() is None
    console = Console(width=200, file=StringIO(), record=True)
    for part in sequence_tables(result):
        console.print(part)
    assert f"top - random, mean forgetting, {needed};" in " ".join(console.export_text().split())


def test_a_result_as_a_file() -> None:
    result = made(**ENDS)
    content = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert SequenceResult.from_dict(content) == result
    assert content["arms"]["top"]["after_each_task"][0]["earlier_tasks"] is None
    assert content["arms"]["top"]["mean"] == content["arms"]["top"]["after_each_task"][1]["mean"]

    def without(i: int) -> dict[str, Any]:
        return content | {"stages": content["stages"][:i] + content["stages"][i + 1 :]}

    def changed(**fields: Any) -> dict[str, Any]:
        return content | {"stages": [content["stages"][0] | fields, *content["stages"][1:]]}

    for bad, message in (
        ({}, "this is not a sequence: the field 'stages' is missing"),
        ([], "this is not a sequence"),
        (content | {"stages": []}, "has at least two stages"),
        (content | {"judged": "many"}, "judged: "),
        (without(0), "none replay, order 0: a stage is missing"),
        (content | {"stages": content["stages"] * 2}, "duplicated"),
        (changed(mean="high"), "stages.0.mean: "),
        (changed(mean=float("nan")), "stages.0.mean: "),
        (changed(losses={}), "stage 1 needs the losses of exactly the tasks"),
        (changed(losses={"b": None}), "stages.0.losses.b: "),
        (changed(colour="red"), "colour"),
    ):
        with pytest.raises(DataError, match=message):
            SequenceResult.from_dict(bad)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"strategies": ("best",)},
            "strategies: unknown replay strategy 'best'; choose one of none, padding, random",
        ),
        ({"strategies": ("truth",)}, "'truth' cannot be used in a sequence: it needs truth"),
        ({"strategies": ("gradient",)}, "'gradient' cannot be used in a sequence: it needs gradients"),
        (
            {"strategies": ("most-forgotten",)},
            "'most-forgotten' cannot be .*: it selects examples during training",
        ),
        (
            {"strategies": ("none",)},
            "'none' cannot be .*: it replays nothing, and is a baseline anyway",
        ),
        ({"strategies": ("top", "padding")}, "'padding' cannot be used in a sequence: it replays no upstream example"),
        ({"orders": 0}, "orders: must be at least 1, not 0"),
        ({"memory": -1}, "memory: must be at least 0, not -1"),
        ({"probes": 0}, "probes: must be at least 1, not 0"),
        ({"ratio": 0.0}, "ratio: must be greater than 0, not 0"),
        ({"ratio": float("inf")}, "ratio: must be a finite number, not inf"),
        ({"hold_out": 1.0}, "hold_out: must be less than 1, not 1"),
    ],
)
def test_invalid_settings_are_rejected(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_settings(wrong, SequenceSettings, where="the sequence")


def test_invalid_sequences_are_rejected_before_training(tmp_path: Path, atlas: Atlas) -> None:
    empty = Atlas.create(tmp_path / "empty.atlas", POOL, atlas.before, model="tiny")
    own = [replace(POOL[0], id=f"naming/{id_}") for id_ in TASKS["naming"][0].ids]
    pool = Pool([*POOL, *own])
    taken = Atlas.create(tmp_path / "taken.atlas", pool, score(tiny(), pool), model="tiny")
    refused: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (DataError, "at least two tasks, not 1", {"tasks": {"adding": TASKS["adding"]}}),
        (ConfigError, "replays no batch", {"settings": SETTINGS.model_copy(update={"ratio": 0.01})}),
        (
            ConfigError,
            "examples are to be replayed, and the plan has",
            {"settings": SETTINGS.model_copy(update={"ratio": 50.0})},
        ),
        (ConfigError, "leaves none to judge on", {"settings": SETTINGS.model_copy(update={"hold_out": 0.01})}),
        (ConfigError, "every example is held out", {"settings": SETTINGS.model_copy(update={"hold_out": 0.999})}),
        (DataError, "at least two measured tasks; the matrix has 0", {"atlas": empty}),
        (DataError, "the pool with the tasks' examples: the id 'naming/.*' occurs 2 times", {"atlas": taken}),
    ]
    for error, message, given in refused:
        with pytest.raises(error, match=message):
            run_in(tmp_path / "runs", **({"atlas": atlas} | given), on_progress=stop_at(""))
    assert not (tmp_path / "runs").exists()
    with pytest.raises(DataError, match="leaves none to test or to train on"):
        split_task(make_task("adding", 8), 0.01)


@pytest.fixture
def files(tmp_path: Path, atlas: Atlas) -> Callable[..., list[object]]:
    """A model, tasks and a recipe as files, and the command's words."""
    base = tiny()
    save(base, tmp_path / "model")
    for name in NAMES[:2]:
        make_task(name, 8).save(tmp_path / "tasks" / f"{name}.jsonl")

    def words(*tasks: object) -> list[object]:
        there = tasks or (tmp_path / "tasks",)
        return ["sequence", tmp_path / "model", *there, "--atlas", atlas.path, "-o", tmp_path / "sequence.json"]

    return words


def test_the_command_and_the_report(files: Any, atlas: Atlas, tmp_path: Path, run: RunCommand) -> None:
    more = ["--ratio", 0.5, "--test-share", 0.25, "--strategy", "top", "--strategy", "ranked", "--probes", 5]
    more += ["--orders", 2, "--memory", 3]
    code, out, err = run(*files(), *more, "--json")
    assert code == 0, err
    content = json.loads(out)
    assert content == json.loads((tmp_path / "sequence.json").read_text())
    assert list(content["arms"]) == ["none", "random", "top", "ranked"]
    assert len(content["stages"]) == 16
    result = SequenceResult.from_dict(content)
    # The library gives the same, from the same arguments and the atlas's recipe.
    settings = SequenceSettings(strategies=("top", "ranked"), ratio=0.5, orders=2, probes=5, memory=3)
    parts = {name: split_task(make_task(name, 8), 0.25) for name in NAMES[:2]}
    assert run_in(tmp_path / "sequence.runs", atlas, settings, tasks=parts, on_progress=stop_at("")) == result

    code, out, _ = run(*files(tmp_path / "tasks" / "adding.jsonl", tmp_path / "tasks" / "naming.jsonl"), *more)
    assert code == 0
    said = " ".join(out.split())
    assert all(f"{result.average('top', metric):.3f}" in said for metric in SEQUENCE_METRICS)
    assert "On the mean forgetting, top replay is " in said
    assert "On the earlier tasks, ranked replay is " in said

    code, _, err = run(
        "report", atlas.path, "--sequence", tmp_path / "sequence.json", "-o", tmp_path / "report.html"
    )  # fmt: skip
    assert code == 0, err
    page = Page(tmp_path / "report.html")
    assert "Several tasks one after another" in page.text
    for arm in result.arms:
        ends = " ".join(f"{result.average(arm, metric):.3f}" for metric in SEQUENCE_METRICS)
        counts = f"{result.total(arm, 'replayed'):.0f} {result.total(arm, 'replayed_earlier'):.0f}"
        assert f"{arm} {ends} {counts}" in page.text
    assert "of 3 training examples kept of each task before" in page.text
    upstream = ", ".join(f"{arm} {result.average(arm, 'mean'):.3f}" for arm in result.arms)
    assert f"After 2 tasks one after another, held-out forgetting by replay strategy is {upstream} nats" in page.text

    def refused(*words: object) -> str:
        code, out, err = run(*words)
        assert (code, out, err.count("error: "), "Traceback" in err) == (2, "", 1, False), err
        return err

    assert "cannot be used in a sequence" in refused(*files(), "--strategy", "most-forgotten")
    assert "orders: must be at least 1, not 0" in refused(*files(), "--orders", 0)
    assert "at least two tasks, not 1" in refused(*files(tmp_path / "tasks" / "adding.jsonl"))
    assert "two tasks are called 'adding'" in refused(*files(*[tmp_path / "tasks" / "adding.jsonl"] * 2))
    assert "leaves none to test" in refused(*files(), "--test-share", 0)
    assert "with other settings" in refused(*files(), *more, "--ratio", 1)
    assert "no such file" in refused(*files(tmp_path / "nothing"))
    (tmp_path / "bad.json").write_text('{"stages": [{}]}')
    assert "this is not a sequence" in refused(
        "report", atlas.path, "--sequence", tmp_path / "bad.json", "-o", tmp_path / "bad.html"
    )
    assert not (tmp_path / "bad.html").exists()


def test_one_order_gives_no_comparison() -> None:
    shown = list(sequence_tables(made(none=[0.5], random=[0.3])))
    assert shown[-1] == "With one order, arms cannot be compared: use at least two, better 6."


def test_strings_from_a_result_are_escaped_in_the_report(tmp_path: Path) -> None:
    atlas = make_atlas(tmp_path / "x.atlas", make_pool())
    stages = tuple(
        replace(
            stage,
            arm=f"top {HOSTILE}" if stage.arm == "top" else stage.arm,
            task=f"{stage.task} {HOSTILE}",
            losses={f"{name} {HOSTILE}": loss for name, loss in stage.losses.items()},
        )
        for stage in made(**ENDS).stages
    )
    hostile = SequenceResult(stages, 20, 0.5)
    for name, result in (("harmless", made(**ENDS)), ("hostile", hostile), ("one", made(none=[0.5], random=[0.3]))):
        write_report(tmp_path / f"{name}.html", atlas, sequence=result)
    page = Page(tmp_path / "hostile.html")
    assert page.scripts == Page(tmp_path / "harmless.html").scripts
    assert page.links == []
    content = (tmp_path / "hostile.html").read_text(encoding="utf-8")
    assert "<img" not in content[content.index("<body>") :]
    assert "<script>alert" not in content
    assert "49 &amp;" not in content
    assert "not shown to be better than random" in page.text
    assert "takes at least two" in Page(tmp_path / "one.html").text
    for part in sequence_tables(hostile):
        assert part is not None


def test_unscored_examples_are_not_judged_or_probed(tmp_path: Path) -> None:
    pool = make_pool(30)
    nll = score(tiny(), pool).nll
    odd = pool.hold_out(0.5)[0]
    nll[pool.ids.index(odd)] = np.nan
    reasons = ["no token" if id_ == odd else None for id_ in pool.ids]
    before = replace(make_scores(pool, np.nan_to_num(nll)), nll=nll, reasons=reasons)
    atlas = Atlas.create(tmp_path / "a.atlas", pool, before, model="tiny")
    for i, row in enumerate(np.abs(planted(5, len(pool), 1, 0.05))):
        atlas.add(f"t{i}", replace(before, nll=nll + row))
    small = {name: TASKS[name] for name in NAMES[:2]}
    settings = SequenceSettings(strategies=("top",), ratio=0.5, orders=1, probes=30)
    result = run_in(tmp_path / "runs", atlas, settings, tasks=small)
    assert result.judged == 15
    assert all(np.isfinite(stage.mean) for stage in result.stages)
