"""Intervals of the whole, against dense linear algebra, all samples of a tiny population, and planted truth."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from forgetcast import ConfigError, DataError, probes
from forgetcast.completion import (
    KNN,
    Additive,
    Auto,
    Bayesian,
    Completion,
    LogisticMF,
    MatrixFactorization,
    Mean,
    SoftImpute,
)
from forgetcast.completion.base import leave_tasks_out
from forgetcast.completion.gaussian import SCALE_DEGREES
from forgetcast.completion.whole import Above, MeanOf, Tail, Widths, draws, moments
from forgetcast.stats import worst_part, worst_tenth
from support.completion import dense_mixture
from support.data import planted

METHODS = [Mean, Additive, KNN, MatrixFactorization, SoftImpute, Bayesian, Auto, LogisticMF]


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    return planted(30, 120, 2, 0.1)


def dense(model: Bayesian, at: np.ndarray, row: np.ndarray) -> tuple[float, float]:
    """Mean and variance of the sum over the unmeasured examples, from all N x N covariances of the mixture."""
    rest = np.setdiff1d(np.arange(len(model.mean_)), at)
    weights, means, covariances = dense_mixture(model, at, row)
    centres = [mean[rest].sum() for mean in means]
    variances = [covariance[np.ix_(rest, rest)].sum() for covariance in covariances]
    centre = float(weights @ centres)
    return centre, float(weights @ (np.array(variances) + (np.array(centres) - centre) ** 2))


def test_the_mean_is_dense_conditioning(values: np.ndarray) -> None:
    model, at, row = Bayesian(factors=3).fit(values[:-1]), np.array([5, 17, 80, 2]), values[-1]
    centre, variance = dense(model, at, row)
    rest = np.setdiff1d(np.arange(120), at)
    found = moments(model.state_.joint(at, row[at]), rest)
    np.testing.assert_allclose(found, (centre, variance), rtol=1e-6)
    value, lower, upper = model.predict(at, row[at]).mean_interval(0.9)
    assert value == pytest.approx((row[at].sum() + centre) / 120, rel=1e-6)
    half = model._left_out.widths(4, 0).at(0.9, MeanOf()) * np.sqrt(variance) / 120
    np.testing.assert_allclose([value - lower, upper - value], half, rtol=1e-5)


def test_draws_have_the_moments_of_the_joint_posterior(values: np.ndarray) -> None:
    model, at, row = Bayesian(factors=3).fit(values[:-1]), np.arange(12), values[-1]
    joint, rest = model.state_.joint(at, row[at]), np.arange(12, 120)
    sums = np.array([row.sum() for row in draws(joint, rest, 4000)])
    centre, variance = moments(joint, rest)
    degrees = SCALE_DEGREES + len(at)
    assert sums.mean() == pytest.approx(centre, abs=4 * np.sqrt(variance / 4000))
    # Student's t has degrees / (degrees - 2) of the variance; 4000 draws tell it to about 3 %.
    assert sums.var() == pytest.approx(variance * degrees / (degrees - 2), rel=0.12)
    again = next(iter(draws(joint, rest, 4000)))
    np.testing.assert_array_equal(again, next(iter(draws(joint, rest, 4000))))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_both_kinds(method: type[Completion], values: np.ndarray) -> None:
    binary = method is LogisticMF
    truth = (values > np.median(values)).astype(float) if binary else values
    model = method().fit(truth[:-2])
    at = probes.choose(model, 16, audit=12, seed=3)
    one = model.predict(at, truth[-1, at], audit=12)
    both = model.predict(at, truth[-2:, at], audit=12)
    for guaranteed in (False, True):
        for interval in ("mean_interval", "tail_interval", "above_interval"):
            value, lower, upper = getattr(one, interval)(guaranteed=guaranteed)
            assert value.shape == lower.shape == upper.shape == ()
            assert np.isfinite([value, lower, upper]).all()
            assert lower <= value <= upper
            pair = getattr(both, interval)(guaranteed=guaranteed)
            assert all(part.shape == (2,) for part in pair)
            np.testing.assert_allclose([part[1] for part in pair], [value, lower, upper], rtol=1e-5, atol=1e-7)
        wide, narrow = (one.mean_interval(level, guaranteed) for level in (0.95, 0.5))
        assert wide[1] < narrow[1] < narrow[2] < wide[2]


@given(st.integers(0, 2**32 - 1), st.integers(4, 6), st.integers(0, 2), st.integers(2, 3))
@settings(max_examples=15)
def test_the_guaranteed_estimate_is_unbiased(seed: int, examples: int, chosen: int, audit: int) -> None:
    """Oracle: the average over every random sample that could be drawn is the truth, though the atlas is nonsense."""
    rng = np.random.default_rng(seed)
    model = Bayesian().fit(rng.normal(size=(5, examples + chosen)))
    row = rng.standard_t(2, size=examples + chosen)
    certain = np.arange(chosen)
    found = []
    for drawn in combinations(range(chosen, examples + chosen), audit):
        at = np.concatenate([certain, drawn]).astype(int)
        found.append(model.predict(at, row[at], audit=audit).mean_interval(0.9, True)[0])
    # Each part of the random probes must be a random sample given the others; with as many parts as probes it is.
    assert np.mean(found) == pytest.approx(row.mean(), abs=1e-6 * (1 + np.abs(row).max()))


def test_a_useless_forecast_gives_the_plain_survey_interval() -> None:
    """Oracle: Student's t with the finite population correction, where the control variate is a constant."""
    rng = np.random.default_rng(0)
    row = rng.normal(2.0, 1.0, 400)
    model = Additive().fit(np.zeros((6, 400)) + rng.normal(0, 1e-3, (6, 1)))
    at = probes.random(400, 60, seed=1)
    value, lower, upper = model.predict(at, row[at], audit=60).mean_interval(0.9, True)
    assert value == pytest.approx(row[at].mean(), abs=1e-3)
    error = row[at].std(ddof=1) * np.sqrt((1 - 60 / 400) / 60)
    # Cross-fitting forecasts each tenth from the others' mean, which lengthens the errors by about 60 / 54.
    assert 1.0 < (upper - lower) / (2 * stats.t.ppf(0.95, 59) * error) < 1.2


