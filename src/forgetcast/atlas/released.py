"""Matrices of numbers in files: NumPy's, JSON, and those of the paper's released statistics, with their names.

    X.npy, X.npy.meta    the matrix, and JSON with the rows and the task names of each family: {start, stop, tasks}
    X.pkl                a split: training and test rows with the tasks' families and names
    X.json               the project page's: `arr`, `ocl_tasks` (of the rows), `pt_tasks` (of the columns)

None of them has the texts or the base losses, so they are matrices and no atlases.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from forgetcast.errors import DataError
from forgetcast.files import read_json

PICKLES = (".pkl", ".pickle")

_NOT_MEASURED = (-10_000.0, -100.0, -1e10)
"""What the released code writes in place of a number."""

_DTYPE = re.compile(r"[biuf][1248]")

Parts = dict[str, Any]
"""Arguments of ForgettingMatrix: 'values', 'tasks', 'examples'."""


def read_matrix(path: Path) -> Parts:
    """Read a matrix and the names that its file has, as arguments of `ForgettingMatrix`.

    Raises
    ------
    DataError
        If the file cannot be read, or is something else; a pickle that has more than numbers, arrays of them and
        plain containers is not loaded.
    """
    if path.suffix == ".npy":
        return _read_npy(path)
    if path.suffix in PICKLES:
        return _read_split(path)
    if path.suffix == ".json":
        return _read_json(path)
    raise DataError(f"{path}: a matrix is read from .npy, .json, .pkl, or an atlas's directory")


def _read_json(path: Path) -> Parts:
    content = read_json(path)
    if not isinstance(content, dict):
        return {"values": content}
    if "arr" not in content:
        raise DataError(f"{path}: a list of rows of the same length is needed: 'arr' is missing")
    names = {"tasks": "ocl_tasks", "examples": "pt_tasks"}
    return {
        "values": content["arr"],
        **{axis: _strings(content[key], f"{path}: {key}") for axis, key in names.items() if key in content},
    }


def _strings(names: Any, where: str) -> list[str]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{where} is not a list of names")
    return names


def _read_npy(path: Path) -> Parts:
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError, MemoryError, RecursionError) as error:
        raise DataError(f"{path} is not a readable .npy file of numbers: {error}") from None
    beside = path.with_name(f"{path.name}.meta")
    if not beside.is_file():
        return {"values": values}
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.dtype.kind not in "biuf":
        raise DataError(f"{path} is not a matrix of numbers")
    meta = read_json(beside)
    return {"values": _measured(values), "tasks": _families(meta, len(values), beside)}


def _families(meta: Any, rows: int, where: Path) -> list[str]:
    """Return the names of the rows: FAMILY/TASK, or FAMILY/NUMBER where the tasks have no names."""
    names: list[str | None] = [None] * rows
    if not isinstance(meta, dict):
        raise DataError(f"{where}: a JSON object with a family of tasks under each name is needed")
    for family, facts in meta.items():
        place = f"{where}: {family!r}"
        start, stop = (facts.get(key) if isinstance(facts, dict) else None for key in ("start", "stop"))
        if type(start) is not int or type(stop) is not int or not 0 <= start <= stop <= rows:
            raise DataError(f"{place}: start and stop must be rows of a matrix with {rows}")
        tasks = facts.get("tasks")
        known = [str(i) for i in range(stop - start)] if tasks is None else _strings(tasks, f"{place}: tasks")
        if len(known) < stop - start:
            raise DataError(f"{place}: there are {stop - start} rows, but {len(known)} tasks")
        for row in range(start, stop):
            if names[row] is not None:
                raise DataError(f"{place}: row {row} has a name already, {names[row]!r}")
            names[row] = f"{family}/{known[row - start]}"
    return [name if name is not None else str(row) for row, name in enumerate(names)]


def _measured(values: Any) -> np.ndarray:
    """Return the numbers, with NaN where the released code wrote that there is none."""
    values = np.asarray(values, dtype=np.float64)
    return np.where(np.isin(values, _NOT_MEASURED), np.nan, values)


def read_split(path: Path) -> tuple[Parts, Parts]:
    """Read the training rows and the test rows of a split, each as arguments of `ForgettingMatrix`.

    Raises
    ------
    DataError
        As `read_matrix`.
    """
    try:
        content = load_numbers(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except DataError as error:
        raise DataError(f"{path} {error}") from None
    if not isinstance(content, dict) or not {"train_mat", "test_mat"} <= content.keys():
        raise DataError(f"{path} is not a split of the released statistics: train_mat or test_mat is missing")
    return _half(content, "train", path), _half(content, "test", path)


def _half(content: Mapping[Any, Any], name: str, path: Path) -> Parts:
    try:
        values = _measured(content[f"{name}_mat"])
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(f"{path}: {name}_mat is not a matrix of numbers: {error}") from None
    infos = content.get(f"{name}_ocl_task_info")
    if values.ndim != 2 or not isinstance(infos, list | type(None)):
        raise DataError(f"{path}: {name}_mat is not a matrix, or its tasks are not a list")
    if infos is None:
        return {"values": values, "tasks": [f"{name}/{row}" for row in range(len(values))]}
    names = [(info.get("cat"), info.get("name")) for info in infos if isinstance(info, dict)]
    if len(names) != len(values) or not all(isinstance(part, str) for name in names for part in name):
        raise DataError(f"{path}: {name}_ocl_task_info does not have a cat and a name for each of {len(values)} rows")
    return {"values": values, "tasks": [f"{family}/{task}" for family, task in names]}


def _read_split(path: Path) -> Parts:
    train, test = read_split(path)
    if train["values"].shape[1] != test["values"].shape[1]:
        raise DataError(f"{path}: train_mat and test_mat have different numbers of columns")
    return {"values": np.concatenate([train["values"], test["values"]]), "tasks": train["tasks"] + test["tasks"]}


def load_numbers(content: bytes) -> Any:
    """Load a pickle of numbers, strings, arrays of numbers and plain containers, without running what it names.

    Nothing of the pickle is called: what it names is looked up in a list, and stands for a function here that makes
    an array of the bytes that follow.

    Raises
    ------
    DataError
        If it names anything else, or is damaged.
    """
    try:
        return _Numbers(io.BytesIO(content)).load()
    except DataError:
        raise
    except Exception as error:  # bytes that are no pickle can raise anything
        raise DataError(f"is not a readable pickle: {type(error).__name__}: {str(error).splitlines()[:1]}") from None


# The one in C reserves memory for as many objects as a pickle claims to have.
class _Numbers(pickle._Unpickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._known = _known()

    def find_class(self, module: str, name: str) -> Any:
        # Where they were before NumPy 2, and where Python 2 had them.
        place = module.replace("numpy.core.", "numpy._core.").replace("__builtin__", "builtins")
        try:
            return self._known[place, name]
        except KeyError:
            raise DataError(
                f"is not loaded: it names {module}.{name}, and only arrays of numbers and plain containers are read"
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        raise DataError(f"is not loaded: it refers to an object outside of it, {str(pid)[:40]!r}")


def _known() -> dict[tuple[str, str], Callable[..., Any]]:
    """Return what a pickle may name, made anew each time, as a pickle could set attributes of it."""

    class DType:
        def __init__(self, code: str, *_: Any) -> None:
            if not isinstance(code, str) or not _DTYPE.fullmatch(code):
                raise DataError(f"is not loaded: it has an array of {code!r}, and not of numbers")
            self.code, self.order = code, "<"

        def __setstate__(self, state: Sequence[Any]) -> None:
            self.order = ">" if state[1] == ">" else "<"

        def read(self, data: Any) -> np.ndarray:
            return np.frombuffer(_bytes(data), dtype=np.dtype(self.order + self.code))

    class Array:
        values = np.empty((0, 0))

        def __setstate__(self, state: Sequence[Any]) -> None:
            _, shape, dtype, by_columns, data = state
            self.values = dtype.read(data).reshape(shape, order="F" if by_columns else "C")

        # NumPy's protocol: so `np.asarray` takes it.
        def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
            return np.array(self.values, dtype=dtype, copy=copy)

    def reconstruct(*_: Any) -> Any:
        return Array()

    def from_buffer(data: Any, dtype: Any, shape: Any, order: str) -> Any:
        array = Array()
        array.values = dtype.read(data).reshape(shape, order="F" if order == "F" else "C")
        return array

    def scalar(dtype: Any, data: Any) -> Any:
        return dtype.read(data)[0].item()

    def encode(text: str, encoding: str = "latin1") -> bytes:
        if encoding not in ("latin1", "latin-1"):
            raise DataError(f"is not loaded: it has text in the encoding {encoding!r}")
        return text.encode("latin1")

    def ndarray(*_: Any) -> Any:
        raise DataError("is not loaded: it makes an array in an unusual way")

    return {
        ("numpy", "dtype"): DType,
        ("numpy", "ndarray"): ndarray,
        ("numpy._core.multiarray", "_reconstruct"): reconstruct,
        ("numpy._core.multiarray", "scalar"): scalar,
        ("numpy._core.numeric", "_frombuffer"): from_buffer,
        ("_codecs", "encode"): encode,
        ("collections", "OrderedDict"): dict,
        ("builtins", "set"): set,
        ("builtins", "frozenset"): frozenset,
        ("builtins", "tuple"): tuple,
        ("builtins", "list"): list,
        ("builtins", "dict"): dict,
    }


def _bytes(data: Any) -> bytes:
    if isinstance(data, str):  # of Python 2
        return data.encode("latin1")
    if isinstance(data, bytes | bytearray):
        return bytes(data)
    raise DataError(f"is not loaded: the content of an array is {type(data).__name__}")
