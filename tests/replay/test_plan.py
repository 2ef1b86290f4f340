from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from forgetcast import ConfigError, DataError, MismatchError, Pool, ReplayPlan
from forgetcast.replay.sampling import EFFECTIVE_SHARE, softmax_weights
from support.data import make_pool
from support.plans import plan_for


def test_random_replay_is_uniform_over_examples_not_held_out(pool: Pool) -> None:
    plan = plan_for(pool, "random", 0.1, held_out=pool.ids[:4])
    np.testing.assert_array_equal(plan.weights, [0.0] * 4 + [1 / 20] * 20)
    assert plan.held_out_ids == pool.ids[:4]
    assert plan.effective_size == pytest.approx(20)


def test_no_replay(pool: Pool) -> None:
    plan = plan_for(pool, "none", 0.0, held_out=pool.ids[:4])
    assert not plan.weights.any()
    assert plan.effective_size == 0
    assert plan.order(0) == ()
    with pytest.raises(ConfigError, match="replays nothing"):
        plan.order(1)


def test_forecast_replay_is_a_softmax_over_what_may_be_replayed(pool: Pool) -> None:
    forecast = np.random.default_rng(0).normal(size=24)
    plan = plan_for(pool, "forecast", 0.1, held_out=pool.ids[:4], forecast=forecast, temperature=0.3)
    expected = np.exp(forecast[4:] / 0.3)
    np.testing.assert_allclose(plan.weights[4:], expected / expected.sum())
    assert not plan.weights[:4].any()


@given(hnp.arrays(np.int64, st.integers(8, 80), elements=st.integers(-3000, 3000), unique=True))
def test_default_temperature_spreads_over_a_share_of_the_examples(thousandths: np.ndarray) -> None:
    forecast = thousandths / 1000  # the largest of nearly equal values are ties, which no temperature tells apart
    weights = softmax_weights(forecast)
    assert weights.sum() == pytest.approx(1)
    assert (np.diff(weights[np.argsort(forecast)]) >= 0).all()
    assert 1 / (weights**2).sum() == pytest.approx(EFFECTIVE_SHARE * len(forecast), rel=1e-6)


@given(
    hnp.arrays(np.float64, 30, elements=st.floats(-3, 3, width=32), unique=True), st.floats(-50, 50), st.floats(0.1, 9)
)
def test_default_weights_do_not_depend_on_origin_or_scale(forecast: np.ndarray, shift: float, scale: float) -> None:
    if np.ptp(forecast) < 1e-3:
        return
    moved = softmax_weights(scale * forecast + shift)
    np.testing.assert_allclose(moved, softmax_weights(forecast), rtol=1e-4, atol=1e-9)


def test_equal_forecasts_have_equal_weights() -> None:
    np.testing.assert_allclose(softmax_weights(np.full(10, 2.0)), 0.1)
    assert softmax_weights(np.array([1.0])).tolist() == [1.0]


def test_first_draw_follows_the_weights(pool: Pool) -> None:
    forecast = np.linspace(0, 2, 24)
    plan = plan_for(pool, "forecast", 0.1, forecast=forecast, temperature=0.7)
    counts = dict.fromkeys(pool.ids, 0)
    for seed in range(4000):
        counts[replace(plan, seed=seed).order(1)[0]] += 1
    # A correct sampler fails this once in ten thousand choices of seeds.
    assert stats.chisquare(list(counts.values()), 4000 * plan.weights).pvalue > 1e-4


def test_drawing_is_without_replacement_until_all_are_used(pool: Pool) -> None:
    plan = plan_for(pool, "forecast", 0.1, held_out=pool.ids[:4], forecast=np.arange(24.0), seed=5)
    drawn = plan.order(50)
    assert len(set(drawn[:20])) == len(set(drawn[20:40])) == 20
    assert not set(drawn) & set(plan.held_out_ids)
    assert plan.order(7) == drawn[:7]
    assert replace(plan, seed=6).order(20) != drawn[:20]


@given(
    strategy=st.sampled_from(["random", "forecast", "top", "half", "stratified"]),
    spared=st.sets(st.integers(0, 23), max_size=16),
    seed=st.integers(0, 9),
)
def test_a_plan_without_some_examples(strategy: str, spared: set[int], seed: int) -> None:
    pool, forecast = make_pool(24), np.arange(24.0)
    plan = plan_for(pool, strategy, 0.25, held_out=pool.ids[:4], forecast=forecast, repeat=True, seed=seed)
    ids = [pool.ids[i] for i in spared]
    found = plan.without(ids)
    kept = [id_ for id_ in pool.ids[4:] if id_ not in ids]
    assert set(found.order(3 * len(kept))) == set(kept)
    assert found.held_out_ids == plan.held_out_ids
    np.testing.assert_allclose(found.weights[4:] / found.weights.sum(), _share(plan.weights[4:], pool.ids[4:], kept))
    if strategy == "top":
        assert found.order(len(kept)) == tuple(id_ for id_ in plan.order(20) if id_ in kept)


