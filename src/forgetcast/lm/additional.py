"""What can be measured of a pool in addition to `score`: the same losses again, and the KL divergence from a model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial as partial_function
from pathlib import Path

import numpy as np
import torch

import forgetcast
from forgetcast.data.pool import Pool
from forgetcast.errors import ConfigError, MismatchError
from forgetcast.lm.load import LanguageModel
from forgetcast.lm.score import BATCH_TOKENS, Partial, _add_up, _measure, default_batch_tokens, prepare, score
from forgetcast.measure.scores import Scores


def score_again(
    language_model: LanguageModel,
    pool: Pool,
    scores: Scores,
    *,
    batch_tokens: int | None = None,
    partial: Path | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Measure the losses a second time, with other batches: how far they depend on what shares a batch.

    The pool is read in reverse, in batches of half as many tokens (of 2,048 if there were 1,024 or fewer).

    Parameters
    ----------
    language_model : LanguageModel
    pool : Pool
    scores : Scores
        The first measurement, by `score`.
    batch_tokens : int, optional
        Tokens in a batch of the first measurement.
    partial, on_progress
        As in `score`.

    Returns
    -------
    array, shape (N,)
        In the order of `scores.ids`: `Scores.repeats`.

    Raises
    ------
    MismatchError
        If the scores are of another model, pool or tokens.
    """
    first = batch_tokens or default_batch_tokens(language_model)
    again = score(
        language_model,
        pool.subset(pool.ids[::-1]),
        max_length=scores.metadata["max_length"],
        stride=scores.metadata["stride"],
        batch_tokens=first // 2 if first > BATCH_TOKENS // 2 else BATCH_TOKENS,
        partial=partial,
        on_progress=on_progress,
    )
    _check_same_measurement(scores, again)
    return again.at(scores.ids)


def _check_same_measurement(first: Scores, second: Scores) -> None:
    """Raise MismatchError unless two measurements are of the same model and tokens."""
    same = all(first.metadata.get(name) == second.metadata.get(name) for name in ("model_hash", "pool"))
    if not same or first.digests != second.subset(first.ids).digests:
        raise MismatchError("the first measurement is of another model, pool or tokens; remove it, and measure both")


@torch.inference_mode()
def kl_divergence(
    language_model: LanguageModel,
    reference: LanguageModel,
    pool: Pool,
    *,
    max_length: int | None = None,
    stride: int | None = None,
    batch_tokens: int | None = None,
    partial: Path | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Measure how far a model's predictions are from a reference model's: mean KL(reference || model) per target token.

    It is the expectation under the reference of how many nats the model gives the next token less, as in llama.cpp's
    `--kl-divergence`, where the reference is the model before it was quantised. Both models run on the same batches,
    so that both are in memory, and their logits are compared in chunks. If one of them pads its vocabulary with more
    rows, these are left out on both sides.

    Parameters
    ----------
    language_model, reference : LanguageModel
    pool : Pool
    max_length, stride, batch_tokens, partial, on_progress
        As in `score`.

    Returns
    -------
    array, shape (N,)
        Nats per target token, in the pool's order: `Scores.kl`. NaN where an example cannot be scored, or the
        divergence is not finite.

    Raises
    ------
    ConfigError
        If the context of the reference is shorter than the inputs, or a setting does not fit the model.
    MismatchError
        If the two models' tokenizers differ, or give an example other tokens, or `partial` belongs to other models,
        another pool or settings.
    """
    inputs = prepare(language_model, pool, max_length, stride)
    if inputs.context > reference.context:
        raise ConfigError(
            f"inputs have up to {inputs.context} tokens, and the reference's context has {reference.context}; "
            f"use --max-length {reference.context}"
        )
    _check_same_tokens(language_model, reference)
    expected = prepare(reference, pool, inputs.context, stride).digests
    pairs = zip(pool.ids, inputs.digests, expected, strict=True)
    other = [id_ for id_, ours, theirs in pairs if ours != theirs]
    if other:
        raise MismatchError(
            f"the reference {reference.name} reads {len(other)} example(s) as other tokens, e.g. {other[0]!r}; give "
            "both models the same tokenizer and chat template"
        )
    checkpoint = Partial(
        partial,
        {
            "model_hash": language_model.weights_hash,
            "reference_hash": reference.weights_hash,
            "pool": pool.fingerprint,
            "tokens": inputs.digest,
            "version": forgetcast.__version__,
        },
    )
    batches = partial_function(_measure, language_model, batch_tokens=batch_tokens, reference=reference)
    totals = _add_up(pool.ids, inputs, checkpoint, batches, on_progress)
    checkpoint.remove()
    targets = np.array([example.targets for example in inputs.encoded])
    measured = np.array([not reason for reason in totals.reasons])
    return np.where(measured, totals.sums / np.maximum(targets, 1), np.nan)


def _check_same_tokens(language_model: LanguageModel, reference: LanguageModel) -> None:
    """Raise MismatchError unless both tokenizers give every id the same token."""
    ours, theirs = (each.tokenizer.get_vocab() for each in (language_model, reference))
    if ours != theirs:
        odd = min(token for token, _ in ours.items() ^ theirs.items())
        raise MismatchError(
            f"the tokenizer of the reference {reference.name} differs from the model's ({len(theirs)} and {len(ours)} "
            f"tokens; {odd!r} is in one of them only, or has another number): their distributions cannot be compared"
        )
