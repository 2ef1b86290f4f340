"""Gradient products: which examples a task's first gradient step would make worse, found without their gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from forgetcast.errors import DataError
from forgetcast.lm.load import LanguageModel
from forgetcast.lm.score import losses
from forgetcast.lm.text import encode, pad, pad_id
from forgetcast.pool import Pool

STEP = 0.01
"""How far the gradient is followed each way: until the task's loss would change by this, in nats per token."""

SAMPLE = 64
"""Examples of the task that the gradient is the mean of, unless told otherwise."""


def gradient_products(
    language_model: LanguageModel, task: Pool, pool: Pool, *, sample: int = SAMPLE, batch_size: int = 8, seed: int = 0
) -> np.ndarray:
    """How much each example's loss rises, to first order, as the task's falls by one nat along its gradient.

    With the gradient g of the task and g_i of an example it is ``-g_i' g / g' g``, both at the model as it is: the
    baseline that the paper compares with, up to a factor. It is measured as a central difference of the example's
    loss along g, which takes two forward passes of the pool and one gradient; no gradient of an example is needed.

    Parameters
    ----------
    language_model : LanguageModel
        Its weights are moved and put back.
    task, pool : Pool
    sample : int
        Examples of the task that the gradient is the mean of, drawn by the seed; it needs memory for the gradient and
        a copy of the weights.
    batch_size : int
        Of these, how many at once.
    seed : int

    Returns
    -------
    array, shape (N,)
        Nats per token for one nat per token; positive where the example would be forgotten.

    Raises
    ------
    DataError
        If an example cannot be scored, or the task has no gradient.
    """
    model: Any = language_model.model
    chosen = np.random.default_rng(seed).permutation(len(task))[:sample].tolist()
    encoded = [encode(task[i], language_model.tokenizer, language_model.context, end=True) for i in chosen]
    total = sum(example.targets for example in encoded)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    was_training = model.training
    model.eval()
    model.zero_grad(set_to_none=True)
    for start in range(0, len(encoded), batch_size):
        ids, mask, labels = (
            part.to(model.device) for part in pad(encoded[start : start + batch_size], pad_id(language_model.tokenizer))
        )
        share = float((labels != -100).sum()) / total
        (model(input_ids=ids, attention_mask=mask, labels=labels).loss * share).backward()
    gradient = [p.grad if p.grad is not None else torch.zeros_like(p) for p in weights]
    model.zero_grad(set_to_none=True)
    square = float(sum((g.double() ** 2).sum() for g in gradient))
    if not 0 < square < float("inf"):
        raise DataError("the task's gradient is zero or not finite, so nothing can be said of what it would make worse")
    original = [parameter.detach().clone() for parameter in weights]
    moved = []
    try:
        for sign in (-1, 1):
            with torch.no_grad():
                for parameter, start_, g in zip(weights, original, gradient, strict=True):
                    parameter.copy_(start_).add_(g, alpha=sign * STEP / square)
            moved.append(losses(language_model, pool))
    finally:
        with torch.no_grad():
            for parameter, start_ in zip(weights, original, strict=True):
                parameter.copy_(start_)
        model.train(was_training)
    return (moved[0] - moved[1]) / (2 * STEP)