def test_guaranteed_intervals_hold_where_the_atlas_is_wrong() -> None:
    rng = np.random.default_rng(0)
    model = Bayesian().fit(planted(30, 150, 2, 0.1))
    rows = 5.0 + rng.gamma(2.0, 1.0, (120, 150))
    held = []
    for seed in range(3):
        at = probes.choose(model, 30, audit=25, seed=seed)
        _, lower, upper = model.predict(at, rows[:, at], audit=25).mean_interval(0.9, True)
        held.append((lower <= rows.mean(axis=1)) & (rows.mean(axis=1) <= upper))
    assert 0.85 < np.mean(held) < 0.97  # 360 intervals tell the coverage to 1.6 %


def test_model_based_intervals_hold_for_tasks_like_the_atlas() -> None:
    """Calibrated on forty tasks, the coverage of one world differs by some .05 from .9; that of four less."""
    covered = []
    for seed in range(4):
        truth = planted(100, 200, 2, 0.3, seed)
        model, at = Bayesian().fit(truth[:40]), np.arange(10)
        forecast = model.predict(at, truth[40:, at])
        for (_, lower, upper), figure in (
            (forecast.mean_interval(), truth[40:].mean(axis=1)),
            (forecast.tail_interval(), np.array([worst_tenth(row) for row in truth[40:]])),
            (forecast.above_interval(1.0), (truth[40:] > 1.0).mean(axis=1)),
        ):
            covered.append(np.mean((lower <= figure) & (figure <= upper)))
    coverage = np.mean(np.reshape(covered, (4, 3)), axis=0)
    assert (coverage > 0.84).all()
    assert (coverage < 0.97).all()


def test_the_tail_has_the_examples_own_noise() -> None:
    """All examples have the same expectation, so the worst tenth of the means is far below that of the truth."""
    rng = np.random.default_rng(0)
    truth = rng.normal(1.0, 1.0, (60, 500))
    model = Bayesian(factors=0).fit(truth[:-1])
    forecast = model.predict(np.arange(100), truth[-1, :100])
    value, lower, upper = forecast.tail_interval()
    # A hundred probes tell the scale of the noise to about 7 %.
    assert value == pytest.approx(1.0 + stats.norm.pdf(stats.norm.ppf(0.9)) / 0.1, rel=0.1)
    assert lower < worst_tenth(truth[-1]) < upper
    assert worst_tenth(forecast.mean) < lower


