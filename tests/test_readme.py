"""The README's Python example is the one in examples/, and it runs."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_python_example(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    example = (ROOT / "examples" / "forecast.py").read_text()
    shown = [block for block in blocks if block.strip() in example]
    assert shown, "the README shows no part of examples/forecast.py"
    runpy.run_path(str(ROOT / "examples" / "forecast.py"))
    assert "rmse=" in capsys.readouterr().out
