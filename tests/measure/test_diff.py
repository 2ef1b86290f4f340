from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from forgetcast import MismatchError, Pool, Scores
from forgetcast.measure import Difference, difference
from support.cli import RunCommand
from support.data import make_pool, make_scores


def scores(nll: np.ndarray, right: np.ndarray | None = None, **metadata: str) -> Scores:
    n = len(nll)
    reasons = ["too short" if np.isnan(value) else None for value in nll]
    ids = [f"e{i}" for i in range(n)]
    return Scores(ids, nll, np.ones(n), np.zeros(n, bool), reasons, exact_match=right, metadata=metadata)


@pytest.fixture
def pair() -> tuple[Scores, Scores]:
    rng = np.random.default_rng(0)
    before = rng.gamma(4.0, 0.5, 200)
    after = before + rng.normal(0.05, 0.3, 200)
    right = rng.random(200) < 0.7
    return scores(before, right * 1.0), scores(np.abs(after), (right ^ (rng.random(200) < 0.15)) * 1.0)


class TestDifference:
    def test_against_scipy_and_plain_code(self, pair: tuple[Scores, Scores]) -> None:
        before, after = pair
        change = after.nll - before.nll
        found = difference(before, after)
        assert found.loss is not None
        assert found.flips is not None
        assert (found.loss.mean, found.loss.median) == pytest.approx((change.mean(), np.median(change)))
        assert found.loss.worst_tenth == pytest.approx(np.sort(change)[-20:].mean())
        assert found.loss.worst_hundredth == pytest.approx(np.sort(change)[-2:].mean())
        assert found.loss.share_worse == pytest.approx((change > 0).mean())
        # A bootstrap of a mean is near Student's t at 200 examples.
        t = stats.ttest_1samp(change, 0).confidence_interval(0.95)
        assert (found.loss.lower, found.loss.upper) == pytest.approx((t.low, t.high), abs=0.01)
        assert found.wilcoxon_p == pytest.approx(stats.wilcoxon(after.nll, before.nll).pvalue)
        a, b = np.array(before.exact_match) == 1, np.array(after.exact_match) == 1
        lost, won = int((a & ~b).sum()), int((~a & b).sum())
        assert (found.flips.right_to_wrong, found.flips.wrong_to_right) == (lost, won)
        assert found.flips.mcnemar_p == pytest.approx(stats.binomtest(lost, lost + won, 0.5).pvalue)
        worst = int(np.argmax(change))
        assert found.worst[0] == {
            "id": f"e{worst}", "before": before.nll[worst], "after": after.nll[worst], "change": change[worst]
        }  # fmt: skip

    def test_a_mean_per_token_and_examples_of_few_tokens(self, tmp_path: Path, run: RunCommand) -> None:
        rng = np.random.default_rng(3)
        tokens = np.array([1, 2, 3, 4, 90, 900])
        before, after = (replace(scores(rng.gamma(4.0, 0.5, 6)), tokens=tokens) for _ in range(2))
        change = after.nll - before.nll
        found = difference(before, after).loss
        assert found is not None
        # The mean over all tokens of the pool.
        assert found.per_token == pytest.approx(np.repeat(change, tokens).mean())
        assert (found.few_tokens, found.few_tokens_mean) == (3, pytest.approx(change[:3].mean()))
        files = tmp_path / "a.parquet", tmp_path / "b.parquet"
        before.save(files[0])
        after.save(files[1])
        out = run("diff", *files)[1]
        assert "mean, weighted by tokens" in out
        assert f"3, mean {change[:3].mean():+.4f}" in out
        assert run("diff", *files, "--fail-if", f"per_token>{found.per_token - 0.01}")[0] == 1
        unknown = replace(before, tokens=tokens * 0)
        found = difference(unknown, after).loss
        assert found is not None
        assert (found.per_token, found.few_tokens) == (None, 0)

    def test_short_representation(self) -> None:
        right = np.array([1.0, 1.0, 0.0])
        found = difference(scores(np.array([1.0, 1.0, np.nan]), right), scores(np.array([1.5, 1.5, 1.0]), 1 - right))
        assert repr(found) == (
            "Difference(2 examples, mean +0.500 (+0.500 to +0.500) nats per token, 1 unscored, "
            "2 right to wrong, 1 wrong to right)"
        )

    def test_invariant_to_permutation_of_the_examples(self, pair: tuple[Scores, Scores]) -> None:
        before, after = pair
        order = np.random.default_rng(1).permutation(200)
        shuffled = Scores(
            [after.ids[i] for i in order], after.nll[order], after.tokens[order], after.truncated[order],
            exact_match=np.array(after.exact_match)[order],
        )  # fmt: skip
        assert difference(before, shuffled) == difference(before, after)

    def test_by_source_largest_first(self, pair: tuple[Scores, Scores]) -> None:
        before, after = pair
        sources = ["a" if i < 50 else "b" for i in range(200)]
        found = difference(before, after, sources=sources).by_source
        change = after.nll - before.nll
        assert {name: part.mean for name, part in found.items()} == pytest.approx(
            {"a": change[:50].mean(), "b": change[50:].mean()}
        )
        assert list(found) == sorted(found, key=lambda name: -found[name].mean)

    def test_unscored_examples_are_counted(self) -> None:
        nan = np.nan
        found = difference(scores(np.array([1.0, nan, 2.0, 3.0])), scores(np.array([1.5, 1.0, nan, 3.0])))
        assert found.unscored == 2
        assert found.loss is not None
        assert (found.loss.examples, found.loss.mean) == (2, 0.25)
        assert found.flips is None
        nothing = difference(scores(np.array([nan]), np.array([nan])), scores(np.array([1.0]), np.array([1.0])))
        assert nothing.flips is None
        assert (nothing.loss, nothing.wilcoxon_p, nothing.worst) == (None, None, ())

    def test_no_change_at_all(self, pair: tuple[Scores, Scores]) -> None:
        found = difference(pair[0], pair[0])
        assert found.loss is not None
        assert found.flips is not None
        assert (found.loss.mean, found.loss.lower, found.loss.upper, found.wilcoxon_p) == (0, 0, 0, 1)
        assert found.flips.mcnemar_p == 1

    def test_mismatched_examples_and_pools_are_rejected(self, pair: tuple[Scores, Scores]) -> None:
        with pytest.raises(MismatchError, match=r"50 example.* only one .* 'e150'"):
            difference(pair[0], scores(np.ones(150)))
        with pytest.raises(MismatchError, match="different pools"):
            difference(scores(np.ones(3), pool="a"), scores(np.ones(3), pool="b"))