def test_the_tail_holds_where_the_atlas_puts_its_threshold_far_too_high() -> None:
    rng = np.random.default_rng(0)
    model = Bayesian().fit(rng.normal(2.0, 1.0, (20, 200)) + rng.normal(0, 1.0, 200))
    held = []
    for seed in range(20):
        row = rng.normal(0.0, 0.1, 200)
        at = probes.choose(model, 20, audit=15, seed=seed)
        _, lower, upper = model.predict(at, row[at], audit=15).tail_interval(0.1, 0.9, True)
        held.append(bool(lower <= worst_tenth(row) <= upper))
    assert np.mean(held) > 0.8


def test_everything_measured_leaves_nothing_open(values: np.ndarray) -> None:
    model, every = Bayesian().fit(values[:-1]), np.arange(120)
    forecast = model.predict(every, values[-1], audit=120)
    for guaranteed in (False, True):
        np.testing.assert_allclose(forecast.mean_interval(0.9, guaranteed), values[-1].mean(), rtol=1e-6)
        np.testing.assert_allclose(forecast.tail_interval(0.1, 0.9, guaranteed), worst_tenth(values[-1]), rtol=1e-5)
        share = (values[-1] > 0.5).mean()
        np.testing.assert_allclose(forecast.above_interval(0.5, 0.9, guaranteed), share, rtol=1e-6)


@pytest.mark.parametrize("flipped", [False, True])
def test_a_share_of_which_no_random_probe_shows_any_is_not_taken_for_none(values: np.ndarray, flipped: bool) -> None:
    """A tenth of the examples is above, which the atlas does not foresee; most samples of seven miss it."""
    model = Bayesian().fit(0.01 * values)
    rng, sign = np.random.default_rng(0), -1.0 if flipped else 1.0
    covered, missed = [], 0
    for _ in range(80):
        row = sign * np.where(rng.permutation(120) < 12, 1.0, -1.0)
        at = rng.permutation(120)[:7]
        value, lower, upper = model.predict(at, row[at], audit=7).above_interval(0.0, 0.9, True)
        covered.append(lower <= (row > 0).mean() <= upper)
        if np.ptp(row[at]) == 0:
            missed += 1
            assert lower <= value <= upper
            assert (1 - lower if flipped else upper) >= (1 - 0.05 ** (1 / 7)) * (1 - 1e-6)  # Clopper and Pearson's
    assert missed > 20
    assert np.mean(covered) >= 0.9


def test_a_part_and_a_population_are_what_they_say(values: np.ndarray) -> None:
    model, row = Bayesian().fit(values[:-1]), values[-1]
    part = np.arange(0, 120, 2)
    at = probes.choose(model, 30, part, audit=25, seed=1)
    inside = model.predict(at, row[at], audit=25, population=part)
    _, lower, upper = inside.mean_interval(0.9, True)
    assert lower < row[part].mean() < upper
    quarter = part[:30]
    _, lower, upper = inside.mean_interval(0.9, True, among=quarter)
    assert lower < row[quarter].mean() < upper
    measured = at[25:]
    exact = inside.mean_interval(0.9, among=measured)
    np.testing.assert_allclose(exact, row[measured].mean(), rtol=1e-6)


def test_statistics_of_gaussian_values_are_those_of_draws() -> None:
    rng = np.random.default_rng(0)
    mean, std = np.array([-1.0, 0.0, 0.4, 2.0]), np.array([0.5, 1.0, 0.1, 0.7])
    drawn = mean + std * rng.normal(size=(200_000, 4))
    for statistic in (MeanOf(), Tail(threshold=0.3), Above(0.3)):
        expected, variance = statistic.expected(mean, std)
        transformed = statistic.transform(drawn)
        np.testing.assert_allclose(expected, transformed.mean(axis=0), atol=0.01)
        np.testing.assert_allclose(variance, transformed.var(axis=0), atol=0.02)


@given(st.lists(st.floats(-5, 5), min_size=3, max_size=40), st.sampled_from([2, 3, 10]))
def test_a_tail_is_its_threshold_and_the_excess(row: list[float], parts: int) -> None:
    values = np.array(row)
    tail = Tail(1 / parts)
    count = tail.count(len(values))
    located = Tail(1 / parts, float(np.sort(values)[-count]), count / len(values))
    base, slope = located.affine
    assert base + slope * located.transform(values).mean() == pytest.approx(worst_part(values, parts), abs=1e-9)
    assert tail.of(values) == pytest.approx(worst_part(values, parts), abs=1e-9)


