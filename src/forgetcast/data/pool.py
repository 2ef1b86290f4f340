"""Examples: the upstream pool and the fine-tuning tasks, read from JSONL, Parquet or a saved Hugging Face data set.

An example is one text, a prompt with its completion, or a conversation (`messages`). A pool's examples have ids,
because a forgetting matrix, its probes and a replay plan refer to them; ids are optional in a task.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np

from forgetcast.data.ids import ExampleIndex
from forgetcast.errors import DataError
from forgetcast.files import atomic_path, read_saved_dataset

FIELDS = ("id", "text", "prompt", "completion", "messages", "tools", "chat_template_kwargs", "source")

STRUCTURED = ("messages", "tools", "chat_template_kwargs")
"""Fields that are not strings; a Parquet file has them as JSON, because examples differ in what is within."""

Messages = Sequence[Mapping[str, Any]]
"""A conversation: each message has a role, a content, and further fields that the model's chat template uses."""


@dataclass(frozen=True, slots=True)
class Example:
    """One text to score or to train on.

    It has one of: `text`, where every token counts; `prompt` and `completion`, where the completion counts; or
    `messages`, where the assistant's messages count, except those whose "weight" is 0. A conversation may have the
    `tools` that the assistant may call and arguments of the chat template.
    """

    id: str
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: Messages | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        """Raise DataError if the example could not be scored."""
        in_parts = self.prompt is not None or self.completion is not None
        if (self.text is not None) + in_parts + (self.messages is not None) > 1:
            raise DataError(f"example {self.id!r} has two of text, prompt and completion, and messages; keep one")
        if self.text is not None:
            if not self.text.strip():
                raise DataError(f"example {self.id!r} has an empty text")
        elif self.messages is not None:
            object.__setattr__(self, "messages", tuple(_message(m, f"example {self.id!r}") for m in self.messages))
            if not any(self.counted):
                raise DataError(f"example {self.id!r} needs a message of the role 'assistant' that counts")
        elif self.prompt is None or self.completion is None:
            raise DataError(f"example {self.id!r} needs a 'text', a 'prompt' and a 'completion', or 'messages'")
        elif not self.completion.strip():
            raise DataError(f"example {self.id!r} has an empty completion")
        if self.messages is None and (self.tools is not None or self.chat_template_kwargs is not None):
            raise DataError(f"example {self.id!r} has tools or chat_template_kwargs but no messages; remove them")

    @property
    def counted(self) -> tuple[bool, ...]:
        """Whether each message counts; empty without messages."""
        return tuple(m["role"] == "assistant" and m.get("weight") != 0 for m in self.messages or ())

    @property
    def full_text(self) -> str:
        """The text, the concatenated prompt and completion, or the messages, each with its role."""
        if self.messages is not None:
            return "\n".join(f"{m['role']}: {m.get('content') or ''}" for m in self.messages)
        return self.text if self.text is not None else f"{self.prompt}{self.completion}"

    def __repr__(self) -> str:
        """Id, and the beginning and end of the text."""
        return f"Example({self.id!r}, {reprlib.repr(self.full_text)})"

    def digest(self) -> bytes:
        """Return a hash of the id and the content; `source` is only a label and not included."""
        parts: list[Any] = [self.id, self.prompt, self.completion]
        if self.text is not None:
            parts = [self.id, "text", self.text]
        elif self.messages is not None:
            parts = [self.id, "messages", self.messages]
            if self.tools is not None or self.chat_template_kwargs is not None:
                parts += [self.tools, self.chat_template_kwargs]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()


class Pool(Sequence[Example]):
    """Examples with unique ids, in a fixed order.

    Parameters
    ----------
    examples : iterable of Example
    where : str
        What an error message calls the pool; usually its file.

    Raises
    ------
    DataError
        If there are no examples, or an id occurs twice.
    """

    def __init__(self, examples: Iterable[Example], *, where: str = "the pool") -> None:
        self._examples = tuple(examples)
        if not self._examples:
            raise DataError(f"{where} has no examples")
        self.ids = tuple(example.id for example in self._examples)
        self._index = ExampleIndex(self.ids)
        if len(set(self.ids)) < len(self.ids):
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
        """Hash of the ids and texts of all examples, independent of their order (64 hexadecimal digits)."""
        return hashlib.sha256(b"".join(sorted(example.digest() for example in self))).hexdigest()

    @property
    def sources(self) -> tuple[str, ...]:
        """Source of each example; '' where it has none."""
        return tuple(example.source or "" for example in self)

    def positions(self, ids: Iterable[str], *, where: str = "the request") -> np.ndarray:
        """Return the positions of `ids` in this pool, shape (len(ids),).

        Raises
        ------
        MismatchError
            If an id is not in the pool.
        """
        return self._index.positions(ids, where=where)

    def subset(self, ids: Iterable[str], *, where: str = "the request") -> Pool:
        """Return a pool of the examples with these ids, in the order of `ids`."""
        return Pool((self._examples[i] for i in self.positions(ids, where=where)), where=where)

    def hold_out(self, share: float, *, seed: int = 0, exclude: Iterable[str] = ()) -> tuple[str, ...]:
        """Choose ids that are never replayed, only judged on.

        Examples are ranked by a hash of the seed and the id, so the choice does not depend on the pool's order.

        Parameters
        ----------
        share : float
            Fraction of the pool, in [0, 1).
        seed : int
        exclude : iterable of str
            Ids that are never held out, such as the probes, whose forgetting is already measured.
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
            If the file cannot be read or an example cannot be used; the message names its line or row.
        """
        return cls(_read(Path(path), need_ids=True), where=str(path))

    def save(self, path: str | Path) -> None:
        """Write the pool as JSONL, or as Parquet if the name ends in `.parquet`."""
        with atomic_path(Path(path)) as temporary:
            if Path(path).suffix == ".parquet":
                import pyarrow as pa
                import pyarrow.parquet as pq

                columns = {f: [getattr(e, f) for e in self] for f in FIELDS}
                for name in STRUCTURED:
                    columns[name] = [value and json.dumps(value, ensure_ascii=False) for value in columns[name]]
                pq.write_table(pa.table({f: pa.array(c, pa.string()) for f, c in columns.items()}), temporary)
            else:
                rows = (asdict(example) for example in self)
                lines = (
                    json.dumps({k: v for k, v in row.items() if v is not None}, ensure_ascii=False) for row in rows
                )
                temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def load_task(path: str | Path) -> Pool:
    """Read a fine-tuning data set: a pool whose ids are optional; an example without one is numbered."""
    return Pool(_read(Path(path), need_ids=False), where=str(path))


