from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from forgetcast import Atlas, DataError, Example, MismatchError, Pool
from forgetcast.atlas.index import check_writable
from forgetcast.files import with_digest
from support.data import make_atlas, make_scores
from support.dying import add_row, add_row_slowly
from support.processes import exit_code, start


def test_rows_survive_a_file(tmp_path: Path, pool: Pool) -> None:
    atlas = make_atlas(tmp_path / "a.atlas", pool)
    read = Atlas.open(tmp_path / "a.atlas")
    np.testing.assert_array_equal(read.matrix().values, atlas.matrix().values)
    assert read.tasks == tuple(f"t{i}" for i in range(8))
    assert read.matrix(["t3", "t1"]).tasks == ("t3", "t1")
    assert read.provenance("t3")["name"] == "t3"
    dataset = read.to_xarray()
    np.testing.assert_array_equal(dataset.forgetting.sel(task="t2").values, read.matrix(["t2"]).values[0])
    assert dict(dataset.sizes) == {"task": 8, "example": len(pool)}


def test_rows_of_one_task_are_a_group(tmp_path: Path, pool: Pool) -> None:
    atlas = make_atlas(tmp_path / "a.atlas", pool, tasks=3)
    after = make_scores(pool, np.full(len(pool), 4.0))
    atlas.add("t1 seed 1", after, provenance={"task": "t1", "seed": 1})
    atlas.add("t1 seed 2", after, provenance={"task": "t1", "seed": 2})
    groups = ("t0", "t1", "t2", "t1", "t1")
    assert atlas.stored().groups == atlas.matrix().groups == groups
    assert atlas.stored(["t1 seed 2", "t0"]).groups == ("t1", "t0")
    assert atlas.others(None) == atlas.tasks
    assert atlas.others("new") == atlas.tasks
    assert atlas.others("t1") == atlas.others("t1 seed 2") == ("t0", "t2")


def test_row_can_be_measured_in_parts(tmp_path: Path, pool: Pool) -> None:
    atlas = make_atlas(tmp_path / "a.atlas", pool, tasks=1)
    part = pool.subset(["e7", "e2"])
    atlas.add("probed", make_scores(part, np.array([3.5, 4.0])))
    row = atlas.matrix(["probed"]).values[0]
    assert (row[7], row[2]) == (0.5, 1.0)
    assert np.isnan(np.delete(row, [2, 7])).all()
    assert not atlas.is_complete("probed")
    atlas.add("probed", make_scores(pool, np.full(len(pool), 9.0)))
    row = Atlas.open(atlas.path).matrix(["probed"]).values[0]
    assert (row[7], row[2], row[0]) == (0.5, 1.0, 6.0), "an entry that was measured is kept"
    assert atlas.is_complete("probed")


def test_a_right_answer_that_becomes_wrong_is_forgotten(tmp_path: Path, pool: Pool) -> None:
    """Oracle: the paper's rule, example by example."""
    rng = np.random.default_rng(0)
    losses = np.full(len(pool), 3.0)

    def answers() -> np.ndarray:
        drawn = rng.choice([0.0, 1.0], len(pool))
        return np.where(np.arange(len(pool)) % 4 == 3, np.nan, drawn)  # not everything is a question

    before, rows = answers(), {"a": answers(), "b": answers()}
    scores = replace(make_scores(pool, losses), exact_match=before)
    atlas = Atlas.create(tmp_path / "a.atlas", pool, scores, model="base")
    atlas.add("a", replace(make_scores(pool, losses), exact_match=rows["a"]))
    atlas.add("b", make_scores(pool, losses))
    assert atlas.is_complete("a")
    assert not atlas.is_complete("b"), "the answers are missing"
    assert atlas.matrix(["b"]).observed.all()
    part = [i for i in range(len(pool)) if i != 4]
    few = pool.subset([pool.ids[i] for i in part])
    atlas.add("b", replace(make_scores(few, losses[part]), exact_match=rows["b"][part]))
    read = Atlas.open(atlas.path)
    found = read.matrix(measure="exact_match")
    assert found.examples == tuple(id_ for id_, right in zip(pool.ids, before, strict=True) if right == 1)
    for name, after in rows.items():
        for id_, value in zip(found.examples, found.values[found.tasks.index(name)], strict=True):
            i = pool.ids.index(id_)
            if name == "b" and i == 4:
                assert np.isnan(value)
            else:
                assert value == (after[i] == 0)
    assert 0 < np.nanmean(found.values) < 1
    flipped = read.to_xarray().flipped.sel(task="a").values
    np.testing.assert_array_equal(flipped[before == 1], found.values[0])
    assert np.isnan(flipped[before != 1]).all()
    # What was measured is kept.
    atlas.add("a", replace(make_scores(pool, losses + 1), exact_match=1 - rows["a"]))
    np.testing.assert_array_equal(Atlas.open(atlas.path).matrix(measure="exact_match").values[0], found.values[0])


