"""Replay that is decided during training, and what it is decided by."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from forgetcast import Atlas, ConfigError, DataError, MismatchError, Pool, ReplayPlan, completion
from forgetcast.completion.forecast import measured_probes
from forgetcast.lm import (
    FineTuner,
    ForgettingMonitor,
    LanguageModel,
    MonitorSelector,
    MostForgottenSelector,
    OnlineSelector,
    Recipe,
    ReplayMixture,
    gradient_products,
    load,
    sample_texts,
    score,
)
from forgetcast.lm.score import losses, prepared_losses
from forgetcast.lm.tokens import encode
from forgetcast.measure.scores import Scores
from forgetcast.replay.coverage import correlation_loadings
from support.cli import RunCommand
from support.data import make_pool
from support.dying import tune_with_selector
from support.models import tiny
from support.plans import plan_for
from support.processes import exit_code
from support.selectors import HELD_OUT, RECIPE, arguments, atlas_plan
from support.training import POOL, TASK, measured_atlas, model_files, trainer


@pytest.fixture
def atlas(tmp_path: Path) -> Atlas:
    return measured_atlas(tmp_path)


def test_losses_in_training_are_the_scores() -> None:
    model = tiny()
    model.model.train()
    np.testing.assert_allclose(losses(model, POOL), score(model, POOL).nll, rtol=1e-6)
    assert model.model.training
    np.testing.assert_allclose(losses(model, POOL, 12), score(model, POOL, max_length=12).nll, rtol=1e-6)
    with pytest.raises(DataError, match="no finite loss for the example 'short'"):
        losses(tiny(bos=False), Pool([replace(POOL[0], id="short", text="a")]))


def test_the_forecast_in_training_is_the_one_made_offline(atlas: Atlas, tmp_path: Path) -> None:
    plan = atlas_plan(atlas)
    online = OnlineSelector.from_atlas(atlas, plan, k=6)
    assert not {POOL.ids[i] for i in online.probes} & set(HELD_OUT)
    tuned = FineTuner(tiny()).tune(TASK, RECIPE).language_model
    asked = POOL.subset([POOL.ids[i] for i in online.probes])
    score(tuned, asked).save(tmp_path / "probes.parquet")
    columns, forgetting = measured_probes(atlas, Scores.load(tmp_path / "probes.parquet"))
    offline = completion.Bayesian().fit(atlas).predict(columns, forgetting)
    np.testing.assert_allclose(online.forecast(tuned).mean, offline.mean, rtol=1e-4)
    np.testing.assert_allclose(online.forecast(tuned).std, offline.std, rtol=1e-4)
    # What was replayed is not measured; when all was, the atlas's mean is what is left.
    gone = asked.ids[:2]
    fewer = completion.Bayesian().fit(atlas).predict(columns[2:], forgetting[2:])
    np.testing.assert_allclose(online.forecast(tuned, gone).mean, fewer.mean, rtol=1e-4)
    np.testing.assert_allclose(online.forecast(tuned, asked.ids).mean, online.model.predict([], []).mean)


QUIET = pytest.mark.filterwarnings("ignore:nothing is said of the end of the run:UserWarning")
Selector = OnlineSelector | MostForgottenSelector | MonitorSelector


class Recorded:
    """What a selector was asked and said, with the weights of the model at the time."""

    def __init__(self, selector: Selector) -> None:
        self.inner = selector
        self.calls: list[tuple[tuple[str, ...], tuple[str, ...], dict[str, torch.Tensor]]] = []
        self.settings, self.check, self.due = selector.settings, selector.check, selector.due

    def select(self, language_model: LanguageModel, mixture: ReplayMixture, replayed: Any) -> Any:
        chosen = self.inner.select(language_model, mixture, replayed)
        weights = {name: value.clone() for name, value in language_model.model.state_dict().items()}
        self.calls.append((tuple(replayed), tuple(chosen), weights))
        return chosen


def batches(base: LanguageModel, mixture: ReplayMixture, folder: Path, selector: Any, **options: Any) -> list[str]:
    """Upstream ids in the order in which they really reached the model in training."""
    texts = {tuple(encode(example, base.tokenizer, 96, end=True).ids): example.id for example in POOL}
    seen: list[str] = []

    def look(model: Any, _: Any, inputs: dict[str, Any]) -> None:
        if model.training:
            for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
                if (id_ := texts.get(tuple(ids[mask.bool()].tolist()))) is not None:
                    seen.append(id_)

    handle = base.model.register_forward_pre_hook(look, with_kwargs=True)
    trainer(base, mixture, folder, selector, **options).train()
    handle.remove()
    return seen


@pytest.mark.parametrize("strategy", ["forecast", "top", "coverage-herding"])
@pytest.mark.parametrize("in_parts", [False, True])
def test_remaining_replay_follows_the_new_forecast(atlas: Atlas, tmp_path: Path, strategy: str, in_parts: bool) -> None:
    base, model = tiny(), completion.Bayesian().fit(atlas)
    forecast = model.predict([], []).mean
    loadings = np.random.default_rng(0).normal(size=(len(POOL), 2))
    plan = plan_for(POOL, strategy, 0.5, held_out=HELD_OUT, forecast=forecast, loadings=loadings, seed=3)
    mixture = ReplayMixture(TASK, base.tokenizer, steps=12, batch_size=2, max_length=96, plan=plan, pool=POOL)
    before = mixture.replayed
    selector = Recorded(OnlineSelector.from_atlas(atlas, plan, k=6, at=(0.5,)))
    halves = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2} if in_parts else {}
    seen = batches(base, mixture, tmp_path / "run", selector, learning_rate=1e-2, **halves)
    [(replayed, chosen, weights)] = selector.calls
    assert tuple(seen) == mixture.replayed == (*replayed, *chosen)
    assert replayed == before[: len(replayed)]
    assert 0 < len(replayed) < len(before)
    assert len(set(seen)) == len(seen) == 12
    assert not set(seen) & set(HELD_OUT)
    # The plan that anyone could make from the same model's scores, less what was replayed.
    twin = tiny()
    twin.model.load_state_dict(weights)
    online = selector.inner
    assert isinstance(online, OnlineSelector)
    kept = [i for i in online.probes if POOL.ids[i] not in replayed]
    measured = score(twin, POOL.subset([POOL.ids[i] for i in kept]))
    ordered = [measured.nll[measured.ids.index(POOL.ids[i])] - atlas.nll_before[i] for i in kept]
    new = model.predict(kept, ordered).mean
    if strategy == "top":
        best = [POOL.ids[i] for i in np.argsort(-new) if POOL.ids[i] not in {*HELD_OUT, *replayed}]
        assert chosen == tuple(best[: len(chosen)])
    if strategy == "forecast":
        offline = plan_for(POOL, "forecast", 0.5, held_out=HELD_OUT, forecast=new, seed=3)
        np.testing.assert_array_equal(chosen, offline.order(len(chosen), already_replayed=replayed))


def test_more_than_once_and_only_the_probes_are_measured(atlas: Atlas, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = atlas_plan(atlas)
    measured: list[int] = []

    def counted(language_model: LanguageModel, examples: Any, max_length: int | None) -> np.ndarray:
        examples = list(examples)
        measured.append(len(examples))
        return losses(language_model, examples, max_length)

    monkeypatch.setattr("forgetcast.lm.selectors.losses", counted)
    tuned = FineTuner(tiny()).tune(
        TASK, RECIPE, plan=plan, pool=POOL, selector=OnlineSelector.from_atlas(atlas, plan, k=6, at=(0.25, 0.5))
    )
    assert len(measured) == 2
    assert all(0 < n <= 6 for n in measured)
    assert len(set(tuned.replayed)) == len(tuned.replayed) == 12


@pytest.mark.parametrize("strategy", ["forecast", "top"])
def test_excluded_examples_are_not_selected_during_training(atlas: Atlas, strategy: str) -> None:
    among = POOL.ids[1:29:2]  # the mixture replays 12 of these 14
    forecast = completion.Bayesian().fit(atlas).predict([], []).mean
    plan = plan_for(POOL, strategy, 0.5, held_out=HELD_OUT, among=among, forecast=forecast)
    online = OnlineSelector.from_atlas(atlas, plan, k=4)
    assert {POOL.ids[i] for i in online.probes} <= set(among)
    tuned = FineTuner(tiny()).tune(TASK, RECIPE, plan=plan, pool=POOL, selector=online)
    assert len(set(tuned.replayed) & set(among)) == len(tuned.replayed) == 12


def test_an_exhausted_pool_is_replayed_evenly(atlas: Atlas) -> None:
    plan = replace(atlas_plan(atlas, ratio=2.0), repeat=True)  # 48 of 20
    tuned = FineTuner(tiny()).tune(
        TASK, RECIPE, plan=plan, pool=POOL, selector=OnlineSelector.from_atlas(atlas, plan, k=6)
    )
    counts = [tuned.replayed.count(id_) for id_ in set(POOL.ids) - set(HELD_OUT)]
    assert (min(counts), max(counts), sum(counts)) == (2, 3, 48)


def test_most_forgotten_selects_the_worst_of_its_candidates(atlas: Atlas, tmp_path: Path) -> None:
    base = tiny()
    before = atlas.nll_before.copy()
    before[1] = np.nan  # an example that the base model could not score is no candidate
    plan = plan_for(POOL, "most-forgotten", 0.5, held_out=HELD_OUT, seed=3)
    mixture = ReplayMixture(TASK, base.tokenizer, steps=12, batch_size=2, max_length=96, plan=plan, pool=POOL)
    selector = Recorded(MostForgottenSelector(POOL, before, candidates=3))
    seen = batches(base, mixture, tmp_path / "run", selector, learning_rate=1e-2)
    assert tuple(seen) == mixture.replayed
    assert len(set(seen)) == len(seen) == 12
    assert len(selector.calls) == 5  # of 6 batches: the first comes before anything could be measured
    better = 0
    for replayed, chosen, weights in selector.calls[:4]:  # while there are three candidates for each place
        twin = tiny()
        twin.model.load_state_dict(weights)
        forgotten = dict(zip(POOL.ids, score(twin, POOL).nll - before, strict=True))
        free = [forgotten[id_] for id_ in POOL.ids[1::2] if id_ not in replayed and id_ != "e1"]
        assert POOL.ids[1] not in chosen
        # At least the third smallest of all that were free: two others of its three were less.
        assert all(forgotten[id_] >= sorted(free)[2] for id_ in chosen)
        better += sum(forgotten[id_] > np.median(free) for id_ in chosen)
    assert better >= 6  # of 8; at random half would be


@QUIET
@pytest.mark.parametrize("kind", ["online", "most-forgotten", "monitor"])
def test_killed_run_resumes_in_the_same_order(atlas: Atlas, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "out.partial"
    assert exit_code(tune_with_selector, kind, atlas.path, folder) == 9
    given = arguments(kind, atlas)
    asked: list[int] = []
    recorded = Recorded(given["selector"])
    resumed = FineTuner(tiny()).tune(
        TASK, RECIPE, **(given | {"selector": recorded}), checkpoints=folder, on_step=lambda i, _: asked.append(i)
    )
    assert asked[0] == 12
    assert kind != "online" or not recorded.calls  # what was decided before the kill is not decided again
    straight = FineTuner(tiny()).tune(TASK, RECIPE, **given)
    offline = given["plan"].order(12)
    assert resumed.replayed == straight.replayed != offline
    with pytest.raises(MismatchError, match="an unfinished run of another"):
        FineTuner(tiny()).tune(
            TASK, RECIPE, **(given | {"selector": other_chooser(given["selector"])}), checkpoints=folder
        )


def other_chooser(selector: Selector) -> Selector:
    if isinstance(selector, MonitorSelector):
        return replace(selector, temperature=0.5)
    if isinstance(selector, MostForgottenSelector):
        return replace(selector, candidates=3)
    return replace(selector, at=(0.25,))


@QUIET
@pytest.mark.parametrize("strategy", ["forecast", "top", "coverage-herding"])
@pytest.mark.parametrize("place", ["before", "after"])
def test_a_monitor_revises_what_is_replayed(atlas: Atlas, tmp_path: Path, strategy: str, place: str) -> None:
    base, model = tiny(), completion.Bayesian().fit(atlas)
    given: dict[str, Any] = {"held_out": HELD_OUT, "loadings": correlation_loadings(model), "seed": 3}
    plan = plan_for(POOL, strategy, 0.5, forecast=model.predict([], []).mean, **given)
    mixture = ReplayMixture(TASK, base.tokenizer, steps=12, batch_size=2, max_length=96, plan=plan, pool=POOL)
    laid_out = mixture.replayed
    monitor = ForgettingMonitor(atlas, probes=8, every=5)
    selector = Recorded(MonitorSelector(monitor))
    seen = batches(base, mixture, tmp_path / "run", selector, learning_rate=1e-2, **{place: [monitor]})
    probes = monitor.run().probes
    assert set(laid_out) & set(probes)  # so that there was something to avoid
    assert tuple(seen) == mixture.replayed
    assert len(set(seen)) == len(seen) == 12
    assert not set(seen) & {*HELD_OUT, *probes}
    # Before the training, the order is that of the plan, less the probes; then what anyone would make of the scores.
    [(_, first, _), *later] = selector.calls
    kept = [id_ for id_ in laid_out if id_ not in probes]
    assert list(first[: len(kept)]) == kept
    assert len(first) == 12
    assert [len(replayed) + len(chosen) for replayed, chosen, _ in later] == [12, 12, 12]
    known = [id_ for id_ in probes if id_ not in HELD_OUT]
    columns = [POOL.ids.index(id_) for id_ in known]
    free = [id_ for id_ in POOL.ids if id_ not in {*HELD_OUT, *probes}]
    for replayed, chosen, weights in later:
        twin = tiny()
        twin.model.load_state_dict(weights)
        new = model.predict(columns, score(twin, POOL.subset(known)).nll - atlas.nll_before[columns]).mean
        if strategy == "top":
            best = sorted(free, key=lambda id_: -new[POOL.ids.index(id_)])
            assert list(chosen) == [id_ for id_ in best if id_ not in replayed][: len(chosen)]
        else:
            offline = plan_for(POOL, strategy, 0.5, among=free, forecast=new, **given)
            assert tuple(chosen) == offline.order(len(chosen), already_replayed=replayed)
    assert later[0][1] != first[len(later[0][0]) :]


@QUIET
def test_a_monitor_turns_replay_to_what_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: most tasks of the atlas forget one half of the pool, this one forgets the other."""
    half = np.arange(len(POOL)) % 4 < 2
    atlas, rng = Atlas.create(tmp_path / "a.atlas", POOL, score(tiny(), POOL), model="tiny"), np.random.default_rng(0)
    for i in range(8):
        row = np.where(half == (i < 6), 0.5, 0.0) + rng.normal(scale=0.02, size=len(POOL))
        atlas.add(f"t{i}", replace(atlas.before, nll=atlas.before.nll + row))
    truth = dict(zip(POOL.ids, np.where(half, 0.0, 0.5).tolist(), strict=True))

    def planted_losses(run: Any) -> np.ndarray:
        forgotten = [truth[id_] if run.state.global_step else 0.0 for id_ in run.examples.ids]
        return np.asarray(atlas.before.at(run.examples.ids) + forgotten)

    monkeypatch.setattr("forgetcast.lm.monitor._Run.losses", planted_losses)
    monitor = ForgettingMonitor(atlas, probes=10, every=4)
    plan = atlas_plan(atlas, ratio=0.34)  # 8 examples
    given: dict[str, Any] = {"plan": plan, "pool": POOL, "callbacks": [monitor]}
    fixed = FineTuner(tiny()).tune(TASK, RECIPE, **given).replayed
    revised = FineTuner(tiny()).tune(TASK, RECIPE, **given, selector=MonitorSelector(monitor)).replayed
    assert [truth[id_] for id_ in fixed] == [0.0] * 8
    assert [truth[id_] for id_ in revised] == [0.0] * 2 + [0.5] * 6


