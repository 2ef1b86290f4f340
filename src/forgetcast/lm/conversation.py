"""Conversations as text: the chat template's rendering, and which of its characters the assistant wrote."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from itertools import pairwise
from typing import Any

from jinja2 import Environment, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from forgetcast.data.pool import Example
from forgetcast.data.rendering import Rendering
from forgetcast.errors import ConfigError, DataError

Span = tuple[int, int]
"""Positions of characters in a text, half-open."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Fields of a message that contain thinking, by the names that Transformers knows."""

MOST_SECONDS = 20.0
"""Processor time that a template may take for a conversation; one of a model takes milliseconds."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_DIRECTIVES = [f"%{flag}{letter}" for letter in "aAbBcdDeFHIjmMpSTuUwWxXyYzZ" for flag in ("-", "")]


@dataclass(frozen=True)
class Conversation:
    """A rendered conversation.

    Attributes
    ----------
    text : str
    targets : tuple of Span
        What the assistant wrote: each counted message with the end of its turn.
    incomplete : bool
        Whether the template leaves out thinking that a counted message contains.
    """

    text: str
    targets: tuple[Span, ...]
    incomplete: bool


def render_conversation(example: Example, tokenizer: PreTrainedTokenizerBase, rendering: Rendering) -> Conversation:
    """Render a conversation and locate what the assistant wrote.

    A template that marks it (`{% generation %}`) is believed. Otherwise a message is located by rendering the
    conversation a second time, with placeholders as answers: what is the same in both is the template's. A message
    reaches to the end of its turn, without spaces. One that contains thinking starts where the generation prompt ends.

    Raises
    ------
    DataError
        If there is no chat template, it rejects the conversation, or it does not show a counted message as it is.
    ConfigError
        If the template does not come to an end.
    """
    template = _Template(example, tokenizer, rendering)
    counted = [i for i, target in enumerate(example.counted) if target]
    text, spans = template.marked(counted) if template.marks else template.located(counted)
    targets, incomplete = [], False
    for i, span in spans.items():
        answer, shown = _Answer.of(template.messages[i]), text[slice(*span)]
        if not shown or not all(part in shown for part in (answer.visible, *answer.calls)):
            raise DataError(
                f"the chat template does not show message {i + 1} of example {example.id!r} as it is; "
                "use another template, or a prompt and a completion"
            )
        if answer.thinking and answer.thinking not in shown:
            incomplete = True
        elif answer.thinking and not rendering.thinking:
            span = (answer.after_thinking(text, span), span[1])
        targets.append(span)
    return Conversation(text, tuple(targets), incomplete)


def opening(example: Example, tokenizer: PreTrainedTokenizerBase, rendering: Rendering) -> str:
    """Return the text that precedes the last message: the conversation before it and a generation prompt.

    Raises
    ------
    DataError, ConfigError
        As `render_conversation`.
    """
    template = _Template(example, tokenizer, rendering)
    return template.render(template.messages[:-1], generation_prompt=True)


class _Template:
    """A tokenizer's chat template with the messages of one example."""

    def __init__(self, example: Example, tokenizer: PreTrainedTokenizerBase, rendering: Rendering) -> None:
        self._example, self._tokenizer = example, tokenizer
        if not tokenizer.chat_template:
            raise DataError(
                f"example {example.id!r} is a conversation, but the tokenizer has no chat template; "
                "use the tokenizer of the model's chat version, or a prompt and a completion"
            )
        self.messages = [{k: v for k, v in m.items() if k != "weight"} for m in example.messages or ()]
        self._tools = [dict(tool) for tool in example.tools] if example.tools is not None else None
        source = str(tokenizer.get_chat_template(None, self._tools))
        _check_powers(source)
        self.marks = _GENERATION.search(source) is not None
        self._source = _fixed_date(rendering.date) + source if "strftime_now" in source else source

    def render(self, messages: Sequence[Mapping[str, Any]], *, generation_prompt: bool = False) -> str:
        """Render messages with the tools and arguments of the example."""
        return self._apply(messages, generation_prompt, marks=False)[0]

    def _apply(
        self, messages: Sequence[Mapping[str, Any]], generation_prompt: bool, *, marks: bool
    ) -> tuple[str, list[Span]]:
        variables = {**self._tokenizer.special_tokens_map, **(self._example.chat_template_kwargs or {})}
        variables |= {"add_generation_prompt": generation_prompt}
        render: Any = render_jinja_template  # its annotation is wrong
        try:
            with _limited_time():
                texts, spans = render(
                    conversations=[[dict(message) for message in messages]],
                    tools=self._tools,
                    chat_template=self._source,
                    return_assistant_tokens_mask=marks,
                    **variables,
                )
        except _OutOfTimeError:  # the next example would take as long
            raise ConfigError(
                f"the chat template does not come to an end with example {self._example.id!r}: it ran for more than "
                f"{MOST_SECONDS:g} seconds; use another template"
            ) from None
        except Exception as error:  # a template is a program, which may fail in every way, out of memory too
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise DataError(f"the chat template rejects example {self._example.id!r}: {reason}") from None
        return str(texts[0]), [(start, stop) for start, stop in spans[0]] if marks else []

    def marked(self, counted: Sequence[int]) -> tuple[str, dict[int, Span]]:
        """Return the text and the span of each counted message, by the template's own marks."""
        text, marks = self._apply(self.messages, False, marks=True)
        spans: list[Span] = []
        for start, stop in marks:
            if spans and spans[-1][1] == start:
                spans[-1] = (spans[-1][0], stop)
            elif start < stop:
                spans.append((start, stop))
        answers = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        if len(spans) != len(answers):
            raise DataError(
                f"the chat template marks {len(spans)} parts of example {self._example.id!r} as generated, but the "
                f"assistant has {len(answers)} messages; use another template"
            )
        return text, {i: span for i, span in zip(answers, spans, strict=True) if i in counted}

    def located(self, counted: Sequence[int]) -> tuple[str, dict[int, Span]]:
        """Return the text and the span of each counted message, by comparing renderings."""
        text = self.render(self.messages)
        placeholder = _placeholder(text, self._example)
        spans = self._by_placeholders(text, counted, placeholder)
        if spans is None:
            spans = {i: self._by_comparison(text, i, placeholder) for i in counted}
        return text, {i: (start, self._end_of_turn(text, i, stop, placeholder)) for i, (start, stop) in spans.items()}

    def _by_placeholders(self, text: str, counted: Sequence[int], placeholder: str) -> dict[int, Span] | None:
        """Locate plain answers, all at once; None unless their contents in the place of placeholders give the text."""
        if not all(_Answer.of(self.messages[i]).plain for i in counted):
            return None
        messages = [m | {"content": placeholder} if i in counted else m for i, m in enumerate(self.messages)]
        parts = self.render(messages).split(placeholder)
        if len(parts) != len(counted) + 1 or not text.startswith(parts[0]):
            return None
        spans, at = {}, len(parts[0])
        for i, following in zip(counted, parts[1:], strict=True):
            # Templates may strip spaces.
            variants = _stripped(str(self.messages[i]["content"]))
            shown = next((v for v in variants if text.startswith(v + following, at)), None)
            if shown is None:
                return None
            spans[i] = (at, at + len(shown))
            at += len(shown) + len(following)
        return spans if at == len(text) else None

    def _by_comparison(self, text: str, i: int, placeholder: str) -> Span:
        """Locate a message by what differs if it is a plain placeholder."""
        answer, plain = _Answer.of(self.messages[i]), {"role": "assistant", "content": placeholder}
        try:
            other = self.render([*self.messages[:i], plain, *self.messages[i + 1 :]])
        except DataError:  # such as an answer of a tool that is not called then
            asked, alone = self.render(self.messages[:i], generation_prompt=True), self.render(self.messages[: i + 1])
            return _common(text, asked), _common(text, alone.rstrip())
        start = _common(text, other)
        stop = len(text) - min(_common(text[::-1], other[::-1]), len(text) - start)
        if answer.calls and i + 1 < len(self.messages):
            # Some templates put the answer of a tool into the turn that calls it.
            alone = self.render(self.messages[: i + 1])
            begin = _common(alone, self.render([*self.messages[:i], plain]))
            stop = start + _common(text[start:stop], alone[begin:])
        if i and answer.thinking and answer.thinking in text[start:stop]:
            # What opens the thinking is the template's in both renderings, but the model's unless it is asked so.
            before = self.render(self.messages[:i])
            asked = self.render(self.messages[:i], generation_prompt=True)
            prompt = asked[_common(asked, before) :]
            begin = text.rfind(prompt, 0, start) + len(prompt) if prompt and prompt in text[:start] else start
            if not answer.literal or text[begin:start].strip() == "<think>":
                start = begin
        return start, stop

    def _end_of_turn(self, text: str, i: int, stop: int, placeholder: str) -> int:
        """Return where the turn ends whose content ends at `stop`: after what the template writes to end it."""
        alone = self.render([*self.messages[:i], {"role": "assistant", "content": placeholder}])
        # Some templates write more in a new line after the last turn.
        ending = re.match(r"\s*\S+", alone.rpartition(placeholder)[2])
        return stop + ending.end() if ending and text.startswith(ending[0], stop) else stop


