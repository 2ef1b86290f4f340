"""Files to rows to examples: every container that people keep data in, read as a stream.

Rows of a file are counted from 1: lines of JSONL, CSV and TSV, items of a JSON array, rows of a table. A file that
cannot be read is an error. A row that cannot be used is skipped, with its place and the reason, unless that is an error
too (`strict`).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from forgetcast.data.example import FIELDS, STRUCTURED, Example, with_content_id
from forgetcast.data.formats import FORMATS, AmbiguousRowError, NoColumnError, RowReader, row_id
from forgetcast.errors import DataError, MissingExtraError
from forgetcast.files import check_seal, decode_json, is_rewritten, neighbour

if TYPE_CHECKING:
    import pyarrow as pa

Numbered = Iterator[tuple[int, dict[str, Any]]]
Tick = Callable[[int], None]
"""Called now and then with the bytes of the part that are read."""

LINES, ARRAYS, TABLES = (".jsonl", ".ndjson"), (".json",), (".csv", ".tsv")
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
SUFFIXES = (*LINES, *ARRAYS, *TABLES, ".parquet", ".arrow")

_EVERY = 4096
_HUB = re.compile(r"hf:/{1,2}(?P<name>[^:@]+)(?::(?P<config>[^@]+))?(?:@(?P<split>.+))?")


@dataclass(frozen=True)
class ReadOptions:
    """How rows are read: see `Pool.load`. Of several sources, `own` has further columns of some, by their names."""

    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    strict: bool = False
    own: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def of(self, name: str) -> ReadOptions:
        """Return those of a source."""
        return replace(self, columns={**self.columns, **self.own.get(name, {})}, own={})


@dataclass
class ReadReport:
    """What was understood of files, and what could not be used.

    Attributes
    ----------
    where : str
        The file, folder or data set.
    formats : Counter
        Examples by the name of the format that they were read as.
    skipped : list of (str, str)
        Place and reason of each row that could not be used.
    duplicates : int
        Examples without an id that were skipped because an earlier one has the same content.
    files : int
        Number of files, or of data sets.
    ignored : list of str
        Files of the folder that hold no data.
    """

    where: str
    formats: Counter[str] = field(default_factory=Counter)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    duplicates: int = 0
    files: int = 1
    ignored: list[str] = field(default_factory=list)

    def line(self, shown: int = 3) -> str:
        """Say in one line what was understood."""
        read = ", ".join(f"{FORMATS[name].title}, {n:,} {FORMATS[name].noun}" for name, n in self.formats.items())
        parts = [read + (f" in {self.files} files" if self.files > 1 else "")]
        if self.duplicates:
            parts.append(f"{self.duplicates:,} with the content of an earlier one skipped")
        if self.skipped:
            first = "; ".join(f"{place}: {reason}" for place, reason in self.skipped[:shown])
            more = "; ..." if len(self.skipped) > shown else ""
            rows = "row" if len(self.skipped) == 1 else "rows"
            parts.append(f"{len(self.skipped):,} {rows} skipped ({first}{more})")
        if self.ignored:
            more = ", ..." if len(self.ignored) > shown else ""
            parts.append(f"{len(self.ignored)} other files ignored ({', '.join(self.ignored[:shown])}{more})")
        return f"{self.where}: {', '.join(parts)}"

    def as_dict(self) -> dict[str, Any]:
        """Return all counts, and the first hundred rows that were skipped."""
        return {
            "where": self.where,
            "formats": dict(self.formats),
            "duplicates": self.duplicates,
            "skipped": len(self.skipped),
            "skipped_rows": [{"place": place, "reason": reason} for place, reason in self.skipped[:100]],
            "ignored_files": self.ignored,
        }


@dataclass(frozen=True)
class Part:
    """Rows that are read one after another: a file, or a split of a data set.

    Attributes
    ----------
    name : str
        What messages call it.
    unit : str
        What a row is called: line, item, row.
    rows : callable
        Yields each row with its number.
    size : int
        Bytes; 0 if unknown.
    from_table : bool
        Whether nulls within a row may be the table's.
    columns : callable or None
        Returns the columns of a table. None: those of the first row.
    batches : callable or None
        Yields some columns of a table as Arrow batches; then there are no `rows`.
    """

    name: str
    unit: str
    rows: Callable[[Tick], Numbered] | None
    size: int = 0
    from_table: bool = False
    columns: Callable[[], list[str]] | None = None
    batches: Callable[[Tick, Callable[[str], bool]], Iterator[pa.RecordBatch]] | None = None

    def place(self, number: int) -> str:
        """Name a row."""
        return f"{self.name}, {self.unit} {number}"


def data_name(path: str | Path) -> str:
    """Return the name of a file without the endings of its kind, such as 'task' of 'task.jsonl.gz'."""
    name = Path(path).name
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return name.removesuffix(Path(name).suffix) if Path(name).suffix in SUFFIXES else name


def is_data_file(path: Path) -> bool:
    """Whether the name of a file is one of a kind that can be read."""
    return _kind(path) is not None


def _kind(path: Path) -> str | None:
    """Return the ending that says what is in a file, without that of its compression; None if it is unknown."""
    compressed = path.suffix.lower() in COMPRESSED
    suffix = Path(path.stem).suffix.lower() if compressed else path.suffix.lower()
    return suffix if suffix in ((*LINES, *ARRAYS, *TABLES) if compressed else SUFFIXES) else None


def is_on_hub(where: str | Path) -> bool:
    """Whether the name is that of a data set of the Hub."""
    return _HUB.fullmatch(str(where)) is not None


def find_parts(where: str | Path, report: ReadReport) -> list[Part]:
    """Find what a file, a folder, a saved data set or a name of the Hub holds.

    Raises
    ------
    DataError
        If there is nothing that can be read; the message says what could.
    """
    if found := _HUB.fullmatch(str(where)):
        return [_hub(found["name"], found["config"], found["split"])]
    path, split = Path(where), None
    if not path.exists() and "@" in path.name:
        path, split = path.with_name(path.name.rpartition("@")[0]), path.name.rpartition("@")[2]
        if not (path / "dataset_dict.json").is_file():
            raise DataError(
                f"{where}: there is no such file, and no saved data set {path} with splits{neighbour(path)}"
            )
    if path.is_dir():
        if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json")):
            return [_saved(path, split)]
        return _folder(path, report)
    if not path.is_file():
        raise DataError(f"{path}: there is no such file{neighbour(path)}")
    return [_file(path)]


def visible_files(path: Path) -> list[Path]:
    """Return the files of a folder and those within, sorted, without hidden ones and those that start with '_'."""
    return sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and not any(part.startswith((".", "_")) for part in file.relative_to(path).parts)
    )


def _folder(path: Path, report: ReadReport) -> list[Part]:
    if (path / "atlas.json").is_file():
        raise DataError(f"{path} is an atlas; needed are data, such as those of a task, or its {path / 'pool.parquet'}")
    files = visible_files(path)
    data = [file for file in files if is_data_file(file)]
    report.ignored = [str(file.relative_to(path)) for file in files if not is_data_file(file)]
    if not data:
        raise DataError(f"{path} is a folder without data: no {', '.join(SUFFIXES)} file, and no saved data set")
    if len(kinds := sorted({str(_kind(file)) for file in data})) > 1:
        raise DataError(f"{path} holds files of several kinds ({', '.join(kinds)}); name the files of one kind")
    report.files = len(data)
    return [_file(file) for file in data]


def _file(path: Path) -> Part:
    kind, size = _kind(path), path.stat().st_size
    if kind == ".parquet":
        return _table_part(str(path), size, lambda: _open_parquet(path))
    if kind == ".arrow":
        return _table_part(str(path), size, lambda: _open_arrow(path))
    if kind in TABLES:
        return Part(str(path), "line", lambda tick: _csv_rows(path, "\t" if kind == ".tsv" else ",", tick), size)
    if kind is None:
        raise DataError(
            f"{path}: unknown kind of file; use {', '.join(SUFFIXES)} (text also {', '.join(COMPRESSED)}), or the "
            "directory of a saved data set"
        )
    if _first_character(path) == b"[":
        return Part(str(path), "item", lambda tick: _array_items(path, tick), size)
    return Part(str(path), "line", lambda tick: _json_lines(path, tick), size)


# Text


def _open(path: Path) -> tuple[Any, io.BufferedReader]:
    """Open a file, compressed or not: the file itself, whose position is the progress, and the text's bytes."""
    raw = path.open("rb")
    if compression := COMPRESSED.get(path.suffix.lower()):
        import pyarrow as pa

        return raw, io.BufferedReader(pa.CompressedInputStream(raw, compression))
    return raw, raw


