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

from support import dying
from support.data import make_atlas, make_pool, make_scores
from support.processes import exit_code
from support.training import make_recipe, model_files

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
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Finder())
sys.argv = ["forgetcast", *{words!r}]
from forgetcast.__main__ import main
main()
"""


DIFF, GENERATE = ["diff", "a", "b"], ["generate", "./model", "-o", "p.jsonl"]


@pytest.mark.parametrize(
    ("at", "words", "number"),
    [
        ("forgetcast.cli", ["strategies"], signal.SIGINT),
        ("typer", ["strategies"], signal.SIGINT),
        ("typer", ["strategies"], signal.SIGTERM),
        ("rich.console", ["strategies"], signal.SIGINT),
        ("numpy", DIFF, signal.SIGINT),
        ("numpy._core._multiarray_umath", DIFF, signal.SIGTERM),
        ("pyarrow.lib", ["strategies"], signal.SIGINT),
        ("yaml", ["probes", "x.atlas", "-o", "p.jsonl"], signal.SIGINT),
        ("torch", GENERATE, signal.SIGTERM),
        ("torch._C", GENERATE, signal.SIGINT),
        ("transformers", GENERATE, signal.SIGINT),
    ],
)
def test_an_interrupted_import(tmp_path: Path, at: str, words: list[str], number: int) -> None:
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "model" / name).write_text("{}")
    code = INTERRUPT.format(at=at, words=words, number=int(number))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, cwd=tmp_path)
    said = b"loading PyTorch and Transformers\n" * (words == GENERATE) + b"interrupted\n"
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, b"", said)


@pytest.mark.parametrize(
    "words",
    [
        ["train", "./model", "task.jsonl", "-o", "tuned"],
        ["train", "./model", "task.jsonl", "--watch", "runs.atlas", "-o", "tuned"],
        ["pilot", "./model", "task.jsonl", "--atlas", "runs.atlas"],
    ],
)
def test_no_command_imports_pytorch_without_a_word(tmp_path: Path, words: list[str]) -> None:
    """Where Transformers cannot be imported, that it is loaded was said before."""
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "model" / name).write_text("{}")
    pool = make_pool()
    pool.save(tmp_path / "task.jsonl")
    make_atlas(tmp_path / "runs.atlas", pool)
    (tmp_path / "recipe.yaml").write_text(make_recipe(steps=8).model_dump_json())
    words = [*words, "--recipe", "recipe.yaml"]
    without = f"import sys; sys.modules['transformers'] = None; sys.argv[1:] = {words}; "
    code = without + "from forgetcast.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, cwd=tmp_path, text=True)
    assert done.returncode == 2, done.stderr
    *_, said, error = done.stderr.splitlines()
    assert said == "loading PyTorch and Transformers"
    assert "forgetcast[lm]" in error


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
        "            report('working', 1, 2)\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "        except KeyboardInterrupt:\n"
        "            raise ImportError('a module was interrupted')\n"
        "sys.argv = ['forgetcast', 'work']\n"
        "from forgetcast.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, cwd=tmp_path)
    assert done.returncode == 130
    assert (
        done.stderr == b"interrupted in working; what was finished is kept, and the same command goes on from there\n"
    )


def test_a_command_in_the_background_stays_deaf() -> None:
    code = INTERRUPT.format(at="typer", words=["strategies"], number=int(signal.SIGINT))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert done.returncode == 0


@pytest.mark.parametrize(("number", "method"), [(signal.SIGINT, "lora"), (signal.SIGTERM, "full")])
def test_a_signal_in_a_fine_tune(tmp_path: Path, number: int, method: str) -> None:
    model_files(tmp_path)
    (tmp_path / "recipe.yaml").write_text(make_recipe(steps=4, method=method).model_dump_json())
    words = ["train", tmp_path / "model", tmp_path / "task.jsonl", "--recipe", tmp_path / "recipe.yaml", "-o"]
    tuned = tmp_path / "tuned"
    assert exit_code(dying.run_cli_signalled, [*words, tuned], number, 2, tmp_path) == 128 + number
    hint, last = [line for line in (tmp_path / "err").read_text().splitlines() if line][-2:]
    assert hint.startswith("stopping after this step; ")
    assert last == "interrupted after step 2 of 4; the same command goes on from there"
    assert (tmp_path / "out").read_text() == ""
    for folder in (tuned, tmp_path / "straight"):
        assert exit_code(dying.run_cli_signalled, [*words, folder], number, 0, tmp_path) == 0
    resumed, straight = (next(each.glob("*.safetensors")).read_bytes() for each in (tuned, tmp_path / "straight"))
    assert resumed == straight


SILENT = """
from forgetcast.cli.app import _said, err, never_silent
with never_silent():
    if {speaks}:
        err.print("a word")
    else:
        assert _said.wait(60)
"""


@pytest.mark.parametrize(("terminal", "speaks"), [(True, False), (True, True), (False, True)])
def test_a_command_that_says_nothing_for_a_while_says_that_it_is_at_work(terminal: bool, speaks: bool) -> None:
    """A log gets no such word, so that only a terminal is waited for."""
    environment = {**os.environ, "FORCE_COLOR": "1" if terminal else "", "TERM": "dumb"}
    code = SILENT.format(speaks=speaks)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert ("a word" in done.stderr, "working" in done.stderr) == (speaks, not speaks)
