"""Sweeps: rows made one by one or by several processes, with failures, seeds, and a share of the pool."""

from __future__ import annotations

import errno
import io
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import TrainerCallback

from forgetcast import Atlas, ConfigError, DataError, MismatchError, Scores
from forgetcast.cli.tables import runs_table
from forgetcast.errors import IncompleteError
from forgetcast.experiments.collect import Sweep, collect, prepare_atlas
from forgetcast.experiments.command import CommandTrainer
from forgetcast.experiments.runs import FineTune
from forgetcast.files import temporary_folder, write_json
from forgetcast.lm import FineTuner, score
from support.cli import RunCommand
from support.data import make_pool
from support.dying import run_cli
from support.experiments import collect_into
from support.models import save, tiny
from support.processes import start
from support.training import TASKS, make_recipe

RECIPE = make_recipe()


def configure(folder: Path, name: str, **settings: Any) -> Path:
    """Write the model, the pool, the tasks and a configuration, and return the configuration's path."""
    if not (folder / "model").exists():
        save(tiny(), folder / "model")
        make_pool().save(folder / "pool.jsonl")
        for task, examples in TASKS.items():
            examples.save(folder / "tasks" / f"{task}.jsonl")
    config = folder / f"{name}.yaml"
    lines = {"model": "model", "pool": "pool.jsonl", "tasks": "tasks", "atlas": name, **settings}
    if "trainer" not in settings:
        lines.setdefault("recipe", RECIPE.model_dump_json())
    config.write_text("".join(f"{field}: {value}\n" for field, value in lines.items()))
    return config


def together(commands: list[list[object]]) -> list[tuple[int, str, str]]:
    """Run commands in a process each, all at once."""
    started = [start(run_cli, words) for words in commands]
    said = [connection.recv() for _, connection in started]
    for process, _ in started:
        process.join()
    return said


def same(one: Atlas, other: Atlas) -> None:
    assert one.tasks == other.tasks
    np.testing.assert_array_equal(one.matrix().values, other.matrix().values)
    np.testing.assert_array_equal(one.before.nll, other.before.nll)


@pytest.fixture
def straight(tmp_path: Path, run: RunCommand) -> Atlas:
    """Rows of one process."""
    code, _, err = run("collect", configure(tmp_path, "straight.atlas"))
    assert code == 0, err
    return Atlas.open(tmp_path / "straight.atlas")


def test_a_process_for_each_row_gives_the_same_atlas(tmp_path: Path, straight: Atlas) -> None:
    config = configure(tmp_path, "shared.atlas")
    # The last row first, so that the order in which they are added is another one.
    names = [*reversed(TASKS)]
    assert [code for code, *_ in together([["collect", config, "--only", name] for name in names[:1]])] == [0]
    assert Atlas.open(tmp_path / "shared.atlas").tasks == (names[0],)
    said = together([["collect", config, "--only", name] for name in names[1:]])
    assert [code for code, *_ in said] == [0, 0], said
    same(Atlas.open(tmp_path / "shared.atlas"), straight)


def test_two_processes_with_one_configuration_at_once(tmp_path: Path, straight: Atlas) -> None:
    config = configure(tmp_path, "shared.atlas")
    said = together([["collect", config], ["collect", config]])
    assert [code for code, *_ in said] == [0, 0], said
    same(Atlas.open(tmp_path / "shared.atlas"), straight)
    assert not [path.name for path in (tmp_path / "shared.atlas").rglob(".*")], "temporary files"


def test_a_row_that_another_process_finished_meanwhile_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, made = make_pool(), list[str]()
    atlas = prepare_atlas(tmp_path / "a.atlas", tiny(), pool, RECIPE)
    run_it = FineTune.run

    def run(self: FineTune, *arguments: Any) -> Scores:
        made.append(self.name)
        scores = run_it(self, *arguments)
        if self.name == "adding":
            other = Atlas.open(atlas.path)
            collect(FineTuner(tiny()), other, RECIPE, TASKS, sweep=Sweep(only=["naming"]))
        return scores

    monkeypatch.setattr(FineTune, "run", run)
    seen: list[tuple[int, int]] = []
    collect(FineTuner(tiny()), atlas, RECIPE, TASKS, on_progress=lambda _, *n: seen.append(n))
    assert made == ["adding", "naming", "spelling"]
    assert seen[-1][0] == seen[-1][1]


