"""Every container that data come in gives the same examples, and every broken one a line that says where."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from forgetcast import DataError, Example, Pool
from forgetcast.data.reader import Reader, data_name, is_data_file

ROWS = [
    {"id": "a", "prompt": "What is\n2 + 2?", "completion": 'It is "4", or 4.', "source": "s"},
    {"id": "b", "prompt": "Größe;\t🙂", "completion": " ja", "source": None},
    {"id": "c", "prompt": "x" * 200_000, "completion": "y", "source": "s"},
]
EXAMPLES = [Example(**row) for row in ROWS]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue().to_pybytes())


def delimited(delimiter: str) -> bytes:
    sink = pa.BufferOutputStream()
    pacsv.write_csv(pa.Table.from_pylist(ROWS), sink, pacsv.WriteOptions(delimiter=delimiter))
    return bytes(sink.getvalue().to_pybytes())


def parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=2)


def arrow(path: Path, new: Callable[..., Any]) -> None:
    table = pa.Table.from_pylist(ROWS)
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


TEXT: dict[str, bytes] = {
    "data.jsonl": LINES,
    "data.json": LINES,
    "data.ndjson": b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\r\n"),
    "array.json": json.dumps(ROWS, indent=1).encode(),
    "array.jsonl": b"\xef\xbb\xbf  " + json.dumps(ROWS).encode(),
    "data.csv": delimited(","),
    "marked.csv": b"\xef\xbb\xbf" + delimited(","),
    "data.tsv": delimited("\t"),
}
CONTAINERS: dict[str, Callable[[Path], object]] = {
    **{name: lambda path, c=content: path.write_bytes(c) for name, content in TEXT.items()},  # type: ignore[misc]
    **{f"{name}.gz": lambda path, c=content: path.write_bytes(gzip.compress(c)) for name, content in TEXT.items()},  # type: ignore[misc]
    **{f"{name}.zst": lambda path, c=content: path.write_bytes(zstd(c)) for name, content in TEXT.items()},  # type: ignore[misc]
    "members.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES[:99]) + gzip.compress(LINES[99:])),
    "data.parquet": parquet,
    "file.arrow": lambda path: arrow(path, pa.ipc.new_file),
    "stream.arrow": lambda path: arrow(path, pa.ipc.new_stream),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container(tmp_path: Path, name: str) -> None:
    CONTAINERS[name](tmp_path / name)
    progress: list[tuple[int, int]] = []
    pool = Pool.load(tmp_path / name, on_progress=lambda done, total: progress.append((done, total)))
    assert list(pool) == EXAMPLES
    assert all(0 <= done <= total == (tmp_path / name).stat().st_size for done, total in progress)
    assert pool.report is not None
    assert pool.report.line() == f"{tmp_path / name}: prompt and completion, 3 examples"
    assert is_data_file(tmp_path / name)
    assert data_name(tmp_path / name) == name.partition(".")[0]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet", ".arrow", ".csv.zst"])
def test_a_folder_of_shards(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "data" / "more").mkdir(parents=True)
    for name, rows in (("data/part-1", ROWS[:2]), ("data/more/part-0", ROWS[2:])):
        Pool([Example(**row) for row in rows]).save(tmp_path / "shard.parquet")
        table = pq.read_table(tmp_path / "shard.parquet")
        path = tmp_path / f"{name}{suffix}"
        if suffix == ".parquet":
            pq.write_table(table, path)
        elif suffix == ".arrow":
            with pa.ipc.new_stream(str(path), table.schema) as writer:
                writer.write_table(table)
        elif suffix == ".csv.zst":
            sink = pa.BufferOutputStream()
            pacsv.write_csv(table, sink)
            path.write_bytes(zstd(sink.getvalue().to_pybytes()))
        else:
            content = "".join(json.dumps(row) + "\n" for row in rows).encode()
            path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    (tmp_path / "data" / "README.md").write_text("not data")
    (tmp_path / "data" / "_SUCCESS.json").write_text("")
    (tmp_path / "data" / ".cache.jsonl").write_text("broken")
    pool = Pool.load(tmp_path / "data")
    assert list(pool) == [EXAMPLES[2], *EXAMPLES[:2]]
    assert pool.report is not None
    assert pool.report.line() == (
        f"{tmp_path / 'data'}: prompt and completion, 3 examples in 2 files, 1 other files ignored (README.md)"
    )


def test_saved_data_sets_and_their_splits(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    train, test = (datasets.Dataset.from_list(rows) for rows in (ROWS[:2], ROWS[2:]))
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": train}).save_to_disk(tmp_path / "single")
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "two")
    for name in ("one", "single", "two@train", "single@train"):
        assert list(Pool.load(tmp_path / name)) == EXAMPLES[:2], name
    assert list(Pool.load(f"{tmp_path}/two@test")) == EXAMPLES[2:]
    with pytest.raises(DataError, match=r"two has the splits train, test; choose one: .*two@train"):
        Pool.load(tmp_path / "two")
    with pytest.raises(DataError, match="has the splits train, test"):
        Pool.load(tmp_path / "two@dev")
    with pytest.raises(DataError, match=r"no saved data set .*one with splits"):
        Pool.load(tmp_path / "one@train")
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"broken")
    with pytest.raises(DataError, match="one is not a readable saved data set"):
        Pool.load(tmp_path / "one")
    # The Arrow file alone, as the cache of `datasets` has it
    assert list(Pool.load(next((tmp_path / "single" / "train").glob("*.arrow")))) == EXAMPLES[:2]


def test_data_sets_of_the_hub_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str | None, streaming: bool) -> Any:
        asked.append((name, config, split, streaming))
        if name == "absent":
            raise FileNotFoundError("Dataset 'absent' doesn't exist on the Hub\nor cannot be accessed")
        data = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
        return data if split else datasets.IterableDatasetDict({"train": data, "test": data})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(Pool.load("hf://allenai/c4:en@validation")) == EXAMPLES
    assert list(Pool.load(Path("hf://allenai/c4@test"))) == EXAMPLES  # a Path has one slash
    with pytest.raises(DataError, match=r"hf://allenai/c4:en has the splits train, test; choose one: hf://"):
        Pool.load("hf://allenai/c4:en")
    with pytest.raises(
        DataError, match=r"^hf://absent: the Hub gives no such data set: Dataset 'absent' doesn't exist on the Hub$"
    ):
        Pool.load("hf://absent")
    assert asked == [
        ("allenai/c4", "en", "validation", True),
        ("allenai/c4", None, "test", True),
        ("allenai/c4", "en", None, True),
        ("absent", None, None, True),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', "line 2: not UTF-8 text (invalid start byte at byte 10)"),
        ("a.jsonl", '{"text": "x"}\n'.encode("utf-16"), "line 1: not UTF-8 text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "y"', "line 2: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', "line 2: a JSON object is needed, not a list"),
        ("a.json", b'[{"text": "x"}, 3]', "item 2: a JSON object is needed, not a int"),
        ("a.json", b'[{"text": "x"},\n{"text"]', "a.json: not JSON (Expecting ':' delimiter at line 2, column 8)"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, "line 1: JSON that cannot be read (it is nested too deeply)"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"id": ' + b"9" * 5000 + b"}",
            "line 2: JSON that cannot be read (a number in it has more than 4,300 digits)",
        ),
        (
            "a.json",
            b'[{"id": ' + b"9" * 5000 + b"}]",
            "a.json: JSON that cannot be read (a number in it has more than 4,300 digits)",
        ),
        ("a.jsonl", b'{"text": "x"}\n{"id": 1.5, "text": "y"}', "line 2: the id must be a string"),
        ("a.jsonl", b'{"text": "x"}\n{"id": true, "text": "y"}', "line 2: the id must be a string"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": "y", "messages": []}',
            "line 2: the row can be read as text (text) and as",
        ),
        ("a.jsonl", b"", "has no examples"),
        ("a.json", b"[]", "has no examples"),
        ("a.csv", b"text\n", "has no examples"),
        ("a.csv", b"", "has no examples"),
        ("a.csv", b"id,text\n1,x\n2,y,z\n", "line 3: 3 cells, where line 1 has 2"),
        ("a.csv", b'id,text\n1,"x\n\ny"\n2\n', "line 5: 1 cells, where line 1 has 2"),
        ("a.csv", b'id,text\n1,"x\n', "not CSV (unexpected end of data)"),
        ("a.csv", b"text,text\nx,y\n", "two columns are called 'text'"),
        ("a.jsonl.gz", b"not an archive", "after line 0: the archive is broken: zlib inflate failed"),
        ("a.jsonl.zst", b"not an archive", "after line 0: the archive is broken: ZSTD decompress failed"),
        ("a.jsonl.gz", gzip.compress(LINES)[:-100], "the archive is broken: Truncated compressed stream"),
        ("a.csv.zst", zstd(delimited(","))[:-100], "the archive is broken: Truncated compressed stream"),
        ("a.parquet", b"PAR1 but not really PAR1", "a.parquet is not a readable Parquet file"),
        ("a.arrow", b"ARROW1 but not really", "a.arrow is not a readable Arrow file"),
        ("a.arrow", b"", "a.arrow is not a readable Arrow file"),
        ("a.xlsx", b"", "unknown kind of file; use .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow"),
        ("a.parquet.gz", b"", "unknown kind of file"),
        ("a.jsonl", b'{"text": " "}\n{"text": ""}\n', "no row can be used of 2; "),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        Pool.load(tmp_path / name)
    assert message in str(error.value)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    rows = [{"id": str(i), "text": f"{i} {'word ' * 50}"} for i in range(20_000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", compression="snappy", use_dictionary=False)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[1000:60_000] = bytes(59_000)
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet is not a readable table"):
        Pool.load(tmp_path / "a.parquet")


def test_a_text_that_is_not_utf8_in_a_table(tmp_path: Path) -> None:
    bad = pa.array([b"good", b"bad \xff"]).view(pa.string())
    pq.write_table(pa.table({"id": ["a", "b"], "text": bad}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet is not a readable table: .*UTF8"):
        Pool.load(tmp_path / "a.parquet")


@pytest.mark.parametrize("spoilt", [None, 5, 9000])
def test_columns_that_are_checked_at_once_give_what_rows_give(tmp_path: Path, spoilt: int | None) -> None:
    rows: list[dict[str, Any]] = [
        {"id": f"e{i}", "text": f"text {i}", "prompt": None, "completion": None, "source": "s"}
        if i % 3
        else {"id": f"e{i}", "text": None, "prompt": "", "completion": f"answer {i}", "source": None}
        for i in range(10_000)
    ]
    if spoilt is not None:  # a text without a letter is looked at, whatever it is
        rows[spoilt] |= {"text": "\u2003", "prompt": None, "completion": None}
        rows[spoilt + 1] |= {"text": "ü", "prompt": None, "completion": None}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    by_row, at_once = Pool.load(tmp_path / "a.jsonl"), Pool.load(tmp_path / "a.parquet")
    assert list(at_once) == list(by_row)
    assert at_once.fingerprint == by_row.fingerprint
    assert by_row.report is not None
    assert at_once.report is not None
    assert at_once.report.formats == by_row.report.formats
    places = [] if spoilt is None else [f"{tmp_path / 'a.parquet'}, row {spoilt + 1}"]
    assert [place for place, _ in at_once.skipped] == places
    pq.write_table(pa.Table.from_pylist([*rows, rows[7]]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"'e7' occurs twice: .*a\.parquet, row 8, and .*a\.parquet, row 10001;"):
        Pool.load(tmp_path / "a.parquet")


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        Pool.load(tmp_path / "absent.jsonl")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="a folder without data"):
        Pool.load(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    (tmp_path / "a.csv").write_text("text\nx\n")
    with pytest.raises(DataError, match=r"files of several kinds \(\.csv, \.jsonl\)"):
        Pool.load(tmp_path)


class TestIds:
    """The user's, else a hash of the content."""

    @staticmethod
    def load(folder: Path, *rows: dict[str, Any]) -> Pool:
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Pool.load(folder / "data.jsonl")

    def test_hashes_depend_on_content_only(self, tmp_path: Path) -> None:
        rows = [
            {"text": "x", "source": "s"},
            {"prompt": "x", "completion": "y"},
            {"id": None, "question": "x", "answer": "y"},
        ]
        pool = self.load(tmp_path, *rows)
        assert len(set(pool.ids)) == 3
        assert all(len(id_) == 16 and int(id_, 16) >= 0 for id_ in pool.ids)
        turned = self.load(tmp_path, {"text": "x"}, *rows[:0:-1])
        assert turned.ids == [pool.ids[0], pool.ids[2], pool.ids[1]]

    def test_the_first_of_two_with_the_same_content_is_kept(self, tmp_path: Path) -> None:
        pool = self.load(tmp_path, {"text": "x", "source": "1"}, {"text": "y"}, {"text": "x", "source": "2"})
        assert [(e.text, e.source) for e in pool] == [("x", "1"), ("y", None)]
        assert pool.report is not None
        assert pool.report.duplicates == 1
        assert pool.report.line().endswith("text, 3 texts, 1 with the content of an earlier one skipped")

    def test_own_ids_with_the_same_content_stay(self, tmp_path: Path) -> None:
        assert self.load(tmp_path, {"id": 1, "text": "x"}, {"id": "2", "text": "x"}).ids == ("1", "2")

    def test_both_places_of_an_id_are_named(self, tmp_path: Path) -> None:
        first = self.load(tmp_path, {"text": "x"}).ids[0]
        with pytest.raises(DataError, match=r"line 1, and .*data\.jsonl, line 3; ids must be unique"):
            self.load(tmp_path, {"id": "a", "text": "x"}, {"text": "y"}, {"id": "a", "text": "z"})
        with pytest.raises(DataError, match=r"line 1, and .*data\.jsonl, line 2"):
            self.load(tmp_path, {"id": first, "text": "z"}, {"text": "x"})  # one is made, the other is not
        (tmp_path / "more").mkdir()
        for name in ("0.jsonl", "1.jsonl"):
            (tmp_path / "more" / name).write_text('{"text": "x", "id": "a"}')
        with pytest.raises(DataError, match=r"'a' occurs twice: .*0\.jsonl, line 1, and .*1\.jsonl, line 1;"):
            Pool.load(tmp_path / "more")
        assert len(Pool.load(tmp_path / "more", columns={"id": ""})) == 1


def test_what_was_skipped_is_told_shortly(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + '{"text": ""}\n' * 5)
    pool = Pool.load(tmp_path / "a.jsonl")
    assert pool.report is not None
    assert pool.report.line(shown=1).endswith(
        "text, 1 texts, 5 rows skipped (" + str(tmp_path) + "/a.jsonl, line 2: the example has an empty text; ...)"
    )
    told = pool.report.as_dict()
    assert (told["skipped"], len(told["skipped_rows"])) == (5, 5)
    assert Pool([Example("a", text="x")]).skipped == ()


def test_a_stream_has_each_id_once_as_the_table_does(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a b", "c d", "a b", "e f")))
    reader = Reader(path)
    assert [example.id for example in reader.unique()] == list(Pool.load(path).ids)
    assert reader.report.duplicates == 1
    path.write_text('{"id": "x", "text": "a b"}\n{"id": "x", "text": "c d"}\n')
    with pytest.raises(DataError, match=r"line 2: the id 'x' occurs a second time"):
        list(Reader(path).unique())
