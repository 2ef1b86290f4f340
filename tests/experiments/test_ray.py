"""A sweep on Ray, on this machine; another process runs it, since Ray leaves threads and warnings behind."""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from experiments.test_sweep import TRAINER, configure
from forgetcast import Atlas
from support.cli import RunCommand

pytest.importorskip("ray")


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a cluster of one node, which is started as an administrator would, and stopped at the end.

    It runs in the foreground of a process of its own: `ray stop` would end those of others on this machine too.
    """
    ray = Path(sys.executable).with_name("ray")
    words = ["start", "--head", "--block", "--port=0", "--num-cpus=2", "--include-dashboard=false"]
    folder = tempfile.mkdtemp(prefix="ray")  # its sockets need a short path
    log = tmp_path_factory.mktemp("ray") / "head.log"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as file:
        head = subprocess.Popen(
            [ray, *words, f"--temp-dir={folder}"], stdout=file, stderr=file, env=environment, start_new_session=True
        )
    try:
        while (found := re.search(r"--address='([\d.:]+)'", log.read_text())) is None:
            assert head.poll() is None, log.read_text()
            time.sleep(0.1)
        yield found[1]
    finally:
        head.terminate()
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def collect(*words: object, code: int = 0) -> str:
    """Run `collect --engine ray` with these words; return what it says on standard error."""
    command = [sys.executable, "-m", "forgetcast.cli", "collect", *map(str, words), "--engine", "ray"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stderr


def test_rows_made_by_ray_are_the_same(tmp_path: Path, run: RunCommand, cluster: str) -> None:
    """In a cluster that runs already."""
    assert run("collect", configure(tmp_path, "straight.atlas"))[0] == 0
    straight = Atlas.open(tmp_path / "straight.atlas")
    collect(configure(tmp_path, "ray.atlas"), "--address", cluster)
    atlas = Atlas.open(tmp_path / "ray.atlas")
    assert atlas.tasks == straight.tasks
    np.testing.assert_array_equal(atlas.matrix().values, straight.matrix().values)


def test_a_cluster_that_asks_for_a_token(tmp_path: Path, run: RunCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray says so in the cause of its error; it takes 20 seconds for that, and so it is raised here."""
    import ray

    def refuse(**_: object) -> None:
        raise ConnectionError("Failed to connect to Ray cluster at 192.0.2.1:1") from RuntimeError(
            "Failed to connect to GCS.\nAuthenticationError: RPC error: InvalidAuthToken"
        )

    monkeypatch.setattr(ray, "init", refuse)
    config = configure(tmp_path, "ray.atlas")
    code, _, err = run("collect", config, "--engine", "ray", "--address", "192.0.2.1:1")
    assert (code, err.splitlines()[-1]) == (
        2,
        "error: --address 192.0.2.1:1: Failed to connect to Ray cluster at 192.0.2.1:1; it asks for a token: set "
        "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN",
    )


@pytest.mark.slow
def test_a_killed_worker_loses_nothing(tmp_path: Path, run: RunCommand) -> None:
    """On this machine, for the time of the command: the trainer kills the worker that called it, once."""
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
