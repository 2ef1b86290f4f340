"""Adapters of the tiny models, as if trained."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model


def save_adapter(adapted: Any, tokenizer: Any, folder: Path, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # says that it saves the embeddings too
        adapted.save_pretrained(folder, **options)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def adapted_model(base: Any, settings: Any, seed: int = 3) -> Any:
    """Add an adapter with random weights, as if trained."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on tied weights
        adapted = get_peft_model(base, settings)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return adapted.eval()


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"} | settings)
