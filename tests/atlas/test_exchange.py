"""A data set that was exported gives an equal atlas back; others read it; what is wrong with one is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from forgetcast import Atlas, DataError, Pool
from forgetcast.atlas.exchange import export_dataset, import_dataset
from forgetcast.atlas.validate import validate
from support.cli import RunCommand
from support.data import make_pool, make_scores

HOSTILE = "law | <script>alert(1)</script>\n---\n# @everyone [x](http://evil)"


@pytest.fixture
def atlas(tmp_path: Path, pool: Pool) -> Atlas:
    """Rows with gaps, in several parts, with answers, and a name that is no file's."""
    n = len(pool)
    before = make_scores(pool, np.full(n, 3.0), model_hash="abc", tokenizer="t")
    before = replace(before, exact_match=np.ones(n), digests=[f"d{i}" for i in range(n)])
    atlas = Atlas.create(tmp_path / "a.atlas", pool, before, model="/home/someone/models/base-1b", recipe={"steps": 5})
    rng = np.random.default_rng(0)
    for name in ("t0", HOSTILE):
        after = replace(make_scores(pool, 3 + rng.random(n)), exact_match=rng.integers(0, 2, n).astype(float))
        atlas.add(name, after, recipe={"method": "lora"}, provenance={"seed": 3})
    for ids in (["e3", "e1"], ["e7"]):
        atlas.add("few", make_scores(pool.subset(ids), 3 + rng.random(len(ids))))
    atlas.add_replays([{"task": "t0", "seed": 1}, {"task": "t0", "seed": 2}])
    return atlas


def facts(atlas: Atlas) -> tuple[Any, ...]:
    provenance = []
    for task in atlas.tasks:
        info, _ = atlas.read_row(task)
        inner = [{k: v for k, v in part.items() if k != "base"} for part in info.get("parts", [])]
        provenance.append({k: v for k, v in info.items() if k not in ("base", "parts")} | {"inner": inner})
    return (atlas.tasks, provenance, atlas.model, atlas.model_hash, atlas.recipe, atlas.replays, list(atlas.pool))


def check_equal(one: Atlas, other: Atlas) -> None:
    assert facts(one) == facts(other)
    np.testing.assert_array_equal(one.matrix().values, other.matrix().values)
    measured = (one.matrix(measure="exact_match"), other.matrix(measure="exact_match"))
    np.testing.assert_array_equal(measured[0].values, measured[1].values)
    assert one.pool.fingerprint == other.pool.fingerprint
    assert one.before.metadata == other.before.metadata
    np.testing.assert_array_equal(one.before.nll, other.before.nll)
    assert one.before.digests == other.before.digests


def test_there_and_back(atlas: Atlas, tmp_path: Path) -> None:
    export_dataset(atlas, tmp_path / "shared")
    back = import_dataset(tmp_path / "shared", tmp_path / "b.atlas")
    check_equal(atlas, back)
    assert validate(back.path) == []
    export_dataset(back, tmp_path / "again")
    check_equal(atlas, import_dataset(tmp_path / "again", tmp_path / "c.atlas"))


def test_from_a_url(atlas: Atlas, tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    export_dataset(atlas, tmp_path / "shared")
    fsspec.filesystem("memory").put(str(tmp_path / "shared"), "/shared", recursive=True)
    check_equal(atlas, import_dataset("memory://shared", tmp_path / "b.atlas"))
    with pytest.raises(DataError, match=r"forgetting\.parquet is missing"):
        import_dataset("memory://nothing", tmp_path / "c.atlas")


def test_datasets_reads_it(atlas: Atlas, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    export_dataset(atlas, tmp_path / "shared")
    cache = str(tmp_path / "cache")
    rows = datasets.load_dataset(str(tmp_path / "shared"), split="train", cache_dir=cache)
    assert rows["task"][:] == list(atlas.tasks)
    values = np.array([[np.nan if x is None else x for x in row] for row in rows["forgetting"]], dtype=np.float32)
    np.testing.assert_array_equal(values, atlas.matrix().values)
    pool = datasets.load_dataset(str(tmp_path / "shared"), "pool", split="train", cache_dir=cache)
    assert pool["id"][:] == list(atlas.examples)
    before = datasets.load_dataset(str(tmp_path / "shared"), "before", split="train", cache_dir=cache)
    assert before["nll"][:] == atlas.nll_before.tolist()


def test_the_card_is_yaml_and_escaped_markdown_without_private_paths(atlas: Atlas, tmp_path: Path) -> None:
    export_dataset(atlas, tmp_path / "shared")
    card = (tmp_path / "shared/README.md").read_text()
    _, header, body = card.split("---\n", 2)
    content = yaml.safe_load(header)
    assert [each["config_name"] for each in content["configs"]] == ["forgetting", "pool", "before"]
    assert content["size_categories"] == ["n<1K"]
    assert "/home/someone" not in card
    assert "base-1b" in body
    assert "<script>" not in body
    assert "\n# @" not in body
    assert "[x](" not in body
    assert sum(line.startswith("| ") for line in body.splitlines()) == 1 + len(atlas.tasks)


def test_what_does_not_fit_is_refused_and_leaves_nothing(atlas: Atlas, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    export_dataset(atlas, shared)
    rows = shared / "forgetting.parquet"
    content = rows.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(DataError, match=message):
            import_dataset(shared, tmp_path / "b.atlas")
        assert {path.name for path in tmp_path.iterdir()} == {"a.atlas", "shared"}
        rows.write_bytes(content)

    rows.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    refused("damaged or changed")
    table = pq.read_table(rows)
    metadata = {b"forgetcast": table.schema.metadata[b"forgetcast"]}
    for column, values, message in (
        ("forgetting", [[1.0]] * 3, "has 1 numbers for 24"),
        ("forgetting", [[float("inf")] * 24] * 3, "numbers that it cannot have"),
        ("flipped", [[0.5] * 24] * 3, "numbers that it cannot have"),
        ("provenance", ["[]"] * 3, "provenance"),
        ("provenance", ["{}"] * 3, "name"),
        ("provenance", [None] * 3, "no JSON object"),
        ("task", ["t0"] * 3, "provenance is that of"),
    ):
        at = table.schema.get_field_index(column)
        changed = table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))
        pq.write_table(changed.replace_schema_metadata(metadata), rows)
        refused(message)
    pq.write_table(pa.concat_tables([table, table]).replace_schema_metadata(metadata), rows)
    refused("occurs twice")
    pq.write_table(table.replace_schema_metadata({}), rows)
    refused("was not exported by")
    make_pool(23).save(shared / "pool.parquet")
    refused("another pool")


def test_commands(atlas: Atlas, tmp_path: Path, run: RunCommand) -> None:
    code, out, _ = run("atlas", "export", atlas.path, "-o", tmp_path / "shared")
    assert code == 0
    assert "README.md" in out
    assert run("atlas", "export", atlas.path, "-o", tmp_path / "shared")[0] == 2
    code, out, _ = run("atlas", "import", tmp_path / "shared", "-o", tmp_path / "b.atlas")
    assert code == 0
    assert "3 tasks x 24 examples" in out
    np.save(tmp_path / "z.npy", np.eye(3))
    code, _, err = run("atlas", "import", tmp_path / "z.npy", "-o", tmp_path / "c.atlas")
    assert code == 2
    assert "`bench` or `analyze`" in err
    assert run("atlas", "import", tmp_path, "-o", tmp_path / "c.atlas")[0] == 2
