"""The paper's released files give their numbers and names; a pickle never runs anything."""

from __future__ import annotations

import json
import os
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgetcast import DataError, ForgettingMatrix
from forgetcast.atlas.released import load_numbers, read_split
from support.cli import RunCommand
from support.data import planted

FOLDER = Path(os.environ.get("FORGETCAST_DATA", Path(__file__).parents[3] / "shared" / "data"))


def split(dtype: str = "f8", order: str = "C") -> dict[str, Any]:
    """A split as the released code writes it."""
    values = np.asarray(planted(6, 40, 1, 0.1), dtype=dtype, order=order)  # type: ignore[call-overload]
    infos = [{"cat": "flan", "name": f"task {i}", "split": "train"} for i in range(6)]
    return {
        "train_ocl_idxs": [0, 1, 2, 3],
        "test_ocl_idxs": [4, 5],
        "train_mat": values[:4],
        "test_mat": values[4:],
        "train_ocl_task_info": infos[:4],
        "test_ocl_task_info": infos[4:],
        "pt_task_info": {"cat": "dolma", "names": None, "split": "train", "ss_idxs": np.arange(3)},
    }


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(("dtype", "order"), [("f8", "C"), ("f4", "F"), (">f8", "C")])
def test_splits(tmp_path: Path, protocol: int, dtype: str, order: str) -> None:
    content = split(dtype, order)
    (tmp_path / "split.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    matrix = ForgettingMatrix.load(tmp_path / "split.pkl")
    assert matrix.tasks == tuple(f"flan/task {i}" for i in range(6))
    expected = np.concatenate([content["train_mat"], content["test_mat"]]).astype(np.float32)
    np.testing.assert_array_equal(matrix.values, expected)
    train, test = read_split(tmp_path / "split.pkl")
    assert (len(train["tasks"]), len(test["tasks"])) == (4, 2)


def test_what_stands_for_not_measured_is_nan(tmp_path: Path) -> None:
    content = split()
    content["test_mat"][0, :3] = [-10000, -100, -1e10]
    (tmp_path / "split.pkl").write_bytes(pickle.dumps(content))
    values = ForgettingMatrix.load(tmp_path / "split.pkl").values
    np.testing.assert_array_equal(np.argwhere(np.isnan(values)), [[4, 0], [4, 1], [4, 2]])


def test_arrays_with_their_names_beside_them(tmp_path: Path) -> None:
    values = planted(5, 30, 1, 0.1)
    np.save(tmp_path / "z.npy", values)
    meta = {
        "flan": {"start": 0, "stop": 2, "tasks": ["a", "b"]},
        "dolly": {"start": 2, "stop": 4, "tasks": None},
    }
    (tmp_path / "z.npy.meta").write_text(json.dumps(meta))
    matrix = ForgettingMatrix.load(tmp_path / "z.npy")
    assert matrix.tasks == ("flan/a", "flan/b", "dolly/0", "dolly/1", "4")
    np.testing.assert_array_equal(matrix.values, values.astype(np.float32))


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ([], "JSON object"),
        ({"flan": {"start": 0, "stop": 9}}, "start and stop"),
        ({"flan": {"start": "0", "stop": 2}}, "start and stop"),
        ({"flan": 3}, "start and stop"),
        ({"flan": {"start": 0, "stop": 2, "tasks": ["a"]}}, "2 rows, but 1 tasks"),
        ({"flan": {"start": 0, "stop": 2, "tasks": [1, 2]}}, "not a list of names"),
        ({"flan": {"start": 0, "stop": 2}, "tulu": {"start": 1, "stop": 2}}, "row 1 has a name"),
    ],
)
def test_names_that_do_not_fit_are_refused(tmp_path: Path, meta: Any, message: str) -> None:
    np.save(tmp_path / "z.npy", planted(2, 30, 1, 0.1))
    (tmp_path / "z.npy.meta").write_text(json.dumps(meta))
    with pytest.raises(DataError, match=message) as error:
        ForgettingMatrix.load(tmp_path / "z.npy")
    assert "z.npy.meta" in str(error.value)


def test_the_project_page(tmp_path: Path) -> None:
    content = {"arr": [[1.0, 2.0]], "ocl_tasks": ["MMLU/law"], "pt_tasks": ["Dolma_9", "Dolma_34"]}
    (tmp_path / "z.json").write_text(json.dumps(content))
    matrix = ForgettingMatrix.load(tmp_path / "z.json")
    assert (matrix.tasks, matrix.examples) == (("MMLU/law",), ("Dolma_9", "Dolma_34"))
    (tmp_path / "z.json").write_text(json.dumps({**content, "ocl_tasks": [3]}))
    with pytest.raises(DataError, match="ocl_tasks is not a list of names"):
        ForgettingMatrix.load(tmp_path / "z.json")


