"""Check every byte of an atlas, and say of each damaged, lost or foreign file what to do about it."""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from forgetcast.atlas import rows, zarr_format
from forgetcast.atlas.index import BEFORE, INDEX, POOL, parse_index
from forgetcast.atlas.replays import lost_replays, read_replay
from forgetcast.atlas.rows import BLOCK, FLIPPED, FORGETTING, POSITION, Part
from forgetcast.atlas.storage import FolderStorage, storage_of
from forgetcast.atlas.store import CURVES, parse_share
from forgetcast.data.pool import Pool
from forgetcast.errors import DataError, ForgetcastError
from forgetcast.files import SECONDS_UNTIL_ABANDONED, TEMPORARY, check_seal, opened_parquet
from forgetcast.measure.scores import Scores

Severity = Literal["error", "note"]


@dataclass(frozen=True)
class Finding:
    """What is wrong with a file of an atlas.

    Attributes
    ----------
    file : str
        Its name within the atlas.
    message : str
        What is wrong, and what to do.
    severity : 'error' or 'note'
        A note is about what cannot change a number.
    """

    file: str
    message: str
    severity: Severity = "error"


def validate(location: str | Path) -> list[Finding]:
    """Read all files of an atlas, those that do not count any more too, and return what is wrong with them.

    A remote atlas is downloaded anew, so that its bytes are checked and not those of earlier copies.

    Parameters
    ----------
    location : path or URL

    Returns
    -------
    list of Finding
        In the order of the files' names; empty if all is well.

    Raises
    ------
    DataError
        If there is no atlas.
    """
    storage = storage_of(location)
    if not {INDEX, POOL, BEFORE}.intersection(names := storage.names()):
        raise DataError(f"{location} is not an atlas: atlas.json is missing")
    if isinstance(storage, FolderStorage):
        return _Check(storage).run()
    with tempfile.TemporaryDirectory(prefix="forgetcast-") as folder:
        for name in names:
            copy = Path(folder) / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(storage.read(name))
        findings = _Check(FolderStorage(Path(folder))).run()
        return [Finding(each.file, each.message.replace(folder, str(location)), each.severity) for each in findings]


