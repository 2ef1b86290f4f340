"""What a row of a data set means: the formats that people have, each read into an example.

The fields of a row say which format it has. A row that fits two is refused: choose one with `--format`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forgetcast.data.example import FIELDS, Example, without_nulls
from forgetcast.errors import ConfigError, DataError
from forgetcast.files import decode_json
from forgetcast.text import did_you_mean

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """A way to write an example down.

    Attributes
    ----------
    title : str
        What the format is called in a sentence.
    noun : str
        What its examples are called.
    needs : tuple of tuple of str
        The fields that make a row one of this format; several alternatives.
    read : callable
        Maps a row, and the alternative that it has, to the fields of an `Example`.
    may_have : tuple of str
        Further fields that are read.
    """

    title: str
    noun: str
    needs: tuple[tuple[str, ...], ...]
    read: Callable[[Row, Sequence[str]], dict[str, Any]]
    may_have: tuple[str, ...] = ()


def read_example(row: Row, *, default_id: str | None = None) -> Example:
    """Make an example from a row with our own fields, as `Pool.save` writes them.

    Raises
    ------
    DataError
        If a field is missing or has another type.
    """
    id_ = row_id(row)
    if id_ is None:
        id_ = default_id
    if id_ is None:
        raise DataError("the field 'id' is missing")
    return Example(id=id_, **_own_fields({name: row.get(name) for name in FIELDS[1:]}))


def row_id(row: Row) -> str | None:
    """Return the id of a row, or None if it has none.

    Raises
    ------
    DataError
        If it is neither a string nor an integer.
    """
    id_ = row.get("id")
    if id_ is None:
        return None
    if isinstance(id_, bool) or not isinstance(id_, str | int) or id_ == "":
        raise DataError(f"the id must be a string that is not empty, not {id_!r}")
    return str(id_)


_TYPES: Mapping[str, type] = {"messages": list, "tools": list, "chat_template_kwargs": dict}
"""Types of the fields that are not strings."""


def _own_fields(fields: dict[str, Any]) -> dict[str, Any]:
    if isinstance(fields.get("prompt"), list) and isinstance(fields.get("completion"), list):
        # TRL's conversational prompt and completion: only the assistant's messages of the completion count.
        prompt = [_unweighted(m) if isinstance(m, Mapping) else m for m in fields["prompt"]]
        fields |= {"prompt": None, "completion": None, "messages": prompt + fields["completion"]}
    for name, value in fields.items():
        if value is None:
            continue
        expected = _TYPES.get(name, str)
        if expected is not str and isinstance(value, str):
            fields[name] = value = _decode(name, value)
        if not isinstance(value, expected):
            needed = "a list" if expected is list else "an object" if expected is dict else "a string"
            raise DataError(f"the field {name!r} must be {needed}, not a {type(value).__name__}")
    if fields.get("tools") is not None:
        fields["tools"] = [_tool(tool) for tool in fields["tools"]]
    return fields


def _tool(tool: Any) -> Any:
    """Decode a tool, or its parameters, that are JSON in a string; tables need that where tools differ."""
    if isinstance(tool, str):
        tool = _decode("tools", tool)
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if isinstance(function, Mapping) and isinstance(function.get("parameters"), str):
        function = {**function, "parameters": _decode("tools", function["parameters"])}
        return {**tool, "function": function} if "function" in tool else function
    return tool


def _unweighted(message: Row) -> dict[str, Any]:
    return {**{name: value for name, value in message.items() if name != "train"}, "weight": 0}


def _decode(name: str, text: str) -> Any:
    """Decode a field that is JSON in a string, as CSV has it and Parquet may."""
    try:
        return decode_json(text)
    except ValueError:
        raise DataError(f"the field {name!r} is not JSON") from None


def _text(row: Row, _: Sequence[str]) -> dict[str, Any]:
    return {"text": row.get("text")}


def _prompt_completion(row: Row, _: Sequence[str]) -> dict[str, Any]:
    return {name: row.get(name) for name in ("prompt", "completion")}


def _messages(row: Row, _: Sequence[str]) -> dict[str, Any]:
    return {"messages": row.get("messages")}


_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
"""Role by the name that ShareGPT's `from` has for it."""

_CALLS = ("function_call", "tool_call")


def _sharegpt(row: Row, _: Sequence[str]) -> dict[str, Any]:
    turns = row.get("conversations")
    if isinstance(turns, str):
        turns = _decode("conversations", turns)
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise DataError("the field 'conversations' must be a list of objects with 'from' and 'value'")
    messages = [_turn(turn) for turn in turns]
    return {"messages": _system(row) + messages}


