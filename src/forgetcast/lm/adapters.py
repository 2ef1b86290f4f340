"""PEFT adapters: found, attached to their base model, and merged into it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file

from forgetcast.errors import ConfigError, DataError
from forgetcast.files import read_json

_WHOLE_LAYER = ("weight", "base_layer.weight", "token_adapter.base_layer.weight")
"""Names under which PEFT saves the weights of embeddings, by the kind of adapter."""


@dataclass(frozen=True)
class Adapter:
    """Where an adapter and its base model are."""

    source: str
    base: str


def base_model(model: Any) -> Any:
    """Return the model without its adapter's outermost wrapper, or itself if it has none."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def unwrapped(name: str) -> str:
    """Return a module's or parameter's name without PEFT's wrappers, which nest where a module has two parameters."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def is_prompt_learning(model: Any) -> bool:
    """Whether the model has an adapter that adds virtual tokens: prompt tuning, prefix tuning, p-tuning."""
    return isinstance(model, PeftModel) and bool(model.active_peft_config.is_prompt_learning)


def virtual_tokens(model: Any) -> int:
    """Return the number of virtual tokens that an adapter puts before every input."""
    return int(model.active_peft_config.num_virtual_tokens) if is_prompt_learning(model) else 0


def find(source: str, hub: Mapping[str, Any]) -> Adapter | None:
    """Return the adapter in a directory or of a hub id; None if it is a model, with or without an adapter in it.

    Raises
    ------
    DataError
        If its configuration is malformed, or its base model should be in a directory that does not exist.
    """
    if (Path(source) / "config.json").is_file():
        return None
    path = find_adapter_config_file(source, **hub)
    if path is None:
        return None
    config = read_json(Path(path))
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not base or not isinstance(base, str) or not config.get("peft_type"):
        raise DataError(f"{path} is malformed: it must be an object that names peft_type and base_model_name_or_path")
    if not Path(base).is_dir() and (Path(base).is_absolute() or base.startswith(".") or base.count("/") > 1):
        raise DataError(
            f"{source} is an adapter, and its base model {base} does not exist; put it there, or correct "
            "base_model_name_or_path in adapter_config.json"
        )
    return Adapter(source, base)


def attach(model: PreTrainedModel, adapter: Adapter, tokenizer: PreTrainedTokenizerBase, hub: Mapping[str, Any]) -> Any:
    """Resize the embeddings as the adapter was trained, and attach it.

    Raises
    ------
    DataError
        If a weight of the adapter has no place in the model, one is missing, or a token has no embedding.
    """
    config = PeftConfig.from_pretrained(adapter.source, **hub)
    renamed = None if config.is_prompt_learning else getattr(model, "_checkpoint_conversion_mapping", None)
    weights = load_peft_weights(adapter.source, "cpu", key_mapping=renamed, **hub)
    rank, longest = getattr(config, "r", 0), max((max(each.shape, default=0) for each in weights.values()), default=0)
    if isinstance(rank, int) and rank > longest:
        raise DataError(f"{adapter.source}: r in adapter_config.json is {rank}, and its weights are smaller")
    known = _rows(model)
    rows = _trained_rows(model, weights) or max(known, len(tokenizer))
    if rows != known:
        model.resize_token_embeddings(rows, mean_resizing=False)
        _clear(model, known)
    output: Any = model.get_output_embeddings()
    width = output.weight.shape[1]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*ensure_weight_tying.*")  # advice for training
        warnings.filterwarnings("error", "Found missing adapter keys")
        adapted = PeftModel.from_pretrained(model, adapter.source, config=config, **hub)
        if prefix := PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type):
            # PEFT returns, but does not report, what it had no place for.
            result: Any = set_peft_model_state_dict(adapted, weights)
            if unused := [key for key in result.unexpected_keys if prefix in key]:
                raise DataError(
                    f"{adapter.source} does not fit its base model {adapter.base}: no place for {unused[0]}"
                )
    if rows > known:
        _check_new_rows(adapter, adapted, tokenizer, (known, rows, width))
    return adapted.eval()


def is_adapted(model: Any) -> bool:
    """Whether the model has an adapter, around it or in it."""
    return isinstance(model, PeftModel) or bool(getattr(model, "_hf_peft_config_loaded", False))


def detach(model: Any) -> None:
    """Take an adapter off its base model again, unmerged; a model with virtual tokens has left its base as it was."""
    if is_prompt_learning(model):
        return
    # Without this, `unload` would leave the adapter's copies of whole layers in the model.
    model.delete_adapter(model.active_adapter)
    model.unload()


def parameters(model: Any) -> dict[str, tuple[int, int, torch.Size, int]]:
    """Return what tells whether a parameter or buffer was replaced, moved, resized or written to, by its name."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {
        # A tensor made of others, such as a quantised one, has no address of its own.
        name: (id(value), 0 if hasattr(value, "__tensor_flatten__") else value.data_ptr(), value.shape, value._version)
        for name, value in named
    }


