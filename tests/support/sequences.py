"""Sequences of tasks on the tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forgetcast import Atlas
from forgetcast.data.pool import split_task
from forgetcast.experiments.sequence import SequenceSettings, run_sequence
from forgetcast.experiments.sequence_result import SequenceResult
from forgetcast.lm import FineTuner
from support.data import make_task
from support.models import tiny
from support.training import make_recipe

RECIPE = make_recipe(steps=4)
SETTINGS = SequenceSettings(strategies=("top",), ratio=0.5, orders=1, probes=6, memory=4)
NAMES = ("adding", "naming", "spelling")
TASKS = {name: split_task(make_task(name, 8), 0.25) for name in NAMES}


def run_in(folder: Path, atlas: Atlas, settings: SequenceSettings = SETTINGS, **more: Any) -> SequenceResult:
    given: dict[str, Any] = {"tasks": TASKS, "recipe": RECIPE, "base": tiny()} | more
    return run_sequence(
        FineTuner(given["base"]), atlas, given["recipe"], given["tasks"], settings, directory=folder,
        on_progress=more.get("on_progress"),
    )  # fmt: skip