@dataclass
class _Check:
    """The state of one check: the findings so far, and what is known of the atlas."""

    storage: FolderStorage
    findings: list[Finding] = field(default_factory=list)
    examples: int | None = None

    def run(self) -> list[Finding]:
        folder, index = self.storage.location, None
        with self.checking(INDEX):
            index = parse_index(self.storage)
        if index is not None:
            self.examples = index.examples
        seals = index.seals if index is not None else {}
        old = index is not None and index.format == zarr_format.FORMAT
        pool = self.load(POOL, Pool.load, seals, old)
        before = self.load(BEFORE, Scores.load, seals, old)
        if pool is not None and index is not None:
            with self.checking(POOL):
                if pool.fingerprint != index.pool:
                    raise DataError(f"{folder / POOL} is another pool than the one that was scored; put it back")
                if len(pool) != index.examples:
                    raise DataError(f"{folder / POOL} has {len(pool)} examples, not {index.examples}; put it back")
        if pool is not None and before is not None and tuple(pool.ids) != tuple(before.ids):
            self.add(BEFORE, "its examples are not those of pool.parquet; put back the one that is wrong")
        if old:
            self.check_arrays()
        else:
            base = seals.get(BEFORE) or self.seal_of_base()
            self.check_rows(base)
            self.check_curves(base)
            for name, receipt in lost_replays(self.storage):
                self.add(name, f"was stored and is lost; put back a copy, or remove {receipt} to do without it")
            for name in self.storage.names("replays"):
                with self.checking(name):
                    read_replay(self.storage, name)
        self.check_leftovers(old)
        return sorted(self.findings, key=lambda finding: finding.file)

    def add(self, file: str, message: str, severity: Severity = "error") -> None:
        self.findings.append(Finding(file, message, severity))

    @contextmanager
    def checking(self, file: str, severity: Severity = "error") -> Iterator[None]:
        """Turn an error in the block into a finding about a file."""
        try:
            yield
        except ForgetcastError as error:
            self.add(file, str(error), severity)
        except FileNotFoundError:
            self.add(file, "is missing; put back a copy of it", severity)
        except OSError as error:
            self.add(file, f"cannot be read: {error.strerror or error}", severity)
        except Exception as error:  # what a damaged file does to the libraries that parse it cannot be listed
            self.add(file, f"is damaged; put back a copy of it ({type(error).__name__})", severity)

    def load(self, name: str, read: Callable[[Path], Any], seals: dict[str, str], old: bool) -> Any:
        path = self.storage.location / name
        with self.checking(name):
            seal = check_seal(self.storage.local(name))
            if seals and seal != seals.get(name):
                raise DataError(f"{path} is not the file that the atlas was created with; put it back")
            if seal is None and not old:
                raise DataError(f"{path} was not written as part of an atlas; put it back")
            return read(path)
        return None

    def seal_of_base(self) -> str | None:
        """Return the seal of before.parquet where atlas.json cannot be read; None if there is none."""
        try:
            return check_seal(self.storage.location / BEFORE, pages=False)
        except DataError:
            return None  # found already

    def check_rows(self, base: str | None) -> None:
        receipts, present = defaultdict(set), defaultdict(set)
        for name in self.storage.names("receipts"):
            folder, sign, file = name.removeprefix("receipts/").partition("/")
            if not sign:
                self.add(name, "is no receipt; move it elsewhere")
            elif folder != rows.OTHERS:
                receipts[folder].add(file)
        for name in self.storage.names("rows"):
            folder, sign, file = name.removeprefix("rows/").partition("/")
            if sign and rows.is_row_file(file):
                present[folder].add(file)
            else:
                self.add(name, "is no part of an atlas, and keeps it from being opened; move it elsewhere")
        for folder in sorted({*present, *receipts}):
            self.check_row(folder, present[folder], receipts[folder], base)

    def check_curves(self, base: str | None) -> None:
        """Check the rows of each share of the fine-tunes as those of the atlas."""
        for folder in self.storage.folders(CURVES):
            with self.checking(f"{CURVES}/{folder}"):
                parse_share(self.storage, folder)
                below = _Check(FolderStorage(self.storage.location / CURVES / folder), examples=self.examples)
                below.check_rows(base)
                self.findings += [replace(each, file=f"{CURVES}/{folder}/{each.file}") for each in below.findings]

    def check_row(self, folder: str, present: set[str], receipts: set[str], base: str | None) -> None:
        dropped: set[str] = set()
        for file in sorted(present):
            if file.endswith(".json"):
                with self.checking(f"rows/{folder}/{file}"):
                    dropped |= {file, *rows.read_dropped(self.storage, folder, file)}
        for file in sorted(present):
            name = f"rows/{folder}/{file}"
            if file.endswith(".parquet"):
                with self.checking(name, "note" if file in dropped else "error"):
                    self.check_part(folder, file, base)
            if file not in receipts:
                self.add(name, "has no receipt, so that its loss would go unnoticed; it counts all the same", "note")
        for file in sorted(receipts - present - dropped):
            self.add(
                f"rows/{folder}/{file}",
                "was stored and is lost; put back a copy of it, or give the row up with: "
                f"forgetcast atlas drop {rows.atlas_of(self.storage)} {folder}",
            )

    def check_part(self, folder: str, file: str, base: str | None) -> None:
        path = self.storage.location / "rows" / folder / file
        check_seal(path)
        part = Part(self.storage, base or "", folder, file)
        if base is None:  # before.parquet is damaged; which base the part belongs to cannot be said
            return
        if self.examples is not None and part.info.examples != self.examples:
            raise DataError(f"{path} has {part.info.examples} examples, the pool {self.examples}; move it elsewhere")
        n = part.info.examples
        with opened_parquet(path) as parquet:
            names = parquet.schema_arrow.names
            sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
            columns = {name: parquet.read([name])[name].to_numpy() for name in names}
        if FORGETTING not in names or not set(names) <= {POSITION, FORGETTING, FLIPPED}:
            raise DataError(f"{path} has the columns {', '.join(names)}; move it elsewhere")
        positions = columns.pop(POSITION, None)
        if positions is None:
            if len(columns[FORGETTING]) != n or any(size != BLOCK for size in sizes[:-1]):
                raise DataError(f"{path} does not have a number for each of {n} examples; move it elsewhere")
        elif len(positions) and (positions[0] < 0 or positions[-1] >= n or (np.diff(positions) <= 0).any()):
            raise DataError(f"{path}: its positions are not those of {n} examples in order; move it elsewhere")
        for column, values in columns.items():
            self.check_values(path, column, values)

    def check_values(self, path: Path, column: str, values: np.ndarray) -> None:
        if values.dtype != np.float32 or np.isinf(values).any():
            raise DataError(f"{path}: {column} has other values than finite 32-bit numbers and NaN; drop the row")
        if column == FLIPPED and not np.isin(values[~np.isnan(values)], (0, 1)).all():
            raise DataError(f"{path}: {column} has other values than 0, 1 and NaN; drop the row")

    def check_arrays(self) -> None:
        """Read the rows of an atlas of format 1, which has no digests: what can be checked is that they are there."""
        with self.checking(INDEX):
            for row in zarr_format.list_rows(self.storage).values():
                for column in (FORGETTING, FLIPPED):
                    with self.checking(zarr_format.group_of(column)):
                        self.check_values(row.path, column, row.read(column, 0, self.examples or 0))
        with self.checking("replays.json"):
            zarr_format.replays(self.storage)

    def check_leftovers(self, old: bool) -> None:
        folder = self.storage.location
        for parent, _, files in os.walk(folder):
            for file in files:
                name = (Path(parent) / file).relative_to(folder).as_posix()
                top, leftover = name.partition("/")[0], zarr_format.is_leftover(name)
                if file.startswith(TEMPORARY):
                    hours = SECONDS_UNTIL_ABANDONED // 3600
                    self.add(
                        name,
                        "is being written, or was left by a killed process; the next write there removes it then, "
                        f"or after {hours} hours if that process was on another machine",
                        "note",
                    )
                elif leftover and not old:
                    self.add(
                        top, "is of the atlas before its conversion; `forgetcast atlas compact` removes it", "note"
                    )
                elif not leftover and top not in (INDEX, POOL, BEFORE, "rows", "receipts", "replays", CURVES):
                    self.add(name, "is no part of an atlas; nothing reads it", "note")
