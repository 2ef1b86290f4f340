"""Resumable runs: made once, reused, or refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from forgetcast import MismatchError, Scores
from forgetcast.experiments.runs import AtlasRows, RunStore, ScoreFiles, Stages
from support.data import make_atlas, make_pool, make_scores

POOL = make_pool()
SETTINGS = {"recipe": {"steps": 3}}


def store(kind: str, folder: Path) -> RunStore:
    return ScoreFiles(folder) if kind == "files" else AtlasRows(make_atlas(folder / "a.atlas", POOL))


@pytest.mark.parametrize("kind", ["files", "atlas"])
def test_a_run_is_made_once_and_refused_with_other_settings(tmp_path: Path, kind: str) -> None:
    runs, made = store(kind, tmp_path), 0

    def run() -> Scores:
        nonlocal made
        made += 1
        scores = make_scores(POOL, np.full(len(POOL), 4.0))
        return replace(scores, metadata={**scores.metadata, "settings": SETTINGS})

    for _ in range(2):
        runs.ensure("run", SETTINGS, run)
    assert made == 1
    assert runs.has("run", SETTINGS)
    assert not runs.has("other", SETTINGS)
    with pytest.raises(MismatchError, match=r"other settings|another recipe"):
        runs.has("run", {"recipe": {"steps": 4}})


def test_stages_add_up() -> None:
    seen: list[tuple[str, int, int]] = []
    stages = Stages(lambda *progress: seen.append(progress))
    first = stages.stage(later=7)
    first("a", 1, 2)
    first("a", 2, 2)
    second = stages.stage(later=0)
    second("b", 7, 7)
    assert seen == [("a", 1, 9), ("a", 2, 9), ("b", 9, 9)]
