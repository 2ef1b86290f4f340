from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from forgetcast import DataError, MismatchError, Pool, probes
from forgetcast.completion import Bayesian
from forgetcast.completion.forecast import TaskForecast, measured_probes
from support.data import make_atlas, make_pool, make_scores


def test_a_forecast_survives_its_file(tmp_path: Path, pool: Pool) -> None:
    atlas = make_atlas(tmp_path / "a.atlas", pool)
    model = Bayesian().fit(atlas.matrix())
    row = model.predict([2, 5], [0.3, 0.4])
    forecast = TaskForecast.from_forecast(row, pool, method="bayesian", task="new", level=0.8)
    forecast.save(tmp_path / "f.parquet")
    assert repr(forecast) == f"TaskForecast(task 'new', 24 examples, 2 probes, mean {forecast.mean.mean():.2f})"
    again = TaskForecast.load(tmp_path / "f.parquet")
    for name in ("mean", "std", "lower", "upper", "probed"):
        np.testing.assert_array_equal(getattr(again, name), getattr(forecast, name))
    assert again.probes == (pool.ids[2], pool.ids[5])
    assert (again.level, again.task, again.misfit) == (0.8, "new", forecast.misfit)
    again.check_pool(pool)
    with pytest.raises(MismatchError, match="another pool"):
        again.check_pool(make_pool(12))
    replace(forecast, mean=np.full(24, np.nan)).save(tmp_path / "nan.parquet")
    with pytest.raises(DataError, match="not a finite number"):
        TaskForecast.load(tmp_path / "nan.parquet")


def test_probes_are_measured_against_the_base_scores_by_id(tmp_path: Path, pool: Pool) -> None:
    atlas = make_atlas(tmp_path / "a.atlas", pool)
    chosen = probes.choose(Bayesian().fit(atlas.matrix()), 4)
    part = pool.subset(pool.ids[i] for i in chosen)
    columns, forgetting = measured_probes(atlas, make_scores(part, np.array([3.5, 3.25, 2.0, 3.0])))
    np.testing.assert_array_equal(columns, chosen)
    np.testing.assert_allclose(forgetting, [0.5, 0.25, -1.0, 0.0])


def test_invalid_probe_files_are_rejected(tmp_path: Path, pool: Pool) -> None:
    atlas = make_atlas(tmp_path / "a.atlas", pool)
    other = make_pool(30).subset(["e1", "e29"])
    with pytest.raises(MismatchError, match="'e29'"):
        measured_probes(atlas, make_scores(other, np.ones(2)))
    changed = Pool([replace(pool[0], text="another text")])
    with pytest.raises(MismatchError, match="another pool"):
        measured_probes(atlas, make_scores(changed, np.ones(1)))
    unscored = replace(make_scores(pool.subset(["e1"]), np.ones(1)), nll=np.array([np.nan]), reasons=["too short"])
    with pytest.raises(DataError, match="'e1' has no score: too short"):
        measured_probes(atlas, unscored)
