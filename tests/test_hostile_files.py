"""Files of ours that are damaged, forged or of a wrong shape: one line that names the file, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forgetcast import Pool, Scores
from forgetcast.completion import Bayesian, Forecast
from forgetcast.completion.forecast import TaskForecast
from forgetcast.data import Recipe
from forgetcast.errors import ConfigError, DataError, ForgetcastError
from forgetcast.experiments import SequenceResult, Verification
from forgetcast.experiments.collect import CollectConfig
from forgetcast.files import atomic_path, check_destination, decode_json, read_json
from forgetcast.measure import read_inspect, read_lm_eval
from forgetcast.replay import ReplayPlan
from support.data import make_pool, make_scores, planted
from support.plans import plan_for

DEEP, LONG = "[" * 100_000, "9" * 5000
NOT_JSON = {
    "empty": b"",
    "cut": b'{"a": ',
    "deep": DEEP.encode(),
    "digits": f'{{"a": {LONG}}}'.encode(),
    "bytes": b'{"a": "\xff"}',
    "twice": b'{"a": 1, "a": 2}',
    "half a pair": b'{"a": "\\ud800"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
}


def one_line(path: Path, read: Callable[[Path], object], error: type[ForgetcastError] = DataError) -> str:
    """Return the message that reading the file raises, which is one line and names the file."""
    with pytest.raises(error) as raised:
        read(path)
    message = str(raised.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 1000
    return message


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A file of each kind, by its kind."""
    pool = make_pool(6)
    make_scores(pool, np.arange(6.0), max_length=32, model="m").save(tmp_path / "score.parquet")
    row: Forecast = Bayesian().fit(planted(8, 6, 1, 0.1)).predict([1, 4], np.array([0.1, 0.2]))
    TaskForecast.from_forecast(row, pool, method="bayesian").save(tmp_path / "forecast.parquet")
    plan_for(pool, "random", 0.5).save(tmp_path / "plan.parquet")
    return {path.stem: path for path in tmp_path.iterdir()}


READ: dict[str, Callable[[Path], Any]] = {
    "score": Scores.load,
    "forecast": TaskForecast.load,
    "plan": ReplayPlan.load,
}


def forge(path: Path, metadata: bytes | dict[str, Any] | None = None, **columns: Any) -> Path:
    """Rewrite a file without its seal, with other metadata or columns; a field that is ... is removed."""
    table = pq.read_table(path)
    kept = (table.schema.metadata or {})[b"forgetcast"]
    if isinstance(metadata, dict):
        changed = {**json.loads(kept), **metadata}
        metadata = json.dumps({name: value for name, value in changed.items() if value is not ...}).encode()
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.chunked_array([values]))
    pq.write_table(table.replace_schema_metadata({b"forgetcast": kept if metadata is None else metadata}), path)
    return path


@pytest.mark.parametrize("kind", READ)
def test_a_file_without_a_seal_is_read(files: dict[str, Path], kind: str) -> None:
    assert READ[kind](forge(files[kind])).ids == READ[kind](files[kind]).ids


@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize("metadata", [*NOT_JSON.values(), b"[]", b"null", b'"text"', b"3"], ids=repr)
def test_metadata_that_are_no_object(files: dict[str, Path], kind: str, metadata: bytes) -> None:
    assert "metadata" in one_line(forge(files[kind], metadata), READ[kind])


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        *(("score", "pool", value) for value in (None, 3, "", ["x"])),
        ("score", "max_length", "x"),
        ("score", "max_length", -5),
        ("score", "max_length", 10**400),
        ("score", "text", []),
        ("score", "model_hash", None),
        *(("forecast", "level", value) for value in (..., None, "high", 0, 1, 1e308, float("nan"), -0.5)),
        *(("forecast", "misfit", value) for value in (..., None, [], 2, float("nan"))),
        *(("forecast", "pool", value) for value in (..., None, 3, "")),
        ("forecast", "method", 1),
        ("forecast", "task", {}),
        ("forecast", "different_tokens", -1),
        *(("plan", "ratio", value) for value in (..., None, "x", -1, float("nan"), float("inf"), 10**400, 0)),
        *(("plan", "seed", value) for value in (..., None, -1, 2**32, 1e30, "x", 0.5)),
        *(("plan", "pool", value) for value in (..., None, 3, "")),
        *(("plan", "phase", value) for value in ("later", 3, [])),
        ("plan", "strategy", ["x"]),
        ("plan", "repeat", "perhaps"),
        ("plan", "summary", {}),
    ],
)
def test_a_field_of_metadata(files: dict[str, Path], kind: str, field: str, value: Any) -> None:
    message = one_line(forge(files[kind], {field: value}), READ[kind], ForgetcastError)
    assert field in message or "incompatible" in message


