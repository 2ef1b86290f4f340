"""From examples to tokens: which of them the model is asked to predict, and what is cut when there are too many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from forgetcast.pool import Example


@dataclass(frozen=True)
class Encoded:
    """Tokens of one example.

    Attributes
    ----------
    ids : list of int
    first_target : int
        Position of the first token that counts; all from there on do. At least 1, since the first token of all has
        nothing before it to be predicted from.
    truncated : bool
        Whether the example was longer than the context.
    """

    ids: list[int]
    first_target: int
    truncated: bool

    @property
    def targets(self) -> int:
        """Number of tokens that count."""
        return max(len(self.ids) - self.first_target, 0)


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, context: int | None, *, end: bool = False) -> Encoded:
    """Tokenise an example.

    A text is cut at its end. Of a prompt with a completion, the prompt is cut at its start first (a leading special
    token stays), and the completion only if it fills the context by itself. Prompt and completion are tokenised
    apart, so that the tokens that count do not depend on how the prompt ends.

    Parameters
    ----------
    example : Example
    tokenizer : PreTrainedTokenizerBase
    context : int or None
        Longest input, in tokens; at least 2. None: nothing is cut.
    end : bool
        Whether the end-of-sequence token is added as a last target, as training does and scoring does not.
    """
    tail = [int(tokenizer.eos_token_id)] if end and tokenizer.eos_token_id is not None else []
    if example.text is not None:
        ids = _tokens(tokenizer, example.text) + tail
        return Encoded(ids[:context], 1, context is not None and len(ids) > context)
    prompt = _tokens(tokenizer, example.prompt or "")
    completion = _tokens(tokenizer, example.completion or "", add_special_tokens=False) + tail
    truncated = context is not None and len(prompt) + len(completion) > context
    if context is not None and truncated:
        completion = completion[: context - 1]
        room = context - len(completion)
        leading = 1 if prompt[0] in tokenizer.all_special_ids and room > 1 else 0
        prompt = prompt[:leading] + prompt[len(prompt) - (room - leading) :]
    return Encoded(prompt + completion, max(len(prompt), 1), truncated)


def windows(encoded: Encoded, context: int, stride: int) -> Iterator[Encoded]:
    """Cut tokens into windows of `context`, each `stride` after the last; every target is one of exactly one window's.

    Windows without a target are left out. `stride` is less than `context`, so that a target has something before it,
    unless one window holds all.
    """
    end = encoded.first_target
    for start in range(0, max(len(encoded.ids), 1), stride):
        stop = min(start + context, len(encoded.ids))
        if end < stop:
            yield Encoded(encoded.ids[start:stop], end - start, False)
            end = stop


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, **options: bool) -> list[int]:
    # Not verbose: else it warns that the text is longer than the context, which is cut to it right after.
    return list(tokenizer(text, verbose=False, **options)["input_ids"])


def pad(
    batch: Sequence[Encoded], pad_id: int, *, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input ids, attention mask and labels of a batch, each of shape (B, L), padded on the right, or on the `left`;
    labels are -100 where a token does not count.
    """
    longest = max(len(encoded.ids) for encoded in batch)
    ids = torch.full((len(batch), longest), pad_id, dtype=torch.long)
    mask = torch.zeros((len(batch), longest), dtype=torch.long)
    labels = torch.full((len(batch), longest), -100, dtype=torch.long)
    for row, encoded in enumerate(batch):
        start = longest - len(encoded.ids) if left else 0
        stop, first = start + len(encoded.ids), start + encoded.first_target
        ids[row, start:stop] = torch.tensor(encoded.ids)
        mask[row, start:stop] = 1
        labels[row, first:stop] = ids[row, first:stop]
    return ids, mask, labels


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Token to pad with: any will do, because padded places are masked and never count."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0
