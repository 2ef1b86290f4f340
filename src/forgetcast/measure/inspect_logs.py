"""Scores from the logs of Inspect, .eval and .json, which its documentation describes; Inspect itself is not needed."""

from __future__ import annotations

import math
import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from forgetcast.errors import DataError
from forgetcast.files import decode_json
from forgetcast.measure.logs import LogFile, LogTable, digest_of, one_run
from forgetcast.measure.scores import Scores

ZSTANDARD = 93
"""The method's number in a zip archive; Python's zipfile knows it from 3.14 on."""

NO_LOSS = "Inspect keeps no log-likelihood"
RIGHT = {"C": 1.0, "I": 0.0, "N": 0.0} | dict.fromkeys(("yes", "true"), 1.0) | dict.fromkeys(("no", "false"), 0.0)
"""Values that Inspect itself counts as 1 or 0; C is correct, I incorrect, N no answer."""

PREFIX = "attachment://"
MESSAGE = ("role", "content", "tool_calls", "function", "error")
"""What counts of a message."""

_FAULTS = (
    ArithmeticError, AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError, zlib.error,
    struct.error, zipfile.BadZipFile,
)  # fmt: skip


def is_inspect(path: Path) -> bool:
    """Return whether a file, or the files of a folder, are logs of Inspect by their names and first characters."""
    if path.is_dir():
        if any(path.rglob("*.eval")):
            return True
        return not any(path.rglob("*.jsonl")) and any(is_inspect(file) for file in path.rglob("*.json"))
    if path.suffix != ".json":
        return path.suffix == ".eval"
    try:
        with path.open(encoding="utf-8") as file:
            start = file.read(4096).lstrip()
    except (OSError, UnicodeDecodeError):
        return False
    return start.startswith("{") and '"eval"' in start


def read_inspect(path: str | Path) -> tuple[Scores, tuple[str, ...]]:
    """Read logs of Inspect: one file, .eval or .json, or a folder of them.

    Parameters
    ----------
    path : path
        A file, or a folder with the logs of one model. Of several runs the newest is read if it has all tasks; the
        metadata say so under 'notes'.

    Returns
    -------
    Scores
        Ids are "task/sample_id", plus "/epoch N" where a log has several epochs and the scorer's name where it has
        several scorers. A score of C, 1 or true is an exact match of 1; I, N, 0 or false is 0; all others are NaN,
        counted in metadata 'notes', as are samples with an error and runs that did not finish. Losses are NaN, since
        Inspect keeps none. Digests are of the input, the choices, the target and the scorer.
    tuple of str
        The task of each example.

    Raises
    ------
    DataError
        If there is no such file, runs cannot be told apart, or a file is not a log; the message names it.
    """
    path = Path(path)
    table, metadata = read_table(path)
    return table.scores(path, metadata)


def read_table(path: Path) -> tuple[LogTable, dict[str, Any]]:
    """Read samples with what was asked; `read_inspect` says how."""
    headers = {file: _header(file) for file in _find(path)}
    files, note = one_run(path, _files(headers))
    table = LogTable(notes=[note] if note else [])
    for file in files:
        try:
            _add(table, file, headers[file.path])
        except DataError:
            raise
        except _FAULTS:
            raise DataError(f"{file.path}: not a log of Inspect") from None
    return table, {"origin": "Inspect", "model": files[0].model}


def _find(path: Path) -> list[Path]:
    paths = [path]
    if path.is_dir():
        paths = sorted({*path.rglob("*.eval"), *(file for file in path.rglob("*.json") if is_inspect(file))})
    if not paths or not all(file.is_file() for file in paths):
        raise DataError(f"{path}: there are no logs of Inspect here")
    return paths


def _files(headers: Mapping[Path, Mapping[str, Any]]) -> list[LogFile]:
    """Name the tasks, models and runs; a run is named by the time at which its first task started."""
    started: dict[str, str] = {}
    for path, header in headers.items():
        try:
            run, created = str(header["eval"]["run_id"]), datetime.fromisoformat(header["eval"]["created"])
            _ = f"{header['eval']['task']}{header['eval']['model']}".encode()
        except _FAULTS:
            raise DataError(f"{path}: not a log of Inspect") from None
        time = created.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        started[run] = min(time, started.get(run, time))
    return [
        LogFile(path, str(spec["task"]), str(spec["model"]), f"{started[str(spec['run_id'])]} {spec['run_id']}")
        for path, spec in ((path, header["eval"]) for path, header in headers.items())
    ]


