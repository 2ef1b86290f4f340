from __future__ import annotations

import os
from pathlib import Path

import pytest

from forgetcast import Atlas
from forgetcast.experiments import claims
from forgetcast.experiments.claims import claimed
from forgetcast.experiments.collect import collect
from forgetcast.lm import FineTuner
from support import dying, processes
from support.experiments import collect_into
from support.models import tiny
from support.training import POOL, TASKS, make_recipe

RECIPE = make_recipe()


def test_one_process_has_a_claim_and_its_end_frees_it(tmp_path: Path) -> None:
    work = tmp_path / "runs" / "work"
    process, connection = processes.start(dying.hold_claim, work)
    assert connection.recv() == "claimed"
    with claimed(work) as ours:
        assert not ours
    waited: list[str] = []

    def kill(who: str) -> None:
        waited.append(who)
        process.kill()

    with claimed(work, kill) as ours:
        assert ours
        assert f"process {os.getpid()} on" in work.with_name("work.lock").read_text()
    assert len(waited) == 1
    assert waited[0].startswith(f"process {process.pid} on")
    assert not list(work.parent.iterdir())


def test_a_claim_on_a_file_that_was_removed_meanwhile_is_on_the_new_one(tmp_path: Path) -> None:
    """The process that is waited for removes the file when it is done."""
    work = tmp_path / "work"
    process, connection = processes.start(dying.hold_claim, work)
    assert connection.recv() == "claimed"
    with claimed(work, lambda _: connection.send("go on")) as ours:
        assert ours
        with claimed(work) as again:
            assert not again
    process.join()
    assert process.exitcode == 0


def test_without_locks_every_process_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(claims.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(claims.fcntl, "flock", refuse)
    with claimed(tmp_path / "work") as ours, claimed(tmp_path / "work") as theirs:
        assert (ours, theirs) == (True, True)


def test_two_collections_share_the_tasks(tmp_path: Path) -> None:
    """The other process stops amid the first row until this one has made the others, and waits for it."""
    path = tmp_path / "a.atlas"
    collect_into(path, tiny(), POOL, {}, RECIPE)
    process, connection = processes.start(dying.collect_slowly, path)
    assert connection.recv() == "at work"
    seen: list[str] = []

    def on_progress(what: str, *_: int) -> None:
        seen.append(what)
        if "waiting for process" in what:
            assert Atlas.open(path).tasks == ("naming", "spelling")
            connection.send("go on")

    atlas = collect(FineTuner(tiny()), Atlas.open(path), RECIPE, TASKS, on_progress=on_progress)
    process.join()
    assert process.exitcode == 0
    assert connection.recv() == ["adding"]  # what the other one tuned
    assert f"adding: waiting for process {process.pid} on" in "\n".join(seen)
    assert not [what for what in seen if what.startswith("adding: fine-tuning")]
    assert atlas.tasks == tuple(TASKS)
    assert not path.with_name("a.atlas.runs").exists()
