"""What happens to files behind the atlas's back is an error or makes no difference; no other number is ever served."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forgetcast import Atlas, DataError, Pool
from forgetcast.atlas import rows
from forgetcast.errors import ForgetcastError
from support.data import make_atlas, make_scores

Damage = Callable[[bytearray, random.Random], None]


def flip(content: bytearray, rng: random.Random) -> None:
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def truncate(content: bytearray, rng: random.Random) -> None:
    del content[rng.randrange(len(content)) :]


def zero(content: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(content))
    end = min(start + 64, len(content))
    content[start:end] = bytes(end - start)


def everything(location: Path) -> list[Any]:
    atlas = Atlas.open(location)
    provenance = [atlas.provenance(task) for task in atlas.tasks]
    facts = (atlas.tasks, atlas.model, atlas.recipe, provenance, atlas.scored_with, list(atlas.examples))
    return [*facts, atlas.matrix().values.tobytes(), atlas.nll_before.tobytes(), atlas.subset(["e3"])[0]]


@pytest.mark.parametrize("checked_whole", [True, False])
@pytest.mark.parametrize("damage", [flip, truncate, zero])
def test_damaged_bytes_are_noticed_or_harmless(
    tmp_path: Path, pool: Pool, damage: Damage, checked_whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not checked_whole:
        monkeypatch.setattr(rows, "CHECKED_WHOLE", 0)
    atlas = make_atlas(tmp_path / "a.atlas", pool, tasks=3)
    atlas.add("few", make_scores(pool.subset(["e3", "e1"]), np.array([3.5, 4.0])))
    intact, rng, messages = everything(tmp_path / "a.atlas"), random.Random(0), []
    files = [path for path in sorted(atlas.path.rglob("*")) if path.is_file() and path.stat().st_size]
    for file in files:
        content = file.read_bytes()
        for _ in range(40):
            damaged = bytearray(content)
            damage(damaged, rng)
            file.write_bytes(damaged)
            try:
                assert everything(tmp_path / "a.atlas") == intact
            except ForgetcastError as error:
                messages.append(str(error))
        file.write_bytes(content)
    assert len(messages) > 30 * len(files)
    assert all("a.atlas" in message for message in messages), "a message names the file"


def test_lost_files_are_errors(tmp_path: Path, pool: Pool) -> None:
    atlas = make_atlas(tmp_path / "a.atlas", pool, tasks=3)
    part = next((atlas.path / "rows" / "t1").iterdir())
    kept = part.read_bytes()
    part.unlink()
    read = Atlas.open(atlas.path)
    assert set(read.tasks) == {"t0", "t1", "t2"}
    for use in (read.matrix, lambda: read.is_complete("t1"), lambda: read.provenance("t1")):
        with pytest.raises(DataError, match=r"row 't1' of .*a.atlas has lost rows/t1/\d+-.*put back a copy"):
            use()
    assert read.matrix(["t0", "t2"]).shape == (2, len(pool)), "the other rows can be read"
    shutil.rmtree(part.parent)
    with pytest.raises(DataError, match="has lost"):
        Atlas.open(atlas.path).matrix()
    part.parent.mkdir()
    part.write_bytes(kept)
    assert Atlas.open(atlas.path).tasks == ("t0", "t1", "t2")
    part.unlink()
    read.drop("t1", reason="lost")
    assert Atlas.open(atlas.path).matrix().tasks == ("t0", "t2")
    read.add("t1", make_scores(pool, np.full(len(pool), 4.0)))
    assert Atlas.open(atlas.path).is_complete("t1")


def test_exchanged_files_are_errors(tmp_path: Path, pool: Pool) -> None:
    atlas = make_atlas(tmp_path / "a.atlas", pool, tasks=3)
    one, other = (next((atlas.path / "rows" / name).iterdir()) for name in ("t0", "t1"))
    contents = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])
    with pytest.raises(DataError, match="holds other numbers than its name says"):
        Atlas.open(atlas.path).matrix()
    one.write_bytes(contents[0])
    other.unlink()
    (other.parent / one.name).write_bytes(contents[0])
    with pytest.raises(DataError, match="has lost rows/t1"):
        Atlas.open(atlas.path).matrix()
    for receipt in (atlas.path / "receipts" / "t1").iterdir():
        receipt.unlink()
    with pytest.raises(DataError, match="is a part of the row 't0'; move it back"):
        Atlas.open(atlas.path).matrix()
    (atlas.path / "receipts" / "note").touch()
    with pytest.raises(DataError, match="receipts/note is no receipt; move it elsewhere"):
        Atlas.open(atlas.path).matrix()
    (atlas.path / "receipts" / "note").unlink()
    (other.parent / "notes.txt").write_text("a note")
    with pytest.raises(DataError, match=r"notes.txt is no part of an atlas; move it elsewhere"):
        _ = Atlas.open(atlas.path).tasks


def test_rows_of_another_atlas_are_refused(tmp_path: Path, pool: Pool) -> None:
    atlas = make_atlas(tmp_path / "a.atlas", pool, tasks=1)
    other = Atlas.create(tmp_path / "b.atlas", pool, make_scores(pool, np.full(len(pool), 2.0)), model="another")
    other.add("t9", make_scores(pool, np.full(len(pool), 2.5)))
    shutil.copytree(other.path / "rows" / "t9", atlas.path / "rows" / "t9")
    with pytest.raises(DataError, match=r"rows/t9/.* was measured against other base scores"):
        Atlas.open(atlas.path).matrix()


def test_a_row_can_be_dropped_and_measured_again(tmp_path: Path, pool: Pool) -> None:
    atlas = make_atlas(tmp_path / "a.atlas", pool, tasks=2)
    few = pool.subset(["e3", "e1"])
    atlas.add("few", make_scores(few, np.array([3.5, 4.0])))
    atlas.add("few", make_scores(pool, np.full(len(pool), 5.0)))
    values = atlas.matrix().values
    atlas.drop("t0", reason="wrong data")
    assert atlas.tasks == ("t1", "few")
    assert list((atlas.path / "rows" / "t0").glob("*.parquet")), "what was dropped is kept"
    # A part of t0 and the file that says so; two parts of `few`, now joined, and the file that says so.
    assert atlas.compact() == 5
    assert not (atlas.path / "rows" / "t0").exists()
    read = Atlas.open(atlas.path)
    np.testing.assert_array_equal(read.matrix(["t1", "few"]).values, values[1:])
    assert len(list((atlas.path / "rows" / "few").iterdir())) == 1
    atlas.add("t0", make_scores(pool, np.full(len(pool), 9.0)))
    np.testing.assert_array_equal(Atlas.open(atlas.path).matrix(["t0"]).values, np.full((1, len(pool)), 6.0))
    assert atlas.compact() == 0


@pytest.mark.parametrize(
    "name",
    [
        "Law",
        "a/b",
        "../../x",
        "..",
        ".",
        "con.",
        "ä" * 60,
        "x" * 250,
        "a b",
        "~",
        "~replays",
        "\x1b[31m",
        "a+b",
        "-",
        "%41",
    ],
)
def test_any_name_is_a_row_of_its_own(tmp_path: Path, pool: Pool, name: str) -> None:
    """Oracle: a folder of a portable name below `rows`, and the name as it was given."""
    atlas = make_atlas(tmp_path / "a.atlas", pool, tasks=1)
    atlas.add(name, make_scores(pool, np.full(len(pool), 4.0)))
    assert Atlas.open(atlas.path).tasks == ("t0", name)
    folders = {path.name for path in (atlas.path / "rows").iterdir()}
    assert len(folders) == 2
    (new,) = folders - {"t0"}
    assert len(new) <= 100
    assert not set(new) & set('/\\\x1b:*?"<>|+ ')
    assert not new.startswith(".")
    assert not list(tmp_path.glob("x*"))


def test_names_that_differ_in_case_only(tmp_path: Path, pool: Pool) -> None:
    atlas = make_atlas(tmp_path / "a.atlas", pool, tasks=1)
    after = make_scores(pool, np.full(len(pool), 4.0))
    atlas.add("T0", after)
    assert Atlas.open(atlas.path).tasks == ("t0", "T0")
    # As on a file system that ignores case: both rows' files are in one folder.
    for file in (atlas.path / "rows" / "T0").iterdir():
        shutil.copy(file, atlas.path / "rows" / "t0")
    shutil.rmtree(atlas.path / "rows" / "T0")
    with pytest.raises(DataError, match="a part of the row 'T0', whose name differs in case"):
        Atlas.open(atlas.path).add("t0", after)


def test_a_lost_replay_is_an_error(tmp_path: Path, pool: Pool) -> None:
    atlas = make_atlas(tmp_path / "a.atlas", pool, tasks=1)
    atlas.add_replays([{"task": "t0", "seed": 0}, {"task": "t0", "seed": 1}])
    file = sorted((atlas.path / "replays").iterdir())[0]
    file.unlink()
    with pytest.raises(DataError, match=rf"has lost replays/{file.name}; put back a copy"):
        _ = Atlas.open(atlas.path).replays
