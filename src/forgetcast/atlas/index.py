"""What an atlas is of, in atlas.json; and whether there is one at a place, or could be."""

from __future__ import annotations

import errno
import os
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from forgetcast.atlas import zarr_format
from forgetcast.atlas.storage import Storage, storage_of
from forgetcast.errors import DataError
from forgetcast.files import check_destination, check_digest, neighbour, parse_json
from forgetcast.results import validated

FORMAT = 2

INDEX, POOL, BEFORE = "atlas.json", "pool.parquet", "before.parquet"


class Index(BaseModel):
    """Contents of atlas.json.

    Attributes
    ----------
    format : int
    model : str
        Name or path of the base model.
    model_hash : str or None
        Hash of its weights.
    pool : str
        Fingerprint of the pool.
    examples : int
        How many the pool has.
    answers : bool
        Whether the base model has exact match.
    seals : mapping
        Seal of each file that is written once.
    recipe : mapping
        The recipe shared by the tasks; empty if they have none in common.
    created : str
        Time, in ISO 8601.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    format: int = FORMAT
    model: str
    model_hash: str | None
    pool: str
    examples: int
    answers: bool
    seals: dict[str, str]
    recipe: dict[str, Any]
    created: str


def parse_index(storage: Storage) -> Index:
    """Read and check atlas.json of this version or of an earlier one.

    Raises
    ------
    DataError
        If there is none, it is damaged, or a newer version wrote it.
    """
    where = f"{storage}/{INDEX}"
    try:
        content = parse_json(storage.read(INDEX), where)
    except FileNotFoundError:
        place = storage.location
        if isinstance(place, Path) and not place.exists():
            raise DataError(f"{storage}: there is no such atlas{neighbour(place)}") from None
        raise DataError(f"{storage} is not an atlas: atlas.json is missing") from None
    except NotADirectoryError:
        raise DataError(f"{storage} is a file, and an atlas is a folder") from None
    except OSError as error:
        raise DataError(f"{where}: {error.strerror or error}") from None
    version = content.get("format") if isinstance(content, dict) else None
    if type(version) is int and version > FORMAT:
        raise DataError(f"{where} is of format {version}, and this version reads up to {FORMAT}; upgrade forgetcast")
    if type(version) is not int or version not in (zarr_format.FORMAT, FORMAT):
        raise DataError(f"{where} is not that of an atlas: its format is {version!r}")
    known = check_digest(content, where) if version == FORMAT else zarr_format.index(storage, content)
    return validated(Index, known, where)


def is_atlas(path: str | Path) -> bool:
    """Say whether there is an atlas, even if it cannot be read."""
    try:
        storage_of(path).read(INDEX)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def check_free(path: str | Path) -> None:
    """Raise DataError unless an atlas can be created: nothing is there, or what a process left that was stopped."""
    if not {name for name in storage_of(path).names() if not name.startswith(".")} <= {POOL, BEFORE}:
        raise DataError(f"{path} exists already; choose another name, or add to it")


def check_writable(path: str | Path) -> None:
    """Check that an atlas can be created or written to, before the work that leads to it; nothing is left there.

    Raises
    ------
    DataError
        If something else is there, or it cannot be reached.
    OSError
        If it cannot be written to; names the file or folder.
    """
    if not is_atlas(path):
        check_free(path)
    storage = storage_of(path)
    if isinstance(storage.location, Path):
        check_destination(storage.location, folder=True)
        if not storage.location.exists():
            return
    probe = f".writable-{secrets.token_hex(8)}"
    with storage.write(probe) as file:
        file.touch()
    storage.remove(probe)
    for folder in ("rows", "receipts", "replays", "curves"):  # of a shared folder, another user may own them
        place = storage.location
        if isinstance(place, Path) and (place / folder).exists() and not os.access(place / folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place / folder))


def now() -> str:
    """Return the time, in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="microseconds")
