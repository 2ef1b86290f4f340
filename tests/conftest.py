"""Small things that many tests need: planted matrices, a pool, an atlas, tiny random models of several families."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from forgetcast import Atlas, Example, Pool, Scores
from forgetcast.cli import main

# How long an example takes is not tested, and a busy machine is no failure.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def olmo() -> np.ndarray:
    """The authors' OLMo-7B matrix, 76 x 1,000; read where it lies, never copied."""
    folder = Path(os.environ.get("FORGETCAST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    file = folder / "olmo-7b-dolma.json"
    if not file.is_file():
        pytest.skip(f"{file} is not here; set FORGETCAST_DATA to the folder with the reference data")
    return np.array(json.loads(file.read_text())["arr"])


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


@pytest.fixture
def pool() -> Pool:
    return make_pool()


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


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in this process: its exit code, standard output and standard error."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["forgetcast", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        printed = capsys.readouterr()
        return int(exit_.value.code or 0), printed.out, printed.err

    return call
