"""`validate` finds every damage of an atlas and says which file it is, and never fails itself."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from forgetcast import Atlas, DataError, Pool
from forgetcast.atlas.validate import Finding, validate
from support.cli import RunCommand
from support.data import make_atlas, make_scores


@pytest.fixture
def atlas(tmp_path: Path, pool: Pool) -> Atlas:
    """Rows of one part, of two parts, with positions; a dropped one, and an outcome."""
    atlas = make_atlas(tmp_path / "a.atlas", pool, tasks=3)
    atlas.add("few", make_scores(pool.subset(["e3", "e1"]), np.array([3.5, 4.0])))
    atlas.add("few", make_scores(pool.subset(["e5"]), np.array([3.25])))
    atlas.drop("t1")
    atlas.add_replays([{"task": "t0", "seed": 1}])
    return atlas


def errors(findings: list[Finding]) -> list[str]:
    return [finding.file for finding in findings if finding.severity == "error"]


def test_a_whole_atlas_has_no_findings(atlas: Atlas) -> None:
    assert validate(atlas.path) == []
    atlas.compact()
    assert validate(atlas.path) == []


def flip(content: bytearray, rng: random.Random) -> None:
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def truncate(content: bytearray, rng: random.Random) -> None:
    del content[rng.randrange(len(content)) :]


def zero(content: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(content) - 8)
    content[start : start + 64] = bytes(len(content[start : start + 64]))


@pytest.mark.parametrize("damage", [flip, truncate, zero])
def test_damage_of_any_file_is_found_and_named(
    atlas: Atlas, damage: Callable[[bytearray, random.Random], None]
) -> None:
    rng, root = random.Random(0), Path(atlas.path)
    served = atlas.matrix().values
    for path in sorted(path for path in root.rglob("*") if path.is_file() and path.stat().st_size):
        content = path.read_bytes()
        for _ in range(10):
            damaged = bytearray(content)
            damage(damaged, rng)
            path.write_bytes(damaged)
            findings = validate(root)
            # White space of JSON carries nothing.
            same = path.suffix == ".json" and loads(damaged) == json.loads(content)
            assert damaged == content or same or path.relative_to(root).as_posix() in [f.file for f in findings]
            if not errors(findings):
                np.testing.assert_array_equal(Atlas.open(root).matrix().values, served)
        path.write_bytes(content)
    assert validate(root) == []


def loads(content: bytes | bytearray) -> object:
    try:
        return json.loads(content.decode())
    except ValueError:
        return None


def test_lost_and_exchanged_and_foreign_files_are_named(atlas: Atlas, tmp_path: Path) -> None:
    root = Path(atlas.path)
    t0, t2 = next((root / "rows/t0").iterdir()), next((root / "rows/t2").iterdir())
    lost = t0.read_bytes()
    t0.unlink()
    (finding,) = validate(root)
    assert finding.file == f"rows/t0/{t0.name}"
    assert "put back" in finding.message
    t0.write_bytes(t2.read_bytes())  # other numbers under its name
    assert errors(validate(root)) == [f"rows/t0/{t0.name}"]
    t0.write_bytes(lost)
    shutil.copy(t2, root / "rows/t0" / t2.name)  # another row's part
    findings = validate(root)
    assert errors(findings) == [f"rows/t0/{t2.name}"]
    (root / "rows/t0" / t2.name).unlink()
    other = make_atlas(tmp_path / "other.atlas", atlas.pool, tasks=1, seed=5)
    for name in ("pool.parquet", "before.parquet"):
        kept = (root / name).read_bytes()
        shutil.copy(other.path / name, root / name)
        (root / name).write_bytes((other.path / name).read_bytes() + b" ")
        assert errors(validate(root)) == [name]
        (root / name).unlink()
        assert name in errors(validate(root))
        (root / name).write_bytes(kept)
    (root / "rows/t0/notes.txt").write_text("mine")
    (root / "notes.txt").write_text("mine")
    assert {f.file: f.severity for f in validate(root)} == {"rows/t0/notes.txt": "error", "notes.txt": "note"}


def test_what_is_harmless_is_a_note(atlas: Atlas) -> None:
    root = Path(atlas.path)
    receipt = next((root / "receipts" / "t0").iterdir())
    receipt.unlink()
    (root / "rows/t0/.tmp-0-0-0.parquet").touch()
    findings = validate(root)
    assert [finding.severity for finding in findings] == ["note", "note"]


def test_an_atlas_without_its_index_is_checked_as_far_as_it_goes(atlas: Atlas) -> None:
    root = Path(atlas.path)
    (root / "atlas.json").unlink()
    part = next((root / "rows/t0").iterdir())
    part.write_bytes(part.read_bytes()[:-1])
    assert errors(validate(root)) == ["atlas.json", f"rows/t0/{part.name}"]


def test_no_atlas(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not an atlas"):
        validate(tmp_path)


def test_a_remote_atlas_is_read_anew(atlas: Atlas) -> None:
    fsspec = pytest.importorskip("fsspec")
    files = fsspec.filesystem("memory")
    url = "memory://validate.atlas"
    files.put(str(atlas.path), "/validate.atlas", recursive=True)
    Atlas.open(url).matrix()  # now there are copies
    assert validate(url) == []
    name = next(name for name in files.find("/validate.atlas") if "/rows/t0/" in name)
    files.pipe_file(name, files.cat_file(name)[:-1])
    (finding,) = validate(url)
    assert finding.file == name.removeprefix("/validate.atlas/")
    assert url in finding.message


def test_command(atlas: Atlas, run: RunCommand, tmp_path: Path) -> None:
    assert run("atlas", "validate", atlas.path)[0] == 0
    (Path(atlas.path) / "pool.parquet").write_bytes(b"PAR1")
    code, out, _ = run("atlas", "validate", atlas.path)
    assert code == 1
    assert "error: pool.parquet: " in out
    code, out, _ = run("atlas", "validate", atlas.path, "--json")
    content = json.loads(out)
    assert code == 1
    assert not content["whole"]
    assert content["findings"][0]["file"] == "pool.parquet"
    assert run("atlas", "validate", tmp_path)[0] == 2
