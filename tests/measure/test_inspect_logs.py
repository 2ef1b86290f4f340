from __future__ import annotations

import json
import struct
import subprocess
import sys
import zipfile
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from forgetcast import DataError
from forgetcast.measure.diff import difference
from forgetcast.measure.inspect_logs import is_inspect, read_inspect
from support.cli import RunCommand

# Two models, each with a log per format; two scorers, two epochs, a sample that fails, and long messages.
INSPECT = """
import sys
from inspect_ai import Task, eval
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessageSystem, ChatMessageUser, ModelOutput, ModelUsage, get_model
from inspect_ai.scorer import Score, Target, match, mean, scorer
from inspect_ai.solver import Generate, TaskState, generate, solver

@scorer(metrics=[mean()])
def grade():
    async def score(state: TaskState, target: Target) -> Score:
        return Score(value={"sum": 1, "long": 0.5, "choice": True}[state.sample_id])
    return score

@solver
def fail():
    async def solve(state: TaskState, generate: Generate) -> TaskState:
        if state.sample_id == "broken":
            raise ValueError("planted")
        return state
    return solve

def answer(text):
    output = ModelOutput.from_content("mockllm/model", text)
    output.usage = ModelUsage()  # else it counts tokens, for which it needs the network
    return output

samples = [
    Sample(id="sum", input="1+1?", target="2"),
    Sample(id="long", input=[ChatMessageSystem(content="be " * 200), ChatMessageUser(content="so " * 200)], target="3"),
    Sample(id="choice", input="Which?", target="A", choices=["yes", "no"]),
    Sample(id="broken", input="x", target="y"),
]
answers = {"base": ["2", "3", "A"] * 2, "tuned": ["2", "no", "A", "no", "3", "A"]}
for name, texts in answers.items():
    for format in ("json", "eval"):
        model = get_model("mockllm/" + name, custom_outputs=[answer(text) for text in texts])
        task = Task(MemoryDataset(samples), solver=[fail(), generate()], scorer=[match(), grade()], name="sums")
        eval(
            task, model=model, epochs=2, log_dir=f"{sys.argv[1]}/{name}.{format}", log_format=format, display="none",
            fail_on_error=False, max_samples=1,
        )
"""


