"""Rows from models, adapters and scores that exist already: the command `add`, end to end on real tiny models."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from forgetcast import Atlas, Pool, Scores
from forgetcast.errors import ConfigError, DataError
from forgetcast.experiments import add_models, find_models
from forgetcast.experiments.add import recipe_of, weights_file
from forgetcast.lm import SharedBase, load, score
from support.adapters import adapted_model, lora, save_adapter
from support.cli import RunCommand
from support.data import make_pool
from support.models import save, tiny
from support.training import Interruption, make_recipe

POOL = make_pool(16)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, three adapters in a folder, two checkpoints of a run, and a whole model."""
    folder = tmp_path_factory.mktemp("models")
    base = tiny()
    save(base, folder / "base")
    names = ("adapters/law", "adapters/code", "adapters/medicine", "run/checkpoint-9", "run/checkpoint-10")
    for seed, name in enumerate(names):
        adapted = adapted_model(load(folder / "base").model, lora(r=4 if seed else 8), seed=seed)
        save_adapter(adapted, base.tokenizer, folder / name)
    (folder / "adapters" / "logs").mkdir()
    save(replace(tiny(seed=0), model=tiny(seed=7).model), folder / "whole")
    POOL.save(folder / "pool.jsonl")
    return folder


@pytest.fixture
def atlas(models: Path, tmp_path: Path) -> Path:
    """An atlas of the base model, without rows."""
    Atlas.create(tmp_path / "runs.atlas", POOL, score(load(models / "base"), POOL), model=str(models / "base"))
    return tmp_path / "runs.atlas"


def expected(atlas: Path, model: Path) -> np.ndarray:
    """Forgetting of a model that is loaded for itself."""
    opened = Atlas.open(atlas)
    return np.asarray(score(load(model), opened.pool).nll - opened.nll_before).astype(np.float32)


def added(run: RunCommand, *words: object) -> dict[str, dict[str, Any]]:
    """Run `add` without a failure, and return what became of each row."""
    code, out, err = run("add", *words, "--json")
    assert code == 0, err
    return {row["name"]: row for row in json.loads(out)["rows"]}


def test_a_folder_of_adapters_becomes_rows(models: Path, atlas: Path, run: RunCommand) -> None:
    code, out, err = run("add", atlas, models / "adapters", models / "whole", "--json")
    assert code == 0, err
    assert f"{models / 'adapters' / 'logs'} is no model: ignored" in err
    rows = {row["name"]: row for row in json.loads(out)["rows"]}
    assert list(rows) == ["code", "law", "medicine", "whole"]
    assert {row["status"] for row in rows.values()} == {"added"}
    opened = Atlas.open(atlas)
    for name in ("code", "law", "medicine"):
        np.testing.assert_array_equal(opened.matrix([name]).values[0], expected(atlas, models / "adapters" / name))
    np.testing.assert_array_equal(opened.matrix(["whole"]).values[0], expected(atlas, models / "whole"))
    stored = opened.provenance("law")
    text = load(models / "adapters" / "law").text_settings
    assert stored["kind"] == "adapter"
    assert stored["model_hash"] == load(models / "adapters" / "law").weights_hash
    assert stored["weights_file"] == weights_file(str(models / "adapters" / "law"))
    assert (stored["text"]["tokenizer"], stored["text"]["template"]) == (text["tokenizer"], text["template"])
    assert {"forgetcast", "torch", "transformers", "peft"} <= set(stored["versions"])
    assert stored["cost"]["scoring"]["tokens"] == score(load(models / "base"), POOL).tokens.sum()
    assert stored["cost"]["scoring"]["seconds"] > 0
    assert stored["recipe"] == {}
    assert stored["adapter"]["r"] == 8

    again = added(run, atlas, models / "adapters")
    assert {row["reason"] for row in again.values()} == {"the row exists and is complete"}
    assert [len(Atlas.open(atlas).tasks), Atlas.open(atlas).info()["rows"][0]["parts"]] == [4, 1]


