"""Conditions, margins and what they do not know."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from forgetcast import ConfigError, DataError, Scores
from forgetcast.measure import Difference, Gate, Judgement, difference, documents, judge
from support.cli import RunCommand
from support.data import make_pool, make_scores


def scores(nll: np.ndarray, right: np.ndarray | None = None, **more: np.ndarray) -> Scores:
    n = len(nll)
    reasons = ["too short" if np.isnan(value) else None for value in nll]
    return Scores([f"e{i}" for i in range(n)], nll, np.ones(n), np.zeros(n, bool), reasons, exact_match=right, **more)


def changed(change: np.ndarray, clusters: list[str] | None = None) -> Difference:
    before = np.full(len(change), 2.0)
    return difference(scores(before), scores(before + change), clusters=clusters)


class TestGate:
    @pytest.mark.parametrize(
        ("text", "fails"),
        [
            ("mean>0.2", True),
            ("mean >= 0.25", True),
            ("mean>0.25", False),
            ("upper < 4", True),
            ("share_worse<=.4", False),
            ("unscored>0", False),
            ("unscored_share<0.1", True),
        ],
    )
    def test_conditions(self, text: str, fails: bool) -> None:
        assert Gate.parse(text).fails(changed(np.array([0.0, 0.5]))) == fails

    @pytest.mark.parametrize("text", ["mean", "mean>", "mean=0.1", "mean>much", "> 3", "mean>0.1; worst>2"])
    def test_invalid_conditions_are_rejected(self, text: str) -> None:
        with pytest.raises(ConfigError, match="is not a condition"):
            Gate.parse(text)

    @pytest.mark.parametrize("bound", ["nan", "-nan", "inf", "-inf", "Infinity", "1e999", "-1e999"])
    def test_bounds_that_nothing_reaches_are_rejected(self, bound: str) -> None:
        with pytest.raises(ConfigError, match=f"{bound} is not a finite number"):
            Gate.parse(f"lower>{bound}")

    def test_unknown_figure_is_rejected(self) -> None:
        with pytest.raises(DataError, match=r"no figure 'mcnemar_p' .* mean, median"):
            Gate.parse("mcnemar_p<0.05").fails(changed(np.zeros(2)))

    def test_one_example_has_no_interval(self) -> None:
        found = changed(np.array([0.3]))
        assert found.loss is not None
        assert (found.loss.lower, found.loss.upper, found.loss.standard_error) == (None, None, None)
        with pytest.raises(DataError, match="no figure 'lower'"):
            judge(found, [Gate.parse("lower>0.02")])
        assert judge(found, [Gate.parse("mean>0.02")]).failed == ("mean>0.02",)


class TestMargin:
    def test_the_interval_decides(self) -> None:
        change = np.random.default_rng(0).normal(0.05, 0.2, 400)
        loss = changed(change).loss
        assert loss is not None
        assert loss.lower is not None
        assert loss.upper is not None
        for margin, verdict in (
            (loss.upper + 1e-6, "not worse"),
            (loss.upper - 1e-6, "inconclusive"),
            (loss.lower + 1e-6, "inconclusive"),
            (loss.lower - 1e-6, "worse"),
        ):
            judgement = judge(changed(change), margin=margin)
            assert judgement.verdict == verdict
            assert bool(judgement.failed) == (verdict == "worse")

    @pytest.mark.parametrize("mean", [0.012, 0.028])
    @pytest.mark.parametrize("clustered", [False, True])
    def test_so_many_more_decide(self, mean: float, clustered: bool) -> None:
        """Oracle: the first size at which Student's interval of the planted spread excludes the margin."""
        rng = np.random.default_rng(1)
        change = rng.normal(0, 0.1, 60)
        change += mean - change.mean()
        sizes = np.full(60, 5 if clustered else 1)
        labels = [f"d{i}" for i in np.repeat(np.arange(60), sizes)] if clustered else None
        judgement = judge(changed(np.repeat(change, sizes), labels), margin=0.02)
        assert judgement.verdict == "inconclusive"
        sd, needed = change.std(ddof=1), 60
        while stats.t.ppf(0.975, needed - 1) * sd / math.sqrt(needed) > abs(mean - 0.02):
            needed += 1
        assert judgement.more_clusters == (needed - 60 if clustered else None)
        assert judgement.more_examples == (needed - 60) * sizes[0]
        assert f"about {judgement.more_examples:,} more examples" in str(judgement.sentence())
        # That many more of the same kind do decide.
        grown = np.resize(change, round(1.2 * needed))
        grown = (grown - grown.mean()) * sd / grown.std(ddof=1) + mean
        assert judge(changed(grown), margin=0.02).verdict == ("not worse" if mean < 0.02 else "worse")

    def test_edges(self) -> None:
        # Every change is the margin: arithmetic makes 2.02 - 2 a little larger than it.
        assert judge(changed(np.full(30, 0.02)), margin=0.02).verdict == "not worse"
        assert judge(changed(np.zeros(30)), margin=0).verdict == "not worse"
        spread = np.tile([0.0, 0.04], 20)
        at_margin = judge(changed(spread), margin=0.02)
        assert (at_margin.verdict, at_margin.more_examples) == ("inconclusive", None)
        assert "not known" in str(at_margin.sentence())
        one = judge(changed(np.array([-1.0])), margin=0.02)
        assert (one.verdict, one.more_examples, one.failed) == ("inconclusive", None, ())
        one_cluster = judge(changed(np.full(30, -1.0), ["d"] * 30), margin=0.02)
        assert (one_cluster.verdict, one_cluster.more_clusters) == ("inconclusive", None)
        assert judge(changed(np.array([0.0, 0.0001])), margin=0.02).verdict == "not worse"
        for bad in (-0.1, math.nan, math.inf):
            with pytest.raises(ConfigError, match="is not a number of at least 0"):
                judge(changed(spread), margin=bad)
        nothing = difference(scores(np.array([np.nan])), scores(np.array([1.0])))
        with pytest.raises(DataError, match="no example has one on both sides"):
            judge(nothing, margin=0.02)
        assert judge(changed(spread)).sentence() is None

    def test_round_trip(self) -> None:
        judgement = judge(changed(np.tile([0.0, 0.05], 20)), [Gate.parse("mean>0")], margin=0.02)
        assert Judgement.from_dict(json.loads(json.dumps(judgement.as_dict()))) == judgement