class _OutOfTimeError(Exception):
    """A template takes too long."""


@contextmanager
def _limited_time() -> Iterator[None]:
    """Raise _OutOfTimeError in the block once this thread has computed for too long in it.

    Only the main thread can be interrupted; elsewhere there is no limit. The time of other threads and programs does
    not count, so that a machine that is busy changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    started = time.thread_time()

    def look(*_: object) -> None:
        if time.thread_time() - started > MOST_SECONDS:
            raise _OutOfTimeError

    before = signal.signal(signal.SIGVTALRM, look)
    timer = signal.setitimer(signal.ITIMER_VIRTUAL, MOST_SECONDS / 10, MOST_SECONDS / 10)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, *timer)
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL if before is None else before)


@cache
def _check_powers(source: str) -> None:
    """Raise ConfigError if a template computes a power: 10 ** 10 ** 10 is one operation, which nothing interrupts."""
    try:
        tokens = [value for _, kind, value in Environment().lex(source) if kind != "whitespace"]
    except TemplateSyntaxError:  # which rendering reports
        return
    # After a bracket or a comma, the sign stands for arguments by name.
    if any(this == "**" and before not in ("(", ",") for before, this in pairwise(tokens)):
        raise ConfigError("the chat template computes a power (**), which might not end; use another template")


@dataclass(frozen=True)
class _Answer:
    """What a message of the assistant contains.

    Attributes
    ----------
    thinking : str
        Without spaces around it; '' if there is none.
    visible : str
        Content after the thinking, without spaces around it.
    calls : tuple of str
        Names of the tools that it calls.
    literal : bool
        Whether the content itself has the tags of thinking.
    """

    thinking: str
    visible: str
    calls: tuple[str, ...]
    literal: bool

    @classmethod
    def of(cls, message: Mapping[str, Any]) -> _Answer:
        """Take a message apart."""
        content = str(message.get("content") or "")
        thinking, closed, visible = content.rpartition("</think>")
        field = next((str(message[name]) for name in REASONING if message.get(name)), "")
        calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
        return cls(
            thinking=(field or thinking.rpartition("<think>")[2]).strip(),
            visible=(visible if closed else content).strip(),
            calls=tuple(str(call.get("name", "")) for call in calls),
            literal=bool(closed),
        )

    @property
    def plain(self) -> bool:
        """Whether there is nothing but visible content."""
        return bool(self.visible) and not (self.thinking or self.calls or self.literal)

    def after_thinking(self, text: str, span: Span) -> int:
        """Return where the visible content, or a call of a tool, starts in the span of this message."""
        start, stop = span
        end = text.find(self.thinking, start, stop) + len(self.thinking)
        if self.visible:
            return text.find(self.visible, end, stop)
        closing = re.compile(r"\s*</?think\w*>\s*").match(text, end, stop)
        return closing.end() if closing else end


def _placeholder(text: str, example: Example) -> str:
    """Return a string that differs from the text in its first and last character."""
    # Noncharacters of Unicode, which texts should not contain.
    free = [chr(code) for code in range(0xFDD0, 0xFDF0) if chr(code) not in text]
    if len(free) < 2:
        raise DataError(f"example {example.id!r} contains noncharacters of Unicode (U+FDD0 to U+FDEF); remove them")
    return free[0] + free[1]


def _stripped(content: str) -> list[str]:
    """Return a text with fewer and fewer of the spaces around it."""
    core = content.strip()
    leading = content[: len(content) - len(content.lstrip())]
    trailing = content[len(content.rstrip()) :]
    return [
        leading[i:] + core + trailing[: len(trailing) - j]
        for i in range(len(leading) + 1)
        for j in range(len(trailing) + 1)
    ]


def _common(a: str, b: str) -> int:
    """Return the length of the common prefix of two strings."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low


def _fixed_date(day: str) -> str:
    """Return a macro that formats a date as the template's function for today's date would.

    Transformers passes only plain data to a template, so the function cannot be given to it. The expression at the end
    keeps a line break at the start of the template, which would be trimmed after a block.
    """
    midnight = datetime.fromisoformat(day)
    # A doubled percent sign is set aside, so that what follows it is no directive.
    pairs = [("%%", "\0"), *((directive, midnight.strftime(directive)) for directive in _DIRECTIVES), ("\0", "%")]
    filters = "".join(f" | replace({json.dumps(old)}, {json.dumps(new)})" for old, new in pairs)
    return "{% macro strftime_now(format) %}{{ format" + filters + " }}{% endmacro %}{{ '' }}"