@QUIET
def test_a_monitor_scores_its_probes_once_and_alone_changes_nothing(
    atlas: Atlas, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def counted(language_model: LanguageModel, inputs: Any) -> np.ndarray:
        calls.append(len(inputs.encoded))
        return prepared_losses(language_model, inputs)

    monkeypatch.setattr("forgetcast.lm.monitor.prepared_losses", counted)
    monitor = ForgettingMonitor(atlas, probes=8, every=5)
    plan, tuner = atlas_plan(atlas), FineTuner(tiny())
    tuner.tune(TASK, RECIPE, plan=plan, pool=POOL, selector=MonitorSelector(monitor), callbacks=[monitor])
    assert calls == [8] * 5  # before the training, after 5, 10 and 15 steps, and at the end
    assert [reading.step for reading in monitor.readings] == [0, 5, 10, 15, 18]
    assert not monitor.watching
    assert monitor.forgetting() is None
    found = []
    for callbacks in ([], [monitor]):
        tuned = tuner.tune(TASK, RECIPE, plan=plan, pool=POOL, callbacks=callbacks)
        found.append((tuned.replayed, score(tuned.language_model, POOL).nll))
    assert found[0][0] == found[1][0] == plan.order(12)
    np.testing.assert_array_equal(found[0][1], found[1][1])


@QUIET
def test_a_monitor_that_cannot_select_is_refused(atlas: Atlas) -> None:
    with pytest.raises(ConfigError, match="a monitor without an atlas makes no forecast"):
        MonitorSelector(ForgettingMonitor(pool=POOL, probes=8))
    monitor, tuner = ForgettingMonitor(atlas, probes=8, every=5), FineTuner(tiny())
    given: dict[str, Any] = {"pool": POOL, "selector": MonitorSelector(monitor)}
    with pytest.raises(ConfigError, match="does not watch this training: give it to the Trainer too"):
        tuner.tune(TASK, RECIPE, plan=atlas_plan(atlas), **given)
    given["callbacks"] = [monitor]
    with pytest.raises(ConfigError, match="'random' does not; use one of coverage"):
        tuner.tune(TASK, RECIPE, plan=plan_for(POOL, "random", 0.5), **given)
    many = atlas_plan(atlas, ratio=0.75)
    left = len(set(POOL.ids) - {*HELD_OUT, *(POOL.ids[i] for i in monitor.gauge.probes)})  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=f"18 examples are to be replayed, and the plan has {left} besides"):
        tuner.tune(TASK, RECIPE, plan=many, **given)
    again = tuner.tune(TASK, RECIPE, plan=replace(many, repeat=True), **given).replayed
    assert len(set(again)) == left < len(again) == 18
    other = make_pool(41)
    with pytest.raises(MismatchError, match="the replay plan"):
        tuner.tune(TASK, RECIPE, plan=plan_for(other, "top", 0.5, forecast=np.zeros(41)), **(given | {"pool": other}))


