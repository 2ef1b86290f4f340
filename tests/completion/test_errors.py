from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from forgetcast import DataError
from forgetcast.completion import Bayesian
from forgetcast.completion.errors import judge_probabilities
from forgetcast.evaluation import accuracy, judge
from support.data import planted


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


def test_rank_correlation_of_a_constant_is_nan() -> None:
    flat = judge(np.ones(5), np.zeros(5), np.full(5, 9.0), np.arange(5.0))
    assert np.isnan(flat.spearman)
    assert flat.coverage == 1


@given(st.lists(st.tuples(st.floats(0, 1), st.sampled_from([0.0, 1.0, np.nan])), min_size=4, max_size=120))
def test_probabilities_against_plain_loops(pairs: list[tuple[float, float]]) -> None:
    made, truth = (np.array(part) for part in zip(*pairs, strict=True))
    known = [(p, t) for p, t in pairs if t in (0, 1)]
    if len(known) < 2:
        with pytest.raises(DataError, match="two measured"):
            judge_probabilities(made, truth)
        return
    found, n = judge_probabilities(made, truth), len(known)
    assert found.examples == n == sum(each.count for each in found.bins)
    assert found.brier == pytest.approx(sum((p - t) ** 2 for p, t in known) / n)
    share = sum(t for _, t in known) / n
    assert found.share == pytest.approx(share)
    assert found.brier_of_share == pytest.approx(sum((share - t) ** 2 for _, t in known) / n)
    assert sum(each.count * each.share for each in found.bins) == pytest.approx(sum(t for _, t in known))
    assert sum(each.count * each.forecast for each in found.bins) == pytest.approx(sum(p for p, _ in known))
    assert all(each.count >= min(n, 5) for each in found.bins)
    assert [each.forecast for each in found.bins] == sorted(each.forecast for each in found.bins)
    for each in found.bins:
        # Wilson's interval in closed form.
        z2 = stats.norm.ppf(0.975) ** 2
        centre = (each.share + z2 / 2 / each.count) / (1 + z2 / each.count)
        half = (each.share * (1 - each.share) / each.count + z2 / 4 / each.count**2) ** 0.5 * z2**0.5
        half /= 1 + z2 / each.count
        assert (each.lower, each.upper) == pytest.approx((centre - half, centre + half), abs=1e-9)


def test_only_zeros_and_ones_judge_probabilities() -> None:
    with pytest.raises(DataError, match="zeros and ones"):
        judge_probabilities(np.array([0.2, 0.4]), np.array([0.0, 0.5]))