def _lines(path: Path, tick: Tick) -> Iterator[tuple[int, str]]:
    """Yield the lines of a UTF-8 file, with or without a byte order mark."""
    raw, file = _open(path)
    number = 0
    with raw, file:
        try:
            for number, line in enumerate(file, 1):
                if number % _EVERY == 0:
                    tick(raw.tell())
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}, line {number}: not UTF-8 text ({error.reason} at byte {error.start})") from None
        except OSError as error:
            if path.suffix.lower() not in COMPRESSED:
                raise
            raise DataError(f"{path}, after line {number}: the archive is broken: {_first_line(error)}") from None


def _first_character(path: Path) -> bytes:
    raw, file = _open(path)
    with raw, file:
        try:
            return file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        except OSError:  # which reading it says
            return b""


def _parse(text: str, where: str) -> Any:
    try:
        return decode_json(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.strip() else ""
        raise DataError(f"{where}: not JSON ({error.msg} at {line}column {error.colno})") from None
    except ValueError as error:
        raise DataError(f"{where}: JSON that cannot be read ({_first_line(error)})") from None


def _json_lines(path: Path, tick: Tick) -> Numbered:
    for number, line in _lines(path, tick):
        if line.strip():
            where = f"{path}, line {number}"
            yield number, _object(_parse(line, where), where)


def _array_items(path: Path, tick: Tick) -> Numbered:
    items = _parse("".join(line for _, line in _lines(path, tick)), str(path))
    for number, item in enumerate(items, 1):
        yield number, _object(item, f"{path}, item {number}")


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON object is needed, not a {type(row).__name__}")
    return row


def _csv_rows(path: Path, delimiter: str, tick: Tick) -> Numbered:
    """Yield rows whose empty cells are None."""
    csv.field_size_limit(sys.maxsize)  # a long text is no fault
    reader = csv.reader((line for _, line in _lines(path, tick)), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if repeated := [name for name, count in Counter(header).items() if count > 1]:
            raise DataError(f"{path}, line 1: two columns are called {repeated[0]!r}")
        before = reader.line_num
        for cells in reader:
            number, before = before + 1, reader.line_num
            if not cells:
                continue
            if len(cells) != len(header):
                raise DataError(f"{path}, line {number}: {len(cells)} cells, where line 1 has {len(header)}")
            yield number, {name: cell or None for name, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not CSV ({error})") from None


# Tables


@dataclass(frozen=True)
class _Table:
    """An open Arrow or Parquet file: its columns, and a way to read some, each batch with the fraction read so far."""

    names: list[str]
    batches: Callable[[list[str]], Iterator[tuple[pa.RecordBatch, float]]]


def _table_part(name: str, size: int, open_: Callable[[], _Table]) -> Part:
    def batches(tick: Tick, wanted: Callable[[str], bool]) -> Iterator[pa.RecordBatch]:
        table = _readable(name, open_)
        columns = [column for column in table.names if wanted(column)]
        try:
            for batch, fraction in table.batches(columns):
                batch.validate(full=True)  # a text that is not UTF-8, or a value that lies outside of the file
                yield batch
                tick(int(size * fraction))
        except (
            OSError,
            ValueError,
            MemoryError,
            OverflowError,
            NotImplementedError,
        ) as error:  # Arrow's are among them
            if isinstance(error, DataError):
                raise
            raise DataError(f"{name} is not a readable table: {_first_line(error)}") from None

    return Part(name, "row", None, size, True, lambda: _readable(name, open_).names, batches)


def _readable(name: str, open_: Callable[[], _Table]) -> _Table:
    try:
        return open_()
    except DataError:
        raise
    except (OSError, ValueError, MemoryError, NotImplementedError) as error:
        kind = "Parquet" if name.lower().endswith(".parquet") else "Arrow"
        raise DataError(f"{name} is not a readable {kind} file: {_first_line(error)}") from None


def _open_parquet(path: Path) -> _Table:
    import pyarrow.parquet as pq

    try:
        check_seal(path)
    except DataError:
        if not is_rewritten(path):  # a pool may well be filtered by another tool
            raise
    file = pq.ParquetFile(path, page_checksum_verification=True)

    def batches(columns: list[str]) -> Iterator[tuple[pa.RecordBatch, float]]:
        done = 0
        for batch in file.iter_batches(batch_size=_EVERY, columns=columns):
            done += len(batch)
            yield batch, done / file.metadata.num_rows

    return _Table(file.schema_arrow.names, batches)


def _open_arrow(path: Path) -> _Table:
    """Open a file of either of Arrow's formats; `datasets` writes streams."""
    import pyarrow as pa

    source = pa.memory_map(str(path))
    try:
        file = pa.ipc.open_file(source)
        count, schema = file.num_record_batches, file.schema
        whole = ((file.get_batch(i), (i + 1) / count) for i in range(count))
    except pa.ArrowInvalid:
        source.seek(0)
        stream = pa.ipc.open_stream(source)
        schema = stream.schema
        whole = ((batch, source.tell() / source.size()) for batch in stream)

    def batches(columns: list[str]) -> Iterator[tuple[pa.RecordBatch, float]]:
        for batch, fraction in whole:
            yield batch.select(columns), fraction

    return _Table(schema.names, batches)


def _saved(path: Path, split: str | None) -> Part:
    """A data set that `datasets` saved; of several splits, one is chosen."""
    load_from_disk = _datasets().load_from_disk
    try:
        data = load_from_disk(str(path))
    except Exception as error:  # whatever is missing in the directory
        raise DataError(f"{path} is not a readable saved data set: {_first_line(error)}") from None
    if isinstance(data, dict):
        data = _of_split(data, split, str(path))
    elif split is not None:
        raise DataError(f"{path} has no splits; name it without @{split}")
    return _data_set_part(str(path) if split is None else f"{path}@{split}", data, size=len(data))


def _hub(name: str, config: str | None, split: str | None) -> Part:
    """A data set of the Hub, streamed."""
    load_dataset = _datasets().load_dataset
    where = f"hf://{name}" + (f":{config}" if config else "") + (f"@{split}" if split else "")
    try:
        data = load_dataset(name, config, split=split, streaming=True)
    except Exception as error:  # no network, no such data set, no such configuration: each has its own
        raise DataError(f"{where}: the Hub gives no such data set: {_first_line(error)}") from None
    if isinstance(data, dict):
        data = _of_split(data, None, where)
    return _data_set_part(where, data)


def _of_split(data: Mapping[str, Any], split: str | None, where: str) -> Any:
    if split is None and len(data) == 1:
        return next(iter(data.values()))
    if split is None or split not in data:
        raise DataError(f"{where} has the splits {', '.join(data)}; choose one: {where}@{next(iter(data))}")
    return data[split]


def _data_set_part(name: str, data: Any, size: int = 0) -> Part:
    def rows(tick: Tick) -> Numbered:
        number = 0
        try:
            for number, row in enumerate(data, 1):
                if number % _EVERY == 0:
                    tick(number)
                yield number, dict(row)
        except DataError:
            raise
        except (OSError, ValueError, RuntimeError) as error:  # a shard that is broken or out of reach
            raise DataError(f"{name}, after row {number}: {_first_line(error)}") from None

    names = getattr(data, "column_names", None)
    return Part(name, "row", rows, size, True, (lambda: list(names)) if names else None)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("lm", error) from error
    return datasets


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# Examples


class Reader:
    """Reads the examples of a file, a folder, a saved data set, or a data set of the Hub.

    Parameters
    ----------
    where : path or str
    options : ReadOptions
    on_progress : callable, optional
        Called with the bytes read and all bytes.

    Attributes
    ----------
    report : ReadReport
        Complete once everything was read.
    """

    def __init__(
        self,
        where: str | Path,
        options: ReadOptions | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._options = options if options is not None else ReadOptions()
        self._rows = RowReader(self._options.format, self._options.columns)
        self.report = ReadReport(str(where))
        self.parts = find_parts(where, self.report)
        self._on_progress = on_progress
        self._done, self._total = 0, sum(part.size for part in self.parts)

    def __iter__(self) -> Iterator[tuple[Example, Part, int, bool]]:
        """Yield each example with its part, the number of its row, and whether its id was made from its content.

        Raises
        ------
        DataError
            If a part cannot be read, or no row can be used.
        """
        for part in self.parts:
            for number, rows in self._chunks(part):
                yield from self._examples(part, number, rows if isinstance(rows, list) else rows.to_pylist())
        self._check_found()

    def unique(self) -> Iterator[Example]:
        """Yield the examples of a stream too long for memory, as `read_table` keeps them: each id once.

        Only a hash of each id is kept, about 60 bytes.

        Raises
        ------
        DataError
            If an id that is not made from the content occurs twice.
        """
        seen = set[int]()
        for example, part, number, made in self:
            key = int.from_bytes(hashlib.blake2b(example.id.encode(), digest_size=8).digest())
            if key not in seen:
                seen.add(key)
                yield example
            elif made:
                self.report.duplicates += 1
            else:
                raise DataError(
                    f"{part.place(number)}: the id {example.id!r} occurs a second time; ids must be unique "
                    "(--column id= makes them from the contents)"
                )

    def _chunks(self, part: Part) -> Iterator[tuple[int, list[dict[str, Any]] | pa.RecordBatch]]:
        """Yield the rows of a part, one or a batch at a time, with the number of the first."""
        if part.columns is not None:
            self._check_columns(part, part.columns())
        if part.batches is not None:
            number = 1
            for batch in part.batches(self._tick, self._rows.reads):
                yield number, batch
                number += len(batch)
        elif part.rows is not None:
            checked = part.columns is not None
            for number, row in part.rows(self._tick):
                if not checked and row:
                    self._check_columns(part, list(row))
                    checked = True
                yield number, [row]
        self._done += part.size

    def _examples(
        self, part: Part, number: int, rows: list[dict[str, Any]]
    ) -> Iterator[tuple[Example, Part, int, bool]]:
        for i, row in enumerate(rows, number):
            if (read := self._example(part, i, row)) is not None:
                yield read

    def _tick(self, done: int) -> None:
        if self._on_progress is not None:
            self._on_progress(self._done + done, self._total)

    def _check_columns(self, part: Part, names: list[str]) -> None:
        try:
            self._rows.check_columns(names)
        except NoColumnError as error:
            raise NoColumnError(f"{part.name}: {error}") from None

    def _example(self, part: Part, number: int, row: dict[str, Any]) -> tuple[Example, Part, int, bool] | None:
        fields = self._rows.fields(row)
        unnamed = f"{part.unit} {number}"
        try:
            id_ = row_id(fields)
        except DataError as error:
            raise DataError(f"{part.place(number)}: {error}") from None
        try:
            name, example = self._rows.read(fields, unnamed if id_ is None else id_, from_table=part.from_table)
        except AmbiguousRowError as error:
            raise DataError(f"{part.place(number)}: {error}") from None
        except RecursionError:
            raise DataError(f"{part.place(number)}: it is nested too deeply") from None
        except DataError as error:
            reason = str(error) if id_ is not None else str(error).replace(f"example {unnamed!r}", "the example")
            if self._options.strict:
                raise DataError(f"{part.place(number)}: {reason}") from None
            self.report.skipped.append((part.place(number), reason))
            return None
        self.report.formats[name] += 1
        return (with_content_id(example) if id_ is None else example), part, number, id_ is None

    def _check_found(self) -> None:
        if not self.report.formats:
            if not self.report.skipped:
                raise DataError(f"{self.report.where} has no examples")
            place, reason = self.report.skipped[0]
            raise DataError(f"no row can be used of {len(self.report.skipped)}; {place}: {reason}")

    def read_table(self) -> pa.Table:
        """Read everything into columns, and check that the ids are unique.

        Of examples without an id, the first with a content is kept.
        """
        import pyarrow as pa

        from forgetcast.data.pool import table_of

        places = _Places()
        tables: list[pa.Table] = []
        for at, part in enumerate(self.parts):
            slow: list[tuple[Example, Part, int, bool]] = []
            for number, rows in self._chunks(part):
                if not isinstance(rows, list) and self._rows.any_format and (plain := _plain(rows)) is not None:
                    tables += [table_of(places.noted(at, slow)), plain]
                    slow = []
                    places.note(at, number, len(plain))
                    texts = len(plain) - plain["text"].null_count
                    self.report.formats.update({"text": texts, "prompt-completion": len(plain) - texts})
                    continue
                slow += self._examples(part, number, rows if isinstance(rows, list) else rows.to_pylist())
                if len(slow) >= _EVERY:
                    tables.append(table_of(places.noted(at, slow)))
                    slow = []
            tables.append(table_of(places.noted(at, slow)))
        self.report.formats = +self.report.formats  # without those of which there are none
        tables = [table for table in tables if len(table)] or tables[:1]
        self._check_found()
        return places.unique(pa.concat_tables(tables), self.parts, self.report)


def _plain(batch: pa.RecordBatch) -> pa.Table | None:
    """Return a batch as a pool has it, if it is plain that every row can be used; None if rows must be looked at.

    That is so of texts, and prompts with completions, that have an id and a letter or sign of ASCII. Checking columns
    is ten times as fast as making an Example of every row.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    def column(name: str) -> pa.Array:
        found = batch.schema.get_field_index(name)
        return batch.column(found) if found >= 0 else pa.nulls(len(batch), pa.string())

    columns = {name: column(name) for name in FIELDS}
    structured = any(columns[name].null_count < len(batch) for name in STRUCTURED)
    if structured or set(batch.schema.names).difference(FIELDS) or not len(batch):
        return None
    columns |= {name: pa.nulls(len(batch), pa.string()) for name in STRUCTURED}
    if columns["source"].null_count == len(batch):
        columns["source"] = pa.nulls(len(batch), pa.string())
    if any(values.type not in (pa.string(), pa.null()) for values in columns.values()) or columns["id"].null_count:
        return None
    columns = {name: values.cast(pa.string()) for name, values in columns.items()}
    text, prompt, completion = (columns[name] for name in ("text", "prompt", "completion"))
    is_text = pc.and_(pc.and_(pc.is_null(prompt), pc.is_null(completion)), _has_letters(text))
    is_pair = pc.and_(pc.and_(pc.is_valid(prompt), pc.is_null(text)), _has_letters(completion))
    good = pc.and_(pc.or_(is_text, is_pair), pc.greater(pc.binary_length(columns["id"]), 0))
    return pa.table(columns) if pc.all(good).as_py() else None


def _has_letters(texts: pa.Array) -> pa.Array:
    import pyarrow.compute as pc

    return pc.fill_null(pc.match_substring_regex(texts, "[!-~]"), False)


class _Places:
    """Where each example is from: numbers, because a million places in words would take more than the texts."""

    def __init__(self) -> None:
        self._parts, self._numbers, self._made = array("i"), array("q"), array("b")

    def noted(self, at: int, read: Iterable[tuple[Example, Part, int, bool]]) -> Iterator[Example]:
        for example, _, number, made in read:
            self._parts.append(at)
            self._numbers.append(number)
            self._made.append(made)
            yield example

    def note(self, at: int, number: int, count: int) -> None:
        """Note rows one after another that have ids of their own."""
        self._parts.extend(array("i", [at]) * count)
        self._numbers.extend(range(number, number + count))
        self._made.extend(array("b", [False]) * count)

    def unique(self, table: pa.Table, parts: list[Part], report: ReadReport) -> pa.Table:
        import pyarrow as pa
        import pyarrow.compute as pc

        ids = table["id"]
        if pc.count_distinct(ids).as_py() == len(ids):
            return table
        first = pc.index_in(ids, value_set=ids).to_numpy()
        repeated, made = first != np.arange(len(first)), np.array(self._made, dtype=bool)
        wrong = np.flatnonzero(repeated & ~(made & made[first]))
        if len(wrong):
            both = [parts[self._parts[i]].place(self._numbers[i]) for i in (int(first[wrong[0]]), int(wrong[0]))]
            raise DataError(
                f"the id {ids[int(wrong[0])].as_py()!r} occurs twice: {both[0]}, and {both[1]}; ids must be unique "
                "(--column id= makes them from the contents)"
            )
        report.duplicates = int(repeated.sum())
        return table.filter(pa.array(~repeated))
