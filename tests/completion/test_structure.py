from __future__ import annotations

import numpy as np
import pytest

from forgetcast import DataError, ForgettingMatrix, analyze
from forgetcast.completion.low_rank import fit_low_rank
from support.data import planted


def test_r2_of_every_rank_is_that_of_the_full_decomposition() -> None:
    values = planted(12, 60, 3, 0.3)
    found = analyze(ForgettingMatrix(values), max_rank=20)
    left, strength, right = np.linalg.svd(values.astype(np.float32).astype(float), full_matrices=False)
    total = ((values - values.mean()) ** 2).sum()
    expected = [1 - ((values - (left[:, :r] * strength[:r]) @ right[:r]) ** 2).sum() / total for r in range(1, 13)]
    np.testing.assert_allclose(found.rank_r2, expected, atol=1e-5)
    assert (np.diff(found.rank_r2) >= -1e-9).all()


def test_held_out_entries_tell_structure_from_noise() -> None:
    """Planted rank 2 (and no more) plus noise: held-out R^2 is best at rank 2, while the fit goes on rising."""
    rng = np.random.default_rng(4)
    values = rng.normal(size=(30, 2)) @ rng.normal(size=(2, 300)) + rng.normal(0, 0.7, (30, 300))
    found = analyze(ForgettingMatrix(values), max_rank=8)
    assert int(np.argmax(found.held_out_r2)) == 1
    assert found.held_out_r2[7] < found.held_out_r2[1] - 0.02
    assert found.rank_r2[7] > found.rank_r2[1] + 0.02
    # The share of the truth in the variance is 2 / 2.49; an entry that was not seen can be explained no better.
    assert found.held_out_r2[1] == pytest.approx(2 / 2.49, abs=0.06)


def test_few_tasks_do_not_look_regular_by_chance() -> None:
    """Of additive effects and noise, nearly full ranks of seven tasks would keep the additive start of what they miss.

    Oracle: ten disjoint tenths of the same matrix. One tenth alone is off by far more.
    """
    rng = np.random.default_rng(2)
    values = rng.normal(0, 0.3, (7, 1)) + rng.normal(0, 0.3, (1, 120)) + rng.standard_t(3, (7, 120)) * 0.25
    found = analyze(ForgettingMatrix(values))
    assert (len(found.rank_r2), len(found.held_out_r2), len(found.median_error)) == (7, 5, 5)
    fold = rng.permutation(values.size).reshape(values.shape) % 10
    squares = np.zeros(5)
    for i in range(10):
        kept = np.where(fold == i, np.nan, values)
        for rank in range(1, 6):
            fit = fit_low_rank(kept, rank, centred=False, rounds=100).fit
            squares[rank - 1] += ((fit - values)[fold == i] ** 2).sum()
    expected = 1 - squares / ((values - values.mean()) ** 2).sum()
    np.testing.assert_allclose(found.held_out_r2[:2], expected[:2], atol=0.2)
    assert max(found.held_out_r2) < found.additive_r2
    assert analyze(ForgettingMatrix(values[:2])).held_out_r2 == ()


def test_fits_of_means_are_least_squares() -> None:
    values = planted(8, 30, 1, 0.5)
    values[np.random.default_rng(0).random(values.shape) < 0.2] = np.nan
    found = analyze(ForgettingMatrix(values))
    i, j = np.nonzero(~np.isnan(values))
    y = values[i, j]

    def r2(*parts: np.ndarray) -> float:
        design = np.hstack(parts)
        residual = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
        return float(1 - (residual**2).sum() / ((y - y.mean()) ** 2).sum())

    rows, columns = np.eye(8)[i], np.eye(30)[j]
    assert found.row_r2 == pytest.approx(r2(rows), abs=1e-5)
    assert found.column_r2 == pytest.approx(r2(columns), abs=1e-5)
    assert found.additive_r2 == pytest.approx(r2(rows, columns), abs=1e-5)
    assert found.measured == pytest.approx(len(y) / values.size)
    for name, mean in found.mean_by_task.items():
        assert mean == pytest.approx(np.nanmean(values[int(name)]), abs=1e-6)