class TestPValues:
    def test_several_are_corrected(self) -> None:
        before, after = np.full(40, 2.0), np.full(40, 2.0)
        after[:14] += 0.5
        after[14:19] -= 0.51
        found = difference(scores(before, np.ones(40)), scores(after, np.where(np.arange(40) < 6, 0.0, 1.0)))
        assert found.flips is not None
        p, q = found.wilcoxon_p, found.flips.mcnemar_p
        assert p is not None
        assert q is not None
        assert 0.025 < q < 0.05
        alone = judge(found, [Gate.parse("mcnemar_p<0.05")])
        assert (alone.failed, alone.corrected_p) == (("mcnemar_p<0.05",), {"mcnemar_p": q})
        gates = [Gate.parse(text) for text in ("wilcoxon_p<0.05", "mcnemar_p<0.05", "mcnemar_p<=0.01")]
        both = judge(found, gates)
        # Holm for two tests by hand: the smaller p twice, the larger at least that.
        low, high = sorted((p, q))
        expected = {low: min(2 * low, 1), high: max(2 * low, high)}
        assert both.corrected_p == pytest.approx({"wilcoxon_p": expected[p], "mcnemar_p": expected[q]})
        assert "mcnemar_p<0.05" not in both.failed
        # "Not shown to differ" is no rejection, so there is nothing to correct.
        assert judge(found, [Gate.parse("wilcoxon_p>0.9")]).corrected_p == {}

    def test_by_source(self) -> None:
        rng = np.random.default_rng(0)
        change = rng.normal(0.02, 0.1, 90)
        sources = [f"s{i % 3}" for i in range(90)]
        before = np.full(90, 2.0)
        found = difference(scores(before), scores(before + change), sources=sources)
        plain = {f"s{k}": stats.wilcoxon((before + change - before)[k::3]).pvalue for k in range(3)}
        order = sorted(plain, key=lambda name: plain[name])
        expected, floor = {}, 0.0
        for step, name in enumerate(order):
            floor = max(floor, min((3 - step) * plain[name], 1))
            expected[name] = floor
        assert found.by_source_p == pytest.approx(expected)


