"""Sequences of tasks on the tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forgetcast import Atlas, Example, Pool
from forgetcast.data.pool import train_and_test
from forgetcast.experiments.sequence import SequenceSettings, learn_in_sequence
from forgetcast.experiments.sequence_result import SequenceResult
from forgetcast.lm import Recipe, Workbench
from support.models import tiny

RECIPE = Recipe(steps=4, batch_size=2, learning_rate=5e-3, max_length=48)
SETTINGS = SequenceSettings(strategies=("top",), ratio=0.5, orders=1, probes=6)
NAMES = ("adding", "naming", "spelling")


def task(name: str, n: int = 8) -> Pool:
    return Pool([Example(f"{i}", prompt=f"{name} {i}:", completion=f" {name[::-1]} {i}") for i in range(n)])


TASKS = {name: train_and_test(task(name), 0.25) for name in NAMES}


def run_in(folder: Path, atlas: Atlas, settings: SequenceSettings = SETTINGS, **more: Any) -> SequenceResult:
    given: dict[str, Any] = {"tasks": TASKS, "recipe": RECIPE, "base": tiny()} | more
    return learn_in_sequence(
        Workbench(given["base"]), given["tasks"], atlas, given["recipe"], settings, directory=folder,
        on_progress=more.get("on_progress"),
    )  # fmt: skip