def log(samples: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """Build a log as the documentation of Inspect describes it."""
    spec = {
        "run_id": "r1",
        "created": "2026-01-01T00:00:00+00:00",
        "task": "quiz",
        "model": "openai/base",
        "dataset": {"samples": 2, "sample_ids": ["a", "b"]},
        "config": {"epochs": 1},
        "scorers": [{"name": "match"}],
    }
    return {
        "version": 2,
        "status": changes.pop("status", "success"),
        "eval": spec | changes,
        "samples": samples,
    }


def sample(id_: str | int = "a", value: Any = "C", **changes: Any) -> dict[str, Any]:
    scores = {"match": {"value": value, "answer": "x"}}
    return {"id": id_, "epoch": 1, "input": "Why?", "target": "x", "scores": scores} | changes


def write(path: Path, content: dict[str, Any]) -> Path:
    """Write a log in the format that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(content))
        return path
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("_journal/start.json", json.dumps({"version": 2, "eval": content["eval"]}))
        for each in content["samples"]:
            archive.writestr(f"samples/{each['id']}_epoch_{each['epoch']}.json", json.dumps(each))
        archive.writestr("header.json", json.dumps({key: content[key] for key in ("version", "status", "eval")}))
    return path


def zstandard(entries: dict[str, bytes]) -> bytes:
    """Build a zip archive by method 93, which Python's zipfile cannot write before 3.14."""
    body, directory = b"", b""
    for name, content in entries.items():
        packed = pa.compress(content, codec="zstd", asbytes=True)
        fields = struct.pack(
            "<HHHHHIIIHH", 63, 0, 93, 0, 33, zlib.crc32(content), len(packed), len(content), len(name), 0
        )
        directory += b"PK\1\2" + struct.pack("<H", 63) + fields + struct.pack("<HHHII", 0, 0, 0, 0, len(body))
        directory += name.encode()
        body += b"PK\3\4" + fields + name.encode() + packed
    end = struct.pack("<HHHHIIH", 0, 0, len(entries), len(entries), len(directory), len(body), 0)
    return body + directory + b"PK\5\6" + end


class TestInspect:
    def test_logs_written_by_inspect(self, tmp_path: Path, run: RunCommand) -> None:
        if find_spec("inspect_ai") is None:
            pytest.skip("inspect_ai is not installed; the logs below are written by hand")
        subprocess.run([sys.executable, "-c", INSPECT, str(tmp_path)], check=True, capture_output=True)
        scores, tasks = read_inspect(tmp_path / "base.json")
        assert set(tasks) == {"sums"}
        assert len(scores) == 4 * 2 * 2
        assert scores.exact_match is not None
        right = dict(zip(scores.ids, scores.exact_match.tolist(), strict=True))
        for epoch in (1, 2):
            for id_, expected in (("sum", [1, 1]), ("long", [1, np.nan]), ("choice", [1, 1]), ("broken", 2 * [np.nan])):
                found = [right[f"sums/{id_}/epoch {epoch}/{scorer}"] for scorer in ("match", "grade")]
                np.testing.assert_array_equal(found, expected)
        assert [note.partition(": ")[2] for note in scores.metadata["notes"]] == [
            "4 score(s) not compared: the sample ended in an error",
            "2 score(s) not compared: the score is neither right nor wrong",
        ]
        assert scores.metadata["model"] == "mockllm/base"
        packed, _ = read_inspect(tmp_path / "base.eval")
        np.testing.assert_array_equal(packed.exact_match, scores.exact_match)
        assert (packed.ids, packed.digests) == (scores.ids, scores.digests)
        assert read_inspect(tmp_path / "tuned.eval")[0].digests == scores.digests
        code, out, err = run("diff", tmp_path / "base.eval", tmp_path / "tuned.json", "--json")
        assert code == 0
        assert json.loads(out)["flips"] | {"mcnemar_p": 0} == {
            "examples": 10, "right_before": 1.0, "right_after": 0.8, "right_to_wrong": 2, "wrong_to_right": 0,
            "mcnemar_p": 0,
        }  # fmt: skip
        assert "warning" in err

    @pytest.mark.parametrize("name", ["quiz.json", "quiz.eval"])
    def test_values_are_right_or_wrong_or_not_compared(self, tmp_path: Path, name: str) -> None:
        values = {
            "C": 1, "I": 0, "N": 0, "P": None, "yes": 1, "No": 0, "c": None, "1": 1, "0.0": 0, "0.5": None, "A": None,
            1: 1, 0.0: 0, 0.25: None, 7: None, float("nan"): None,
        }  # fmt: skip
        samples = [sample(i, value) for i, value in enumerate([*values, True, False, None, [1], {"match": 1}])]
        expected = [*values.values(), 1, 0, None, None, None]
        content = log(samples, dataset={"sample_ids": list(range(len(samples)))})
        found, _ = read_inspect(write(tmp_path / name, content))
        assert found.ids == tuple(f"quiz/{i}" for i in range(len(samples)))
        np.testing.assert_array_equal(found.exact_match, [np.nan if value is None else value for value in expected])
        assert all(
            reason is not None and reason.startswith("Inspect keeps no log-likelihood") for reason in found.reasons
        )
        counted = sum(int(note.partition(": ")[2].split()[0]) for note in found.metadata["notes"])
        assert counted == expected.count(None)

    def test_samples_without_a_result_say_why(self, tmp_path: Path, run: RunCommand) -> None:
        samples = [
            sample("a/1", error={"message": "planted"}),
            sample("b", invalidation={"author": "me"}),
            sample("c", scores=None),
        ]
        content = log(samples, status="cancelled", dataset={"sample_ids": ["a/1", "b", "c", "d"]})
        path = write(tmp_path / "quiz.eval", content)
        found, _ = read_inspect(path)
        assert found.ids == ("quiz/a/1", "quiz/b", "quiz/c", "quiz/d")
        assert [str(reason).partition("; ")[2] for reason in found.reasons] == [
            "the sample ended in an error",
            "the sample was marked invalid",
            "the sample was not scored",
            "the run did not reach the sample",
        ]
        assert found.exact_match is not None
        assert np.isnan(found.exact_match).all()
        assert found.metadata["notes"][0] == "quiz: the run has the status 'cancelled'"
        _, _, err = run("diff", path, path)
        assert "the run has the status 'cancelled'" in " ".join(err.split())

    def test_log_of_a_run_that_died(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "quiz.eval", "w") as archive:
            content = log([])
            archive.writestr("_journal/start.json", json.dumps({"version": 2, "eval": content["eval"]}))
            archive.writestr("samples/a_epoch_1.json", json.dumps(sample()))
        found, _ = read_inspect(tmp_path)
        np.testing.assert_array_equal(found.exact_match, [1, np.nan])
        assert found.metadata["notes"][0] == "quiz: the run has the status 'started'"

    def test_digest_is_of_what_was_asked(self, tmp_path: Path) -> None:
        message = {"id": "random1", "role": "user", "content": "Why?"}

        def digest(name: str = "quiz.json", **changes: Any) -> str | None:
            content = log([sample(**changes)], dataset={})
            found = read_inspect(write(tmp_path / name, content))[0].digests
            return found[0] if found else None

        first = digest(input=[message])
        assert first is not None
        assert first == digest(input=[message | {"id": "random2"}])
        assert first == digest("quiz.eval", input=[message])
        assert first == digest(input=[message | {"content": "attachment://k"}], attachments={"k": "Why?"})
        others = [
            digest(input=[message | {"content": "How?"}]),
            digest(input=[message], target="y"),
            digest(input=[message], choices=["x", "y"]),
            digest(input=[message], scores={"includes": {"value": "C"}}),
        ]
        assert len({first, *others}) == 5

    def test_large_sample_is_a_folder_of_the_archive(self, tmp_path: Path) -> None:
        whole = read_inspect(write(tmp_path / "whole.json", log([sample(input="second")], dataset={})))[0]
        with zipfile.ZipFile(tmp_path / "parts.eval", "w") as archive:
            archive.writestr("header.json", json.dumps(log([], dataset={})))
            archive.writestr("samples/a_epoch_1/sample.json", json.dumps(sample(input="attachment://1")))
            archive.writestr("samples/a_epoch_1/attachments/1.json", json.dumps(["second"]))
            archive.writestr("samples/a_epoch_1/attachments/0.json", json.dumps(["first"]))
            archive.writestr("samples/a_epoch_1/events/stats.json", "{}")
        parts = read_inspect(tmp_path / "parts.eval")[0]
        assert (parts.ids, parts.digests) == (whole.ids, whole.digests)

    def test_zstandard(self, tmp_path: Path) -> None:
        entries = {
            "samples/a_epoch_1.json": json.dumps(sample() | {"events": 1000 * ["x"]}).encode(),
            "header.json": json.dumps(log([], dataset={})).encode(),
        }
        path = tmp_path / "quiz.eval"
        path.write_bytes(zstandard(entries))
        np.testing.assert_array_equal(read_inspect(path)[0].exact_match, [1])
        packed = bytearray(path.read_bytes())
        packed[60] ^= 255
        path.write_bytes(packed)
        with pytest.raises(DataError, match=r"samples/a_epoch_1.json is missing or broken"):
            read_inspect(path)

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("a.eval", b""),
            ("a.eval", b"PK\3\4 and no more"),
            ("a.eval", zstandard({"samples/a_epoch_1.json": b"{}"})),
            ("a.eval", zstandard({"header.json": b"not json"})),
            ("a.eval", zstandard({"header.json": 100_000 * b"["})),
            ("a.eval", zstandard({"header.json": b"{}"})),
            ("a.json", b'{"eval": 7}'),
            ("a.json", b'{"eval": ' + 100_000 * b"["),
            ("a.json", b'{"version": 2, "eval": {"task": "\xff"}}'),
            ("a.json", json.dumps(log([sample()] * 2)).encode()),
            ("a.json", json.dumps(log([{"id": "a"}])).encode()),
            ("a.json", json.dumps(log([sample([1])])).encode()),
            ("a.json", json.dumps(log([sample(value=10**400)])).encode()),
            ("a.json", json.dumps(log([sample("\ud83d")])).encode()),
            ("a.json", json.dumps(log([sample()], task="\ud83d")).encode()),
            ("a.json", json.dumps(log([], dataset={})).encode()),
        ],
    )
    def test_faults_are_one_line(self, tmp_path: Path, name: str, content: bytes) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            read_inspect(path)
        assert str(caught.value).startswith(str(path))
        assert str(caught.value).count(str(path)) == 1
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400

    def test_folders(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no logs of Inspect"):
            read_inspect(tmp_path)
        write(tmp_path / "1.eval", log([sample(value="I")]))
        write(tmp_path / "2.json", log([sample()], task="other"))
        assert set(read_inspect(tmp_path)[1]) == {"quiz", "other"}
        newer = {"run_id": "r2", "created": "2026-01-01T01:30:00+02:00"}  # half an hour earlier, in fact
        write(tmp_path / "3.eval", log([sample()], **newer))
        found, _ = read_inspect(tmp_path)
        assert found.exact_match is not None
        assert found.exact_match[found.ids.index("quiz/a")] == 0
        assert "read the newest of 2 runs, 2026-01-01T00:00:00Z r1" in found.metadata["notes"]
        write(tmp_path / "3.eval", log([sample()], **newer | {"created": "2026-01-02T00:00:00+00:00"}))
        with pytest.raises(DataError, match="several runs"):
            read_inspect(tmp_path)
        write(tmp_path / "3.eval", log([sample()], model="openai/tuned"))
        with pytest.raises(DataError, match="several models: openai/base, openai/tuned"):
            read_inspect(tmp_path)

    def test_logs_are_told_from_samples_of_the_harness(self, tmp_path: Path) -> None:
        assert is_inspect(write(tmp_path / "inspect/quiz.json", log([])))
        assert is_inspect(tmp_path / "inspect")
        (tmp_path / "harness").mkdir()
        (tmp_path / "harness/samples_quiz_x.jsonl").write_text("{}")
        (tmp_path / "harness/results_x.json").write_text('{"results": {"eval": {}}}')
        (tmp_path / "list.json").write_text('[{"doc_id": 0}]')
        for path in ("harness", "harness/samples_quiz_x.jsonl", "list.json", "absent.json"):
            assert not is_inspect(tmp_path / path)

    def test_flips(self, tmp_path: Path) -> None:
        before, _ = read_inspect(write(tmp_path / "before.eval", log([sample("a"), sample("b")])))
        after, _ = read_inspect(write(tmp_path / "after.json", log([sample("a", "I"), sample("b")])))
        flips = difference(before, after).flips
        assert flips is not None
        assert (flips.examples, flips.right_to_wrong) == (2, 1)
