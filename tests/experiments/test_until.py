"""Measurement until an interval is narrow enough: planted pools, and the stopping rule against repeated looks."""

from __future__ import annotations

import numpy as np
import pytest

from forgetcast import ConfigError, DataError
from forgetcast.completion import Bayesian
from forgetcast.experiments.until import Width, describe, measure_until, schedule
from support.data import planted

EVERY = np.arange(600)


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    return planted(30, 600, 2, 0.3)


@pytest.fixture(scope="module")
def model(truth: np.ndarray) -> Bayesian:
    return Bayesian().fit(truth[:-1])


def test_without_a_width_k_probes_are_measured_once(truth: np.ndarray, model: Bayesian) -> None:
    asked = []
    stopped = measure_until(model, lambda columns: asked.append(columns) or truth[-1, columns], EVERY, k=30, seed=3)
    assert [len(columns) for columns in asked] == [30]
    assert (stopped.forecast.audit, stopped.looks, stopped.interval) == (25, (), None)


def test_it_stops_at_the_first_look_that_is_narrow_enough(truth: np.ndarray, model: Bayesian) -> None:
    width = Width("mean", 0.1)
    stopped = measure_until(model, lambda columns: truth[-1, columns], EVERY, width=width)
    assert stopped.interval is not None
    assert all(look.width > 0.1 for look in stopped.looks[:-1])
    assert stopped.looks[-1].width <= 0.1
    assert stopped.interval[1] < truth[-1].mean() < stopped.interval[2]
    assert not stopped.everything
    # Each of four looks before the last, which measures all, has a quarter of the error.
    planned = schedule(30, 600)
    assert planned == [30, 60, 120, 240, 480, 600]
    assert stopped.level == pytest.approx(1 - 0.1 / 5)
    assert [look.measured for look in stopped.looks] == planned[: len(stopped.looks)]
    (said, cost) = describe(stopped, width, 600)
    measured = stopped.looks[-1].measured
    assert said.startswith(f"{measured} of 600 examples measured")
    assert f"would cost {measured} more" in cost


def test_the_interval_holds_though_it_was_looked_at_often(model: Bayesian) -> None:
    """Rows of an unlike task, whose errors are skewed: the worst case for a rule that stops when it likes the width."""
    rng = np.random.default_rng(0)
    held, looks = [], []
    for seed in range(60):
        row = rng.exponential(1.0, 600)
        stopped = measure_until(
            model, lambda columns, row=row: row[columns], EVERY, width=Width("mean", 0.6), seed=seed
        )
        assert stopped.interval is not None
        held.append(stopped.interval[1] <= row.mean() <= stopped.interval[2])
        looks.append(len(stopped.looks))
    assert max(looks) > 1
    assert np.mean(held) > 0.9


def test_measuring_everything_is_said_to_be_cheaper(truth: np.ndarray, model: Bayesian) -> None:
    width = Width("mean", 1e-4)
    stopped = measure_until(model, lambda columns: truth[-1, columns], EVERY, width=width)
    assert stopped.everything
    assert [look.measured for look in stopped.looks] == [30, 600]
    np.testing.assert_allclose(stopped.interval, truth[-1].mean(), rtol=1e-6)
    (said,) = describe(stopped, width, 600)
    assert said.startswith("Measuring all 600 examples is cheaper than being sure")


def test_a_limit_that_cannot_suffice_is_refused_early(truth: np.ndarray, model: Bayesian) -> None:
    asked = []

    def measure(columns: np.ndarray) -> np.ndarray:
        asked.append(len(columns))
        return truth[-1, columns]

    with pytest.raises(DataError, match="needs about 600 of the 600 examples, and 60 may be measured; after 30"):
        measure_until(model, measure, EVERY, width=Width("mean", 1e-4), most=60)
    assert asked == [30]
    with pytest.raises(DataError, match="601 probes cannot be drawn"):
        measure_until(model, measure, EVERY, k=601)
    with pytest.raises(ConfigError, match="at least two random ones"):
        measure_until(model, measure, EVERY, k=10, chosen=9, width=Width("mean", 1.0))


def test_the_worst_tenth_can_be_asked_for(truth: np.ndarray, model: Bayesian) -> None:
    width = Width.parse("worst_tenth:0.5")
    stopped = measure_until(model, lambda columns: truth[-1, columns], EVERY, width=width)
    assert stopped.looks[-1].width <= 0.5


def test_widths_are_parsed() -> None:
    assert Width.parse("0.02") == Width("mean", 0.02)
    assert Width.parse("worst_tenth:.1") == Width("worst_tenth", 0.1)
    for bad in ("", "wide", "median:0.1", "nan", "mean:inf"):
        with pytest.raises(ConfigError, match="write a width"):
            Width.parse(bad)
    for bad in ("0", "-1", "worst_tenth:0"):
        with pytest.raises(ConfigError, match="above zero"):
            Width.parse(bad)
