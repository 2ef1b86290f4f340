from __future__ import annotations

import numpy as np
import pytest

from forgetcast import DataError, MismatchError
from forgetcast.atlas import ForgettingMatrix
from forgetcast.completion import Bayesian
from forgetcast.completion.base import CALIBRATION_EXAMPLES, task_splits
from forgetcast.completion.preflight import Preflight, with_prior


def world(tasks: int = 40, n: int = 200, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Forgetting whose shift and factor follow from two features of the task, but for a small part."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(tasks, 6))
    coordinates = features[:, :2] + 0.3 * rng.normal(size=(tasks, 2))
    loadings = np.column_stack([np.ones(n), rng.normal(size=n)])
    return coordinates @ loadings.T + rng.normal(size=n) + 0.1 * rng.normal(size=(tasks, n)), features


def test_a_prior_on_the_coefficients_is_conditioned_on_as_in_the_joint_gaussian() -> None:
    values, _ = world()
    model = Bayesian(factors=2).fit(values)
    rng = np.random.default_rng(1)
    mean, variance = rng.normal(size=len(model.prior_)), rng.uniform(0.1, 1, size=len(model.prior_))
    changed = with_prior(model, mean, variance)
    state = changed.state_._replace(mixture=None)
    probes, row = np.array([3, 50, 120]), rng.normal(size=3)
    found, _, _ = state.posterior(probes, row[None])
    # The oracle: condition the joint distribution of all entries.
    loadings = model.loadings_.astype(np.float64)
    center = model.mean_ + loadings @ mean
    joint = loadings @ np.diag(variance) @ loadings.T
    at = joint[np.ix_(probes, probes)] + np.diag(model.noise_[probes])
    expected = center + joint[:, probes] @ np.linalg.solve(at, row - center[probes])
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
    assert changed.predict(probes, row).mean[probes] == pytest.approx(row, abs=1e-6)
    np.testing.assert_array_equal(model.prior_ == variance, False)  # the model itself is as it was


def test_text_that_says_something_is_used_and_lowers_the_error_of_new_tasks() -> None:
    values, features = world()
    past, new = np.arange(32), np.arange(32, 40)
    matrix = ForgettingMatrix(values[past])
    before = Preflight(Bayesian().fit(matrix)).fit(features[past])
    assert before.uses_ == "text"
    assert before.errors_["text"] < 0.7 * before.errors_["atlas mean"]
    rows = [before.forecast(features[i]) for i in new]
    plain = Preflight(before.model).fit().forecast()
    errors = [np.mean((row.mean - values[i]) ** 2) for row, i in zip(rows, new, strict=True)]
    assert np.mean(errors) < 0.5 * np.mean([(plain.mean - values[i]) ** 2 for i in new])
    sharpened = before.model_for(features[new[0]])
    probes = np.arange(0, 200, 20)
    after = sharpened.predict(probes, values[new[0], probes])
    assert np.mean((after.mean - values[new[0]]) ** 2) < errors[0]


def test_text_that_says_nothing_is_not_used_and_the_forecast_is_the_mean() -> None:
    values, _ = world()
    noise = np.random.default_rng(3).normal(size=(40, 300))
    model = Bayesian().fit(ForgettingMatrix(values))
    before = Preflight(model).fit(noise)
    assert before.errors_["text"] > 0.9 * before.errors_["atlas mean"]
    if before.uses_ is None:
        np.testing.assert_array_equal(before.forecast(noise[0]).mean, model.predict([], []).mean)
    few = np.full((40, 5), np.nan)
    few[:7] = 1.0
    assert Preflight(model).fit(few).uses_ is None


@pytest.mark.parametrize("use_text", [True, False])
def test_intervals_before_anything_is_run_cover_new_tasks(use_text: bool) -> None:
    covered, means = [], []
    for seed in range(12):
        values, features = world(seed=seed)
        given = features[:32] if use_text else None
        before = Preflight(Bayesian().fit(ForgettingMatrix(values[:32]))).fit(given)
        for i in range(32, 40):
            row = before.forecast(features[i] if use_text else None)
            lower, upper = row.interval(0.8)
            covered.append(np.mean((lower <= values[i]) & (values[i] <= upper)))
            means.append(abs(row.mean.mean() - values[i].mean()) <= before.mean_half_width(0.8))
    # 96 tasks: two standard errors of a share of .8 are .08.
    assert 0.72 < np.mean(covered) < 0.9
    assert 0.72 < np.mean(means) < 0.92


def test_the_mean_has_no_interval_with_too_few_tasks_and_wrong_shapes_are_refused() -> None:
    values, features = world()
    small = Preflight(Bayesian().fit(ForgettingMatrix(values[:8]))).fit(None)
    assert small.mean_half_width(0.8) < np.inf
    assert small.mean_half_width(0.95) == np.inf
    with pytest.raises(MismatchError, match=r"features of 3 tasks \(text\)"):
        Preflight(small.model).fit(features[:3])
    informed = Preflight(Bayesian().fit(ForgettingMatrix(values))).fit(features)
    assert informed.uses_ == "text"
    with pytest.raises(DataError, match="uses the task's text: give it"):
        informed.forecast(pilot=features[0])
    r = len(small.model.prior_)
    with pytest.raises(MismatchError, match="coefficients"):
        with_prior(small.model, np.zeros(r + 1), np.ones(r + 1))
    with pytest.raises(DataError, match="not negative"):
        with_prior(small.model, np.zeros(r), -np.ones(r))


def test_the_better_evidence_is_used() -> None:
    """A pilot is of the same rows, when a fifth to two fifths of the forgetting is there; the text says less."""
    values, features = world(seed=2)
    rng = np.random.default_rng(5)
    probes = np.arange(0, 200, 10)
    pilot = rng.uniform(0.2, 0.4, size=(40, 1)) * values[:, probes] + 0.02 * rng.normal(size=(40, 20))
    past, new = np.arange(32), np.arange(32, 40)
    noisy = features + 2 * rng.normal(size=features.shape)
    before = Preflight(Bayesian().fit(ForgettingMatrix(values[past]))).fit(noisy[past], pilot=pilot[past])
    assert before.uses_ == "pilot"
    assert before.errors_["pilot"] < min(before.errors_["text"], before.errors_["atlas mean"])

    def error(rows: list[np.ndarray]) -> float:
        return float(np.mean([(row - values[i]) ** 2 for row, i in zip(rows, new, strict=True)]))

    by_pilot = error([before.forecast(pilot=pilot[i]).mean for i in new])
    assert by_pilot < 0.5 * error([before.model.predict([], []).mean] * 8)
    # Probes of the finished fine-tune sharpen it.
    at = np.arange(5, 200, 20)
    sharpened = [before.model_for(pilot=pilot[i]).predict(at, values[i, at]).mean for i in new]
    assert error(sharpened) < by_pilot
    # Tasks without a pilot are forecast as ever, and do not make the intervals wider.
    some = pilot.copy()
    some[:12] = np.nan
    partly = Preflight(before.model).fit(pilot=some[past])
    assert partly.uses_ == "pilot"
    assert partly.errors_["atlas mean"] > partly.errors_["pilot"] > before.errors_["pilot"]
    assert partly.mean_half_width(0.8) < Preflight(before.model).fit().mean_half_width(0.8)


def test_probes_of_a_pilot_that_only_grow_are_noisy_measurements_of_the_end() -> None:
    """Every row grows by the same factor, up to noise: then growth is used, and is the conditioned joint Gaussian."""
    rng = np.random.default_rng(3)
    values, _ = world(tasks=20, seed=4)
    probes = np.arange(0, 200, 20)
    pilot = values[:, probes] / 3 + 0.01 * rng.normal(size=(20, 10))
    past = np.arange(16)
    model = Bayesian().fit(ForgettingMatrix(values[past]))
    before = Preflight(model).fit(pilot=pilot[past], probes=probes)
    assert before.uses_ == "growth"
    assert before.errors_["growth"] < before.errors_["pilot"] < before.errors_["atlas mean"]
    errors = [np.mean((before.forecast(pilot=pilot[i]).mean - values[i]) ** 2) for i in range(16, 20)]
    measured = [np.mean((model.predict(probes, values[i, probes]).mean - values[i]) ** 2) for i in range(16, 20)]
    assert np.mean(errors) < 3 * np.mean(measured)
    # The oracle: condition the joint distribution of all entries on factor times the pilot, with its errors.
    factor = (pilot[past] * values[np.ix_(past, probes)]).sum() / (pilot[past] ** 2).sum()
    noise = model.noise_[probes] + np.mean((values[np.ix_(past, probes)] - factor * pilot[past]) ** 2, axis=0)
    loadings = model.loadings_.astype(np.float64)
    joint = loadings @ np.diag(model.prior_) @ loadings.T
    residual = factor * pilot[16] - model.mean_[probes]
    inner = joint[np.ix_(probes, probes)] + np.diag(noise)
    expected = model.mean_ + joint[:, probes] @ np.linalg.solve(inner, residual)
    np.testing.assert_allclose(before.model_for(pilot=pilot[16]).mean_, expected, atol=1e-4)


def families_of(kinds: int, seed: int, n: int = 120) -> tuple[np.ndarray, list[str]]:
    """Families of four tasks each, whose means differ by one, and by a tenth within a family."""
    rng = np.random.default_rng(seed)
    level = np.repeat(rng.normal(size=kinds), 4) + 0.1 * rng.normal(size=4 * kinds)
    values = level[:, None] + rng.normal(size=n) + 0.1 * rng.normal(size=(4 * kinds, n))
    return values, [f"kind{i // 4}" for i in range(4 * kinds)]


def test_intervals_for_a_task_of_another_kind_cover_tasks_of_new_families() -> None:
    covered, of_families, examples = [], [], []
    for seed in range(16):
        values, names = families_of(12, seed, n=60)
        before = Preflight(Bayesian().fit(ForgettingMatrix(values[:40]))).fit(families=names[:40])
        assert before.kinds_ == 10
        assert before.unlike_errors_["atlas mean"] > before.errors_["atlas mean"]
        row = before.forecast(unlike=True)
        lower, upper = row.interval(0.8)
        for i in (40, 44):  # one task of each new family: those of a family are not independent
            miss = abs(row.mean.mean() - values[i].mean())
            of_families.append(miss <= before.mean_half_width(0.8, unlike=True))
            covered.append(miss <= before.mean_half_width(0.8))
            examples.append(np.mean((lower <= values[i]) & (values[i] <= upper)))
    # 32 families: three standard errors of a share of .8 are .2; the quantile itself is of ten families.
    assert np.mean(of_families) > 0.6
    assert np.mean(examples) > 0.6
    assert np.mean(of_families) >= np.mean(covered)


def test_without_families_the_most_similar_tasks_are_left_out_too() -> None:
    values, names = families_of(8, 0)
    before = Preflight(Bayesian().fit(ForgettingMatrix(values))).fit(families=["one"] * len(names))
    assert before.kinds_ == 0
    assert np.isfinite(before.unlike_errors_["atlas mean"])
    assert np.isfinite(before.mean_half_width(0.8, unlike=True))


def test_columns_that_are_always_used_are_among_those_of_every_split() -> None:
    values = np.random.default_rng(0).normal(size=(6, CALIBRATION_EXAMPLES + 500)).astype(np.float32)
    always = np.arange(7, len(values[0]), 100)
    without = [split.columns for split in task_splits(values)]
    assert any(not np.isin(always, columns).all() for columns in without)
    for split, columns in zip(task_splits(values, always=always), without, strict=True):
        np.testing.assert_array_equal(split.columns, np.union1d(columns, always))
        np.testing.assert_array_equal(split.rest, values[np.ix_(split.kept, split.columns)])
