"""Work that another process begins; all but the last function end that process with code 9 in the middle of it."""

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
