"""A result that one source carries says so: planted truth, and figures computed again without that source."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from forgetcast import ForgettingMatrix
from forgetcast.completion import Additive, Bayesian
from forgetcast.completion.benchmark import bench_left_out
from forgetcast.completion.factorisation import held_out_entries
from forgetcast.completion.influence import largest_share, most_influential
from forgetcast.completion.low_rank import fit_low_rank
from forgetcast.completion.structure import analyze
from support.cli import RunCommand
from support.data import make_atlas, make_pool

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
    split = held_out_entries(matrix.values[:, np.array(SOURCES) != "odd"].astype(float))
    assert split is not None
    truth = split.values[split.held_out]
    fit = fit_low_rank(split.kept, rank, centred=False, rounds=100).fit[split.held_out]
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
    assert "rank correlation" in out
    code, out, err = run("bench", atlas.path, "-k", "5", "--seeds", 2, "--methods", "mean,additive")
    assert code == 0, err
    assert "median error" in out
    assert "without source" in " ".join(out.split())
