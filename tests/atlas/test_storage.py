"""One contract for all places where an atlas may be."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from forgetcast import Atlas, DataError, Pool
from forgetcast.atlas.storage import storage_of
from support.data import make_atlas, make_scores, planted


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Address of a server that speaks S3, with a bucket."""
    fsspec, s3fs = pytest.importorskip("fsspec"), pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    settings = {"endpoint_url": address, "key": "someone", "secret": "secret"}
    s3fs.S3FileSystem(**settings).mkdir("bucket")
    fsspec.config.conf["s3"] = settings
    yield "s3://bucket"
    del fsspec.config.conf["s3"]
    server.stop()


@pytest.fixture(params=["folder", "memory", "s3"])
def location(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FORGETCAST_CACHE", str(tmp_path / "cache"))
    if request.param == "folder":
        return str(tmp_path / "a.atlas")
    pytest.importorskip("fsspec")
    root = "memory:/" if request.param == "memory" else request.getfixturevalue("s3")
    return f"{root}/{uuid.uuid4()}/a.atlas"


def test_an_atlas_grows_and_is_read(location: str, pool: Pool) -> None:
    atlas = Atlas.create(location, pool, make_scores(pool, np.full(len(pool), 3.0)), model="base", recipe={"steps": 3})
    values = np.abs(planted(3, len(pool), 1, 0.05))
    for i, row in enumerate(values):
        atlas.add(f"t{i}", make_scores(pool, 3.0 + row), recipe={"steps": 3})
    atlas.add("few", make_scores(pool.subset(["e3", "e1"]), np.array([3.5, 4.0])))
    atlas.add_replays([{"task": "t0", "seed": 0}])
    read = Atlas.open(location)
    assert read.tasks == ("t0", "t1", "t2", "few")
    np.testing.assert_allclose(read.matrix(["t0", "t1", "t2"]).values, values.astype(np.float32), rtol=1e-6)
    assert read.pool.fingerprint == pool.fingerprint
    assert read.replays == [{"task": "t0", "seed": 0}]
    assert read.subset(["e7", "e0"]).ids == ("e7", "e0")
    read.drop("t1")
    assert read.compact() == 2
    assert Atlas.open(location).tasks == ("t0", "t2", "few")
    with pytest.raises(DataError, match="exists already"):
        Atlas.create(location, pool, read.before, model="base")


def test_another_version_of_an_atlas_is_not_taken_from_the_cache(location: str, pool: Pool) -> None:
    Atlas.create(location, pool, make_scores(pool, np.full(len(pool), 3.0)), model="base")
    assert Atlas.open(location).nll_before[0] == 3.0
    storage = storage_of(location)
    for name in storage.names():
        storage.remove(name)
    Atlas.create(location, pool, make_scores(pool, np.full(len(pool), 2.0)), model="base")
    assert Atlas.open(location).nll_before[0] == 2.0


def test_names_reads_and_removal(location: str) -> None:
    storage = storage_of(location)
    assert storage.names() == []
    with pytest.raises(FileNotFoundError):
        storage.read("a.txt")
    with pytest.raises(FileNotFoundError):
        storage.local("a.txt")
    with storage.write("x/a.txt") as path:
        path.write_text("one")
    storage.mark("x/y/empty")
    assert storage.names() == ["x/a.txt", "x/y/empty"]
    assert storage.names("x/y") == ["x/y/empty"]
    assert storage.names("z") == storage.folders("z") == []
    assert storage.folders("x") == ["y"]
    assert storage.read("x/a.txt") == storage.local("x/a.txt").read_bytes() == b"one"
    with pytest.raises(FileExistsError), storage.write("x/a.txt", exclusive=True) as path:
        path.write_text("two")
    with pytest.raises(ZeroDivisionError), storage.write("x/a.txt") as path:
        path.write_text(f"two {1 // 0}")
    assert storage.read("x/a.txt") == b"one"
    for name in ("x/a.txt", "x/y/empty", "x/y/empty"):
        storage.remove(name)
    assert storage.names() == []


@pytest.mark.parametrize(
    ("url", "message"),
    [("nosuch://x/a.atlas", "Protocol not known: nosuch"), ("memory://nowhere/a.atlas", "atlas.json is missing")],
)
def test_a_url_that_cannot_be_opened(url: str, message: str) -> None:
    pytest.importorskip("fsspec")
    with pytest.raises(DataError, match=message):
        Atlas.open(url)


def _write_rows(location: str, first: int, count: int) -> None:
    atlas = Atlas.open(location)
    for i in range(first, first + count):
        atlas.add(f"task {i}", make_scores(atlas.pool, np.full(len(atlas.pool), 3.0 + i)))


def _write_parts(location: str, first: int, step: int) -> None:
    atlas = Atlas.open(location)
    for i in range(first, len(atlas.pool), step):
        few = atlas.pool.subset([f"e{i}"])
        atlas.add("shared", make_scores(few, np.array([3.0 + i])))


def test_many_writers_lose_nothing(tmp_path: Path, pool: Pool) -> None:
    """Oracle: each row has the number of its task, each entry that of its example."""
    path = make_atlas(tmp_path / "a.atlas", pool, tasks=1).path
    context = get_context("forkserver")
    jobs = [context.Process(target=_write_rows, args=(str(path), 5 * i, 5)) for i in range(3)]
    jobs += [context.Process(target=_write_parts, args=(str(path), i, 2)) for i in range(2)]
    for job in jobs:
        job.start()
    while any(job.is_alive() for job in jobs):
        read = Atlas.open(path)
        for task in read.tasks:
            if task.startswith("task "):
                assert set(read.matrix([task]).values[0]) == {float(task.split()[1])}
    for job in jobs:
        job.join()
        assert job.exitcode == 0
    matrix = Atlas.open(path).matrix()
    assert set(matrix.tasks) == {"t0", "shared", *(f"task {i}" for i in range(15))}
    np.testing.assert_array_equal(matrix.select(["shared"]).values[0], np.arange(len(pool)))
