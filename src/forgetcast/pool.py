"""Examples: the upstream pool and the fine-tuning tasks, read from JSONL, Parquet or a saved Hugging Face data set.

An example is one text, or a prompt with its completion. A pool's examples have ids, because a forgetting matrix, its
probes and a replay plan refer to them; a task's examples may go without.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from forgetcast._files import atomic_path
from forgetcast.errors import DataError, MismatchError

FIELDS = ("id", "text", "prompt", "completion", "source")


@dataclass(frozen=True, slots=True)
class Example:
    """One text to score or to train on.

    Either `text` is given, and every token of it counts, or `prompt` and `completion` are, and the completion counts.
    """

    id: str
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        """Refuse what could not be scored."""
        if self.text is not None:
            if self.prompt is not None or self.completion is not None:
                raise DataError(f"example {self.id!r} has a text and also a prompt or completion; keep one of the two")
            if not self.text.strip():
                raise DataError(f"example {self.id!r} has an empty text")
        elif self.prompt is None or self.completion is None:
            raise DataError(f"example {self.id!r} needs a 'text', or a 'prompt' and a 'completion'")
        elif not self.completion.strip():
            raise DataError(f"example {self.id!r} has an empty completion")

    @property
    def full_text(self) -> str:
        """The text, or the prompt and the completion in one."""
        return self.text if self.text is not None else f"{self.prompt}{self.completion}"

    def digest(self) -> bytes:
        """Hash of the id and of what is scored; `source` is a label and does not count."""
        parts = [self.id, "text", self.text] if self.text is not None else [self.id, self.prompt, self.completion]
        return hashlib.sha256(json.dumps(parts).encode()).digest()


class Pool(Sequence[Example]):
    """Examples with unique ids, in a fixed order.

    Parameters
    ----------
    examples : iterable of Example
    where : str
        What an error message calls the pool: usually its file.

    Raises
    ------
    DataError
        If there is no example, or an id occurs twice.
    """

    def __init__(self, examples: Iterable[Example], *, where: str = "the pool") -> None:
        self._examples = tuple(examples)
        if not self._examples:
            raise DataError(f"{where} has no examples")
        self.ids = tuple(example.id for example in self._examples)
        self._positions = {id_: i for i, id_ in enumerate(self.ids)}
        if len(self._positions) < len(self.ids):
            id_, count = Counter(self.ids).most_common(1)[0]
            raise DataError(f"{where}: the id {id_!r} occurs {count} times; ids must be unique")

    @overload
    def __getitem__(self, item: int) -> Example: ...
    @overload
    def __getitem__(self, item: slice) -> tuple[Example, ...]: ...
    def __getitem__(self, item: int | slice) -> Example | tuple[Example, ...]:
        """Example at a position, or a slice of them."""
        return self._examples[item]

    def __len__(self) -> int:
        """Count the examples."""
        return len(self._examples)

    def __repr__(self) -> str:
        """Size and fingerprint."""
        return f"Pool({len(self)} examples, fingerprint {self.fingerprint[:12]})"

    @cached_property
    def fingerprint(self) -> str:
        """Hash over the ids and texts of all examples, whatever their order (64 hexadecimal digits)."""
        return hashlib.sha256(b"".join(sorted(example.digest() for example in self))).hexdigest()

    @property
    def sources(self) -> tuple[str, ...]:
        """Source of each example; '' where it has none."""
        return tuple(example.source or "" for example in self)

    def positions(self, ids: Iterable[str], *, where: str = "the request") -> np.ndarray:
        """Positions of `ids` in this pool, shape (len(ids),).

        Raises
        ------
        MismatchError
            If an id is not in the pool.
        """
        ids = list(ids)
        unknown = [id_ for id_ in ids if id_ not in self._positions]
        if unknown:
            raise MismatchError(
                f"{where} has {len(unknown)} example(s) that the pool doesn't know, e.g. {unknown[0]!r}"
            )
        return np.array([self._positions[id_] for id_ in ids], dtype=np.intp)

    def subset(self, ids: Iterable[str], *, where: str = "the request") -> Pool:
        """Make a pool of the examples with these ids, in the order of `ids`."""
        return Pool((self._examples[i] for i in self.positions(ids, where=where)), where=where)

    def hold_out(self, share: float, *, seed: int = 0, exclude: Iterable[str] = ()) -> tuple[str, ...]:
        """Ids to keep aside: never replayed, only judged on.

        Each example is ranked by a hash of the seed and its id, so the choice does not depend on the pool's order.

        Parameters
        ----------
        share : float
            Share of the pool, in [0, 1).
        seed : int
        exclude : iterable of str
            Ids never held out, such as the probes (whose loss is known before the judging).
        """
        if not 0 <= share < 1:
            raise DataError(f"the held-out share must be in [0, 1), not {share}")
        excluded = set(exclude)
        ranked = sorted(self.ids, key=lambda id_: hashlib.sha256(f"{seed}:{id_}".encode()).digest())
        held = set(ranked[: round(share * len(self))]) - excluded
        return tuple(id_ for id_ in self.ids if id_ in held)

    @classmethod
    def load(cls, path: str | Path) -> Pool:
        """Read a pool from JSONL (`.jsonl`, `.json`, `.ndjson`), Parquet, or a directory saved by `datasets`.

        Raises
        ------
        DataError
            If the file cannot be read, names the line or row of the first example that cannot be used.
        """
        return cls(_read(Path(path), need_ids=True), where=str(path))

    def save(self, path: str | Path) -> None:
        """Write the pool as JSONL, or as Parquet if the name ends in `.parquet`."""
        with atomic_path(Path(path)) as temporary:
            if Path(path).suffix == ".parquet":
                pq.write_table(
                    pa.table({f: pa.array((getattr(e, f) for e in self), pa.string()) for f in FIELDS}), temporary
                )
            else:
                rows = (asdict(example) for example in self)
                lines = (
                    json.dumps({k: v for k, v in row.items() if v is not None}, ensure_ascii=False) for row in rows
                )
                temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def load_task(path: str | Path) -> Pool:
    """Read a fine-tuning data set: a pool whose examples need no ids (they are numbered instead)."""
    return Pool(_read(Path(path), need_ids=False), where=str(path))


def _read(path: Path, *, need_ids: bool) -> Iterator[Example]:
    for place, row in _rows(path):
        try:
            yield _example(row, default_id=None if need_ids else place.rpartition(" ")[2])
        except DataError as error:
            raise DataError(f"{path}, {place}: {error}") from None


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a file, each with the words for its place ("line 3", "row 3"), counted from 1."""
    if path.is_dir():
        from forgetcast._files import read_saved_dataset

        rows = read_saved_dataset(path)
    elif not path.is_file():
        raise DataError(f"{path}: there is no such file")
    elif path.suffix == ".parquet":
        try:
            rows = pq.read_table(path).to_pylist()
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}") from None
    elif path.suffix in {".jsonl", ".json", ".ndjson"}:
        yield from _json_lines(path)
        return
    else:
        raise DataError(f"{path}: unknown kind of file; use .jsonl, .parquet or a saved data set's directory")
    for i, row in enumerate(rows, 1):
        yield f"row {i}", row


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8") as file:
            for i, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}, line {i}: not JSON ({error.msg} at column {error.colno})") from None
                if not isinstance(row, dict):
                    raise DataError(f"{path}, line {i}: a JSON object is needed, not a {type(row).__name__}")
                yield f"line {i}", row
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _example(row: dict[str, Any], *, default_id: str | None) -> Example:
    id_ = row.get("id")
    if id_ is None:
        if default_id is None:
            raise DataError("the field 'id' is missing")
        id_ = default_id
    if isinstance(id_, bool) or not isinstance(id_, str | int) or id_ == "":
        raise DataError(f"the id must be a string that is not empty, not {id_!r}")
    fields: dict[str, str | None] = {}
    for name in FIELDS[1:]:
        value = row.get(name)
        if value is not None and not isinstance(value, str):
            raise DataError(f"the field {name!r} must be a string, not a {type(value).__name__}")
        fields[name] = value
    return Example(id=str(id_), **fields)
