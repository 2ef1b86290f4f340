"""Work that another process begins; most of these end that process with code 9 in the middle of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from forgetcast import Atlas
from support.data import make_pool, make_scores
from support.plans import plan_for


def add_row(path: Path, operations: int) -> None:
    """Add a row to an atlas; die at the file operation with this number that could leave something half done."""

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            nonlocal operations
            operations -= 1
            if operations < 0:
                os._exit(9)
            return function(*arguments, **keywords)

        return wrapped

    for name in ("replace", "fsync", "rename"):
        setattr(os, name, dying(getattr(os, name)))
    atlas = Atlas.open(path)
    after = make_scores(atlas.pool, np.full(len(atlas.pool), 5.0))
    atlas.add("crashed", replace(after, exact_match=np.zeros(len(atlas.pool))))


def score_pool(partial: Path) -> None:
    """Score twelve examples one by one; die after five."""
    from forgetcast.lm import score
    from support.models import tiny

    scored = 0

    def die(count: int) -> None:
        nonlocal scored
        scored += count
        if scored >= 5:
            os._exit(9)

    score(tiny(), make_pool(12), batch_tokens=1, partial=partial, on_progress=die)


def _tune(recipe: Any, step: int, folder: Path, given: dict[str, Any]) -> None:
    """Fine-tune with a checkpoint at every step; die after `step` steps."""
    from forgetcast.lm import FineTuner, train
    from support.models import tiny
    from support.training import TASK

    train.SECONDS_BETWEEN_CHECKPOINTS = 0

    def die(i: int, _: int) -> None:
        if i == step:
            os._exit(9)

    FineTuner(tiny()).tune(TASK, recipe, **given, checkpoints=folder, on_step=die)


def tune_with_replay(recipe: Any, folder: Path) -> None:
    pool = make_pool(24)
    given = {"plan": plan_for(pool, "random", 0.5, seed=3), "pool": pool}
    _tune(recipe, 7, folder, given)


def tune_with_selector(name: str, atlas: Path, folder: Path) -> None:
    from support.selectors import RECIPE, arguments

    _tune(RECIPE, 12, folder, arguments(name, Atlas.open(atlas)))


def run_sequence(atlas: Path, folder: Path) -> None:
    from support.sequences import run_in

    def die(what: str, *_: int) -> None:
        if "(3 of 3), top" in what:
            os._exit(9)

    run_in(folder, Atlas.open(atlas), on_progress=die)


def add_row_slowly(path: Path, connection: Connection) -> None:
    """Add a row to an atlas; say so in the middle of it, and wait for a word to go on."""
    fsync, told = os.fsync, False

    def wait(file: int) -> None:
        nonlocal told
        if not told:
            told = True
            connection.send("writing")
            connection.recv()
        fsync(file)

    os.fsync = wait
    atlas = Atlas.open(path)
    atlas.add("slow", make_scores(atlas.pool, np.full(len(atlas.pool), 5.0)))


def run_cli(words: list[object], connection: Connection) -> None:
    """Run a command; send its exit code, standard output and standard error."""
    from support.cli import run_command

    connection.send(run_command(*words))


def hold_claim(path: Path, connection: Connection) -> None:
    """Claim work, say so, and keep it until a word comes."""
    from forgetcast.experiments.claims import claimed

    with claimed(path) as ours:
        assert ours
        connection.send("claimed")
        connection.recv()


def collect_slowly(path: Path, connection: Connection) -> None:
    """Collect rows; say so amid the first, wait for a word, and send the names of the rows that were tuned here."""
    from forgetcast.experiments.collect import collect
    from forgetcast.lm import FineTuner
    from support.models import tiny
    from support.training import TASKS, make_recipe

    tuned: list[str] = []

    def on_progress(what: str, *_: int) -> None:
        name, _, doing = what.partition(": ")
        if doing == "fine-tuning" and name not in tuned:
            tuned.append(name)
            connection.send("at work")
            connection.recv()

    collect(FineTuner(tiny()), Atlas.open(path), make_recipe(), TASKS, on_progress=on_progress)
    connection.send(tuned)


def run_cli_signalled(words: list[object], number: int, step: int, folder: Path) -> None:
    """Run a command as a process of its own; a signal comes at a step of the training. Its output goes to files."""
    import sys

    from forgetcast.lm import train

    for name, stream in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    kept = open(1, "w"), open(2, "w")  # noqa: SIM115  # which would be closed if nothing else named them
    sys.stdout, sys.stderr = kept
    inner = train._Progress.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == step:
            os.kill(os.getpid(), number)
        inner(self, args, state, control, **given)

    train._Progress.on_step_end = on_step_end  # type: ignore[method-assign]
    sys.argv = ["forgetcast", *map(str, words)]
    from forgetcast.__main__ import main

    main()
