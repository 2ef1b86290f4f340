"""How much to replay: the law, beside planted truths and a plain sampler; the runs it is learned from; the commands."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from forgetcast import Atlas, ConfigError, DataError
from forgetcast.data import Recipe
from forgetcast.experiments.verify import Run, pilot_comparison
from forgetcast.replay import get_strategy
from forgetcast.replay import law as law_module
from forgetcast.replay.law import ADVISED_RATIOS, Advice, Expected, ReplayLaw, advise, advised_ratios, ratio_text
from forgetcast.replay.plan import ReplayPlan, ratio_note
from support.cli import RunCommand
from support.data import make_atlas, make_pool
from support.training import TASK, make_recipe, measured_atlas, model_files

RATIOS = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4)


def one(task: str, strategy: str, ratio: float, left: float, seed: int = 0, setup: str = "x") -> Run:
    return Run(task, strategy, seed, left, 2 * left, 1.0, 0, 8, 1.0, strategy=strategy, ratio=ratio, setup=setup)


class Planted:
    """Runs that follow the law: a strength for each task, one bend, an efficiency for each strategy, and noise."""

    def __init__(self, seed: int, *, bend: float = 40.0, noise: float = 0.03, spread: float = 0.25) -> None:
        self.rng, self.bend, self.noise, self.spread = np.random.default_rng(seed), bend, noise, spread
        self.efficiency = {"random": 1.0, "top": 1.5}

    def strength(self) -> float:
        return float(0.7 * np.exp(self.spread * self.rng.standard_normal()))

    def remaining(self, strength: float, strategy: str, ratio: float) -> float:
        dose = math.log(1 + self.bend * self.efficiency[strategy] * ratio / (1 + ratio))
        return math.exp(-strength * dose / math.log(1 + self.bend / 9))

    def runs(self, tasks: int, strategies: tuple[str, ...], ratios: tuple[float, ...] = RATIOS) -> list[Run]:
        found = []
        for t in range(tasks):
            without, strength = float(self.rng.uniform(0.1, 0.5)), self.strength()
            found.append(one(f"t{t}", "none", 0.0, without))
            for strategy in strategies:
                for ratio in ratios:
                    left = self.remaining(strength, strategy, ratio) + self.noise * self.rng.standard_normal()
                    found.append(one(f"t{t}", strategy, ratio, without * left))
        return found


def test_intervals_cover_new_runs_at_their_level() -> None:
    """The law is learned from six tasks, or from a pilot of the task itself, and meets runs it has not seen."""
    held: dict[str, list[bool]] = {"new": [], "own": []}
    for seed in range(20):
        planted = Planted(seed)
        law = ReplayLaw.fit(planted.runs(6, ("random", "top"), (1 / 32, 1 / 8)))
        strength = planted.strength()
        for strategy in ("random", "top"):
            for ratio in (1 / 64, 1 / 16, 1 / 4):
                truth = planted.remaining(strength, strategy, ratio) + planted.noise * planted.rng.standard_normal()
                expected = law.remaining(strategy, ratio)
                held["new"].append(expected.lower <= truth <= expected.upper)
        pilot = Planted(seed + 100)
        first = pilot.strength()
        runs = [one("p", "random", r, 0.2 * pilot.remaining(first, "random", r)) for r in (1 / 32, 1 / 8)]
        law = ReplayLaw.fit([one("p", "none", 0.0, 0.2), *runs])
        for ratio in (1 / 64, 1 / 16, 1 / 4):
            expected = law.remaining("random", ratio, task="p")
            held["own"].append(expected.lower <= pilot.remaining(first, "random", ratio) <= expected.upper)
    assert 0.82 <= np.mean(held["new"]) <= 0.98
    assert np.mean(held["own"]) >= 0.85  # without noise of its own, a truth is held more often


def test_fit_recovers_planted_parameters() -> None:
    planted = Planted(3)
    law = ReplayLaw.fit(planted.runs(40, ("random", "top")))
    assert (law.runs, law.strategies, len(law.tasks)) == (400, ("random", "top"), 40)
    worth = law.efficiency("top")
    assert worth.lower < 1.5 < worth.upper
    assert worth.upper / worth.lower < 1.2
    assert law.efficiency("random") == (1.0, 1.0, 1.0)
    strengths = [planted.strength() for _ in range(4000)]
    for ratio in (1 / 100, 1 / 10, 1 / 3):
        truth = np.mean([planted.remaining(strength, "top", ratio) for strength in strengths])
        assert law.remaining("top", ratio).mean == pytest.approx(truth, abs=0.03)
    # Of the other metric, which is twice as large with and without replay, the shares are the same.
    assert ReplayLaw.fit(planted.runs(3, ("random",)), "worst_tenth").remaining("random", 0.1).mean > 0


def test_the_posterior_is_that_of_a_plain_sampler() -> None:
    """Oracle: a random walk over the same prior and likelihood, written out in loops, for a pilot of three runs."""
    shares, left = [1 / 33, 1 / 9], [0.80, 0.52]
    runs = [one("p", "random", p / (1 - p), 0.4 * y) for p, y in zip(shares, left, strict=True)]
    law = ReplayLaw.fit([one("p", "none", 0.0, 0.4), *runs])
    noises, spreads = law_module.NOISE.tolist(), law_module.SPREAD.tolist()

    def curve(state: tuple[float, float, float, int, int], share: float) -> float:
        log_strength, log_bend, deviation, _, _ = state
        unit = math.log1p(math.exp(log_bend) / 9)
        return math.exp(-math.exp(log_strength + deviation) * math.log1p(math.exp(log_bend) * share) / unit)

    def log_posterior(state: tuple[float, float, float, int, int]) -> float:
        log_strength, log_bend, deviation, i, j = state
        total = -0.5 * ((log_strength - law_module.STRENGTH_PRIOR[0]) / law_module.STRENGTH_PRIOR[1]) ** 2
        total -= 0.5 * ((log_bend - law_module.CURVATURE_PRIOR[0]) / law_module.CURVATURE_PRIOR[1]) ** 2
        total -= 0.5 * (deviation / spreads[j]) ** 2 + math.log(spreads[j])
        total -= 0.5 * ((math.log(noises[i]) - law_module.NOISE_PRIOR[0]) / law_module.NOISE_PRIOR[1]) ** 2
        total -= 0.5 * ((math.log(spreads[j]) - law_module.SPREAD_PRIOR[0]) / law_module.SPREAD_PRIOR[1]) ** 2
        for share, seen in zip(shares, left, strict=True):
            total -= 0.5 * ((seen - curve(state, share)) / noises[i]) ** 2 + math.log(noises[i])
        return total

    rng = np.random.default_rng(0)
    state = (math.log(0.6), math.log(30.0), 0.0, 4, 2)
    at, seen = log_posterior(state), []
    steps, uniform, hops = rng.normal(size=(150_000, 3)), rng.random(150_000), rng.integers(-1, 2, size=(150_000, 2))
    for step, chance, hop in zip(steps.tolist(), uniform.tolist(), hops.tolist(), strict=True):
        i, j = state[3] + hop[0], state[4] + hop[1]
        if 0 <= i < len(noises) and 0 <= j < len(spreads):
            new = (state[0] + 0.25 * step[0], state[1] + step[1], state[2] + 0.25 * step[2], i, j)
            there = log_posterior(new)
            if math.log(chance) < there - at:
                state, at = new, there
        seen.append(state)
    kept = seen[10_000::10]
    for ratio in (1 / 64, 1 / 16, 1 / 4):
        truth = np.array([curve(state, ratio / (1 + ratio)) for state in kept])
        # The interval is of a run, so it has the noise on top.
        truth_run = truth + np.array([noises[state[3]] for state in kept]) * rng.standard_normal(len(kept))
        expected = law.remaining("random", ratio, task="p")
        assert expected.mean == pytest.approx(truth.mean(), abs=0.03)
        assert (expected.lower, expected.upper) == pytest.approx(np.quantile(truth_run, [0.05, 0.95]), abs=0.06)


def test_without_runs_it_is_the_prior() -> None:
    law = ReplayLaw.fit([])
    assert (law.runs, law.tasks, law.strategies) == (0, (), ("random",))
    # At the reference ratio the strength alone counts, with the spread between tasks on top.
    weights = norm.pdf(np.log(law_module.SPREAD), *law_module.SPREAD_PRIOR)
    rng = np.random.default_rng(5)
    spread = rng.choice(law_module.SPREAD, p=weights / weights.sum(), size=200_000)
    center, width = law_module.STRENGTH_PRIOR
    deviations = center + np.hypot(width, spread) * rng.standard_normal(200_000)
    assert law.remaining("random", 1 / 8).mean == pytest.approx(np.exp(-np.exp(deviations)).mean(), abs=0.02)
    wide = law.remaining("random", 1 / 8)
    assert wide.upper - wide.lower > 0.6
    assert law.remaining("random", 0.0) == (1.0, 1.0, 1.0)


def test_the_ratio_for_a_retention_is_where_it_is_expected() -> None:
    law = ReplayLaw.fit(Planted(1).runs(8, ("random", "top")))
    for task in (None, "t2"):
        for retention in (0.1, 0.2, 0.3):
            needed = law.ratio_for(retention, "top", task=task)
            assert needed is not None
            assert law.remaining("top", needed.mean, task=task).mean == pytest.approx(1 - retention, abs=1e-6)
            assert needed.lower < needed.mean < needed.upper
            random = law.ratio_for(retention, "random", task=task)
            assert random is None or random.mean > needed.mean
    assert law.ratio_for(0.999, "top") is None
    for retention in (0.0, 1.0, float("nan")):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            law.ratio_for(retention)


def test_excluded_runs() -> None:
    """Runs without their counterpart, of tasks that forget nothing, and of files of earlier versions."""
    runs = [
        one("a", "random", 0.1, 0.2),
        one("b", "none", 0.0, -0.01),
        one("b", "random", 0.1, -0.02),
        one("c", "none", 0.0, 0.4, seed=1),
        one("c", "random", 0.1, 0.2, seed=2),
        one("d", "none", 0.0, 0.4, setup="long"),
        one("d", "random", 0.1, 0.2, setup="short"),
        Run("e", "random", 0, 0.2, 0.4, 1.0, 0, 8, 1.0),
        one("f", "interpolation", 0.0, 0.1),
        one("f", "random", 0.1, 0.2),
    ]
    assert ReplayLaw.fit(runs).runs == 0
    law = ReplayLaw.fit([*runs, one("d", "none", 0.0, 0.3, setup="short")])
    assert (law.runs, law.tasks) == (1, ("d",))
    with pytest.raises(DataError, match="there is no run with replay of the task 'a'"):
        law.remaining("random", 0.1, task="a")
    with pytest.raises(ConfigError, match="not 'median'"):
        ReplayLaw.fit(runs, "median")
    with pytest.raises(ConfigError, match="must not be negative"):
        law.remaining("random", -0.1)


def said(**parts: Any) -> str:
    none = Expected(0.4, 0.3, 0.5)
    given = {"strategy": "top", "task": None, "target": None, "runs": 9, "tasks": 3, "largest": 0.125}
    given |= {"remaining": {}, "efficiency": {}, "needed": None, "most": none}
    return " ".join(Advice(**(given | parts)).sentences())


def test_advice_matches_its_intervals() -> None:
    worse, same, better = Expected(0.5, 0.3, 0.9), Expected(1.1, 0.8, 1.5), Expected(1.6, 1.2, 2.0)
    assert "a rough estimate" in said(runs=0)
    assert "is unknown" in said()
    text = said(efficiency={"top": {"mean": same, "worst_tenth": same}})
    assert "is not shown to need fewer" in text
    assert "Random replay is good enough" in text
    text = said(efficiency={"top": {"mean": worse, "worst_tenth": better}})
    assert "Mean forgetting: top replay needs more examples than random replay (estimate 2.00 times as many," in text
    assert "Worst tenth: top replay needs fewer examples than random replay (estimate 0.62 times as many," in text
    assert "good enough" not in text
    assert "no ratio up to 1 is expected to suffice; a ratio of 1 avoids 60%" in said(target=0.9)
    text = said(target=0.5, needed=Expected(0.2, 0.1, math.inf), task="mine")
    assert "expect a ratio of 0.2 (90 % interval 0.1 to inf)" in text
    assert "beyond the largest ratio that was run, 0.125" in text
    assert "for mine" in text


@given(st.integers(1, 3000))
def test_advised_ratios_are_those_of_whole_batches(steps: int) -> None:
    ratios = advised_ratios(recipe := Recipe(steps=steps))
    batches = [steps * ratio for ratio in ratios]
    assert all(round(count) >= 1 and math.isclose(count, round(count)) for count in batches)
    assert sorted(set(ratios)) == list(ratios)
    for ratio, count in zip(ratios, batches, strict=True):
        above, _, below = ratio_text(ratio).partition("/")
        assert round(count) * int(below or 1) == int(above) * steps
    for wanted in ADVISED_RATIOS:  # none is left out that could be hit, or nearly
        if steps * wanted > 0.5:
            assert min(abs(steps * wanted - count) for count in batches) <= 0.5 + 1e-9
    text = said(recipe=recipe)
    assert ("Ratios are those that whole batches make" in text) == (steps % 64 != 0)
    assert advised_ratios(None) == ADVISED_RATIOS


def test_advice_under_a_short_recipe(tmp_path: Path, run: RunCommand) -> None:
    kept = measured_atlas(tmp_path, make_recipe(steps=14))
    plan = ["plan", kept.path, "--strategy", "random", "--advise"]
    code, out, err = run(*plan)
    assert code == 0, err
    listed = [line.split()[:2] for line in out.splitlines() if line.startswith("random")]
    assert listed == [["random", ratio] for ratio in ("1/14", "1/7", "2/7", "1/2")]
    said_once = "with the 14 steps of the recipe: 1/14, 1/7, 2/7, 1/2, but not 1/64, 1/32, 1/16, 1/8, 1/4."
    assert said_once in " ".join(out.split())
    (tmp_path / "recipe.yaml").write_text("steps: 64")
    code, out, err = run(*plan, "--recipe", tmp_path / "recipe.yaml", "--json")
    found = json.loads(out)
    assert (code, found["steps"], [each["ratio"] for each in found["remaining"]]) == (0, 64, [*ADVISED_RATIOS])
    assert not [line for line in found["sentences"] if "whole batches" in line]
    code, out, err = run(*plan, "--target-retention", "0.4", "--json")
    found = json.loads(out)
    note = ratio_note(found["needed"]["mean"], 14, 2)
    assert note is not None
    assert f"With this recipe, {note}." in found["sentences"]


def test_the_atlas_keeps_runs(tmp_path: Path) -> None:
    kept = make_atlas(tmp_path / "a.atlas", make_pool())
    assert kept.replays == []
    first, again = (
        {"task": "t", "seed": 0, "ratio": 0.1, "mean": 1.0},
        {"task": "t", "seed": 0, "ratio": 0.1, "mean": 2.0},
    )
    kept.add_replays([first, first | {"seed": 1}])
    kept.add_replays([again])
    assert Atlas.open(kept.path).replays == [first | {"seed": 1}, again], "the one that replaces another is the newest"
    with pytest.raises(DataError, match=r"replays: the field '0\.arm' is missing"):
        advise(kept, "random")
    for file in (kept.path / "replays").iterdir():
        file.write_text('{"a": 1}')
    with pytest.raises(DataError, match=r"replays/[0-9a-f]+.json: a JSON object with a digest is needed"):
        advise(kept, "random")


def test_invalid_pilot_strategies_are_rejected(tmp_path: Path) -> None:
    kept = make_atlas(tmp_path / "a.atlas", make_pool())
    for strategy in ("none", "padding", "most-forgotten", "truth", "gradient"):
        with pytest.raises(ConfigError, match=f"{strategy!r} cannot be used in a pilot"):
            pilot_comparison(kept, "t", TASK, strategies=[get_strategy(strategy)], ratios=[0.1], hold_out=0.5)
    strategies = [get_strategy(name) for name in ("top", "random")]
    comparison = pilot_comparison(kept, "t", TASK, strategies=strategies, ratios=[0.1, 0.2], hold_out=0.5)
    assert list(comparison.plans) == ["none", "random 0.1", "random 0.2", "top 0.1", "top 0.2"]
    assert not set(comparison.train.ids) & set(comparison.test.ids)


@pytest.fixture
def atlas(tmp_path: Path) -> Atlas:
    return measured_atlas(tmp_path)


def test_the_commands(atlas: Atlas, tmp_path: Path, run: RunCommand) -> None:
    model_files(tmp_path)
    plan = ["plan", atlas.path, "--strategy", "top"]
    code, out, err = run(*plan, "--advise")
    assert code == 0, err
    assert "has no runs with replay" in out
    words = [
        "pilot",
        tmp_path / "model",
        tmp_path / "task.jsonl",
        "--atlas",
        atlas.path,
        "--recipe",
        tmp_path / "recipe.yaml",
    ]
    words += ["--ratios", "1/4,0.5", "--strategy", "top", "--steps", "8", "--hold-out", "0.5", "--json"]
    code, out, err = run(*words)
    assert code == 0, err
    found = json.loads(out)
    assert [(r["strategy"], r["ratio"], r["replayed"]) for r in found["runs"]] == [
        ("none", 0.0, 0), ("random", 0.25, 4), ("random", 0.5, 8), ("top", 0.25, 4), ("top", 0.5, 8)
    ]  # fmt: skip
    assert Atlas.open(atlas.path).replays == found["runs"]
    assert found["advice"]["task"] == "task"
    code, again, _ = run(*words)  # finished runs are not repeated
    assert json.loads(again)["runs"] == found["runs"]
    target = [
        *plan,
        "--target-retention",
        "0.1",
        "--task",
        tmp_path / "task.jsonl",
        "-o",
        tmp_path / "p.parquet",
        "--json",
    ]
    code, out, err = run(*target)
    assert code == 0, err
    advised = json.loads(out)
    assert advised["ratio"] == advised["advice"]["needed"]["mean"] == ReplayPlan.load(tmp_path / "p.parquet").ratio
    assert advised["advice"] == advise(atlas, "top", target=0.1, task="task").as_dict()
    code, out, err = run(*plan, "--target-retention", "0.1", "-o", tmp_path / "p.parquet")
    assert "To avoid 10% of the forgetting with top replay, expect a ratio of" in " ".join(out.split()), err
    assert "give one of --ratio, --share-of-set" in run(*target, "--ratio", "0.5")[2]
    assert "between 0 and 1, not 2" in run(*plan, "--target-retention", "2")[2]
    code, _, err = run(*plan, "--target-retention", "0.9999", "-o", tmp_path / "q.parquet")
    assert (code, "no ratio up to 1 is expected to keep 100%" in err) == (2, True)
    assert not (tmp_path / "q.parquet").exists()
    assert "give -o, the plan to write, or --advise" in run(*plan)[2]
    assert "advice may have a --task" in run(*plan, "--task", tmp_path / "task.jsonl", "-o", tmp_path / "q.parquet")[2]
    assert "--ratios: '1/0' is no fraction" in run(*words[:7], "--ratios", "1/0")[2]


def test_runs_of_a_task_that_forgot_nothing_are_not_said_to_be_missing(tmp_path: Path) -> None:
    atlas = make_atlas(tmp_path / "a.atlas", make_pool())
    assert "This atlas has no runs with replay" in " ".join(advise(atlas, "random").sentences())
    atlas.add_replays(asdict(each) for each in (one("t", "none", 0.0, -0.1), one("t", "random", 0.25, -0.3)))
    advice = advise(atlas, "random")
    assert (advice.runs, advice.largest) == (0, 0.25)
    text = " ".join(advice.sentences())
    assert "This atlas has no runs with replay" not in text
    assert "No run with replay in this atlas has one without replay beside it that forgot anything on the mean" in text
