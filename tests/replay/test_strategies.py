"""Replay strategies beside brute force, plain loops and closed forms."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from forgetcast import Atlas, ConfigError, DataError, MismatchError, Pool, ReplayPlan
from forgetcast.completion import Additive, Bayesian
from forgetcast.replay.coverage import (
    HALVING_SHARE,
    Diminishing,
    Facility,
    correlation_loadings,
    coverage,
    gaussian,
    greedy,
    herding,
    sample_targets,
)
from forgetcast.replay.sampling import EFFECTIVE_SHARE, interleave, normal_scores, softmax_weights, stratified_order
from forgetcast.replay.strategies import STRATEGIES, get_strategy
from support.cli import RunCommand
from support.data import make_atlas, make_pool, make_scores
from support.plans import plan_for

REPLAYING = [name for name in STRATEGIES if name not in ("none", "padding")]


def inputs(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Everything that any strategy needs."""
    rng = np.random.default_rng(seed)
    return {
        "forecast": rng.normal(0.3, 0.5, n),
        "truth": rng.normal(0.3, 0.5, n),
        "losses": rng.uniform(1, 4, n),
        "gradients": rng.normal(0, 0.1, n),
        "loadings": rng.normal(size=(n, 3)) / 3,
    }


@pytest.mark.parametrize("strategy", REPLAYING)
class TestContract:
    """What every strategy has to keep."""

    def test_order(self, tmp_path: Path, pool: Pool, strategy: str) -> None:
        held = pool.ids[2:9]
        plan = plan_for(pool, strategy, 0.1, held_out=held, seed=3, **inputs(24))
        drawn = plan.order(40)
        assert sorted(drawn[:17]) == sorted(set(pool.ids) - set(held))
        assert sorted(drawn[17:34]) == sorted(drawn[:17])
        assert all(plan.order(k) == drawn[:k] for k in range(40))
        plan.save(tmp_path / "plan.parquet")
        again = ReplayPlan.load(tmp_path / "plan.parquet")
        assert again.order(40) == drawn
        assert again.fingerprint == plan.fingerprint
        assert again.held_out_ids == held

    def test_held_out_signals_have_no_effect(self, pool: Pool, strategy: str) -> None:
        held = np.arange(24) % 3 == 0
        held_out = [id_ for id_, out in zip(pool.ids, held, strict=True) if out]
        known = inputs(24)
        other = {name: values.copy() for name, values in known.items()}
        for name, values in other.items():
            values[held] = np.nan if name == "truth" else 1e6
        plans = [plan_for(pool, strategy, 0.1, held_out=held_out, **given) for given in (known, other)]
        assert plans[0].order(30) == plans[1].order(30)
        assert plans[0].fingerprint == plans[1].fingerprint

    def test_required_signals_are_checked(self, pool: Pool, strategy: str) -> None:
        for name in STRATEGIES[strategy].needs:
            known = inputs(24)
            with pytest.raises(DataError, match=f"'{strategy}' needs {name}.*the pool has 24"):
                plan_for(pool, strategy, 0.1, **known | {name: None})
            with pytest.raises(MismatchError, match=f"the {name} has shape .*the pool has 24"):
                plan_for(pool, strategy, 0.1, **known | {name: known[name][:23]})
            known[name][5] = np.inf
            with pytest.raises(DataError, match=f"the {name} of 'e5' is not a finite number"):
                plan_for(pool, strategy, 0.1, **known)
            plan_for(pool, strategy, 0.1, held_out=["e5"], **known)


def test_padding_has_a_ratio_but_no_replay(tmp_path: Path, pool: Pool) -> None:
    plan = plan_for(pool, "padding", 0.25, held_out=pool.ids[:4])
    assert plan.order(0) == ()
    with pytest.raises(ConfigError, match="replays nothing"):
        plan.order(1)
    plan.save(tmp_path / "plan.parquet")
    assert ReplayPlan.load(tmp_path / "plan.parquet").ratio == 0.25
    with pytest.raises(DataError, match="no replay weights"):
        replace(plan, weights=np.where(plan.held_out, 0, 0.05))
    with pytest.raises(ConfigError, match="is incompatible with"):
        plan_for(pool, "padding", 0.0)