def test_missing_answers(tmp_path: Path, pool: Pool) -> None:
    atlas = make_atlas(tmp_path / "a.atlas", pool, tasks=1)
    atlas.add("answered", replace(make_scores(pool, np.full(len(pool), 4.0)), exact_match=np.ones(len(pool))))
    assert atlas.is_complete("answered")
    assert "flipped" not in atlas.to_xarray()
    with pytest.raises(DataError, match="has no answers; collect one with exact_match: true"):
        atlas.matrix(measure="exact_match")
    none_right = replace(make_scores(pool, np.full(len(pool), 3.0)), exact_match=np.zeros(len(pool)))
    empty = Atlas.create(tmp_path / "b.atlas", pool, none_right, model="base")
    with pytest.raises(DataError, match="answers nothing right"):
        empty.matrix(measure="exact_match")


def test_a_row_without_a_number_is_refused(tmp_path: Path, pool: Pool) -> None:
    """Oracle: nothing is stored, and the atlas stays readable."""
    atlas = make_atlas(tmp_path / "a.atlas", pool, tasks=1)
    scores = make_scores(pool, np.full(len(pool), 4.0))
    nothing = replace(scores, nll=np.full(len(pool), np.nan), reasons=["too long"] * len(pool))
    files = sorted(atlas.path.rglob("*"))
    for bad, options in ((nothing, {}), (scores, {"examples": []})):
        with pytest.raises(DataError, match="no loss of an example that the base model could score"):
            atlas.add("empty", bad, **options)
    huge = replace(scores, nll=np.where(np.arange(len(pool)) == 3, 1e39, 4.0))
    with pytest.raises(DataError, match=r"forgetting of example 'e3' is 1e\+39: too large"):
        atlas.add("huge", huge)
    assert sorted(atlas.path.rglob("*")) == files


def test_mismatched_scores_are_rejected_without_a_change(tmp_path: Path, pool: Pool) -> None:
    atlas = make_atlas(tmp_path / "a.atlas", pool)
    before = {p: p.read_bytes() for p in atlas.path.rglob("*") if p.is_file()}
    changed = Pool([Example("e0", text="another text"), *pool[1:]])
    unknown = Pool([Example("nobody", text="x")])
    for bad in (changed, changed.subset(["e0", "e1"]), unknown):
        with pytest.raises(MismatchError):
            atlas.add("new", make_scores(bad, np.full(len(bad), 4.0)))
    with pytest.raises(DataError, match="exists already"):
        Atlas.create(atlas.path, pool, atlas.before, model="base")
    with pytest.raises(MismatchError, match="another pool"):
        Atlas.create(tmp_path / "b.atlas", changed, atlas.before, model="base")
    assert {p: p.read_bytes() for p in atlas.path.rglob("*") if p.is_file()} == before
    assert not (tmp_path / "b.atlas").exists()


