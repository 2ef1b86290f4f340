from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forgetcast import DataError, MismatchError, Pool, Scores
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
def test_invalid_losses_are_rejected(pool: Pool, bad: float, message: str) -> None:
    nll = np.ones(len(pool))
    nll[2] = bad
    with pytest.raises(DataError, match=message) as error:
        make_scores(pool, nll)
    assert "'e2'" in str(error.value)


def test_invalid_score_files_are_rejected(tmp_path: Path) -> None:
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
