"""Commands with hostile input: one line and exit code 2; and what users wrote is shown, never obeyed."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest

from forgetcast import Example, Pool, Scores
from forgetcast.cli.app import fractions, numbers
from forgetcast.cli.tables import markdown_text
from forgetcast.errors import ConfigError, ForgetcastError
from forgetcast.lm import score
from forgetcast.lm.train import FineTuner
from forgetcast.text import visible
from support.cli import RunCommand
from support.data import make_atlas, make_pool, make_scores
from support.models import tiny
from support.training import TASK, make_recipe

EVIL = "\x1b]0;owned\x07 \x1b[31m\x9b1m\r\u202eabc\u2066\x7f\x85[red]:warning:"


def refused(result: tuple[int, str, str], said: str) -> None:
    """Check that a command has ended with one line that says this."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err


@pytest.mark.parametrize("text", ["²", "٣", "1-99999999999", "1-", "", "9" * 5000, "5,1-100000", "-1", "1e3"])
def test_numbers_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="-k: "):
        numbers(text, "-k")


def test_numbers() -> None:
    assert numbers("3, 5,10-12", "-k") == [3, 5, 10, 11, 12]
    assert numbers("12-10", "-k") == []


@pytest.mark.parametrize("text", ["nan", "inf", "1e999", "1/0", "1e308/1e-308", "x", "", "1/2/3", "9" * 5000])
def test_fractions_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--ratios: "):
        fractions(text, "--ratios")


def test_fractions() -> None:
    assert fractions("1/32,0.125, 1e-3", "--ratios") == [1 / 32, 0.125, 1e-3]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "out of memory"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (OverflowError("int too large to convert to float"), "int too large to convert to float (OverflowError)"),
        (pa.ArrowInvalid("Parquet magic bytes not found\nin footer"), "magic bytes not found (ArrowInvalid)"),
        (OSError(28, "No space left on device", "/x/y.parquet"), "/x/y.parquet: No space left on device"),
        (OSError("something"), "something"),
        (ForgetcastError("two\nlines \x1b[31m"), "two lines \\u001b[31m"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), "surrogates not allowed"),
    ],
)
def test_foreign_errors_become_one_line(run: RunCommand, error: Exception, said: str) -> None:
    with mock.patch("forgetcast.cli.plan.out") as out:
        out.print.side_effect = error
        refused(run("strategies"), said)


def test_the_end_of_a_file_is_no_answer_to_a_question(run: RunCommand) -> None:
    """Typer takes an EOFError for an end of the input, and exits with the code of a gate that fails."""
    with mock.patch("forgetcast.cli.plan.out") as out:
        out.print.side_effect = EOFError("Ran out of input")
        code, _, err = run("strategies")
    assert (code, err.strip()) == (2, "error: what was read ends too early")


def test_our_own_faults_keep_their_traceback(run: RunCommand) -> None:
    with mock.patch("forgetcast.cli.plan.out") as out:
        out.print.side_effect = KeyError("name")
        with pytest.raises(KeyError):
            run("strategies")


def test_control_characters_are_written_out() -> None:
    shown = visible(EVIL)
    assert shown == ("\\u001b]0;owned\\u0007 \\u001b[31m\\u009b1m\\u000d\\u202eabc\\u2066\\u007f\\u0085[red]:warning:")
    assert visible("a\tb\nc äöü \N{GRINNING FACE}") == "a\tb\nc äöü \N{GRINNING FACE}"
    assert json.loads(visible(json.dumps([EVIL], ensure_ascii=False))) == [EVIL], "JSON remains the same JSON"


@pytest.mark.parametrize("form", [(), ("--json",), ("--markdown",)])
def test_user_text_does_not_reach_the_terminal(tmp_path: Path, run: RunCommand, form: tuple[str, ...]) -> None:
    pool = Pool([Example(f"{EVIL}{i}", text="x y z", source=("[red]:warning:", EVIL)[i % 2]) for i in range(3)])
    pool.save(tmp_path / "pool.jsonl")
    for name, nll in (("a", np.arange(1.0, 4)), ("b", np.arange(2.0, 5))):
        make_scores(pool, nll).save(tmp_path / f"{name}.parquet")
    files = (tmp_path / "a.parquet", tmp_path / "b.parquet", "--pool", tmp_path / "pool.jsonl")
    code, out, err = run("diff", *files, *form)
    assert code == 0
    for text in (out, err):
        assert text == visible(text), "nothing is left to be written out"
    assert "u001b" in out
    if form == ():
        assert "[red]:war" in out


def test_errors_and_paths_are_shown_as_they_are(tmp_path: Path, run: RunCommand) -> None:
    make_atlas(tmp_path / "a.atlas", make_pool())
    _, out, _ = run("probes", tmp_path / "a.atlas", "-k", 2, "-o", tmp_path / "[red]y[/x].jsonl")
    assert f"{tmp_path}/[red]y[/x].jsonl" in out.replace("\n", "")
    refused(
        run("plan", tmp_path / "a.atlas", "--source", EVIL, "-o", tmp_path / "p.parquet"),
        "\\x1b]0;owned\\x07",
    )