def test_top_and_losses_are_sorted(pool: Pool) -> None:
    known = inputs(24)

    def order(strategy: str, **changed: np.ndarray) -> list[str]:
        return list(plan_for(pool, strategy, 0.1, **known | changed).order(24))

    def sorted_by(key: np.ndarray) -> list[str]:
        return [pool.ids[i] for i in sorted(range(24), key=lambda i: key[i])]

    assert order("top") == sorted_by(-known["forecast"])
    assert order("loss") == sorted_by(-known["losses"])
    assert order("gradient") == sorted_by(-known["gradients"])
    assert order("median-loss") == sorted_by(np.abs(known["losses"] - np.median(known["losses"])))


@pytest.mark.parametrize(
    ("strategy", "name"), [("loss", "losses"), ("median-loss", "losses"), ("gradient", "gradients"), ("truth", "truth")]
)
def test_unmeasured_examples_are_not_replayed(pool: Pool, strategy: str, name: str) -> None:
    known = inputs(24)
    known[name][[1, 7]] = np.nan
    plan = plan_for(pool, strategy, 0.1, held_out=["e0"], **known)
    assert set(plan.order(21)) == set(pool.ids) - {"e0", "e1", "e7"}
    with pytest.raises(DataError, match="has no signal to use"):
        plan_for(pool, strategy, 0.1, **known | {name: np.full(24, np.nan)})


def test_half_alternates(pool: Pool) -> None:
    forecast = inputs(24)["forecast"]
    plan = plan_for(pool, "half", 0.1, held_out=pool.ids[:4], forecast=forecast)
    best = [pool.ids[i] for i in np.argsort(-forecast) if i >= 4]
    plain = plan_for(pool, "forecast", 0.1, held_out=pool.ids[:4], forecast=forecast)
    np.testing.assert_array_equal(plan.weights, plain.weights)
    for seed in range(5):
        seen: list[str] = []
        queues = list(best), list(replace(plain, seed=seed).order(20))
        for place in range(20):
            queue = queues[place % 2]
            seen.append(next(id_ for id_ in queue if id_ not in seen))
        assert replace(plan, seed=seed).order(20) == tuple(seen)
    assert len({replace(plan, seed=seed).order(8) for seed in range(5)}) > 1


def test_half_at_a_low_temperature_replays_what_has_a_weight(pool: Pool) -> None:
    plan = plan_for(pool, "half", 0.1, forecast=np.arange(24.0), temperature=1e-2)
    assert (plan.weights > 0).sum() < 24
    assert set(plan.order((plan.weights > 0).sum())) == {
        id_ for id_, w in zip(pool.ids, plan.weights, strict=True) if w
    }


@given(st.integers(1, 30), st.floats(0.05, 1))
def test_interleave(n: int, share: float) -> None:
    first, second = np.random.default_rng(n).permuted(np.tile(np.arange(n), (2, 1)), axis=1)
    merged = interleave(first, second, share)
    assert sorted(merged) == list(range(n))
    for k in range(1, n + 1):
        # At least so many of the prefix are the first of the first order that were not taken yet.
        own = int(np.ceil(k * share))
        assert set(first[:own]) <= set(merged[:k])