def test_checkpoints_are_called_after_their_run_and_sorted(models: Path, atlas: Path, run: RunCommand) -> None:
    code, _, err = run("add", atlas, models / "run")
    assert code == 0, err
    assert "is called 'run/checkpoint-9'" in err
    assert Atlas.open(atlas).tasks == ("run/checkpoint-9", "run/checkpoint-10")
    # Neither says what the other would be worth as a new task.
    assert Atlas.open(atlas).stored().groups == ("run", "run")
    assert Atlas.open(atlas).others("run/checkpoint-9") == ()


def test_names(models: Path, tmp_path: Path) -> None:
    law = str(models / "adapters" / "law")
    assert find_models([law, "org/law"]).models == {"adapters/law": law, "org/law": "org/law"}
    assert find_models(["org/llama-law"]).models == {"llama-law": "org/llama-law"}
    assert find_models([law], "contracts").models == {"contracts": law}
    with pytest.raises(ConfigError, match="--name is for one model, and there are 3"):
        find_models([str(models / "adapters")], "contracts")
    with pytest.raises(DataError, match="would both be called 'adapters/law'"):
        find_models([law, law])
    with pytest.raises(DataError, match="holds neither a model nor an adapter"):
        find_models([str(tmp_path)])


def test_probes_give_a_part_of_a_row_that_is_completed_later(models: Path, atlas: Path, run: RunCommand) -> None:
    adapters = models / "adapters"
    first = added(run, atlas, adapters / "law", adapters / "code", "--probes", 5)
    assert [row["measured"] for row in first.values()] == [5, 5]
    assert {(row["mean_of"], row["examples"]) for row in first.values()} == {(5, len(POOL))}
    assert "the atlas had fewer than two rows, so that its probes are a random sample" in first["law"]["notes"]
    chosen = added(run, atlas, adapters / "medicine", "--probes", 5)
    assert chosen["medicine"]["notes"] == []
    opened = Atlas.open(atlas)
    measured = opened.matrix(["medicine"]).values[0]
    assert chosen["medicine"]["mean"] == pytest.approx(np.nanmean(measured))  # of these five alone
    assert [opened.provenance(name)["probes"] for name in opened.tasks] == [
        "at random",
        "at random",
        "most informative",
    ]
    assert (~np.isnan(opened.matrix().values)).sum(axis=1).tolist() == [5, 5, 5]

    same = added(run, atlas, adapters / "law", "--probes", 5)
    assert same["law"]["reason"] == "the row exists and has 5 examples or more"
    assert added(run, atlas, adapters / "law", "--probes", 7)["law"]["measured"] == 2
    rest = added(run, atlas, adapters / "law")["law"]
    assert (rest["measured"], rest["mean_of"]) == (len(POOL) - 7, len(POOL) - 7)
    values = Atlas.open(atlas).matrix(["law"]).values[0]
    np.testing.assert_allclose(values, expected(atlas, adapters / "law"), rtol=0, atol=1e-5)  # in other batches
    code, _, err = run("add", atlas, adapters / "law", "--probes", 17)
    assert (code, "17 probes cannot be chosen" in err) == (2, True)


def test_models_answer_where_the_atlas_has_answers(models: Path, tmp_path: Path, run: RunCommand) -> None:
    path = tmp_path / "answers.atlas"
    # What the base model answers is right, so that there is something to forget.
    opened_pool = Pool.load(models / "pool.jsonl")
    code, _, err = run(
        "atlas", "create", models / "base", models / "pool.jsonl", "-o", path, "--exact-match", "--max-new-tokens", 3
    )
    assert code == 0, err
    created = Atlas.open(path)
    assert created.has_answers
    assert created.pool.fingerprint == opened_pool.fingerprint
    assert created.scored_with["max_new_tokens"] == 3
    answered = tuple(created.before.predictions or ())
    right = [
        replace(example, completion=answer) if answer else example
        for example, answer in zip(opened_pool, answered, strict=True)
    ]
    Pool(right).save(tmp_path / "right.jsonl")
    path = tmp_path / "right.atlas"
    assert (
        run(
            "atlas",
            "create",
            models / "base",
            tmp_path / "right.jsonl",
            "-o",
            path,
            "--exact-match",
            "--max-new-tokens",
            3,
        )[0]
        == 0
    )
    assert Atlas.open(path).right_before.any()
    added(run, path, models / "whole")
    flipped = Atlas.open(path).matrix(measure="exact_match").values
    assert flipped.shape == (1, Atlas.open(path).right_before.sum())
    assert (flipped == 1).any()
    assert Atlas.open(path).is_complete("whole")


