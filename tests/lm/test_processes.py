"""Several processes, as `accelerate launch` and torchrun start them, share the work; the result is that of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from forgetcast import Atlas, ConfigError, Pool, Scores
from forgetcast.completion.watch import WatchedRun
from forgetcast.lm import FineTuner, LanguageModel, MostForgottenSelector, processes, score
from support.cli import RunCommand
from support.data import make_pool, planted
from support.models import save, tiny
from support.plans import plan_for
from support.training import TASK, make_recipe

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
RECIPE = "steps: 6\nlearning_rate: 5.0e-3\nbatch_size: 4\nmicro_batch_size: 1\nmax_length: 64\n"


def launch(*words: object, program: Sequence[str] = ("-m", "forgetcast.cli")) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*LAUNCH, *program, *map(str, words)], capture_output=True, text=True, check=False, env=settings
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    save(tiny(), folder / "model")
    save(tiny(seed=1), folder / "other")
    tied = tiny("gpt2")  # its output layer has the weights of the embeddings
    for part in ("resid", "embd", "attn"):  # dropout would differ between the processes
        setattr(tied.model.config, f"{part}_pdrop", 0.0)
    save(tied, folder / "tied")
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


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("tied", "fused_loss: chunked"),
        pytest.param("model", "method: lora\ngradient_checkpointing: true", marks=pytest.mark.slow),
    ],
)
def test_sharded_training_is_that_of_one_process(
    folder: Path, run: RunCommand, tmp_path: Path, model: str, changes: str
) -> None:
    """FSDP2: weights, gradients and optimiser are shared; the state is gathered once, by the first process."""
    (tmp_path / "recipe.yaml").write_text(f"{RECIPE}{changes}\n")
    words = ("train", folder / model, folder / "task.jsonl", "--recipe", tmp_path / "recipe.yaml", "--json")
    words += ("--plan", folder / "plan.parquet", "--pool", folder / "pool.jsonl")
    assert run(*words, "-o", tmp_path / "one")[0] == 0
    done = launch(*words, "--fsdp", "-o", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 9
    one, two = (
        {file.name: load_file(file) for file in (tmp_path / name).glob("*.safetensors")} for name in ("one", "two")
    )
    assert one.keys() == two.keys()
    for file, weights in one.items():
        assert weights.keys() == two[file].keys()
        for name, value in weights.items():
            if name.endswith("attn.c_attn.bias"):
                # The biases of the keys have no gradient but rounding errors, which Adam makes large.
                value[value.numel() // 3 : 2 * value.numel() // 3] = two[file][name][
                    value.numel() // 3 : 2 * value.numel() // 3
                ]
            torch.testing.assert_close(two[file][name], value, rtol=1e-4, atol=2e-5)
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
    config = next(iter((tmp_path / "two").glob("*config.json"))).read_text()
    assert "FSDP" not in config
    assert not (tmp_path / "two.partial").exists()


def test_what_cannot_be_sharded(folder: Path, run: RunCommand, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = ("train", folder / "model", folder / "task.jsonl", "--recipe", folder / "recipe.yaml", "-o", tmp_path / "t")
    code, _, err = run(*words, "--fsdp")
    assert code == 2
    assert "--fsdp shares a model among processes, and there is one; start several: torchrun" in err
    for variable, reason in {
        "ACCELERATE_USE_FSDP": "give `train` --fsdp",
        "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    }.items():
        with monkeypatch.context() as patch:
            patch.setenv(variable, "true")
            code, _, err = run(*words)
            assert code == 2
            assert reason in err
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(LanguageModel, "is_quantized", property(lambda _: True))
    with pytest.raises(ConfigError, match="is quantised, so its weights cannot be sharded"):
        FineTuner(tiny(), sharded=True)
    monkeypatch.undo()
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(ConfigError, match="--compile and --fsdp"):
        FineTuner(replace(tiny(), loading={"compiled": True}), sharded=True)
    tuner = FineTuner(tiny(), sharded=True)
    with pytest.raises(ConfigError, match="selected during a sharded training"):
        tuner.tune(TASK, make_recipe(), selector=MostForgottenSelector(TASK, np.zeros(len(TASK))))


@pytest.mark.slow
@pytest.mark.filterwarnings("always::UserWarning")
def test_a_watched_training_stops_in_all_processes(folder: Path, run: RunCommand) -> None:
    pool = Pool.load(folder / "pool.jsonl")
    before = score(tiny(), pool)
    atlas = Atlas.create(folder / "a.atlas", pool, before, model="tiny")
    for i, row in enumerate(np.abs(planted(4, len(pool), 1, 0.05))):
        atlas.add(f"t{i}", replace(before, nll=before.nll + row))
    words = ("train", folder / "model", folder / "task.jsonl", "--recipe", folder / "recipe.yaml", "--json")
    words += ("--watch", atlas.path, "--watch-every", 2, "--probes", 8, "--stop-if", "upper > -9")
    assert run(*words, "-o", folder / "watched")[0] == 0
    done = launch(*words, "-o", folder / "watched2")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2
    assert done.stderr.count("the training is stopped at step 2: forgetting upper > -9") == 1
    one, two = (WatchedRun.load(folder / name / "forgetting.json") for name in ("watched", "watched2"))
    assert [reading.step for reading in two.readings] == [0, 2]
    assert two.readings[1].named() == pytest.approx(one.readings[1].named(), abs=1e-4)
    weights = [load_file(folder / name / "model.safetensors") for name in ("watched", "watched2")]
    assert all(torch.allclose(value, weights[0][name], atol=1e-4) for name, value in weights[1].items())


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
