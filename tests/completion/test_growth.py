"""The growth of forgetting until the end of a fine-tune, learned from planted curves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy

from forgetcast import Atlas, Pool
from forgetcast.completion.growth import FEWEST, Growth
from forgetcast.completion.watch import AtlasGauge
from support.data import make_pool, make_scores

SHARES, GROWN = np.array([0.1, 0.25, 0.5]), np.array([0.2, 0.5, 0.8, 1.0])


def curves(tasks: int, noise: float, seed: int = 0, examples: int = 60) -> np.ndarray:
    """Rows (4, M, n) whose means are the planted shares of those at the end, each task's times a factor of its own."""
    rng = np.random.default_rng(seed)
    ends = np.outer(rng.uniform(0.1, 1.0, tasks), rng.uniform(0.5, 1.5, examples)) + rng.normal(0, 0.01, examples)
    own = np.exp(rng.normal(0, noise, (4, tasks)))
    own[-1] = 1.0
    return GROWN[:, None, None] * own[:, :, None] * ends


def test_a_planted_growth_is_found() -> None:
    growth = Growth.of_rows(SHARES, curves(20, 0.0), 30)
    assert growth is not None
    np.testing.assert_allclose(growth.factors, 1 / GROWN, rtol=0.02)
    for share, grown in zip(growth.shares, GROWN, strict=True):
        value, lower, upper = growth.end(0.3 * grown, share, 0.9) or (np.nan,) * 3
        assert value == pytest.approx(0.3, rel=0.02)
        assert lower <= 0.3 * 1.02
        assert upper >= 0.3 * 0.98
        assert upper - lower < 0.1
    between = growth.end(0.1, 0.375, 0.9)
    assert between is not None
    assert between[0] == pytest.approx(0.1 * (2 + 1.25) / 2, rel=0.02)
    assert growth.end(0.1, 0.09, 0.9) is None


def test_intervals_cover_as_often_as_they_say() -> None:
    inside = []
    for seed in range(6):
        rows = curves(28, 0.25, seed)
        growth = Growth.of_rows(SHARES, rows[:, :16], 30)
        assert growth is not None
        for task in range(16, 28):
            for at, share in enumerate(SHARES):
                _, lower, upper = growth.end(rows[at, task].mean(), share, 0.9) or (np.nan,) * 3
                inside.append(lower <= rows[-1, task].mean() <= upper)
    # Tasks of one seed share the growth that was learned, so that the count varies more than a binomial one.
    assert scipy.stats.binom.ppf(0.001, len(inside) // 3, 0.9) <= sum(inside) / 3 <= len(inside) / 3 * 0.985


def test_too_few_curves_say_nothing(tmp_path: Path) -> None:
    assert Growth.of_rows(SHARES, curves(FEWEST - 1, 0.1), 30) is None
    pool = make_pool(60)
    atlas = with_curves(tmp_path / "a.atlas", pool, tasks=8, curves_of=FEWEST - 1)
    assert AtlasGauge(atlas, 30).growth is None
    atlas.drop("t0")
    more = with_curves(tmp_path / "b.atlas", pool, tasks=8, curves_of=8)
    assert more.shares == (0.1, 0.25, 0.5)
    gauge = AtlasGauge(more, 30)
    assert gauge.growth is not None
    assert gauge.growth.tasks == 8
    figures, _, _ = gauge.read(np.full(30, 0.05), 0.25)
    assert figures["end_of_run"].value == pytest.approx(0.1, rel=0.2)
    assert "end_of_run" not in gauge.read(np.full(30, 0.05), 0.05)[0]


def with_curves(path: Path, pool: Pool, tasks: int, curves_of: int) -> Atlas:
    rows = curves(tasks, 0.05, examples=len(pool))
    atlas = Atlas.create(path, pool, make_scores(pool, np.full(len(pool), 3.0)), model="base")
    for task in range(tasks):
        atlas.add(f"t{task}", make_scores(pool, 3.0 + rows[-1, task]))
        for at, share in enumerate(SHARES.tolist()):
            if task < curves_of:
                atlas.at(share).add(f"t{task}", make_scores(pool, 3.0 + rows[at, task]))
    return atlas
