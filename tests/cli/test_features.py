from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from forgetcast import Atlas, Example, Pool, Scores
from forgetcast.completion import Bayesian
from forgetcast.completion.forecast import TaskForecast
from forgetcast.completion.preflight import Preflight
from forgetcast.lm import LanguageModel, load, score
from forgetcast.measure import features as features_module
from forgetcast.measure.features import FeatureFolder
from forgetcast.replay import ReplayPlan
from support.cli import run_command
from support.data import make_pool
from support.models import save, tiny

EXAMPLES = list(make_pool(120))
POOL = Pool(EXAMPLES[:60])


@pytest.fixture(scope="module")
def base() -> LanguageModel:
    return tiny()


@pytest.fixture(scope="module")
def model(base: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(base, tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def atlas(base: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An atlas whose forgetting is known of each example: it depends on the base loss alone."""
    before = score(base, POOL)
    path = tmp_path_factory.mktemp("atlas") / "runs.atlas"
    made = Atlas.create(path, POOL, before, model="base")
    rng = np.random.default_rng(0)
    for task in range(8):
        forgetting = rng.uniform(0.5, 1.5) * (before.nll - 8) + rng.normal(0, 0.01, len(POOL))
        made.add(f"task{task}", Scores(before.ids, before.nll + forgetting, before.tokens, before.truncated))
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Sixty new examples, one of the pool under another id, one twice, and one that cannot be scored."""
    path, fields = tmp_path / "corpus.jsonl", ("text", "prompt", "completion", "source")
    rows = [{name: getattr(e, name) for name in fields if getattr(e, name) is not None} for e in EXAMPLES[60:]]
    rows = [{"id": f"c{i}", **row} for i, row in enumerate(rows)]
    rows.append({"id": "copy", "text": POOL[0].text})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_corpus_is_forecast_and_replayed_from(
    base: LanguageModel, model: Path, atlas: Path, corpus: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "corpus.features"
    code, out, err = run_command("features", model, corpus, "--atlas", atlas, "-o", folder, "--json")
    assert (code, json.loads(out)["examples"]) == (0, 61), err
    probes = POOL.subset(POOL.ids[:10])
    probed = score(base, probes)
    Scores(probed.ids, probed.nll + 1.2 * (probed.nll - 8), probed.tokens, probed.truncated).save(
        tmp_path / "p.parquet"
    )
    code, out, err = run_command(
        "forecast",
        atlas,
        "--scores",
        tmp_path / "p.parquet",
        "-o",
        tmp_path / "f.parquet",
        "--corpus",
        folder,
        "--json",
    )
    assert code == 0, err
    facts = json.loads(out)
    assert facts["corpus_examples"] == 61
    assert facts["corpus_explained"] > 0.8
    row = TaskForecast.load(tmp_path / "f.corpus.parquet")
    texts = Pool.load(corpus)
    assert row.pool_fingerprint == texts.fingerprint
    truth = 1.2 * (score(base, texts).at(row.ids) - 8)
    assert np.mean((row.mean - truth) ** 2) < 0.2 * truth.var()

    code, out, err = run_command(
        *("plan", atlas, "--forecast", tmp_path / "f.parquet", "--corpus", folder, "-o", tmp_path / "plan.parquet"),
        *("--hold-out", "0.5", "--json"),
    )
    assert code == 0, err
    assert json.loads(out)["corpus_overlapping"] == 1
    plan = ReplayPlan.load(tmp_path / "plan.parquet")
    joined = tmp_path / "both"
    joined.mkdir()
    POOL.save(joined / "pool.jsonl")
    (joined / "corpus.jsonl").write_bytes(corpus.read_bytes())
    plan.check_pool(Pool.load(joined))
    weights = dict(zip(plan.ids, plan.weights, strict=True))
    assert weights["copy"] == 0
    assert sum(weight > 0 for id_, weight in weights.items() if id_.startswith("c")) == 60
    assert ("copy" in plan.held_out_ids) == (POOL.ids[0] in plan.held_out_ids)
    order = [plan.ids[i] for i in np.argsort(np.where(plan.rank < 0, len(plan.ids), plan.rank))][:20]
    known = {id_: nll for pool in (POOL, texts) for id_, nll in zip(pool.ids, score(base, pool).nll, strict=True)}
    assert np.mean([known[id_] for id_ in order]) > np.mean(list(known.values()))


def test_a_corpus_drawn_from_gives_a_plan_of_the_corpus(model: Path, atlas: Path, tmp_path: Path) -> None:
    everything = Pool(EXAMPLES)
    everything.save(tmp_path / "all.jsonl")
    folder = tmp_path / "all.features"
    assert run_command("features", model, tmp_path / "all.jsonl", "--atlas", atlas, "-o", folder)[0] == 0
    code, _, err = run_command("plan", atlas, "--corpus", folder, "-o", tmp_path / "plan.parquet", "--hold-out", "0.5")
    assert code == 0, err
    assert "60 example(s) of the corpus are left out" in " ".join(err.split())
    plan = ReplayPlan.load(tmp_path / "plan.parquet")
    plan.check_pool(everything)
    assert len(plan.held_out_ids) == 30
    assert plan.usable == 120 - 30


def test_features_go_on_where_they_stopped_and_only_for_the_same_texts(
    model: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features_module, "PART", 20)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run_command("features", model, corpus, "-o", whole)[0] == 0
    assert run_command("features", model, corpus, "-o", broken)[0] == 0
    first = (broken / "corpus-00000.parquet").stat().st_mtime_ns
    for lost in ("corpus-00002.parquet", "corpus-00003.parquet"):
        (broken / lost).unlink()
    code, _, err = run_command("plan", "nowhere", "--corpus", broken, "-o", tmp_path / "p.parquet")
    assert code == 2
    assert run_command("features", model, corpus, "-o", broken)[0] == 0
    assert (broken / "corpus-00000.parquet").stat().st_mtime_ns == first
    a, b = FeatureFolder(whole).all("corpus"), FeatureFolder(broken).all("corpus")
    assert tuple(a.ids) == tuple(b.ids)
    np.testing.assert_array_equal(a.states, b.states)
    (tmp_path / "other.jsonl").write_text(corpus.read_text().replace("the", "thy"))
    code, _, err = run_command("features", model, tmp_path / "other.jsonl", "-o", broken)
    assert code == 2
    assert "other examples" in err


def test_features_of_another_model_are_refused(model: Path, atlas: Path, corpus: Path, tmp_path: Path) -> None:
    other, folder = save(tiny(seed=1), tmp_path / "other"), tmp_path / "other.features"
    code, _, err = run_command("features", other, corpus, "--atlas", atlas, "-o", folder)
    assert code == 2
    assert "another base model" in err
    assert run_command("features", other, corpus, "-o", folder)[0] == 0
    for words in (("plan", atlas, "--corpus", folder, "-o", tmp_path / "p"), ("features", model, corpus, "-o", folder)):
        code, _, err = run_command(*words)
        assert code == 2
        assert "another model" in err
    mine = tmp_path / "mine"
    assert run_command("features", model, corpus, "-o", mine)[0] == 0
    code, _, err = run_command("plan", atlas, "--corpus", mine, "-o", tmp_path / "p")
    assert code == 2
    assert "--atlas" in err


def test_a_strategy_that_needs_a_measurement_cannot_use_a_corpus(
    model: Path, atlas: Path, corpus: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "features"
    assert run_command("features", model, corpus, "--atlas", atlas, "-o", folder)[0] == 0
    before = Atlas.open(atlas).before
    before.save(tmp_path / "truth.parquet")
    code, _, err = run_command(
        *("plan", atlas, "--corpus", folder, "-o", tmp_path / "p"),
        *("--strategy", "truth", "--truth", tmp_path / "truth.parquet"),
    )
    assert code == 2
    assert "unknown" in err


def test_wide_states_are_projected_and_an_example_takes_less_than_a_kilobyte(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    settings = features_module.FeatureSettings(
        model="wide", model_hash="0" * 64, layers=(1, 2), width=2048, dimensions=384, max_length=512
    )
    folder = FeatureFolder.begin(tmp_path / "wide", settings)
    states = rng.normal(size=(2000, 4096)) * rng.lognormal(size=4096)
    stored = folder.set_basis(states).apply(states)
    assert stored.dtype == np.float16
    np.testing.assert_array_equal(FeatureFolder(tmp_path / "wide").basis.apply(states[:5]), stored[:5])
    # The standardised states' inner products are kept, up to the error of 384 random directions.
    standard = (states - states[:1024].mean(0)) / states[:1024].std(0)
    np.testing.assert_allclose(
        (stored[:50].astype(float) ** 2).sum(1) / (standard[:50] ** 2).sum(1), 1, atol=6 * np.sqrt(2 / 384)
    )
    import pyarrow as pa

    digests = [rng.bytes(16) for _ in range(2000)]
    table = features_module.Features(
        Pool([Example(f"example-{i:012d}", "a b") for i in range(2000)]).ids,
        ("source",) * 2000,
        np.full(2000, 2.5),
        np.full(2000, 77),
        stored,
        pa.array(digests, pa.binary(16)),
        pa.array([d * 2 for d in digests], pa.binary(32)),
        (None,) * 2000,
    )
    folder.write("corpus", 0, table)
    assert folder.parts("corpus")[0].stat().st_size < 1000 * 2000


def test_preflight_forecasts_before_anything_is_run(model: Path, atlas: Path, tmp_path: Path) -> None:
    texts, names = list(make_pool(40)), [f"task{i}" for i in range(8)]
    for i, name in enumerate([*names, "new"]):
        Pool(texts[i * 4 : i * 4 + 4]).save(tmp_path / "tasks" / f"{name}.jsonl")
    code, out, err = run_command(
        *("preflight", model, tmp_path / "tasks" / "new.jsonl", "--atlas", atlas, "--tasks", tmp_path / "tasks"),
        *("--level", "0.8", "-o", tmp_path / "f.parquet", "--json"),
    )
    assert code == 0, err
    assert "note: the texts of 8 tasks are too few to learn from, and are not used: it takes 9" in err
    facts = json.loads(out)
    assert (facts["with_text"], facts["tasks_of_the_atlas"]) == (8, 8)
    assert facts["mean_lower"] < facts["mean_forgetting"] < facts["mean_upper"]
    assert TaskForecast.load(tmp_path / "f.parquet").task == "new"
    code, out, err = run_command("preflight", model, tmp_path / "tasks" / "new.jsonl", "--atlas", atlas)
    assert code == 0
    assert "too few" in err
    assert "atlas's mean" in err
    assert "+- inf" not in err
    assert "the interval is for a task like" not in err  # there is none


@pytest.fixture(scope="module")
def begun(base: LanguageModel, atlas: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The atlas with curves at a quarter of the steps, where a third is forgotten; and a model that began to forget."""
    folder = tmp_path_factory.mktemp("begun")
    path = Path(shutil.copytree(atlas, folder / "runs.atlas"))
    opened = Atlas.open(path)
    before, rng = opened.before, np.random.default_rng(1)
    for i in range(8, 14):
        row = rng.uniform(0.5, 1.5) * (before.nll - 8) + rng.normal(0, 0.01, len(POOL))
        opened.add(f"task{i}", replace(before, nll=before.nll + row))
    matrix = opened.matrix()
    for task, row in zip(matrix.tasks, matrix.values, strict=True):
        opened.at(0.25).add(task, replace(before, nll=before.nll + row / 3))
    other = copy.deepcopy(base.model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    return path, save(replace(base, model=other), folder / "pilot")


def test_preflight_reads_tasks_that_have_their_own_columns(
    model: Path, begun: tuple[Path, Path], tmp_path: Path
) -> None:
    """The same texts under other names give the same forecast, and a column of one task is of no other."""
    texts, names = list(make_pool(60)), [f"task{i}" for i in range(14)]
    for i, name in enumerate([*names, "new"]):
        rows = [{"id": f"{j}", "text": each.full_text} for j, each in enumerate(texts[i * 4 : i * 4 + 4])]
        for folder, own in (("plain", "text"), ("own", "wort" if name in ("new", "task3") else "text")):
            (tmp_path / folder).mkdir(exist_ok=True)
            lines = [json.dumps({"id": row["id"], own: row["text"]}) for row in rows]
            (tmp_path / folder / f"{name}.jsonl").write_text("\n".join(lines))
    found = {}
    for folder, columns in (("plain", ()), ("own", ("--column", "new:text=wort", "--column", "task3:text=wort"))):
        words = ("preflight", model, tmp_path / folder / "new.jsonl", "--atlas", begun[0], "--tasks", tmp_path / folder)
        code, out, err = run_command(*words, *columns, "--json")
        assert code == 0, err
        found[folder] = json.loads(out)
    assert found["own"] == found["plain"]
    assert found["own"]["with_text"] == 14
    assert "rmse_text" in found["own"]
    code, _, err = run_command(*words, "--column", "new:text=wort")
    assert code == 2
    assert "task3.jsonl: the columns are id, wort" in err
    assert "--column TASK:FIELD=NAME" in err
    assert "loading" not in err  # before anything that takes long


def test_preflight_from_a_pilot(model: Path, begun: tuple[Path, Path], tmp_path: Path) -> None:
    """Oracle: the pilot's forgetting by `score`, and `Preflight` with the rows of the curve by hand."""
    path, pilot = begun
    Pool(list(make_pool(4))).save(tmp_path / "new.jsonl")
    words = ("preflight", model, tmp_path / "new.jsonl", "--atlas", path, "--pilot", pilot, "-k", 12, "--level", 0.8)
    output = tmp_path / "f.parquet"
    code, out, err = run_command(*words, "-o", output, "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert (facts["share"], facts["with_pilot"], facts["pilot_probes"]) == (0.25, 14, 12)
    scores = Scores.load(tmp_path / "f.parquet.pilot.parquet")
    opened = Atlas.open(path)
    columns = [opened.examples.index(id_) for id_ in scores.ids]
    own = scores.nll - opened.nll_before[columns]
    by_score = score(load(pilot), opened.subset(scores.ids)).nll - opened.nll_before[columns]
    np.testing.assert_allclose(own, by_score, atol=1e-5)
    rows = opened.at(0.25).matrix().values[:, columns]
    by_hand = Preflight(Bayesian().fit(opened.stored())).fit(pilot=rows, probes=np.array(columns))
    assert facts["uses"] == by_hand.uses_ in ("pilot", "growth")
    assert facts["rmse_pilot"] == pytest.approx(by_hand.errors_["pilot"])
    assert facts["rmse_growth"] == pytest.approx(by_hand.errors_["growth"])
    stored = TaskForecast.load(output)
    np.testing.assert_allclose(stored.mean, by_hand.forecast(pilot=own).mean, rtol=1e-5)
    unlike = facts["misfit"] < 0.05
    assert stored.misfit == facts["misfit"]
    assert facts["half_width_unlike"] == pytest.approx(by_hand.mean_half_width(0.8, unlike=True))
    half = facts["half_width_unlike" if unlike else "half_width_like"]
    assert facts["mean_upper"] - facts["mean_forgetting"] == pytest.approx(half)
    # An interrupted or repeated command does not score again.
    at = (tmp_path / "f.parquet.pilot.parquet").stat().st_mtime_ns
    assert json.loads(run_command(*words, "-o", output, "--json")[1]) == facts
    assert (tmp_path / "f.parquet.pilot.parquet").stat().st_mtime_ns == at


def test_preflight_says_what_kinds_it_left_out(model: Path, begun: tuple[Path, Path], tmp_path: Path) -> None:
    path, _ = begun
    Pool(list(make_pool(4))).save(tmp_path / "new.jsonl")
    words = ("preflight", model, tmp_path / "new.jsonl", "--atlas", path, "--level", 0.7)
    code, _, err = run_command(*words, "--family", "task0,task1,task2", "--family", "task3,task4")
    assert code == 0, err
    assert "with all of their family (3 families)" in " ".join(err.split())
    code, _, err = run_command(*words)
    assert "with the 33% of the others that are most similar" in " ".join(err.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--share", "0.25"], "give the model, too"),
        (["--pilot", "PILOT", "--share", "0.3"], "--share 0.3: the atlas has curves at 0.25"),
        (["--pilot", "PILOT", "-k", "600"], "600"),
        (["--pilot", "BASE"], "is the base model"),
        (["--pilot", "no/such/model"], "no/such/model"),
        (["--family", "task0,taks1"], "no task 'taks1'; did you mean task1?"),
        (["--family", "task0", "--family", "task1,task0"], "the task 'task0' is named twice"),
    ],
)
def test_what_preflight_refuses_of_a_pilot(
    model: Path, begun: tuple[Path, Path], tmp_path: Path, words: list[str], message: str
) -> None:
    path, pilot = begun
    Pool(list(make_pool(4))).save(tmp_path / "new.jsonl")
    given = [{"PILOT": str(pilot), "BASE": str(model)}.get(word, word) for word in words]
    code, _, err = run_command("preflight", model, tmp_path / "new.jsonl", "--atlas", path, *given)
    assert code == 2
    assert message in " ".join(err.split())


def test_a_pilot_needs_curves(model: Path, atlas: Path, begun: tuple[Path, Path], tmp_path: Path) -> None:
    Pool(list(make_pool(4))).save(tmp_path / "new.jsonl")
    code, _, err = run_command("preflight", model, tmp_path / "new.jsonl", "--atlas", atlas, "--pilot", begun[1])
    assert code == 2
    assert "has no learning curves, which --pilot is compared with; collect them with checkpoints: [0.25]" in err
    few = Path(shutil.copytree(atlas, tmp_path / "few.atlas"))
    opened = Atlas.open(few)
    opened.at(0.5).add("task0", replace(opened.before, nll=opened.before.nll + 0.1))
    code, _, err = run_command("preflight", model, tmp_path / "new.jsonl", "--atlas", few, "--pilot", begun[1])
    assert code == 2
    assert "1 tasks of" in err
    assert "it takes 8" in " ".join(err.split())


def test_preflight_refuses_a_task_without_examples(model: Path, atlas: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    code, _, err = run_command("preflight", model, tmp_path / "empty.jsonl", "--atlas", atlas)
    assert code == 2
    assert "no examples" in err
    (tmp_path / "no").mkdir()
    Pool([EXAMPLES[0]]).save(tmp_path / "task.jsonl")
    code, _, err = run_command(
        "preflight", model, tmp_path / "task.jsonl", "--atlas", atlas, "--tasks", tmp_path / "no"
    )
    assert code == 2
    assert "holds no task" in " ".join(err.split())
