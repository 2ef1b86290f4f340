"""Models between a base model and one that was tuned from it, without any training."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftType

from forgetcast.errors import ConfigError, MismatchError
from forgetcast.lm import adapters
from forgetcast.lm.load import LanguageModel, without_bars

_SCALED = (".lora_B.", ".lora_embedding_B.")
"""Of the two factors of a LoRA update, the one that is scaled: without it, the update is zero."""


class Interpolation:
    """The models on the line from a base model to a tuned one: weights (1 - alpha) base + alpha tuned.

    Of a tuned model with a LoRA adapter, the adapter's update is multiplied by alpha, which is the same. Alpha 0 has
    the base model's weights to the last bit, alpha 1 the tuned one's.

    Parameters
    ----------
    tuned : LanguageModel
        Its weights are changed in place by `at`.
    base : mapping of str to Tensor, optional
        State dict of the base model. An adapter holds its base model: it is compared with this one, if there is one.

    Raises
    ------
    MismatchError
        If a weight is missing on a side or has another shape, or the adapter is of another base model.
    ConfigError
        If the weights are quantised, the adapter does more than add a product of two factors to weights, or the base
        model of full weights is not given.

    References
    ----------
    Wortsman et al. (2022), Robust fine-tuning of zero-shot models, arXiv 2109.01903.
    """

    def __init__(self, tuned: LanguageModel, base: Mapping[str, torch.Tensor] | None = None) -> None:
        self._tuned, self._model = tuned, tuned.model
        model: Any = tuned.model
        self._adapted = isinstance(model, PeftModel)
        self._ends: dict[str, tuple[torch.Tensor | None, torch.Tensor]]
        if self._adapted:
            _check_adapter(model, tuned.name)
            if base is not None:
                _check_base(model, base, tuned.name)
            self._ends = {n: (None, v.detach().clone()) for n, v in model.named_parameters() if _is_scaled(n)}
            return
        if tuned.is_quantized:
            raise ConfigError(f"{tuned.name} is quantised, and so cannot be interpolated; use the unquantised models")
        if base is None:
            raise ConfigError(f"{tuned.name} has full weights: interpolation needs those of its base model")
        state = model.state_dict()
        _check_alike(state, base, tuned.name)
        # A copy of what changes only: the others, such as frozen layers, are the same at every alpha.
        self._ends = {
            name: (base[name].detach().to("cpu").clone(), value.detach().to("cpu").clone())
            for name, value in state.items()
            if not torch.equal(value.to("cpu"), base[name].to("cpu"))
        }

    def __repr__(self) -> str:
        kind = "adapter" if self._adapted else "weights"
        return f"Interpolation({self._tuned.name!r}, {len(self._ends)} {kind} that differ)"

    @torch.no_grad()
    def at(self, alpha: float) -> LanguageModel:
        """Return the model at a place on the line; it is valid until the next call.

        Parameters
        ----------
        alpha : float
            From 0, the base model, to 1, the tuned one.

        Raises
        ------
        ConfigError
            If it is outside.
        """
        check_alpha(alpha)
        state: Mapping[str, Any] = dict(self._model.named_parameters()) if self._adapted else self._model.state_dict()
        for name, (start, end) in self._ends.items():
            state[name].copy_(_between(start, end, alpha))
        # A new object, because the other caches the hash of its weights.
        return replace(self._tuned, name=f"{self._tuned.name} at alpha {alpha:g}")

    def save(self, directory: str | Path, alpha: float) -> None:
        """Write the model at a place on the line, and the tokenizer, in Hugging Face format; of LoRA, the adapter.

        As in `Tuned.save`, an adapter is merged into its base model if that has no directory or hub id of its own.
        """
        model: Any = self.at(alpha).model
        if self._adapted and not model.get_base_model().name_or_path:
            model = copy.deepcopy(model).merge_and_unload()
        with without_bars():
            model.save_pretrained(directory)
        self._tuned.tokenizer.save_pretrained(directory)


def check_alpha(alpha: float) -> None:
    """Raise ConfigError unless alpha is between 0 and 1."""
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha must be between 0, the base model, and 1, the tuned one, not {alpha:g}")


def _between(start: torch.Tensor | None, end: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return (1 - alpha) start + alpha end; None is zero. In single precision at least, and exact at both ends."""
    if alpha == 1:
        return end
    if alpha == 0:
        return torch.zeros_like(end) if start is None else start
    wide = torch.promote_types(end.dtype, torch.float32)
    scaled = alpha * end.to(wide)
    return (scaled if start is None else (1 - alpha) * start.to(wide) + scaled).to(end.dtype)


def _is_scaled(name: str) -> bool:
    return any(part in name for part in _SCALED)


def _check_adapter(model: PeftModel, name: str) -> None:
    """Raise ConfigError unless all that the adapter changes is scaled by one of its factors."""
    config: Any = model.active_peft_config
    if adapters.is_prompt_learning(model) or config.peft_type != PeftType.LORA:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ConfigError(f"{name} is an adapter of the kind {kind}; only LoRA and full weights can be interpolated")
    more = {
        "DoRA": getattr(config, "use_dora", False),
        "trained biases": config.bias != "none" or getattr(config, "lora_bias", False),
        "whole layers (modules_to_save)": bool(config.modules_to_save),
    }
    if found := [what for what, there in more.items() if there]:
        raise ConfigError(f"{name} is an adapter with {found[0]}: merge it into its base model, and interpolate that")


def _check_base(model: PeftModel, base: Mapping[str, torch.Tensor], name: str) -> None:
    """Raise MismatchError unless an adapter is around this base model."""
    named = model.get_base_model().state_dict().items()
    inner = {adapters.unwrapped(key): value for key, value in named if ".lora_" not in key}
    _check_alike(inner, base, name)
    if (other := next((key for key in base if not torch.equal(inner[key], base[key])), None)) is not None:
        raise MismatchError(f"{name} is an adapter of another base model: {other} has other values there")


def _check_alike(tuned: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor], name: str) -> None:
    """Raise MismatchError unless the two have the same names, shapes and types."""
    check_shapes(tuned, base, name)
    for key, value in tuned.items():
        if value.dtype != base[key].dtype:
            raise MismatchError(f"{name}: {key} is {value.dtype}, in the base model {base[key].dtype}; load both alike")


def check_shapes(tuned: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor], name: str) -> None:
    """Raise MismatchError unless the weights of the two have the same names and shapes."""
    if odd := sorted(tuned.keys() ^ base.keys()):
        side = "the base model has none" if odd[0] in tuned else "the base model has it"
        raise MismatchError(
            f"{name} and the base model differ in shape: {odd[0]}, and {side}; take models of one shape"
        )
    for key, value in tuned.items():
        one, other = tuple(value.shape), tuple(base[key].shape)
        if one != other:
            raise MismatchError(f"{name} and the base model differ in shape: {key} is {one}, in the base model {other}")