class TestClusters:
    def test_intervals_and_tests_rest_on_the_clusters(self) -> None:
        rng = np.random.default_rng(0)
        shared = rng.normal(0.02, 0.1, 25)
        change = np.repeat(shared, 4) + rng.normal(0, 0.001, 100)
        before = np.full(100, 3.0)
        clusters = [f"d{i}" for i in np.repeat(np.arange(25), 4)]
        right, wrong = np.ones(100), np.where(np.arange(100) < 9, 0.0, 1.0)
        pair = scores(before, right), scores(before + change, wrong)
        found, naive = difference(*pair, clusters=clusters), difference(*pair)
        assert found.loss is not None
        assert naive.loss is not None
        assert (found.loss.clusters, naive.loss.clusters) == (25, None)
        assert found.loss.mean == naive.loss.mean
        means = change.reshape(25, 4).mean(axis=1)
        assert found.loss.standard_error == pytest.approx(means.std(ddof=1) / 5)
        assert naive.loss.standard_error == pytest.approx(change.std(ddof=1) / 10)
        assert found.wilcoxon_p == pytest.approx(stats.wilcoxon(means).pvalue, rel=1e-6)
        assert found.flips is not None
        assert naive.flips is not None
        assert found.flips.mcnemar_p is None  # the test is of independent answers
        assert naive.flips.mcnemar_p == pytest.approx(2 * 0.5**9)

    def test_one_source_is_not_one_cluster(self, pair: tuple[Scores, Scores]) -> None:
        sources = [f"s{i % 4}" for i in range(200)]
        by_itself = difference(*pair, sources=sources)
        clustered = difference(*pair, sources=sources, clusters=sources)
        assert clustered.by_source == by_itself.by_source
        assert clustered.loss is not None
        assert clustered.loss.clusters == 4
        documents = [f"s{i % 4}/{i // 8}" for i in range(200)]
        parts = difference(*pair, sources=sources, clusters=documents).by_source
        assert [part.clusters for part in parts.values()] == [25] * 4