def test_invalid_combinations_are_rejected(atlas: Atlas, tmp_path: Path) -> None:
    base, plan = tiny(), atlas_plan(atlas)
    online = OnlineSelector.from_atlas(atlas, plan, k=6)
    for wrong in (0.0, 1.0, -1.0):
        with pytest.raises(ConfigError, match="a fraction of the steps between 0 and 1"):
            replace(online, at=(wrong,))
    with pytest.raises(ConfigError, match="at least 2 candidates"):
        MostForgottenSelector(POOL, atlas.nll_before, candidates=1)
    by_chance = plan_for(POOL, "random", 0.5)
    tuner = FineTuner(base)
    with pytest.raises(ConfigError, match=r"'random' does not; use one of coverage, .*forecast, half"):
        tuner.tune(TASK, RECIPE, plan=by_chance, pool=POOL, selector=online)
    with pytest.raises(ConfigError, match="the mixture replays nothing"):
        tuner.tune(TASK, RECIPE, selector=online)
    with pytest.raises(ConfigError, match="give MostForgottenSelector as the selector"):
        tuner.tune(TASK, RECIPE, plan=plan_for(POOL, "most-forgotten", 0.5), pool=POOL)
    other = make_pool(41)
    with pytest.raises(MismatchError, match="the replay plan"):
        tuner.tune(
            TASK,
            RECIPE,
            plan=plan_for(other, "most-forgotten", 0.5),
            pool=other,
            selector=MostForgottenSelector(POOL, atlas.nll_before),
        )
    mixture = ReplayMixture(TASK, base.tokenizer, steps=12, batch_size=2, max_length=96, plan=plan, pool=POOL)
    with pytest.raises(ConfigError, match="set dataloader_num_workers=0"):
        batches(base, mixture, tmp_path, online, dataloader_num_workers=2)
    with pytest.raises(ConfigError, match="the plan does not replay 'e0'"):
        mixture.revise(3, ["e0"])