def test_an_atlas_that_was_begun_is_finished(tmp_path: Path, straight: Atlas, run: RunCommand) -> None:
    """As a process leaves it that is killed before it writes atlas.json."""
    config = configure(tmp_path, "begun.atlas")
    other = tiny(seed=1)
    for base, code in ((other, 2), (tiny(), 0)):
        scores, pool = score(base, make_pool()), make_pool()
        Atlas.create(tmp_path / "begun.atlas", pool, scores, model="model")
        (tmp_path / "begun.atlas" / "atlas.json").unlink()
        said = run("collect", config)
        assert said[0] == code
        if code:
            assert "begun with another base model" in said[2]
            (tmp_path / "begun.atlas" / "before.parquet").unlink()
            (tmp_path / "begun.atlas" / "pool.parquet").unlink()
    same(Atlas.open(tmp_path / "begun.atlas"), straight)


def failing(failures: dict[str, list[Exception]]) -> tuple[Callable[..., Scores], list[str]]:
    """Return a `FineTune.run` that raises these for the tasks, one after another, and the names it was run for."""
    run_it, made = FineTune.run, list[str]()

    def run(self: FineTune, *arguments: Any) -> Scores:
        made.append(self.name)
        if failures.get(self.name):
            raise failures[self.name].pop(0)
        return run_it(self, *arguments)

    return run, made


def test_a_failed_task_does_not_stop_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atlas = prepare_atlas(tmp_path / "a.atlas", tiny(), make_pool(), RECIPE)
    memory = RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
    run, made = failing(
        {"adding": [ValueError("no\n good"), ValueError()], "naming": [memory], "spelling": [memory] * 5}
    )
    monkeypatch.setattr(FineTune, "run", run)
    seen: list[tuple[int, int]] = []
    with pytest.raises(IncompleteError, match=r"a\.atlas: 1 of 3 rows were made") as error:
        collect(
            FineTuner(tiny()), atlas, RECIPE, TASKS, sweep=Sweep(retries=2), on_progress=lambda _, *n: seen.append(n)
        )
    assert error.value.failures == {"adding": "ValueError: no good", "spelling": f"RuntimeError: {memory}"}
    assert made == ["adding", "naming", "naming", *["spelling"] * 3]
    assert Atlas.open(atlas.path).tasks == ("naming",)
    assert seen[-1][0] == seen[-1][1]
    monkeypatch.undo()
    collect(FineTuner(tiny()), atlas, RECIPE, TASKS)
    assert Atlas.open(atlas.path).tasks == tuple(TASKS)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device", "rows/naming"), ConfigError("micro_batch_size does not divide")],
)
def test_what_concerns_all_rows_stops_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    atlas = prepare_atlas(tmp_path / "a.atlas", tiny(), make_pool(), RECIPE)
    run, made = failing({"naming": [error]})
    monkeypatch.setattr(FineTune, "run", run)
    with pytest.raises(type(error)) as raised:
        collect(FineTuner(tiny()), atlas, RECIPE, TASKS, sweep=Sweep(retries=2))
    assert raised.value is error
    assert made == ["adding", "naming"]


def test_failures_are_named_and_exit_with_1(tmp_path: Path, run: RunCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FineTune, "run", failing({"adding": [DataError("the loss is nan")]})[0])
    code, out, err = run("collect", configure(tmp_path, "a.atlas"), "--only", "adding", "--only", "spelling")
    assert (code, "1 tasks" in out) == (1, True)
    assert [line for line in err.splitlines() if "adding" in line][-1] == "failed: adding: the loss is nan"
    assert Atlas.open(tmp_path / "a.atlas").tasks == ("spelling",)


