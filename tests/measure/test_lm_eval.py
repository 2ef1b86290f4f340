from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from forgetcast import DataError
from forgetcast.measure.diff import difference
from forgetcast.measure.lm_eval import read_lm_eval
from support.cli import RunCommand
from support.models import save, tiny

SAMPLE: dict[str, Any] = {
    "doc_id": 0,
    "target": "1",
    "filtered_resps": [["-3.5", "False"], ["-1.25", "True"]],
    "acc": 1.0,
}


# Both evaluations in one process, as it takes longer to start than they do.
HARNESS = """
import sys
from lm_eval.__main__ import cli_evaluate

folder, tasks, *names = sys.argv[1:]
for name in names:
    sys.argv = [
        "lm_eval", "--model", "hf", "--model_args", f"pretrained={folder}/{name},dtype=float32",
        "--tasks", tasks, "--include_path", folder, "--device", "cpu",
        "--log_samples", "--output_path", f"{folder}/{name}.out",
    ]
    cli_evaluate()
"""

# By output type and by what makes them hard to read; the label's positions and texts are chosen to be mistaken.
TASKS = {
    "quiz": "output_type: multiple_choice\ndoc_to_text: question\ndoc_to_target: label\ndoc_to_choice: choices\n"
    "metric_list: [{metric: acc}]",
    "quiz_norm": "output_type: multiple_choice\ndoc_to_text: question\ndoc_to_target: label\n"
    "doc_to_choice: choices\nmetric_list: [{metric: acc_norm}]",
    "quiz_info": "output_type: multiple_choice\ndoc_to_text: question\ndoc_to_target: label\n"
    "doc_to_choice: choices\nmetric_list: [{metric: acc_mutual_info}]",
    "quiz_text": "output_type: multiple_choice\ndoc_to_text: question\ndoc_to_target: answer\n"
    "doc_to_choice: choices\nmetric_list: [{metric: acc}]",
    "quiz_many": "output_type: multiple_choice\ndoc_to_text: question\ndoc_to_target: labels\n"
    "doc_to_choice: choices\nmetric_list: [{metric: acc}]",
    "blank": "output_type: multiple_choice\ndoc_to_text: label\ndoc_to_target: text\ndoc_to_choice: choices\n"
    "metric_list: [{metric: acc}]",
    "last_word": "output_type: loglikelihood\ndoc_to_text: question\ndoc_to_target: ' {{answer}}'\n"
    "metric_list: [{metric: perplexity}, {metric: acc}]",
    "prose": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: text\n"
    "metric_list: [{metric: word_perplexity}]",
    "bits": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: text\n"
    "metric_list: [{metric: bits_per_byte}]",
    "answer": "output_type: generate_until\ndoc_to_text: question\ndoc_to_target: answer\n"
    "generation_kwargs: {until: ['zz'], max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]\n"
    "filter_list:\n- {name: strict, filter: [{function: regex, regex_pattern: '(never)'}, {function: take_first}]}\n"
    "- {name: loose, filter: [{function: take_first}]}",
}