@given(st.lists(st.sampled_from("abcde"), min_size=1, max_size=60))
def test_every_prefix_is_apportioned_by_webster(labels: list[str]) -> None:
    order = np.random.default_rng(len(labels)).permutation(len(labels))
    found = stratified_order(order, labels)
    assert sorted(found) == list(range(len(labels)))
    sizes, given_ = Counter(labels), Counter[str]()
    for i in found:
        quotient = {name: sizes[name] / (2 * given_[name] + 1) for name in sizes if given_[name] < sizes[name]}
        assert quotient[labels[i]] == pytest.approx(max(quotient.values()))
        given_[labels[i]] += 1
    for name in sizes:  # the order within a stratum is kept
        assert [i for i in found if labels[i] == name] == [i for i in order if labels[i] == name]


def test_stratified_replay_is_uniform_within_strata_over_seeds(pool: Pool) -> None:
    plan = plan_for(pool, "stratified", 0.1)
    sources = dict(zip(pool.ids, pool.sources, strict=True))
    counts = Counter[str]()
    for seed in range(900):
        drawn = replace(plan, seed=seed).order(3)
        assert {sources[id_] for id_ in drawn} == {"s0", "s1", "s2"}
        counts.update(drawn)
    assert stats.chisquare([counts[id_] for id_ in pool.ids]).pvalue > 1e-4


@given(hnp.arrays(np.int64, st.integers(8, 200), elements=st.integers(-300, 300), unique=True))
def test_ranked_weights_depend_on_ranks_only(forecast: np.ndarray) -> None:
    weights = softmax_weights(normal_scores(forecast))
    np.testing.assert_array_equal(weights, softmax_weights(normal_scores(forecast.astype(float) ** 3)))
    assert 1 / (weights**2).sum() == pytest.approx(EFFECTIVE_SHARE * len(forecast), rel=1e-6)
    assert (np.diff(weights[np.argsort(forecast)]) > 0).all()


def test_ranked_weights_are_robust_to_an_outlier(pool: Pool) -> None:
    forecast = inputs(24)["forecast"]
    forecast[3] = 1000.0
    ranked, plain = (plan_for(pool, name, 0.1, forecast=forecast) for name in ("ranked", "forecast"))
    others = np.arange(24) != 3
    assert plain.weights[others].max() < 1.01 * plain.weights[others].min()  # all that the softmax still sees is e3
    assert ranked.weights[others].max() > 10 * ranked.weights[others].min()
    assert ranked.weights[3] == ranked.weights.max() < plain.weights[3]
    levels = stats.norm.ppf((stats.rankdata(forecast) - 0.5) / 24)
    np.testing.assert_allclose(normal_scores(forecast), levels)


def facility(loadings: np.ndarray, demand: np.ndarray, chosen: list[int]) -> float:
    """Plain loops."""
    return sum(need * max([0.0, *(float(loadings[i] @ loadings[j]) for i in chosen)]) for j, need in enumerate(demand))


def diminishing(loadings: np.ndarray, demand: np.ndarray, chosen: list[int]) -> float:
    n = len(demand)

    def like(i: int, j: int) -> float:
        return max(0.0, float(loadings[i] @ loadings[j]))

    typical = sum(demand[j] * like(i, j) for i in range(n) for j in range(n)) / n / demand.sum()
    unit = HALVING_SHARE * n * typical
    doses = [sum(like(i, j) for i in chosen) / unit for j in range(n)]
    return sum(need * dose / (1 + dose) for need, dose in zip(demand, doses, strict=True))


CASES = [(Facility, facility), (Diminishing, diminishing)]


@pytest.mark.parametrize(("objective", "value"), CASES)
def test_coverage_is_greedy_for_its_objective(objective: type, value: object) -> None:
    """Beside brute force: each choice adds most, and the whole is within 1 - 1/e of the best set of its size."""
    for seed in range(6):
        rng = np.random.default_rng(seed)
        loadings, forecast = rng.normal(size=(12, 3)) / 2, rng.normal(0.3, 0.5, 12)
        demand = np.maximum(forecast, 0)
        order = coverage(loadings, forecast, objective).tolist()
        assert sorted(order) == list(range(12))
        for k in range(12):
            values = {i: value(loadings, demand, [*order[:k], i]) for i in range(12) if i not in order[:k]}  # type: ignore[operator]
            assert values[order[k]] == pytest.approx(max(values.values()), abs=1e-9)
        best = max(value(loadings, demand, list(chosen)) for chosen in combinations(range(12), 4))  # type: ignore[operator]
        assert (1 - 1 / np.e) * best <= value(loadings, demand, order[:4]) <= best + 1e-12  # type: ignore[operator]