def test_open_reports_invalid_files(tmp_path: Path, pool: Pool) -> None:
    with pytest.raises(DataError, match="not an atlas"):
        Atlas.open(tmp_path)
    atlas = make_atlas(tmp_path / "a.atlas", pool, tasks=1)
    written = (atlas.path / "atlas.json").read_text()
    index = json.loads(written)
    for changed, message in (
        (index | {"format": 99}, r"atlas.json is of format 99, and this version reads up to 2; upgrade"),
        (index | {"format": True}, r"atlas.json is not that of an atlas: its format is True"),
        (index | {"model": "another"}, r"atlas.json was damaged or edited after it was written"),
        (
            with_digest({n: v for n, v in index.items() if n not in ("digest", "pool")}),
            r"atlas.json: the field 'pool' is missing",
        ),
        ([], "not that of an atlas"),
    ):
        (atlas.path / "atlas.json").write_text(json.dumps(changed))
        with pytest.raises(DataError, match=message):
            Atlas.open(atlas.path)
    (atlas.path / "atlas.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        Atlas.open(atlas.path)
    (atlas.path / "atlas.json").write_text(written)
    pool.subset(pool.ids[1:]).save(atlas.path / "pool.parquet")
    with pytest.raises(MismatchError, match=r"pool.parquet is not the file that the atlas was created with"):
        Atlas.open(atlas.path)
    (atlas.path / "before.parquet").unlink()
    pool.save(atlas.path / "pool.parquet")
    with pytest.raises(DataError, match=r"before.parquet is missing"):
        Atlas.open(atlas.path)


def test_two_writers_at_a_time(tmp_path: Path, pool: Pool) -> None:
    atlas = make_atlas(tmp_path / "a.atlas", pool, tasks=2)
    process, connection = start(add_row_slowly, atlas.path)
    assert connection.recv() == "writing"
    atlas.add("late", make_scores(pool, np.full(len(pool), 4.0)))
    assert Atlas.open(atlas.path).tasks == ("t0", "t1", "late")
    connection.send("go on")
    process.join()
    assert process.exitcode == 0
    read = Atlas.open(atlas.path)
    assert sorted(read.tasks) == ["late", "slow", "t0", "t1"]
    assert read.is_complete("slow")
    assert read.is_complete("late")


@pytest.mark.parametrize("answers", [False, True])
def test_a_crash_anywhere_leaves_a_readable_atlas(tmp_path: Path, pool: Pool, answers: bool) -> None:
    atlas = make_atlas(tmp_path / "a.atlas", pool, tasks=2)
    if answers:
        before = replace(atlas.before, exact_match=np.ones(len(pool)))
        again = Atlas.create(tmp_path / "b.atlas", pool, before, model="base")
        for name in atlas.tasks:
            after = make_scores(pool, 3.0 + atlas.matrix([name]).values[0])
            again.add(name, replace(after, exact_match=np.ones(len(pool))))
        atlas = again
    kept = atlas.matrix().values
    codes = []
    for operations in range(20):
        codes.append(exit_code(add_row, atlas.path, operations))
        read = Atlas.open(atlas.path)
        np.testing.assert_array_equal(read.matrix(["t0", "t1"]).values, kept)
        assert read.to_xarray().sizes["task"] == len(read.tasks)
        if answers:
            np.testing.assert_array_equal(read.matrix(["t0", "t1"], measure="exact_match").values, 0)
        if codes[-1] == 0:
            break
        assert read.tasks in (("t0", "t1"), ("t0", "t1", "crashed"))
    assert codes[-1] == 0
    assert codes.count(9) >= 3, "the crash must have been tried at several operations"
    np.testing.assert_array_equal(Atlas.open(atlas.path).matrix(["crashed"]).values, np.full((1, len(pool)), 2.0))
    assert Atlas.open(atlas.path).is_complete("crashed")
    if answers:
        np.testing.assert_array_equal(Atlas.open(atlas.path).matrix(["crashed"], measure="exact_match").values, 1)


def test_a_place_is_tried_and_left_as_it_was(tmp_path: Path, pool: Pool) -> None:
    make_atlas(tmp_path / "there.atlas", pool, tasks=1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    before = sorted(tmp_path.rglob("*"))
    check_writable(tmp_path / "there.atlas")
    check_writable(tmp_path / "new" / "a.atlas")
    for place in ("other", "other/notes.txt", "other/notes.txt/a.atlas"):
        with pytest.raises(DataError, match=re.escape(str(tmp_path / place))):
            check_writable(tmp_path / place)
    assert sorted(tmp_path.rglob("*")) == before


def test_importing_the_atlas_loads_no_heavy_library() -> None:
    heavy = ("zarr", "xarray", "fsspec", "pyarrow.dataset", "torch")
    code = f"import sys, forgetcast.atlas; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
