"""The training loss without the logits of a whole batch: output layer and cross entropy as one operation."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutputWithPast

from forgetcast.errors import ConfigError
from forgetcast.lm.adapters import base_model
from forgetcast.lm.head import TOLERANCE, Head
from forgetcast.lm.tokens import IGNORED_INDEX

SummedLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Maps hidden states (T, D) and their next tokens (T,) to the summed loss."""


@contextmanager
def fused_loss(model: Any, kind: str | None, sample: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Within the block, a model that is given labels computes its loss from its hidden states, and returns no logits.

    Only the positions that predict a target get logits, and never all of them at once.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
    kind : 'chunked', 'liger' or None
        'chunked': some tokens at a time, whose logits are computed again for the backward pass. 'liger': the kernel of
        that name, on a GPU. None: the model's own loss.
    sample : mapping of str to Tensor
        A batch, on which the loss is compared with the model's own.

    Raises
    ------
    ConfigError
        If the model's loss is another, or the kernel cannot be had.
    """
    if kind is None:
        yield
        return
    head, inner = Head(model, None), base_model(model)
    if not head.chunked:
        raise ConfigError(
            f"fused_loss: {type(inner).__name__} has no decoder and output layer of its own; leave it out"
        )
    plain, own = head.output.forward, inner.forward
    total = _chunked(head, plain) if kind == "chunked" else _liger(head, inner.device)

    def loss_of_states(hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        return plain(hidden) if targets is None else total(hidden, targets)

    @wraps(own)
    def forward(*arguments: Any, labels: Any = None, num_items_in_batch: Any = None, **options: Any) -> Any:
        if labels is None:
            return own(*arguments, **options)
        output = head.decoder(*arguments, **options | {"use_cache": False, "return_dict": True})
        at = labels[:, 1:] != IGNORED_INDEX
        targets = labels[:, 1:][at]
        # By one call of the layer: hooks that gather its sharded weights are called once.
        loss = head.output(output.last_hidden_state[:, :-1][at], targets)
        count = num_items_in_batch if num_items_in_batch is not None else len(targets)
        return CausalLMOutputWithPast(loss=loss / count)

    was_training = model.training
    with keeping_forward(inner, head.output):
        model.eval()
        with torch.no_grad():
            batch = {name: value.to(inner.device) for name, value in sample.items()}
            expected = own(**batch).loss
            inner.forward, head.output.forward = forward, loss_of_states
            found = inner(**batch).loss
        tolerance = max(TOLERANCE, 10 * torch.finfo(inner.dtype).eps)
        if bool(torch.isfinite(expected)) and not torch.allclose(found, expected, rtol=tolerance, atol=tolerance):
            raise ConfigError(
                f"fused_loss: {type(inner).__name__} has another loss ({float(expected):.4f}, not {float(found):.4f}); "
                "leave it out"
            )
        model.train(was_training)
        yield


@contextmanager
def keeping_forward(*modules: torch.nn.Module) -> Iterator[None]:
    """Undo, after the block, what was put in the place of the modules' forward passes."""
    names = ("forward", "_original_forward")  # the second is Accelerate's, for mixed precision
    before = [{name: value for name, value in vars(module).items() if name in names} for module in modules]
    try:
        yield
    finally:
        for module, kept in zip(modules, before, strict=True):
            for name in names:
                vars(module).pop(name, None)
            vars(module).update(kept)


def _chunked(head: Head, plain: Callable[[torch.Tensor], torch.Tensor]) -> SummedLoss:
    """Return the sum over chunks of tokens, whose logits are not kept."""

    def part(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return cross_entropy(head.finish(plain(hidden)).float(), targets, reduction="sum")

    def total(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        pairs = zip(hidden.split(head.chunk), targets.split(head.chunk), strict=True)
        parts: list[Any] = [checkpoint(part, *pair, use_reentrant=False) for pair in pairs]
        return torch.stack(parts).sum()

    return total


def _liger(head: Head, device: torch.device) -> SummedLoss:
    """Return the kernel of Liger."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError("fused_loss: liger needs the package liger-kernel; run: pip install liger-kernel")
    if device.type == "cpu":
        raise ConfigError("fused_loss: liger needs a GPU; on a CPU use chunked")
    kernel = importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy

    def total(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = kernel(
            hidden * head.scale,
            head.output.weight,
            targets,
            head.output.bias,
            reduction="sum",
            softcap=head.cap,
        )
        return loss

    return total
