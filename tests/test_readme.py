"""The README and the front page of the documentation keep to what is tested elsewhere."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < 110


def test_the_commands_are_those_of_the_tutorial() -> None:
    commands = re.findall(r"^    (forgetcast .*)$", README, flags=re.MULTILINE)
    tutorial = (ROOT / "docs" / "tutorial" / "own-model.md").read_text().splitlines()
    assert len(commands) > 5
    assert [command for command in commands if command not in tutorial] == []
    assert sorted(commands, key=tutorial.index) == commands


def test_what_is_linked_is_there() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if not link.startswith("https://")]
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_the_targets_exist() -> None:
    targets = set(re.findall(r"make ([a-z-]+)", README))
    assert targets <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def test_the_python_example_of_the_front_page(capsys: pytest.CaptureFixture[str]) -> None:
    front_page = (ROOT / "docs" / "index.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", front_page, flags=re.DOTALL)
    example = (ROOT / "examples" / "complete_a_row.py").read_text()
    assert [block for block in blocks if example.endswith(block)], (
        "the front page does not show examples/complete_a_row.py"
    )
    runpy.run_path(str(ROOT / "examples" / "complete_a_row.py"))
    assert "rmse=" in capsys.readouterr().out