def test_scores_made_elsewhere(models: Path, atlas: Path, tmp_path: Path, run: RunCommand) -> None:
    law = models / "adapters" / "law"
    scores = score(load(law), POOL)
    scores.save(tmp_path / "law.parquet")
    scores.subset(POOL.ids[:3]).save(tmp_path / "part.parquet")
    assert added(run, atlas, "--scores", tmp_path / "part.parquet", "--name", "law")["law"]["measured"] == 3
    row = added(run, atlas, "--scores", tmp_path / "law.parquet")["law"]
    assert (row["status"], row["measured"]) == ("added", len(POOL) - 3)
    np.testing.assert_array_equal(Atlas.open(atlas).matrix().values[0], expected(atlas, law))
    assert added(run, atlas, "--scores", tmp_path / "law.parquet")["law"]["status"] == "skipped"
    assert Atlas.open(atlas).provenance("law")["model_hash"] == scores.metadata["model_hash"]

    before = sorted(path.name for path in atlas.rglob("*"))
    for words, reason in (
        ((models / "whole", "--scores", tmp_path / "law.parquet"), "give models, or --scores FILE"),
        ((), "give models, or --scores FILE"),
        (("--scores", tmp_path / "law.parquet", "--probes", 3), "--probes is for models"),
        (("--scores", tmp_path / "none.parquet"), "none.parquet"),
        (("--scores", models / "pool.jsonl"), "forgetcast score MODEL POOL -o SCORES.parquet"),
        (("--scores", models / "adapters"), "forgetcast atlas import --logs BASE_LOGS LOGS... -o NEW.atlas"),
    ):
        code, _, err = run("add", atlas, *words)
        assert (code, err.count("\n")) == (2, 1)
        assert reason in err
    Scores.load(atlas / "before.parquet").save(tmp_path / "base.parquet")
    code, _, err = run("add", atlas, "--scores", tmp_path / "base.parquet")
    assert (code, "is the base model of the atlas" in err) == (2, True)
    assert sorted(path.name for path in atlas.rglob("*")) == before


def test_a_failing_model_does_not_stop_the_rest(models: Path, atlas: Path, tmp_path: Path, run: RunCommand) -> None:
    save(replace(tiny(), model=tiny(seed=1).model), tmp_path / "other-base")
    foreign = save_adapter(
        adapted_model(load(tmp_path / "other-base").model, lora()), tiny().tokenizer, tmp_path / "foreign"
    )
    save(tiny(seed=2, bos=False), tmp_path / "other-tokens")
    homeless = shutil.copytree(models / "adapters" / "code", tmp_path / "homeless")
    config = homeless / "adapter_config.json"
    config.write_text(config.read_text().replace(str(models / "base"), str(tmp_path / "gone")))
    broken = shutil.copytree(models / "whole", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"nothing")
    reasons = {
        "base": "is the base model of the atlas",
        "foreign": f"is an adapter of {tmp_path / 'other-base'}, whose weights are not those of the atlas's base model",
        "other-tokens": "on other tokens or targets than before",
        "homeless": "does not exist",
        "broken": "cannot be loaded",
        "none": "there is no such directory",
    }
    wrong = [models / "base", foreign, tmp_path / "other-tokens", homeless, broken, tmp_path / "none"]
    code, out, err = run("add", atlas, *wrong[:3], models / "adapters" / "law", *wrong[3:], "--json")
    assert code == 1
    rows = {row["name"]: row for row in json.loads(out)["rows"]}
    assert rows.pop("law")["status"] == "added"
    assert list(rows) == list(reasons)
    for name, reason in reasons.items():
        assert rows[name]["status"] == "failed"
        assert reason in rows[name]["reason"]
        assert f"failed: {name}: {rows[name]['reason']}" in err
    assert Atlas.open(atlas).tasks == ("law",)

    files = sorted(path.name for path in atlas.rglob("*"))
    assert run("add", atlas, *wrong)[0] == 2
    assert sorted(path.name for path in atlas.rglob("*")) == files
    row = added(run, atlas, tmp_path / "other-tokens", "--allow-different-tokens")["other-tokens"]
    assert any("had other tokens than for the base model" in note for note in row["notes"])
    assert Atlas.open(atlas).provenance("other-tokens")["different_tokens"] == len(POOL)


