"""Gradient products: how a task's first gradient step changes each example's loss, without per-example gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from forgetcast.data.pool import Example, Pool
from forgetcast.errors import ConfigError, DataError, MismatchError
from forgetcast.lm.interpolate import check_shapes
from forgetcast.lm.load import LanguageModel
from forgetcast.lm.score import losses
from forgetcast.lm.tokens import IGNORED_INDEX, pad, pad_id

STEP = 0.01
"""Step of the central difference along the gradient: first-order change of the task's loss, in nats per token."""

SAMPLE = 64
"""Default number of task examples in the gradient."""

DIMENSIONS = 2**17
"""Default size of a projected gradient. The standard error of a cosine is about 1 / sqrt(DIMENSIONS) = .003, which must
be well below the spread of the cosines; `benchmarks/similarity.py` prints that."""

BATCH = 8
"""Examples in a forward and backward pass."""

BLOCK = 2**20
"""Coordinates that are projected at once."""


def gradient_products(
    language_model: LanguageModel,
    task: Pool,
    pool: Pool,
    *,
    sample: int = SAMPLE,
    batch_size: int = BATCH,
    seed: int = 0,
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
    was_training = model.training
    model.eval()
    weights = list(model.parameters())
    gradient = _gradient(language_model, [task[i] for i in drawn], batch_size)
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


def _gradient(
    language_model: LanguageModel, examples: Sequence[Example], batch_size: int, *, end: bool = True
) -> list[torch.Tensor]:
    """Return the gradient of the mean loss per target token, one tensor for each trainable parameter."""
    model: Any = language_model.model
    encoded = [language_model.encode(example, language_model.context, end=end) for example in examples]
    total = sum(example.targets for example in encoded)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.zero_grad(set_to_none=True)
    for start in range(0, len(encoded), batch_size):
        ids, mask, labels = (
            part.to(model.device) for part in pad(encoded[start : start + batch_size], pad_id(language_model.tokenizer))
        )
        share = float((labels != IGNORED_INDEX).sum()) / max(total, 1)
        (model(input_ids=ids, attention_mask=mask, labels=labels).loss * share).backward()
    gradient = [p.grad if p.grad is not None else torch.zeros_like(p) for p in weights]
    model.zero_grad(set_to_none=True)
    return gradient


def projected_gradients(
    language_model: LanguageModel,
    groups: Sequence[Sequence[Example]],
    *,
    end: bool = True,
    dimensions: int = DIMENSIONS,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> Iterator[np.ndarray]:
    """Yield the gradient of each group's mean loss at the current weights, randomly projected.

    The projection is a count sketch: each coordinate is added with a random sign to a random entry, so that inner
    products are right in expectation, with a variance of at most 2 |a|^2 |b|^2 / dimensions. The signs and entries are
    drawn anew for each group from the same seed, block by block, so memory is that of one gradient. The trainable
    parameters count: all of a model, or those of a LoRA adapter that was loaded to be trained.

    Parameters
    ----------
    language_model : LanguageModel
    groups : sequence of sequence of Example
        Each group has one gradient; a single example is a group of one.
    end : bool
        Whether the token that ends a text counts, as in training; it does not in a score.
    dimensions : int
    seed : int
    on_progress : callable, optional
        Called with 1 after each group.

    Yields
    ------
    array of float32, shape (dimensions,)

    Raises
    ------
    ConfigError
        If no parameter is trainable.
    DataError
        If a gradient is zero or not finite.

    References
    ----------
    Charikar, Chen and Farach-Colton (2002), Finding frequent items in data streams.
    Weinberger et al. (2009), Feature hashing for large scale multitask learning.
    """
    model: Any = language_model.model
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"{language_model.name} has only frozen or quantised weights, which have no gradient")
    was_training = model.training
    model.eval()
    try:
        for group in groups:
            gradient = _gradient(language_model, group, BATCH, end=end)
            sketch = _count_sketch(gradient, dimensions, seed).cpu().numpy()
            if not np.isfinite(sketch).all() or not sketch.any():
                raise DataError(f"the gradient at the example {group[0].id!r} is zero or not finite; remove it")
            yield sketch
            if on_progress is not None:
                on_progress(1)
    finally:
        model.train(was_training)


def projected_update(
    base: LanguageModel, tuned: LanguageModel, *, dimensions: int = DIMENSIONS, seed: int = 0
) -> np.ndarray:
    """Project a fine-tune's update, tuned minus base weights, on the entries that `projected_gradients` projects on.

    To first order, an example's loss changes by the inner product of the update and its gradient at the base model.

    Parameters
    ----------
    base, tuned : LanguageModel
        The base model has all its parameters trainable, and is not changed. An adapter of the tuned one is merged into
        its weights, in place.
    dimensions, seed : int
        As those of the gradients.

    Returns
    -------
    array of float32, shape (dimensions,)

    Raises
    ------
    ConfigError
        If the base model has frozen or quantised weights, or an adapter cannot be merged.
    MismatchError
        If the two are not of one shape, or the tuned model has untied weights that are tied in the base.
    DataError
        If no weight differs, or a difference is not finite.
    """
    start: Any = base.model
    if not all(parameter.requires_grad for parameter in start.parameters()):
        raise ConfigError(f"{base.name} has frozen or quantised weights, which an update cannot be compared with")
    merged: Any = tuned.merged().model
    ends, begins = dict(merged.named_parameters()), dict(start.named_parameters())
    more = ends.keys() - begins.keys()  # such as output embeddings that the base model ties to those of the input
    tied = {name: value for name, value in start.named_parameters(remove_duplicate=False) if name in more}
    check_shapes(ends, begins | tied, tuned.name)
    with torch.no_grad():
        changes = {
            name: ends[name].to(begin.device, torch.float32) - begin.float() for name, begin in (begins | tied).items()
        }
    for name, value in tied.items():
        shared = next(other for other, each in begins.items() if each is value)
        if not torch.equal(changes[name], changes[shared]):
            raise MismatchError(f"{tuned.name} has other values in {name} than in {shared}, which the base model ties")
    sketch = _count_sketch([changes[name] for name in begins], dimensions, seed).cpu().numpy()
    if not np.isfinite(sketch).all() or not sketch.any():
        raise DataError(f"the update of {tuned.name} is zero or not finite: no weight differs from the base model's")
    return sketch


def _count_sketch(gradient: Sequence[torch.Tensor], dimensions: int, seed: int) -> torch.Tensor:
    """Project the concatenation of tensors on `dimensions` entries."""
    device = gradient[0].device
    generator = torch.Generator(device).manual_seed(seed)
    # Entries of positive and of negative sign apart: one draw gives both the entry and the sign.
    sums = torch.zeros(2 * dimensions, device=device)
    for part in gradient:
        for block in part.detach().float().flatten().split(BLOCK):
            entries = torch.randint(2 * dimensions, (len(block),), generator=generator, device=device)
            sums.index_add_(0, entries, block)
    return sums[:dimensions] - sums[dimensions:]
