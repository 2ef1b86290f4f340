"""What is asked for is what is done, or what it becomes is said before anything is trained."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgetcast import Atlas, Pool, ReplayPlan, TaskForecast
from forgetcast.replay.plan import achieved_ratio, default_ratios, ratio_note, replay_steps
from support.cli import RunCommand
from support.training import make_recipe, measured_atlas, model_files


@pytest.fixture
def atlas(tmp_path: Path) -> Atlas:
    return measured_atlas(tmp_path, make_recipe(steps=14, batch_size=2))


class TestHeldOut:
    def test_the_share_is_that_asked_for_though_probes_are_left_out(
        self, tmp_path: Path, atlas: Atlas, run: RunCommand
    ) -> None:
        n = len(atlas.pool)
        probed = atlas.pool.hold_out(0.25)  # half of what would be held out
        mean = np.arange(n) / n
        at = np.isin(np.array(list(atlas.pool.ids)), probed)
        TaskForecast(
            tuple(atlas.pool.ids), mean, np.where(at, 0.0, 0.1), mean - 0.1, mean + 0.1, at, 0.9, 1.0, "bayesian",
            atlas.pool.fingerprint, "task",
        ).save(tmp_path / "forecast.parquet")  # fmt: skip
        for share in (0.5, 0.2):
            words = ("plan", atlas.path, "--forecast", tmp_path / "forecast.parquet", "--hold-out", share)
            code, out, err = run(*words, "-o", tmp_path / "plan.parquet", "--json")
            assert code == 0, err
            held = ReplayPlan.load(tmp_path / "plan.parquet").held_out_ids
            assert len(held) == round(share * n) == json.loads(out)["held_out"]
            assert (
                set(held)
                == set(atlas.hold_out(share, exclude=probed))
                == set(atlas.pool.hold_out(share, exclude=probed))
            )
            # By hand: the first of the hashes' order that were not probed.
            ranked = sorted(set(atlas.pool.ids) - set(probed), key=lambda i: hashlib.sha256(f"0:{i}".encode()).digest())
            assert set(held) == set(ranked[: round(share * n)])
        code, _, err = run(*words[:-1], 0.9, "-o", tmp_path / "plan.parquet")
        assert code == 2
        assert "is 36 of 40 examples, and only 30 can be held out" in err


class TestRatio:
    @given(steps=st.integers(1, 3000))
    def test_default_ratios_are_whole_batches(self, steps: int) -> None:
        few, many = default_ratios(steps)
        assert 0 < few < many
        for ratio in (few, many):
            assert achieved_ratio(steps, ratio) == ratio
            assert ratio_note(ratio, steps, 4) is None
        if steps >= 32:
            assert few == pytest.approx(1 / 32, rel=0.5)
            assert many == pytest.approx(1 / 8, rel=0.5)

    @given(steps=st.integers(1, 500), ratio=st.floats(0.01, 2))
    def test_what_a_ratio_becomes_is_said(self, steps: int, ratio: float) -> None:
        if round(steps * ratio) == 0:
            return
        said = ratio_note(ratio, steps, 4)
        assert (said is None) == bool(np.isclose(replay_steps(steps, ratio) / steps, ratio, rtol=1e-9, atol=0))
        if said is not None:
            count = replay_steps(steps, ratio)
            batches = "1 batch" if count == 1 else f"{count} batches"
            assert said.endswith(f": {batches} of 4 replayed examples and {steps} of new ones")

    def test_a_plan_says_what_it_replays(self, tmp_path: Path, atlas: Atlas, run: RunCommand) -> None:
        words = ("plan", atlas.path, "--strategy", "random", "--ratio", 0.25, "-o", tmp_path / "plan.parquet", "--json")
        code, out, err = run(*words)
        assert code == 0, err
        # 14 steps of 2: a quarter is 3.5 batches.
        assert "the ratio 0.25 into 0.2857: 4 batches of 2 replayed examples and 14 of new ones" in err
        told = {"replayed": 8, "new": 28, "recipe_steps": 14, "recipe_batch_size": 2, "achieved_ratio": 4 / 14}
        assert told.items() <= json.loads(out).items()
        assert ReplayPlan.load(tmp_path / "plan.parquet").recipe == make_recipe(steps=14, batch_size=2)
        (tmp_path / "recipe.yaml").write_text("{steps: 4, batch_size: 3}")
        code, out, err = run(*words, "--recipe", tmp_path / "recipe.yaml")
        assert (json.loads(out)["replayed"], "note:" in err) == (3, False)
        for steps, message in ((1, "replays no batch"), (400, "and the plan has")):
            (tmp_path / "recipe.yaml").write_text(f"{{steps: {steps}, batch_size: 3}}")
            code, out, err = run(*words, "--recipe", tmp_path / "recipe.yaml")
            assert code == 0
            assert f"warning: a fine-tune by this recipe is refused: {'a ratio' if steps == 1 else ''}" in err
            assert message in err
            assert "replayed" not in json.loads(out)

    def test_without_a_recipe_it_says_that(self, tmp_path: Path, run: RunCommand) -> None:
        bare = measured_atlas(tmp_path)
        code, out, err = run("plan", bare.path, "--strategy", "random", "-o", tmp_path / "plan.parquet", "--json")
        assert code == 0
        assert "the atlas has no recipe of ours" in err
        assert "replayed" not in json.loads(out)

    def test_examples_that_the_steps_do_not_reach_are_counted(self, tmp_path: Path, run: RunCommand) -> None:
        model_files(tmp_path)
        task = tmp_path / "task.jsonl"
        for steps, told in ((1, True), (len(Pool.load(task)), False)):
            (tmp_path / "short.yaml").write_text(f"{{steps: {steps}, batch_size: 1}}")
            recipe = ("--recipe", tmp_path / "short.yaml")
            code, _, err = run("train", tmp_path / "absent", task, *recipe, "-o", tmp_path / "out")
            assert code == 2
            assert (f"1 steps of 1 read 1 of the {len(Pool.load(task))} examples" in err) == told

    def test_before_anything_is_trained(self, tmp_path: Path, atlas: Atlas, run: RunCommand) -> None:
        """No model is there to be loaded, so the ratio was judged before."""
        model_files(tmp_path)
        plan, task = tmp_path / "plan.parquet", tmp_path / "task.jsonl"
        assert run("plan", atlas.path, "--strategy", "random", "--ratio", 0.25, "-o", plan)[0] == 0
        (tmp_path / "short.yaml").write_text("{steps: 14, batch_size: 2}")
        absent, other = tmp_path / "absent", tmp_path / "other.jsonl"
        other.write_bytes(task.read_bytes())
        recipe = ("--recipe", tmp_path / "short.yaml")
        for words in (
            ("train", absent, task, "--plan", plan, "--pool", tmp_path / "pool.jsonl", *recipe, "-o", tmp_path / "out"),
            ("verify", absent, task, "--atlas", atlas.path, "--plan", plan, "-o", tmp_path / "verification.json"),
            ("pilot", absent, task, "--atlas", atlas.path, "--ratios", "0.25"),
            ("sequence", absent, task, other, "--atlas", atlas.path, "--ratio", 0.25, "-o", tmp_path / "s.json"),
        ):
            code, _, err = run(*words)
            assert code == 2
            assert "note: whole batches turn the ratio 0.25 into 0.2857" in err, words
        code, _, err = run("pilot", absent, task, "--atlas", atlas.path, "--ratios", "1/32")
        assert code == 2
        assert "a ratio of 0.03125 over 14 steps replays no batch; use at least 0.0714" in err

    def test_a_pilot_chooses_what_the_steps_allow(self, tmp_path: Path, run: RunCommand) -> None:
        model_files(tmp_path)
        atlas = measured_atlas(tmp_path, make_recipe(steps=3, batch_size=2))
        words = ("pilot", tmp_path / "model", tmp_path / "task.jsonl", "--atlas", atlas.path, "--json")
        code, out, err = run(*words)
        assert code == 0, err
        assert "note:" not in err
        runs = json.loads(out)["runs"]
        assert [(run["ratio"], run["achieved_ratio"], run["replayed"]) for run in runs] == [
            (0.0, 0.0, 0), (1 / 3, 1 / 3, 2), (2 / 3, 2 / 3, 4)
        ]  # fmt: skip
        assert Pool.load(tmp_path / "pool.jsonl").fingerprint == atlas.pool_fingerprint


class TestSeveralTasks:
    """`verify` compares over tasks in one call, each with its own plan or all with one."""

    def test_each_has_its_plan(self, tmp_path: Path, run: RunCommand) -> None:
        model_files(tmp_path)
        atlas = measured_atlas(tmp_path, make_recipe(steps=2, batch_size=2))
        for name in ("law", "code"):
            (tmp_path / f"{name}.jsonl").write_bytes((tmp_path / "task.jsonl").read_bytes())
            words = ("plan", atlas.path, "--ratio", 0.5, "--hold-out", {"law": 0.3, "code": 0.5}[name])
            assert run(*words, "-o", tmp_path / f"{name}.parquet")[0] == 0
        tasks = (tmp_path / "law.jsonl", tmp_path / "code.jsonl")
        verify = ("verify", tmp_path / "model", *tasks, "--atlas", atlas.path, "-o", tmp_path / "v.json", "--json")
        law, code = (("--plan", f"{name}={tmp_path / f'{name}.parquet'}") for name in ("law", "code"))
        status, _, err = run(*verify, *law)
        assert status == 2
        assert "the task 'code' has no plan; give one as --plan code=FILE" in err
        status, _, err = run(*verify, "--plan", f"poetry={tmp_path / 'law.parquet'}")
        assert status == 2
        assert "there is no task 'poetry'; there are law, code" in err
        status, out, err = run(*verify, *law, *code, "--seeds", 1)
        assert status == 0, err
        found = json.loads(out)
        assert [(run_["task"], run_["arm"]) for run_ in found["runs"]] == [
            (task, arm) for task in ("law", "code") for arm in ("none", "random", "top")
        ]
        assert {name: len(ids) for name, ids in found["held_out"].items()} == {"law": 12, "code": 20}
        for comparison in found["comparisons"]:
            assert (comparison["tasks"], comparison["pairs"]) == (2, 2)
            assert comparison["wilcoxon_p"] is None
        assert found["judged"] == 12
        assert set(found["arms"]["top"]) >= {"mean", "worst_tenth"}
        assert "worst_hundredth" not in found["arms"]["top"]


class TestRecipe:
    """A fine-tune without --recipe takes that of the plan, else of the atlas, else the defaults, and says which."""

    def test_of_the_plan(self, tmp_path: Path, run: RunCommand) -> None:
        model_files(tmp_path)
        recipe = make_recipe(steps=4, batch_size=2)
        atlas = measured_atlas(tmp_path, recipe)
        plan = tmp_path / "plan.parquet"
        assert run("plan", atlas.path, "--strategy", "random", "--ratio", 0.25, "-o", plan)[0] == 0
        words = (
            "train",
            tmp_path / "model",
            tmp_path / "task.jsonl",
            "--plan",
            plan,
            "--pool",
            tmp_path / "pool.jsonl",
        )
        code, out, err = run(*words, "-o", tmp_path / "tuned", "--json")
        assert code == 0, err
        assert "no --recipe: that of the plan: full, 4 steps of 2 examples" in err
        assert json.loads(out)["replayed"] == 2
        assert json.loads((tmp_path / "tuned" / "run.json").read_text())["recipe"] == recipe.model_dump()

    @pytest.mark.parametrize("with_atlas", [True, False])
    def test_without_a_plan(self, tmp_path: Path, run: RunCommand, with_atlas: bool) -> None:
        """No model is there, so it was said before one is loaded."""
        model_files(tmp_path)
        atlas = measured_atlas(tmp_path, make_recipe(steps=5))
        words = ("train", tmp_path / "absent", tmp_path / "task.jsonl", "-o", tmp_path / "tuned")
        code, _, err = run(*words, *(("--watch", atlas.path) if with_atlas else ()))
        assert code == 2
        assert (f"that of {atlas.path}: full, 5 steps" if with_atlas else "the defaults: full, 200 steps of 8") in err
        assert "no --recipe" not in run(*words, "--recipe", tmp_path / "recipe.yaml")[2]

    def test_an_atlas_without_one_is_no_guess(self, tmp_path: Path, run: RunCommand) -> None:
        model_files(tmp_path)
        atlas = measured_atlas(tmp_path)
        plan, task = tmp_path / "plan.parquet", tmp_path / "task.jsonl"
        assert run("plan", atlas.path, "--strategy", "random", "-o", plan)[0] == 0
        for words in (
            ("verify", tmp_path / "absent", task, "--atlas", atlas.path, "--plan", plan, "-o", tmp_path / "v.json"),
            ("pilot", tmp_path / "absent", task, "--atlas", atlas.path),
        ):
            code, _, err = run(*words)
            assert code == 2
            assert "has no recipe of ours: say with --recipe how to fine-tune" in err


class TestColumns:
    """Columns of one task of several are named with the task."""

    @pytest.fixture
    def tasks(self, tmp_path: Path) -> Path:
        model_files(tmp_path)
        (tmp_path / "tasks").mkdir()
        (tmp_path / "tasks" / "law.csv").write_text("frage,antwort\n2 + 2 =, 4\n3 + 3 =, 6\n")
        (tmp_path / "tasks" / "code.jsonl").write_bytes((tmp_path / "task.jsonl").read_bytes())
        (tmp_path / "config.yaml").write_text(
            "{model: ./model, pool: pool.jsonl, tasks: tasks, atlas: c.atlas,"
            " recipe: {steps: 1, batch_size: 2, max_length: 32}}"
        )
        return tmp_path

    @pytest.mark.parametrize("named", [[], ["prompt=frage"]])
    def test_what_is_wrong_says_how(self, tasks: Path, run: RunCommand, named: list[str]) -> None:
        code, _, err = run("collect", tasks / "config.yaml", *(w for each in named for w in ("--column", each)))
        assert code == 2
        assert "to name a column of one task, write --column TASK:FIELD=NAME" in err

    def test_an_unknown_task(self, tasks: Path, run: RunCommand) -> None:
        code, _, err = run("collect", tasks / "config.yaml", "--column", "lwa:prompt=frage")
        assert code == 2
        assert "--column lwa:prompt=frage: there is no task 'lwa'; there are code, law; did you mean law?" in err

    def test_each_task_is_read_by_its_own(self, tasks: Path, run: RunCommand) -> None:
        own = ("--column", "law:prompt=frage", "--column", "law:completion=antwort")
        code, _, err = run("collect", tasks / "config.yaml", *own)
        assert code == 0, err
        assert "law.csv: prompt and completion, 2 examples" in err
        assert set(Atlas.open(tasks / "c.atlas").tasks) == {"law", "code"}

    def test_of_the_sources_of_a_pool(self, tasks: Path, run: RunCommand) -> None:
        sources = (tasks / "tasks" / "law.csv", tasks / "tasks" / "code.jsonl", "-o", tasks / "made.jsonl")
        own = ("--column", "law:prompt=frage", "--column", "law:completion=antwort")
        code, _, err = run("pool", *sources)
        assert code == 2
        assert "to name a column of one source, write --column SOURCE:FIELD=NAME" in err
        code, _, err = run("pool", *sources, "--column", "lwa:prompt=frage")
        assert "there is no source 'lwa'; there are law, code; did you mean law?" in err
        code, _, err = run("pool", *sources, *own)
        assert code == 0, err
        made = Pool.load(tasks / "made.jsonl")
        assert sum(source == "law" for source in made.sources) == 2
        assert len(made) == 2 + len(Pool.load(tasks / "task.jsonl"))
