"""What a GPU makes of scoring and training: speed, peak memory, and whether the losses are those of the CPU.

    python benchmarks/gpu.py --quick             # a small model: about two minutes
    python benchmarks/gpu.py --json result.json  # 0.4 billion parameters, 128,000 words: about ten minutes

The model is random, so nothing is downloaded; `--model DIR` takes one of yours. The losses of a few texts are compared
with a plain loop on the CPU in double precision. Training is that of one task in the same batches: by the Trainer alone
and by this library, with each of its settings. Liger is measured if the package liger-kernel is installed, FSDP2 if
there are two GPUs; what is left out is listed, with the reason. Without a GPU it measures nothing and exits with 2.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from rich.table import Table
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from forgetcast import Pool, Scores
from forgetcast.lm import FineTuner, LanguageModel, Recipe, ReplayMixture, load, score
from forgetcast.lm.load import compile_blocks
from scoring import loop, texts
from shared import conclude, output, target

SIZES: dict[str, Any] = {"vocab_size": 128_000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24}
QUICK: dict[str, Any] = {"vocab_size": 32_000, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
TINY: dict[str, Any] = {"vocab_size": 4_096, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
"""For a CPU, where the script is only tried out."""

SCORING = {
    "float32": ("float32", False),
    "bfloat16": ("bfloat16", False),
    "float32, compiled": ("float32", True),
    "bfloat16, compiled": ("bfloat16", True),
}
"""Ways to score: type of the weights, and whether the blocks are compiled."""

TRAINING: dict[str, tuple[dict[str, Any], bool]] = {
    "float32": ({"precision": "float32"}, False),
    "bfloat16": ({"precision": "bfloat16"}, False),
    "bfloat16, chunked": ({"precision": "bfloat16", "fused_loss": "chunked"}, False),
    "bfloat16, liger": ({"precision": "bfloat16", "fused_loss": "liger"}, False),
    "bfloat16, compiled": ({"precision": "bfloat16"}, True),
    "bfloat16, chunked, compiled": ({"precision": "bfloat16", "fused_loss": "chunked"}, True),
    "bfloat16, chunked, checkpointing": (
        {"precision": "bfloat16", "fused_loss": "chunked", "gradient_checkpointing": True},
        False,
    ),
    "LoRA, bfloat16, chunked": ({"precision": "bfloat16", "fused_loss": "chunked", "method": "lora"}, False),
}
"""Ways to train: what the recipe says, and whether the blocks are compiled."""


class Bench:
    """A model, what it is measured on, and the rows that were measured.

    Parameters
    ----------
    base : LanguageModel
        In float32, on the CPU.
    device : str
    quick : bool
    """

    def __init__(self, base: LanguageModel, device: str, *, quick: bool) -> None:
        self.base, self.device = base, torch.device(device)
        self.longest = min(base.context, 128 if quick else 512)
        self.pool, self.task = texts(40 if quick else 1200, self.longest), texts(24 if quick else 400, self.longest)
        steps, size = (3, 2) if quick else (40, 16)
        self.recipe = Recipe(steps=steps, batch_size=size, learning_rate=1e-5, max_length=self.longest)
        self.rows, self.left_out = list[dict[str, Any]](), list[dict[str, Any]]()

    def model(self, dtype: str, *, compiled: bool) -> LanguageModel:
        """A copy of the model on the device."""
        moved: Any = copy.deepcopy(self.base.model)
        moved.to(self.device, getattr(torch, dtype))
        if compiled:
            compile_blocks(moved)
        return replace(self.base, model=moved)

    def skips(self, part: str, way: str, *, compiled: bool) -> bool:
        """Whether a way cannot be measured here, which is noted."""
        on_cpu, reason = self.device.type == "cpu", None
        if "liger" in way and (on_cpu or find_spec("liger_kernel") is None):
            reason = "needs a GPU and the package liger-kernel"
        elif compiled and on_cpu:
            reason = "needs a GPU"
        if reason is not None:
            self.left_out.append({"part": part, "way": way, "reason": reason})
        return reason is not None

    def measure(self, call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
        """Result of a call, its seconds, and the most memory of the device meanwhile, MiB (NaN on a CPU)."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        started = time.perf_counter()
        result = call()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else float("nan")
        return result, {"seconds": seconds, "mebibytes": peak}

    def scoring(self) -> None:
        """Tokens per second of each way to score, and the largest error of a text's loss, nats per token."""
        few = Pool(self.pool[:6])
        double = replace(self.base, model=copy.deepcopy(self.base.model).double())
        exact = np.array([loop(double, Pool([example])) for example in few])
        for way, (dtype, compiled) in SCORING.items():
            if self.skips("scoring", way, compiled=compiled):
                continue
            model = self.model(dtype, compiled=compiled)
            error = float(np.abs(score(model, few).nll - exact).max())
            score(model, self.pool)  # whatever is done once
            scores, figures = self.measure(partial(score, model, self.pool))
            tokens = int(np.sum(scores.tokens)) + len(scores)
            speed = tokens / figures["seconds"]
            self.rows.append({"part": "scoring", "way": way, "tokens_per_second": speed, "error": error, **figures})

    def training(self) -> None:
        """Tokens per second of each way to train, and the task's mean loss after it."""
        for way, (settings, compiled) in {"plain Trainer, bfloat16": ({}, False), **TRAINING}.items():
            if self.skips("training", way, compiled=compiled):
                continue
            recipe = self.recipe.model_copy(update=settings)
            tuner = FineTuner(self.model("float32", compiled=compiled))
            run = self.plain if way.startswith("plain") else self.ours
            run(tuner, recipe.model_copy(update={"steps": 2}))  # whatever is done once
            (tokens, tuned), figures = self.measure(partial(run, tuner, recipe))
            loss = float(np.nanmean(score(tuned, self.task).nll))
            speed = tokens / figures["seconds"]
            self.rows.append({"part": "training", "way": way, "tokens_per_second": speed, "loss": loss, **figures})

    def ours(self, tuner: FineTuner, recipe: Recipe) -> tuple[int, LanguageModel]:
        """Train by this library."""
        tuned = tuner.tune(self.task, recipe)
        return tuned.tokens, tuned.language_model

    def plain(self, tuner: FineTuner, recipe: Recipe) -> tuple[int, LanguageModel]:
        """Train by the Trainer alone, on the same batches."""
        model, tokenizer = tuner.restore(), self.base.tokenizer
        mixture = ReplayMixture(
            self.task, tokenizer, steps=recipe.steps, batch_size=recipe.batch_size, max_length=recipe.max_length
        )
        rows: Any = [{"input_ids": mixture[i].ids} for i in range(len(mixture))]
        with tempfile.TemporaryDirectory() as scratch:
            arguments = TrainingArguments(
                output_dir=scratch,
                max_steps=recipe.steps,
                per_device_train_batch_size=recipe.batch_size,
                learning_rate=recipe.learning_rate,
                bf16=True,
                train_sampling_strategy="sequential",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=self.device.type == "cpu",
                dataloader_pin_memory=self.device.type != "cpu",
            )
            arguments._n_gpu = min(arguments.n_gpu, 1)
            collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
            trainer = Trainer(model=model.model, args=arguments, train_dataset=rows, data_collator=collator)
            trainer.train()
            trainer.accelerator.unwrap_model(model.model, keep_fp32_wrapper=False)
        model.model.eval()
        return sum(len(row["input_ids"]) for row in rows), model

    def sharded(self) -> None:
        """Seconds of a fine-tune that two GPUs share (FSDP2), and how far its losses are from those of one GPU's."""
        if torch.cuda.device_count() < 2:
            self.left_out.append({"part": "training", "way": "FSDP2", "reason": "needs two GPUs"})
            return
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            self.base.model.save_pretrained(folder / "model")
            self.base.tokenizer.save_pretrained(folder / "model")
            self.task.save(folder / "task.jsonl")
            (folder / "recipe.yaml").write_text(self.recipe.model_dump_json())
            words = ["train", "model", "task.jsonl", "--recipe", "recipe.yaml", "-o"]
            ways = {
                "one": [sys.executable, "-m", "forgetcast.cli", *words, "one"],
                "two": [
                    *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "forgetcast.cli"),
                    *(*words, "two", "--fsdp", "--device", "cpu"),
                ],
            }
            seconds, losses = {}, {}
            for name, command in ways.items():
                started = time.perf_counter()
                subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)
                seconds[name] = time.perf_counter() - started
                found: Scores = score(load(folder / name, device=str(self.device)), self.task)
                losses[name] = found.nll
        difference = float(np.nanmax(np.abs(losses["two"] - losses["one"])))
        self.rows.append({"part": "training", "way": "FSDP2", "seconds": seconds["two"], "error": difference})

    def targets(self) -> list[dict[str, Any]]:
        """What the figures have to hold up to."""
        of = {(row["part"], row["way"]): row for row in self.rows}
        plain, ours = of["training", "plain Trainer, bfloat16"], of["training", "bfloat16"]
        chunked = of["training", "bfloat16, chunked"]
        found = [
            target("error of a text's loss in float32, nats", of["scoring", "float32"]["error"], 1e-3),
            target("error of a text's loss in bfloat16, nats", of["scoring", "bfloat16"]["error"], 0.05),
            target("loss after training, chunked against not", abs(chunked["loss"] - ours["loss"]), 0.01),
        ]
        if self.device.type == "cuda":
            ratio = ours["tokens_per_second"] / plain["tokens_per_second"]
            found += [
                target(
                    "error of a text's loss in float32, compiled", of["scoring", "float32, compiled"]["error"], 1e-3
                ),
                target("training to the plain Trainer, tokens/s", ratio, 0.97, least=True),
                target("memory of training, chunked to not", chunked["mebibytes"] / ours["mebibytes"], 1.0),
            ]
        if ("training", "FSDP2") in of:
            found.append(target("error of a loss after FSDP2, nats", of["training", "FSDP2"]["error"], 0.01))
        return found


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model")
    parser.add_argument("--model", help="directory of a model; default: a random one")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # cpu: to test this script
    arguments = parser.parse_args()
    if arguments.device != "cpu" and not torch.cuda.is_available():
        print("error: PyTorch finds no GPU, so nothing was measured", file=sys.stderr)
        raise SystemExit(2)
    sizes = TINY if arguments.device == "cpu" else QUICK if arguments.quick else SIZES
    bench = Bench(make(arguments.model, sizes), arguments.device, quick=arguments.quick)
    for part in (bench.scoring, bench.training, bench.sharded):
        part()
    console = output()
    table = Table("part", "way", "tokens/s", "peak memory, MiB", "error, nats", "loss", title=bench.base.name)
    for row in bench.rows:
        figures = (("tokens_per_second", ",.0f"), ("mebibytes", ",.0f"), ("error", ".1e"), ("loss", ".4f"))
        table.add_row(row["part"], row["way"], *(format(row[key], how) if key in row else "" for key, how in figures))
    console.print(table)
    for left in bench.left_out:
        console.print(f"Not measured: {left['part']}, {left['way']}: {left['reason']}.")
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU, which says nothing about a GPU"
    console.print(f"Measured on: {name}.")
    rows = [{"part": "device", "way": name}, *bench.rows, *bench.left_out]
    conclude(console, rows, bench.targets(), arguments.json, "torch", "transformers", "accelerate", "peft")


def make(directory: str | None, sizes: dict[str, Any]) -> LanguageModel:
    """The model, in float32 on the CPU."""
    if directory is not None:
        return load(directory, device="cpu")
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_attention_heads=sizes["hidden_size"] // 64, max_position_embeddings=1024)
    tokenizer = AutoTokenizer.from_pretrained(str(files("forgetcast.demo") / "model"))
    model = LlamaForCausalLM(config)
    count = sum(value.numel() for value in model.parameters())
    return LanguageModel(model.eval(), tokenizer, f"a random model of {count / 1e6:,.0f} million parameters")


if __name__ == "__main__":
    main()