class TestDivergence:
    def test_is_summarised(self) -> None:
        rng = np.random.default_rng(0)
        kl = rng.gamma(1, 0.05, 50)
        kl[7] = np.nan
        before, after = scores(np.full(50, 2.0)), scores(np.full(50, 2.1), reference="base model")
        found = difference(before, replace(after, kl=kl)).kl
        known = kl[~np.isnan(kl)]
        assert found is not None
        assert (found.examples, found.reference) == (49, "base model")
        assert (found.mean, found.median) == pytest.approx((known.mean(), np.median(known)))
        assert found.worst_tenth == pytest.approx(np.sort(known)[-5:].mean())
        t = stats.ttest_1samp(known, 0).confidence_interval(0.95)
        assert (found.lower, found.upper) == pytest.approx((t.low, t.high), abs=0.005)
        figures = difference(before, replace(after, kl=kl)).figures()
        assert figures["kl_mean"] == found.mean
        assert {"kl_lower", "kl_upper", "kl_worst_tenth"} <= set(figures)
        assert difference(replace(before, kl=kl), after).kl is None


class TestNoise:
    def test_against_plain_code(self) -> None:
        rng = np.random.default_rng(0)
        before, after = np.full(80, 2.0), np.full(80, 2.001)
        first, second = rng.normal(0.001, 0.01, 80), rng.normal(0, 0.02, 80)
        second -= second.mean()  # so that only the spread says something
        pair = replace(scores(before), repeats=before + first), replace(scores(after), repeats=after + second)
        found = difference(*pair).noise
        assert found is not None
        assert found.before_rms == pytest.approx(np.sqrt((first**2).mean()))
        assert found.after_rms == pytest.approx(np.sqrt((second**2).mean()))
        shift = max(abs(first.mean()), np.sqrt((first**2).mean() / 80))
        expected = np.sqrt(shift**2 + (second**2).mean() / 80)
        assert found.mean == pytest.approx(expected)
        assert found.exceeds_change == (expected > 0.001)
        assert found.exceeds_change
        large = difference(pair[0], replace(scores(after + 1), repeats=after + 1 + second)).noise
        assert large is not None
        assert not large.exceeds_change

    def test_of_one_side_or_none(self) -> None:
        nll, nan = np.array([1.0, 2.0, np.nan]), np.nan
        again = replace(scores(nll), repeats=np.array([1.1, nan, nan]))
        found = difference(again, scores(nll)).noise
        assert found is not None
        assert (found.before_rms, found.after_rms) == (pytest.approx(0.1), None)
        assert difference(scores(nll), scores(nll)).noise is None
        assert difference(replace(again, repeats=np.full(3, nan)), scores(nll)).noise is None


def test_results_survive_json(pair: tuple[Scores, Scores]) -> None:
    before, after = pair
    sources = [f"s{i % 4}" for i in range(199)] + ["alone"]
    full = replace(after, kl=np.linspace(0, 1, 200), repeats=after.nll + 0.01)
    for found in (
        difference(before, full, sources=sources, clusters=sources),
        difference(before, full, sources=sources),
        difference(scores(np.array([np.nan])), scores(np.array([1.0]))),
    ):
        again = Difference.from_dict(json.loads(json.dumps(found.as_dict(), allow_nan=False)))
        assert again == found
    # What an earlier version wrote has none of the newer fields.
    old = {name: found.as_dict()[name] for name in ("loss", "wilcoxon_p", "flips", "unscored", "by_source", "worst")}
    assert Difference.from_dict(old).lost == 0