def test_a_gradient_product_is_that_of_the_gradients() -> None:
    base = tiny()
    base.model.double()
    task = Pool(TASK[:6])
    found = gradient_products(base, task, POOL)
    weights = dict(base.model.named_parameters())

    def gradient(example: Any, *, end: bool) -> tuple[torch.Tensor, int]:
        encoded = encode(example, base.tokenizer, 96, end=end)
        base.model.zero_grad()
        loss = base.model(input_ids=torch.tensor([encoded.ids]), labels=torch.tensor([encoded.labels])).loss
        loss.backward()
        flat = torch.cat([w.grad.flatten() if w.grad is not None else torch.zeros(w.numel()) for w in weights.values()])
        return flat, encoded.targets

    parts = [gradient(example, end=True) for example in task]
    of_task = sum(g * n for g, n in parts) / sum(n for _, n in parts)  # type: ignore[arg-type]
    expected = [float(-gradient(example, end=False)[0] @ of_task / (of_task @ of_task)) for example in POOL]
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())
    assert not base.model.training
    again = gradient_products(tiny(), task, POOL)  # float32 is enough
    np.testing.assert_allclose(again, found, atol=1e-2 * np.abs(found).max())


def test_gradient_products_leave_the_weights_as_they_were() -> None:
    base = tiny()
    before = base.weights_hash
    gradient_products(base, TASK, POOL)
    assert LanguageModel(base.model, base.tokenizer).weights_hash == before
    with torch.no_grad():
        for parameter in base.model.parameters():
            parameter.zero_()
    with pytest.raises(DataError, match="the task's gradient is zero"):
        gradient_products(LanguageModel(base.model, base.tokenizer), TASK, POOL)


