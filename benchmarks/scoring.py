"""Scoring against a plain loop, lm-evaluation-harness, and the bare forward pass over packed tokens: speed and memory.
And training with replay against the plain Trainer on the same tokens, and the time that a sweep spends on other things.

    python benchmarks/scoring.py --quick             # the demo model only: about two minutes
    python benchmarks/scoring.py --json result.json  # also 100 M parameters, and 256,000 words: about fifteen minutes

The pool is text from the Python installation, of mixed lengths. The packed forward pass has no padding, no loss and no
bookkeeping: it is what the hardware allows. lm-evaluation-harness runs `loglikelihood_rolling` on its Hugging Face
backend, if it is installed (`pip install 'lm-eval[hf]'`), in batches of sixteen, and on the demo model also one by one,
which is its default; it counts the first token too, so its mean loss is another.
Memory is the growth of the process's peak while scoring, each way in a process of its own. There the packed forward
pass and lm-evaluation-harness take turns with this library, so that the machine's mood from one process to the next
decides no ratio; their memory is that of both. The plain Trainer gets the same batches in the same order, tokenised and
padded as is usual; the two take turns in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from rich.table import Table
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from forgetcast import Example, Pool, make_plan
from forgetcast.experiments.collect import collect, prepare_atlas
from forgetcast.lm import FineTuner, LanguageModel, Recipe, ReplayMixture, load, score
from forgetcast.lm.head import Head
from forgetcast.lm.load import embedding_rows
from shared import conclude, output, target

DEMO = files("forgetcast.demo") / "model"
ROUNDS = 3
WAYS = {
    "forgetcast": "ours",
    "plain loop": "loop",
    "lm-evaluation-harness": "harness",
    "the same, one by one": "harness-default",
    "packed forward": "packed",
}
MODELS = {"demo": 600, "100 M": 240, "256,000 words": 200}
"""Models and how many texts each scores."""


def make(name: str) -> LanguageModel:
    """The demo model, or a random one on its tokenizer."""
    if name == "demo":
        return load(str(DEMO))
    sizes: dict[str, Any] = {"vocab_size": 256_000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    if name == "100 M":
        sizes = {"vocab_size": 16_384, "hidden_size": 768, "intermediate_size": 2_048, "num_hidden_layers": 12}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_attention_heads=sizes["hidden_size"] // 64, max_position_embeddings=512)
    return LanguageModel(LlamaForCausalLM(config).eval(), AutoTokenizer.from_pretrained(str(DEMO)), name)


def texts(count: int, longest: int) -> Pool:
    """Pieces of the standard library's sources, of 20 to `longest` times 3 characters."""
    rng = np.random.default_rng(0)
    sources = sorted(Path(os.__file__).parent.glob("*.py"))
    whole = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in sources[:80])
    found = []
    for i in range(count):
        length = int(np.exp(rng.uniform(np.log(20), np.log(3 * longest))))
        start = int(rng.integers(len(whole) - length))
        found.append(Example(str(i), text=whole[start : start + length].strip() or "a text"))
    return Pool(found)


def ours(model: LanguageModel, pool: Pool) -> float:
    """Mean loss over all texts, by this library."""
    return float(np.nanmean(score(model, pool).nll))


@torch.inference_mode()
def loop(model: LanguageModel, pool: Pool) -> float:
    """The same, one text after the other, with all its logits."""
    found = []
    for example in pool:
        ids = model.tokenizer(example.text, return_tensors="pt", truncation=True, max_length=model.context)["input_ids"]
        if ids.shape[1] < 2:
            continue
        logits = model.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        found.append(float(torch.nn.functional.cross_entropy(logits, ids[0, 1:])))
    return float(np.mean(found))