class TestLostScores:
    nan = np.nan

    def test_a_candidate_that_lost_scores_never_passes(self) -> None:
        before, after = np.full(40, 2.0), np.full(40, 1.0)
        after[:36] = self.nan
        found = difference(scores(before), scores(after))
        assert (found.lost, found.unscored) == (36, 36)
        assert found.figures()["unscored_share"] == 0.9
        message = "36 example(s) have no score in the candidate but in the base"
        assert judge(found, [Gate.parse("lower>0.02")]).failed == (message,)
        assert judge(found, margin=0.02).failed == (message,)
        assert judge(found, margin=0.02, allow_unscored=True).failed == ()
        assert judge(found).failed == ()  # nothing was asked
        assert Gate.parse("unscored>35").fails(found)

    def test_as_many_lost_as_gained_are_lost(self) -> None:
        found = difference(scores(np.array([1.0, 1, self.nan])), scores(np.array([1.0, self.nan, 1])))
        assert found.lost == 1
        nothing = difference(scores(np.array([1.0, self.nan])), scores(np.array([1.0, self.nan])))
        assert nothing.lost == 0

    def test_without_any_score_it_fails_and_does_not_end_in_an_error(self) -> None:
        found = difference(scores(np.ones(3)), scores(np.full(3, self.nan)))
        assert "3 example(s)" in judge(found, [Gate.parse("mean>1")], margin=0.1).failed[0]

    def test_answers_and_divergences_count_too(self) -> None:
        one = np.ones(3)
        right = np.array([1.0, self.nan, 1.0])
        assert difference(scores(one, one), scores(one, right)).lost == 1
        assert difference(scores(one, one), scores(one)).lost == 0  # no answers were asked for
        assert difference(scores(one), scores(one, kl=np.array([0.1, self.nan, self.nan]))).lost == 2


def test_documents_are_ids_up_to_the_last_hash() -> None:
    assert documents(["a#0", "a#1", "b", "c#x#12", "#1"]) == ("a", "a", "b", "c#x", "#1")


