"""Real weights and real tokenizers, where `benchmarks/real_models.py --get` has put them."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from forgetcast import DataError, Example, Pool
from forgetcast.lm import LanguageModel, load, score
from forgetcast.lm.tokens import IGNORED_INDEX, encode

pytestmark = pytest.mark.slow

WORDS = textwrap.dedent(str(textwrap.fill.__doc__)).strip()
CHAT = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "The capital of France is Paris.\n"},
    {"role": "user", "content": "And 2 + 2? 🙂"},
    {"role": "assistant", "content": "4 🙂 cafe\u0301"},
]
PAIRS = [
    Example("space in the completion", prompt="The capital of France is", completion=" Paris."),
    Example("space in the prompt", prompt="The capital of France is ", completion="Paris."),
    Example("within a word", prompt="The capital of Fra", completion="nce is Paris"),
    Example("signs", prompt="cafe", completion="\u0301 🙂\n\n"),
    Example("long", prompt="", completion=WORDS),
]


def model(name: str) -> LanguageModel:
    """One of the real models."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("FORGETCAST_MODELS") or caches / "forgetcast" / "real-models") / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here; run python benchmarks/real_models.py --get")
    return load(str(folder))


every_model = pytest.mark.parametrize("name", ["SmolLM2-135M-Instruct", "gemma-3-270m"])


@every_model
def test_tokens_and_targets(name: str) -> None:
    tokenizer: Any = model(name).tokenizer
    begin = [tokenizer.bos_token_id] if name.startswith("gemma") else []
    assert encode(Example("t", text=WORDS), tokenizer, None).ids == tokenizer(WORDS)["input_ids"]
    assert tokenizer(WORDS)["input_ids"][: len(begin)] == begin
    for pair in PAIRS:
        found = encode(pair, tokenizer, None)
        assert found.ids == tokenizer(pair.full_text)["input_ids"]
        targets = [token for token in found.labels if token != IGNORED_INDEX]
        # Targets are the end of the text, and cover the completion; nothing without a character of it.
        assert found.ids[len(found.ids) - len(targets) :] == targets
        assert tokenizer.decode(targets).endswith(str(pair.completion)) or (not begin and not pair.prompt)
        assert not tokenizer.decode(targets[1:]).endswith(str(pair.completion))


def test_conversation() -> None:
    language_model = model("SmolLM2-135M-Instruct")
    tokenizer: Any = language_model.tokenizer
    found = encode(Example("c", messages=CHAT), tokenizer, None)
    assert found.ids == tokenizer.apply_chat_template(CHAT)["input_ids"]
    targets = tokenizer.decode([token for token in found.labels if token != IGNORED_INDEX])
    assert targets == f"{CHAT[1]['content']}<|im_end|>{CHAT[3]['content']}<|im_end|>"
    # The template writes a system message of its own.
    assert tokenizer.decode(found.ids).startswith("<|im_start|>system\nYou are")
    prompt = tokenizer.apply_chat_template(CHAT[:-1], tokenize=False, add_generation_prompt=True)
    pair = Example("p", prompt=prompt, completion=f"{CHAT[-1]['content']}<|im_end|>")
    chat = Example("c", messages=[CHAT[0], CHAT[1] | {"weight": 0}, *CHAT[2:]])
    scores = score(language_model, Pool([chat, pair]))
    assert scores.tokens[0] == scores.tokens[1]
    assert scores.nll[0] == pytest.approx(scores.nll[1], rel=1e-5)


def test_a_base_model_has_no_conversations() -> None:
    with pytest.raises(DataError, match="no chat template"):
        encode(Example("c", messages=CHAT), model("gemma-3-270m").tokenizer, None)


@every_model
def test_losses_are_those_of_double_precision(name: str) -> None:
    language_model = model(name)
    examples = [*PAIRS, Example("text", text=WORDS)]
    scores = score(language_model, Pool(examples))
    double = AutoModelForCausalLM.from_pretrained(language_model.name, dtype=torch.float64)
    for example, nll in zip(examples, scores.nll, strict=True):
        encoded = encode(example, language_model.tokenizer, None)
        with torch.inference_mode():
            logits = double(input_ids=torch.tensor([encoded.ids])).logits[0, :-1]
        chosen = [i for i, label in enumerate(encoded.labels[1:]) if label != IGNORED_INDEX]
        expected = -logits.log_softmax(-1)[chosen, torch.tensor(encoded.ids[1:])[chosen]].mean()
        np.testing.assert_allclose(nll, float(expected), rtol=1e-5)
    # The weights came through: these models know that Paris is the capital of France.
    assert scores.nll[0] < 2
