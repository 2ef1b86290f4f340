from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from forgetcast import DataError
from forgetcast.measure.diff import difference
from forgetcast.measure.lm_eval import read_lm_eval
from support.cli import RunCommand
from support.models import save, tiny

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
    def test_samples_of_three_output_types(self, tmp_path: Path) -> None:
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

    def test_unicode_line_separator_does_not_split_a_sample(self, tmp_path: Path) -> None:
        file = tmp_path / "samples_quiz_x.jsonl"
        file.write_text(json.dumps(SAMPLE | {"doc": "one\u2028two"}, ensure_ascii=False) + "\n", encoding="utf-8")
        assert read_lm_eval(file)[0].ids == ("quiz/0",)

    def test_invalid_samples_are_rejected(self, tmp_path: Path) -> None:
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

    def test_files_written_by_lm_eval(self, tmp_path: Path, run: RunCommand) -> None:
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