@pytest.mark.parametrize(
    ("kind", "column", "values"),
    [
        ("score", "truncated", pa.array(["False"] * 6)),
        ("score", "truncated", pa.array([True, None] * 3)),
        ("score", "tokens", pa.array([0.5] * 6)),
        ("score", "tokens", pa.array([-1] * 6)),
        ("score", "nll", pa.array(["1"] * 6)),
        ("score", "nll", pa.array([-1.0] * 6)),
        ("score", "nll", pa.array([float("inf")] * 6)),
        ("score", "id", pa.array(["a"] * 6)),
        ("score", "id", pa.array([1] * 6)),
        ("score", "id", pa.array([None] * 6, pa.string())),
        ("score", "id", pa.Array.from_buffers(pa.string(), 6, [None, pa.py_buffer(np.arange(7, dtype="i4").tobytes()),
                                                                  pa.py_buffer(b"\xff\xfe\xfd\xfc\xfb\xfa")])),
        *(("forecast", "std", pa.array([value] * 6)) for value in (-1.0, float("nan"), 1e300)),
        *(("forecast", "mean", pa.array([value] * 6)) for value in (1e300, float("nan"), float("inf"), "x", None)),
        ("forecast", "lower", pa.array([1e6] * 6)),
        ("forecast", "upper", pa.array([-1e6] * 6)),
        ("forecast", "probed", pa.array(["True"] * 6)),
        *(("plan", "weight", pa.array([value] * 6)) for value in (5e-324, -1.0, float("inf"), float("nan"), 7.0, "x")),
        ("plan", "held_out", pa.array(["False"] * 6)),
        ("plan", "held_out", pa.array([True] * 6)),
    ],
)  # fmt: skip
def test_a_column(files: dict[str, Path], kind: str, column: str, values: pa.Array) -> None:
    one_line(forge(files[kind], **{column: values}), READ[kind])


@pytest.mark.parametrize("kind", READ)
def test_a_damaged_file_is_refused_wherever_a_bit_flips(files: dict[str, Path], kind: str) -> None:
    content = files[kind].read_bytes()
    for at in range(4, len(content), 97):
        files[kind].write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        one_line(files[kind], READ[kind])


def test_a_damaged_pool_is_refused_and_a_rewritten_one_is_read(tmp_path: Path) -> None:
    pool, path = make_pool(6), tmp_path / "pool.parquet"
    pool.save(path)
    pq.write_table(pq.read_table(path).slice(0, 3), tmp_path / "part.parquet")
    assert Pool.load(tmp_path / "part.parquet").ids == pool.ids[:3], "filtered by another tool"
    content = bytearray(path.read_bytes())
    content[60] ^= 1
    path.write_bytes(content)
    assert "damaged" in one_line(path, Pool.load)


@pytest.mark.parametrize("name", NOT_JSON)
def test_json_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(NOT_JSON[name])
    for read in (read_json, Verification.load, SequenceResult.load):
        one_line(path, read)


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00"}')
    assert read_json(tmp_path / "a.json") == {"a": "\N{GRINNING FACE}"}
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfsteps: 3")
    assert Recipe.load(tmp_path / "a.yaml").steps == 3


RUN = {"task": "t", "arm": "none", "seed": 0, "mean": 0.1, "worst_tenth": 0.2, "new_task_loss": 1.0, "replayed": 0,
       "steps": 3, "seconds": 1.0}  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [
        {"runs": [], "judged": 1, "ratio": 0.1},
        {"judged": 1, "ratio": 0.1},
        {"runs": [{**RUN, "mean": float("nan")}], "judged": 1, "ratio": 0.1},
        {"runs": [{**RUN, "mean": 10**400}], "judged": 1, "ratio": 0.1},
        {"runs": [{**RUN, "arm": 3}], "judged": 1, "ratio": 0.1},
        {"runs": 3, "judged": 1, "ratio": 0.1},
        {"runs": [RUN], "judged": "x", "ratio": 0.1},
        [],
        None,
    ],
)
def test_a_verification_of_a_wrong_shape(tmp_path: Path, content: Any) -> None:
    (tmp_path / "v.json").write_text(json.dumps(content))
    one_line(tmp_path / "v.json", Verification.load)
    one_line(tmp_path / "v.json", SequenceResult.load)