def _header(path: Path) -> dict[str, Any]:
    """Return a log without its samples."""
    if path.suffix != ".eval":
        return {key: value for key, value in _json_log(path).items() if key != "samples"}
    with _Archive(path) as archive:
        # A log that is still being written, or whose writer died, has a journal only.
        if "header.json" in archive.names:
            return archive.read("header.json")
        return {"status": "started", **archive.read("_journal/start.json")}


def _json_log(path: Path) -> dict[str, Any]:
    try:
        log = decode_json(path.read_text(encoding="utf-8-sig"))
        if not isinstance(log["eval"], dict):
            raise TypeError
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except _FAULTS:
        raise DataError(f"{path}: not a log of Inspect") from None
    return log


class _Archive:
    """An .eval file: a zip archive of JSON."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> _Archive:
        try:
            self._file = self.path.open("rb")
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror}") from None
        try:
            # Of entries of one name, the last counts.
            self._entries = {entry.filename: entry for entry in zipfile.ZipFile(self._file).infolist()}
        except _FAULTS:
            self._file.close()
            raise DataError(f"{self.path}: not a log of Inspect, or a broken one: no zip archive") from None
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def read(self, name: str) -> dict[str, Any]:
        try:
            return decode_json(self._bytes(self._entries[name]).decode("utf-8-sig"))
        except (*_FAULTS, OSError):
            raise DataError(f"{self.path}: {name} is missing or broken") from None

    def _bytes(self, entry: zipfile.ZipInfo) -> bytes:
        if entry.compress_type != ZSTANDARD:
            return zipfile.ZipFile(self._file).read(entry)
        import pyarrow as pa

        self._file.seek(entry.header_offset)
        lengths = struct.unpack("<4s22xHH", self._file.read(30))
        if lengths[0] != b"PK\x03\x04":
            raise zipfile.BadZipFile
        self._file.seek(lengths[1] + lengths[2], 1)
        packed = pa.BufferReader(self._file.read(entry.compress_size))
        with pa.input_stream(packed, compression="zstd") as stream:
            content = stream.read(entry.file_size + 1)
        if len(content) != entry.file_size or zlib.crc32(content) != entry.CRC:
            raise zipfile.BadZipFile
        return content


def _samples(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the samples with what their texts refer to put in."""
    if path.suffix != ".eval":
        for sample in _json_log(path).get("samples") or ():
            yield _resolved(sample, sample.get("attachments") or {})
        return
    with _Archive(path) as archive:
        names = [name for name in archive.names if name.startswith("samples/") and name.endswith(".json")]
        # A large sample is a folder; what it refers to is numbered through files named by their first number.
        large = [name.removesuffix("sample.json") for name in names if re.search(r"_epoch_\d+/sample\.json$", name)]
        for name in names:
            if not name.startswith(tuple(large)):  # an id may have slashes
                sample = archive.read(name)
                yield _resolved(sample, sample.get("attachments") or {})
        for folder in large:
            parts = [name for name in names if name.startswith(f"{folder}attachments/")]
            parts.sort(key=lambda name: int(Path(name).stem))
            texts: list[Any] = [text for part in parts for text in archive.read(part)]
            yield _resolved(archive.read(f"{folder}sample.json"), {str(at): text for at, text in enumerate(texts)})


def _resolved(sample: dict[str, Any], attachments: Mapping[str, str]) -> dict[str, Any]:
    def resolve(value: Any) -> Any:
        if isinstance(value, str) and value.startswith(PREFIX):
            return attachments.get(value.removeprefix(PREFIX), value)
        if isinstance(value, list):
            return [resolve(item) for item in value]
        return {key: resolve(item) for key, item in value.items()} if isinstance(value, dict) else value

    return sample | {name: resolve(sample.get(name)) for name in ("input", "choices", "target")}


