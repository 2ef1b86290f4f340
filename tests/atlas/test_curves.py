"""Learning curves in an atlas: rows after shares of the steps, which leave the rows themselves as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from forgetcast import Atlas, ConfigError, DataError, Pool
from forgetcast.atlas.merge import merge
from forgetcast.atlas.validate import validate
from support.cli import RunCommand
from support.data import make_atlas, make_scores


@pytest.fixture
def atlas(tmp_path: Path, pool: Pool) -> Atlas:
    """Two of three tasks have curves; one part of each of two measurements."""
    atlas = make_atlas(tmp_path / "a.atlas", pool, tasks=3)
    half = pool.subset(pool.ids[:12])
    for task in ("t0", "t2"):
        atlas.at(0.25).add(task, make_scores(half, np.full(12, 3.25)))
        atlas.at(0.25).add(task, make_scores(pool, np.full(24, 3.5)))
        atlas.at(0.5).add(task, make_scores(pool, np.full(24, 4.0)))
    return atlas


def test_rows_are_as_they_were(tmp_path: Path, pool: Pool, atlas: Atlas) -> None:
    plain = make_atlas(tmp_path / "plain.atlas", pool, tasks=3)
    opened = Atlas.open(atlas.path)
    assert opened.tasks == plain.tasks
    np.testing.assert_array_equal(opened.matrix().values, plain.matrix().values)
    assert opened.shares == (0.25, 0.5)
    assert plain.shares == ()
    view = opened.at(0.25)
    assert view.tasks == ("t0", "t2")
    np.testing.assert_array_equal(view.matrix().values, [[0.25] * 12 + [0.5] * 12] * 2)
    assert view.pool_fingerprint == plain.pool_fingerprint
    assert opened.at(0.75).tasks == ()
    assert opened.info()["curves"] == {"0.25": 2, "0.5": 2}
    assert validate(atlas.path) == []


def test_curves_go_where_their_rows_go(tmp_path: Path, atlas: Atlas) -> None:
    assert Atlas.open(atlas.path).compact() == 6  # two parts of each of two rows, and what says that they do not count
    assert Atlas.open(atlas.path).at(0.25).matrix().values[0, [0, 23]].tolist() == [0.25, 0.5]
    joined = merge(tmp_path / "joined.atlas", [atlas.path])
    assert joined.shares == atlas.shares
    for share in atlas.shares:
        assert joined.at(share).tasks == atlas.at(share).tasks
        np.testing.assert_array_equal(joined.at(share).matrix().values, atlas.at(share).matrix().values)
    assert validate(joined.path) == []
    atlas.drop("t0")
    assert [atlas.at(share).tasks for share in atlas.shares] == [("t2",), ("t2",)]
    assert validate(atlas.path) == []


def test_damage_is_found(atlas: Atlas, run: RunCommand) -> None:
    part = next((Path(atlas.path) / "curves" / "0.5" / "rows" / "t0").iterdir())
    content = part.read_bytes()
    part.write_bytes(content[:-20])
    assert [finding.file for finding in validate(atlas.path)] == [part.relative_to(atlas.path).as_posix()]
    part.unlink()
    (found,) = validate(atlas.path)
    assert "was stored and is lost" in found.message
    command = found.message.rpartition("forgetcast ")[2].split()
    with pytest.raises(DataError, match="has lost"):
        atlas.at(0.5).matrix()
    assert run(*command)[0] == 0  # what it says helps
    assert validate(atlas.path) == []
    (Path(atlas.path) / "curves" / "soon").mkdir()
    with pytest.raises(DataError, match="is not named after a share of a fine-tune; move it elsewhere"):
        _ = atlas.shares
    assert [finding.file for finding in validate(atlas.path)] == ["curves/soon"]


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, float("nan"), 0.12345678])
def test_shares_that_are_none_are_refused(atlas: Atlas, share: float) -> None:
    with pytest.raises(ConfigError, match="a share of the steps is above 0 and below 1"):
        atlas.at(share)
