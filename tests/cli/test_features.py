from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from forgetcast import Atlas, Example, Pool, Scores
from forgetcast.completion.forecast import TaskForecast
from forgetcast.lm import LanguageModel, score
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
    facts = json.loads(out)
    assert (facts["with_text"], facts["tasks_of_the_atlas"]) == (8, 8)
    assert facts["mean_lower"] < facts["mean_forgetting"] < facts["mean_upper"]
    assert TaskForecast.load(tmp_path / "f.parquet").task == "new"
    code, out, err = run_command("preflight", model, tmp_path / "tasks" / "new.jsonl", "--atlas", atlas)
    assert code == 0
    assert "too few" in err
    assert "atlas's mean" in err


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