@pytest.mark.parametrize("objective", [Facility, Diminishing])
@given(seed=st.integers(0, 10**6))
def test_the_objectives_are_submodular(objective: type, seed: int) -> None:
    rng = np.random.default_rng(seed)
    loadings, demand = rng.normal(size=(15, 2)), rng.exponential(size=15)
    small = objective(loadings, demand)
    before, rows = np.full(15, np.inf), np.arange(15)
    for row in rng.permutation(15)[:6]:
        gains = small.gains(rows)
        assert (gains >= 0).all()
        assert (gains <= before + 1e-12).all()
        before = gains
        small.take(row)


@pytest.mark.parametrize("objective", [Facility, Diminishing])
def test_lazy_greedy_matches_eager(objective: type) -> None:
    rng = np.random.default_rng(0)
    loadings, demand = rng.normal(size=(300, 5)) / 3, rng.exponential(size=300)
    plain, every = objective(loadings, demand), []
    for _ in range(60):
        gains = plain.gains(np.arange(300))
        gains[every] = -np.inf
        every.append(int(np.argmax(gains)))
        plain.take(every[-1])
    assert greedy(objective(loadings, demand), 300, 60).tolist() == every


def test_greedy_stops_when_no_gain_remains() -> None:
    """Many examples, three directions: after one of each, all gains are zero and none is computed again."""

    class Counting(Facility):
        evaluated = 0

        def gains(self, rows: np.ndarray) -> np.ndarray:
            self.evaluated += len(rows)
            return super().gains(rows)

    loadings = np.eye(3)[np.arange(5000) % 3]
    objective = Counting(loadings, np.ones(5000))
    assert greedy(objective, 5000, 5000).tolist() == list(range(5000))
    assert objective.evaluated < 5 * 5000


