"""Atomic writes, and reading of JSON and Parquet with errors that name the file.

A Parquet file written here is sealed: its footer holds a SHA-256 of all that comes before, a CRC-32 of each row group,
and a SHA-256 of itself. So a bit that flips anywhere is found when the file is read, as a whole or by row groups. Its
pages have Parquet's checksums too, for other tools; these leave out the headers of pages. Files without a seal, of
other tools or of earlier versions, are read as they are.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import re
import secrets
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from forgetcast.errors import DataError
from forgetcast.text import closest

if TYPE_CHECKING:
    import pyarrow as pa

_METADATA_KEY = b"forgetcast"

_SEALED, _PAGES, _SEAL = b"forgetcast.sealed", b"forgetcast.pages", b"forgetcast.seal"
"""Keys in a footer: a mark that the other two are there, the digest of all pages, and that of the footer."""

_GROUPS = b"forgetcast.groups"
"""Key in a footer: a JSON list of the end and the CRC-32 of each row group."""

_DIGITS = 64
_BLANK = b"0" * _DIGITS
_STRING = b"\x18" + bytes([_DIGITS])
"""What the footer's encoding, Thrift's compact one, has between a key and a value of 64 characters."""

TEMPORARY = ".tmp-"
"""How the names of temporary files start."""

SECONDS_UNTIL_ABANDONED = 24 * 3600
"""Age from which a temporary file of a process on another machine is taken for one of a dead process."""


@contextmanager
def atomic_path(path: Path, *, exclusive: bool = False) -> Iterator[Path]:
    """Yield a temporary path next to `path`, and rename it to `path` if the block ends without an error.

    The data is synced before the rename and the folder after it, so a crash leaves the old file or the new one. What
    killed processes left in the folder is removed. An error leaves no folder that was made for the file.

    Parameters
    ----------
    path : Path
    exclusive : bool
        Whether `path` must not exist.

    Raises
    ------
    FileExistsError
        If `exclusive` and `path` exists at the end; it is left as it is.
    """
    made = make_folder(path.parent)
    remove_abandoned(path.parent)
    temporary = path.parent / f"{_temporary_name()}{path.suffix}"
    try:
        temporary.touch(exist_ok=False)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if exclusive:
            os.link(temporary, path)
        else:
            temporary.replace(path)
        sync_folder(path.parent)
        made = []
    except OSError as error:
        if error.filename in (None, str(temporary)):  # a full disk names no file, and nobody knows the temporary one
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
        with suppress(OSError):  # another process has put something there
            for folder in reversed(made):
                folder.rmdir()


def make_folder(folder: Path) -> list[Path]:
    """Create a folder and its parents, durably; return those that did not exist, outermost first."""
    if folder.is_dir():
        return []
    made = make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)
    return [*made, folder]


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_abandoned(folder: Path) -> None:
    """Remove the temporary files that killed processes left in a folder."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.startswith(TEMPORARY)]
    for name in names:
        if _is_abandoned(folder / name):
            (folder / name).unlink(missing_ok=True)


def temporary_folder(parent: Path) -> Path:
    """Make a folder in `parent`, which is for such folders only; those of killed processes are removed."""
    make_folder(parent)
    for folder in parent.iterdir():
        if _is_abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)  # another process may be removing it too
    made = parent / _temporary_name()
    made.mkdir()
    return made


def _temporary_name() -> str:
    """Return a new name that says which process uses it."""
    return f"{TEMPORARY}{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"


def _is_abandoned(temporary: Path) -> bool:
    machine, _, rest = temporary.name.removeprefix(TEMPORARY).partition("-")
    process = rest.partition("-")[0]
    try:
        if machine != _machine() or not process.isdecimal():
            return time.time() - temporary.stat().st_mtime > SECONDS_UNTIL_ABANDONED
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except (FileNotFoundError, PermissionError):  # finished meanwhile; another user's process
        return False
    return False


