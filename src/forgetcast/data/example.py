"""An example: one text, a prompt with its completion, or a conversation, checked once when it is made."""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forgetcast.errors import DataError
from forgetcast.files import decode_json

FIELDS = ("id", "text", "prompt", "completion", "messages", "tools", "chat_template_kwargs", "source")

STRUCTURED = ("messages", "tools", "chat_template_kwargs")
"""Fields that are not strings; a Parquet file has them as JSON, because examples differ in what is within."""

Messages = Sequence[Mapping[str, Any]]
"""A conversation: each message has a role, a content, and further fields that the model's chat template uses."""

TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of the parts of a content that are text."""

_sorted = json.JSONEncoder(sort_keys=True)
_unicode = json.JSONEncoder(ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Example:
    """One text to score or to train on.

    It has one of: `text`, where every token counts; `prompt` and `completion`, where the completion counts; or
    `messages`, where the assistant's messages count, except those whose "weight" is 0. A conversation may have the
    `tools` that the assistant may call and arguments of the chat template.

    Messages are brought to one form: `"train": false` becomes `"weight": 0`, a content in parts of text becomes one
    string, arguments of a tool call that are JSON in a string become an object, and fields that are None go.

    Raises
    ------
    DataError
        If the example could not be scored, or holds what neither JSON nor UTF-8 can.
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
        """Normalise the messages, and raise DataError if the example could not be scored."""
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
        for name in FIELDS:
            if (value := getattr(self, name)) is not None and not (isinstance(value, str) and value.isascii()):
                where = f"example {self.id!r}, field {name!r}"
                _check_unicode(value if name not in STRUCTURED else to_json(value, where), where)

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
        return digest(*(getattr(self, name) for name in FIELDS[:-1]))


def digest(
    id_: str,
    text: str | None,
    prompt: str | None,
    completion: str | None,
    messages: Messages | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> bytes:
    """Hash the fields of an example: `Example.digest`, without an Example."""
    parts: list[Any] = [id_, prompt, completion]
    if text is not None:
        parts = [id_, "text", text]
    elif messages is not None:
        parts = [id_, "messages", messages]
        if tools is not None or chat_template_kwargs is not None:
            parts += [tools, chat_template_kwargs]
    return hashlib.sha256(_sorted.encode(parts).encode()).digest()


def with_content_id(example: Example) -> Example:
    """Give a new example a short hash of its content as its id (16 hexadecimal digits), in place."""
    id_ = digest("", *(getattr(example, name) for name in FIELDS[1:-1])).hex()[:16]
    object.__setattr__(example, "id", id_)
    return example


def to_json(value: Any, where: str) -> str:
    """Write a field as JSON, which keeps the order of its keys; DataError if JSON cannot hold it."""
    try:
        return _unicode.encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{where}: JSON cannot hold it ({error})") from None


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: character {error.start + 1} is {text[error.start]!a}, half of a surrogate pair, which UTF-8 "
            "cannot hold; mend or remove it"
        ) from None


def _message(message: object, where: str) -> dict[str, Any]:
    """Check a message and bring it to the one form."""
    if not isinstance(message, Mapping):
        raise DataError(f"{where}: a message must be an object with a role and a content, not {reprlib.repr(message)}")
    kept = {str(name): value for name, value in message.items() if value is not None}
    if not isinstance(kept.get("role"), str):
        raise DataError(f"{where}: a message has no role")
    if "content" in kept:
        kept["content"] = _content(kept["content"], where)
    # A message that calls a tool needs no content.
    if not isinstance(kept.get("content", "" if len(kept) > 1 else None), str):
        raise DataError(f"{where}: the content of a message must be a string, not {reprlib.repr(kept.get('content'))}")
    _weight(kept, where)
    if "tool_calls" in kept:
        kept["tool_calls"] = _tool_calls(kept["tool_calls"], where)
    if (
        kept["role"] == "assistant"
        and not kept.keys() - {"role", "content", "weight"}
        and not kept.get("content", "").strip()
    ):
        raise DataError(f"{where}: the assistant's message is empty")
    return kept


def _content(content: Any, where: str) -> Any:
    """Join a content that is given in parts of text."""
    if not isinstance(content, list | tuple):
        return content
    texts = []
    for part in content:
        if isinstance(part, Mapping):
            kind = part.get("type", "text")
            if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
                raise DataError(f"{where}: a content has a part of the type {kind!r}; only text can be used")
            texts.append(part["text"])
        elif isinstance(part, str):
            texts.append(part)
        else:
            raise DataError(f"{where}: the content of a message must be a string, not {reprlib.repr(content)}")
    return "".join(texts)


def _weight(message: dict[str, Any], where: str) -> None:
    """Replace `train`, as Axolotl has it, by `weight`, as OpenAI has it."""
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise DataError(f"{where}: the weight of a message must be 0 or 1, not {reprlib.repr(weight)}")
    if "train" not in message:
        return
    train = message.pop("train")
    if not isinstance(train, bool | int) or train not in (0, 1):
        raise DataError(f"{where}: 'train' of a message must be true or false, not {reprlib.repr(train)}")
    if message.get("weight", train) != train:
        raise DataError(f"{where}: a message has 'weight' {weight} and 'train' {str(bool(train)).lower()}; keep one")
    if train and message["role"] != "assistant":
        raise DataError(f"{where}: only the assistant's messages can be trained on, not the role {message['role']!r}")
    if not train:
        message["weight"] = 0


def _tool_calls(calls: Any, where: str) -> list[Any]:
    """Decode arguments that are JSON in a string, because a template would write the string as JSON again."""
    if not isinstance(calls, list | tuple) or not all(isinstance(call, Mapping) for call in calls):
        raise DataError(f"{where}: the tool calls of a message must be a list of objects, not {reprlib.repr(calls)}")
    decoded = []
    for call in calls:
        function = call.get("function", call)
        if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
            arguments = _arguments(function["arguments"], where)
            function = {**function, "arguments": arguments}
            call = {**call, "function": function} if "function" in call else function
        decoded.append(dict(call))
    return decoded


def _arguments(text: str, where: str) -> Any:
    """Decode arguments of a tool call; an empty string means that there are none."""
    try:
        return decode_json(text) if text.strip() else {}
    except ValueError:
        raise DataError(f"{where}: the arguments of a tool call are not JSON: {reprlib.repr(text)}") from None


def without_nulls(value: Any) -> Any:
    """Drop the fields that are None, at every depth: a table gives each row the fields of all others."""
    if isinstance(value, Mapping):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(inner) for inner in value]
    return value
