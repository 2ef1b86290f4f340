"""One index for ids in memory and on disk: both forms give the same positions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest

from forgetcast import MismatchError
from forgetcast.data.ids import ExampleIndex

IDS = [f"e{i}" for i in range(10)]
FORMS = {
    "tuple": ExampleIndex,
    "arrow": lambda ids: ExampleIndex.from_arrow(pa.chunked_array([ids[:4], ids[4:]], pa.string())),
}


@pytest.fixture(params=FORMS)
def index(request: pytest.FixtureRequest) -> ExampleIndex:
    make: Callable[[list[str]], ExampleIndex] = FORMS[request.param]
    return make(IDS)


def test_it_is_a_sequence(index: ExampleIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forgetcast.data.ids._CHUNK", 3)
    assert (len(index), list(index), index[:], index[3], index[2:4]) == (10, IDS, tuple(IDS), "e3", ("e2", "e3"))
    assert list(ExampleIndex(index)) == IDS
    assert pa.array(index, pa.string()).to_pylist() == IDS
    assert repr(index) == "ExampleIndex(10 ids)"


@pytest.mark.parametrize("wrap", [list, tuple, iter, np.array, ExampleIndex])
def test_positions(index: ExampleIndex, wrap: Callable[[list[str]], object]) -> None:
    positions = index.positions(wrap(["e7", "e2", "e7"]))  # type: ignore[arg-type]
    assert positions.dtype == np.intp
    assert positions.tolist() == [7, 2, 7]
    assert index.positions([]).dtype == np.intp
    assert index.find(["e1", "nobody"]).tolist() == [1, -1]
    with pytest.raises(MismatchError) as error:
        index.positions(wrap(["e7", "x", "y"]), where="the file")  # type: ignore[arg-type]
    assert str(error.value) == "the file has 2 example(s) that the pool doesn't know, e.g. 'x'"