def test_what_cannot_end_well_is_refused_before_any_work(
    tmp_path: Path, run: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("forgetcast.lm.load", load)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("")
    for settings, words, message in (
        ({"atlas": "file/a.atlas"}, (), "file"),
        ({"atlas": "file"}, (), "file"),
        ({"atlas": "folder"}, (), "exists already"),
        ({"atlas": "unknown://x"}, (), "unknown"),
        ({}, ("--only", "nothing"), "--only nothing: there is no such task; there are adding, naming, spelling"),
        ({"seeds": "[-1]"}, (), "seeds.0"),
        ({"score_share": 0}, (), "score_share"),
        ({"retries": -1}, (), "retries"),
    ):
        config = configure(tmp_path, "a.atlas", **settings)
        code, _, err = run("collect", config, *words)
        assert code == 2, (settings, err)
        assert message in err
        assert err.count("\n") <= 5, err  # what was read of each file, and the error
    assert not list((tmp_path / "a.atlas").rglob("*")), "nothing is stored"


def test_rows_of_a_sweep() -> None:
    rows = Sweep(seeds=(3, 5)).rows(["b", "a"])
    assert [(row.name, row.task, row.seed, row.order) for row in rows] == [
        ("b", "b", 3, 0), ("b seed 5", "b", 5, 1), ("a", "a", 3, 2), ("a seed 5", "a", 5, 3),
    ]  # fmt: skip
    assert Sweep(seeds=(3, 5), only=["a"]).rows(["b", "a"]) == rows[2:]
    assert Sweep(seeds=(3, 5), only=["a seed 5"]).rows(["b", "a"]) == rows[3:]
    assert [row.seed for row in Sweep().rows(["b", "a"], 7)] == [7, 7]
    with pytest.raises(DataError, match="two rows would be called 'a seed 1'"):
        Sweep(seeds=(0, 1)).rows(["a", "a seed 1"])
    with pytest.raises(DataError, match="is not Unicode"):
        Sweep().rows(["\udc80"])


def test_seeds_and_a_share_of_the_pool(tmp_path: Path, run: RunCommand) -> None:
    pool = make_pool()
    config = configure(tmp_path, "a.atlas", seeds="[0, 1]", score_share=0.5)
    code, _, err = run("collect", config)
    assert code == 0, err
    atlas = Atlas.open(tmp_path / "a.atlas")
    assert atlas.tasks == tuple(name + seed for name in TASKS for seed in ("", " seed 1"))
    measured = ~np.isnan(atlas.matrix().values)
    assert measured.sum(axis=1).tolist() == [len(pool) // 2] * 6
    np.testing.assert_array_equal(measured[::2], measured[1::2])  # of a task's seeds
    assert (measured[0] != measured[2]).any(), "another sample for each task"
    kept = atlas.provenance("naming seed 1")
    assert (kept["task"], kept["seed"], kept["recipe"]["seed"], kept["score_share"]) == ("naming", 1, 1, 0.5)
    assert "torch" in kept["versions"]
    tokens = kept["cost"]["training"]["tokens"]
    assert 0 < tokens <= RECIPE.steps * RECIPE.batch_size * RECIPE.max_length
    assert kept["cost"]["scoring"]["tokens"] == atlas.before.tokens[measured[3]].sum()
    assert all(kept["cost"][part]["seconds"] > 0 for part in ("training", "scoring"))
    values = atlas.matrix().values
    tuned = FineTuner(tiny()).tune(TASKS["naming"], RECIPE.model_copy(update={"seed": 1})).language_model
    expected = (score(tuned, pool).nll - atlas.before.nll)[measured[3]]
    np.testing.assert_allclose(values[3][measured[3]], expected, atol=1e-5)

    files = sorted(path.name for path in (tmp_path / "a.atlas" / "rows").rglob("*.parquet"))
    assert run("collect", config)[0] == 0
    assert sorted(path.name for path in (tmp_path / "a.atlas" / "rows").rglob("*.parquet")) == files, "finished"
    assert not atlas.is_complete("naming")
    assert atlas.is_complete("naming", share=0.5)
    assert run("collect", configure(tmp_path, "a.atlas", seeds="[0, 1]", score_share=0.75))[0] == 0
    more = Atlas.open(tmp_path / "a.atlas").matrix().values
    np.testing.assert_array_equal(more[measured], values[measured])
    assert (~np.isnan(more)).sum(axis=1).tolist() == [round(0.75 * len(pool))] * 6
    Atlas.open(tmp_path / "a.atlas").compact()
    assert Atlas.open(tmp_path / "a.atlas").is_complete("naming", share=0.75)
    noise = json.loads(run("analyze", tmp_path / "a.atlas", "--json")[1])["noise"]
    pairs = more[::2] - more[1::2]
    assert (noise["tasks"], noise["rows"]) == (3, 6)
    assert noise["std"] == pytest.approx(np.sqrt(np.nanmean(pairs**2) / 2), rel=1e-5)
    assert "Noise from run to run" in run("analyze", tmp_path / "a.atlas")[1]
    with pytest.raises(ConfigError, match="is not one"):
        collect(FineTuner(tiny()), atlas, RECIPE, TASKS, sweep=Sweep(score_share=0.001))


def test_a_share_of_few_tasks_is_warned_of_before_any_work(
    tmp_path: Path, run: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise DataError("the model was loaded")

    monkeypatch.setattr("forgetcast.lm.load", load)
    for share, fewest, warned in ((0.5, 16, 1), (1.0, 16, 0), (0.5, 3, 0)):
        monkeypatch.setattr(sys.modules["forgetcast.experiments.collect"], "FEWEST_FOR_A_SHARE", fewest)
        _, out, err = run("collect", configure(tmp_path, "a.atlas", score_share=share))
        assert err.count("warning: score_share 0.5 with 3 tasks") == warned
        assert "the model was loaded" in err.partition("warning: ")[2] or not warned
        assert "warning" not in out


def test_an_example_that_the_tuned_model_cannot_be_scored_on_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    atlas = prepare_atlas(tmp_path / "a.atlas", tiny(), make_pool(), RECIPE)
    run_it, made = FineTune.run, list[str]()
    reasons = {"adding": "the model's loss is inf", "naming": "out of memory"}

    def run(self: FineTune, *arguments: Any) -> Scores:
        made.append(self.name)
        scores = run_it(self, *arguments)
        nll = scores.nll.copy()
        nll[0] = np.nan
        return replace(scores, nll=nll, reasons=[reasons[self.name], *scores.reasons[1:]])

    monkeypatch.setattr(FineTune, "run", run)
    tasks = {name: TASKS[name] for name in reasons}
    for _ in range(2):
        collect(FineTuner(tiny()), atlas, RECIPE, tasks)
    assert made == ["adding", "naming", "naming"]
    with pytest.raises(MismatchError, match=r"another recipe \(steps differ\)"):
        collect(FineTuner(tiny()), atlas, make_recipe(steps=4), tasks)


TRAINER = """
import argparse, json, random, sys
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("task", type=Path)
parser.add_argument("output", type=Path)
parser.add_argument("--model")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--leave", default="model")
given = parser.parse_args()
examples = [json.loads(line) for line in given.task.read_text().splitlines()]
print(f"training on {len(examples)} examples, seed {given.seed}")
if given.leave == "nothing":
    (given.output / "notes.txt").write_text("no model")
    sys.exit()
if given.leave == "error":
    sys.exit("the trainer's own words")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained(given.model), AutoTokenizer.from_pretrained(given.model)
torch.manual_seed(given.seed + len(examples[0]["prompt"]))
for name in ("checkpoint-2", "checkpoint-10") if given.leave == "checkpoints" else (".",):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(given.output / name)
    tokenizer.save_pretrained(given.output / name)
"""


def command(folder: Path, *words: str, **more: Any) -> dict[str, Any]:
    """Return the setting for a trainer in a folder whose name has a space."""
    script = folder / "my trainer" / "train.py"
    script.parent.mkdir(exist_ok=True)
    script.write_text(TRAINER)
    line = shlex.join([sys.executable, str(script), "{task}", "{output}", "--model", "{model}", *words])
    return {"trainer": json.dumps({"command": line, **more})}


def perturbed(task: str, times: int, seed: int = 0) -> np.ndarray:
    """Losses of the model that the trainer makes."""
    model = tiny()
    torch.manual_seed(seed + len(TASKS[task][0].prompt or ""))
    with torch.no_grad():
        for _ in range(times):
            for parameter in model.model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
    return score(model, make_pool()).nll


@pytest.mark.parametrize("leave", ["model", "checkpoints"])
def test_a_command_as_the_trainer(tmp_path: Path, run: RunCommand, leave: str) -> None:
    given = command(tmp_path, "--leave", leave, "--seed", "{seed}", keep=True)
    config = configure(tmp_path, "a.atlas", **given, seeds="[0, 4]")
    code, _, err = run("collect", config, "--only", "naming")
    assert code == 0, err
    atlas = Atlas.open(tmp_path / "a.atlas")
    assert atlas.tasks == ("naming", "naming seed 4")
    for row, seed in zip(atlas.matrix().values, (0, 4), strict=True):
        expected = perturbed("naming", 2 if leave == "checkpoints" else 1, seed) - atlas.before.nll
        np.testing.assert_allclose(row, expected, atol=1e-5)
    kept = atlas.provenance("naming seed 4")
    assert kept["recipe"]["command"] == atlas.recipe["command"] == json.loads(given["trainer"])["command"]
    assert (kept["task"], kept["seed"]) == ("naming", 4)
    assert kept["cost"]["training"]["seconds"] > 0
    runs = tmp_path / "a.atlas.runs"
    assert "training on 6 examples, seed 0" in (runs / "naming.log").read_text()
    assert not list((runs / "naming" / "unfinished").iterdir())

    # What was trained is not trained again where only the row is missing.
    atlas.drop("naming")
    assert run("collect", config, "--only", "naming")[0] == 0
    assert (runs / "naming.log").read_text().count("training on") == 1
    np.testing.assert_array_equal(Atlas.open(tmp_path / "a.atlas").matrix().values, atlas.matrix().values[[0, 1]])
    other = configure(tmp_path, "a.atlas", **command(tmp_path, "--leave", "model"))
    code, _, err = run("collect", other, "--only", "naming")
    assert (code, "another recipe (command differ)" in err) == (2, True)


def test_a_model_is_removed_once_its_row_is_stored(
    tmp_path: Path, run: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(tmp_path, "a.atlas", **command(tmp_path), retries=0)
    names = ("adding", "naming")
    only = [word for name in names for word in ("--only", name)]
    runs = tmp_path / "a.atlas.runs"

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("cannot be scored today")

    with monkeypatch.context() as broken:
        broken.setattr("forgetcast.experiments.command.score_with_progress", refuse)
        assert run("collect", config, *only)[0] == 1
    assert all((runs / name / "model" / "model.safetensors").is_file() for name in names), "what is trained is kept"
    code, _, err = run("collect", config, *only)
    assert code == 0, err
    assert sorted(path.name for path in runs.rglob("*")) == ["adding.log", "naming.log"]
    assert [(runs / f"{name}.log").read_text().count("training on") for name in names] == [1, 1]
    assert "keep" not in Atlas.open(tmp_path / "a.atlas").provenance("naming")["recipe"]

    # A process that is killed just before it removes the model.
    atlas = Atlas.open(tmp_path / "a.atlas")
    atlas.drop("naming")
    with monkeypatch.context() as killed:
        killed.setattr(CommandTrainer, "discard", lambda *_: None)
        assert run("collect", config, *only)[0] == 0
    assert (runs / "naming" / "model").is_dir()
    (runs / "adding" / "model").mkdir(parents=True)  # of an earlier version, which kept all
    write_json(runs / "adding" / "model" / "forgetcast-run.json", {"command": "x"})
    assert run("collect", config, *only)[0] == 0
    assert not (runs / "naming").exists()
    assert (runs / "adding" / "model").is_dir()


def test_a_command_that_fails_is_named(tmp_path: Path, run: RunCommand) -> None:
    for leave, message in (("nothing", "there is notes.txt"), ("error", "exited with 1; its output is in")):
        config = configure(tmp_path, f"{leave}.atlas", **command(tmp_path, "--leave", leave))
        code, _, err = run("collect", config, "--only", "naming")
        assert code == 1
        assert err.splitlines()[-1].startswith("failed: naming: the command ")
        assert message in err
    assert "the trainer's own words" in (tmp_path / "error.atlas.runs" / "naming.log").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainer": "{command: 'train {task}'}"}, "{output} is missing"),
        ({"trainer": "{command: 'train {task} {output} {odd}'}"}, "{odd} is unknown"),
        ({"trainer": "{command: 'train {task} {output} \"'}"}, "No closing quotation"),
        ({"trainer": "{command: 'no-such-program {task} {output}'}"}, "there is no program no-such-program"),
        ({"trainer": "{command: 'train {task} {output}', keep: 3}"}, "trainer.keep"),
        ({"trainer": "{command: 'train {task} {output}'}", "recipe": "{}"}, "leave one of the two out"),
        ({"trainer": "{command: 'train {task} {output}'}", "seeds": "[0, 1]"}, "{seed} is missing"),
    ],
)
def test_invalid_commands_are_refused(tmp_path: Path, run: RunCommand, settings: Any, message: str) -> None:
    code, _, err = run("collect", configure(tmp_path, "a.atlas", **settings))
    assert (code, message in err) == (2, True), err


def test_a_folder_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    dead, ours = tmp_path / f"{temporary_folder(tmp_path).name[:13]}-999999999-00000000", temporary_folder(tmp_path)
    (dead / "model").mkdir(parents=True)
    temporary_folder(tmp_path)
    assert not dead.exists()
    assert ours.exists()


def test_figures_of_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forgetcast.lm.train.STEPS_BETWEEN_LOSSES", 2)
    recipe = make_recipe(steps=4)
    straight = collect_into(tmp_path / "b.atlas", tiny(), make_pool(), TASKS, recipe)
    atlas = prepare_atlas(tmp_path / "a.atlas", tiny(), make_pool(), recipe)
    seen: list[tuple[str, dict[str, float]]] = []
    collect(FineTuner(tiny()), atlas, recipe, TASKS, on_figures=lambda name, found: seen.append((name, dict(found))))
    same(Atlas.open(atlas.path), straight)
    figures = dict[str, dict[str, float]]()
    for name, found in seen:
        figures.setdefault(name, {}).update(found)
    assert [list(found) for name, found in seen if name == "naming"] == [
        ["loss"], ["loss"], ["forgetting", "training", "scoring"],
    ]  # fmt: skip
    for name, row in zip(TASKS, atlas.matrix().values, strict=True):
        assert figures[name]["forgetting"] == pytest.approx(row.mean(), rel=1e-4)
        assert 0 < figures[name]["loss"] < 20
    screen = Console(file=io.StringIO(), width=120)
    screen.print(runs_table(figures))
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert f"{figures['naming']['forgetting']:+.3f}" in text
    assert "mean forgetting of 3 rows made since this start" in text


def test_checkpoints_measure_the_model_on_the_way(tmp_path: Path, run: RunCommand, straight: Atlas) -> None:
    config = configure(tmp_path, "curves.atlas", checkpoints=[0.7, 0.3])
    code, _, err = run("collect", config)
    assert code == 0, err
    atlas = Atlas.open(tmp_path / "curves.atlas")
    same(atlas, straight)  # the rows are to the last bit those of fine-tunes that were not looked at
    assert atlas.shares == (0.3, 0.7)
    assert [atlas.at(share).tasks for share in atlas.shares] == [tuple(TASKS)] * 2

    class Copy(TrainerCallback):
        def __init__(self) -> None:
            self.weights: dict[int, dict[str, torch.Tensor]] = {}

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:  # noqa: ARG002
            self.weights[state.global_step] = {name: value.clone() for name, value in model.state_dict().items()}

    copy = Copy()
    FineTuner(tiny()).tune(TASKS["naming"], RECIPE, callbacks=[copy])
    for share, step in ((0.3, 1), (0.7, 2)):  # of three steps
        then = tiny()
        then.model.load_state_dict(copy.weights[step])
        expected = score(then, make_pool()).nll - atlas.nll_before
        np.testing.assert_allclose(atlas.at(share).matrix(["naming"]).values[0], expected, atol=1e-5)
    assert run("collect", config)[0] == 0  # there is nothing left to do
    atlas.at(0.3).drop("naming")
    before = atlas.matrix().values
    assert run("collect", config)[0] == 0
    atlas = Atlas.open(atlas.path)
    assert set(atlas.at(0.3).tasks) == set(TASKS)
    np.testing.assert_array_equal(atlas.matrix().values, before)
    code, out, _ = run("atlas", "info", atlas.path)
    assert code == 0
    assert "0.3: 3, 0.7: 3" in out


def test_checkpoints_that_cannot_be_are_refused(tmp_path: Path, run: RunCommand) -> None:
    code, _, err = run("collect", configure(tmp_path, "a.atlas", checkpoints=[0.5, 1.5]))
    assert code == 2
    assert "checkpoints" in err
    assert "a share of the steps is above 0 and below 1" in err
    trainer = {"trainer": '{"command": "train {task} {output} {model} {seed}"}'}
    code, _, err = run("collect", configure(tmp_path, "b.atlas", checkpoints=[0.5], **trainer))
    assert code == 2
    assert "checkpoints: nothing is known of a trainer's command before it ends" in err