@torch.inference_mode()
def packed(model: LanguageModel, pool: Pool) -> float:
    """The decoder and the output layer on all tokens, packed into full batches of this library's size; no loss."""
    lengths = [len(model.tokenizer(e.text, truncation=True, max_length=model.context)["input_ids"]) for e in pool]
    # Attention costs more the longer the rows: as long as a typical token's text is.
    width = max(int(np.average(lengths, weights=lengths)), 2)
    rows = max(2048 // width, 1)
    total, inner = sum(lengths), model.model
    ids = torch.randint(0, 1000, (rows, width))
    for done in range(0, total, rows * width):
        part = ids[: -(-(total - done) // width)]  # the last batch has fewer rows
        hidden = inner.model(input_ids=part, use_cache=False).last_hidden_state.flatten(0, 1)
        for start in range(0, len(hidden), 1024):
            inner.lm_head(hidden[start : start + 1024])
    return float("nan")


def harness(model: LanguageModel, pool: Pool, *, most: int = 16) -> float:
    """lm-evaluation-harness: summed log-likelihoods, turned into means per token."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    # As many texts at once as fit with their logits.
    size = max(min(most, 2**29 // (model.context * embedding_rows(model.model))), 1)
    lm = HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=size, max_length=model.context)
    requests = [Instance("loglikelihood_rolling", {}, (example.text,), i) for i, example in enumerate(pool)]
    sums = lm.loglikelihood_rolling(requests, disable_tqdm=True)
    tokens = [len(model.tokenizer(example.text, add_special_tokens=False)["input_ids"]) for example in pool]
    return float(np.mean([-total / count for total, count in zip(sums, tokens, strict=True)]))


def measure(name: str, way: str) -> dict[str, float]:
    """Tokens per second, and the growth of the peak memory while scoring, MiB."""
    model = make(name)
    pool = texts(MODELS[name], model.context)
    tokens = sum(len(model.tokenizer(e.text, truncation=True, max_length=model.context)["input_ids"]) for e in pool)
    one_by_one = partial(harness, most=1)
    ways: dict[str, Callable[[LanguageModel, Pool], float]] = {
        "ours": ours, "loop": loop, "harness": harness, "harness-default": one_by_one, "packed": packed
    }  # fmt: skip
    call = ways[way]
    _ = model.weights_hash  # part of loading, and kept
    calls = [call] if way in ("ours", "loop") else [call, ours]
    for once in calls:
        once(model, Pool(pool[:4]))  # whatever is done once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, beside = [], []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        loss = call(model, pool)
        seconds.append(time.perf_counter() - started)
        if len(calls) > 1:
            ours(model, pool)
            beside.append(time.perf_counter() - started - seconds[-1])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    figures = {"tokens_per_second": tokens / float(np.median(seconds)), "mebibytes": grown, "loss": loss}
    turns = {"ours_in_turn": tokens / float(np.median(beside))} if beside else {}
    return {**figures, **turns, "tokens": tokens}


def training() -> dict[str, float]:
    """Tokens per second of fine-tuning with replay: this library's, and the plain Trainer's on the same batches."""
    model, pool = make("demo"), texts(600, 128)
    task = Pool([Example(f"new {e.id}", text=e.text) for e in texts(900, 128)][600:])
    plan = make_plan(pool, "random", ratio=0.125)
    recipe = Recipe(steps=80, batch_size=8, learning_rate=1e-3, max_length=128)
    tuner, tokenizer = FineTuner(model), model.tokenizer
    mixture = ReplayMixture(task, tokenizer, steps=80, batch_size=8, max_length=128, plan=plan, pool=pool)
    order = [tokenizer.decode(mixture[i].ids, skip_special_tokens=True) for i in range(len(mixture))]
    tokens = sum(len(mixture[i].ids) for i in range(len(mixture)))

    def ours() -> None:
        tuner.tune(task, recipe, plan=plan, pool=pool)

    def plain() -> None:
        language_model = tuner.restore()
        rows = [tokenizer(text + tokenizer.eos_token, truncation=True, max_length=128) for text in order]
        with tempfile.TemporaryDirectory() as scratch:
            arguments = TrainingArguments(
                output_dir=scratch,
                max_steps=mixture.steps,
                per_device_train_batch_size=8,
                learning_rate=1e-3,
                train_sampling_strategy="sequential",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            )
            collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
            Trainer(model=language_model.model, args=arguments, train_dataset=rows, data_collator=collator).train()

    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(1 + ROUNDS):  # the first is for whatever is done once
        for name, call in (("ours", ours), ("plain", plain)):
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    return {name: tokens / float(np.median(found[1:])) for name, found in seconds.items()}


def sweep() -> dict[str, float]:
    """Share of the time of `collect` that is spent in training steps and in the forward passes of scoring."""
    spent = 0.0

    def timed(owner: Any, name: str) -> None:
        call = getattr(owner, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal spent
            started = time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                spent += time.perf_counter() - started

        setattr(owner, name, wrapped)

    # A training step: forward and backward pass, clipping, update.
    for owner, name in ((Trainer, "training_step"), (Accelerator, "clip_grad_norm_"), (torch.optim.AdamW, "step")):
        timed(owner, name)
    timed(Head, "nll")
    base, pool, new = make("demo"), texts(600, 128), texts(4 * 64, 128)
    tasks = {f"task {i}": Pool(new[64 * i : 64 * (i + 1)]) for i in range(4)}
    recipe = Recipe(steps=40, batch_size=8, learning_rate=1e-3, max_length=128)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        atlas = prepare_atlas(Path(folder) / "runs.atlas", base, pool, recipe)
        collect(FineTuner(base), atlas, recipe, tasks)
        return {"seconds": time.perf_counter() - started, "share": spent / (time.perf_counter() - started)}


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the demo model only")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        jobs: dict[str, Callable[..., dict[str, float]]] = {"training": training, "sweep": sweep, "measure": measure}
        call = jobs[arguments.job[0]]
        print(json.dumps(call(*arguments.job[1:])))
        return
    console, rows = output(), list[dict[str, Any]]()
    for name in ["demo"] if arguments.quick else MODELS:
        for label, way in WAYS.items():
            if way == "harness-default" and name != "demo":
                continue  # minutes, and no news
            if way.startswith("harness") and find_spec("lm_eval") is None:
                console.print("lm-evaluation-harness is not installed; skipped", style="dim")
                continue
            rows.append({"model": name, "way": label, **job("measure", name, way)})
            console.print(f"{name}, {label}: {rows[-1]['tokens_per_second']:,.0f} tokens/s", style="dim")
    table = Table("model", "way", "tokens/s", "ours, times", "mean loss", "peak memory grows, MiB", title="Scoring")
    own = {r["model"]: r["tokens_per_second"] for r in rows if r["way"] == "forgetcast"}
    for r in rows:
        r["ours_times"] = r.get("ours_in_turn", own[r["model"]]) / r["tokens_per_second"]
        loss = "" if np.isnan(r["loss"]) else f"{r['loss']:.4f}"
        memory = f"{r['mebibytes']:.0f}"
        table.add_row(r["model"], r["way"], f"{r['tokens_per_second']:,.0f}", f"{r['ours_times']:.2f}", loss, memory)
    console.print(table)
    speed, swept = job("training"), job("sweep")
    rows += [{"way": f"training, {name}", "tokens_per_second": value} for name, value in speed.items()]
    rows.append({"way": "sweep", **swept})
    console.print(
        f"Training with replay: {speed['ours']:,.0f} tokens/s, the plain Trainer {speed['plain']:,.0f} on the same.",
        f"Of a sweep's {swept['seconds']:.0f} s, {swept['share']:.1%} are training steps and forward passes.",
    )
    goals = [
        target("training with replay to the plain Trainer, tokens/s", speed["ours"] / speed["plain"], 0.97, least=True),
        target("share of a sweep in training steps and forward passes", swept["share"], 0.95, least=True),
    ]
    conclude(console, rows, targets(rows) + goals, arguments.json, "torch", "transformers")


def job(*words: str) -> dict[str, float]:
    """Run a part of the benchmark in a process of its own."""
    command = [sys.executable, __file__, "--job", *words]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, float] = json.loads(found.splitlines()[-1])
    return result


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the figures have to hold up to."""
    of = {(r.get("model"), r["way"]): r for r in rows}
    found = []
    for model, bound in (("demo", 4.0), ("100 M", 1.5)):
        if (r := of.get((model, "lm-evaluation-harness"))) is not None:
            found.append(target(f"times lm-evaluation-harness, {model}", r["ours_times"], bound, least=True))
    if (r := of.get(("100 M", "packed forward"))) is not None:
        found.append(target("share of the packed forward pass, 100 M", r["ours_times"], 0.9, least=True))
    if (r := of.get(("256,000 words", "forgetcast"))) is not None:
        logits = 2048 * 256_000 * 4 / 2**20
        found.append(target("memory to that of a batch's logits, 256,000 words", r["mebibytes"] / logits, 0.25))
    return found


if __name__ == "__main__":
    main()
