from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgetcast import DataError, MismatchError
from forgetcast.atlas import ForgettingMatrix
from forgetcast.completion import Additive, Bayesian
from forgetcast.completion.ridge import PENALTIES, Ridge
from forgetcast.completion.unmeasured import Transfer, Unmeasured
from forgetcast.data.ids import ExampleIndex
from forgetcast.measure.features import Features

RNG = np.random.default_rng(0)


def features_of(states: np.ndarray, missing: int = 0) -> Features:
    """Features whose loss and length say nothing; the last `missing` examples have none."""
    n = len(states)
    nll = np.full(n, 2.0)
    nll[n - missing :] = np.nan
    return Features(
        ExampleIndex([f"e{i}" for i in range(n)]),
        ("a",) * n,
        nll,
        np.full(n, 7),
        np.where(np.isnan(nll)[:, None], np.nan, states).astype(np.float16),
        pa.array([i.to_bytes(16) for i in range(n)], pa.binary(16)),
        pa.array([i.to_bytes(32) for i in range(n)], pa.binary(32)),
        (None,) * n,
    )


def world(tasks: int = 24, n: int = 400, noise: float = 0.1, hidden: float = 0.3) -> tuple[np.ndarray, Features]:
    """Forgetting whose means and loadings are linear in eight states, but for a part that no feature shows."""
    rng = np.random.default_rng(1)
    states = rng.normal(size=(n, 8))
    weights = rng.normal(size=(8, 3)) / np.sqrt(8)
    loadings = states @ weights + hidden * rng.normal(size=(n, 3))
    means = loadings[:, 0] + 1.0
    values = means + rng.normal(size=(tasks, 3)) @ loadings.T + noise * rng.normal(size=(tasks, n))
    return values, features_of(states)


@given(st.integers(0, 2**32 - 1), st.sampled_from([(12, 4), (6, 20)]))
def test_left_out_residuals_and_leverage_are_those_of_fits_without_the_row(seed: int, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    inputs, targets = rng.normal(size=shape), rng.normal(size=(shape[0], 2))
    inputs -= inputs.mean(axis=0)
    ridge = Ridge(inputs)
    fit = ridge.fit(targets)
    standard = (inputs - inputs.mean(axis=0)) / inputs.std(axis=0)
    average = (standard**2).sum() / min(shape)
    for t in range(2):
        penalty = fit.penalties[t] * average
        for i in range(shape[0]):
            # The oracle: the normal equations with a free intercept, the row weighted out.
            kept = np.delete(np.arange(shape[0]), i)
            design = np.column_stack([np.ones(len(kept)), standard[kept]])
            if np.isinf(penalty):
                expected = targets[kept, t].mean()
            else:
                system = design.T @ design + penalty * np.diag([0.0, *np.ones(shape[1])])
                expected = np.array([1.0, *standard[i]]) @ np.linalg.solve(system, design.T @ targets[kept, t])
            assert targets[i, t] - fit.residuals[i, t] == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_the_penalty_is_infinite_where_features_say_nothing_and_small_where_they_say_all() -> None:
    inputs = RNG.normal(size=(200, 5))
    targets = np.column_stack([inputs @ np.ones(5), RNG.normal(size=200)])
    fit = Ridge(inputs).fit(targets)
    assert fit.penalties[0] == PENALTIES[0]
    predicted = fit.predict(inputs[:3] + 1).values
    np.testing.assert_allclose(predicted[:, 0], (inputs[:3] + 1) @ np.ones(5), rtol=1e-3)
    assert np.mean((fit.residuals[:, 1]) ** 2) <= 1.02 * targets[:, 1].var()


@pytest.mark.parametrize("method", [Bayesian(), Additive()], ids=["bayesian", "additive"])
def test_unmeasured_examples_are_forecast_with_honest_intervals(method: Bayesian | Additive) -> None:
    values, features = world()
    measured, new = np.arange(300), np.arange(300, 400)
    covered, errors, spread = [], [], []
    for task in range(0, 24, 3):
        rest = np.delete(np.arange(24), task)
        matrix = ForgettingMatrix(values[np.ix_(rest, measured)], examples=[f"e{i}" for i in measured])
        extended = Unmeasured(type(method)().fit(matrix)).fit(features.take(measured))
        probes = np.arange(0, 300, 15)
        row = extended.predict(probes, values[task, probes], [features.take(new[:50]), features.take(new[50:])])
        lower, upper = row.interval(0.9)
        truth = values[task, new]
        covered.extend((lower <= truth) & (truth <= upper))
        errors.extend((row.mean - truth) ** 2)
        spread.extend((truth - truth.mean()) ** 2)
    assert 0.84 < np.mean(covered) < 0.96
    if isinstance(method, Bayesian):
        assert np.mean(errors) < 0.5 * np.mean(spread)


def test_rows_are_forecast_together_as_alone() -> None:
    values, features = world()
    matrix = ForgettingMatrix(values[:20, :300], examples=[f"e{i}" for i in range(300)])
    extended = Unmeasured(Bayesian().fit(matrix)).fit(features)
    probes, new = np.arange(0, 300, 30), features.take(np.arange(300, 400))
    both = extended.predict(probes, values[20:22, probes], [new])
    for i in range(2):
        one = extended.predict(probes, values[20 + i, probes], [new])
        np.testing.assert_allclose(both.mean[i], one.mean, rtol=1e-5)
        np.testing.assert_allclose(both.std[i], one.std, rtol=1e-5)
    again = extended.transfer_.predict(extended.model.state_.mean, [new])
    assert np.corrcoef(again, values[:20, 300:].mean(axis=0))[0, 1] > 0.7


def test_examples_without_features_are_nan_and_too_few_or_foreign_ones_refused() -> None:
    values, _ = world()
    states = RNG.normal(size=(400, 8))
    matrix = ForgettingMatrix(values[:, :100], examples=[f"e{i}" for i in range(100)])
    model = Bayesian().fit(matrix)
    features = features_of(states, missing=10)
    row = Unmeasured(model).fit(features).predict([0, 1], [0.5, 0.5], [features.take(np.arange(380, 400))])
    np.testing.assert_array_equal(np.isnan(row.mean), np.arange(380, 400) >= 390)
    with pytest.raises(DataError, match="at least 30"):
        Transfer(features_of(states[:100], missing=80), matrix.examples)
    with pytest.raises(MismatchError, match="doesn't know"):
        Transfer(features_of(states[:50]), matrix.examples)
