from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from forgetcast import DataError, ForgettingMatrix
from forgetcast.similarity import associate


@pytest.fixture(scope="module")
def sides() -> tuple[np.ndarray, np.ndarray]:
    """Forgetting and a similarity that share the example means and a part of what is left."""
    rng = np.random.default_rng(0)
    common, columns = rng.normal(size=(12, 60)), rng.normal(size=60)
    return common + 2 * columns + rng.normal(size=(12, 60)), common + columns + rng.normal(size=(12, 60))


def double_centred(values: np.ndarray) -> np.ndarray:
    return values - values.mean(axis=1, keepdims=True) - values.mean(axis=0) + values.mean()


def test_are_those_of_scipy(sides: tuple[np.ndarray, np.ndarray]) -> None:
    y, x = sides
    y = y.astype(np.float32)
    (found,) = associate(ForgettingMatrix(y), {"s": x})
    rest = [double_centred(side.astype(np.float64)) for side in (x, y)]
    for correlation, expected in (
        (found.cells, stats.pearsonr(x.ravel(), y.ravel()).statistic),
        (found.cells_spearman, stats.spearmanr(x.ravel(), y.ravel()).statistic),
        (found.within_tasks, np.mean([stats.pearsonr(a, b).statistic for a, b in zip(x, y, strict=True)])),
        (found.within_tasks_spearman, np.mean([stats.spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)])),
        (found.within_examples, np.mean([stats.pearsonr(a, b).statistic for a, b in zip(x.T, y.T, strict=True)])),
        (
            found.within_examples_spearman,
            np.mean([stats.spearmanr(a, b).statistic for a, b in zip(x.T, y.T, strict=True)]),
        ),
        (found.partial, stats.pearsonr(rest[0].ravel(), rest[1].ravel()).statistic),
        (found.partial_spearman, stats.spearmanr(rest[0].ravel(), rest[1].ravel()).statistic),
    ):
        assert correlation.value == pytest.approx(expected, abs=1e-6)
        assert correlation.lower is not None
        assert correlation.upper is not None
        assert correlation.lower < correlation.value < correlation.upper


def test_the_interval_is_a_bootstrap_over_tasks(sides: tuple[np.ndarray, np.ndarray]) -> None:
    y, x = sides
    (found,) = associate(ForgettingMatrix(y), {"s": x})
    rng = np.random.default_rng(5)
    drawn = [rng.integers(12, size=12) for _ in range(1000)]
    expected = np.quantile([stats.pearsonr(x[at].ravel(), y[at].ravel()).statistic for at in drawn], [0.025, 0.975])
    np.testing.assert_allclose([found.cells.lower, found.cells.upper], expected, atol=0.01)


def test_missing_entries_are_left_out(sides: tuple[np.ndarray, np.ndarray]) -> None:
    y, x = sides
    y = y.astype(np.float32)
    y[np.random.default_rng(1).random(y.shape) < 0.3] = np.nan
    (found,) = associate(ForgettingMatrix(y), {"s": x})
    seen = ~np.isnan(y)
    assert found.cells.value == pytest.approx(stats.pearsonr(x[seen], y[seen]).statistic, abs=1e-6)
    within = [stats.spearmanr(a[~np.isnan(b)], b[~np.isnan(b)]).statistic for a, b in zip(x, y, strict=True)]
    assert found.within_tasks_spearman.value == pytest.approx(np.mean(within), abs=1e-6)


def test_a_similarity_that_is_the_same_for_all_tasks_says_nothing_of_tasks() -> None:
    rng = np.random.default_rng(0)
    row = rng.normal(size=50)
    values = row + 0.1 * rng.normal(size=(8, 50))
    (found,) = associate(ForgettingMatrix(values), {"s": np.tile(row, (8, 1))})
    assert found.within_tasks.value == pytest.approx(1, abs=0.05)
    for correlation in (found.within_examples, found.within_examples_spearman, found.partial, found.partial_spearman):
        assert correlation.value is None


def test_refuses_other_shapes_and_too_few() -> None:
    values = ForgettingMatrix(np.eye(4))
    with pytest.raises(DataError, match="shape"):
        associate(values, {"s": np.eye(3)})
    with pytest.raises(DataError, match="at least three"):
        associate(ForgettingMatrix(np.ones((2, 9))), {})
