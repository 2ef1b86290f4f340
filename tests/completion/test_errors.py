from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from forgetcast import DataError
from forgetcast.completion import Bayesian
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