class TestUnits:
    """Losses have the unit that the logs state, and those of different units are not compared."""

    @staticmethod
    def of(unit: str | None) -> Scores:
        given = {} if unit is None else {"units": {"quiz": unit}}
        one = scores(np.array([1.0, 2.0, 4.0]))
        return replace(one, metadata={"origin": "lm-evaluation-harness", **given})

    @pytest.mark.parametrize(
        ("before", "after", "unit"),
        [
            ("nats per word", "nats per word", "nats per word"),
            ("nats per word", None, "nats per word"),
            (None, None, "unit unknown"),
        ],
    )
    def test_is_that_of_the_logs(
        self, before: str | None, after: str | None, unit: str, tmp_path: Path, run: RunCommand
    ) -> None:
        found = difference(self.of(before), self.of(after))
        assert found.unit == unit
        assert f"{unit}," in repr(found)
        files = [tmp_path / name for name in ("before.parquet", "after.parquet")]
        for unit_, file in zip((before, after), files, strict=True):
            self.of(unit_).save(file)
        code, out, _ = run("diff", *files, "--margin", 0.5)
        assert code == 0
        assert f"({unit};" in " ".join(out.split())
        assert f"not worse by more than 0.5 {unit}" in " ".join(out.split())
        assert "nats per token" not in out
        assert f"after minus before, {unit} |" in run("diff", *files, "--markdown")[1]
        assert json.loads(run("diff", *files, "--json")[1])["unit"] == unit

    def test_of_our_own_scores(self, pair: tuple[Scores, Scores]) -> None:
        assert difference(*pair).unit == "nats per token"

    def test_different_ones_are_refused(self, tmp_path: Path, run: RunCommand) -> None:
        with pytest.raises(MismatchError, match="quiz is measured in nats per byte, and in nats per word before"):
            difference(self.of("nats per word"), self.of("nats per byte"), allow_different_tokens=True)
        ours = scores(np.array([1.0, 2.0, 4.0]))
        with pytest.raises(MismatchError, match="nats per token before, nats per word after"):
            difference(ours, self.of("nats per word"))
        self.of("nats per word").save(tmp_path / "a.parquet")
        self.of("nats per byte").save(tmp_path / "b.parquet")
        code, _, err = run("diff", tmp_path / "a.parquet", tmp_path / "b.parquet")
        assert code == 2
        assert err.count("\n") == 1

    def test_a_margin_is_in_one_unit(self, tmp_path: Path, run: RunCommand) -> None:
        units = {"units": {"quiz": "nats per word", "prose": "nats per byte"}}
        one = replace(self.of(None), metadata={**self.of(None).metadata, **units})
        assert difference(one, one).unit == "nats per byte, nats per word"
        one.save(tmp_path / "a.parquet")
        code, _, err = run("diff", tmp_path / "a.parquet", tmp_path / "a.parquet", "--margin", 0.5)
        assert code == 2
        assert "a margin needs losses of one unit, and these are in nats per byte, nats per word" in err


