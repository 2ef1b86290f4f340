"""Several processes, as `accelerate launch` and torchrun start them, share the work; the result is that of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from forgetcast import Pool, Scores
from forgetcast.lm import processes, score
from support.cli import RunCommand
from support.data import make_pool
from support.models import save, tiny
from support.plans import plan_for
from support.training import TASK

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "forgetcast.cli"]
RECIPE = "steps: 6\nlearning_rate: 5.0e-3\nbatch_size: 4\nmicro_batch_size: 1\nmax_length: 64\n"


def launch(*words: object) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run([*LAUNCH, *map(str, words)], capture_output=True, text=True, check=False, env=settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    save(tiny(), folder / "model")
    save(tiny(seed=1), folder / "other")
    pool = make_pool(13)
    pool.save(folder / "pool.jsonl")
    TASK.save(folder / "task.jsonl")
    (folder / "recipe.yaml").write_text(RECIPE)
    plan_for(pool, "random", 0.5).save(folder / "plan.parquet")
    return folder


def test_scores_are_those_of_one_process(folder: Path, run: RunCommand) -> None:
    words = ("score", folder / "model", folder / "pool.jsonl", "--exact-match", "--max-new-tokens", 4, "--json")
    words += ("--repeat", 2, "--reference", folder / "other")
    assert run(*words, "-o", folder / "one.parquet")[0] == 0
    one = Scores.load(folder / "one.parquet")
    # What an earlier run of three processes had finished is used, whoever had it.
    kept = {"": "e0", ".2": "e5"}
    scored = {name: value for name, value in one.metadata.items() if not name.startswith("reference")}
    for suffix, id_ in kept.items():
        lines = [json.dumps(scored), json.dumps([id_, 7.0 * one.tokens[one.ids.index(id_)], ""])]
        (folder / f"two.parquet.partial{suffix}").write_text("\n".join(lines) + "\n")
    done = launch(*words, "-o", folder / "two.parquet")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["examples"] == 13
    assert not list(folder.glob("two.parquet.*"))
    two = Scores.load(folder / "two.parquet")
    expected = np.where(np.isin(one.ids, list(kept.values())), 7.0, one.nll)
    np.testing.assert_allclose(two.nll, expected, rtol=1e-5)
    np.testing.assert_allclose(two.repeats, one.repeats, rtol=1e-5)
    np.testing.assert_allclose(two.kl, one.kl, rtol=1e-4)
    assert two.predictions == one.predictions
    np.testing.assert_array_equal(two.exact_match, one.exact_match)


def test_each_process_scores_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[list[tuple[int, float, str]]] = []
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "from_all", lambda share: [shares.append(share) or share])
    for number in range(2):
        monkeypatch.setattr(processes, "index", lambda number=number: number)
        score(tiny(), make_pool(13))
    assert [len(share) for share in shares] == [7, 6]
    assert sorted(i for share in shares for i, *_ in share) == list(range(13))


def test_training_is_that_of_one_process(folder: Path, run: RunCommand) -> None:
    words = ("train", folder / "model", folder / "task.jsonl", "--recipe", folder / "recipe.yaml", "--json")
    words += ("--plan", folder / "plan.parquet", "--pool", folder / "pool.jsonl")
    assert run(*words, "-o", folder / "one")[0] == 0
    done = launch(*words, "-o", folder / "two")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) | {"seconds": 0, "output": ""} == {
        "steps": 9,
        "replayed": 12,
        "held_out_replayed": 0,
        "seconds": 0,
        "output": "",
    }
    losses = []
    for name in ("one", "two", "model"):
        words = ("score", folder / name, folder / "task.jsonl", "-o", folder / f"{name}.parquet")
        assert run(*words)[0] == 0
        losses.append(Scores.load(folder / f"{name}.parquet").nll)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)
    assert losses[0].mean() < losses[2].mean() - 0.3


def test_other_commands_refuse_several_processes(
    folder: Path, run: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun sets it
    code, _, err = run(
        "verify", folder / "model", folder / "task.jsonl", "--atlas", "a", "--plan", "p", "-o", folder / "v"
    )
    assert code == 2
    assert "`verify` runs in one process" in err


def test_layers_may_be_spread_over_devices(folder: Path, run: RunCommand) -> None:
    words = ("score", folder / "model", folder / "pool.jsonl", "-o")
    assert run(*words, folder / "plain.parquet")[0] == 0
    assert run(*words, folder / "auto.parquet", "--device", "auto")[0] == 0
    auto, plain = (Scores.load(folder / f"{name}.parquet").nll for name in ("auto", "plain"))
    np.testing.assert_allclose(auto, plain, rtol=1e-6)
    assert len(Pool.load(folder / "pool.jsonl")) == len(auto)