@pytest.mark.parametrize(
    "words",
    [
        (EVIL,),
        ("atlas", EVIL),
        ("score", f"--{EVIL}"),
        ("collect", "c.yaml", "--engine", EVIL),
        ("collect", "c.yaml", "--gpus", EVIL),
        ("strategies", EVIL),
        ("score", "--device", f"two\nlines {EVIL}"),
    ],
    ids=lambda words: words[0][:8].encode("unicode_escape").decode(),
)
def test_wrong_words_are_shown_and_not_obeyed(run: RunCommand, words: tuple[str, ...]) -> None:
    code, out, err = run(*words)
    refused((code, out, err), "; see ")
    assert err == visible(err), "nothing is left to be written out"
    assert err.strip().endswith("--help")


def test_help_is_no_error(run: RunCommand) -> None:
    assert run("score", "--help")[0] == 0
    assert run()[0] == 2
    assert run("atlas")[0] == 2


@pytest.mark.parametrize(
    "text",
    ["@name", "a@b.org", "https://evil.org", "_https://evil.org", "xhttp://e.org", "www.evil.org", "_www.e.org",
     "WWW.evil.org", "mailto:a@b.org", "xmpp:a@b.org", "#12", "GH-12", "o/r#12", "\u202e@x"],
)  # fmt: skip
def test_markdown_has_no_links(text: str) -> None:
    made = markdown_text(text)
    broken = made.replace("&#8203;", "\0")
    for link in ("://", "www.", "mailto:", "xmpp:"):
        assert link not in broken.lower() or f"\0{link}" in broken
    for link in ("@n", "@b", "@x", "#1", "GH-"):
        assert link not in broken
    assert visible(made) == made


@pytest.mark.parametrize("where", ["folder", "file/x.parquet", "new/" + "n" * 250])
@pytest.mark.parametrize(
    "command",
    [
        ("score", "no-model", "no-pool.jsonl", "-o"),
        ("generate", "no-model", "-o"),
        ("pool", "nothing.jsonl", "-o"),
        ("probes", "no.atlas", "-o"),
        ("forecast", "no.atlas", "--scores", "no.parquet", "-o"),
        ("plan", "no.atlas", "-o"),
        ("export", "no.parquet", "no.jsonl", "-o"),
        ("verify", "no-model", "no.jsonl", "--atlas", "no.atlas", "--plan", "no.parquet", "-o"),
        ("sequence", "no-model", "tasks", "--atlas", "no.atlas", "-o"),
        ("report", "no.atlas", "-o"),
    ],
    ids=lambda command: command[0],
)
def test_a_destination_is_tried_first(
    tmp_path: Path, run: RunCommand, command: tuple[str, ...], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    refused(run(*command, where), where.partition("/")[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("command", ["train", "demo", "collect"])
def test_a_folder_to_write_is_tried_first(
    tmp_path: Path, run: RunCommand, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    config = "model: no-model\npool: no.jsonl\ntasks: nowhere\natlas: file/a.atlas\n"
    (tmp_path / "c.yaml").write_text(config)
    words = {"train": ("no-model", "no.jsonl", "-o", "file/x"), "demo": ("-o", "file/x"), "collect": ("c.yaml",)}
    refused(run(command, *words[command]), "file is a file, not a folder")


def test_a_model_that_scores_nothing_leaves_nothing(tmp_path: Path) -> None:
    pool, broken = make_pool(4), tiny()
    sums = mock.patch("forgetcast.lm.score._rows", lambda _, pieces, __: [float("nan")] * len(pieces))
    with sums, pytest.raises(ForgetcastError, match="scores no example"):
        score(broken, pool, partial=tmp_path / "s.partial")
    assert list(tmp_path.iterdir()) == []
    assert isinstance(score(tiny(), pool, partial=tmp_path / "s.partial"), Scores)


@pytest.mark.parametrize("damage", ["weights", "state"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from forgetcast.lm import train

    monkeypatch.setattr(train, "SECONDS_BETWEEN_CHECKPOINTS", 0)

    def stop(step: int, _: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FineTuner(tiny()).tune(TASK, make_recipe(steps=5), checkpoints=tmp_path / "run", on_step=stop)
    latest = max((tmp_path / "run").glob("checkpoint-*"))
    file = latest / ("model.safetensors" if damage == "weights" else "optimizer.pt")
    file.write_bytes(b"\x80\x02c__builtin__\nprint\n." if damage == "state" else file.read_bytes()[:50])
    with pytest.raises(ForgetcastError, match=r"checkpoint.*remove"):
        FineTuner(tiny()).tune(TASK, make_recipe(steps=5), checkpoints=tmp_path / "run")
