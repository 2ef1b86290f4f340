"""Tokenise examples: exactly the tokens that a trainer sees, which of them are targets, and how inputs are truncated.

An example becomes one string, which is tokenised once. Which tokens are targets follows from the characters: a token
is a target if any of its characters belongs to an answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from forgetcast.data.pool import Example
from forgetcast.data.rendering import DEFAULT_RENDERING, Rendering
from forgetcast.lm.conversation import Span, opening, render_conversation

IGNORED_INDEX = -100
"""Label of a token that is not a target, as in PyTorch's and the Trainer's losses."""


@dataclass(frozen=True)
class Encoded:
    """Tokens of one example.

    Attributes
    ----------
    ids : list of int
    labels : list of int
        The token's id if it is a target, else IGNORED_INDEX. The first token is never a target: nothing precedes it.
    truncated : bool
        Whether the example was longer than the context.
    incomplete : bool
        Whether the chat template leaves out thinking that the example contains.
    weight : float
        Of its loss in training.
    """

    ids: list[int]
    labels: list[int]
    truncated: bool
    incomplete: bool = False
    weight: float = 1.0

    @property
    def targets(self) -> int:
        """Number of target tokens."""
        return len(self.labels) - self.labels.count(IGNORED_INDEX)


def encode(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
    *,
    end: bool = False,
    rendering: Rendering = DEFAULT_RENDERING,
) -> Encoded:
    """Tokenise an example.

    The ids of a text, or of a prompt with its completion, are those of `tokenizer(prompt + completion)`; those of a
    conversation are those of `tokenizer.apply_chat_template(messages, tools=tools, **chat_template_kwargs)`. A begin or
    end token that the text has already is not added again.

    A text is truncated at its end. Otherwise the tokens before the first target are truncated first, at their start (a
    begin token stays); the rest is truncated, at its end, only if it exceeds the context without them.

    Parameters
    ----------
    example : Example
    tokenizer : PreTrainedTokenizerBase
    context : int or None
        Longest input, in tokens; at least 2. None: no truncation.
    end : bool
        Whether the end-of-sequence token follows as a last target, as in training but not in scoring. A conversation
        ends as its template ends it.
    rendering : Rendering
        How conversations are rendered.

    Raises
    ------
    DataError
        If the example is a conversation and the tokenizer has no chat template, or one that rejects or changes it.
    """
    incomplete = False
    if example.messages is not None:
        conversation = render_conversation(example, tokenizer, rendering)
        incomplete = conversation.incomplete
        # The template adds the special tokens itself.
        ids, labels = _tokenise(tokenizer, conversation.text, conversation.targets, special=False)
    else:
        text, start = example.full_text, len(example.prompt or "")
        targets = [(start, len(text))] if example.text is None else []
        ids, labels = _tokenise(tokenizer, text, targets, special=True)
        if example.text is not None:
            labels = list(ids)
        if end and tokenizer.eos_token_id is not None:
            eos = int(tokenizer.eos_token_id)
            if ids[-1:] != [eos]:
                ids.append(eos)
                labels.append(eos)
            labels[-1] = eos
    labels[:1] = [IGNORED_INDEX] * len(labels[:1])
    if context is None or len(ids) <= context:
        return Encoded(ids, labels, False, incomplete)
    if example.text is not None:
        return Encoded(ids[:context], labels[:context], True)
    first = next((i for i, label in enumerate(labels) if label != IGNORED_INDEX), len(labels))
    rest = slice(first, first + context - (first > 0))
    room = context - len(ids[rest])
    leading = 1 if first and room > 1 and _begins(ids, tokenizer) else 0
    start = max(first - (room - leading), leading)
    ids = ids[:leading] + ids[start:first] + ids[rest]
    labels = [IGNORED_INDEX] * (len(ids) - len(labels[rest])) + labels[rest]
    labels[0] = IGNORED_INDEX
    return Encoded(ids, labels, True, incomplete)


def question(
    example: Example, tokenizer: PreTrainedTokenizerBase, rendering: Rendering = DEFAULT_RENDERING
) -> tuple[list[int], str] | None:
    """Return the prompt's tokens and the expected answer: the completion, or the assistant's last message.

    None if the example is a text, or a conversation that does not end with a target message of the assistant.
    """
    if example.completion is not None:
        ids, _ = _tokenise(tokenizer, example.prompt or "", [], special=True)
        # What the tokenizer adds at the end of a text is not at the end of a prompt.
        ended = ids[-1:] == [tokenizer.eos_token_id] and not (example.prompt or "").endswith(tokenizer.eos_token)
        return ids[: len(ids) - ended], example.completion.strip()
    if example.messages is None or not example.counted[-1] or not (answer := example.messages[-1].get("content")):
        return None
    ids, _ = _tokenise(tokenizer, opening(example, tokenizer, rendering), [], special=False)
    return ids, str(answer).rpartition("</think>")[2].strip()


def _tokenise(
    tokenizer: PreTrainedTokenizerBase, text: str, targets: Sequence[Span], *, special: bool
) -> tuple[list[int], list[int]]:
    """Return the ids of a text, and labels where a token with a character in one of the spans is a target."""
    # Not verbose: else it warns that the text is longer than the context, to which it is truncated right after.
    options: dict[str, Any] = {"add_special_tokens": special, "verbose": False}
    encoding = tokenizer(text, **options)
    ids = list(encoding["input_ids"])
    labels = [IGNORED_INDEX] * len(ids)
    for span in targets:
        found = _tokens_of(tokenizer, text, encoding.encodings[0], span, options) if tokenizer.is_fast else None
        first, last = found or _tokens_by_prefix(tokenizer, text, ids, span, options)
        labels[first:last] = ids[first:last]
    if special:
        bos, eos = tokenizer.bos_token, tokenizer.eos_token
        if bos and text.startswith(bos) and ids[:2] == [tokenizer.bos_token_id] * 2:
            ids, labels = ids[1:], labels[1:]
        if eos and text.endswith(eos) and ids[-2:] == [tokenizer.eos_token_id] * 2:
            ids, labels = ids[:-1], labels[:-1]
    return ids, labels


def _tokens_of(
    tokenizer: PreTrainedTokenizerBase, text: str, encoding: Any, span: Span, options: Mapping[str, Any]
) -> Span | None:
    """Return the range of tokens with a character in a span of a text.

    None if offsets do not say: several tokens share characters on both sides of the boundary, as where a Unigram model
    falls back to bytes.
    """
    start, stop = span
    first, last = encoding.char_to_token(start), encoding.char_to_token(stop - 1)
    if first is None or last is None:
        return _tokens_without_offsets(tokenizer, text, encoding, span, options)
    # That is the first token with a character; one of several bytes may have several tokens.
    while (characters := encoding.token_to_chars(last + 1)) is not None and characters[0] < stop:
        last += 1
    for at, boundary in ((first, start), (last, stop)):
        begin, end = encoding.token_to_chars(at)
        others = (encoding.token_to_chars(at + step) for step in (-1, 1) if at + step >= 0)
        if begin < boundary < end and (begin, end) in others:
            return None
    return first, last + 1


def _tokens_without_offsets(
    tokenizer: PreTrainedTokenizerBase, text: str, encoding: Any, span: Span, options: Mapping[str, Any]
) -> Span:
    """Return the range of tokens of a span if its first or last character is in the offsets of no token."""
    start, stop = span
    # A byte-level tokenizer may report offsets without the spaces around a token.
    if (spans := _spans_of_bytes(encoding, text, tokenizer)) is not None:
        inside = [i for i, (begin, end) in enumerate(spans) if start < end and begin < stop]
        return inside[0], inside[-1] + 1
    # Else the tokenizer drops spaces, or its normaliser joined the character with the one before it.
    spans = list(encoding.offsets)
    before = [i for i, (begin, end) in enumerate(spans) if begin < min(start, end)]
    after = [i for i, (begin, end) in enumerate(spans) if begin < stop and start < end]
    first, last = (after[0], after[-1] + 1) if after else (len(spans), 0)
    dropped = text[start].isspace() and not any("Ġ" in token for token in encoding.tokens)
    if encoding.char_to_token(start) is None and before and not dropped:
        joined = spans.index(spans[before[-1]])
        prefix = tokenizer(text[:start], **options)["input_ids"]
        first = min(first, max(joined, _common_prefix(encoding.ids, prefix)[0]))
        last = max(last, before[-1] + 1) if first <= before[-1] else last
    return first, last


def _spans_of_bytes(encoding: Any, text: str, tokenizer: PreTrainedTokenizerBase) -> list[Span] | None:
    """Return the characters of each token of a byte-level tokenizer, half-open; None if it is of another kind.

    A token has one letter for each byte, and tokens follow each other without gaps.
    """
    added, whole, position = tokenizer.added_tokens_decoder, text.encode(), 0
    characters = [i for i, character in enumerate(text) for _ in character.encode()]  # of each byte
    spans = list[Span]()
    for token, id_, special in zip(encoding.tokens, encoding.ids, encoding.special_tokens_mask, strict=True):
        if special:
            spans.append((0, 0))
            continue
        if not position and token.startswith("Ġ") and not text[0].isspace():
            token = token[1:]  # a tokenizer may put a space before the text
        after = position + len(added[id_].content.encode() if id_ in added else token)
        part = whole[position:after]
        # Printable ASCII is itself in a byte-level alphabet, and no other byte is.
        plain = (
            (chr(byte), letter) for byte, letter in zip(part, token, strict=False) if 32 < min(byte, ord(letter)) < 127
        )
        matches = part == added[id_].content.encode() if id_ in added else all(byte == letter for byte, letter in plain)
        if after > len(whole) or not matches:
            return None
        spans.append((characters[position], characters[after - 1] + 1) if after > position else (0, 0))
        position = after
    return spans if position == len(whole) else None


def _tokens_by_prefix(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: Sequence[int], span: Span, options: Mapping[str, Any]
) -> Span:
    """Return the range of tokens of a span by the tokens of what precedes it, for a tokenizer without offsets."""
    start, stop = span
    first, _ = _common_prefix(ids, tokenizer(text[:start], **options)["input_ids"])
    if stop == len(text):
        # Without what the tokenizer adds after a text; an end token that the text has may be the only one.
        after, _ = _common_prefix(ids[::-1], tokenizer("", **options)["input_ids"][::-1])
        eos = tokenizer.eos_token
        written = bool(eos) and text.endswith(str(eos)) and ids[-2:] != [tokenizer.eos_token_id] * 2
        return first, len(ids) - (0 if written else after)
    last, whole = _common_prefix(ids, tokenizer(text[:stop], **options)["input_ids"])
    # The token after a common prefix has characters on both sides of the boundary.
    return first, last + (not whole)


def _common_prefix(ids: Sequence[int], part: Sequence[int]) -> tuple[int, bool]:
    """Return the length of the common prefix, and whether it is all of `part`."""
    length = next((i for i, (a, b) in enumerate(zip(ids, part, strict=False)) if a != b), min(len(ids), len(part)))
    return length, length == len(part)


def _begins(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the first token is one that begins every input."""
    begin = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
    return bool(ids) and ids[0] in begin


