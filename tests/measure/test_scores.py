from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forgetcast import DataError, ForgettingMatrix, MismatchError, Pool, Scores
from forgetcast.measure.scores import flips, forgetting
from support.data import make_scores


def test_scores_survive_a_file(tmp_path: Path, pool: Pool) -> None:
    nll = np.linspace(0, 4, len(pool))
    nll[3] = np.nan
    reasons = [None] * len(pool)
    reasons[3] = "too short"
    scores = Scores(pool.ids, nll, np.arange(len(pool)), nll > 2, reasons, {"model": "m", "pool": pool.fingerprint})
    scores.save(tmp_path / "scores.parquet")
    read = Scores.load(tmp_path / "scores.parquet")
    np.testing.assert_array_equal(read.nll, nll)
    np.testing.assert_array_equal(read.tokens, scores.tokens)
    np.testing.assert_array_equal(read.truncated, scores.truncated)
    assert (read.ids, read.reasons, read.metadata) == (scores.ids, scores.reasons, scores.metadata)


@pytest.mark.parametrize(("bad", "message"), [(np.inf, "inf"), (-np.inf, "-inf"), (np.nan, "no reason"), (-1.0, "-1")])
def test_unusable_losses_are_refused(pool: Pool, bad: float, message: str) -> None:
    nll = np.ones(len(pool))
    nll[2] = bad
    with pytest.raises(DataError, match=message) as error:
        make_scores(pool, nll)
    assert "'e2'" in str(error.value)


def test_a_file_that_is_no_score_file(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a"], "loss": [1.0]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet is not a score file: the column 'nll' is missing"):
        Scores.load(tmp_path / "x.parquet")
    table = {"id": ["a"], "nll": [float("inf")], "tokens": [1], "truncated": [False]}
    pq.write_table(pa.table(table), tmp_path / "y.parquet")
    with pytest.raises(DataError, match=r"y.parquet: .*'a' is inf"):
        Scores.load(tmp_path / "y.parquet")
    pq.write_table(pa.table({**table, "id": pa.array([None], pa.string())}), tmp_path / "z.parquet")
    with pytest.raises(DataError, match="an id is missing"):
        Scores.load(tmp_path / "z.parquet")


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


def test_scores_of_another_pool_are_refused(pool: Pool) -> None:
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
def test_unusable_matrices_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ForgettingMatrix(**arguments)


def test_selection_by_name() -> None:
    matrix = ForgettingMatrix([[1.0, 2.0], [3.0, 4.0]], tasks=["a", "b"], examples=["x", "y"])
    np.testing.assert_array_equal(matrix.select(["b"], ["y", "x"]).values, [[4.0, 3.0]])
    with pytest.raises(MismatchError, match="no task 'c'"):
        matrix.select(["c"])


def test_forgetting_and_flips_are_aligned_by_id(pool: Pool) -> None:
    """Oracle: plain loops over ids."""
    rng = np.random.default_rng(0)
    answers = [0.0, 1.0, np.nan]
    before = replace(make_scores(pool, rng.uniform(1, 3, 24)), exact_match=rng.choice(answers, 24))
    part = pool.subset(rng.permutation(pool.ids)[:15].tolist())
    after = replace(make_scores(part, rng.uniform(1, 3, 15)), exact_match=rng.choice(answers, 15))
    losses, right = (dict(zip(before.ids, values, strict=True)) for values in (before.nll, before.exact_match))
    np.testing.assert_array_equal(
        forgetting(before, after), [value - losses[id_] for id_, value in zip(after.ids, after.nll, strict=True)]
    )
    expected = [
        np.nan if right[id_] != 1 or np.isnan(value) else float(value == 0)
        for id_, value in zip(after.ids, after.exact_match, strict=True)
    ]
    assert {0.0, 1.0} <= set(expected)
    np.testing.assert_array_equal(flips(before, after), expected)
    assert np.isnan(flips(make_scores(pool, np.ones(24)), after)).all()
    for function in (forgetting, flips):
        with pytest.raises(MismatchError, match=r"9 example\(s\)"):
            function(after, before)


def test_a_part_of_the_scores(pool: Pool) -> None:
    scores = replace(
        make_scores(pool, np.arange(24.0), model="m"), exact_match=np.arange(24) % 2, predictions=list(pool.ids)
    )
    part = scores.subset(["e7", "e2"])
    assert (part.ids, part.predictions, part.nll.tolist()) == (("e7", "e2"), ("e7", "e2"), [7, 2])
    assert part.exact_match is not None
    assert part.exact_match.tolist() == [1, 0]
    assert part.metadata == {"model": "m"}, "a part of a pool is another pool"
    assert scores.subset(pool.ids[::-1]).pool_fingerprint == pool.fingerprint
    for read in (scores.at, scores.subset):
        with pytest.raises(MismatchError, match="the file: example 'nobody' has no score"):
            read(["e1", "nobody"], where="the file")


def test_short_representations(pool: Pool) -> None:
    nll = np.full(24, 2.96)
    nll[:3] = np.nan
    scores = Scores(pool.ids, nll, np.ones(24), np.zeros(24, bool), ["short"] * 24)
    assert repr(scores) == "Scores(24 examples, mean 2.96 nats per token, 3 unscored)"
    assert repr(scores.subset(pool.ids[:2])) == "Scores(2 examples, no losses, 2 unscored)"
    assert repr(pool[0]).startswith("Example('e0', '")
    assert max(len(repr(example)) for example in pool) < 60
