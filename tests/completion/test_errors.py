from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from forgetcast import DataError
from forgetcast.completion import Bayesian
from forgetcast.evaluation import accuracy, judge, paired_difference, worst_tenth
from support.data import planted

numbers = st.floats(-5, 5, allow_nan=False, width=32)


def test_accuracy_against_plain_loops() -> None:
    values = planted(20, 100, 2, 0.2)
    forecast = Bayesian().fit(values[:-1]).predict([1, 2, 3], values[-1, [1, 2, 3]])
    truth = values[-1].copy()
    truth[50] = np.nan
    judged = list(range(40, 100))
    found = accuracy(forecast, truth, judged)
    lower, upper = forecast.interval(0.9)
    kept = [j for j in judged if j != 50]
    assert found.rmse == pytest.approx((sum((forecast.mean[j] - truth[j]) ** 2 for j in kept) / 59) ** 0.5)
    assert found.mae == pytest.approx(sum(abs(forecast.mean[j] - truth[j]) for j in kept) / 59)
    assert found.coverage == pytest.approx(sum(lower[j] <= truth[j] <= upper[j] for j in kept) / 59)
    assert found.width == pytest.approx(sum(upper[j] - lower[j] for j in kept) / 59)
    ranks = stats.rankdata(forecast.mean[kept]), stats.rankdata(truth[kept])
    assert found.spearman == pytest.approx(np.corrcoef(*ranks)[0, 1])
    worst = set(sorted(kept, key=lambda j: -truth[j])[:6])
    guessed = set(sorted(kept, key=lambda j: -forecast.mean[j])[:6])
    assert found.recall == pytest.approx(len(worst & guessed) / 6)


def test_a_probe_cannot_be_judged_on() -> None:
    values = planted(10, 30, 1, 0.1)
    forecast = Bayesian().fit(values[:-1]).predict([1], values[-1, [1]])
    with pytest.raises(DataError, match="probe"):
        accuracy(forecast, values[-1], [0, 1, 2])
    with pytest.raises(DataError, match="two measured"):
        accuracy(forecast, np.full(30, np.nan), [4, 5, 6])


def test_rank_correlation_of_a_constant_is_not_a_number() -> None:
    flat = judge(np.ones(5), np.zeros(5), np.full(5, 9.0), np.arange(5.0))
    assert np.isnan(flat.spearman)
    assert flat.coverage == 1


@given(hnp.arrays(np.float64, st.integers(1, 60), elements=numbers))
def test_worst_tenth_is_the_mean_of_the_largest(values: np.ndarray) -> None:
    count = max(1, round(len(values) / 10))
    assert worst_tenth(values) == pytest.approx(sum(sorted(values, reverse=True)[:count]) / count, abs=1e-9)
    assert worst_tenth(np.append(values, np.nan)) == worst_tenth(values)
    assert worst_tenth(values) >= values.mean() - 1e-9


def test_paired_difference_is_the_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 1, 12), rng.normal(0.5, 1, 12)
    found = paired_difference(a, b)
    test = stats.ttest_rel(a, b)
    interval = test.confidence_interval(0.95)
    assert found.mean == pytest.approx((a - b).mean())
    assert (found.lower, found.upper) == pytest.approx((interval.low, interval.high))
    assert found.p_value == pytest.approx(test.pvalue)
    assert found.pairs == 12


def test_paired_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        found = paired_difference(rng.normal(0.3, 1, 8), np.zeros(8))
        inside += found.lower <= 0.3 <= found.upper
    # 950 expected; four standard deviations are 28.
    assert 922 <= inside <= 978


def test_pairs_that_say_nothing() -> None:
    same = paired_difference([1.0, 2.0], [0.0, 1.0])
    assert (same.mean, same.lower, same.upper, same.p_value) == (1.0, 1.0, 1.0, 0.0)
    assert paired_difference([1.0, 2.0], [1.0, 2.0]).p_value == 1
    with pytest.raises(DataError, match="two pairs"):
        paired_difference([1.0], [2.0])
