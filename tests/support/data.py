"""Planted matrices, and a pool, scores, an atlas and tasks made from a seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from forgetcast import Atlas, Example, Pool, Scores


def planted(tasks: int, examples: int, rank: int, noise: float, seed: int = 0) -> np.ndarray:
    """Low-rank truth with task shifts and example means, plus noise."""
    rng = np.random.default_rng(seed)
    low_rank = rng.normal(size=(tasks, rank)) @ rng.normal(size=(rank, examples))
    shifts, means = rng.normal(0, 0.5, (tasks, 1)), rng.normal(1, 0.5, examples)
    return low_rank + shifts + means + rng.normal(0, noise, (tasks, examples))


def make_pool(n: int = 24, sources: int = 3) -> Pool:
    """Texts of different lengths, with a prompt and completion among every four."""
    rng = np.random.default_rng(1)
    words = ["the", "loss", "of", "a", "model", "is", "measured", "on", "every", "token", "and", "averaged"]
    examples = []
    for i in range(n):
        text = " ".join(rng.choice(words, size=int(rng.integers(3, 40))))
        parts = {"prompt": f"{text}\n", "completion": "yes it is"} if i % 4 == 3 else {"text": text}
        examples.append(Example(id=f"e{i}", source=f"s{i % sources}", **parts))
    return Pool(examples)


def make_scores(pool: Pool, nll: np.ndarray, **metadata: object) -> Scores:
    n = len(pool)
    return Scores(pool.ids, nll, np.full(n, 5), np.zeros(n, bool), metadata={"pool": pool.fingerprint, **metadata})


def make_atlas(path: Path, pool: Pool, tasks: int = 8, seed: int = 0) -> Atlas:
    """Atlas of planted forgetting."""
    before = make_scores(pool, np.full(len(pool), 3.0))
    atlas = Atlas.create(path, pool, before, model="base")
    for i, row in enumerate(np.abs(planted(tasks, len(pool), 1, 0.05, seed))):
        atlas.add(f"t{i}", make_scores(pool, 3.0 + row))
    return atlas


def make_task(name: str, n: int) -> Pool:
    return Pool([Example(f"{i}", prompt=f"{name} {i}:", completion=f" {name[::-1]} {i}") for i in range(n)])
