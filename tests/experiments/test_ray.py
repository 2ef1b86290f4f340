"""A sweep on Ray, on this machine; another process runs it, since Ray leaves threads and warnings behind."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.test_sweep import TRAINER, configure
from forgetcast import Atlas
from support.cli import RunCommand

pytest.importorskip("ray")


def collect(*words: object) -> None:
    """Run `collect --engine ray` with these words."""
    command = [sys.executable, "-m", "forgetcast.cli", "collect", *map(str, words), "--engine", "ray"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_rows_made_by_ray_are_the_same(tmp_path: Path, run: RunCommand) -> None:
    assert run("collect", configure(tmp_path, "straight.atlas"))[0] == 0
    straight = Atlas.open(tmp_path / "straight.atlas")
    collect(configure(tmp_path, "ray.atlas"))
    atlas = Atlas.open(tmp_path / "ray.atlas")
    assert atlas.tasks == straight.tasks
    np.testing.assert_array_equal(atlas.matrix().values, straight.matrix().values)


def test_a_killed_worker_loses_nothing(tmp_path: Path, run: RunCommand) -> None:
    """The trainer kills the worker that called it, once."""
    killed = tmp_path / "killed"
    script = tmp_path / "train.py"
    script.write_text(
        "import os, signal\nfrom pathlib import Path\n"
        f"killed = Path({str(killed)!r})\n"
        "if os.environ.get('KILL', '1') == '1' and not killed.exists():\n"
        "    killed.touch()\n    os.kill(os.getppid(), signal.SIGKILL)\n    raise SystemExit\n" + TRAINER
    )
    words = [sys.executable, str(script), "{task}", "{output}", "--model", "{model}"]
    trainer = {"trainer": json.dumps({"command": shlex.join(words)})}
    collect(configure(tmp_path, "ray.atlas", **trainer), "--only", "naming")
    assert killed.exists()
    assert run("collect", configure(tmp_path, "straight.atlas", **trainer), "--only", "naming")[0] == 0
    rows = [Atlas.open(tmp_path / f"{name}.atlas").matrix() for name in ("ray", "straight")]
    assert rows[0].tasks == ("naming",)
    np.testing.assert_array_equal(rows[0].values, rows[1].values)
