from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from forgetcast import MismatchError, Scores
from forgetcast.measure import difference
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


class TestCommand:
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
