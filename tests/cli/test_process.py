"""The command line as a process: closed pipes, narrow encodings, and Ctrl-C, in imports too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from support.data import make_pool, make_scores

MODULE = [sys.executable, "-m", "forgetcast"]


@pytest.fixture
def scored(tmp_path: Path) -> list[str]:
    """Words of a `diff` in which a condition holds, of examples with names outside of ASCII."""
    pool = make_pool()
    for name, nll in (("ä", 3.0), ("b", 4.0)):
        scores = replace(make_scores(pool, np.full(len(pool), nll)), digests=list(pool.ids))
        scores.save(tmp_path / f"{name}.parquet")
    return ["diff", str(tmp_path / "ä.parquet"), str(tmp_path / "b.parquet"), "--fail-if", "mean>0.5"]


@pytest.mark.parametrize("form", [[], ["--json"], ["--markdown"]])
def test_a_closed_pipe_is_no_condition_that_holds(scored: list[str], form: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*MODULE, *scored, *form], stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")
    assert subprocess.run([*MODULE, *scored, *form], capture_output=True, check=False).returncode == 1


@pytest.mark.parametrize("words", [["--help"], ["diff", "--help"], ["strategies"]])
def test_a_closed_pipe_of_a_help_text(words: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*MODULE, *words], stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_closed_standard_error(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*MODULE, "analyze", str(tmp_path / "no.atlas")], stderr=write, stdout=write, check=False)
    os.close(write)
    assert done.returncode == 141


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
@pytest.mark.parametrize("words", [["--help"], ["strategies"], ["pool"]])
def test_an_encoding_that_lacks_characters(tmp_path: Path, encoding: str, words: list[str]) -> None:
    if words == ["pool"]:
        (tmp_path / "ж.jsonl").write_text('{"text": "ж"}', encoding="utf-8")
        words = ["pool", str(tmp_path / "ж.jsonl"), "-o", str(tmp_path / "☃.jsonl")]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([*MODULE, *words], capture_output=True, check=False, env=environment)
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr
    done.stdout.decode(encoding)
    if words[0] == "pool":
        assert ("☃" if encoding == "utf-8" else "\\u2603") in done.stdout.decode(encoding).replace("\n", "")


INTERRUPT = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {at!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.argv = ["forgetcast", *{words!r}]
from forgetcast.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("at", "words"),
    [
        ("forgetcast.cli", ["strategies"]),
        ("typer", ["strategies"]),
        ("rich.console", ["strategies"]),
        ("numpy", ["diff", "a", "b"]),
        ("numpy._core._multiarray_umath", ["diff", "a", "b"]),
        ("pyarrow.lib", ["strategies"]),
        ("yaml", ["probes", "x.atlas", "-o", "p.jsonl"]),
        ("torch", ["generate", "no-model", "-o", "p.jsonl"]),
        ("torch._C", ["generate", "no-model", "-o", "p.jsonl"]),
        ("transformers", ["generate", "no-model", "-o", "p.jsonl"]),
    ],
)
def test_an_interrupted_import(tmp_path: Path, at: str, words: list[str]) -> None:
    code = INTERRUPT.format(at=at, words=words)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_work_that_is_interrupted_says_so(tmp_path: Path) -> None:
    """Even where what is interrupted raises another exception."""
    code = (
        "import os, signal\n"
        "from forgetcast.cli.app import progress\n"
        "from forgetcast.cli import app\n"
        "import sys\n"
        "@app.command()\n"
        "def work():\n"
        "    with progress() as report:\n"
        "        try:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "            report('working', 1, 2)\n"
        "        except KeyboardInterrupt:\n"
        "            raise ImportError('a module was interrupted')\n"
        "sys.argv = ['forgetcast', 'work']\n"
        "from forgetcast.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, cwd=tmp_path)
    assert done.returncode == 130
    assert done.stderr.startswith(b"interrupted; finished work is kept")
    assert b"Traceback" not in done.stderr


def test_a_command_in_the_background_stays_deaf() -> None:
    code = INTERRUPT.format(at="typer", words=["strategies"])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert done.returncode == 0