def _share(weights: np.ndarray, ids: Sequence[str], kept: list[str]) -> np.ndarray:
    of_kept = np.where([id_ in kept for id_ in ids], weights, 0.0)
    return np.asarray(of_kept / of_kept.sum())


def test_a_plan_without_all_it_may_replay(pool: Pool) -> None:
    with pytest.raises(ConfigError, match="none of the examples that may be replayed is left"):
        plan_for(pool, "random", 0.25, held_out=pool.ids[:4]).without(pool.ids[4:])


@pytest.mark.parametrize("strategy", ["random", "top", "stratified"])
def test_a_plan_repeats_only_if_it_may(pool: Pool, tmp_path: Path, strategy: str) -> None:
    plan = plan_for(pool, strategy, 0.25, held_out=pool.ids[:4], forecast=np.arange(24.0))
    assert plan.count(40, 2) == 20
    with pytest.raises(ConfigError, match=r"22 examples are to be replayed, and the plan has 20: .* at most 0\.23 "):
        plan.count(44, 2)
    with pytest.raises(ConfigError, match="replays no batch"):
        plan.count(1, 2)
    free = replace(plan, repeat=True)
    free.save(tmp_path / "plan.parquet")
    assert ReplayPlan.load(tmp_path / "plan.parquet").count(400, 2) == 200
    assert free.fingerprint == plan.fingerprint
    assert plan_for(pool, "none", 0.0).count(44, 2) == 0
    assert plan_for(pool, "padding", 2.0).count(44, 2) == 176  # pads with new examples, of which there are enough


def test_a_plan_survives_its_file(tmp_path: Path, pool: Pool) -> None:
    plan = plan_for(pool, "forecast", 0.125, held_out=pool.ids[3:9], forecast=np.arange(24.0), seed=7)
    plan.save(tmp_path / "plan.parquet")
    again = ReplayPlan.load(tmp_path / "plan.parquet")
    assert again.fingerprint == plan.fingerprint
    assert (again.ratio, again.strategy, again.seed) == (0.125, "forecast", 7)
    assert again.held_out_ids == plan.held_out_ids
    assert again.order(30) == plan.order(30)
    again.check_pool(pool)
    assert pq.read_table(tmp_path / "plan.parquet").column_names == ["id", "weight", "held_out"]


def test_a_plan_refuses_another_pool(pool: Pool) -> None:
    plan = plan_for(pool, "random", 0.1)
    with pytest.raises(MismatchError, match="another pool"):
        plan.check_pool(make_pool(23))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "best", "ratio": 0.1}, "unknown replay strategy 'best'"),
        ({"strategy": "random", "ratio": -0.1}, "not negative"),
        ({"strategy": "random", "ratio": float("nan")}, "finite"),
        ({"strategy": "random", "ratio": 0.0}, "is incompatible with"),
        ({"strategy": "none", "ratio": 0.5}, "is incompatible with"),
        ({"strategy": "forecast", "ratio": 0.1}, "the pool has 24"),
        ({"strategy": "forecast", "ratio": 0.1, "forecast": np.full(24, np.nan)}, "'e0' is not a finite number"),
        ({"strategy": "forecast", "ratio": 0.1, "forecast": np.zeros(24), "temperature": 0.0}, "positive"),
        ({"strategy": "random", "ratio": 0.1, "held_out": ["nobody"]}, "'nobody'"),
        ({"strategy": "random", "ratio": 0.1, "held_out": [f"e{i}" for i in range(24)]}, "every example is held out"),
    ],
)
def test_bad_plans(pool: Pool, arguments: dict[str, object], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        plan_for(pool, **arguments)  # type: ignore[arg-type]


def test_invalid_plans_and_plan_files_are_rejected(tmp_path: Path, pool: Pool) -> None:
    plan = plan_for(pool, "random", 0.1, held_out=pool.ids[:4])
    weights = plan.weights.copy()
    weights[0] = 0.5
    with pytest.raises(DataError, match="held out, but has a replay weight"):
        replace(plan, weights=weights)
    weights[0] = np.inf
    with pytest.raises(DataError, match="finite"):
        replace(plan, weights=weights)
    plan.save(tmp_path / "plan.parquet")
    table = pq.read_table(tmp_path / "plan.parquet")
    pq.write_table(table.replace_schema_metadata({}), tmp_path / "bare.parquet")
    with pytest.raises(DataError, match=r"bare\.parquet is not a replay plan: its metadata: the field .* is missing"):
        ReplayPlan.load(tmp_path / "bare.parquet")