def test_the_authors_files() -> None:
    file = FOLDER / "olmo-7b-dolma.json"
    if not file.is_file():
        pytest.skip(f"{file} is not here; set FORGETCAST_DATA to the folder with the reference data")
    matrix = ForgettingMatrix.load(file)
    assert matrix.shape == (76, 1000)
    assert matrix.tasks[0] == "FLAN/aeslc_10templates"


class Runs:
    """Writes a file when it is unpickled by `pickle.load`."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


def hostile(target: Path) -> dict[str, bytes]:
    """Pickles that would write a file, or take all memory, or run forever."""
    call = f"__import__('pathlib').Path({str(target)!r}).touch()"
    inside = {**split(), "extra": Runs(eval, call)}
    obj = pickle.dumps(np.array([Runs(eval, call)], dtype=object))
    return {
        "eval": pickle.dumps(Runs(eval, call)),
        "system": pickle.dumps(Runs(os.system, f"touch {target}")),
        "inside": pickle.dumps(inside),
        "objects": obj,
        "old": pickle.dumps(Runs(eval, call), protocol=0),
        "dotted": b"\x80\x04\x8c\x05numpy\x8c\x0fdtype.__class__\x93.",
        "getattr": pickle.dumps(Runs(getattr, str, "format")),
        "load": pickle.dumps(Runs(np.load, str(target))),
        "memory": pickle.dumps(Runs(bytearray, 1 << 50)),
        "memo": b"\x80\x04Nr\xff\xff\xff\xff.",
        "long": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x0f.",
        "persistent": b"Pabc\n.",
        "extension": b"\x80\x02\x82\x01.",
        "ragged": pickle.dumps({"train_mat": [[1], [2, 3]], "test_mat": [[1]]}),
        "text": pickle.dumps({"train_mat": "abc", "test_mat": [["x"]]}),
        "huge": pickle.dumps({"train_mat": [[10**400]], "test_mat": [[1.0]]}),
        "empty": b"",
        "setting": b"\x80\x04cnumpy\ndtype\n(N}X\x04\x00\x00\x00codeNst0b.",
    }


@pytest.mark.parametrize("name", list(hostile(Path("x"))))
def test_hostile_pickles_are_refused_and_run_nothing(tmp_path: Path, name: str, run: RunCommand) -> None:
    (tmp_path / "split.pkl").write_bytes(hostile(tmp_path / "ran")[name])
    code, _, err = run("bench", tmp_path / "split.pkl")
    assert code == 2
    assert "split.pkl" in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "ran").exists()


def test_the_hostile_pickles_would_run(tmp_path: Path) -> None:
    for name in ("eval", "inside", "objects", "old"):
        pickle.loads(hostile(tmp_path / name)[name])
        assert (tmp_path / name).exists()


@given(st.binary(max_size=60), st.integers(0, 400), st.integers(0, 255))
def test_damaged_pickles_are_refused_or_read(extra: bytes, at: int, value: int) -> None:
    content = bytearray(pickle.dumps(split()))
    content[at % len(content)] = value
    for damaged in (bytes(content), extra):
        try:
            load_numbers(damaged)
        except DataError:
            continue
        opcodes = {opcode.name for opcode, _, _ in pickletools.genops(damaged)}
        assert "STOP" in opcodes


def test_plain_containers() -> None:
    value = {"a": [1, (2.5, "x", None, True)], "b": OrderedDict(c={1, 2}), "d": frozenset([3]), "e": np.float64(1.5)}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert load_numbers(pickle.dumps(value, protocol=protocol)) == value


def test_bench_uses_the_split_and_analyze_reads_it(tmp_path: Path, run: RunCommand) -> None:
    (tmp_path / "split.pkl").write_bytes(pickle.dumps(split()))
    words = ("-k", "5", "--seeds", "1", "--methods", "mean,additive", "--json")
    code, out, _ = run("bench", tmp_path / "split.pkl", *words)
    assert code == 0
    np.save(tmp_path / "z.npy", ForgettingMatrix.load(tmp_path / "split.pkl").values)
    same = run("bench", tmp_path / "z.npy", "--test", "4,5", *words)[1]
    assert [row["rmse"] for row in json.loads(out)] == [row["rmse"] for row in json.loads(same)]
    code, out, _ = run("analyze", tmp_path / "split.pkl", "--json")
    assert code == 0
    assert json.loads(out)["tasks"] == 6
