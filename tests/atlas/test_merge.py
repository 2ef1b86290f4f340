"""Merging the parts of a split atlas gives the whole back; what does not belong together is refused."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgetcast import Atlas, DataError, Example, MismatchError, Pool
from forgetcast.atlas.merge import merge
from forgetcast.atlas.validate import validate
from forgetcast.completion.forecast import TaskForecast
from support.cli import RunCommand
from support.data import make_pool, make_scores

POOL = make_pool(12)


def make(
    path: Path,
    values: np.ndarray,
    *,
    pool: Pool = POOL,
    base: float | np.ndarray = 3.0,
    tasks: list[str] | None = None,
    model_hash: str | None = "h1",
    **metadata: Any,
) -> Atlas:
    """Atlas with this forgetting, NaN = not measured, all examples of which were answered right before."""
    losses = np.broadcast_to(np.asarray(base, dtype=float), len(pool)).copy()
    known = {} if model_hash is None else {"model_hash": model_hash}
    before = make_scores(pool, losses, **known, **metadata)
    before = replace(before, exact_match=np.ones(len(pool)), digests=[f"d{id_}" for id_ in pool.ids])
    atlas = Atlas.create(path, pool, before, model="base", recipe={"steps": 3})
    for name, row in zip(tasks or [f"t{i}" for i in range(len(values))], values, strict=True):
        if len(measured := np.flatnonzero(~np.isnan(row))):
            part = pool.subset(pool.ids.select(measured))
            after = make_scores(part, losses[measured] + row[measured], **metadata)
            answered = replace(after, exact_match=(row[measured] < 0.5).astype(float))
            atlas.add(name, answered, recipe={"row": name}, provenance={"seed": 7})
    return atlas


def numbers(tasks: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 1, (tasks, len(POOL))).astype(np.float32).astype(float)


@settings(max_examples=25)
@given(data=st.data())
def test_the_parts_of_a_split_atlas_give_the_whole_back(data: st.DataObject) -> None:
    whole, n = numbers(), len(POOL)
    owner = np.array(
        data.draw(st.lists(st.lists(st.sets(st.integers(0, 2)), min_size=n, max_size=n), min_size=3, max_size=3))
    )
    with tempfile.TemporaryDirectory() as folder:
        root, parts = Path(folder), []
        for part in range(3):
            has = np.array([[part in owners for owners in row] for row in owner])
            columns = sorted(
                {*np.flatnonzero(has.any(axis=0)).tolist(), *data.draw(st.sets(st.integers(0, n - 1), min_size=1))}
            )
            pool = POOL.subset(POOL.ids.select(np.array(columns)))
            values = np.where(has, whole, np.nan)[:, columns]
            parts.append(make(root / f"{part}.atlas", values, pool=pool).path)
        sources = data.draw(st.permutations(parts))
        merged = merge(root / "merged.atlas", sources)
        assert validate(merged.path) == []
        expected = np.where(np.array([[bool(owners) for owners in row] for row in owner]), whole, np.nan)
        assert set(merged.tasks) == {f"t{i}" for i in range(3) if not np.isnan(expected[i]).all()}
        matrix, flips = merged.matrix(), merged.matrix(measure="exact_match")
        for task, row, flipped in zip(matrix.tasks, matrix.values, flips.values, strict=True):
            at = POOL.positions(matrix.examples)
            measured = expected[int(task[1:])][at]
            np.testing.assert_allclose(row, measured, atol=1e-6)
            np.testing.assert_array_equal(flipped, np.where(np.isnan(measured), np.nan, measured >= 0.5))
        assert all(POOL[int(i)] == merged.pool[j] for j, i in enumerate(POOL.positions(merged.pool.ids)))


def test_provenance_is_kept_and_says_where_a_row_comes_from(tmp_path: Path) -> None:
    one, other = make(tmp_path / "a.atlas", numbers()), make(tmp_path / "b.atlas", numbers(1), tasks=["x"])
    merged = merge(tmp_path / "m.atlas", [one.path, other.path])
    assert merged.tasks == ("t0", "t1", "t2", "x")
    facts = merged.provenance("x")
    origin = {"atlas": "b", "created": other.created, "pool": POOL.fingerprint}
    assert facts["merged_from"] == [origin]
    for name in ("added", "recipe", "seed"):
        assert facts[name] == other.provenance("x")[name]
    assert merged.recipe == {"steps": 3}
    again = merge(tmp_path / "again.atlas", [merged.path, other.path])
    assert [each["atlas"] for each in again.provenance("x")["merged_from"]] == ["b", "m"]
    np.testing.assert_array_equal(again.matrix().values, merged.matrix().values)


def test_other_examples_of_the_same_id_are_refused(tmp_path: Path) -> None:
    one = make(tmp_path / "a.atlas", numbers())
    changed = Pool([Example(e.id, text="other words", source=e.source) if e.id == "e5" else e for e in POOL])
    other = make(tmp_path / "text.atlas", numbers(), pool=changed)
    with pytest.raises(MismatchError, match=r"1 of 12 shared examples differ, e.g. 'e5' by text"):
        merge(tmp_path / "m.atlas", [one.path, other.path])
    losses = np.full(12, 3.0)
    losses[[2, 4]] += 0.01
    other = make(tmp_path / "loss.atlas", numbers(), base=losses)
    with pytest.raises(MismatchError, match=r"2 of 12 .* 'e2' by base loss \(3 and 3.01\)"):
        merge(tmp_path / "m.atlas", [one.path, other.path])
    assert not (tmp_path / "m.atlas").exists()
    close = make(tmp_path / "close.atlas", numbers(1), base=np.full(12, 3.00001), tasks=["x"])
    assert merge(tmp_path / "m.atlas", [one.path, close.path]).tasks == ("t0", "t1", "t2", "x")


def test_other_tokens_and_settings_are_refused(tmp_path: Path) -> None:
    one = make(tmp_path / "a.atlas", numbers(), tokenizer="t")
    other = make(tmp_path / "b.atlas", numbers(), tokenizer="u")
    with pytest.raises(MismatchError, match="scored differently: the tokenizer"):
        merge(tmp_path / "m.atlas", [one.path, other.path])
    before = replace(
        other.before, digests=["other", *list(other.before.digests or ())[1:]], metadata=one.before.metadata
    )
    Atlas.create(tmp_path / "c.atlas", POOL, before, model="base")
    with pytest.raises(MismatchError, match=r"1 of 12 .* 'e0' by tokens"):
        merge(tmp_path / "m.atlas", [one.path, tmp_path / "c.atlas"])


def test_another_base_is_refused_and_usable_as_a_prior(tmp_path: Path) -> None:
    one = make(tmp_path / "a.atlas", numbers())
    old = make(tmp_path / "old.atlas", numbers(2, seed=1), model_hash="h0", base=2.0)
    with pytest.raises(MismatchError, match=r"other base models.*--as-prior"):
        merge(tmp_path / "m.atlas", [one.path, old.path])
    merged = merge(tmp_path / "m.atlas", [one.path], priors=[old.path])
    assert merged.tasks == ("t0", "t1", "t2", "t0@old", "t1@old")
    np.testing.assert_array_equal(merged.matrix(["t0@old", "t1@old"]).values, old.matrix().values)
    facts = merged.provenance("t1@old")
    assert facts["prior"] is True
    assert facts["prior_base"] == {"model": "base", "model_hash": "h0"}
    assert merged.priors == ("t0@old", "t1@old")
    assert one.priors == ()
    assert validate(merged.path) == []
    with pytest.raises(MismatchError, match="without --as-prior"):
        merge(tmp_path / "n.atlas", [one.path], priors=[one.path])


def test_priors_are_said_where_rows_are_used(tmp_path: Path, run: RunCommand) -> None:
    one = make(tmp_path / "a.atlas", numbers())
    old = make(tmp_path / "old.atlas", numbers(2, seed=1), model_hash="h0")
    path = merge(tmp_path / "m.atlas", [one.path], priors=[old.path]).path
    facts = json.loads(run("atlas", "info", path, "--json")[1])
    assert facts["priors"] == 2
    assert [row["provenance"].get("prior", False) for row in facts["rows"]] == [False] * 3 + [True] * 2
    shown = run("atlas", "info", path)[1]
    assert "prior, of" in shown
    assert "prior, of" not in run("atlas", "info", one.path)[1]
    said = "2 of 5 rows are priors"
    assert said in run("analyze", path)[1]
    assert json.loads(run("analyze", path, "--json")[1])["priors"] == 2
    assert "priors" not in run("analyze", one.path)[1]

    probes = one.before.subset(["e1", "e5", "e9"])
    replace(probes, nll=probes.nll + 0.1).save(tmp_path / "probes.parquet")
    words = ("forecast", path, "--scores", tmp_path / "probes.parquet", "-o", tmp_path / "f.parquet")
    assert said in run(*words)[1]
    found = json.loads(run(*words, "--json")[1])
    assert (found["rows"], found["prior_rows"]) == (5, 2)
    stored = TaskForecast.load(tmp_path / "f.parquet")
    assert (stored.rows, stored.prior_rows) == (5, 2)
    assert "1 of 4 rows are priors" in run(*words, "--task", "t1@old")[1]


def test_of_a_prior_only_known_examples_are_taken(tmp_path: Path) -> None:
    part = POOL.subset(["e1", "e2"])
    one = make(tmp_path / "a.atlas", numbers()[:, 1:3], pool=part)
    old = make(tmp_path / "old.atlas", numbers(2, seed=1), model_hash="h0")
    merged = merge(tmp_path / "m.atlas", [one.path], priors=[old.path])
    assert merged.provenance("t0@old")["not_in_pool"] == 10
    np.testing.assert_array_equal(merged.matrix(["t0@old"]).values, old.matrix(["t0"]).values[:, 1:3])


def test_rows_of_one_name_with_other_numbers(tmp_path: Path, run: RunCommand) -> None:
    one, other = make(tmp_path / "a.atlas", numbers()), make(tmp_path / "b.atlas", numbers(seed=1))
    code, _, err = run("atlas", "merge", one.path, other.path, "-o", tmp_path / "m.atlas")
    assert code == 2
    assert "the row 't0'" in err
    assert "12 of their numbers differ" in err
    assert "--keep-both" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.atlas", "b.atlas"]
    code, out, _ = run("atlas", "merge", one.path, other.path, "-o", tmp_path / "m.atlas", "--keep-both")
    assert code == 0
    assert "6 tasks x 12 examples" in out
    assert Atlas.open(tmp_path / "m.atlas").tasks == ("t0", "t1", "t2", "t0@b", "t1@b", "t2@b")


def test_a_row_of_other_weights_is_another_row(tmp_path: Path) -> None:
    half = np.where(np.arange(12) < 6, numbers(1), np.nan)
    one, other = make(tmp_path / "a.atlas", half), make(tmp_path / "b.atlas", half, tasks=["t1"])
    rest = POOL.subset(POOL.ids[6:])
    for atlas, hash_ in ((one, "w0"), (other, "w1")):
        atlas.add(
            "weights",
            make_scores(
                rest if atlas is one else POOL, np.full(len(rest if atlas is one else POOL), 3.5), model_hash=hash_
            ),
        )
    with pytest.raises(MismatchError, match="other weights"):
        merge(tmp_path / "m.atlas", [one.path, other.path])


def test_without_common_examples_the_hash_has_to_say_that_the_base_is_the_same(tmp_path: Path) -> None:
    halves = [POOL.subset(POOL.ids[:6]), POOL.subset(POOL.ids[6:])]
    parts = [
        make(tmp_path / f"{i}", numbers()[:, :6], pool=half, model_hash=None).path for i, half in enumerate(halves)
    ]
    with pytest.raises(MismatchError, match="nothing says"):
        merge(tmp_path / "m.atlas", parts)


def test_target_is_new_or_refused_and_a_killed_merge_leaves_nothing(tmp_path: Path) -> None:
    one = make(tmp_path / "a.atlas", numbers())
    with pytest.raises(DataError, match="exists already"):
        merge(one.path, [one.path])
    (tmp_path / ".m.atlas.new").mkdir()
    (tmp_path / ".m.atlas.new/pool.parquet").touch()
    merge(tmp_path / "m.atlas", [one.path])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.atlas", "m.atlas"]


def test_between_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fsspec")
    monkeypatch.setenv("FORGETCAST_CACHE", str(tmp_path / "cache"))
    one = make(tmp_path / "a.atlas", numbers())
    merged = merge("memory://merged.atlas", [one.path])
    again = merge(tmp_path / "back.atlas", ["memory://merged.atlas"])
    np.testing.assert_array_equal(again.matrix().values, one.matrix().values)
    assert validate("memory://merged.atlas") == []
    assert merged.tasks == one.tasks
