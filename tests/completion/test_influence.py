"""A result that one source carries says so: planted truth, and figures computed again without that source."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from forgetcast import Atlas, ForgettingMatrix
from forgetcast.completion import Additive, Bayesian
from forgetcast.completion.benchmark import bench_left_out
from forgetcast.completion.factorisation import held_out_entries
from forgetcast.completion.forecast import TaskForecast
from forgetcast.completion.influence import few_tokens, largest_share, mean_per_token, most_influential
from forgetcast.completion.low_rank import fit_low_rank
from forgetcast.completion.structure import analyze
from support.cli import RunCommand
from support.data import make_atlas, make_pool, make_scores, planted
from support.pages import Page

SOURCES = tuple("odd" if j % 10 == 0 else f"s{j % 3}" for j in range(80))


def planted_by_one_source(seed: int = 0) -> ForgettingMatrix:
    """Return noise in all sources but one, which a strong component moves by ten times as much."""
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 0.3, (12, 80))
    odd = np.array(SOURCES) == "odd"
    values[:, odd] += 4 * np.outer(rng.normal(size=12), np.ones(odd.sum()))
    return ForgettingMatrix(
        values, tasks=[f"t{i}" for i in range(12)], examples=[f"e{j}" for j in range(80)], sources=SOURCES
    )


def test_structure_is_told_without_the_source_that_carries_it() -> None:
    matrix = planted_by_one_source()
    found = analyze(matrix)
    assert found.without is not None
    assert (found.without.source, found.without.examples) == ("odd", 8)
    assert max(found.held_out_r2) > 0.8
    assert found.without.value < 0.2
    # By hand: the same rank on the other columns.
    rank = int(np.argmax(found.held_out_r2)) + 1
    splits = [held_out_entries(matrix.values[:, np.array(SOURCES) != "odd"].astype(float), i) for i in range(10)]
    kept = [split for split in splits if split is not None]
    truth = np.concatenate([split.values[split.held_out] for split in kept])
    fits = [fit_low_rank(split.kept, rank, centred=False, rounds=100).fit for split in kept]
    fit = np.concatenate([each[split.held_out] for each, split in zip(fits, kept, strict=True)])
    assert found.without.value == pytest.approx(1 - ((fit - truth) ** 2).mean() / truth.var())
    total = (matrix.values - matrix.values.mean()) ** 2
    assert found.without.share == pytest.approx(total[:, np.array(SOURCES) == "odd"].sum() / total.sum(), rel=1e-5)
    assert len(found.rank_correlation) == len(found.held_out_r2)
    assert found.rank_correlation[0] < found.held_out_r2[0]
    assert "odd" in json.dumps(found.as_dict()["without"])
    assert type(found).from_dict(json.loads(json.dumps(found.as_dict()))) == found


def test_one_source_has_none_without_it() -> None:
    rng = np.random.default_rng(1)
    matrix = ForgettingMatrix(rng.normal(size=(5, 30)), tasks=list("abcde"), examples=[f"e{j}" for j in range(30)])
    assert analyze(matrix).without is None
    assert largest_share(["a", "a"], np.ones(2)) is None
    assert most_influential(["a", "a"], 1.0, lambda _: 0.0) is None


def test_the_ratio_is_told_without_the_source_that_changes_it_most() -> None:
    matrix = planted_by_one_source()
    rows = bench_left_out(matrix, {"additive": Additive(), "bayesian": Bayesian()}, ks=(8,), seeds=3)
    by_key = {(row.method, row.probes): row for row in rows}
    row = by_key["bayesian", "chosen"]
    assert row.without is not None
    assert row.without.source == "odd"
    assert row.without.value > row.ratio + 0.1
    # The baseline's own ratio is one with or without any source.
    same = by_key["additive", "random"]
    assert same.without is not None
    assert same.without.value == pytest.approx(1.0)
    assert 0 < row.median_error < row.accuracy.rmse


def test_most_influential_by_hand() -> None:
    values = np.array([1.0, 2.0, 9.0, 1.5])
    labels = ["a", "c", "b", "c"]
    found = most_influential(labels, values.mean(), lambda kept: float(values[kept].mean()))
    assert found is not None
    assert (found.source, found.examples, found.value) == ("b", 1, 1.5)


def test_the_commands_say_it(tmp_path: Path, run: RunCommand) -> None:
    atlas = make_atlas(tmp_path / "a.atlas", make_pool(40))
    code, out, err = run("analyze", atlas.path)
    assert code == 0, err
    assert "Without the source with most of the variation, s" in " ".join(out.split())
    assert "rank corr." in out
    assert "median error" in out
    assert "fewer than" not in out, "every example has five tokens"
    assert "Weighted by target tokens" in out
    code, out, err = run("bench", atlas.path, "-k", "5", "--seeds", 2, "--methods", "mean,additive")
    assert code == 0, err
    assert "median error" in out
    assert "without source" in " ".join(out.split())


def test_examples_of_few_tokens_by_hand() -> None:
    values = np.array([[1.0, 3.0, -2.0], [0.0, np.nan, 4.0]])
    found = few_tokens(values, np.array([9, 4, 1]))
    assert found is not None
    assert (found.examples, found.mean) == (1, 1.0)
    grand = np.nanmean(values)
    squares = np.nansum((values - grand) ** 2)
    assert found.share == pytest.approx(((-2 - grand) ** 2 + (4 - grand) ** 2) / squares)
    assert few_tokens(values, np.array([9, 4, 4])) is None
    assert few_tokens(values, np.array([9, 4, 0])) is None, "0 is: not known"
    assert mean_per_token(values, np.array([2, 1, 1])) == pytest.approx(((2 + 3 - 2) / 4 + 4 / 3) / 2)
    assert mean_per_token(values, np.array([2, 0, 1])) is None


def test_commands_and_report_name_examples_of_few_tokens(tmp_path: Path, run: RunCommand) -> None:
    pool = make_pool(40)
    before = make_scores(pool, np.full(40, 3.0))
    tokens = np.where(np.arange(40) < 4, [1, 2, 3, 1] * 10, 50)
    atlas = Atlas.create(tmp_path / "a.atlas", pool, replace(before, tokens=tokens), model="base")
    rows = planted(6, 40, 1, 0.1) * np.where(np.arange(40) < 4, 5, 1)
    for i, row in enumerate(rows):
        atlas.add(f"t{i}", replace(make_scores(pool, 30 + row), tokens=tokens), allow_different_tokens=True)
    values = atlas.matrix().values.astype(float)
    squares = (values - values.mean()) ** 2
    share = squares[:, :4].sum() / squares.sum()
    said = (
        f"4 of 40 examples have fewer than 4 target tokens: mean forgetting {values[:, :4].mean():.3f}, and {share:.0%}"
    )
    weighted = np.mean([np.average(row, weights=tokens) for row in values])
    code, out, err = run("analyze", atlas.path)
    assert code == 0, err
    assert said in " ".join(out.split())
    assert f"Weighted by target tokens, the mean forgetting is {weighted:.3f}." in " ".join(out.split())
    code, out, err = run("bench", atlas.path, "-k", "5", "--seeds", 1, "--methods", "additive", "--json")
    assert (code, said in err) == (0, True), err
    probed = pool.subset(pool.ids[4:8])
    scores = replace(make_scores(probed, np.full(4, 31.0)), tokens=np.full(4, 50))
    scores.save(tmp_path / "s.parquet")
    words = ("forecast", atlas.path, "--scores", tmp_path / "s.parquet", "-o", tmp_path / "f.parquet", "--json")
    code, out, err = run(*words)
    assert code == 0, err
    mean = TaskForecast.load(tmp_path / "f.parquet").mean
    assert json.loads(out)["mean_weighted_by_tokens"] == pytest.approx(np.average(mean, weights=tokens), rel=1e-5)
    pytest.importorskip("plotly")
    code, _, err = run("report", atlas.path, "-o", tmp_path / "r.html")
    assert code == 0, err
    page = Page(tmp_path / "r.html").text
    assert said in page
    assert f"({weighted:.3f} with examples weighted by their target tokens)" in page
    assert "2 target tokens" in page
