"""Atomic writes, and reading of JSON and Parquet with errors that name the file."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgetcast.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

_METADATA_KEY = b"forgetcast"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`, and rename it to `path` if the block ends without an error.

    The data is synced before the rename, so a crash leaves the old file or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~umask())  # mkstemp's 0600 is for secrets; these files are shared with a team
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def umask() -> int:
    """Return the umask of this process."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; NaN is refused, because readers other than Python's cannot parse it."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON; raise DataError with the name of the file if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from None


def write_table(table: pa.Table, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write a Parquet file atomically, with `metadata` as JSON in its schema."""
    import pyarrow.parquet as pq

    with atomic_path(path) as temporary:
        pq.write_table(table.replace_schema_metadata({_METADATA_KEY: json.dumps(dict(metadata))}), temporary)


def read_table(path: Path, columns: Iterable[str], *, kind: str) -> tuple[pa.Table, dict[str, Any]]:
    """Read a Parquet file written by `write_table`, and its metadata.

    Raises
    ------
    DataError
        If the file cannot be read, lacks one of `columns`, or an id is not a string; `kind` names the kind of file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}") from None
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise DataError(f"{path} is not a {kind} file: the column {missing[0]!r} is missing")
    ids = table.column("id").to_pylist()
    if any(not isinstance(id_, str) for id_ in ids):
        raise DataError(f"{path}: an id is missing or is not a string")
    return table, _metadata(table.schema)


def read_metadata(path: Path) -> dict[str, Any]:
    """Read the metadata of a Parquet file written by `write_table`, without its columns."""
    import pyarrow.parquet as pq

    return _metadata(pq.read_schema(path))


def _metadata(schema: pa.Schema) -> dict[str, Any]:
    return json.loads((schema.metadata or {}).get(_METADATA_KEY, b"{}"))