def _turn(turn: Row) -> dict[str, Any]:
    """Bring one turn of ShareGPT to role and content; some sets have these already."""
    if turn.get("role") is not None and turn.get("from") is None:
        return dict(turn)
    role, value = turn.get("from"), turn.get("value")
    rest = {name: v for name, v in turn.items() if name not in ("from", "value") and v is not None}
    if role in _CALLS:
        calls = _decode("value", value) if isinstance(value, str) else value
        calls = calls if isinstance(calls, list) else [calls]
        if not all(isinstance(call, Mapping) and "name" in call for call in calls):
            raise DataError(f"a turn from {role!r} must be a call, JSON with a 'name' and 'arguments'")
        return rest | {"role": "assistant", "tool_calls": [{"type": "function", "function": call} for call in calls]}
    if not isinstance(role, str) or role not in _ROLES:
        raise DataError(f"a turn is from {role!r}; known are {', '.join([*_ROLES, *_CALLS])}")
    return rest | {"role": _ROLES[role], "content": value}


def _alpaca(row: Row, _: Sequence[str]) -> dict[str, Any]:
    """Join instruction and input by a line break, as LLaMA-Factory does; the answers of the history count too."""
    history = row.get("history") or []
    if isinstance(history, str):
        history = _decode("history", history)
    messages = _system(row)
    for pair in history:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError("the field 'history' must be a list of pairs: instruction, output")
        messages += _asked(pair[0], pair[1])
    parts = [row.get(name) for name in ("instruction", "input")]
    if any(part is not None and not isinstance(part, str) for part in parts):
        raise DataError("the fields 'instruction' and 'input' must be strings")
    return {"messages": messages + _asked("\n".join(part for part in parts if part), row.get("output"))}


def _prompt_response(row: Row, names: Sequence[str]) -> dict[str, Any]:
    return {"messages": _system(row) + _asked(row.get(names[0]), row.get(names[1]))}


def _asked(question: Any, answer: Any) -> list[dict[str, Any]]:
    if not isinstance(question, str) or not question.strip():
        raise DataError("there is no question")
    if answer is None or (isinstance(answer, str) and not answer.strip()):
        raise DataError("there is no answer")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _system(row: Row) -> list[dict[str, Any]]:
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


FORMATS: Mapping[str, Format] = {
    "text": Format("text", "texts", (("text",),), _text),
    "prompt-completion": Format("prompt and completion", "examples", (("prompt", "completion"),), _prompt_completion),
    "messages": Format("messages", "conversations", (("messages",),), _messages),
    "sharegpt": Format("ShareGPT", "conversations", (("conversations",),), _sharegpt, ("system",)),
    "alpaca": Format("Alpaca", "conversations", (("instruction", "output"),), _alpaca, ("input", "system", "history")),
    "prompt-response": Format(
        "prompt and response",
        "conversations",
        (("prompt", "response"), ("question", "answer"), ("query", "response"), ("input", "output")),
        _prompt_response,
        ("system",),
    ),
}
"""Formats by name, with the fields that each needs."""

COMMON = ("id", "source", "tools", "chat_template_kwargs")
"""Fields that a row of every format may have."""

KNOWN = tuple(
    dict.fromkeys((*COMMON, *(name for f in FORMATS.values() for names in (*f.needs, f.may_have) for name in names)))
)
"""All fields that are read."""