@cache
def _machine() -> str:
    """Return a short name of the place in which process ids are unique: a machine, or a container on it."""
    try:
        space = Path("/proc/self/ns/pid").readlink().name
    except OSError:
        space = ""
    return hashlib.sha256(f"{platform.node()} {space}".encode()).hexdigest()[:8]


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; NaN is refused, because readers other than Python's cannot parse it."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Return JSON as it is written to files."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """Read JSON; raise DataError with the name of the file if it cannot be read."""
    try:
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def parse_json(content: bytes, where: str) -> Any:
    """Parse JSON; raise DataError with the name `where` if it cannot be parsed."""
    try:
        value = decode_json(content.decode("utf-8-sig"))
        if _HALF_PAIR.search(content):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError(f"{where} has half of a surrogate pair, which UTF-8 cannot hold; mend or remove it") from None
    except UnicodeDecodeError:
        raise DataError(f"{where} is not JSON: it is no text in UTF-8") from None
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}") from None
    return value


_HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")
"""An escaped surrogate, which may lack its other half."""


def decode_json(text: str) -> Any:
    """Decode JSON in which no object has a key twice, since a reader would have to guess which of them counts.

    Raises
    ------
    ValueError
        If it is not valid, or too deeply nested; `json.JSONDecodeError` where that has a place.
    """
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        if "digits" in str(error):  # Python's message advises to raise its limit
            raise ValueError("a number in it has more than 4,300 digits") from None
        raise


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"the key {next(name for name in fields if names.count(name) > 1)!r} occurs twice in an object"
        )
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def with_digest(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with a digest of its other fields, which `check_digest` checks."""
    return {**value, "digest": _digest(value)}


def check_digest(value: Any, where: str) -> dict[str, Any]:
    """Return a JSON object that `with_digest` made, without the digest.

    Raises
    ------
    DataError
        If it has been changed, or is something else.
    """
    if not isinstance(value, dict) or "digest" not in value:
        raise DataError(f"{where}: a JSON object with a digest is needed")
    content = {name: field for name, field in value.items() if name != "digest"}
    if _digest(content) != value["digest"]:
        raise DataError(f"{where} was damaged or edited after it was written; put back a copy of it")
    return content


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


class _HashedFile(io.RawIOBase):
    """A file that hashes what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.hash = file, hashlib.sha256()
        self.size, self.crc = 0, 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.hash.update(data)
        self.crc = zlib.crc32(data, self.crc)
        self.size += len(data)
        return self._file.write(data)

    def end_group(self) -> list[int]:
        """Return where a row group ends, and the CRC-32 of what was written since the last one."""
        crc, self.crc = self.crc, 0
        return [self.size, crc]


def write_parquet(
    tables: Iterable[pa.Table], schema: pa.Schema, file: IO[bytes], metadata: Mapping[str, Any], **options: Any
) -> str:
    """Write and seal a Parquet file.

    Parameters
    ----------
    tables : iterable of Table
        Row groups.
    schema : Schema
    file : binary file
        Empty, open for writing and reading.
    metadata : mapping
        Saved as JSON in the schema.
    **options
        Of `pyarrow.parquet.ParquetWriter`.

    Returns
    -------
    str
        The seal, of 64 hexadecimal digits: no other content has the same.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    hashed = _HashedFile(file)
    schema = schema.with_metadata({_METADATA_KEY: json.dumps(dict(metadata)).encode(), _SEALED: b"1"})
    with (
        pa.PythonFile(hashed, mode="w") as sink,
        pq.ParquetWriter(sink, schema, write_page_checksum=True, **options) as writer,
    ):
        ends = []
        for table in tables:
            writer.write_table(table.replace_schema_metadata(schema.metadata), row_group_size=max(len(table), 1))
            ends.append(hashed.end_group())
        # Only now are all pages written: the rest is the footer.
        pages = hashed.hash.hexdigest().encode()
        writer.add_key_value_metadata({_GROUPS: json.dumps(ends).encode(), _PAGES: pages, _SEAL: _BLANK})
    footer, start = _footer(file)
    at = footer.rindex(_SEAL + _STRING + _BLANK) + len(_SEAL + _STRING)
    seal = hashlib.sha256(footer).hexdigest()
    file.seek(start + at)
    file.write(seal.encode())
    return seal


def _footer(file: IO[bytes]) -> tuple[bytes, int]:
    """Return the footer of a Parquet file, and where it starts; raise ValueError if there is none."""
    end = file.seek(0, os.SEEK_END) - 8
    file.seek(max(end, 0))
    tail = file.read(8)
    start = end - int.from_bytes(tail[:4], "little")
    if tail[4:] != b"PAR1" or start < 4:
        raise ValueError("its end is missing or damaged")
    file.seek(start)
    return file.read(end - start), start


def check_seal(path: Path, *, pages: bool = True) -> str | None:
    """Return the seal of a Parquet file after checking it; None if there is none.

    Parameters
    ----------
    path : Path
    pages : bool
        Whether to read the whole file. Else the footer is checked only; `check_groups` checks the rest as it is read.

    Raises
    ------
    DataError
        If the file was damaged or changed after it was written, or is no Parquet file.
    """
    damaged = DataError(f"{path} was damaged or changed after it was written; put back a copy, or make it again")
    try:
        with path.open("rb") as file:
            footer, start = _footer(file)
            seal, digest = _value(footer, _SEAL), _value(footer, _PAGES)
            if seal is None or digest is None:
                if seal is not None or digest is not None or _SEALED in footer:
                    raise damaged
                return None
            key = _SEAL + _STRING
            if hashlib.sha256(footer.replace(key + seal, key + _BLANK)).hexdigest().encode() != seal:
                raise damaged
            if pages:
                file.seek(0)
                hash_, remaining = hashlib.sha256(), start
                while remaining and (block := file.read(min(remaining, 1 << 20))):
                    hash_.update(block)
                    remaining -= len(block)
                if hash_.hexdigest().encode() != digest:
                    raise damaged
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from None
    return seal.decode()


def is_rewritten(path: Path) -> bool:
    """Whether another tool wrote what it had read from a sealed file: Arrow copies the mark, but no digest."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path).metadata or {}
    except (pa.ArrowException, OSError):
        return False
    return _SEALED in metadata and not {_SEAL, _PAGES, _GROUPS} & set(metadata)


def check_groups(path: Path, metadata: Mapping[bytes, bytes], groups: Iterable[int]) -> None:
    """Check row groups of a sealed Parquet file whose footer was checked.

    Parameters
    ----------
    path : Path
    metadata : mapping
        Of the footer.
    groups : iterable of int

    Raises
    ------
    DataError
        If one was damaged or changed after it was written.
    """
    ends = [[0, 0], *json.loads(metadata[_GROUPS])]
    with path.open("rb") as file:
        for group in groups:
            (start, _), (end, crc) = ends[group : group + 2]
            file.seek(start)
            if zlib.crc32(file.read(end - start)) != crc:
                raise DataError(f"{path} was damaged or changed after it was written; put back a copy of it")


def _value(footer: bytes, key: bytes) -> bytes | None:
    at = footer.rfind(key + _STRING)
    first = at + len(key + _STRING)
    return footer[first : first + _DIGITS] if at >= 0 else None


def write_table(table: pa.Table, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write a sealed Parquet file atomically, with `metadata` as JSON in its schema."""
    groups = (table.slice(start, _ROWS) for start in range(0, max(len(table), 1), _ROWS))
    with atomic_path(path) as temporary, temporary.open("w+b") as file:
        write_parquet(groups, table.schema, file, metadata)


_ROWS = 1 << 17
"""Rows in a row group."""


_COLUMNS = {
    "forecast": {"mean", "std", "probed"},
    "replay plan": {"weight", "held_out"},
    "score file": {"nll", "tokens"},
}
"""By which our kinds of tables are told."""


def neighbour(path: Path) -> str:
    """Return "; did you mean X?" if something of a similar name is in the folder of a path, else an empty string.

    An ending that many files have makes no two names similar.
    """
    try:
        there = {each.stem: each.name for each in path.parent.iterdir()}
    except OSError:
        return ""
    found = closest(path.stem, there)
    return "" if found is None else f"; did you mean {there[found]}?"


def read_table(
    path: Path, columns: Mapping[str, type], optional: Mapping[str, type] | None = None, *, kind: str
) -> tuple[pa.Table, dict[str, Any]]:
    """Read a Parquet file written by `write_table`, and its metadata.

    Parameters
    ----------
    path : Path
    columns : mapping of str to type
        Columns that must be there: `str`, `float`, `int` or `bool`. Only numbers of the type `float` may be missing.
    optional : mapping of str to type, optional
        Columns that may be there, and whose values may be missing.
    kind : str
        What messages call the kind of file.

    Raises
    ------
    DataError
        If the file cannot be read, was damaged, lacks one of `columns`, or a column has another type.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such file{neighbour(path)}")
    check_seal(path)
    with opened_parquet(path) as file:
        names = file.schema_arrow.names
        if missing := [name for name in columns if name not in names]:
            others = [name for name, needed in _COLUMNS.items() if needed.issubset(names)]
            hint = f"; it has the columns of a {others[0]}" if others else ""
            raise DataError(f"{path} is not a {kind} file: the column {missing[0]!r} is missing{hint}")
        if repeated := [name for name in names if names.count(name) > 1]:
            raise DataError(f"{path}: two columns are called {repeated[0]!r}")
        known = [name for name in {**columns, **(optional or {})} if name in names]
        table = file.read(columns=known)
        table.validate(full=True)  # a text that is not UTF-8
    for name, type_ in {**columns, **(optional or {})}.items():
        if name in names and not _is_of(table.schema.field(name).type, type_):
            raise DataError(
                f"{path}: the column {name!r} must hold {_TYPES[type_]}, not {table.schema.field(name).type}"
            )
        if name in columns and type_ is not float and table.column(name).null_count:
            raise DataError(f"{path}: {'an id' if name == 'id' else f'a value of {name!r}'} is missing")
    return table, _metadata(table.schema, path)


_TYPES = {str: "text", float: "numbers", int: "whole numbers", bool: "true or false"}


def _is_of(arrow: pa.DataType, type_: type) -> bool:
    """Whether an Arrow type holds what a Python type does."""
    import pyarrow as pa

    types = pa.types
    if type_ is str:
        arrow = arrow.value_type if types.is_dictionary(arrow) else arrow
        return any(is_text(arrow) for is_text in (types.is_string, types.is_large_string, types.is_string_view))
    if type_ is bool:
        return bool(types.is_boolean(arrow))
    return bool(types.is_integer(arrow) or (type_ is float and types.is_floating(arrow)))


@contextmanager
def opened_parquet(path: Path, *, pages: bool = True, **options: Any) -> Iterator[Any]:
    """Open a Parquet file as a `pyarrow.parquet.ParquetFile`; unless `pages` is False, page checksums are checked.

    Raises
    ------
    DataError
        If it cannot be read, while it is opened or in the block.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=pages, **options) as file:
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError, MemoryError, OverflowError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path} is not a readable Parquet file: {reason}") from None


def read_metadata(path: Path) -> dict[str, Any]:
    """Read the metadata of a Parquet file written by `write_table`, without its columns."""
    check_seal(path, pages=False)
    with opened_parquet(path) as file:
        return _metadata(file.schema_arrow, path)


def _metadata(schema: pa.Schema, path: Path) -> dict[str, Any]:
    metadata = parse_json((schema.metadata or {}).get(_METADATA_KEY, b"{}"), f"the metadata of {path}")
    if not isinstance(metadata, dict):
        raise DataError(f"the metadata of {path} is not a JSON object")
    return metadata


ADDED = len(".answers.partial.12345")
"""So many characters commands add to a name, for files of unfinished work."""


def check_destination(path: Path, *, folder: bool = False) -> None:
    """Try whether a file can be written, before the work whose result it is to hold; nothing is changed.

    Parameters
    ----------
    path : Path
    folder : bool
        Whether it is a folder that is written to.

    Raises
    ------
    DataError
        If something else has that name, its folder cannot be made or written to, or the name is too long.
    """
    try:
        if path.exists() and not (path.is_dir() if folder else path.is_file()):
            what = "a folder" if path.is_dir() else "no folder" if folder else "no regular file"
            raise DataError(f"{path} is {what}; give another name to write to")
        there = path if folder else path.parent
        while not there.exists():
            there = there.parent
        if not there.is_dir():
            raise DataError(f"{path} cannot be written: {there} is a file, not a folder")
        longest = os.pathconf(there, "PC_NAME_MAX")
        for part in path.relative_to(there).parts:
            if len(os.fsencode(part)) + ADDED > longest:
                raise DataError(f"{path} cannot be written: the name {part!r} is too long; take a shorter one")
        with tempfile.TemporaryFile(dir=there, prefix=TEMPORARY):
            pass
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}") from None
    except UnicodeEncodeError:
        raise DataError(f"{path} cannot be written: the name cannot be encoded") from None