@pytest.mark.parametrize("line", [DEEP, f'{{"doc_id": {LONG}}}', '{"doc_id": 1, "doc_id": 2}', "3", '{"doc_id": []}'])
def test_logs_of_other_tools(tmp_path: Path, line: str) -> None:
    path = tmp_path / "samples_t_2024.jsonl"
    path.write_text(line)
    one_line(path, read_lm_eval)
    (tmp_path / "log.json").write_text(line)
    one_line(tmp_path / "log.json", read_inspect)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "x", "text": "y"}', "'text' occurs twice"),
        ('{"id": "\\ud800", "text": "x"}', "half of a surrogate pair"),
        ('{"id": "a", "text": "x \\udc00"}', "half of a surrogate pair"),
        ('{"messages": ' + "[" * 900 + "]" * 900 + "}", ""),
        (f'{{"text": {LONG}}}', "4,300 digits"),
    ],
)
def test_lines_of_a_pool(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "p.jsonl").write_text('{"text": "good"}\n' + line)
    message = one_line(tmp_path / "p.jsonl", lambda path: Pool.load(path, strict=True))
    assert "line 2" in message
    assert said in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 5000, "nested too deeply"),
        ("a: " + "{a: " * 5000, "nested too deeply"),
        (f"steps: {LONG}", "steps" if LONG else ""),
        ("steps: 1\nsteps: 2", "'steps' occurs twice"),
        ("steps: !!bool maybe", "not YAML"),
        ("steps: !!timestamp x", "not YAML"),
        ("steps: 2020-99-99", "not YAML"),
        ("steps: !!python/object/apply:os.system [ls]", "not YAML"),
        ("a: &a [*a]", "there is no field 'a'"),
        ("steps: 1000000000", "steps"),
        ("steps: 1e30", "steps"),
        ("steps: 100000\nbatch_size: 100000", "examples are more than"),
        ("batch_size: 1000000000000", "batch_size"),
        ("lora_rank: 1000000000", "lora_rank"),
        ("learning_rate: .inf", "learning_rate"),
        ("learning_rate: .nan", "learning_rate"),
        ("weight_decay: .inf", "weight_decay"),
        ("seed: -1", "seed"),
        ("seed: 4294967296", "seed"),
        ("- 1", "must be an object, not a list"),
        ("x" * 2_000_000, "no file of settings"),
    ],
    ids=lambda text: text[:30],
)
def test_settings(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    message = one_line(path, Recipe.load, ConfigError)
    assert said in message or "digits" in message
    one_line(path, CollectConfig.load, ConfigError)


def test_a_merge_key_is_no_repeated_key(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("<<: &d {steps: 3}\nseed: 1")
    assert (Recipe.load(tmp_path / "r.yaml").steps, Recipe.load(tmp_path / "r.yaml").seed) == (3, 1)


def test_a_plan_does_not_list_more_than_a_fine_tune_takes() -> None:
    plan = plan_for(make_pool(6), "random", 1e12, repeat=True)
    with pytest.raises(ConfigError, match="at most 100,000,000"):
        plan.count(200, 8)


def test_decoding_keeps_the_place_of_an_error() -> None:
    with pytest.raises(json.JSONDecodeError, match="column 7"):
        decode_json('{"a": }')


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("folder", "is a folder"),
        ("file/below/x.parquet", "is a file, not a folder"),
        ("new/" + "a" * 250, "too long"),
        ("a" * 250 + "/x", "too long"),
        ("\ud800", "cannot be encoded"),
        ("/dev/null", "no regular file"),
        ("/proc/self/x.parquet", "cannot be written"),
    ],
)
def test_a_destination_is_tried(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    with pytest.raises(DataError, match=said):
        check_destination(tmp_path / name)
    with pytest.raises(DataError):
        check_destination(tmp_path / "file", folder=True)
    check_destination(tmp_path / "new" / "x.parquet")
    check_destination(tmp_path / "file")
    check_destination(tmp_path / "folder", folder=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"], "nothing is changed"


def test_a_file_that_is_not_written_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    for folder in ("a/b/c", "kept", "kept/d"):
        with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / folder / "file") as path:
            path.write_bytes(bytes([1 // 0]))
    assert [path.name for path in tmp_path.rglob("*")] == ["kept"]
    with atomic_path(tmp_path / "a" / "b" / "file") as path:
        path.write_bytes(b"x")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"x"