def test_a_name_that_another_model_has(models: Path, atlas: Path, tmp_path: Path, run: RunCommand) -> None:
    added(run, atlas, models / "adapters" / "law")
    other = shutil.copytree(models / "adapters" / "code", tmp_path / "law")
    code, _, err = run("add", atlas, other)
    assert (code, "the row 'law'" in err, "is of another model" in err) == (2, True, True)
    run("atlas", "drop", atlas, "law")
    added(run, atlas, models / "adapters" / "law", "--probes", 4)
    code, _, err = run("add", atlas, other)
    assert (code, "is of another model" in err) == (2, True)
    assert added(run, atlas, other, "--name", "law-2")["law-2"]["status"] == "added"


def test_a_base_whose_hash_is_unknown_is_compared_by_name(models: Path, tmp_path: Path, run: RunCommand) -> None:
    before = score(load(models / "base"), POOL)
    unknown = replace(before, metadata={k: v for k, v in before.metadata.items() if k != "model_hash"})
    Atlas.create(tmp_path / "a.atlas", POOL, unknown, model=str(models / "base"))
    Atlas.create(tmp_path / "b.atlas", POOL, unknown, model="org/another")
    row = added(run, tmp_path / "a.atlas", models / "adapters" / "law")["law"]
    assert "compared by its name only" in row["notes"][0]
    code, _, err = run("add", tmp_path / "b.atlas", models / "adapters" / "law")
    assert (code, "was measured on org/another" in err) == (2, True)


def test_the_recipe_is_known_where_forgetcast_trained(
    models: Path, atlas: Path, tmp_path: Path, run: RunCommand
) -> None:
    recipe = make_recipe(method="lora", seed=5)
    (tmp_path / "recipe.yaml").write_text(recipe.model_dump_json())
    task = tmp_path / "task.jsonl"
    make_pool(8).save(task)
    code, _, err = run("train", models / "base", task, "--recipe", tmp_path / "recipe.yaml", "-o", tmp_path / "tuned")
    assert code == 0, err
    assert recipe_of(str(tmp_path / "tuned")) == recipe
    added(run, atlas, tmp_path / "tuned")
    stored = Atlas.open(atlas).provenance("tuned")
    assert (stored["recipe"], stored["seed"]) == (recipe.model_dump(), 5)
    checkpoint = shutil.copytree(models / "run" / "checkpoint-9", tmp_path / "tuned" / "checkpoint-3")
    assert recipe_of(str(checkpoint)) == recipe
    state = {"global_step": 3, "train_batch_size": 8, "log_history": []}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    added(run, atlas, checkpoint)
    kept = Atlas.open(atlas).provenance("tuned/checkpoint-3")
    assert kept["trainer"] == {"global_step": 3, "train_batch_size": 8}
    for content in ("[", "[]", '{"recipe": {"learning_rate": "fast"}}', '{"task": 1}'):
        (checkpoint / "run.json").write_text(content)
        assert recipe_of(str(checkpoint)) is None


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """URL of a place in memory."""
    monkeypatch.setenv("FORGETCAST_CACHE", str(tmp_path / "cache"))
    url = f"memory://{tmp_path.name}"
    yield url
    fsspec.filesystem("memory").rm(url, recursive=True)


