"""Models of a sweep that are kept, and what they are good for: the rows of another pool."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.test_sweep import RECIPE, configure
from forgetcast import Atlas, ConfigError
from forgetcast.experiments.collect import CollectConfig, Sweep, collect, prepare_atlas
from forgetcast.experiments.command import CommandTrainer, TrainerSettings
from forgetcast.experiments.kept import KeptModels
from forgetcast.lm import FineTuner, load
from support.cli import RunCommand
from support.data import make_pool
from support.models import tiny
from support.training import TASKS


@pytest.mark.parametrize("method", ["full", "lora"])
def test_kept_models_give_the_rows_of_another_pool(tmp_path: Path, run: RunCommand, method: str) -> None:
    """Oracle: a sweep over the other pool."""
    recipe = RECIPE.model_copy(update={"method": method}).model_dump_json()
    settings: dict[str, Any] = {"recipe": recipe, "seeds": [0, 1]}
    only = ["--only", "naming"]
    config = configure(tmp_path, "a.atlas", **settings, keep_models="models")
    code, _, err = run("collect", config, *only)
    assert (code, f"models kept in {tmp_path / 'models'}: 2" in err) == (0, True), err
    models, atlas = tmp_path / "models", Atlas.open(tmp_path / "a.atlas")
    assert sorted(path.name for path in models.iterdir()) == ["naming", "naming seed 1"]
    assert sorted(path.name for path in tmp_path.glob("a.atlas*")) == ["a.atlas", "a.atlas.yaml"]
    for name in atlas.tasks:
        assert load(models / name).weights_hash == atlas.provenance(name)["model_hash"]

    other = make_pool(33).subset(make_pool(33).ids[20:])
    other.save(tmp_path / "other.jsonl")
    assert run("collect", configure(tmp_path, "b.atlas", **settings, pool="other.jsonl"), *only)[0] == 0
    assert run("atlas", "create", tmp_path / "model", tmp_path / "other.jsonl", "-o", tmp_path / "c.atlas")[0] == 0
    code, _, err = run("add", tmp_path / "c.atlas", models)
    assert code == 0, err
    swept, added = Atlas.open(tmp_path / "b.atlas"), Atlas.open(tmp_path / "c.atlas")
    assert set(swept.tasks) == set(added.tasks)
    np.testing.assert_allclose(added.matrix(swept.tasks).values, swept.matrix().values, atol=1e-5)
    assert added.provenance("naming seed 1")["recipe"] == swept.provenance("naming seed 1")["recipe"]


def test_rows_without_a_model_are_told_and_made_again_once_dropped(tmp_path: Path, run: RunCommand) -> None:
    assert run("collect", configure(tmp_path, "a.atlas"), "--only", "naming")[0] == 0
    config = configure(tmp_path, "a.atlas", keep_models="models")
    code, _, err = run("collect", config, "--only", "naming", "--only", "adding")
    assert code == 0
    assert f"models kept in {tmp_path / 'models'}: 1\n" in err
    assert "stored without keeping them: 1 (naming); drop such a row" in err
    assert run("atlas", "drop", tmp_path / "a.atlas", "naming")[0] == 0
    code, _, err = run("collect", config, "--only", "naming", "--only", "adding")
    assert (code, f"models kept in {tmp_path / 'models'}: 2\n" in err, "note:" in err) == (0, True, False)


def test_a_model_of_another_fine_tune_is_never_replaced(tmp_path: Path, run: RunCommand) -> None:
    assert run("collect", configure(tmp_path, "a.atlas", keep_models="models"), "--only", "naming")[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "models").rglob("*") if path.is_file()}
    recipe = RECIPE.model_copy(update={"steps": 2}).model_dump_json()
    config = configure(tmp_path, "b.atlas", keep_models="models", recipe=recipe)
    code, _, err = run("collect", config, "--only", "naming", "--only", "adding")
    assert code == 1
    assert f"failed: naming: {tmp_path / 'models' / 'naming'} is of a fine-tune with another recipe; remove it" in err
    assert Atlas.open(tmp_path / "b.atlas").tasks == ("adding",)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_sweep_that_is_interrupted_keeps_the_model_of_its_row(tmp_path: Path) -> None:
    pool, tasks = make_pool(30), {"naming": TASKS["naming"]}
    sweep = Sweep(keep_models=tmp_path / "models")

    def interrupt(what: str, *_: int) -> None:
        if what == "naming: scoring":
            os.kill(os.getpid(), signal.SIGINT)

    atlas = prepare_atlas(tmp_path / "a.atlas", tiny(), pool, RECIPE)
    with pytest.raises(KeyboardInterrupt):
        collect(FineTuner(tiny()), atlas, RECIPE, tasks, sweep=sweep, on_progress=interrupt)
    assert atlas.tasks == ()
    collect(FineTuner(tiny()), atlas, RECIPE, tasks, sweep=sweep)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["naming"]
    assert load(tmp_path / "models" / "naming").weights_hash == atlas.provenance("naming")["model_hash"]


def test_a_command_has_a_setting_of_its_own(tmp_path: Path, run: RunCommand) -> None:
    config = configure(tmp_path, "a.atlas", trainer="{command: 'true {task} {output}'}", keep_models="models")
    code, _, err = run("collect", config)
    assert (code, "keep: true below trainer" in err) == (2, True), err
    trainer = CommandTrainer(TrainerSettings(command="true {task} {output}"), "model", tmp_path / "runs", load)
    pool = make_pool()
    atlas = prepare_atlas(tmp_path / "b.atlas", tiny(), pool, trainer.settings)
    with pytest.raises(ConfigError, match="keep_models is for a recipe"):
        collect(trainer, atlas, RECIPE, TASKS, sweep=Sweep(keep_models=tmp_path / "models"))
    code, _, err = run("collect", configure(tmp_path, "a.atlas", keep_models="true"))
    assert (code, "keep_models: must be" in err, "not true" in err) == (2, True, True), err


def test_where_a_model_is_kept(tmp_path: Path) -> None:
    kept = KeptModels(tmp_path)
    assert kept.path("law seed 1") == tmp_path / "law seed 1"
    for odd in ("a/b", "..", ".hidden", "x" * 300, "ж" * 120):
        path = kept.path(odd)
        assert path.parent == tmp_path
        assert not path.name.startswith(".")
        path.mkdir()
    assert kept.lacking(["a/b", "law"]) == ["law"]
    config = tmp_path / "c.yaml"
    config.write_text("model: m\npool: p.jsonl\ntasks: t\natlas: a.atlas\nkeep_models: models\n")
    assert CollectConfig.load(config).keep_models == tmp_path / "models"