def test_coverage_spreads_over_what_is_to_be_lost() -> None:
    """Three groups that protect only themselves: the largest loss first, then the others, none of what is safe."""
    loadings = np.repeat(np.eye(4)[:, :3], [10, 10, 10, 10], axis=0) * 0.9
    forecast = np.repeat([0.9, 0.6, 0.5, -0.2], 10) + np.linspace(0, 0.01, 40)
    for objective in (Facility, Diminishing):
        order = coverage(loadings, forecast, objective)
        assert [i // 10 for i in order[:3]] == [0, 1, 2]
    many = coverage(loadings, forecast, Diminishing)[:15]
    assert np.bincount(many // 10, minlength=4)[:3].min() >= 4
    # Past the depth, and where nothing is left to gain, the highest forecasts come first.
    np.testing.assert_array_equal(coverage(loadings, forecast, Facility, depth=0), np.argsort(-forecast))
    safe = -np.arange(8.0)
    np.testing.assert_array_equal(coverage(np.eye(8), safe, Diminishing), np.arange(8))


def test_herding_keeps_the_discrepancy_smallest() -> None:
    rng = np.random.default_rng(1)
    loadings, weights = rng.normal(size=(14, 2)), rng.dirichlet(np.ones(14))
    order = herding(loadings, weights).tolist()
    assert sorted(order) == list(range(14))
    distances = [np.linalg.norm(loadings[i] - loadings[j]) for i in range(14) for j in range(i)]
    kernel = np.array(
        [[np.exp(-(np.linalg.norm(a - b) ** 2) / (2 * np.median(distances) ** 2)) for a in loadings] for b in loadings]
    )
    np.testing.assert_allclose(gaussian(loadings, loadings, float(np.median(distances))), kernel, atol=1e-12)

    def discrepancy(chosen: list[int]) -> float:
        gap = np.bincount(chosen, minlength=14) / len(chosen) - weights
        return float(gap @ kernel @ gap)

    for k in range(14):
        found = {i: discrepancy([*order[:k], i]) for i in range(14) if i not in order[:k]}
        assert found[order[k]] == pytest.approx(min(found.values()), abs=1e-12)
    assert herding(loadings, weights, depth=5).tolist()[:5] == order[:5]
    rest = herding(loadings, weights, depth=5)[5:]
    assert (np.diff(weights[rest]) <= 0).all()
    assert sorted(herding(np.ones((5, 2)), np.full(5, 0.2))) == list(range(5))
    assert herding(np.ones((1, 2)), np.ones(1)).tolist() == [0]


def test_herding_is_closer_to_the_weights_than_sampling() -> None:
    rng = np.random.default_rng(2)
    loadings = rng.normal(size=(400, 4))
    weights = softmax_weights(loadings[:, 0] + 0.3 * rng.normal(size=400))
    aim = weights @ loadings
    chosen = np.linalg.norm(loadings[herding(loadings, weights)[:40]].mean(axis=0) - aim)
    drawn = [
        np.linalg.norm(loadings[rng.choice(400, 40, replace=False, p=weights)].mean(axis=0) - aim) for _ in range(50)
    ]
    assert chosen < np.quantile(drawn, 0.1)


@given(
    hnp.arrays(np.float64, st.integers(1, 60), elements=st.floats(0, 9).map(lambda x: 0.0 if x < 1 else x)),
    st.integers(1, 20),
)
def test_sampled_targets_represent_all(demand: np.ndarray, most: int) -> None:
    rows, need = sample_targets(demand, most)
    assert need.sum() == pytest.approx(demand.sum())
    assert (demand[rows] > 0).all()
    if (demand > 0).sum() <= most:
        np.testing.assert_array_equal(np.bincount(rows, need, len(demand)), demand)
    else:  # systematic: no example is off by more than one draw
        assert (np.abs(np.bincount(rows, need, len(demand)) - demand) <= need[0] * (1 + 1e-9)).all()


def test_a_sample_of_targets_hardly_changes_coverage(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    loadings, forecast = rng.normal(size=(600, 4)) / 3, rng.exponential(size=600)
    demand = np.maximum(forecast, 0)
    everything = coverage(loadings, forecast, Facility, depth=20)[:20].tolist()
    full = facility(loadings, demand, everything)
    monkeypatch.setattr("forgetcast.replay.coverage.sample_targets", lambda d: sample_targets(d, 150))
    sampled = coverage(loadings, forecast, Facility, depth=20)[:20].tolist()
    assert sampled != everything
    assert facility(loadings, demand, sampled) > 0.97 * full


def test_similarities_are_the_models_correlations() -> None:
    """As its covariance says with the tasks' means projected out, and close to those of planted tasks."""
    rng = np.random.default_rng(0)
    true = rng.normal(size=(80, 2))
    rows = rng.normal(size=(500, 2)) @ true.T + 3 * rng.normal(size=(500, 1)) + rng.normal(0, 0.7, (500, 80))
    model = Bayesian(factors=2, prior_scale=1.0).fit(rows)
    found = correlation_loadings(model)
    without_mean = np.eye(80) - 1 / 80
    shared = without_mean @ model.loadings_ @ np.diag(model.prior_) @ model.loadings_.T @ without_mean
    deviation = np.sqrt(np.diag(shared) + model.noise_)
    np.testing.assert_allclose(found @ found.T, shared / np.outer(deviation, deviation), atol=1e-9)
    seen = np.corrcoef((rows - rows.mean(axis=1, keepdims=True)).T)
    off = ~np.eye(80, dtype=bool)
    assert np.corrcoef((found @ found.T)[off], seen[off])[0, 1] > 0.9
    assert (np.linalg.norm(found, axis=1) <= 1).all()
    assert correlation_loadings(Additive().fit(rows)).shape == (80, 0)  # what moves all alike makes nothing similar


def test_bad_ranks_and_strata(tmp_path: Path, pool: Pool) -> None:
    plan = plan_for(pool, "top", 0.1, held_out=pool.ids[:4], forecast=np.arange(24.0))
    assert plan.rank is not None
    assert pq.read_table(_saved(plan, tmp_path)).column_names == ["id", "weight", "held_out", "rank"]
    assert pq.read_table(_saved(plan, tmp_path))["rank"].to_pylist()[:4] == [None] * 4
    for rank, message in (
        (plan.rank[:-1], "needs one for every example"),
        (np.where(plan.rank < 0, 99, plan.rank), "and for no other"),
        (np.where(plan.rank == 3, -1, plan.rank), "needs one for every example"),
        (np.where(plan.rank == 3, 2, plan.rank), "the same rank"),
    ):
        with pytest.raises(DataError, match=message):
            replace(plan, rank=rank)
    with pytest.raises(DataError, match="at most 1, not 0"):
        replace(plan, ranked_share=0.0)
    with pytest.raises(DataError, match="exclude a rank"):
        replace(plan, strata=pool.sources)
    stratified = plan_for(pool, "stratified", 0.1)
    with pytest.raises(DataError, match="a label for every id"):
        replace(stratified, strata=["a"])
    assert replace(stratified, strata=["a"] * 24).fingerprint != stratified.fingerprint
    assert replace(plan, rank=np.where(plan.rank < 0, -1, 19 - plan.rank)).fingerprint != plan.fingerprint


def _saved(plan: ReplayPlan, folder: Path) -> Path:
    plan.save(folder / "plan.parquet")
    return folder / "plan.parquet"


@pytest.fixture
def atlas(tmp_path: Path) -> Atlas:
    return make_atlas(tmp_path / "runs.atlas", make_pool(40), tasks=12)


# The gradient needs a model: test_lm_online.py
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "gradient"])
def test_plans_from_an_atlas(tmp_path: Path, atlas: Atlas, run: RunCommand, strategy: str) -> None:
    words = ["plan", atlas.path, "--strategy", strategy, "-o", tmp_path / "plan.parquet", "--json"]
    after = make_scores(atlas.pool.subset(atlas.pool.ids[5:]), 3 + atlas.matrix(["t3"]).values[0, 5:])
    after.save(tmp_path / "after.parquet")
    if strategy == "truth":
        assert "need --truth" in run(*words)[2]
        words += ["--truth", tmp_path / "after.parquet"]
    code, out, err = run(*words)
    assert code == 0
    # The atlas was made of scores, so that no recipe says how many examples the ratio is.
    assert ("the atlas has no recipe of ours" in err) is (strategy != "none")
    plan = ReplayPlan.load(tmp_path / "plan.parquet")
    facts = json.loads(out)
    assert facts["usable"] == (plan.weights > 0).sum()
    assert plan.held_out_ids == atlas.pool.hold_out(0.2)
    model = Bayesian().fit(atlas.matrix())
    truth = np.full(40, np.nan)
    truth[5:] = atlas.matrix(["t3"]).values[0, 5:]
    expected = plan_for(
        atlas.pool,
        strategy,
        plan.ratio,
        held_out=plan.held_out_ids,
        forecast=model.predict([], []).mean,
        truth=truth,
        losses=atlas.nll_before,
        loadings=correlation_loadings(model),
    )
    np.testing.assert_allclose(plan.weights, expected.weights, rtol=1e-3)
    if expected.rank is not None:
        assert plan.rank is not None
        np.testing.assert_array_equal(plan.rank, expected.rank)


def test_invalid_plans_are_rejected(tmp_path: Path, atlas: Atlas, run: RunCommand) -> None:
    words = ("plan", atlas.path, "-o", tmp_path / "plan.parquet", "--strategy")
    assert "unknown replay strategy 'best'; choose one of none, padding" in run(*words, "best")[2]
    make_scores(make_pool(50), np.ones(50)).save(tmp_path / "other.parquet")
    assert "doesn't know" in run(*words, "truth", "--truth", tmp_path / "other.parquet")[2]
    assert "and only they" in run(*words, "random", "--truth", tmp_path / "other.parquet")[2]
    assert not (tmp_path / "plan.parquet").exists()
    code, out, _ = run("strategies", "--json")
    assert code == 0
    assert {name: row["summary"] for name, row in json.loads(out).items()} == {
        name: strategy.summary for name, strategy in STRATEGIES.items()
    }
    assert all(name in run("strategies")[1] for name in STRATEGIES)


MINE = """
import numpy as np

from forgetcast import Selection, Strategy


class Easiest(Strategy):
    name = "easiest"
    summary = "the lowest losses first"
    needs = frozenset({"losses"})

    def __init__(self, *, skip: int = 0) -> None:
        self.skip = skip

    def select(self, signals):
        return Selection(np.full(len(signals), 1 / len(signals)), np.argsort(signals.losses)[self.skip :])
"""


@pytest.fixture
def mine(tmp_path: Path) -> Iterator[Path]:
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    yield file
    STRATEGIES.pop("easiest", None)


def test_a_strategy_from_a_file(tmp_path: Path, mine: Path, atlas: Atlas, run: RunCommand) -> None:
    words = ["plan", atlas.path, "--ratio", 0.25, "-o", tmp_path / "plan.parquet"]
    for _ in range(2):  # a file may be run again
        assert run(*words, "--strategy", f"{mine}:easiest")[0] == 0
    plan = ReplayPlan.load(tmp_path / "plan.parquet")
    assert (plan.strategy, plan.summary, plan.phase) == ("easiest", "the lowest losses first", "planned")
    losses = dict(zip(atlas.examples, atlas.nll_before, strict=True))
    order = [losses[id_] for id_ in plan.order(plan.usable)]
    assert order == sorted(order)
    STRATEGIES.pop("easiest")  # as in a process that has not run the file: the plan still says what it is
    assert ReplayPlan.load(tmp_path / "plan.parquet").summary == plan.summary
    skipping = get_strategy(f"{mine}:easiest", skip=2)
    assert repr(skipping) == "Easiest(skip=2)"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{file}:hardest", "unknown replay strategy 'hardest'"),
        ("nowhere.py:easiest", "there is no such file of replay strategies"),
        ("{broken}:x", "broken.py: ZeroDivisionError: division by zero"),
        ("{taken}:top", "two replay strategies 'top'"),
    ],
)
def test_invalid_strategy_files_are_rejected(tmp_path: Path, mine: Path, name: str, message: str) -> None:
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "taken.py").write_text(MINE.replace('"easiest"', '"top"'))
    given = name.format(file=mine, broken=tmp_path / "broken.py", taken=tmp_path / "taken.py")
    with pytest.raises(ConfigError, match=re.escape(message)):
        get_strategy(given)


def test_a_setting_that_a_strategy_lacks_is_rejected(atlas: Atlas, tmp_path: Path, run: RunCommand) -> None:
    with pytest.raises(ConfigError, match="'top' has no setting 'temperature'"):
        get_strategy("top", temperature=0.1)
    assert get_strategy("top", temperature=None).name == "top"
    words = ("plan", atlas.path, "-o", tmp_path / "p.parquet", "--temperature", 0.1, "--strategy")
    assert "has no setting 'temperature'" in run(*words, "top")[2]
    assert run(*words, "half")[0] == 0
