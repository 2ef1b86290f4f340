"""Gradient products: how a task's first gradient step changes each example's loss, without per-example gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from forgetcast.data.pool import Pool
from forgetcast.errors import ConfigError, DataError
from forgetcast.lm.load import LanguageModel
from forgetcast.lm.score import losses
from forgetcast.lm.tokens import IGNORED_INDEX, pad, pad_id

STEP = 0.01
"""Step of the central difference along the gradient: first-order change of the task's loss, in nats per token."""

SAMPLE = 64
"""Default number of task examples in the gradient."""


def gradient_products(
    language_model: LanguageModel, task: Pool, pool: Pool, *, sample: int = SAMPLE, batch_size: int = 8, seed: int = 0
) -> np.ndarray:
    """Compute each example's first-order loss increase as the task's loss falls by one nat along its gradient.

    This is ``-g_i' g / g' g`` with the gradients g of the task and g_i of the example at the current weights: the
    paper's baseline, up to a factor. It is computed as a central difference of the example's loss along g, which takes
    one gradient and two forward passes over the pool, and no gradient of an example.

    Parameters
    ----------
    language_model : LanguageModel
        Its weights are changed and restored.
    task, pool : Pool
    sample : int
        Number of task examples, drawn at random, in the gradient. Needs memory for the gradient and a copy of the
        weights.
    batch_size : int
        Examples in a forward and backward pass.
    seed : int

    Returns
    -------
    array, shape (N,)
        Nats per token, per nat per token of the task; positive if the example would be forgotten.

    Raises
    ------
    ConfigError
        If the weights are quantised, or frozen as those below an adapter are.
    DataError
        If an example cannot be scored, or the task has no gradient.
    """
    model: Any = language_model.model
    if not all(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"{language_model.name} has quantised or frozen weights, which have no gradient; merge an adapter first"
        )
    drawn = np.random.default_rng(seed).permutation(len(task))[:sample].tolist()
    encoded = [language_model.encode(task[i], language_model.context, end=True) for i in drawn]
    total = sum(example.targets for example in encoded)
    weights = list(model.parameters())
    was_training = model.training
    model.eval()
    model.zero_grad(set_to_none=True)
    for start in range(0, len(encoded), batch_size):
        ids, mask, labels = (
            part.to(model.device) for part in pad(encoded[start : start + batch_size], pad_id(language_model.tokenizer))
        )
        share = float((labels != IGNORED_INDEX).sum()) / total
        (model(input_ids=ids, attention_mask=mask, labels=labels).loss * share).backward()
    gradient = [p.grad if p.grad is not None else torch.zeros_like(p) for p in weights]
    model.zero_grad(set_to_none=True)
    squared_norm = float(sum((g.double() ** 2).sum() for g in gradient))
    if not 0 < squared_norm < float("inf"):
        raise DataError("the task's gradient is zero or not finite, so it predicts no change of any loss")
    original = [parameter.detach().clone() for parameter in weights]
    shifted = []
    try:
        for sign in (-1, 1):
            with torch.no_grad():
                for parameter, value, g in zip(weights, original, gradient, strict=True):
                    parameter.copy_(value).add_(g, alpha=sign * STEP / squared_norm)
            shifted.append(losses(language_model, pool))
    finally:
        with torch.no_grad():
            for parameter, value in zip(weights, original, strict=True):
                parameter.copy_(value)
        model.train(was_training)
    return (shifted[0] - shifted[1]) / (2 * STEP)
