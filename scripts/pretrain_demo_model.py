"""Train the demo's base model on the text of this Python installation, and write it where the package ships it.

Two stages that need nothing but the installed packages: a byte-level BPE vocabulary, then a small Llama trained with
AdamW on random windows of the documents in `forgetcast.demo.corpus`.
Files that the corpus marks as held out are never trained on; the model card gives the loss on them, per source.

    python scripts/pretrain_demo_model.py --steps 2600
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from forgetcast.demo.corpus import SOURCES, documents

END, PAD = "<|endoftext|>", "<|pad|>"
VOCABULARY = 4096
CONTEXT = 256
WINDOW = 128
"""Training and evaluation windows, in tokens: the length the prototype's 3.7 nats were measured at."""


def read_corpus(characters: int) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Documents per source, to train on and held out, up to `characters` of each source."""
    train: dict[str, list[str]] = {source: [] for source in SOURCES}
    held_out: dict[str, list[str]] = {source: [] for source in SOURCES}
    for source in SOURCES:
        total = 0
        for document in documents(source):
            (held_out if document.held_out else train)[source].append(document.text)
            total += len(document.text)
            if total > characters:
                break
    return train, held_out


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts END before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[END, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD, model_max_length=CONTEXT
    )


def to_tokens(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts in one row of tokens, END before each."""
    return torch.tensor(np.concatenate([np.array(ids) for ids in tokenizer(texts)["input_ids"]]))


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, tokens: torch.Tensor, windows: int) -> float:
    """Nats per token over at most `windows` consecutive windows."""
    model.eval()
    count = min(windows, (len(tokens) - 1) // WINDOW)
    batches = tokens[: count * WINDOW].view(count, WINDOW).split(32)
    losses = [model(batch, labels=batch).loss.item() * len(batch) for batch in batches]
    model.train()
    return sum(losses) / count


def schedule(step: int, steps: int) -> float:
    """Share of the peak rate: a short warm-up, a plateau, then a linear fall to nothing over the last 40 %."""
    return min(1.0, (step + 1) / 50, (steps - step) / (0.4 * steps))


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2600, help="optimiser steps (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help=f"windows of {WINDOW} tokens a step")
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="peak of the schedule (default %(default)s)")
    parser.add_argument("--characters", type=int, default=2_000_000, help="text read per source, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("src/forgetcast/demo/model"))
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    started = time.monotonic()
    train, held_out = read_corpus(options.characters)
    tokenizer = train_tokenizer([text for texts in train.values() for text in texts])
    streams = {source: to_tokens(tokenizer, texts) for source, texts in train.items()}
    judged = {source: to_tokens(tokenizer, texts) for source, texts in held_out.items()}
    for source, stream in streams.items():
        print(f"{source}: {len(stream):,} tokens to train on, {len(judged[source]):,} held out", flush=True)

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=6,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters; text and vocabulary took {time.monotonic() - started:.0f} s", flush=True)

    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )

    # Windows of all sources are equally likely per token, except that no source may rule: its square root counts.
    names = list(streams)
    share = np.sqrt([len(streams[name]) for name in names])
    share /= share.sum()
    rng = np.random.default_rng(options.seed)
    curve: list[tuple[int, float, float]] = []
    running = math.nan
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * schedule(step, options.steps)
        picks = rng.choice(len(names), size=options.batch_size, p=share)
        starts = [int(rng.integers(len(streams[names[i]]) - WINDOW)) for i in picks]
        batch = torch.stack([streams[names[i]][s : s + WINDOW] for i, s in zip(picks, starts, strict=True)])
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running = loss.item() if math.isnan(running) else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 200 == 0 or step + 1 == options.steps:
            losses = [mean_loss(model, tokens, 32) for tokens in judged.values()]
            curve.append((step + 1, running, float(np.average(losses, weights=share))))
            minutes = (time.monotonic() - started) / 60
            print(f"step {step + 1}: train {running:.3f}, held out {curve[-1][2]:.3f} ({minutes:.1f} min)", flush=True)
            write(model, tokenizer, options.out)  # so that an interrupted run leaves its latest model

    table = {
        source: (mean_loss(model, streams[source], 256), mean_loss(model, judged[source], 256)) for source in names
    }
    facts = {
        "parameters": parameters,
        "steps": options.steps,
        "learning_rate": options.learning_rate,
        "tokens": options.steps * options.batch_size * WINDOW,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "curve": curve,
        "loss": table,
        "mean": [float(np.average([row[i] for row in table.values()], weights=share)) for i in (0, 1)],
        "corpus_tokens": {source: len(stream) for source, stream in streams.items()},
    }
    print(json.dumps(facts, indent=1))
    (options.out / "MODEL_CARD.md").write_text(model_card(facts), encoding="utf-8")


def write(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save weights in half precision, with config and tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    model.config.dtype = torch.float16
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(out)
    weights = {name: p.detach().to(torch.float16).contiguous() for name, p in model.named_parameters()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def model_card(facts: dict[str, Any]) -> str:
    """Say what the model is, what it saw and how well it does."""
    loss, curve, tokens = facts["loss"], facts["curve"], facts["corpus_tokens"]
    mean = facts["mean"]
    rows = "\n".join(f"| {s} | {tokens[s]:,} | {a:.2f} | {b:.2f} |" for s, (a, b) in loss.items())
    steps = "\n".join(f"| {step} | {a:.2f} | {b:.2f} |" for step, a, b in curve[:: max(1, len(curve) // 10)])
    return f"""# The demo base model

A Llama-style causal language model of {facts["parameters"]:,} parameters (4 layers, width 192, 6 heads, tied
embeddings, byte-level BPE vocabulary of {VOCABULARY:,}, context {CONTEXT}), stored in half precision. It exists so
that forgetcast can be tried and tested without a network; it is of no other use.

- **Made by** `python scripts/pretrain_demo_model.py --steps {facts["steps"]}`, on {platform.machine()}, Python
  {platform.python_version()}, PyTorch {torch.__version__}: {facts["tokens"]:,} tokens in {facts["minutes"]} minutes
  on two cores.
- **Data**: text of the Python installation it was trained on: the language reference, doc strings and code of the
  standard library, of NumPy, SciPy, PyTorch, xarray, Zarr and Rich. No text is shipped. One file in twenty is
  held out, chosen by a hash of its name.
- **Optimiser**: AdamW, peak learning rate {facts["learning_rate"]}, weight decay .05; 50 steps of
  warm-up, a plateau, a linear fall over the last 40 %.
- **Licence**: Apache-2.0, like the rest of the project.

## Loss (nats per token, windows of {WINDOW} tokens)

Mean over the sources as they were sampled: {mean[0]:.2f} on the text it was trained on, {mean[1]:.2f} on held-out
files.

| source | tokens to train on | trained-on text | held-out files |
|---|---|---|---|
{rows}

## Loss curve (sampled sources; "train" is a running mean)

| step | train | held out |
|---|---|---|
{steps}
"""


if __name__ == "__main__":
    main()