def shares(model: Any, before: Mapping[str, tuple[int, int, torch.Size, int]]) -> bool:
    """Whether a model with an adapter still has all parameters of its base model, unchanged: see `parameters`."""
    now = set(parameters(model).values())
    return all(value in now for value in before.values())


def _rows(model: Any) -> int:
    """Return the number of token embeddings."""
    return int(model.get_input_embeddings().weight.shape[0])


def _trained_rows(model: Any, weights: Mapping[str, torch.Tensor]) -> int | None:
    """Return the number of tokens that an adapter's embeddings or output layer have; None if it has neither."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if any(module is layer for layer in layers)]
    for name in names:
        for tail, axis in (*((tail, 0) for tail in _WHOLE_LAYER), ("lora_B.weight", 0), ("lora_embedding_A", 1)):
            if (found := weights.get(f"base_model.model.{name}.{tail}")) is not None:
                return int(found.shape[axis])
    return None


def _clear(model: Any, known: int) -> None:
    """Set the rows after the first `known`, which Transformers draws at random, to NaN, so that no score uses them."""
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        for parameter in layer.parameters() if layer is not None else ():
            parameter.data[known:] = float("nan")


def _check_new_rows(
    adapter: Adapter, model: Any, tokenizer: PreTrainedTokenizerBase, sizes: tuple[int, int, int]
) -> None:
    """Raise DataError if the adapter has not filled the rows that the base model lacks.

    The sizes are the tokens of the base model, those of the adapter, and the width of the output layer's input.
    """
    known, rows, width = sizes
    with torch.inference_mode():
        embedded = model.get_input_embeddings()(torch.arange(known, rows, device=model.device))
        logits = model.get_base_model().get_output_embeddings()(embedded.new_zeros(1, width))
        filled = torch.stack([embedded.isfinite().all(dim=1), logits[0, known:].isfinite()])
    for what, is_filled in zip(("embedding", "output weights"), filled, strict=True):
        if not is_filled.all():
            token = tokenizer.convert_ids_to_tokens(known + int(is_filled.int().argmin()))
            raise DataError(
                f"{adapter.source}: the tokenizer adds the token {token!r}, which has no {what}, neither in the base "
                "model nor in the adapter; save the adapter with its embeddings (modules_to_save), or use the "
                "tokenizer of the base model"
            )


def merged(model: Any, name: str) -> Any:
    """Return the model with its adapter merged into its weights.

    Raises
    ------
    ConfigError
        If its weights cannot take the adapter in.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ConfigError(f"{name} holds a model and an adapter in one directory; keep the adapter in its own")
    if not isinstance(model, PeftModel):
        return model
    if is_prompt_learning(model):
        raise ConfigError(f"{name} is a model with virtual tokens, which can be scored, but not fine-tuned further")
    inner = model.get_base_model()
    if getattr(inner, "is_quantized", False):
        raise ConfigError(
            f"{name} is an adapter of a quantised model, which cannot be merged without loss: merge it "
            "into the unquantised model, and fine-tune that"
        )
    _untie(inner)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*tie_word_embeddings.*")
        try:
            result = model.merge_and_unload().eval().requires_grad_(True)
        except (AttributeError, NotImplementedError, ValueError) as error:
            raise ConfigError(f"{name}: the adapter cannot be merged: {' '.join(str(error).split())}") from error
    result.name_or_path = ""  # what is tuned on top must not name the model without the adapter as its base
    return result


def _untie(model: Any) -> None:
    """Give the output layer weights of its own if an adapter changes it or the embeddings."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if outputs is None or not any(hasattr(layer, "base_layer") for layer in (inputs, outputs)):
        return
    first, second = (getattr(layer, "base_layer", layer) for layer in (inputs, outputs))
    if first.weight.data_ptr() == second.weight.data_ptr():
        second.weight = torch.nn.Parameter(second.weight.detach().clone(), requires_grad=second.weight.requires_grad)