def split_task(task: Pool, share: float) -> tuple[Pool, Pool]:
    """Split a task into training examples and a test fraction for the new-task loss.

    Raises
    ------
    DataError
        If either part would be empty.
    """
    test = set(task.hold_out(share))
    if not 0 < len(test) < len(task):
        raise DataError(f"a test share of {share} of {len(task)} examples leaves none to test or to train on")
    train = [id_ for id_ in task.ids if id_ not in test]
    return task.subset(train), task.subset(id_ for id_ in task.ids if id_ in test)


def _read(path: Path, *, need_ids: bool) -> Iterator[Example]:
    for place, row in _rows(path):
        try:
            yield read_example(row, default_id=None if need_ids else place.rpartition(" ")[2])
        except DataError as error:
            raise DataError(f"{path}, {place}: {error}") from None


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a file, each with its place ("line 3", "row 3"), counted from 1."""
    if path.is_dir():
        rows = read_saved_dataset(path)
    elif not path.is_file():
        raise DataError(f"{path}: there is no such file")
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

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


def read_example(row: dict[str, Any], *, default_id: str | None = None) -> Example:
    """Make an example from a row of JSON or of a table."""
    id_ = row.get("id")
    if id_ is None:
        if default_id is None:
            raise DataError("the field 'id' is missing")
        id_ = default_id
    if isinstance(id_, bool) or not isinstance(id_, str | int) or id_ == "":
        raise DataError(f"the id must be a string that is not empty, not {id_!r}")
    fields: dict[str, Any] = {name: row.get(name) for name in FIELDS[1:]}
    if isinstance(fields["prompt"], list) and isinstance(fields["completion"], list):
        # TRL's conversational prompt and completion: only the assistant's messages of the completion count.
        prompt = [m | {"weight": 0} if isinstance(m, dict) else m for m in fields["prompt"]]
        fields |= {"prompt": None, "completion": None, "messages": prompt + fields["completion"]}
    for name in STRUCTURED:
        if isinstance(fields[name], str):  # as `save` writes Parquet
            try:
                fields[name] = json.loads(fields[name])
            except ValueError:
                raise DataError(f"the field {name!r} is not JSON") from None
    for name, value in fields.items():
        expected = {"messages": list, "tools": list, "chat_template_kwargs": dict}.get(name, str)
        if value is not None and not isinstance(value, expected):
            needed = {list: "a list", dict: "an object", str: "a string"}[expected]
            raise DataError(f"the field {name!r} must be {needed}, not a {type(value).__name__}")
    return Example(id=str(id_), **fields)


def _message(message: object, where: str) -> dict[str, Any]:
    """Check a message and drop its fields that are None, which tables fill in for other rows' fields."""
    if not isinstance(message, Mapping):
        raise DataError(f"{where}: a message must be an object with a role and a content, not {message!r}")
    kept = {str(name): value for name, value in message.items() if value is not None}
    if not isinstance(kept.get("role"), str):
        raise DataError(f"{where}: a message has no role")
    # A message that calls a tool needs no content.
    if not isinstance(kept.get("content", "" if len(kept) > 1 else None), str):
        raise DataError(f"{where}: the content of a message must be a string, not {kept.get('content')!r}")
    if kept.get("weight", 1) not in (0, 1):
        raise DataError(f"{where}: the weight of a message must be 0 or 1, not {kept['weight']!r}")
    if (
        kept["role"] == "assistant"
        and not kept.keys() - {"role", "content", "weight"}
        and not kept.get("content", "").strip()
    ):
        raise DataError(f"{where}: the assistant's message is empty")
    return kept