def write(folder: Path, name: str, *samples: dict[str, Any]) -> Path:
    """Write a file of samples."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return folder / name


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
        assert found.metadata["notes"] == [
            "losses are in nats for the right choice, nats per word: read them by task, not their mean over all"
        ]
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

    @pytest.mark.slow
    def test_files_written_by_lm_eval(self, tmp_path: Path, run: RunCommand) -> None:
        pytest.importorskip("lm_eval")
        rows = [
            {
                "question": f"What is {i} plus {i}?",
                "choices": [str(2 * i + 1), str(2 * i), "many"],
                "label": 1,
                "labels": [0, 1],
                "answer": str(2 * i),
                "text": f"a model of {i}",
            }
            for i in range(3)
        ]
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name, lines in TASKS.items():
            (tmp_path / f"{name}.yaml").write_text(
                f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}\n"
                f"test_split: test\n{lines}\n"
            )
        base, other = tiny(), tiny(seed=1)
        save(base, tmp_path / "base")
        save(other, tmp_path / "other")
        command = [sys.executable, "-c", HARNESS, str(tmp_path), ",".join(TASKS), "base", "other"]
        subprocess.run(command, check=True, capture_output=True)
        scores, tasks = read_lm_eval(tmp_path / "base.out")
        assert scores.exact_match is not None
        losses = {task: scores.nll[np.array(tasks) == task] for task in TASKS}
        right = {task: scores.exact_match[np.array(tasks) == task] for task in TASKS}
        assert {len(losses[task]) for task in TASKS if task != "answer"} == {3}
        assert {id_ for id_ in scores.ids if id_.startswith("answer/0")} == {"answer/0/strict", "answer/0/loose"}

        # The harness's own averages are the oracle of what it averages.
        (results_file,) = (tmp_path / "base.out").rglob("results_*.json")
        results = json.loads(results_file.read_text())["results"]
        for task, metric in (
            ("quiz", "acc"), ("quiz_norm", "acc_norm"), ("quiz_info", "acc_mutual_info"), ("quiz_text", "acc"),
            ("quiz_many", "acc"), ("blank", "acc"), ("last_word", "acc"),
        ):  # fmt: skip
            assert right[task].mean() == pytest.approx(results[task][f"{metric},none"])
            assert scores.metadata["right"][task] == metric
        assert np.exp(losses["last_word"].mean()) == pytest.approx(results["last_word"]["perplexity,none"], rel=1e-6)
        assert np.exp(losses["prose"].mean()) == pytest.approx(results["prose"]["word_perplexity,none"], rel=1e-6)
        assert losses["bits"].mean() / np.log(2) == pytest.approx(results["bits"]["bits_per_byte,none"], rel=1e-6)
        assert scores.metadata["units"] == dict.fromkeys(
            ("quiz", "quiz_norm", "quiz_info", "quiz_text", "quiz_many", "blank"), "nats for the right choice"
        ) | {"last_word": "nats per continuation", "prose": "nats per word", "bits": "nats per byte"}

        # The right choice's loss is that of the same continuation, however its label is written; a text that could be
        # a position can be left open.
        for task in ("quiz", "quiz_norm", "quiz_info"):
            np.testing.assert_allclose(losses[task], losses["last_word"], rtol=1e-5)
        told = ~np.isnan(losses["quiz_text"])
        np.testing.assert_allclose(losses["quiz_text"][told], losses["last_word"][told], rtol=1e-5)
        assert told[2]
        # The likeliest of several contexts is right, or it cannot be told which one is.
        np.testing.assert_array_equal(np.isnan(losses["blank"]), right["blank"] == 0)
        assert np.isnan([*losses["answer"], *losses["quiz_many"]]).all()
        assert scores.reasons[scores.ids.index("quiz_many/0")] == "it has several right choices"

        # A plain forward pass: the harness puts a token before the tokenizer's own first one.
        first = base.tokenizer("a model of 0")["input_ids"]
        ids = [base.tokenizer.bos_token_id or base.tokenizer.eos_token_id, *first]
        with torch.no_grad():
            logits = torch.log_softmax(base.model(torch.tensor([ids])).logits[0].double(), dim=1)
        expected = -sum(float(logits[at, ids[at + 1]]) for at in range(len(ids) - 1)) / 4
        assert losses["prose"][0] == pytest.approx(expected, rel=1e-3)

        digests = scores.digests
        assert digests is not None
        assert None not in digests
        assert digests == read_lm_eval(tmp_path / "other.out")[0].digests
        assert len(set(digests)) == len(digests) - 3  # two filters of one prompt
        code, out, _ = run("diff", tmp_path / "base.out", tmp_path / "other.out", "--json")
        assert code == 0
        found = json.loads(out)
        assert set(found["by_source"]) >= {"quiz", "quiz_norm", "quiz_info", "last_word", "prose", "bits"}
        assert found["flips"]["examples"] == 7 * 3 + 2 * 3


class TestOutputTypes:
    @pytest.mark.parametrize(
        ("sample", "loss"),
        [
            ({"filtered_resps": [["-4.5", "True"]], "target": " 42", "acc": 1}, 4.5),
            ({"filtered_resps": [[-4.5, True]], "target": " 42", "perplexity": -4.5}, 4.5),
            ({"filtered_resps": [[["-4.5", "True"]]], "resps": [[["-4.5", "True"]]], "target": "x"}, 4.5),
            ({"target": "x", "bits_per_byte": [-6.0, 4]}, 1.5),
            ({"target": "x", "byte_perplexity": {"byte_perplexity": [-6.0, 4]}}, 1.5),
            ({"target": "x", "metrics": {"word_perplexity": [-6.0, 4]}}, 1.5),
            (SAMPLE | {"acc": 1.0, "acc_mutual_info": 1.0, "filtered_resps": 2 * SAMPLE["filtered_resps"]}, 1.25),
            ({"target": "1", "filtered_resps": SAMPLE["filtered_resps"], "acc_norm": 0.0}, 1.25),
            ({"target": "42", "filtered_resps": ["42"], "exact_match": 1.0}, None),
            # Two answers to one prompt are no log-likelihood with its flag.
            ({"target": "x", "filtered_resps": [["1", "True"]], "arguments": [["q", {"until": []}]]}, None),
        ],
    )
    def test_loss(self, tmp_path: Path, sample: dict[str, Any], loss: float | None) -> None:
        found, _ = read_lm_eval(write(tmp_path, "samples_quiz_x.jsonl", {"doc_id": 0} | sample))
        assert found.nll[0] == pytest.approx(loss if loss is not None else np.nan, nan_ok=True)

    @pytest.mark.parametrize(
        ("target", "acc", "loss"),
        [
            ("yes", None, 2.0),
            (" no ", None, 1.0),
            ("2", None, 3.0),
            ("1", 1.0, None),  # its text is that of choice 2, its number that of choice 1; choice 0 is the likeliest
            ("maybe", 0.0, None),
            ("[0, 1]", 1.0, None),
        ],
    )
    def test_target_is_a_position_or_a_text(
        self, tmp_path: Path, target: str, acc: float | None, loss: float | None
    ) -> None:
        choices = ["no", "yes", "1"]
        sample = {
            "doc_id": 0,
            "target": target,
            "arguments": {f"gen_args_{i}": {"arg_0": "Is it?", "arg_1": f" {c}"} for i, c in enumerate(choices)},
            "filtered_resps": [["-1.0", "True"], ["-2.0", "False"], ["-3.0", "False"]],
        } | ({} if acc is None else {"acc": acc})
        found, _ = read_lm_eval(write(tmp_path, "samples_quiz_x.jsonl", sample))
        assert found.nll[0] == pytest.approx(loss if loss is not None else np.nan, nan_ok=True)
        assert (found.reasons[0] is None) == (loss is not None)

    def test_numbers_of_a_task_are_positions_if_one_can_only_be_that(self, tmp_path: Path) -> None:
        def sample(at: int, target: str, *choices: str) -> dict[str, Any]:
            requests = [["How many?", f" {choice}"] for choice in choices]
            return {
                "doc_id": at, "target": target, "arguments": requests, "filtered_resps": SAMPLE["filtered_resps"]
            }  # fmt: skip

        unclear = sample(0, "0", "1", "0")
        found, _ = read_lm_eval(write(tmp_path, "samples_quiz_x.jsonl", unclear))
        assert np.isnan(found.nll[0])
        found, _ = read_lm_eval(write(tmp_path, "samples_quiz_x.jsonl", unclear, sample(1, "1", "7", "8")))
        assert found.nll.tolist() == [3.5, 1.25]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (json.dumps(SAMPLE | {"target": "-1"}), "the target -1 is none of the 2 choices"),
            (json.dumps(SAMPLE | {"target": 2}), "the target 2 is none of the 2 choices"),
            (json.dumps({"doc_id": 0, "word_perplexity": [-3.0, 0]}), "a text of 0 words"),
            (json.dumps(SAMPLE | {"filtered_resps": [["-inf", "True"], ["-1", "False"]]}), "log-likelihood -inf"),
            (json.dumps({"doc_id": 0, "bits_per_byte": [float("nan"), 3]}), "log-likelihood nan"),
            (json.dumps({"doc_id": 0, "bits_per_byte": [1.0, 3]}), "log-likelihood 1.0"),
            ('{"doc_id": 0, "target": ' + "9" * 5000 + "}", "not a sample"),
            ('{"doc_id": 0, "word_perplexity": [-1, ' + "9" * 4000 + "]}", "not a sample"),
            (100_000 * "[", "not a sample"),
            ('{"doc_id": 0, "doc": ' + 100_000 * "[" + 100_000 * "]" + "}", "not a sample"),
            ('{"doc_id": "\\ud83d", "bits_per_byte": [-1.0, 3]}', "not a sample"),
            ('{"doc_id": [0]}', "not a sample"),
            ("7", "not a sample"),
        ],
    )
    def test_faults_name_the_line(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "samples_quiz_x.jsonl").write_text(json.dumps(SAMPLE | {"doc_id": 9}) + "\n" + text + "\n")
        with pytest.raises(DataError, match=rf"samples_quiz_x.jsonl, line 2: .*{message}") as caught:
            read_lm_eval(tmp_path)
        assert len(str(caught.value)) < 500

    def test_what_is_not_compared_is_counted(self, tmp_path: Path, run: RunCommand) -> None:
        write(tmp_path, "samples_truth_x.jsonl", SAMPLE | {"acc": 0.25})
        write(tmp_path, "samples_summary_x.jsonl", {"doc_id": 0, "target": "x", "filtered_resps": ["y"], "bleu": 3.0})
        found, _ = read_lm_eval(tmp_path)
        assert found.metadata["notes"] == [
            "truth (acc): 1 sample(s) are neither right nor wrong, not compared",
            "summary: neither a log-likelihood nor a metric that says right or wrong, not compared",
        ]
        code, _, err = run("diff", tmp_path, tmp_path)
        assert code == 0
        assert "summary: neither a log-likelihood" in " ".join(err.split())

    @pytest.mark.parametrize("name", ["doc_hash", "prompt_hash", "target_hash"])
    def test_digests_differ_where_a_hash_does(self, tmp_path: Path, name: str) -> None:
        hashes = {"doc_hash": "a", "prompt_hash": "b", "target_hash": "c"}
        one = read_lm_eval(write(tmp_path, "samples_quiz_x.jsonl", SAMPLE | hashes))[0].digests
        other = read_lm_eval(write(tmp_path, "samples_quiz_x.jsonl", SAMPLE | hashes | {name: "d"}))[0].digests
        old = read_lm_eval(write(tmp_path, "samples_quiz_x.jsonl", SAMPLE))[0].digests
        assert one is not None
        assert other is not None
        assert one != other
        assert old is None


class TestRuns:
    OLD, NEW = "2026-01-01T00-00-00.5", "2026-01-02T00-00-00.5"

    def test_newest_run_is_read_where_it_has_all_tasks(self, tmp_path: Path) -> None:
        for date, target in ((self.OLD, 0), (self.NEW, 1)):
            write(tmp_path, f"base/samples_quiz_{date}.jsonl", SAMPLE | {"target": target})
        found, _ = read_lm_eval(tmp_path)
        assert (found.ids, found.nll.tolist()) == (("quiz/0",), [1.25])
        assert found.metadata["notes"] == [f"read the newest of 2 runs, {self.NEW}"]

    def test_runs_of_different_tasks_belong_together(self, tmp_path: Path) -> None:
        for task, date in (("quiz", self.OLD), ("prose", self.NEW)):
            write(tmp_path, f"samples_{task}_{date}.jsonl", SAMPLE)
        found, _ = read_lm_eval(tmp_path)
        assert set(found.ids) == {"quiz/0", "prose/0"}
        assert found.metadata["notes"] == []

    def test_runs_that_overlap_are_refused(self, tmp_path: Path) -> None:
        for task, date in (("quiz", self.OLD), ("prose", self.OLD), ("quiz", self.NEW)):
            write(tmp_path, f"samples_{task}_{date}.jsonl", SAMPLE)
        with pytest.raises(DataError, match=rf"{self.OLD} \(prose, quiz\), {self.NEW} \(quiz\); give a file"):
            read_lm_eval(tmp_path)

    @pytest.mark.parametrize("task", ["quiz", "prose"])
    def test_several_models_are_refused(self, tmp_path: Path, task: str) -> None:
        write(tmp_path, f"base/samples_quiz_{self.OLD}.jsonl", SAMPLE)
        write(tmp_path, f"tuned/samples_{task}_{self.NEW}.jsonl", SAMPLE)
        with pytest.raises(DataError, match=r"several models: base, tuned; give the folder"):
            read_lm_eval(tmp_path)
        assert len(read_lm_eval(tmp_path / "base")[0]) == 1


class TestOldVersions:
    def test_lists_next_to_their_results(self, tmp_path: Path) -> None:
        """Version 0.4.0 wrote a list, named by the model's arguments and the task, both with underscores."""
        (tmp_path / "results.json").write_text(json.dumps({"results": {"openai": {}, "lambada_openai": {}}}))
        sample = {"doc_id": 0, "target": " x", "resps": [[[-2.5, False]]], "filtered_resps": [[-2.5, False]], "acc": 0}
        file = tmp_path / "pretrained__base,dtype__float32_lambada_openai.jsonl"
        file.write_text(json.dumps([sample, sample | {"doc_id": 1}], indent=2))
        for path in (tmp_path, file):
            found, tasks = read_lm_eval(path)
            assert (found.ids, tasks) == (("lambada_openai/0", "lambada_openai/1"), 2 * ("lambada_openai",))
            assert (found.nll.tolist(), found.digests) == ([2.5, 2.5], None)
        file.write_text(json.dumps([sample, sample | {"perplexity": 1, "filtered_resps": [[2.5, False]], "doc_id": 1}]))
        with pytest.raises(DataError, match="sample 2: the log-likelihood"):
            read_lm_eval(file)
        (tmp_path / "pretrained__tuned_lambada_openai.jsonl").write_text(json.dumps([sample]))
        with pytest.raises(DataError, match="several models"):
            read_lm_eval(tmp_path)

    def test_files_of_any_name_have_the_same_ids(self, tmp_path: Path) -> None:
        for name in ("before.jsonl", "after.json"):
            assert read_lm_eval(write(tmp_path, name, SAMPLE))[0].ids == ("samples/0",)

    def test_filters_without_names(self, tmp_path: Path) -> None:
        answers = [{"doc_id": i, "target": "x", "resps": [[f"answer {i}"]]} for i in range(2)]
        strict = [sample | {"filtered_resps": ["[invalid]"], "exact_match": 0.0} for sample in answers]
        loose = [sample | {"filtered_resps": ["x"], "exact_match": 1.0} for sample in answers]
        file = write(tmp_path, "samples_gsm8k_x.jsonl", *strict, *loose)
        found, _ = read_lm_eval(file)
        assert found.ids == ("gsm8k/0/filter 1", "gsm8k/1/filter 1", "gsm8k/0/filter 2", "gsm8k/1/filter 2")
        np.testing.assert_array_equal(np.array(found.exact_match), [0, 0, 1, 1])
        other = [sample | {"resps": [["another answer"]]} for sample in loose]
        for twice in ((*strict, *strict), (*strict, *other), (*strict, loose[0])):
            write(tmp_path, "samples_gsm8k_x.jsonl", *twice)
            with pytest.raises(DataError, match="'gsm8k/0' occurs twice"):
                read_lm_eval(file)

    def test_write_out_of_version_0_3(self, tmp_path: Path) -> None:
        files = {
            "quiz": {"prompt_0": "q a", "logit_0": -2.0, "prompt_1": "q b", "logit_1": -1.0, "truth": 0, "acc": "0.0"},
            "lambada": {"prompt_0": "q a", "logit_0": -3.0, "logit_1": False, "truth": " a", "acc": "False"},
            "prose": {"logit_0": -6.0, "truth": "x", "word_perplexity": "(-6.0, 4)", "bits_per_byte": "(-6.0, 9)"},
            "gsm8k": {"prompt_0": "q", "logit_0": "42", "truth": "42", "acc": "1.0"},
        }
        for task, sample in files.items():
            (tmp_path / f"{task}_write_out_info.json").write_text(json.dumps([{"doc_id": 0} | sample], indent=4))
        found, _ = read_lm_eval(tmp_path)
        assert dict(zip(found.ids, found.nll, strict=True)) == pytest.approx(
            {"gsm8k/0": np.nan, "lambada/0": 3.0, "prose/0": 1.5, "quiz/0": 2.0}, nan_ok=True
        )
        np.testing.assert_array_equal(np.array(found.exact_match), [1, 0, np.nan, 0])
