from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from forgetcast import DataError, ForgettingMatrix, MismatchError, Pool
from support.data import make_scores, planted


def test_matrix_from_scores_is_after_minus_before(pool: Pool) -> None:
    rng = np.random.default_rng(0)
    before, first, second = rng.uniform(1, 3, (3, len(pool)))
    shuffled = pool.subset(pool.ids[::-1])
    matrix = ForgettingMatrix.from_scores(
        make_scores(pool, before), {"a": make_scores(pool, first), "b": make_scores(shuffled, second[::-1])}, pool=pool
    )
    np.testing.assert_allclose(matrix.values, [first - before, second - before], rtol=0, atol=1e-6)
    assert matrix.sources == pool.sources


def test_nan_stays_nan(pool: Pool) -> None:
    nll = np.full(len(pool), 2.0)
    nll[5] = np.nan
    reasons = [None if np.isfinite(value) else "why" for value in nll]
    after = replace(make_scores(pool, np.full(len(pool), 3.0)), nll=nll, reasons=reasons)
    matrix = ForgettingMatrix.from_scores(make_scores(pool, np.full(len(pool), 3.0)), {"a": after})
    assert np.flatnonzero(~matrix.observed[0]).tolist() == [5]
    assert np.isnan(matrix.values[0, 5])


def test_scores_of_another_pool_are_rejected(pool: Pool) -> None:
    other = pool.subset(pool.ids[:-1])
    nll = np.ones(len(other))
    with pytest.raises(MismatchError, match="another pool"):
        ForgettingMatrix.from_scores(make_scores(pool, np.ones(len(pool))), {"a": make_scores(other, nll)})
    matrix = ForgettingMatrix(np.ones((1, len(pool))), pool_fingerprint=pool.fingerprint)
    with pytest.raises(MismatchError, match="another pool"):
        matrix.check_pool(other)
    matrix.check_pool(pool)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": [1.0, 2.0]}, "two dimensions"),
        ({"values": [["a"]]}, "needs numbers"),
        ({"values": [[1.0, np.inf]], "examples": ["x", "y"]}, "'y' after '0' is infinite"),
        ({"values": [[1.0, 2.0]], "examples": ["x"]}, "1 names are given"),
        ({"values": [[1.0, 2.0]], "examples": ["x", "x"]}, "'x' occurs twice"),
        ({"values": [[1.0, 2.0]], "sources": ["x"]}, "1 sources"),
    ],
)
def test_invalid_matrices_are_rejected(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ForgettingMatrix(**arguments)


def test_selection_by_name() -> None:
    matrix = ForgettingMatrix([[1.0, 2.0], [3.0, 4.0]], tasks=["a", "b"], examples=["x", "y"])
    np.testing.assert_array_equal(matrix.select(["b"], ["y", "x"]).values, [[4.0, 3.0]])
    with pytest.raises(MismatchError, match="no task 'c'"):
        matrix.select(["c"])


def test_matrices_from_files(tmp_path: Path) -> None:
    values = planted(30, 120, 2, 0.1)
    np.save(tmp_path / "z.npy", values)
    np.testing.assert_array_equal(ForgettingMatrix.load(tmp_path / "z.npy").values, values.astype(np.float32))
    (tmp_path / "z.json").write_text('{"arr": [[1, null], [2.5, 3]]}')
    np.testing.assert_array_equal(ForgettingMatrix.load(tmp_path / "z.json").values, [[1, np.nan], [2.5, 3]])
    (tmp_path / "rows.json").write_text("[[1, 2], [3, 4]]")
    assert ForgettingMatrix.load(tmp_path / "rows.json").shape == (2, 2)
    (tmp_path / "bad.json").write_text("[[1, 2], [3]]")
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    for name in ("bad.json", "objects.npy", "z.csv"):
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            ForgettingMatrix.load(tmp_path / name)
