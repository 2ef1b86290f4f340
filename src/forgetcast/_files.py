"""Files that are either the old ones or the new ones, never half of each."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from forgetcast.errors import DataError, MissingExtraError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, and put it in place of `path` when the block ends without an error.

    The data reaches the disk before the name does, so a crash leaves the old file or the new one.
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
    """Permissions that new files of this process do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; NaN is refused, because readers other than Python's cannot parse it."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON, with an error that names the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from None


def read_saved_dataset(path: Path) -> list[dict[str, Any]]:
    """Rows of a directory that `datasets.Dataset.save_to_disk` wrote."""
    if not (path / "dataset_info.json").is_file():
        raise DataError(f"{path} is a directory, but not one that Dataset.save_to_disk wrote")
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise MissingExtraError("lm", error) from error
    return list(load_from_disk(str(path)))