def test_components_load_on_the_sources_they_were_planted_on() -> None:
    rng = np.random.default_rng(3)
    sources = ["code"] * 30 + ["prose"] * 30
    code, prose = np.repeat([1.0, 0.0], 30), np.repeat([0.0, 1.0], 30)
    values = np.outer(rng.gamma(4, 1.0, 20), code) + np.outer(rng.gamma(4, 0.3, 20), prose)
    found = analyze(ForgettingMatrix(values + rng.normal(0, 0.02, values.shape), sources=sources), components=2)
    first, second = found.components
    assert first.by_source["code"] > 1.3
    assert abs(first.by_source["prose"]) < 0.6
    assert second.by_source["prose"] > 1.2
    assert first.between_sources > 0.95
    assert first.share + second.share == pytest.approx(1)
    assert first.share > second.share


def test_missing_entries_and_empty_rows_are_skipped() -> None:
    values = planted(20, 80, 2, 0.02)
    holes = values.copy()
    holes[np.random.default_rng(1).random(values.shape) < 0.25] = np.nan
    holes[4], holes[:, 7] = np.nan, np.nan
    found = analyze(ForgettingMatrix(holes, tasks=[f"t{i}" for i in range(20)]))
    assert (found.tasks, found.examples) == (19, 79)
    assert "t4" not in found.mean_by_task
    # Two factors, a shift for each task and one for each example: rank 4 explains all but the noise.
    assert found.rank_r2[3] > 0.99


def test_nothing_to_analyse() -> None:
    with pytest.raises(DataError, match="no measured entry"):
        analyze(ForgettingMatrix(np.full((2, 3), np.nan)))
    with pytest.raises(DataError, match="equal"):
        analyze(ForgettingMatrix(np.ones((2, 3))))


def test_the_authors_matrix_is_as_low_rank_as_they_say(olmo: np.ndarray) -> None:
    found = analyze(ForgettingMatrix(olmo))
    u, s, vt = np.linalg.svd(olmo, full_matrices=False)
    rank_3 = (u[:, :3] * s[:3]) @ vt[:3]
    expected = 1 - ((olmo - rank_3) ** 2).sum() / ((olmo - olmo.mean()) ** 2).sum()
    assert found.rank_r2[2] == pytest.approx(expected, abs=1e-4)


def test_f1_of_binary_forgetting_rises_with_the_planted_rank() -> None:
    rng = np.random.default_rng(0)
    logits = -1.0 + 4 * rng.normal(size=(30, 2)) @ rng.normal(size=(2, 200))
    values = (rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(float)
    values[rng.random(values.shape) < 0.1] = np.nan
    found = analyze(ForgettingMatrix(values)).rank_f1
    assert len(found) == 5
    assert 0.3 < found[0] < found[1] - 0.05
    assert found[1] > 0.8
    assert analyze(ForgettingMatrix(values + 0.5)).rank_f1 == ()


def test_noise_between_seeds() -> None:
    """Planted: rank 2, a residual of each task that no factor explains, and noise of each run."""
    rng = np.random.default_rng(6)
    low_rank = rng.normal(size=(30, 2)) @ rng.normal(size=(2, 300))
    truth = low_rank + rng.normal(0, 0.4, low_rank.shape)
    names = [f"t{i}" for i in range(30)]
    runs = [truth + rng.normal(0, 0.3, truth.shape) for _ in range(3)]
    matrix = ForgettingMatrix(
        np.vstack([runs[0], runs[1][:10], runs[2][:5]]),
        tasks=[*names, *(f"{name} seed 1" for name in names[:10]), *(f"{name} seed 2" for name in names[:5])],
    )
    replicates = {name: name.partition(" ")[0] for name in matrix.tasks}
    noise = analyze(matrix, replicates=replicates).noise
    assert noise is not None
    assert (noise.tasks, noise.rows) == (10, 25)
    assert noise.std == pytest.approx(0.3, rel=0.05)
    assert noise.residual_share == pytest.approx(0.3**2 / (0.3**2 + 0.4**2), rel=0.15)
    assert analyze(matrix).noise is None
    # Oracle on entries that are measured in some of the rows only: the mean of each pair's squared difference / 2.
    values = matrix.values.copy()
    values[:10][rng.random((10, 300)) < 0.5] = np.nan
    pairs = ForgettingMatrix(values[:40], tasks=matrix.tasks[:40])
    expected = np.sqrt(np.nanmean((values[:10] - values[30:40]) ** 2) / 2)
    noise = analyze(pairs, replicates=replicates).noise
    assert noise is not None
    assert noise.std == pytest.approx(expected, rel=1e-5)