def windows(encoded: Encoded, context: int, stride: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[Encoded]:
    """Cut tokens into windows of `context` tokens, `stride` apart; each target is a target of exactly one window.

    If the input starts with a begin token, each window does. Windows without a target are dropped. `stride` is less
    than `context`, unless one window holds all, so that every target has a token before it.
    """
    begin = encoded.ids[:1] if _begins(encoded.ids, tokenizer) else []
    end = 1  # of the tokens that earlier windows cover
    for start in range(0, max(len(encoded.ids), 1), stride):
        added = begin if start else []
        stop = min(start + context - len(added), len(encoded.ids))
        labels = [IGNORED_INDEX] * (len(added) + end - start) + encoded.labels[end:stop]
        if labels.count(IGNORED_INDEX) < len(labels):
            yield Encoded(added + encoded.ids[start:stop], labels, False)
        end = max(end, stop)


def digest(pieces: Sequence[Encoded]) -> str:
    """Return a hash of what is measured: the ids of each piece, and which are targets (32 hexadecimal digits)."""
    result = hashlib.sha256()
    for piece in pieces:
        ids = np.array(piece.ids, dtype="<i4")
        result.update(np.array([len(ids)], dtype="<i8").tobytes())
        result.update(ids.tobytes())
        result.update(np.packbits(np.array(piece.labels, dtype=np.int64) != IGNORED_INDEX).tobytes())
    return result.hexdigest()[:32]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of the tokenizer, without its chat template (64 hexadecimal digits)."""
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        # Transformers changes these two from call to call.
        state = {name: value for name, value in state.items() if name not in ("truncation", "padding")}
    else:
        state = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    state["special"] = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a hash of the chat template (64 hexadecimal digits); None if there is none."""
    template = tokenizer.chat_template
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest() if template else None


def pad(
    batch: Sequence[Encoded], pad_id: int, *, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return input ids, attention mask and labels of a batch, each of shape (B, L), padded right or `left`."""
    longest = max(len(encoded.ids) for encoded in batch)
    ids = torch.full((len(batch), longest), pad_id, dtype=torch.long)
    mask = torch.zeros((len(batch), longest), dtype=torch.long)
    labels = torch.full((len(batch), longest), IGNORED_INDEX, dtype=torch.long)
    for row, encoded in enumerate(batch):
        start = longest - len(encoded.ids) if left else 0
        stop = start + len(encoded.ids)
        ids[row, start:stop] = torch.tensor(encoded.ids)
        mask[row, start:stop] = 1
        labels[row, start:stop] = torch.tensor(encoded.labels)
    return ids, mask, labels


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return a token to pad with: any will do, because padding is masked and never a target."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0
