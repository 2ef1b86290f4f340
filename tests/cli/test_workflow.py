"""The workflow in examples/ is one that GitHub accepts, and its commands run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from support.cli import RunCommand
from support.data import make_pool
from support.models import save, tiny

WORKFLOW = Path(__file__).parents[2] / "examples" / "github-workflow.yml"


def check(path: Path) -> subprocess.CompletedProcess[str]:
    words = ("-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(path))
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)


def test_follows_the_published_schema(tmp_path: Path) -> None:
    pytest.importorskip("check_jsonschema")
    assert check(WORKFLOW).returncode == 0, check(WORKFLOW).stdout
    (tmp_path / "wrong.yml").write_text(WORKFLOW.read_text().replace("runs-on:", "runs_on:"))
    assert check(tmp_path / "wrong.yml").returncode == 1


def test_its_commands_run(run: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_pool(30).save(Path("pool.jsonl"))
    save(tiny(), Path("candidate"))
    assert run("score", "candidate", "pool.jsonl", "-o", "before.parquet")[0] == 0
    steps = yaml.safe_load(WORKFLOW.read_text())["jobs"]["forgetting"]["steps"]
    commands = [step["run"] for step in steps if step.get("run", "").startswith("forgetcast ")]
    assert len(commands) == 2
    for command in commands:
        words, _, summary = command.partition(" >> ")
        code, out, err = run(*shlex.split(words)[1:])
        assert code == 0, err
        assert bool(summary) == ("--markdown" in words)
    assert summary == '"$GITHUB_STEP_SUMMARY"'
    assert "**Verdict:** not worse by more than 0.02 nats per token" in out
    assert "noise of the mean" in out


def test_is_the_one_shown_in_the_guide() -> None:
    page = (WORKFLOW.parents[1] / "docs" / "how-to" / "ci-gate.md").read_text()
    shown = re.search(r'```yaml title="forgetting.yml"\n(.*?)```', page, flags=re.DOTALL)
    assert shown is not None
    assert shown[1] == WORKFLOW.read_text()
