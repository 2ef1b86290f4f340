"""The learning curve of a fine-tune: its model after shares of the steps, looked at without disturbing the training."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainingArguments

from forgetcast.lm.load import LanguageModel


class LearningCurve(TrainerCallback):
    """Call a function with the model after shares of the Trainer's steps.

    Parameters
    ----------
    base : LanguageModel
        Whose tokenizer and rendering those of the model in training are.
    shares : iterable of float
        In (0, 1); rounded to whole steps, at least one.
    measure : callable
        Called with the model and the share.
    """

    def __init__(
        self, base: LanguageModel, shares: Iterable[float], measure: Callable[[LanguageModel, float], None]
    ) -> None:
        self._base, self._shares, self._measure = base, tuple(shares), measure

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: Any,
        control: Any,  # noqa: ARG002
        model: Any = None,
        **_: Any,
    ) -> None:
        """Trainer hook."""
        for share in self._shares:
            if state.global_step == step_of(share, state.max_steps):
                with undisturbed(model):
                    self._measure(replace(self._base, model=model, name=f"{self._base.name}, in training"), share)


def step_of(share: float, steps: int) -> int:
    """Return the number of steps that a share of them is, at least one."""
    return max(round(share * steps), 1)


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Let a model in training be used, in evaluation mode, so that the training goes on as if it had not been.

    Without gradients and without the Trainer's mixed precision, so that losses compare with those of the base model.
    Afterwards each module is in the mode that it was in.
    """
    modes = [(module, module.training) for module in model.modules()]
    # Accelerate replaces the forward pass by one in mixed precision, and keeps the original.
    mixed = model.__dict__.get("forward") if "_original_forward" in model.__dict__ else None
    if mixed is not None:
        model.forward = model._original_forward
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False), same_randomness():
            yield
    finally:
        if mixed is not None:
            model.forward = mixed
        for module, training in modes:
            module.training = training


@contextmanager
def same_randomness() -> Iterator[None]:
    """Restore the states of all global random generators, of Python, NumPy, PyTorch and its devices."""
    generators = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - the global one
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device: Any = None if kind is None else getattr(torch, kind.type)
    on_devices = device.get_rng_state_all() if hasattr(device, "get_rng_state_all") else None
    try:
        yield
    finally:
        random.setstate(generators[0])
        np.random.set_state(generators[1])  # noqa: NPY002
        torch.set_rng_state(generators[2])
        if on_devices is not None:
            device.set_rng_state_all(on_devices)
