"""Tokenise examples: which tokens are targets, and how inputs longer than the context are truncated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from forgetcast.data.pool import Example
from forgetcast.errors import DataError

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
    """

    ids: list[int]
    labels: list[int]
    truncated: bool

    @property
    def targets(self) -> int:
        """Number of target tokens."""
        return len(self.labels) - self.labels.count(IGNORED_INDEX)


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, context: int | None, *, end: bool = False) -> Encoded:
    """Tokenise an example.

    A text is truncated at its end. Otherwise the tokens before the first target are truncated first, at their start (a
    leading special token stays); the rest is truncated, at its end, only if it exceeds the context without them. Prompt
    and targets are tokenised separately, so that the targets do not depend on how a prompt ends.

    Parameters
    ----------
    example : Example
    tokenizer : PreTrainedTokenizerBase
    context : int or None
        Longest input, in tokens; at least 2. None: no truncation.
    end : bool
        Whether to append the end-of-sequence token as a last target, as for training but not for scoring. A
        conversation ends as its template ends it.

    Raises
    ------
    DataError
        If the example is a conversation and the tokenizer has no chat template, or one that rejects it.
    """
    tail = [int(tokenizer.eos_token_id)] if end and tokenizer.eos_token_id is not None else []
    if example.text is not None:
        ids = _tokens(tokenizer, example.text) + tail
        return Encoded(ids[:context], [IGNORED_INDEX, *ids[1:context]], context is not None and len(ids) > context)
    if example.messages is not None:
        # The template adds the special tokens itself.
        parts = [(_tokens(tokenizer, t, add_special_tokens=False), target) for t, target in _turns(example, tokenizer)]
    else:
        completion = _tokens(tokenizer, example.completion or "", add_special_tokens=False)
        parts = [(_tokens(tokenizer, example.prompt or ""), False), (completion + tail, True)]
    ids = [token for tokens, _ in parts for token in tokens]
    labels = [token if target else IGNORED_INDEX for tokens, target in parts for token in tokens]
    first = next((i for i, label in enumerate(labels) if label != IGNORED_INDEX), len(labels))
    truncated = context is not None and len(ids) > context
    if context is not None and truncated:
        rest = slice(first, first + context - (first > 0))
        room = context - len(ids[rest])
        leading = 1 if first and ids[0] in tokenizer.all_special_ids and room > 1 else 0
        kept = max(first - (room - leading), leading)
        ids = ids[:leading] + ids[kept:first] + ids[rest]
        labels = [IGNORED_INDEX] * (len(ids) - len(labels[rest])) + labels[rest]
    return Encoded(ids, [IGNORED_INDEX, *labels[1:]], truncated)


def question(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], str] | None:
    """Return the prompt's tokens and the expected answer: the completion, or the assistant's last message.

    None if the example is a text, or a conversation that does not end with a target message of the assistant.
    """
    if example.completion is not None:
        return _tokens(tokenizer, example.prompt or ""), example.completion.strip()
    if example.messages is None or not example.counted[-1] or not (answer := example.messages[-1].get("content")):
        return None
    asked = _render(example, tokenizer, len(example.messages) - 1, answering=True)
    return _tokens(tokenizer, asked, add_special_tokens=False), str(answer).strip()


def _turns(example: Example, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, bool]]:
    """Split a rendered conversation into parts, each with whether it is a target.

    A target reaches from the end of the generation prompt to the end of the turn.
    """
    messages = example.messages or ()
    rendered, done = _render(example, tokenizer, len(messages)), 0
    for i in (i for i, target in enumerate(example.counted) if target):
        # Some templates have a generation prompt longer than what they write before an existing answer.
        asked = _render(example, tokenizer, i, answering=True) if i else ""
        before = asked if rendered.startswith(asked) else _render(example, tokenizer, i)
        after = _render(example, tokenizer, i + 1)
        start, stop = len(before), len(after.rstrip())  # the line break after a turn is not a target
        if not rendered.startswith(after):
            # Some end the last turn differently: then the target is the words without the end of the turn.
            words = str(messages[i].get("content") or "").strip()
            stop = rendered.find(words, start) + len(words) if words in rendered[start:] else start
        if not done <= start < stop or not rendered.startswith(before):
            raise DataError(
                f"the tokenizer's chat template changes earlier messages of {example.id!r} once later ones follow; "
                "make each answer an example, with the messages before it"
            )
        yield rendered[done:start], False
        yield rendered[start:stop], True
        done = stop
    if done < len(rendered):
        yield rendered[done:], False


def _render(example: Example, tokenizer: PreTrainedTokenizerBase, count: int, *, answering: bool = False) -> str:
    """Render the first `count` messages with the chat template, with a generation prompt if `answering`."""
    if not tokenizer.chat_template:
        raise DataError(
            f"example {example.id!r} is a conversation, but the tokenizer has no chat template; "
            "use the tokenizer of the model's chat version, or a prompt and a completion"
        )
    messages = [{k: v for k, v in m.items() if k != "weight"} for m in (example.messages or ())[:count]]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answering))
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(f"the chat template rejects example {example.id!r}: {' '.join(str(error).split())}") from None


def windows(encoded: Encoded, context: int, stride: int) -> Iterator[Encoded]:
    """Cut tokens into windows of `context` tokens, `stride` apart; each target is a target of exactly one window.

    Windows without a target are dropped. `stride` is less than `context`, unless one window holds all, so that every
    target has a token before it.
    """
    end = 1  # of the tokens that earlier windows cover
    for start in range(0, max(len(encoded.ids), 1), stride):
        stop = min(start + context, len(encoded.ids))
        labels = [IGNORED_INDEX] * (end - start) + encoded.labels[end:stop]
        if labels.count(IGNORED_INDEX) < len(labels):
            yield Encoded(encoded.ids[start:stop], labels, False)
        end = max(end, stop)


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, **options: bool) -> list[int]:
    # Not verbose: else it warns that the text is longer than the context, to which it is truncated right after.
    return list(tokenizer(text, verbose=False, **options)["input_ids"])


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