def test_self_generated_texts() -> None:
    base = tiny()
    first, again = (sample_texts(base, 20, max_new_tokens=12, batch_size=8) for _ in range(2))
    assert first.ids == tuple(f"self-{i}" for i in range(20))
    assert [example.text for example in first] == [example.text for example in again]
    assert len({example.text for example in first}) == 20
    assert set(first.sources) == {"self-generated"}
    other = sample_texts(base, 20, max_new_tokens=12, batch_size=8, seed=1)
    assert {example.text for example in other}.isdisjoint(example.text for example in first)
    # Cold sampling of a sharp model says the same again and again.
    with pytest.raises(DataError, match="writes nothing new"):
        sample_texts(base, 500, max_new_tokens=4, temperature=1e-4)
    with pytest.raises(ConfigError, match="max_new_tokens must be between"):
        sample_texts(base, 2, max_new_tokens=96)
    with pytest.raises(ConfigError, match="the temperature above 0"):
        sample_texts(base, 2, temperature=0.0)


def test_the_commands(atlas: Atlas, tmp_path: Path, run: RunCommand) -> None:
    model_files(tmp_path)
    model, task, pool, recipe = (tmp_path / name for name in ("model", "task.jsonl", "pool.jsonl", "recipe.yaml"))

    def plan(strategy: str, *more: Any) -> Path:
        path = tmp_path / f"{strategy}.parquet"
        words = ["plan", atlas.path, "--strategy", strategy, "--ratio", "0.5", "-o", path, *more]
        assert run(*words)[0] == 0
        return path

    # OnlineSelector: what the library does with the same arguments.
    top = plan("top")
    words = ["train", model, task, "--plan", top, "--pool", pool, "--recipe", recipe, "--json"]
    code, out, err = run(
        *words, "-o", tmp_path / "tuned", "--atlas", atlas.path, "--online", "1/4,0.5", "--probes", "5"
    )
    assert (code, json.loads(out)["replayed"]) == (0, 8), err
    loaded = ReplayPlan.load(top)
    selector = OnlineSelector.from_atlas(atlas, loaded, k=5, at=(0.25, 0.5))
    tuned = FineTuner(tiny()).tune(TASK, Recipe.load(recipe), plan=loaded, pool=POOL, selector=selector)
    found = score(load(tmp_path / "tuned"), POOL).nll
    np.testing.assert_allclose(found, score(tuned.language_model, POOL).nll, rtol=1e-5)
    # More than there is.
    code, _, err = run(*words[:3], "--plan", plan("random", "--ratio", "4"), *words[5:], "-o", tmp_path / "many")
    assert (code, "64 examples are to be replayed, and the plan has 32" in err) == (2, True)
    # Most interfered.
    mir = plan("most-forgotten")
    words[4] = mir
    assert "need --plan, --pool and --atlas" in run(*words, "-o", tmp_path / "most-forgotten")[2]
    assert run(*words, "-o", tmp_path / "most-forgotten", "--atlas", atlas.path)[0] == 0
    assert (
        "which only forgetcast's callback can"
        in run("export", mir, pool, "--count", "4", "-o", tmp_path / "x.jsonl")[2]
    )
    # Both, and the plan itself, side by side.
    words = ["verify", model, task, "--atlas", atlas.path, "--plan", top, "--plan", mir, "--recipe", recipe]
    words += ["--seeds", "1", "--online", "0.5", "--probes", "5", "-o", tmp_path / "v.json", "--json"]
    code, out, err = run(*words)
    assert code == 0, err
    assert list(json.loads(out)["arms"]) == ["none", "random", "top", "most-forgotten", "top online"]
    assert (
        "a strategy that uses a forecast"
        in run(*words[:5], "--plan", mir, "--online", "0.5", *words[9:11], "-o", "x")[2]
    )
    assert "'soon' is no fraction" in run(*words[:7], "--online", "soon", *words[9:11], "-o", tmp_path / "w.json")[2]
    # By the gradient.
    words = ["plan", atlas.path, "--strategy", "gradient", "-o", tmp_path / "gradient.parquet"]
    assert "need --model and --task" in run(*words)[2]
    by_gradient = ReplayPlan.load(plan("gradient", "--model", model, "--task", task))
    expected = plan_for(
        POOL, "gradient", 0.5, held_out=by_gradient.held_out_ids, gradients=gradient_products(tiny(), TASK, POOL)
    )
    assert by_gradient.order(30) == expected.order(30)


def test_pool_generated_by_the_model(tmp_path: Path, run: RunCommand) -> None:
    model_files(tmp_path)
    words = ["generate", tmp_path / "model", "-n", "10", "--max-new-tokens", "12", "-o", tmp_path / "own.jsonl"]
    code, out, err = run(*words)
    assert code == 0, err
    assert "10 texts written" in out
    own = Pool.load(tmp_path / "own.jsonl")
    assert [example.text for example in own] == [
        example.text for example in sample_texts(tiny(), 10, max_new_tokens=12)
    ]


def test_only_some_sources_are_replayed(atlas: Atlas, tmp_path: Path, run: RunCommand) -> None:
    words = ["plan", atlas.path, "--strategy", "top", "-o", tmp_path / "plan.parquet", "--source"]
    assert run(*words, "s1", "--source", "s2")[0] == 0
    plan = ReplayPlan.load(tmp_path / "plan.parquet")
    named = dict(zip(POOL.ids, POOL.sources, strict=True))
    assert {named[id_] for id_ in plan.order(20)} == {"s1", "s2"}
    assert not set(plan.order(20)) & set(plan.held_out_ids)
    assert "no example of the source 'web'; it has s0, s1, s2" in run(*words, "web")[2]
