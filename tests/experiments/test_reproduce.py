"""The paper's analyses against plain loops on planted matrices, and beside its published numbers."""

from __future__ import annotations

import json
import os
import pickle
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forgetcast import ConfigError, DataError, ForgettingMatrix, MismatchError
from forgetcast.evaluation import BenchRow, ForecastErrors
from forgetcast.experiments import (
    Reproduction,
    ReproductionSettings,
    TaskSplit,
    beside,
    draw_split,
    load_split,
    published,
    replay_arms,
    reproduce,
)
from forgetcast.replay.outcome import Run
from support.data import planted

SETTINGS = ReproductionSettings(k=5, seeds=2, threshold=1.0)
FOLDER = Path(os.environ.get("FORGETCAST_DATA", Path(__file__).parents[3] / "shared" / "data"))


def matrix_of(tasks: int = 12, others: int = 4, examples: int = 50) -> ForgettingMatrix:
    names = [f"main/{i}" for i in range(tasks)] + [f"other/{i}" for i in range(others)]
    return ForgettingMatrix(planted(tasks + others, examples, 2, 0.1), tasks=names)


@pytest.fixture(scope="module")
def found() -> Reproduction:
    matrix = matrix_of()
    return reproduce(matrix, draw_split(matrix), name="planted", settings=SETTINGS)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare a single method, and logistic factorisation of binary forgetting, to save time."""
    monkeypatch.setattr(sys.modules["forgetcast.experiments.reproduce"], "COMPARED", ("additive",))


def loops(known: np.ndarray, new: np.ndarray, method: str) -> tuple[float, float]:
    """RMSE and F1 of a method with random probes, one entry at a time; the values are of losses, or of 0 and 1."""
    errors, scores = [], []
    for seed in range(SETTINGS.seeds):
        rng = np.random.default_rng(seed)
        order = rng.permutation(known.shape[1])
        half = len(order) // 2
        probes = rng.choice(np.sort(order[:half]), SETTINGS.k, replace=False)
        squares, hits, forgotten, predicted = [], 0, 0, 0
        for row in new:
            shift = 0.0
            if method == "additive":
                shift = sum(row[j] - known[:, j].mean() for j in probes) / len(probes)
            for j in order[half:]:
                forecast = known[:, j].mean() + shift
                squares.append((forecast - row[j]) ** 2)
                hits += bool(forecast >= 0.5 and row[j] == 1)
                forgotten += bool(row[j] == 1)
                predicted += bool(forecast >= 0.5)
        errors.append(np.sqrt(np.mean(squares)))
        scores.append(2 * hits / (forgotten + predicted))
    return float(np.mean(errors)), float(np.mean(scores))


@pytest.mark.parametrize("method", ["mean", "additive"])
@pytest.mark.parametrize("domain", ["in domain", "out of domain"])
def test_completion_is_that_of_plain_loops(found: Reproduction, method: str, domain: str) -> None:
    matrix, split = matrix_of(), found.split
    known, new = (matrix.select(names).values.astype(np.float64) for names in (split.known, split.domains[domain]))

    def row(rows: Sequence[Any]) -> Any:
        return next(r for r in rows if (r.domain, r.method, r.probes) == (domain, method, "random"))

    rmse, _ = loops(known, new, method)
    assert row(found.losses).rmse == pytest.approx(rmse, rel=1e-6)
    assert row(found.losses).f1 is None
    assert found.forgotten is not None
    binary = [(part > SETTINGS.threshold).astype(np.float64) for part in (known, new)]
    rmse, f1 = loops(*binary, method)
    assert row(found.forgotten.completion).rmse == pytest.approx(rmse, rel=1e-6)
    assert row(found.forgotten.completion).f1 == pytest.approx(f1, rel=1e-12)
    assert found.forgotten.shares[domain] == pytest.approx(binary[1].mean())


def test_r2_and_row_correlations_are_those_of_numpy(found: Reproduction) -> None:
    values = matrix_of().values.astype(np.float64)
    U, S, Vt = np.linalg.svd(values, full_matrices=False)
    total = ((values - values.mean()) ** 2).sum()
    for rank in range(1, 6):
        fit = U[:, :rank] * S[:rank] @ Vt[:rank]
        assert found.structure.rank_r2[rank - 1] == pytest.approx(1 - ((values - fit) ** 2).sum() / total, abs=1e-6)
    pairs = [np.corrcoef(values[i], values[j])[0, 1] for i in range(len(values)) for j in range(i)]
    assert found.row_correlation is not None
    assert found.row_correlation.pairs == len(pairs)
    assert found.row_correlation.median == pytest.approx(np.median(pairs), abs=1e-6)
    assert found.row_correlation.upper_quartile == pytest.approx(np.quantile(pairs, 0.75), abs=1e-6)


def test_planted_low_rank_is_completed_best_by_what_knows_it(found: Reproduction) -> None:
    rmse = {r.method: r.rmse for r in found.losses if (r.domain, r.probes) == ("in domain", "random")}
    assert rmse["bayesian"] < 0.8 * rmse["additive"]
    assert set(rmse) == {"mean", "additive", "knn", "mf", "soft-impute", "bayesian"}
    assert found.forgotten is not None
    assert {r.method for r in found.forgotten.completion} == {*rmse, "logistic-mf"}
    assert found.forgotten.rank_f1[2] > 0.9


def test_the_published_numbers() -> None:
    assert published.RANK_R2 == (0.512, 0.633, 0.715, 0.762, 0.790)
    assert published.RANK_F1 == (0.506, 0.593, 0.651, 0.682, 0.707)
    assert [tuple(each) for each in published.CORRELATIONS] == [
        ("OLMo-7B", "commercial embedding", 0.158, 0.233),
        ("OLMo-7B", "SBERT embedding", 0.043, 0.092),
        ("OLMo-1B", "commercial embedding", 0.065, 0.082),
        ("OLMo-1B", "SBERT embedding", 0.054, 0.074),
    ]
    assert (published.RANK_3_R2, published.ROW_CORRELATION, published.COMPLETION_F1) == (0.69, (0.4, 0.6), 0.5816)
    assert dict(published.REPLAY) == {"none": 2.3092, "random": 2.2747, "predicted": 2.2730, "truth": 2.2711}
    assert (published.REPLAY_RATIO, published.PROBES, published.SEEDS) == (1 / 32, 30, 10)
    assert len(set(published.IN_DOMAIN_ROWS)) == 20
    assert "2406.14026" in published.CITATION


def test_every_row_says_what_it_is_of(found: Reproduction) -> None:
    page = beside.markdown(found)
    assert (
        "| published | OLMo-7B, 85 tasks x 10,000 Dolma examples | 0.512 | 0.633 | 0.715 | 0.762 | 0.790 | - |" in page
    )
    assert "| here | planted (16 tasks x 50 examples) | " in page
    assert "| published | OLMo-7B, SBERT embedding | 0.043 | 0.092 |" in page
    assert "| second-hand | two tasks' rows of the matrix | 0.4 to 0.6 | - |" in page
    assert "| published | predicted, OLMo-7B | 1/32 | mean forgetting | -0.0362 | - | - |" in page
    assert "by exact match; the best figure | - | 0.5816 | - |" in page
    assert "the half of the examples that no probe is taken from" in page
    assert "a loss that rose by more than 1 " in page
    share = found.forgotten.shares["in domain"] if found.forgotten else 0.0
    assert f"| in domain | calling everything forgotten | - | {2 * share / (1 + share):.4f} | - |" in page
    for section in beside.sections(found):
        assert all(len(row) == len(section.columns) for row in section.rows)


def test_noise_of_the_same_size_is_beside_the_rank(found: Reproduction) -> None:
    """Oracles: singular values of another draw; and a share of rank / tasks where there are far more examples."""
    values = np.random.default_rng(5).normal(size=(16, 50))
    strengths = np.linalg.svd(values, compute_uv=False) ** 2
    chance = beside.noise_r2(16, 50, 3)
    assert chance == pytest.approx(strengths[:3].sum() / strengths.sum(), abs=0.03)
    assert f"where noise of this size (independent normal entries) has {chance:.2f}" in beside.markdown(found)
    assert beside.noise_r2(10, 10**6, 3) == pytest.approx(0.3, abs=0.03)


def test_names_are_escaped(found: Reproduction) -> None:
    page = beside.markdown(replace(found, name="a|b <img src=x> [x](y)\n# c"))
    assert "a\\|b \\<img src=x\\> \\[x\\](y) \\# c" in page
    assert not re.search(r"(?<!\\)<", page)
    assert "\n# c" not in page


def test_a_reproduction_is_the_same_after_a_file(found: Reproduction, tmp_path: Path) -> None:
    kept = replace(found, replay=replay_arms(runs_of()))
    kept.save(tmp_path / "r.json")
    assert Reproduction.load(tmp_path / "r.json") == kept
    assert json.loads((tmp_path / "r.json").read_text())["comparisons"][0]["arm"] == "random"
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(DataError, match="not a reproduction"):
        Reproduction.load(tmp_path / "x.json")


# Splits


def test_the_published_rows_where_the_family_is_that_of_the_paper() -> None:
    names = [f"FLAN/{i}" for i in range(66)] + [f"Tulu/{i}" for i in range(3)]
    split = draw_split(ForgettingMatrix(planted(69, 4, 1, 0.1), tasks=names))
    assert set(split.in_domain) == {f"FLAN/{i}" for i in published.IN_DOMAIN_ROWS}
    assert len(split.known) == 46
    assert split.out_of_domain == ("Tulu/0", "Tulu/1", "Tulu/2")
    assert "published rows" in split.origin


def test_the_reference_splits_of_the_authors_matrix() -> None:
    matrix, reference = FOLDER / "olmo-7b-dolma.json", FOLDER / "olmo-7b-reference.json"
    if not (matrix.is_file() and reference.is_file()):
        pytest.skip(f"{matrix} or {reference} is not here; set FORGETCAST_DATA to the folder with the reference data")
    opened = ForgettingMatrix.load(matrix)
    split = draw_split(opened)
    settings = json.loads(reference.read_text())["settings"]
    for part, setting in ((split.in_domain, "olmo-7b/in-domain"), (split.out_of_domain, "olmo-7b/flan-to-tulu")):
        assert set(part) == {opened.tasks[row] for row in settings[setting]["test"]}
        assert set(split.known) == {opened.tasks[row] for row in settings[setting]["train"]}


def test_a_drawn_split_keeps_the_share_and_is_always_the_same() -> None:
    matrix = matrix_of()
    split = draw_split(matrix)
    assert len(split.in_domain) == 4  # 20 of 66, of 12
    assert len(split.known) == 8
    assert len(split.out_of_domain) == 4
    assert draw_split(matrix) == split


def test_rows_of_one_task_stay_together() -> None:
    names = [f"{task}-{seed}" for task in "abcdef" for seed in "01"]
    split = draw_split(ForgettingMatrix(planted(12, 20, 1, 0.1), tasks=names, groups=[name[0] for name in names]))
    assert len(split.in_domain) == 4
    assert not {name[0] for name in split.in_domain} & {name[0] for name in split.known}


def test_rows_that_are_measured_in_part_are_not_judged() -> None:
    matrix = matrix_of()
    values = matrix.values.copy()
    values[[0, 1, 2, 13], 5] = np.nan
    split = draw_split(ForgettingMatrix(values, tasks=matrix.tasks))
    assert {"main/0", "main/1", "main/2"} <= set(split.known)
    assert "other/1" not in split.out_of_domain
    assert split.unused == 1
    elsewhere = draw_split(matrix, priors=("main/0", "main/1", "other/0"))
    assert {"main/0", "main/1"} <= set(elsewhere.known)
    assert "other/0" not in elsewhere.out_of_domain
    values[:12, 5] = np.nan
    with pytest.raises(DataError, match="0 of them measured as a whole"):
        draw_split(ForgettingMatrix(values, tasks=matrix.tasks))


def test_splits_in_files(tmp_path: Path) -> None:
    matrix, file = matrix_of(), tmp_path / "split.json"
    file.write_text(json.dumps({"known": ["main/0", 1, 2], "in_domain": [3], "out_of_domain": ["other/0"]}))
    split = load_split(file, matrix)
    assert split.known == ("main/0", "main/1", "main/2")
    assert (split.in_domain, split.out_of_domain) == (("main/3",), ("other/0",))
    for content, said, error in (
        ({"known": [0, 1], "in_domain": [0]}, "'main/0' is in the split twice", DataError),
        ({"known": [0, 1]}, "at least two known tasks, and one to forecast", DataError),
        ({"known": [0, 99], "in_domain": [1]}, "there is no row 99", DataError),
        ({"known": [0, 2], "in_domain": ["nobody"]}, "no task 'nobody'", MismatchError),
        ({"known": [0, 2], "test": [1]}, "no field 'test'", DataError),
        ({"in_domain": [1]}, "the field 'known' is missing", DataError),
        ({"known": [True, 2], "in_domain": [1]}, "known.0", DataError),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(error, match=said) as raised:
            load_split(file, matrix)
        assert "split.json" in str(raised.value)
    with pytest.raises(DataError, match=r"none\.json: No such file"):
        load_split(tmp_path / "none.json", matrix)


@pytest.mark.parametrize("named", [True, False])
def test_a_released_split(tmp_path: Path, named: bool) -> None:
    values, file = planted(6, 20, 1, 0.1), tmp_path / "split.pkl"
    content: dict[str, Any] = {"train_mat": values[:3], "test_mat": values[3:]}
    if named:
        content["train_ocl_task_info"] = [{"cat": "flan", "name": str(i)} for i in range(3)]
        content["test_ocl_task_info"] = [{"cat": cat, "name": "x"} for cat in ("flan", "tulu", "dolly")]
    file.write_bytes(pickle.dumps(content))
    split = load_split(file, ForgettingMatrix.load(file))
    assert (len(split.known), len(split.in_domain), len(split.out_of_domain)) == ((3, 1, 2) if named else (3, 3, 0))
    assert ("names no families" in split.origin) is not named


# What cannot be computed


@pytest.mark.usefixtures("few")
def test_without_a_second_family_the_rest_is_computed() -> None:
    matrix = matrix_of(8, 0, 30)
    found = reproduce(matrix, draw_split(matrix), settings=replace(SETTINGS, seeds=1))
    assert {row.domain for row in found.losses} == {"in domain"}
    assert "losses out of domain: no task is out of domain" in found.left_out
    assert "losses out of domain: no task is out of domain." in beside.markdown(found)


@pytest.mark.usefixtures("few")
def test_a_domain_that_cannot_be_judged_is_left_out_with_the_reason() -> None:
    matrix = matrix_of(8, 2, 30)
    values = matrix.values.copy()
    values[8, :25] = np.nan  # named in a split, though measured in part
    matrix = ForgettingMatrix(values, tasks=matrix.tasks)
    split = TaskSplit(matrix.tasks[:6], matrix.tasks[6:8], matrix.tasks[8:], "by hand")
    found = reproduce(matrix, split, settings=replace(SETTINGS, seeds=1))
    assert any(reason.startswith("losses out of domain: 5 probes cannot be taken") for reason in found.left_out)
    with pytest.raises(DataError, match="completion cannot be judged: losses in domain: 16 probes"):
        reproduce(matrix, split, settings=ReproductionSettings(k=16, seeds=1))


@pytest.mark.usefixtures("few")
def test_binary_matrices_and_those_where_nothing_differs() -> None:
    matrix = matrix_of(8, 2, 30)
    binary = ForgettingMatrix(matrix.values > 1, tasks=matrix.tasks)
    found = reproduce(binary, draw_split(binary), settings=replace(SETTINGS, seeds=1))
    assert found.losses == ()
    assert found.forgotten is not None
    assert found.forgotten.measure == "a 1 of the matrix"
    assert "Completion of new tasks: RMSE" not in beside.markdown(found)
    found = reproduce(matrix, draw_split(matrix), settings=replace(SETTINGS, threshold=1e6))
    assert found.forgotten is None
    assert any(reason.startswith("F1: no entry differs") for reason in found.left_out)
    beside.markdown(found)


@pytest.mark.parametrize("fields", [{"k": 0}, {"seeds": 0}, {"threshold": float("nan")}])
def test_settings_that_mean_nothing(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ReproductionSettings(**fields)


def test_finished_parts_are_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, file = matrix_of(6, 2, 20), tmp_path / "parts.json"
    split, settings = draw_split(matrix), ReproductionSettings(k=3, seeds=1)
    calls: list[int] = []

    def bench(*_: Any, **__: Any) -> list[BenchRow]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        errors = ForecastErrors(0.1, 0.1, float("nan"), 0.5, 0.9, 0.3)
        return [BenchRow("additive", "random", 3, errors, float("nan"), 1.0, 0.9, 1.1, 0.0)]

    monkeypatch.setattr(sys.modules["forgetcast.experiments.reproduce"], "bench", bench)
    with pytest.raises(KeyboardInterrupt):
        reproduce(matrix, split, settings=settings, parts_file=file)
    said: list[tuple[str, int, int]] = []
    again = reproduce(matrix, split, settings=settings, parts_file=file, on_progress=lambda *each: said.append(each))
    assert len(calls) == 5, "one finished, one interrupted, three left"
    assert [(done, total) for _, done, total in said] == [(i, 6) for i in range(6)]
    assert reproduce(matrix, split, settings=settings, parts_file=file) == again
    assert len(calls) == 5
    reproduce(matrix, split, settings=replace(settings, seeds=2), parts_file=file)
    assert len(calls) == 9, "other settings are other parts"
    file.write_text("{}")
    with pytest.raises(DataError, match=r"parts\.json"):
        reproduce(matrix, split, settings=settings, parts_file=file)


# Replay


def runs_of() -> list[dict[str, Any]]:
    """Runs of four tasks with two seeds; one of another setup, without a run to compare it with."""
    gain = {"none": 0.0, "random": 0.2, "forecast": 0.3}
    rng = np.random.default_rng(0)
    runs = []
    for task in "abcd":
        for seed in (0, 1):
            level = rng.normal(1, 0.5)
            for strategy, less in gain.items():
                ratio = 0.125 if less else 0.0
                mean = level - less + rng.normal(0, 0.01)
                run = Run(
                    task, strategy, seed, mean, mean + 1, 1.5, 8, 40, 2.0, strategy=strategy, ratio=ratio, setup="x"
                )
                runs.append(run)
    runs.append(replace(runs[1], setup="y", mean=-100.0))
    runs.append(replace(runs[1], strategy=None, mean=-100.0))
    return [vars(run) for run in runs]


def test_replay_is_compared_within_task_seed_and_setup() -> None:
    (arms,) = replay_arms(runs_of())
    assert arms.arms == ("none", "random", "forecast")
    kept = [run for run in runs_of() if run["setup"] == "x" and run["strategy"]]
    for arm in ("random", "forecast"):
        by_task = []
        for task in "abcd":
            own = {(r["seed"], r["strategy"]): r["mean"] for r in kept if r["task"] == task}
            by_task.append(np.mean([own[seed, arm] - own[seed, "none"] for seed in (0, 1)]))
        compared = arms.compare(arm, "none", "mean")
        assert compared is not None
        assert compared.difference.mean == pytest.approx(np.mean(by_task))
        assert compared.better
    against = arms.compare("forecast", "random", "mean")
    assert against is not None
    assert against.difference.mean == pytest.approx(-0.1, abs=0.02)


def test_replay_beside_the_published_differences(found: Reproduction) -> None:
    page = beside.markdown(replace(found, replay=replay_arms(runs_of())))
    assert "| published | random, OLMo-7B | 1/32 | mean forgetting | -0.0345 | - | - |" in page
    assert re.search(r"\| here \| forecast, planted, 8 pairs \| 0.125 \| mean forgetting \| -0\.(29|30)", page)
    assert "At 0.125, on the mean forgetting: forecast replay is better than random." in page
    first = [run for run in runs_of() if run["task"] == "a" and run["seed"] == 0]
    single = beside.markdown(replace(found, replay=replay_arms(first)))
    gap = first[2]["mean"] - first[0]["mean"]
    assert f"| here | forecast, planted, 1 pair | 0.125 | mean forgetting | {gap:+.4f} | - | - |" in single


def test_outcomes_that_are_none() -> None:
    assert replay_arms([]) == ()
    with pytest.raises(DataError, match="outcome of a fine-tune"):
        replay_arms([{"task": "t0", "seed": 0}])