def test_widths_lean_on_student_where_tasks_are_few() -> None:
    few = Widths.of({}, known=3)
    assert few.at(0.9, MeanOf()) == pytest.approx(stats.t.ppf(0.95, 2), rel=0.4)
    rng = np.random.default_rng(0)
    many = Widths.of({"mean": (3 * rng.normal(size=4000)).tolist()}, known=4000)
    assert many.at(0.9, MeanOf()) == pytest.approx(3 * stats.norm.ppf(0.95), rel=0.05)
    assert many.at(0.0, MeanOf()) == 0.0


def test_calibration_is_on_tasks_that_were_left_out(values: np.ndarray) -> None:
    model = Bayesian().fit(values)
    tasks = sum(len(rows) for _, rows, _ in leave_tasks_out(values))
    assert model._left_out.count == tasks == 30
    assert Bayesian().fit(values[:3])._left_out.count == 0


def test_widths_are_those_of_left_out_tasks_with_as_many_probes_of_each_kind(values: np.ndarray) -> None:
    """Oracle: each left-out task is forecast from its own chosen and random probes, and its errors are sorted."""
    left_out = Bayesian().fit(values)._left_out
    errors = []
    for state, rows in left_out.tasks:
        chosen = state.choose(4, np.arange(rows.shape[1]))
        rest = np.setdiff1d(np.arange(rows.shape[1]), chosen)
        at = np.concatenate([chosen, np.random.default_rng(0).permutation(rest)[:6]])
        for row in rows:
            centre, variance = moments(state.joint(at, row[at]), np.setdiff1d(np.arange(len(row)), at))
            errors.append((np.delete(row, at).sum() - centre) / np.sqrt(variance))
    expected = Widths.of({"mean": errors}, 30).at(0.9, MeanOf())
    assert left_out.widths(4, 6).at(0.9, MeanOf()) == pytest.approx(expected, rel=1e-9)
    assert left_out.widths(0, 10).at(0.9, MeanOf()) != pytest.approx(expected, rel=1e-3)


def test_widths_of_more_probes_than_the_left_out_tasks_have_columns(values: np.ndarray) -> None:
    left_out = Bayesian().fit(values)._left_out
    assert np.isfinite(left_out.widths(100, 100).at(0.9, Tail()))


def test_what_cannot_be_is_refused(values: np.ndarray) -> None:
    model, row = Bayesian().fit(values[:-1]), values[-1]
    forecast = model.predict(np.arange(5), row[:5])
    with pytest.raises(DataError, match="at least two random probes, and there are 0"):
        forecast.mean_interval(0.9, True)
    with pytest.raises(DataError, match="of 5 probes, 6 cannot have been drawn at random"):
        model.predict(np.arange(5), row[:5], audit=6)
    with pytest.raises(DataError, match="not of the population"):
        model.predict(np.arange(5), row[:5], audit=2, population=[0, 1, 2])
    for bad in (1.0, -0.1, np.nan):
        with pytest.raises(ConfigError, match="level"):
            forecast.mean_interval(bad)
    for share in (0.0, 1.5, np.nan):
        with pytest.raises(ConfigError, match="share"):
            forecast.tail_interval(share)
    with pytest.raises(ConfigError, match="threshold"):
        forecast.above_interval(np.inf)
    with pytest.raises(DataError, match="columns among the 120"):
        forecast.mean_interval(among=[120])


def test_random_probes_come_last_and_follow_the_seed(values: np.ndarray) -> None:
    model = Bayesian().fit(values)
    first = probes.choose(model, 12, audit=8, seed=1)
    np.testing.assert_array_equal(first[:4], probes.choose(model, 4))
    np.testing.assert_array_equal(first, probes.choose(model, 12, audit=8, seed=1))
    np.testing.assert_array_equal(first[:8], probes.choose(model, 8, audit=4, seed=1))  # a longer sample goes on
    assert len(set(first.tolist())) == 12
    seeds = [probes.choose(model, 12, audit=8, seed=seed)[4:] for seed in range(400)]
    counts = np.bincount(np.concatenate(seeds), minlength=120)
    assert (counts[first[:4]] == 0).all()
    # 400 draws of 8 of 116: each 27.6 times on average, with a standard deviation of 5.
    assert stats.chisquare(np.delete(counts, first[:4])).pvalue > 1e-4
