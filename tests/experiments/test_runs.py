"""Resumable runs: made once, reused, or refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forgetcast import DataError, MismatchError, Scores
from forgetcast.experiments.runs import AtlasRows, RunStore, ScoreFiles
from support.data import make_atlas, make_pool, make_scores

POOL = make_pool()
SETTINGS = {"recipe": {"steps": 3}}
FACTS = {"settings": SETTINGS, "losses": {"law": 2.5}, "replayed": ["e1"], "steps": 3, "seconds": 0.5}


def store(kind: str, folder: Path) -> RunStore:
    return ScoreFiles(folder) if kind == "files" else AtlasRows(make_atlas(folder / "a.atlas", POOL))


@pytest.mark.parametrize("kind", ["files", "atlas"])
def test_a_run_is_made_once_and_refused_with_other_settings(tmp_path: Path, kind: str) -> None:
    runs, made = store(kind, tmp_path), 0

    def run() -> Scores:
        nonlocal made
        made += 1
        scores = make_scores(POOL, np.full(len(POOL), 4.0))
        return replace(scores, metadata={**scores.metadata, **FACTS})

    for _ in range(2):
        runs.ensure("run", SETTINGS, lambda _: run())
    assert made == 1
    assert runs.has("run", SETTINGS)
    assert not runs.has("other", SETTINGS)
    with pytest.raises(MismatchError, match=r"other settings|another recipe"):
        runs.has("run", {"recipe": {"steps": 4}})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, ...) for field in FACTS),
        ("settings", "x"),
        ("losses", {"law": "b"}),
        ("losses", {"other": 2.5}),
        ("replayed", 3),
        ("steps", -1),
        ("seconds", float("nan")),
    ],
)
def test_a_file_that_is_no_finished_run_is_named(tmp_path: Path, field: str, value: Any) -> None:
    runs, facts = ScoreFiles(tmp_path), {**FACTS, field: value}
    runs.save("run", make_scores(POOL, np.full(len(POOL), 4.0), **{k: v for k, v in facts.items() if v is not ...}))
    with pytest.raises(DataError, match=field) as raised:
        runs.load("run", tests=["law"])
    assert str(tmp_path / "run.parquet") in str(raised.value)
    assert "remove it" in str(raised.value)
    if value != {"other": 2.5}:  # which test sets there are is not among the settings
        with pytest.raises(DataError, match=field):
            runs.has("run", SETTINGS)