class TestCommand:
    def test_the_pool_is_read_as_by_the_other_commands(self, tmp_path: Path, run: RunCommand) -> None:
        rows = [{"id": f"r{i}", "frage": f"What is {i}?", "antwort": f"It is {i}", "source": "s"} for i in range(6)]
        file = tmp_path / "pool.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"id": "x", "frage": "?", "antwort": ""}]))
        columns = ("--column", "prompt=frage", "--column", "completion=antwort")
        pool = Pool.load(file, columns={"prompt": "frage", "completion": "antwort"})
        for name in ("a", "b"):
            make_scores(pool, np.full(6, 2.0)).save(tmp_path / f"{name}.parquet")
        words = ("diff", tmp_path / "a.parquet", tmp_path / "b.parquet")
        code, out, err = run(*words, "--pool", file, *columns, "--json")
        assert code == 0, err
        assert "prompt and completion, 6 examples, 1 row skipped" in err
        assert set(json.loads(out)["by_source"]) == {"s"}
        for more, message in (
            (("--pool", file, *columns, "--strict"), "line 7"),
            (("--pool", file, "--format", "text"), "pool.jsonl"),
            (("--pool", file), "the columns are id, frage, antwort, source"),
            (columns, "--format and --column are about --pool"),
            (("--strict",), "--strict is about --margin or --pool"),
        ):
            code, _, err = run(*words, *more)
            assert code == 2
            assert message in err

    def test_gates_decide_the_exit_code(self, tmp_path: Path, run: RunCommand) -> None:
        pool = make_pool(40)
        pool.save(tmp_path / "pool.jsonl")
        before = np.full(40, 2.0)
        for name, nll in (("before", before), ("after", before + np.linspace(0, 0.2, 40))):
            make_scores(pool, nll).save(tmp_path / f"{name}.parquet")
        files = ("diff", tmp_path / "before.parquet", tmp_path / "after.parquet")
        code, out, _ = run(*files, "--fail-if", "mean>0.2")
        assert code == 0
        assert "+0.1000" in out
        code, out, err = run(*files, "--fail-if", "mean>0.05", "--fail-if", "worst_tenth>5", "--json")
        assert code == 1
        assert json.loads(out)["failed"] == ["mean>0.05"]
        assert "failed: mean>0.05" in err
        code, out, _ = run(*files, "--pool", tmp_path / "pool.jsonl", "--json")
        assert set(json.loads(out)["by_source"]) == set(pool.sources)
        for bad, message in (("nothing>1", "no figure 'nothing'"), ("mean", "is not a condition")):
            code, _, err = run(*files, "--fail-if", bad)
            assert code == 2
            assert message in err

    def test_markdown_escapes_what_users_wrote(self, tmp_path: Path, run: RunCommand) -> None:
        odd = "a|b <script>\n**x** [y](z)"
        for name, value in (("before", 1.0), ("after", 2.0)):
            one = Scores([odd], np.array([value]), np.ones(1), np.zeros(1, bool))
            one.save(tmp_path / f"{name}.parquet")
        _, out, _ = run(
            "diff", tmp_path / "before.parquet", tmp_path / "after.parquet", "--markdown", "--fail-if", "mean>0"
        )
        line = next(line for line in out.splitlines() if "script" in line)
        assert line.startswith(r"| a\|b \<script\> \*\*x\*\* \[y\](z) | 1.000 |")
        assert "**Failed:** `mean>0`" in out
        assert len(re.findall(r"(?<!\\)\|", line)) == 5

    def test_markdown_mentions_nobody_and_links_nothing(self, tmp_path: Path, run: RunCommand) -> None:
        odd = ("cc @octocat", "https://example.org/x", "see www.example.org", "a@example.org", "fixes #12", "ftp://h/f")
        for name, value in (("before", 1.0), ("after", 2.0)):
            Scores(odd, np.full(6, value), np.ones(6), np.zeros(6, bool)).save(tmp_path / f"{name}.parquet")
        _, out, _ = run("diff", tmp_path / "before.parquet", tmp_path / "after.parquet", "--markdown")
        assert not re.search(r"@\w|\w://|www\.|#\d+ ", out)
        # What a reader sees is the text, but for a space without width.
        seen = html.unescape(re.sub(r"\\([\\`*_{}\[\]<>#|~!&])", r"\1", out)).replace("\u200b", "")
        assert all(f"| {text} |" in seen for text in odd)

    def test_everything_is_shown(self, tmp_path: Path, run: RunCommand) -> None:
        pool = make_pool(40)
        pool.save(tmp_path / "pool.jsonl")
        before, rng = np.full(40, 2.0), np.random.default_rng(0)
        one = make_scores(pool, before)
        replace(one, repeats=before + 1e-6).save(tmp_path / "before.parquet")
        two = make_scores(pool, before + rng.normal(0.01, 0.1, 40), reference="[b]base[/b] @me")
        replace(two, kl=rng.gamma(1, 0.1, 40), repeats=two.nll + 0.1).save(tmp_path / "after.parquet")
        words = ("diff", tmp_path / "before.parquet", tmp_path / "after.parquet", "--pool", tmp_path / "pool.jsonl")
        words += ("--cluster", "source", "--margin", 0.01, "--fail-if", "kl_mean>5")
        code, table, _ = run(*words)
        assert code == 0
        code, markdown, _ = run(*words, "--markdown")
        for said in ("KL divergence", "noise of the mean", "may be noise alone", "p, corrected", "clusters"):
            assert said in table
            assert said in markdown
        assert "[b]base[/b] @me" in table
        assert "**Verdict:** inconclusive" in markdown
        assert "@me" not in markdown
        found = json.loads(run(*words, "--json")[1])
        assert set(found["noise"]) == {"before_rms", "after_rms", "mean", "exceeds_change"}
        assert found["kl"]["reference"] == "[b]base[/b] @me"
        assert set(found["by_source_p"]) == {"s0", "s1", "s2"}
        assert found["corrected_p"] == {}
        assert found["loss"]["clusters"] == 3
        assert run(*words, "--fail-if", "kl_mean>0.01")[0] == 1

    def test_a_source_of_too_few_examples_for_a_p_value_says_so(self, tmp_path: Path, run: RunCommand) -> None:
        pool = make_pool(15)  # five of each of three sources
        pool.save(tmp_path / "pool.jsonl")
        rng = np.random.default_rng(0)
        make_scores(pool, np.full(15, 2.0)).save(tmp_path / "before.parquet")
        make_scores(pool, 2.0 + rng.normal(0.1, 0.1, 15)).save(tmp_path / "after.parquet")
        words = ("diff", tmp_path / "before.parquet", tmp_path / "after.parquet", "--pool", tmp_path / "pool.jsonl")
        for form in ((), ("--markdown",)):
            assert run(*words, *form)[1].count("takes 6, not 5") == 3
