"""Where an atlas is kept: a folder, or a URL that fsspec knows, such as s3://bucket/runs.atlas."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from forgetcast.errors import DataError, MissingExtraError
from forgetcast.files import atomic_path, make_folder, sync_folder


class Storage(ABC):
    """Files by their names, such as `rows/law/x.parquet`. A file is complete or it does not exist."""

    location: Path | str
    """What the user calls it."""

    @abstractmethod
    def names(self, folder: str = "") -> list[str]:
        """Return the names of all files in a folder and below it; an empty list if there is no such folder."""

    @abstractmethod
    def folders(self, folder: str) -> list[str]:
        """Return the names of the folders in a folder; an empty list if there is no such folder."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return the content of a file; raise FileNotFoundError if there is none."""

    @abstractmethod
    def local(self, name: str, *, version: str = "") -> Path:
        """Return a path on this machine with the content of a file that never changes.

        `version` tells contents apart that one name had at different times. Raises FileNotFoundError.
        """

    @abstractmethod
    def scratch(self, name: str) -> Path:
        """Return a path on this machine for unfinished work, which is no file of the storage."""

    @abstractmethod
    def write(self, name: str, *, exclusive: bool = False) -> AbstractContextManager[Path]:
        """Yield a path on this machine to write to; the file is stored when the block ends without an error.

        If `exclusive`, raise FileExistsError if the file exists, where the storage can tell at that moment.
        """

    @abstractmethod
    def mark(self, name: str) -> None:
        """Store an empty file."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""

    @abstractmethod
    def size(self) -> int:
        """Return the bytes of all files."""

    def below(self, folder: str) -> Storage:
        """Return the storage that a folder of this one is."""
        return storage_of(f"{self.location}/{folder}")

    def __str__(self) -> str:
        return str(self.location)


def storage_of(location: Path | str) -> Storage:
    """Return the storage at a path or URL; nothing is read or written."""
    return RemoteStorage(str(location)) if is_url(location) else FolderStorage(Path(location))


def is_url(location: Path | str) -> bool:
    """Say whether a location is a URL and not a path."""
    return "://" in str(location)


def beside(location: Path | str, what: str) -> Path:
    """Return the path of a folder next to a location, or in the current folder if it is a URL: NAME.WHAT."""
    path = Path(str(location).rpartition("/")[2]) if is_url(location) else Path(location)
    return path.with_name(f"{path.name}.{what}")


@contextmanager
def whole_folder(location: Path | str, last: str) -> Iterator[Path]:
    """Yield the path of a folder to make, which is moved or copied to `location` when the block ends without an error.

    Parameters
    ----------
    location : path or URL
    last : str
        The file without which the others are nothing, so that it is uploaded last.

    Raises
    ------
    DataError
        If there is something at `location` already.
    """
    storage = storage_of(location)
    if storage.names() or (isinstance(storage, FolderStorage) and storage.location.exists()):
        raise DataError(f"{location} exists already; choose another name")
    if isinstance(storage, FolderStorage):
        target = storage.location
        made = target.with_name(f".{target.name}.new")
        make_folder(target.parent)
        if made.exists():  # left by a killed process
            shutil.rmtree(made)
        try:
            yield made
            made.rename(target)
            sync_folder(target.parent)
        finally:
            shutil.rmtree(made, ignore_errors=True)
        return
    with tempfile.TemporaryDirectory(prefix="forgetcast-") as folder:
        made = Path(folder) / "new"
        yield made
        for name in sorted(FolderStorage(made).names(), key=lambda name: name == last):
            with storage.write(name) as path:
                shutil.copyfile(made / name, path)


class FolderStorage(Storage):
    """A folder on this machine or in a shared file system."""

    def __init__(self, location: Path) -> None:
        self.location: Path = location

    def names(self, folder: str = "") -> list[str]:
        """Return the names of all files in a folder; see `Storage.names`."""
        found = []
        for parent, _, files in os.walk(self.location / folder):
            below = Path(parent).relative_to(self.location)
            found += [(below / file).as_posix() for file in files if not file.startswith(".")]
        return sorted(found)

    def folders(self, folder: str) -> list[str]:
        """Return the names of the folders in a folder."""
        if not (path := self.location / folder).is_dir():
            return []
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())

    def read(self, name: str) -> bytes:
        """Return the content of a file."""
        return (self.location / name).read_bytes()

    def local(self, name: str, *, version: str = "") -> Path:  # noqa: ARG002 - the file is here
        """Return the path of a file."""
        if not (path := self.location / name).is_file():
            raise FileNotFoundError(2, "is missing", str(path))
        return path

    def scratch(self, name: str) -> Path:
        """Return the path of a hidden file in the folder, which is known to be writable."""
        return self.location / f".{name}"

    def write(self, name: str, *, exclusive: bool = False) -> AbstractContextManager[Path]:
        """Write atomically and durably; see `Storage.write`."""
        return atomic_path(self.location / name, exclusive=exclusive)

    def mark(self, name: str) -> None:
        """Store an empty file."""
        path = self.location / name
        make_folder(path.parent)
        path.touch()
        sync_folder(path.parent)

    def remove(self, name: str) -> None:
        """Remove a file, and its folder if it was the last one there."""
        path = self.location / name
        path.unlink(missing_ok=True)
        if path.parent != self.location and path.parent.is_dir() and not any(path.parent.iterdir()):
            path.parent.rmdir()

    def size(self) -> int:
        """Return the bytes of all files."""
        return sum((self.location / name).stat().st_size for name in self.names())


class RemoteStorage(Storage):
    """A URL of fsspec. What never changes is downloaded once, into the user's cache folder.

    Raises
    ------
    DataError
        If the URL cannot be reached, there are no credentials for it, or its protocol is unknown.
    """

    def __init__(self, location: str) -> None:
        try:
            from fsspec.core import url_to_fs
        except ImportError as error:
            raise MissingExtraError("remote", error) from None
        self.location: str = location.rstrip("/")
        with self._reaching():
            self._files, self._root = url_to_fs(self.location, use_listings_cache=False)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, FileExistsError, DataError):
            raise
        except ImportError as error:
            raise DataError(f"{self.location}: {str(error).splitlines()[0]}") from None
        except Exception as error:  # each protocol has exceptions of its own, without a common base
            raise DataError(f"{self.location}: {type(error).__name__}: {str(error).split(chr(10))[0]}") from None

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def names(self, folder: str = "") -> list[str]:
        """Return the names of all files in a folder; see `Storage.names`."""
        with self._reaching():
            self._files.invalidate_cache()
            try:
                found = self._files.find(self._path(folder))
            except FileNotFoundError:
                return []
        return sorted(path.removeprefix(self._root).lstrip("/") for path in found)

    def folders(self, folder: str) -> list[str]:
        """Return the names of the folders in a folder."""
        with self._reaching():
            self._files.invalidate_cache()
            try:
                found = self._files.ls(self._path(folder), detail=True)
            except FileNotFoundError:
                return []
        return sorted(entry["name"].rstrip("/").rpartition("/")[2] for entry in found if entry["type"] == "directory")

    def read(self, name: str) -> bytes:
        """Return the content of a file."""
        with self._reaching():
            content: Any = self._files.cat_file(self._path(name))
        return bytes(content)

    def local(self, name: str, *, version: str = "") -> Path:
        """Return the path of a copy, downloaded if it is not there yet."""
        copy = self._cached(version) / name
        if not copy.exists():
            with atomic_path(copy) as temporary, self._reaching():
                self._files.get_file(self._path(name), str(temporary))
        return copy

    def _cached(self, version: str) -> Path:
        key = hashlib.sha256(f"{self.location} {version}".encode()).hexdigest()[:16]
        return cache_folder() / "atlases" / key

    def scratch(self, name: str) -> Path:
        """Return the path of a file beside the copies of what never changes."""
        return self._cached("") / f".{name}"

    @contextmanager
    def write(self, name: str, *, exclusive: bool = False) -> Iterator[Path]:
        """Write to this machine, then upload in one operation; see `Storage.write`."""
        with tempfile.TemporaryDirectory(prefix="forgetcast-") as folder:
            path = Path(folder) / Path(name).name
            yield path
            with self._reaching():
                if exclusive and self._files.exists(self._path(name)):
                    raise FileExistsError(17, "exists already", f"{self.location}/{name}")
                self._files.put_file(str(path), self._path(name))

    def mark(self, name: str) -> None:
        """Store an empty file."""
        with self._reaching():
            self._files.pipe_file(self._path(name), b"")

    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""
        with self._reaching():
            if self._files.exists(self._path(name)):
                self._files.rm_file(self._path(name))

    def size(self) -> int:
        """Return the bytes of all files."""
        with self._reaching():
            self._files.invalidate_cache()
            return int(self._files.du(self._root))


def cache_folder() -> Path:
    """Return the folder for copies of remote files: `$FORGETCAST_CACHE`, else one in the user's cache folder."""
    if given := os.environ.get("FORGETCAST_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "forgetcast"
