from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from forgetcast import ConfigError, DataError, MismatchError, Scores
from forgetcast.measure.diff import Gate, difference
from forgetcast.measure.lm_eval import read_lm_eval
from support.cli import RunCommand
from support.data import make_pool, make_scores
from support.models import save, tiny


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

    def test_what_was_not_scored_is_counted(self) -> None:
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

    def test_other_examples_and_other_pools_are_refused(self, pair: tuple[Scores, Scores]) -> None:
        with pytest.raises(MismatchError, match=r"50 example.* only one .* 'e150'"):
            difference(pair[0], scores(np.ones(150)))
        with pytest.raises(MismatchError, match="different pools"):
            difference(scores(np.ones(3), pool="a"), scores(np.ones(3), pool="b"))


class TestGate:
    @pytest.mark.parametrize(
        ("text", "fails"),
        [
            ("mean>0.2", True),
            ("mean >= 0.25", True),
            ("mean>0.25", False),
            ("upper < 1", True),
            ("share_worse<=.4", False),
        ],
    )
    def test_conditions(self, text: str, fails: bool) -> None:
        found = difference(scores(np.array([1.0, 1.0])), scores(np.array([1.0, 1.5])))
        assert Gate.parse(text).fails(found) == fails

    @pytest.mark.parametrize("text", ["mean", "mean>", "mean=0.1", "mean>much", "> 3", "mean>0.1; worst>2"])
    def test_invalid_conditions_are_rejected(self, text: str) -> None:
        with pytest.raises(ConfigError, match="is not a condition"):
            Gate.parse(text)

    def test_a_figure_that_is_not_there(self) -> None:
        found = difference(scores(np.ones(2)), scores(np.ones(2)))
        with pytest.raises(DataError, match=r"no figure 'mcnemar_p' .* mean, median"):
            Gate.parse("mcnemar_p<0.05").fails(found)


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


SAMPLE = {"doc_id": 0, "target": "1", "filtered_resps": [["-3.5", "False"], ["-1.25", "True"]], "acc": 1.0}


# Both evaluations in one process, as it takes longer to start than they do.
HARNESS = """
import sys
from lm_eval.__main__ import cli_evaluate

folder, *names = sys.argv[1:]
for name in names:
    sys.argv = [
        "lm_eval", "--model", "hf", "--model_args", f"pretrained={folder}/{name},dtype=float32",
        "--tasks", "quiz,prose", "--include_path", folder, "--device", "cpu",
        "--log_samples", "--output_path", f"{folder}/{name}.out",
    ]
    cli_evaluate()
"""


class TestHarness:
    def test_samples_of_three_kinds(self, tmp_path: Path) -> None:
        lines = {
            "samples_quiz_2026-01-01T00-00-00.jsonl": [SAMPLE, SAMPLE | {"doc_id": 1, "target": 0, "acc": 0.0}],
            "samples_prose_2026-01-01T00-00-00.jsonl": [{"doc_id": 0, "target": "x", "word_perplexity": [-30.0, 12]}],
        }
        for name, rows in lines.items():
            (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        found, tasks = read_lm_eval(tmp_path)
        assert dict(zip(found.ids, found.nll, strict=True)) == {"prose/0": 2.5, "quiz/0": 1.25, "quiz/1": 3.5}
        assert tasks == ("prose", "quiz", "quiz")
        np.testing.assert_array_equal(np.array(found.exact_match), [np.nan, 1, 0])
        flips = difference(found, found).flips
        assert flips is not None
        assert (flips.examples, flips.right_before) == (2, 0.5)

    def test_a_sign_that_ends_lines_elsewhere_is_part_of_a_text(self, tmp_path: Path) -> None:
        file = tmp_path / "samples_quiz_x.jsonl"
        file.write_text(json.dumps(SAMPLE | {"doc": "one\u2028two"}, ensure_ascii=False) + "\n", encoding="utf-8")
        assert read_lm_eval(file)[0].ids == ("quiz/0",)

    def test_what_is_no_sample(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no samples_"):
            read_lm_eval(tmp_path)
        file = tmp_path / "samples_quiz_x.jsonl"
        for text, message in (
            (json.dumps(SAMPLE) + "\nnot json\n", "line 2: not a sample"),
            (json.dumps({"target": 1}) + "\n", "line 1: not a sample"),
            (2 * (json.dumps(SAMPLE) + "\n"), "line 2: the sample 'quiz/0' occurs twice"),
            ("\n", "has no samples"),
        ):
            file.write_text(text)
            with pytest.raises(DataError, match=message):
                read_lm_eval(tmp_path)

    def test_what_the_harness_itself_writes(self, tmp_path: Path, run: RunCommand) -> None:
        pytest.importorskip("lm_eval")
        rows = [
            {
                "question": f"What is {i} plus {i}?",
                "choices": [str(2 * i), "many"],
                "label": 0,
                "text": f"a model of {i}",
            }
            for i in range(6)
        ]
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        shared = (
            f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}\ntest_split: test\n"
        )
        (tmp_path / "quiz.yaml").write_text(
            f"task: quiz\n{shared}output_type: multiple_choice\ndoc_to_text: question\ndoc_to_target: label\n"
            "doc_to_choice: choices\nmetric_list: [{metric: acc}]\n"
        )
        (tmp_path / "prose.yaml").write_text(
            f"task: prose\n{shared}output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: text\n"
            "metric_list: [{metric: word_perplexity}]\n"
        )
        base, other = tiny(), tiny(seed=1)
        save(base, tmp_path / "base")
        save(other, tmp_path / "other")
        subprocess.run([sys.executable, "-c", HARNESS, str(tmp_path), "base", "other"], check=True)
        scores, tasks = read_lm_eval(tmp_path / "base.out")
        assert sorted(tasks) == ["prose"] * 6 + ["quiz"] * 6
        # The harness puts a token before the tokenizer's own first one, and divides by the words of the text.
        first = base.tokenizer("a model of 0")["input_ids"]
        ids = [base.tokenizer.bos_token_id or base.tokenizer.eos_token_id, *first]
        with torch.no_grad():
            logits = torch.log_softmax(base.model(torch.tensor([ids])).logits[0].double(), dim=1)
        expected = -sum(float(logits[at, ids[at + 1]]) for at in range(len(ids) - 1)) / 4
        assert scores.nll[scores.ids.index("prose/0")] == pytest.approx(expected, rel=1e-3)
        code, out, _ = run("diff", tmp_path / "base.out", tmp_path / "other.out", "--json")
        assert code == 0
        found = json.loads(out)
        assert set(found["by_source"]) == {"quiz", "prose"}
        assert found["flips"]["examples"] == 6
