from __future__ import annotations

import json
import re
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


def test_what_is_said_of_an_unlike_task_was_measured(tmp_path: Path, pool: Pool) -> None:
    atlas = make_atlas(tmp_path / "a.atlas", pool)
    forecast = TaskForecast.from_forecast(Bayesian().fit(atlas.matrix()).predict([2, 5], [0.3, 0.4]), pool, method="b")
    assert "no evidence" in replace(forecast, misfit=0.05).likeness()
    said = replace(forecast, misfit=0.049).likeness()
    assert "unlike those in the atlas (p = 0.049)" in said
    file = Path(__file__).parents[2] / "benchmarks" / "results" / "unlike.json"
    measured = [row for row in json.loads(file.read_text())["rows"] if row["who"] == "flagged"]
    # The families with enough flagged tasks for an interval.
    sure = {row["what"]: row for row in measured if row["lower"] is not None}
    assert {row["setting"] for row in sure.values()} == {"olmo-7b-instruct, TruthfulQA left out"}
    tasks, *gains = map(int, re.findall(r"On (\d+) .* by (\d+) %,.* by (\d+) %;", said)[0])
    for what, gain in zip(("30 / 10 probes", "60 / 30 probes"), gains, strict=True):
        assert sure[what]["tasks"] == tasks
        assert round(100 * (1 - sure[what]["ratio"])) == gain
        assert sure[what]["upper"] < 1
    assert all(row["ratio"] in (None, 1.0) for row in measured if row["what"].startswith("auto"))


def test_a_worst_tenth_takes_ten_examples(tmp_path: Path) -> None:
    pool = make_pool(33, 4)
    atlas = make_atlas(tmp_path / "a.atlas", pool)
    forecast = TaskForecast.from_forecast(Bayesian().fit(atlas.matrix()).predict([2], [0.3]), atlas, method="bayesian")
    counts = {each.source: each.examples for each in forecast.whole}
    assert counts == {None: 33, "s0": 9, "s1": 8, "s2": 8, "s3": 8}
    assert [each.source for each in forecast.whole if each.figure == "worst_tenth"] == [None]
    assert {each.source for each in forecast.whole if each.figure == "mean"} == set(counts)
