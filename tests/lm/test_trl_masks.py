"""The tokens and targets of training are those that TRL's SFTTrainer makes of the same rows."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from forgetcast import Example
from forgetcast.lm.tokens import IGNORED_INDEX, encode
from support.models import tiny
from support.tokenizers import END, KINDS, make, with_template

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated"),  # TRL sets it itself
]

MARKED = (
    "{{ bos_token }}{% for m in messages %}<|header|>{{ m.role }}<|/header|>{{ '\n\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content | trim }}<|eot|>{% endgeneration %}{% else %}{{ m.content | trim }}<|eot|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|header|>assistant<|/header|>{{ '\n\n' }}{% endif %}"
)
TEXTS = ("The cat sat on the mat.", " the answer is 42\n", "🙂 e\u0301", "there", f"the end{END}")
PAIRS = (
    ("Question: what is the answer? Answer:", " 42"),
    ("Question: what is the answer? Answer: ", "42"),
    ("Answer:\n\n", "yes 🙂"),
    ("", "the other mat"),
    ("<|im_start|>user\nWhy<|im_end|>\n<|im_start|>", "perhaps<|im_end|>"),
    ("Answer: ", f"42{END}"),
)
CHATS = (
    ("Where did the cat sit?", "On the mat."),
    ("42", " 42 ", "and 41", "🙂"),
    ("yes", "yes", "yes", "yes"),
)


def said(*words: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": word} for i, word in enumerate(words)]


def prepared(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, folder: Path, **options: Any) -> list[Any]:
    """Ids and labels of each row, by TRL."""
    options |= {"max_length": None, "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True}
    arguments = SFTConfig(output_dir=str(folder), **options)
    rows_of_it = Dataset.from_list(rows)
    trainer = SFTTrainer(tiny().model, arguments, train_dataset=rows_of_it, processing_class=tokenizer)
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


def ours(example: Example, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    found = encode(example, tokenizer, None, end=True)
    return found.ids, found.labels


def same(found: tuple[list[int], list[int]], expected: tuple[list[int], list[int]]) -> None:
    """Compare ids and labels; the label of the first token is never used."""
    assert found[0] == expected[0]
    assert found[1][1:] == expected[1][1:]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_and_completions(kind: str, tmp_path: Path) -> None:
    tokenizer = make(kind, "begin")
    rows = prepared([{"text": text} for text in TEXTS], tokenizer, tmp_path)
    for text, row in zip(TEXTS, rows, strict=True):
        same(ours(Example("t", text=text), tokenizer), row)
    pairs = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS]
    rows = prepared(pairs, tokenizer, tmp_path, completion_only_loss=True)
    for pair, row in zip(pairs, rows, strict=True):
        same(ours(Example("p", **pair), tokenizer), row)


@pytest.mark.parametrize("kind", KINDS)
def test_conversations(kind: str, tmp_path: Path) -> None:
    tokenizer = with_template(make(kind, "begin"), MARKED, eos="<|eot|>")
    chats = [said(*words) for words in CHATS]
    rows = prepared([{"messages": chat} for chat in chats], tokenizer, tmp_path, assistant_only_loss=True)
    for chat, row in zip(chats, rows, strict=True):
        same(ours(Example("c", messages=chat), tokenizer), row)


@pytest.mark.parametrize("name", ["llama3", "qwen2_5", "qwen3_instruct_2507", "gemma", "cohere", "phi3"])
def test_templates_that_trl_marks(name: str, tmp_path: Path) -> None:
    """TRL knows marked variants of some templates; without marks, the same targets are found.

    Some of its variants train on line breaks around an answer, and on an end token after the whole, too.
    """
    template = (files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = with_template(make("byte-level-words", "begin"), template)
    chats = [said(*words) for words in CHATS]
    rows = prepared([{"messages": chat} for chat in chats], tokenizer, tmp_path, assistant_only_loss=True)
    for chat, (ids, labels) in zip(chats, rows, strict=True):
        own_ids, own = ours(Example("c", messages=chat), tokenizer)
        assert own_ids == ids
        differing = [i for i in range(1, len(ids)) if own[i] != labels[i]]
        assert all(own[i] == IGNORED_INDEX for i in differing)
        extra = tokenizer.decode([ids[i] for i in differing])
        assert not extra.removesuffix(END).strip()
        if name == "llama3":
            assert not differing
