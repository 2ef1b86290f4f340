"""Atlases of format 1 open, and are converted without a change of a number."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from forgetcast import Atlas, DataError, Pool
from forgetcast.atlas import rows
from forgetcast.atlas.validate import validate
from support.data import make_scores

zarr = pytest.importorskip("zarr")


@pytest.fixture
def old(tmp_path: Path, pool: Pool) -> tuple[Path, np.ndarray]:
    """Written as version 0.1 did it: plain Parquet files, Zarr arrays, an index with the tasks."""
    path = tmp_path / "old.atlas"
    path.mkdir()
    before = replace(make_scores(pool, np.full(len(pool), 3.0)), exact_match=np.ones(len(pool)))
    for name, saved in (("pool", pool), ("before", before)):
        saved.save(path / f"{name}.parquet")
        table = pq.read_table(path / f"{name}.parquet")
        metadata = {k: v for k, v in (table.schema.metadata or {}).items() if k == b"forgetcast"}
        pq.write_table(table.replace_schema_metadata(metadata), path / f"{name}.parquet")
    values = np.random.default_rng(0).normal(size=(3, len(pool))).astype(np.float32)
    values[2, 2:] = np.nan
    flipped = np.zeros_like(values[:2])
    for group, name, array in (("numbers.zarr", "forgetting", values), ("answers.zarr", "flipped", flipped)):
        stored = zarr.create_group(path / group).create_array(
            name, shape=array.shape, chunks=(1, 24), dtype="float32", fill_value=np.nan
        )
        stored[:] = array
    tasks = [{"name": f"t {i}", "added": "2026-01-01", "recipe": {"steps": i}, "model_hash": None} for i in range(3)]
    index = {"format": 1, "model": "base", "model_hash": None, "pool": pool.fingerprint, "recipe": {}}
    (path / "atlas.json").write_text(json.dumps({**index, "created": "2026-01-01", "tasks": tasks}))
    (path / "replays.json").write_text(json.dumps([{"task": "t 0", "seed": 1}]))
    return path, values


def check(atlas: Atlas, values: np.ndarray) -> None:
    assert atlas.tasks == ("t 0", "t 1", "t 2")
    np.testing.assert_array_equal(atlas.matrix().values, values)
    np.testing.assert_array_equal(atlas.matrix(["t 0", "t 1"], measure="exact_match").values, 0)
    assert atlas.provenance("t 1")["recipe"] == {"steps": 1}
    assert atlas.replays == [{"task": "t 0", "seed": 1}]
    assert not atlas.is_complete("t 2")


def test_reading_changes_nothing(old: tuple[Path, np.ndarray]) -> None:
    path, values = old
    files = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    atlas = Atlas.open(path)
    check(atlas, values)
    assert atlas.format == 1
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == files


def test_it_is_converted_when_a_row_is_added(old: tuple[Path, np.ndarray], pool: Pool) -> None:
    path, values = old
    atlas = Atlas.open(path)
    atlas.add("new", make_scores(pool, np.full(len(pool), 4.0)))
    read = Atlas.open(path)
    assert read.format == 2
    assert read.tasks == ("t 0", "t 1", "t 2", "new")
    read.drop("new")
    check(read, values)
    assert read.compact() > 0
    check(Atlas.open(path), values)
    assert sorted(p.name for p in path.iterdir()) == [
        "atlas.json",
        "before.parquet",
        "pool.parquet",
        "receipts",
        "replays",
        "rows",
    ]


def test_an_interrupted_conversion_is_repeated(old: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    path, values = old
    write_part, written = rows.write_part, 0

    def failing(*arguments: object, **settings: object) -> None:
        nonlocal written
        written += 1
        if written == 2:
            raise OSError("the disk is full")
        write_part(*arguments, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(rows, "write_part", failing)
    with pytest.raises(OSError, match="the disk is full"):
        Atlas.open(path).convert()
    check(Atlas.open(path), values)
    assert Atlas.open(path).format == 1
    Atlas.open(path).convert()
    check(Atlas.open(path), values)
    assert Atlas.open(path).format == 2


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tasks", None, "tasks: must be a list, not null"),
        ("tasks", [{"name": 3, "added": ""}], r"tasks.0.name: must be text, not 3"),
        ("tasks", [{"name": "a", "added": ""}] * 2, "tasks: a name is empty or occurs twice"),
        ("model", 3, "model: must be text, not 3"),
        ("created", None, "created: must be text, not null"),
    ],
)
def test_a_damaged_index_is_refused(old: tuple[Path, np.ndarray], field: str, value: object, message: str) -> None:
    path, _ = old
    index = json.loads((path / "atlas.json").read_text())
    (path / "atlas.json").write_text(json.dumps(index | {field: value}))
    with pytest.raises(DataError, match=f"atlas.json: {message}"):
        Atlas.open(path)


def test_damaged_arrays_are_one_line(old: tuple[Path, np.ndarray]) -> None:
    path, _ = old
    (path / "numbers.zarr" / "forgetting" / "c" / "1" / "0").write_bytes(b"nothing that zstd knows")
    with pytest.raises(DataError, match=r"old.atlas: its Zarr arrays cannot be read"):
        Atlas.open(path).matrix()
    (path / "numbers.zarr" / "forgetting" / "zarr.json").write_text("{")
    with pytest.raises(DataError, match=r"old.atlas: its Zarr arrays cannot be read"):
        Atlas.open(path)


def test_validate_reads_what_it_has(old: tuple[Path, np.ndarray]) -> None:
    path, _ = old
    assert validate(path) == []
    chunk = next(file for file in sorted((path / "numbers.zarr").rglob("*")) if file.is_file() and "c" in file.parts)
    chunk.write_bytes(b"damaged")
    assert [finding.file for finding in validate(path)] == ["numbers.zarr"]
    Atlas.open(path)  # it opens all the same
