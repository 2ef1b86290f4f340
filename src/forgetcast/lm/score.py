"""Score a pool: mean negative log-likelihood per target token of every example, in batches that waste no padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.nn.functional import cross_entropy

import forgetcast
from forgetcast.errors import ConfigError, DataError
from forgetcast.lm.load import LanguageModel, embedding_rows
from forgetcast.lm.text import Encoded, encode, pad, pad_id
from forgetcast.pool import Pool
from forgetcast.scores import Scores

BATCH_TOKENS, GPU_BATCH_TOKENS = 2048, 8192
"""Default size of a batch: on a CPU, larger ones only leave its cache."""

LOGITS = 2**26
"""Most logits that are computed at once: 256 MiB in float32, whatever the vocabulary."""


@torch.inference_mode()
def score(
    language_model: LanguageModel,
    pool: Pool,
    *,
    max_length: int | None = None,
    batch_tokens: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Scores:
    """Score every example of a pool.

    Parameters
    ----------
    language_model : LanguageModel
    pool : Pool
    max_length : int, optional
        Longest input, in tokens; default and upper limit: the model's context.
    batch_tokens : int, optional
        Tokens in a batch, padding included; at least one example goes into each. Default: what suits the device.
    on_progress : callable, optional
        Called with the number of examples that a batch has finished.

    Returns
    -------
    Scores
        In the pool's order. An example without a token to predict is NaN, with the reason.

    Raises
    ------
    DataError
        If the model gives a loss that is not finite.
    """
    model, tokenizer = language_model.model, language_model.tokenizer
    context = _context(language_model, max_length)
    encoded = [encode(example, tokenizer, context) for example in pool]
    nll = np.full(len(pool), np.nan)
    if batch_tokens is None:
        batch_tokens = GPU_BATCH_TOKENS if model.device.type == "cuda" else BATCH_TOKENS
    was_training = model.training
    model.eval()
    for batch in _batches(encoded, min(batch_tokens, LOGITS // embedding_rows(model))):
        ids, mask, labels = pad([encoded[i] for i in batch], pad_id(tokenizer))
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
        nll[batch] = _mean_nll(logits, labels.to(logits.device))
        bad = [i for i in batch if not np.isfinite(nll[i])]
        if bad:
            raise DataError(
                f"{language_model.name} gives {pool.ids[bad[0]]!r} the loss {nll[bad[0]]}: not a usable model"
            )
        if on_progress is not None:
            on_progress(len(batch))
    model.train(was_training)
    return Scores(
        ids=pool.ids,
        nll=nll,
        tokens=np.array([e.targets for e in encoded]),
        truncated=np.array([e.truncated for e in encoded]),
        reasons=[None if e.targets else "no token to predict: the text is a single token" for e in encoded],
        metadata={
            "model": language_model.name,
            "model_hash": language_model.weights_hash,
            "pool": pool.fingerprint,
            "max_length": context,
            "dtype": str(model.dtype).removeprefix("torch."),
            "version": forgetcast.__version__,
        },
    )


def _context(language_model: LanguageModel, max_length: int | None) -> int:
    if max_length is None:
        return language_model.context
    if not 2 <= max_length <= language_model.context:
        raise ConfigError(f"max_length must be between 2 and the model's context of {language_model.context} tokens")
    return max_length


def _batches(encoded: Sequence[Encoded], batch_tokens: int) -> Iterator[list[int]]:
    """Positions of the examples that have targets, longest first, as many in a batch as fit once padded."""
    batch: list[int] = []
    longest = 0
    for i in sorted(range(len(encoded)), key=lambda i: -len(encoded[i].ids)):
        if not encoded[i].targets:
            continue
        if batch and (len(batch) + 1) * longest > batch_tokens:
            yield batch
            batch = []
        if not batch:
            longest = len(encoded[i].ids)
        batch.append(i)
    if batch:
        yield batch


def _mean_nll(logits: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """Mean over the labels that count, shape (B,), of logits (B, L, V) and the labels (B, L) of the same places."""
    # The last place predicts nothing. Moving the labels instead of cutting the logits spares a copy of the logits.
    following = torch.full_like(labels, -100)
    following[:, :-1] = labels[:, 1:]
    nll = cross_entropy(logits.flatten(0, 1).float(), following.flatten(), reduction="none").view(labels.shape)
    return np.asarray((nll.double().sum(dim=1) / (following != -100).sum(dim=1)).cpu().numpy())
