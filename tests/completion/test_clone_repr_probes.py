"""What fit leaves unchanged, how objects print, and the choice of probes with every method."""

from __future__ import annotations

import numpy as np
import pytest

from conftest import planted
from forgetcast import ForgettingMatrix
from forgetcast.completion import (
    KNN,
    METHODS,
    Additive,
    Auto,
    Bayesian,
    Completion,
    MatrixFactorization,
    Mean,
)
from forgetcast.completion.base import clone
from forgetcast.evaluation import bench, bench_left_out

every_method = pytest.mark.parametrize("name", METHODS)


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    return planted(20, 60, 2, 0.1)


def data(name: str, values: np.ndarray) -> np.ndarray:
    """The values, or zeros and ones for the method that needs them."""
    return (values > 1).astype(float) if name == "logistic-mf" else values


@every_method
def test_a_clone_has_the_settings_and_is_not_fitted(name: str, values: np.ndarray) -> None:
    method = METHODS[name]()
    settings = dict(vars(method))
    method.fit(data(name, values))
    copy = clone(method)
    assert type(copy) is type(method)
    assert vars(copy) == settings


def test_settings_that_are_not_the_defaults_are_cloned() -> None:
    assert vars(clone(Bayesian(factors=2, prior_scale=0.1, shift_scale=7.0))) == {
        "factors": 2,
        "prior_scale": 0.1,
        "shift_scale": 7.0,
    }
    assert (clone(KNN(k=3, softening=0.2)).k, clone(KNN(k=3, softening=0.2)).softening) == (3, 0.2)


def test_fit_changes_no_object_of_the_caller(values: np.ndarray) -> None:
    candidates: list[Completion] = [MatrixFactorization(rank=2), KNN(k=3), Mean()]
    before = [dict(vars(candidate)) for candidate in candidates]
    auto = Auto(candidates=candidates).fit(values)
    assert auto.candidates is candidates
    assert [vars(candidate) for candidate in candidates] == before
    assert auto.chosen_ not in candidates
    methods: dict[str, Completion] = {"mf": candidates[0], "knn": candidates[1], "mean": candidates[2]}
    matrix = ForgettingMatrix(values)
    bench(matrix.select(matrix.tasks[:12]), matrix.select(matrix.tasks[12:]), methods, ks=[3], seeds=1, baseline="mean")
    bench_left_out(matrix.select(matrix.tasks[:5]), methods, ks=[3], seeds=1, baseline="mean")
    assert [vars(candidate) for candidate in candidates] == before


def test_auto_may_get_one_object_twice(values: np.ndarray) -> None:
    additive = Additive()
    auto = Auto(candidates=[additive, additive]).fit(values)
    assert isinstance(auto.chosen_, Additive)
