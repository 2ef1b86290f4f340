"""What fit leaves unchanged, how objects print, and the choice of probes with every method."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from forgetcast import DataError, ForgettingMatrix, analyze, probes
from forgetcast.completion import (
    KNN,
    METHODS,
    Additive,
    Auto,
    Bayesian,
    Completion,
    LinearGaussian,
    LogisticMF,
    MatrixFactorization,
    Mean,
    SoftImpute,
)
from forgetcast.completion.base import clone
from forgetcast.evaluation import bench, bench_left_out, paired_difference
from forgetcast.stats import Comparison
from support.data import make_atlas, make_pool, planted

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


def test_auto_tells_candidates_of_one_class_apart(values: np.ndarray) -> None:
    auto = Auto(candidates=[Mean(), KNN(k=1), KNN(k=2), Bayesian()]).fit(values)
    assert isinstance(auto.chosen_, Bayesian)
    assert list(auto.errors_) == ["Mean", "KNN(k=1, softening=None)", "KNN(k=2, softening=None)", "Bayesian"]


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (Bayesian(), "Bayesian(factors=8, prior_scale=0.5, shift_scale=3.0)"),
        (KNN(k=3), "KNN(k=3, softening=None)"),
        (SoftImpute(penalty=0.1), "SoftImpute(penalty=0.1)"),
        (LogisticMF(), "LogisticMF(rank=5, precision=1.0)"),
        (Mean(), "Mean()"),
        (Auto(candidates=[Mean(), KNN()]), "Auto(candidates=[Mean(), KNN(k=40, softening=None)])"),
    ],
)
def test_a_method_prints_as_it_is_written(method: Completion, text: str) -> None:
    assert repr(method) == text


@every_method
def test_a_fitted_method_prints_its_settings_only(name: str, values: np.ndarray) -> None:
    assert repr(METHODS[name]().fit(data(name, values))) == repr(METHODS[name]())


def test_a_forecast_prints_in_one_line(values: np.ndarray) -> None:
    model = Additive().fit(values)
    one, rows = model.predict([0, 1], values[0, :2]), model.predict([0, 1], values[:3, :2])
    assert repr(one) == f"Forecast(60 examples, 2 probes, mean {one.mean.mean():.3f}, misfit {one.misfit:.2f})"
    assert repr(rows) == "Forecast(3 rows x 60 examples, 2 probes)"


def test_results_print_in_one_line(values: np.ndarray) -> None:
    found = analyze(ForgettingMatrix(values), max_rank=3)
    assert repr(found).startswith("Structure(20 tasks x 60 examples, 100% observed, R^2 ")
    assert repr(found).endswith("of rank 1 to 3)")
    matrix = ForgettingMatrix(values[:5])
    row = bench_left_out(matrix, {"additive": Additive()}, ks=[3], seeds=1)[0]
    assert repr(row).startswith("BenchRow(additive, 3 random probes, RMSE ")
    assert repr(row).endswith(", 1.000 [1.000, 1.000] of the baseline's)")
    difference = paired_difference([1.0, 2.0, 3.0], [2.0, 2.5, 3.6])
    comparison = Comparison("top", "random", "mean", difference, -1.0, 0.0, 0.1, 0.1, 0.1, 2)
    interval = f"[{difference.lower:+.4f}, {difference.upper:+.4f}]"
    assert repr(comparison) == f"Comparison(top - random, mean: -0.7000 {interval}, 3 pairs, 2 tasks)"


@every_method
def test_probes_are_chosen_with_every_method(name: str, values: np.ndarray) -> None:
    values = data(name, values)
    model = METHODS[name]().fit(values)
    chosen = probes.choose(model, 5)
    assert len(set(chosen.tolist())) == 5
    itself = isinstance(model, LinearGaussian) and name != "mean"
    assert (model.gaussian_ is model) == itself
    if not itself:
        assert chosen.tolist() == probes.choose(Bayesian().fit(values), 5).tolist()


def test_the_model_for_probes_is_fitted_once_per_fit(values: np.ndarray) -> None:
    model = KNN().fit(values)
    first = model.gaussian_
    assert model.gaussian_ is first
    assert model.fit(values[:10]).gaussian_ is not first
    np.testing.assert_array_equal(model.gaussian_.mean_, Bayesian().fit(values[:10]).mean_)


@pytest.mark.parametrize("method", [KNN(), Mean(), Bayesian()])
def test_an_unfitted_method_chooses_no_probes(method: Completion) -> None:
    with pytest.raises(DataError, match="is not fitted; call fit first"):
        probes.choose(method, 3)


def test_a_matrix_with_gaps_or_on_disk(tmp_path: Path, values: np.ndarray) -> None:
    pool = make_pool(60)
    atlas = make_atlas(tmp_path / "a.atlas", pool)
    model = KNN().fit(atlas)
    assert probes.choose(model, 4).tolist() == probes.choose(Bayesian().fit(atlas), 4).tolist()
    gaps = np.where(np.random.default_rng(0).random(values.shape) < 0.2, np.nan, values)
    gaps[:, 3] = np.nan
    assert probes.choose(KNN().fit(gaps), 4).tolist() == probes.choose(Bayesian().fit(gaps), 4).tolist()
