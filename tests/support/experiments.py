"""Experiments on objects in memory, where a command would start from files."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forgetcast import Atlas, Pool, Scores, collect, prepare_atlas, verify
from forgetcast.experiments import ReplayComparison, Verification
from forgetcast.experiments.collect import collection_work
from forgetcast.experiments.meter import Meter, Work
from forgetcast.lm import FineTuner, LanguageModel, Recipe


def collect_into(
    path: Path, base: LanguageModel, pool: Pool, tasks: dict[str, Pool], recipe: Recipe, **options: Any
) -> Atlas:
    """Prepare an atlas and collect its rows."""
    meter = Meter(options.pop("on_progress", None), options.pop("on_figures", None))
    answered = options.get("exact_match", False)
    meter.later = collection_work(tasks.values(), pool, recipe, base.context, answered=answered)
    atlas = prepare_atlas(path, base, pool, recipe, on_progress=meter, **options)
    meter.later = Work()
    metric = options.get("metric")
    return collect(FineTuner(base), atlas, recipe, tasks, metric=metric, on_progress=meter)


def verify_on(
    pool: Pool,
    before: Scores,
    tuner: FineTuner,
    comparisons: Sequence[ReplayComparison],
    recipe: Recipe,
    **options: Any,
) -> Verification:
    """Verify on an atlas without rows."""
    with tempfile.TemporaryDirectory() as folder:
        atlas = Atlas.create(Path(folder) / "base.atlas", pool, before, model="the base model")
        return verify(tuner, atlas, recipe, comparisons, **options)