class TestCommand:
    @pytest.fixture
    def files(self, tmp_path: Path) -> tuple[Path, Path, Path]:
        pool = make_pool(60)
        pool.save(tmp_path / "pool.jsonl")
        change = np.random.default_rng(0).normal(0.02, 0.1, 60)
        for name, nll in (("before", np.full(60, 2.0)), ("after", 2.0 + change)):
            make_scores(pool, nll).save(tmp_path / f"{name}.parquet")
        return tmp_path / "before.parquet", tmp_path / "after.parquet", tmp_path / "pool.jsonl"

    def test_exit_codes(self, files: tuple[Path, Path, Path], run: RunCommand) -> None:
        before, after, _ = files
        words = ("diff", before, after)
        code, out, _ = run(*words, "--margin", 0.5)
        assert code == 0
        assert "verdict: not worse by more than 0.5 nats per token" in " ".join(out.split())
        code, out, _ = run(*words, "--margin", 0.03)
        assert code == 0
        assert "verdict: inconclusive at 0.03" in " ".join(out.split())
        code, out, _ = run(*words, "--margin", 0.03, "--strict", "--json")
        assert code == 3
        found = json.loads(out)
        assert (found["verdict"], found["margin"], found["more_clusters"]) == ("inconclusive", 0.03, None)
        assert found["more_examples"] > 0
        assert run(*words, "--margin", 0.03, "--strict", "--fail-if", "mean>-1")[0] == 1
        code, _, err = run("diff", after, before, "--margin", 0)
        assert code == 0  # inconclusive
        assert run("diff", before, after, "--margin", "nan")[0] == 2
        assert run("diff", before, after, "--margin", "-1")[0] == 2
        code, _, err = run("diff", before, after, "--strict")
        assert code == 2
        assert "--strict is about --margin" in err

    def test_worse(self, files: tuple[Path, Path, Path], tmp_path: Path, run: RunCommand) -> None:
        pool = make_pool(60)
        make_scores(pool, 2.5 + np.linspace(0, 0.1, 60)).save(tmp_path / "worse.parquet")
        code, out, err = run("diff", files[0], tmp_path / "worse.parquet", "--margin", 0.02, "--markdown")
        assert code == 1
        assert "**Failed:** `worse by more than 0.02 nats per token`" in out
        assert "failed: worse by more than 0.02" in err

    def test_clusters(self, files: tuple[Path, Path, Path], run: RunCommand) -> None:
        before, after, pool = files
        code, out, _ = run("diff", before, after, "--pool", pool, "--cluster", "source", "--margin", 0.03, "--json")
        assert code == 0
        found = json.loads(out)
        assert found["loss"]["clusters"] == 3
        assert found["by_source"]["s0"]["clusters"] is None
        assert found["more_clusters"] > 0
        code, _, err = run("diff", before, after, "--cluster", "document")
        assert code == 2
        assert 'no id has a "#"' in err
        for name in (before, after):
            scores = Scores.load(name)
            parts = replace(scores, ids=[f"d{i // 4}#{i}" for i in range(60)])
            parts.save(name.with_name(f"parts-{name.name}"))
        parts_of = ("diff", *(name.with_name(f"parts-{name.name}") for name in (before, after)))
        assert json.loads(run(*parts_of, "--cluster", "document", "--json")[1])["loss"]["clusters"] == 15
        code, _, err = run("diff", before, after, "--cluster", "source")
        assert code == 2
        assert "--cluster source needs --pool" in err
        make_pool(30).save(pool)
        code, _, err = run("diff", before, after, "--pool", pool)
        assert code == 2
        assert "lacks 30 of the scored examples, e.g. 'e30'" in err
        lines = pool.with_name("bare.jsonl")
        lines.write_text("".join(f'{{"id": "e{i}", "text": "some words"}}\n' for i in range(60)))
        code, _, err = run("diff", before, after, "--pool", lines, "--cluster", "source")
        assert code == 2
        assert "60 example(s) have no source" in err

    def test_lost_scores(self, files: tuple[Path, Path, Path], tmp_path: Path, run: RunCommand) -> None:
        pool, nll = make_pool(60), np.full(60, 1.0)
        nll[:54] = np.nan
        reasons = ["out of memory" if np.isnan(value) else None for value in nll]
        candidate = Scores(pool.ids, nll, np.ones(60), np.zeros(60, bool), reasons)
        candidate.save(tmp_path / "lost.parquet")
        words = ("diff", files[0], tmp_path / "lost.parquet")
        for gate in (("--fail-if", "lower>0.02"), ("--margin", 0.02)):
            code, out, err = run(*words, *gate, "--json")
            assert code == 1
            assert "54 example(s) have no score in the candidate but in the base" in err
            assert json.loads(out)["lost"] == 54
            assert run(*words, *gate, "--allow-unscored")[0] == 0
        code, _, err = run(*words)
        assert code == 0
        assert "warning: 54 example(s)" in err
