from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from forgetcast import DataError, ForgettingMatrix, MismatchError
from forgetcast.completion import Bayesian
from forgetcast.evaluation import bench
from forgetcast.similarity import (
    FromSide,
    OnSimilarity,
    RepresentationProduct,
    Ridge,
    RowForecaster,
    SideInformation,
    Vectors,
    arms_of,
    compare_arms,
)

M, N = 24, 80


def problem(share: float, seed: int = 0) -> tuple[ForgettingMatrix, SideInformation]:
    """Forgetting of example means plus a bilinear form of known vectors (`share`) plus noise."""
    rng = np.random.default_rng(seed)
    tasks, examples = rng.normal(size=(M, 3)), rng.normal(size=(N, 3))
    bilinear = tasks @ rng.normal(size=(3, 3)) @ examples.T
    values = rng.normal(size=N) + share * bilinear + 0.3 * rng.normal(size=(M, N))
    names = [f"t{i}" for i in range(M)]
    similarities = {"good": bilinear, "useless": rng.normal(size=(M, N)), "constant": np.tile(examples[:, 0], (M, 1))}
    matrix = ForgettingMatrix(values, tasks=names)
    return matrix, SideInformation(names, similarities, Vectors(tasks, examples), examples)


def error(forecaster: RowForecaster, matrix: ForgettingMatrix, known: int) -> float:
    """Error on the last tasks, relative to the examples' means."""
    values = matrix.values.astype(np.float64)
    rows = np.arange(M)
    forecast = forecaster.forecast(values[:known], rows[:known], rows[known:])
    means = values[:known].mean(axis=0)
    return float(((forecast - values[known:]) ** 2).mean() / ((means - values[known:]) ** 2).mean())


def test_the_line_is_numpys() -> None:
    matrix, side = problem(1.0)
    values, similarity = matrix.values.astype(np.float64), side.similarities["good"]
    slope, intercept = np.polyfit(similarity[:20].ravel(), values[:20].ravel(), 1)
    found = OnSimilarity(side, "good").forecast(values[:20], np.arange(20), np.arange(20, M))
    np.testing.assert_allclose(found, intercept + slope * similarity[20:], rtol=1e-9)


@pytest.mark.parametrize(
    "make",
    [lambda side: OnSimilarity(side, "good", means=True), RepresentationProduct, Ridge],
    ids=["line", "representation", "ridge"],
)
def test_planted_structure_is_found(make: type[Ridge]) -> None:
    matrix, side = problem(1.0)
    assert error(make(side), matrix, 18) < 0.15


@pytest.mark.parametrize("make", [RepresentationProduct, Ridge])
def test_useless_side_information_costs_little(make: type[Ridge]) -> None:
    matrix, side = problem(0.0)
    assert (
        error(make(SideInformation(side.tasks, {"useless": side.similarities["useless"]}, side.vectors)), matrix, 18)
        < 1.1
    )


def test_missing_entries_are_legal() -> None:
    matrix, side = problem(1.0)
    values = matrix.values.astype(np.float64)
    values[np.random.default_rng(1).random(values.shape) < 0.3] = np.nan
    for forecaster in (OnSimilarity(side, "good"), RepresentationProduct(side), Ridge(side)):
        assert np.isfinite(forecaster.forecast(values[:20], np.arange(20), np.arange(20, M))).all()


def test_joined_is_completion_where_the_side_information_is_useless() -> None:
    matrix, side = problem(0.0)
    known, new = matrix.select(matrix.tasks[:20]), matrix.tasks[20:]
    joined = FromSide(forecaster=OnSimilarity(side, "useless", means=True), joined=True).fit(known)
    np.testing.assert_array_equal(joined.weights_, 0)
    at = np.arange(5)
    observed = matrix.values[20:, at]
    plain = Bayesian().fit(known).predict(at, observed)
    found = joined.for_tasks(new).predict(at, observed)
    np.testing.assert_array_equal(found.mean, plain.mean)
    np.testing.assert_array_equal(found.std, plain.std)


def test_joined_is_better_than_either_where_it_is_useful() -> None:
    matrix, side = problem(0.6)
    arms: dict[str, Any] = {
        "bayesian": Bayesian(),
        "alone": FromSide(forecaster=OnSimilarity(side, "good", means=True)),
    }
    arms["joined"] = FromSide(forecaster=OnSimilarity(side, "good", means=True), joined=True)
    known, new = matrix.select(matrix.tasks[:12]), matrix.select(matrix.tasks[18:])
    rows = bench(known, new, arms, ks=[5], seeds=1, baseline="bayesian")
    rmse = {row.method: row.accuracy.rmse for row in rows if row.probes == "chosen"}
    assert rmse["joined"] < rmse["bayesian"]
    (alone, both) = compare_arms(rows)
    assert (alone.arm, both.arm) == ("alone", "joined")
    assert both.rmse_difference == pytest.approx(
        np.mean(
            np.subtract(
                *(
                    next(r for r in rows if r.method == m and r.probes == "chosen").rmse_by_task
                    for m in ("joined", "bayesian")
                )
            )
        )
    )
    assert both.rmse_upper is not None
    assert both.rmse_upper < 0
    assert "RMSE: joined" in both.verdict()


def test_probes_are_their_measurements() -> None:
    matrix, side = problem(1.0)
    for arm in arms_of(side).values():
        fitted = arm.fit(matrix.select(matrix.tasks[:20])).for_tasks(matrix.tasks[20:])
        forecast = fitted.predict([3, 9], matrix.values[20:, [3, 9]])
        np.testing.assert_allclose(forecast.mean[:, [3, 9]], matrix.values[20:, [3, 9]], rtol=1e-6)
        np.testing.assert_array_equal(forecast.std[:, [3, 9]], 0)
        assert (np.delete(forecast.std, [3, 9], axis=1) > 0).all()


def test_the_arms_leave_out_what_cannot_differ_between_tasks() -> None:
    _, side = problem(1.0)
    names = set(arms_of(side))
    assert {"constant", "mean+good", "bayesian+good", "representation", "ridge", "bayesian+ridge"} <= names
    assert "mean+constant" not in names


def test_an_unknown_task_and_too_few_are_refused() -> None:
    matrix, side = problem(1.0)
    arm = FromSide(forecaster=Ridge(side))
    with pytest.raises(MismatchError, match="nothing is known of the task 'x'"):
        arm.fit(matrix).for_tasks(["x"])
    with pytest.raises(DataError, match="at least four"):
        arm.fit(matrix.select(matrix.tasks[:3]))