def test_an_atlas_at_a_url(models: Path, memory: str, tmp_path: Path, run: RunCommand) -> None:
    url = f"{memory}/runs.atlas"
    code, out, err = run("atlas", "create", models / "base", models / "pool.jsonl", "-o", url)
    assert code == 0, err
    assert f"next: forgetcast add {url} MODEL" in " ".join(out.split())
    added(run, url, models / "adapters")
    facts = json.loads(run("atlas", "info", url, "--json")[1])
    assert [(row["task"], row["measured"]) for row in facts["rows"]] == [("code", 1), ("law", 1), ("medicine", 1)]
    assert facts["bytes"] > 1000
    for words in (("analyze", url), ("probes", url, "-k", 3, "-o", tmp_path / "probes.jsonl")):
        assert run(*words)[0] == 0
    assert len(Pool.load(tmp_path / "probes.jsonl")) == 3
    assert run("atlas", "drop", url, "law")[0] == 0
    assert Atlas.open(url).tasks == ("code", "medicine")


def test_an_interrupted_model_is_resumed(models: Path, atlas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row is that of a model scored in one go, and no example is measured twice."""
    module = importlib.import_module("forgetcast.lm.score")
    monkeypatch.setattr(module, "BATCH_TOKENS", 64)
    sums, measured = module._rows, list[int]()

    def counted(measure: Any, pieces: Any, padding: int) -> Any:
        measured.append(len(pieces))
        return sums(measure, pieces, padding)

    monkeypatch.setattr(module, "_rows", counted)
    law, opened = models / "adapters" / "law", Atlas.open(atlas)
    right, measured[:] = expected(atlas, law), []

    def stop(_: str, done: int, total: int) -> None:
        if done > total / 2:
            raise Interruption

    unfinished = opened.unfinished("law")
    with pytest.raises(Interruption):
        add_models(opened, {"law": str(law)}, SharedBase(), on_progress=stop)
    assert 0 < sum(measured) < len(POOL)
    assert unfinished.is_file()
    assert Atlas.open(atlas).info()["tasks"] == 0
    (outcome,) = add_models(opened, {"law": str(law)}, SharedBase())
    assert (outcome.status, outcome.measured) == ("added", len(POOL))
    assert sum(measured) == len(POOL)
    np.testing.assert_array_equal(Atlas.open(atlas).matrix().values[0], right)
    assert not unfinished.exists()
    assert not [path for path in atlas.iterdir() if path.name.startswith(".")]


def test_a_failed_creation_leaves_nothing(models: Path, tmp_path: Path, run: RunCommand) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(models / "base", broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    before = sorted(tmp_path.rglob("*"))
    for model, pool in (("base", "none.jsonl"), ("none", "pool.jsonl"), (broken, "pool.jsonl")):
        code, _, err = run("atlas", "create", models / model, models / pool, "-o", tmp_path / "new" / "runs.atlas")
        assert (code, err.splitlines()[-1].startswith("error: ")) == (2, True)
        assert sorted(tmp_path.rglob("*")) == before


def test_the_place_is_tried_before_the_work(
    models: Path, atlas: Path, tmp_path: Path, run: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("forgetcast.lm.load", never)
    (tmp_path / "file").write_text("")
    create = ("atlas", "create", models / "base", models / "pool.jsonl", "-o")
    for place in (atlas, tmp_path / "file" / "below.atlas", "nowhere://x/y.atlas"):
        code, _, err = run(*create, place)
        assert (code, "Traceback" in err, len(err.strip().splitlines()[-1]) > 10) == (2, False, True)
    code, _, err = run("add", tmp_path / "none.atlas", models / "adapters")
    assert (code, "there is no such atlas" in err) == (2, True)