class RowReader:
    """Reads rows, each by the format that its fields have.

    Parameters
    ----------
    format : str, optional
        One of FORMATS; default: any that fits.
    columns : mapping of str to str
        What the rows call a field, by its name here; '' for one that is not to be read.

    Raises
    ------
    ConfigError
        If the format or a field is unknown.
    """

    def __init__(self, format: str | None = None, columns: Mapping[str, str] | None = None) -> None:
        if format is not None and format not in FORMATS:
            raise ConfigError(
                f"unknown format {format!r}; choose from {', '.join(FORMATS)}{did_you_mean(format, FORMATS)}"
            )
        self._columns = dict(columns or {})
        if unknown := self._columns.keys() - set(KNOWN):
            hint = did_you_mean(min(unknown), KNOWN)
            raise ConfigError(f"--column: no format has the field {min(unknown)!r}; there are {', '.join(KNOWN)}{hint}")
        self._formats = {format: FORMATS[format]} if format is not None else FORMATS
        self._insisted = format is not None
        self._found: dict[tuple[str, ...], tuple[str, tuple[str, ...]]] = {}

    @property
    def any_format(self) -> bool:
        """Whether rows may be of any format, under the names of the fields here."""
        return not self._columns and not self._insisted

    def reads(self, column: str) -> bool:
        """Whether a column of a table is read."""
        return column in KNOWN or column in self._columns.values()

    def check_columns(self, names: Iterable[str]) -> None:
        """Raise NoColumnError unless rows with these columns can be of one of the formats."""
        names = list(names)
        for field, column in self._columns.items():
            if column and column not in names:
                hint = did_you_mean(column, names)
                raise NoColumnError(f"there is no column {column!r} for {field!r}; {_listed(names)}{hint}")
        if not self._matches(self._renamed(dict.fromkeys(names))):
            raise NoColumnError(f"{_listed(names)}; needed are {self._needed()}. Other names: --column prompt=NAME")

    def _needed(self) -> str:
        return ", or ".join(" and ".join(names) for f in self._formats.values() for names in f.needs)

    def _renamed(self, row: Row) -> Row:
        if not self._columns:
            return row
        taken = set(self._columns.values())
        kept = {name: value for name, value in row.items() if name not in taken and name not in self._columns}
        return kept | {field: row.get(column) for field, column in self._columns.items() if column}

    def _matches(self, names: Iterable[str]) -> list[tuple[str, tuple[str, ...]]]:
        """Formats whose fields are all there, each with the alternative that is."""
        names = set(names)
        found = [(name, needed) for name, f in self._formats.items() for needed in f.needs if names.issuperset(needed)]
        if not self._insisted and "instruction" in names:  # Alpaca has an input and an output too
            found = [(name, needed) for name, needed in found if needed != ("input", "output")]
        mapped = {field for field, column in self._columns.items() if column}.difference(COMMON)
        if len(found) > 1 and mapped:  # a field that was named on purpose decides
            found = [(name, needed) for name, needed in found if mapped.intersection(needed)] or found
        return found

    def _format(self, row: Row) -> tuple[str, tuple[str, ...]]:
        filled = tuple(name for name, value in row.items() if value is not None and name in _CONTENT)
        if filled not in self._found:
            found = self._matches(filled)
            if len(found) > 1:
                names = " and as ".join(f"{name} ({', '.join(needed)})" for name, needed in found)
                raise AmbiguousRowError(f"the row can be read as {names}; keep one, or choose with --format")
            if {"text", "prompt"} <= set(filled) and found == [("text", ("text",))] and not self._insisted:
                raise AmbiguousRowError("the row has a text and a prompt; keep one, or choose with --format text")
            if not found:
                raise DataError(self._lacking(filled, row))
            self._found[filled] = found[0]
        return self._found[filled]

    def _lacking(self, filled: Sequence[str], row: Row) -> str:
        """Say which field a row without a format lacks."""
        if not filled:
            return "the row is empty"
        partly = [needed for _, needed in self._matches(row) if set(needed).intersection(filled)]
        if len(partly) == 1:
            return f"there is no {' and no '.join(name for name in partly[0] if name not in filled)}"
        return f"it has {', '.join(filled)}; needed are {self._needed()}"

    def read(self, row: Row, id_: str, *, from_table: bool = False) -> tuple[str, Example]:
        """Return the name of the row's format, and its example.

        Parameters
        ----------
        row : mapping
            With the names of the fields here: see `fields`.
        id_ : str
        from_table : bool
            Whether nulls within tools and messages are the table's, which gives each row the fields of all others.

        Raises
        ------
        AmbiguousRowError
            If two formats fit.
        DataError
            If the row cannot be used.
        """
        if from_table:
            row = {
                name: without_nulls(value) if isinstance(value, list | dict) else value for name, value in row.items()
            }
        name, needed = self._format(row)
        fields = FORMATS[name].read(row, needed)
        fields |= {field: row.get(field) for field in ("tools", "chat_template_kwargs", "source")}
        fields = _own_fields(fields)
        if not fields.get("tools"):
            fields["tools"] = None  # an empty list is how some sets say that there are none
        if fields.get("messages") is not None:
            fields["messages"] = [_modern(m) if isinstance(m, Mapping) else m for m in fields["messages"]]
        return name, Example(id=id_, **fields)

    def fields(self, row: Row) -> Row:
        """Return the row under the names of the fields here."""
        return self._renamed(row)


class AmbiguousRowError(DataError):
    """A row that two formats fit: reading it as either would be a guess."""


class NoColumnError(DataError):
    """Columns that no format has, or that are not those that were named."""


_CONTENT = frozenset(KNOWN).difference(COMMON)


def _modern(message: Row) -> Row:
    """Bring OpenAI's earlier form of a call to today's, which chat templates know."""
    call = message.get("function_call")
    if call is None:
        return {**message, "role": "tool"} if message.get("role") == "function" else message
    rest = {name: value for name, value in message.items() if name != "function_call"}
    return rest | {"tool_calls": [{"type": "function", "function": call}]}


def _listed(names: Sequence[str]) -> str:
    return f"the columns are {', '.join(map(str, names)) or 'none'}"