def _add(table: LogTable, file: LogFile, header: Mapping[str, Any]) -> None:
    """Add a log's samples, and those that it should have, to the table."""
    spec, status = header["eval"], header.get("status")
    if status != "success" or header.get("invalidated"):
        what = f"has the status {status!r}" if status != "success" else "was marked invalid in part"
        table.notes.append(f"{file.task}: the run {what}")
    samples = {}
    for sample in _samples(file.path):
        at = (sample["id"], sample.get("epoch", 1))
        if at in samples or not isinstance(at[0], int | str):
            raise DataError(f"{file.path}: the sample {at[0]!r} occurs twice, or has no id")
        if "scores" not in sample and "score" in sample:  # version 1
            sample["scores"] = {"score": sample["score"]}
        kept = ("scores", "error", "invalidation")
        samples[at] = {name: sample.get(name) for name in kept} | {"digest": _digest(sample), "asked": _asked(sample)}
    epochs = max([spec.get("config", {}).get("epochs") or 1, *(epoch for _, epoch in samples)])
    scorers = list(dict.fromkeys(name for sample in samples.values() for name in sample["scores"] or ()))
    scorers = scorers or [scorer["name"] for scorer in spec.get("scorers") or ()] or ["no scorer"]
    planned = [(id_, epoch) for epoch in range(1, epochs + 1) for id_ in spec["dataset"].get("sample_ids") or ()]
    unlike: Counter[str] = Counter()
    for at in dict.fromkeys((*planned, *samples)):
        found = samples.get(at)
        for scorer in scorers:
            key = f"{file.task}/{at[0]}"
            key += f"/epoch {at[1]}" if epochs > 1 else ""
            key += f"/{scorer}" if len(scorers) > 1 else ""
            key.encode()
            if key in table.rows:
                raise DataError(f"{file.path}: the sample {key!r} occurs twice")
            exact_match, reason = _right(found, scorer)
            if reason is not None:
                unlike[reason] += 1
            table.rows[key] = {
                "task": file.task,
                "nll": math.nan,
                "reason": NO_LOSS + (f"; {reason}" if reason else ""),
                "exact_match": exact_match,
                "digest": digest_of([found["digest"], scorer]) if found else None,
                "asked": found["asked"] if found else None,
            }
    table.notes += [f"{file.task}: {n} score(s) not compared: {reason}" for reason, n in sorted(unlike.items())]


def _right(sample: Mapping[str, Any] | None, scorer: str) -> tuple[float, str | None]:
    """Return 1 or 0, or NaN with a reason."""
    if sample is None:
        return math.nan, "the run did not reach the sample"
    if sample["error"]:
        return math.nan, "the sample ended in an error"
    if sample["invalidation"]:
        return math.nan, "the sample was marked invalid"
    score = (sample["scores"] or {}).get(scorer)
    if score is None or (value := score.get("value")) is None:
        return math.nan, "the sample was not scored"
    if isinstance(value, list | dict):
        return math.nan, "the score is not a single value"
    try:
        number = RIGHT[value if value in RIGHT else value.lower()] if isinstance(value, str) else float(value)
    except LookupError:
        number = float(value) if value.strip() in ("0", "1", "0.0", "1.0") else math.nan
    return (number, None) if number in (0, 1) else (math.nan, "the score is neither right nor wrong")


def _asked(sample: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the prompt and the target as fields of an example; None without a target."""
    asked, target = sample["input"], sample["target"]
    if not isinstance(asked, str):
        asked = "\n".join(str(message.get("content") or "") for message in asked)
    target = target if isinstance(target, str) else ", ".join(map(str, target or ()))
    return {"prompt": asked, "completion": target} if target.strip() else None


def _digest(sample: Mapping[str, Any]) -> str:
    """Hash input, choices and target; a message's own id is drawn anew in every run."""
    asked = sample["input"]
    if not isinstance(asked, str):
        asked = [{key: value for key, value in message.items() if key in MESSAGE and value} for message in asked]
    return digest_of([asked, sample["choices"] or None, sample["target"]])
