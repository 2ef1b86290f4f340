"""From examples to tokens: which of them the model is asked to predict, and what is cut when there are too many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from forgetcast.errors import DataError
from forgetcast.pool import Example

IGNORED = -100
"""Label of a token that does not count, as in PyTorch's and the Trainer's losses."""


@dataclass(frozen=True)
class Encoded:
    """Tokens of one example.

    Attributes
    ----------
    ids : list of int
    labels : list of int
        The token where it counts, else IGNORED. The first never counts: it has nothing before it to be predicted from.
    truncated : bool
        Whether the example was longer than the context.
    """

    ids: list[int]
    labels: list[int]
    truncated: bool

    @property
    def targets(self) -> int:
        """Number of tokens that count."""
        return len(self.labels) - self.labels.count(IGNORED)


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, context: int | None, *, end: bool = False) -> Encoded:
    """Tokenise an example.

    A text is cut at its end. Of anything else, what comes before the first token that counts is cut at its start first
    (a leading special token stays), and the rest, at its end, only if it fills the context by itself. What counts and
    what does not are tokenised apart, so that the tokens that count do not depend on how a prompt ends.

    Parameters
    ----------
    example : Example
    tokenizer : PreTrainedTokenizerBase
    context : int or None
        Longest input, in tokens; at least 2. None: nothing is cut.
    end : bool
        Whether the end-of-sequence token is added as a last target, as training does and scoring does not. A
        conversation ends as its template ends it.

    Raises
    ------
    DataError
        If the example is a conversation, and the tokenizer has no chat template, or one that refuses it.
    """
    tail = [int(tokenizer.eos_token_id)] if end and tokenizer.eos_token_id is not None else []
    if example.text is not None:
        ids = _tokens(tokenizer, example.text) + tail
        return Encoded(ids[:context], [IGNORED, *ids[1:context]], context is not None and len(ids) > context)
    if example.messages is not None:
        # The template writes the special tokens itself.
        parts = [(_tokens(tokenizer, t, add_special_tokens=False), c) for t, c in _turns(example, tokenizer)]
    else:
        completion = _tokens(tokenizer, example.completion or "", add_special_tokens=False)
        parts = [(_tokens(tokenizer, example.prompt or ""), False), (completion + tail, True)]
    ids = [token for tokens, _ in parts for token in tokens]
    labels = [token if counts else IGNORED for tokens, counts in parts for token in tokens]
    first = next((i for i, label in enumerate(labels) if label != IGNORED), len(labels))
    truncated = context is not None and len(ids) > context
    if context is not None and truncated:
        rest = slice(first, first + context - (first > 0))
        room = context - len(ids[rest])
        leading = 1 if first and ids[0] in tokenizer.all_special_ids and room > 1 else 0
        kept = max(first - (room - leading), leading)
        ids = ids[:leading] + ids[kept:first] + ids[rest]
        labels = [IGNORED] * (len(ids) - len(labels[rest])) + labels[rest]
    return Encoded(ids, [IGNORED, *labels[1:]], truncated)


def question(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], str] | None:
    """Tokens of what the model is to answer, and the expected answer: the completion, or what the assistant says last.

    None if the example is a text, or a conversation that does not end with words of the assistant's that count.
    """
    if example.completion is not None:
        return _tokens(tokenizer, example.prompt or ""), example.completion.strip()
    if example.messages is None or not example.counted[-1] or not (answer := example.messages[-1].get("content")):
        return None
    asked = _render(example, tokenizer, len(example.messages) - 1, answering=True)
    return _tokens(tokenizer, asked, add_special_tokens=False), str(answer).strip()


def _turns(example: Example, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, bool]]:
    """A conversation as its template writes it, in parts, with whether they count.

    A turn counts from where the template asks for it to where it ends it.
    """
    messages = example.messages or ()
    whole, done = _render(example, tokenizer, len(messages)), 0
    for i in (i for i, counts in enumerate(example.counted) if counts):
        # Some templates ask for an answer with more than they write before one that is there.
        asked = _render(example, tokenizer, i, answering=True) if i else ""
        before = asked if whole.startswith(asked) else _render(example, tokenizer, i)
        after = _render(example, tokenizer, i + 1)
        start, stop = len(before), len(after.rstrip())  # no model is asked for the line break that ends a turn
        if not whole.startswith(after):
            # Some end the last turn in another way. Then the words count, and not what ends them.
            words = str(messages[i].get("content") or "").strip()
            stop = whole.find(words, start) + len(words) if words in whole[start:] else start
        if not done <= start < stop or not whole.startswith(before):
            raise DataError(
                f"the tokenizer's chat template writes earlier messages of {example.id!r} differently once later ones "
                "follow; make an example of each answer, with the messages before it"
            )
        yield whole[done:start], False
        yield whole[start:stop], True
        done = stop
    if done < len(whole):
        yield whole[done:], False


def _render(example: Example, tokenizer: PreTrainedTokenizerBase, count: int, *, answering: bool = False) -> str:
    """Write the first messages with the tokenizer's chat template, and ask for an answer if one is to come."""
    if not tokenizer.chat_template:
        raise DataError(
            f"example {example.id!r} is a conversation, but the tokenizer has no chat template; "
            "use the tokenizer of the model's chat version, or a prompt and a completion"
        )
    messages = [{k: v for k, v in m.items() if k != "weight"} for m in (example.messages or ())[:count]]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answering))
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(f"the chat template refuses example {example.id!r}: {' '.join(str(error).split())}") from None


def windows(encoded: Encoded, context: int, stride: int) -> Iterator[Encoded]:
    """Cut tokens into windows of `context`, each `stride` after the last; every target is one of exactly one window's.

    Windows without a target are left out. `stride` is less than `context`, so that a target has something before it,
    unless one window holds all.
    """
    end = 1  # of what was a window's already
    for start in range(0, max(len(encoded.ids), 1), stride):
        stop = min(start + context, len(encoded.ids))
        labels = [IGNORED] * (end - start) + encoded.labels[end:stop]
        if labels.count(IGNORED) < len(labels):
            yield Encoded(encoded.ids[start:stop], labels, False)
        end = max(end, stop)


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, **options: bool) -> list[int]:
    # Not verbose: else it warns that the text is longer than the context, which is cut to it right after.
    return list(tokenizer(text, verbose=False, **options)["input_ids"])


def pad(
    batch: Sequence[Encoded], pad_id: int, *, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input ids, attention mask and labels of a batch, each of shape (B, L), padded on the right, or on the `left`;
    labels are IGNORED where a token does not count.
    """
    longest = max(len(encoded.ids) for encoded in batch)
    ids = torch.full((len(batch), longest), pad_id, dtype=torch.long)
    mask = torch.zeros((len(batch), longest), dtype=torch.long)
    labels = torch.full((len(batch), longest), IGNORED, dtype=torch.long)
    for row, encoded in enumerate(batch):
        start = longest - len(encoded.ids) if left else 0
        stop = start + len(encoded.ids)
        ids[row, start:stop] = torch.tensor(encoded.ids)
        mask[row, start:stop] = 1
        labels[row, start:stop] = torch.tensor(encoded.labels)
    return ids, mask, labels


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Token to pad with: any will do, because padded places are masked and never count."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0
