"""Tiny random models of several families, on the demo model's tokenizer."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import ByteLevel
from transformers import (
    AutoTokenizer,
    CohereConfig,
    CohereForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from forgetcast.lm import LanguageModel

_SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
}
FAMILIES = ("llama", "gpt2", "gpt-neox", "olmo", "olmo2", "gemma", "qwen", "qwen3", "cohere", "granite")


def tiny(family: str = "llama", seed: int = 0, *, bos: bool = True) -> LanguageModel:
    """Make a random model whose losses differ from token to token; its tokenizer begins texts with a token if `bos`."""
    torch.manual_seed(seed)
    model: Any
    match family:
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(**_SIZES, num_key_value_heads=2))
        case "gpt2":
            model = GPT2LMHeadModel(GPT2Config(vocab_size=4096, n_positions=96, n_embd=32, n_layer=2, n_head=4))
        case "gpt-neox":
            model = GPTNeoXForCausalLM(GPTNeoXConfig(**_SIZES))
        case "olmo":
            model = OlmoForCausalLM(OlmoConfig(**_SIZES))
        case "olmo2":
            model = Olmo2ForCausalLM(Olmo2Config(**_SIZES))
        case "gemma":
            # A window shorter than the texts, so that its masks are tested with the padding.
            sizes = {**_SIZES, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16}
            model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, final_logit_softcapping=3.0))
        case "cohere":
            model = CohereForCausalLM(CohereConfig(**_SIZES, logit_scale=0.5))
        case "granite":
            model = GraniteForCausalLM(GraniteConfig(**_SIZES, logits_scaling=3.0))
        case "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**_SIZES, num_key_value_heads=2, head_dim=8))
        case "qwen":
            model = Qwen2ForCausalLM(Qwen2Config(**_SIZES, num_key_value_heads=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tokenizer = AutoTokenizer.from_pretrained(str(files("forgetcast.demo") / "model"))
    if not bos:
        tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=False)
    return LanguageModel(model.eval(), tokenizer, family)


def save(language_model: LanguageModel, folder: Path) -> Path:
    """Save the model with its tokenizer, as a user's folder has them."""
    language_model.model.save_pretrained(folder)
    language_model.tokenizer.save_pretrained(folder)
    return folder
