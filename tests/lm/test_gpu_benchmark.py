"""`benchmarks/gpu.py`, which waits for a GPU: without one it says so, and a CPU can try it out."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("gpu")


def test_without_a_gpu_nothing_is_measured(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--quick", "--json", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: PyTorch finds no GPU, so nothing was measured\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_cpu_tries_it_out(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--quick", "--device", "cpu", "--json", str(file)])
    gpu.main()
    assert "Measured on: CPU, which says nothing about a GPU." in capsys.readouterr().out
    found = json.loads(file.read_text())
    ways = {(row["part"], row["way"]) for row in found["rows"]}
    expected = {("scoring", way) for way in gpu.SCORING} | {("training", way) for way in gpu.TRAINING}
    assert ways - {row for row in ways if row[0] == "device"} == expected | {
        ("training", "plain Trainer, bfloat16"),
        ("training", "FSDP2"),
    }
    left_out = {row["way"] for row in found["rows"] if "reason" in row}
    assert left_out == {way for _, way in ways if any(word in way for word in ("compiled", "liger", "FSDP2"))}
    measured = {row["way"]: row for row in found["rows"] if "tokens_per_second" in row}
    assert all(row["tokens_per_second"] > 0 for row in measured.values())
    checkpointed = measured["bfloat16, chunked, checkpointing"]["loss"]
    assert measured["bfloat16, chunked"]["loss"] == pytest.approx(checkpointed, rel=1e-3)
    assert {target["name"] for target in found["targets"] if not target["holds"]} == set()
