"""Forecasts of exact match: probes, forecast and plan from planted answers, and their calibration."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy

from forgetcast import Atlas, DataError, Pool, Scores
from forgetcast.completion import Bayesian, Completion, LogisticMF
from forgetcast.completion.forecast import TaskForecast
from forgetcast.replay import ReplayPlan
from support.cli import RunCommand
from support.data import make_atlas, make_pool, make_scores
from support.pages import Page

POOL = make_pool(60)
RIGHT = np.arange(60) % 4 != 3
"""What the base model answers right."""


def _answered(pool: Pool, right: np.ndarray) -> Scores:
    scores = make_scores(pool, np.full(len(pool), 3.0))
    return replace(scores, exact_match=right.astype(float))


def _planted(tasks: int, examples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of a flip, and the flips, both of shape (tasks, examples)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(tasks, 1)) - 1.0 + 1.5 * rng.normal(size=examples)
    probabilities = scipy.special.expit(logits)
    return probabilities, (rng.random(logits.shape) < probabilities).astype(float)


@pytest.fixture
def atlas(tmp_path: Path) -> Atlas:
    atlas = Atlas.create(tmp_path / "a.atlas", POOL, _answered(POOL, RIGHT), model="base")
    for task, row in enumerate(_planted(12, len(POOL), 0)[1]):
        atlas.add(f"t{task}", _answered(POOL, RIGHT & (row == 0)))
    atlas.add("unanswered", make_scores(POOL, np.full(len(POOL), 3.5)))
    return Atlas.open(atlas.path)


def test_probes_forecast_and_plan_by_answers(atlas: Atlas, tmp_path: Path, run: RunCommand) -> None:
    chosen, scores, output = (tmp_path / name for name in ("probes.jsonl", "scores.parquet", "forecast.parquet"))
    code, out, err = run("probes", atlas.path, "--exact-match", "-k", 12, "--audit", 10, "-o", chosen)
    assert code == 0, err
    assert "forecast" in out
    ids = [json.loads(line)["id"] for line in chosen.read_text().splitlines()]
    assert len(set(ids)) == 12
    positions = np.array([POOL.ids.index(id_) for id_ in ids])
    assert RIGHT[positions].all(), "a wrong answer cannot be lost"

    wrong = np.arange(12) % 3 == 0
    _answered(POOL.subset(ids), ~wrong).save(scores)
    words = ("forecast", atlas.path, "--scores", scores, "--task", "new", "-o", output)
    code, out, err = run(*words, "--exact-match", "--audit", 10, "--json")
    assert code == 0, err
    facts = json.loads(out)
    saved = TaskForecast.load(output)
    assert (facts["rows"], saved.rows) == (12, 12), "the row without answers is not counted"
    assert (facts["measure"], saved.measure) == ("exact_match", "exact_match")
    assert list(saved.ids) == [id_ for id_, right in zip(POOL.ids, RIGHT, strict=True) if right]
    for numbers in (saved.mean, saved.lower, saved.upper):
        assert ((numbers >= 0) & (numbers <= 1)).all()
    flipped = dict(zip(ids, wrong, strict=True))
    assert {id_: bool(saved.mean[list(saved.ids).index(id_)]) for id_ in ids} == flipped
    assert {each["figure"] for each in facts["whole"]} == {"mean"}
    assert {each["kind"] for each in facts["whole"]} == {"model-based", "guaranteed"}
    assert all(0 <= each["lower"] <= each["value"] <= each["upper"] <= 1 for each in facts["whole"])
    code, out, err = run(*words, "--exact-match")
    assert code == 0, err
    assert "probability of being answered wrong" in " ".join(out.split())
    assert "nats" not in out

    plan = tmp_path / "plan.parquet"
    words = ("plan", atlas.path, "--strategy", "top", "--forecast", output, "--ratio", 0.125)
    code, out, err = run(*words, "-o", plan, "--json")
    assert code == 0, err
    assert json.loads(out)["forecast_measure"] == "exact_match"
    made = ReplayPlan.load(plan)
    used = {id_ for id_, weight in zip(made.ids, made.weights, strict=True) if weight > 0}
    assert used
    assert used <= set(saved.ids)


def test_what_cannot_be_forecast_by_answers(atlas: Atlas, tmp_path: Path, run: RunCommand) -> None:
    scores, output = tmp_path / "scores.parquet", tmp_path / "forecast.parquet"
    words = ("forecast", atlas.path, "--exact-match", "--scores", scores, "-o", output)
    part = POOL.subset([POOL.ids[0], POOL.ids[3]])
    _answered(part, np.ones(2)).save(scores)
    code, _, err = run(*words)
    assert code == 2
    assert f"did not answer the probe {POOL.ids[3]!r} right" in " ".join(err.split())
    make_scores(POOL.subset(POOL.ids[:2]), np.full(2, 3.0)).save(scores)
    code, _, err = run(*words)
    assert code == 2
    assert "has no answer" in " ".join(err.split())
    words_of_model = ("forecast", atlas.path, "--exact-match", "--model", "tuned", "-o", output)
    code, _, err = run(*words_of_model, "--corpus", tmp_path)
    assert code == 2
    assert "leave --corpus out" in " ".join(err.split())
    code, _, err = run(*words_of_model, "--until-width", "worst_tenth:0.1")
    assert code == 2
    assert "there is no worst tenth" in " ".join(err.split())


def test_the_report_shows_lost_answers_as_shares(atlas: Atlas, tmp_path: Path, run: RunCommand) -> None:
    """Oracle: the planted flips of the row, which the forecast was not told but for its probes."""
    matrix = atlas.matrix(measure="exact_match")
    row, others = matrix.values[5], [name for name in atlas.tasks if name not in ("t5", "unanswered")]
    probes = list(range(0, 40, 4))
    fitted = Bayesian().fit(matrix.select(others))
    forecast = TaskForecast.from_forecast(
        fitted.predict(probes, row[probes], audit=10), matrix, method="bayesian", task="t5", measure="exact_match"
    )
    forecast.save(tmp_path / "of answers.parquet")
    loss = atlas.matrix(others)
    of_loss = TaskForecast.from_forecast(
        Bayesian().fit(loss).predict([0, 1], [0.1, 0.2]), atlas.pool, method="bayesian", task="t5"
    )
    of_loss.save(tmp_path / "of loss.parquet")
    page = tmp_path / "report.html"
    files = [word for name in ("of answers", "of loss") for word in ("--forecast", tmp_path / f"{name}.parquet")]
    code, _, err = run("report", atlas.path, *files, "-o", page)
    assert code == 0, err
    text = Page(page).text
    section = text[text.index("Answers that are lost") : text.index("Examples most at risk")]
    assert "nats" not in section
    expected = forecast.figure("mean")
    guaranteed = forecast.figure("mean", "guaranteed")
    assert expected is not None
    assert guaranteed is not None
    measured = row.mean()
    numbers = [expected.value, expected.lower, expected.upper, guaranteed.lower, guaranteed.upper, measured]
    whole = "share lost {:.3f} {:.3f} to {:.3f} {:.3f} to {:.3f} {:.3f}".format(*numbers)
    assert whole in section
    judged = np.setdiff1d(np.arange(len(row)), probes)
    brier = np.mean((forecast.mean[judged] - row[judged]) ** 2)
    assert f"Brier score {brier:.3f}" in section
    assert f"a share of {expected.value:.3f} (90% interval {expected.lower:.3f} to {expected.upper:.3f})" in text
    assert f"the share lost is {row[judged].mean():.3f}" in text
    sources = np.array(matrix.sources)
    for source in set(matrix.sources):
        assert re.search(
            rf"{source} \({(sources == source).sum()}\) share lost [^(]*{row[sources == source].mean():.3f}", section
        )
    assert "t5 (probability of being answered wrong)" in text
    assert "t5 (nats per token)" in text
    # Without a measured row there is nothing to judge by.
    replace(forecast, task="new").save(tmp_path / "of answers.parquet")
    assert run("report", atlas.path, *files[:2], "-o", page)[0] == 0
    text = Page(page).text
    assert "Brier" not in text
    assert f"of {expected.value:.3f} (90% interval" in text
    assert "The forecast" not in text[text.index("How regular") : text.index("Answers that are lost")]


def test_a_report_of_answers_needs_an_atlas_with_answers(atlas: Atlas, tmp_path: Path, run: RunCommand) -> None:
    matrix = atlas.matrix(measure="exact_match")
    row = Bayesian().fit(matrix).predict([0, 1], [1, 0])
    forecast = TaskForecast.from_forecast(row, matrix, method="bayesian", measure="exact_match")
    forecast.save(tmp_path / "forecast.parquet")
    bare = make_atlas(tmp_path / "bare.atlas", POOL)
    code, _, err = run("report", bare.path, "--forecast", tmp_path / "forecast.parquet", "-o", tmp_path / "r.html")
    assert code == 2
    assert "has no answers" in " ".join(err.split())
    assert not (tmp_path / "r.html").exists()


def test_a_probability_is_in_the_unit_interval(atlas: Atlas) -> None:
    matrix = atlas.matrix(measure="exact_match")
    row = Bayesian().fit(matrix).predict([0, 1], [1, 0])
    forecast = TaskForecast.from_forecast(row, matrix, method="bayesian", measure="exact_match")
    with pytest.raises(DataError, match="a probability outside"):
        replace(forecast, upper=forecast.upper + 1).check()


@pytest.mark.parametrize("method", [Bayesian(), LogisticMF(rank=0)], ids=["bayesian", "logistic"])
def test_probabilities_are_calibrated(method: Completion) -> None:
    """Oracle: the planted probabilities, whose own expected calibration error is that of the sample."""
    probabilities, flips = _planted(60, 200, 1)
    fitted, probes = method.fit(flips[:40]), np.arange(0, 200, 10)
    others = np.setdiff1d(np.arange(200), probes)
    forecast = fitted.predict(probes, flips[40:, probes])
    made = np.clip(forecast.mean, 0, 1)[:, others].ravel()
    truth, oracle = flips[40:, others].ravel(), probabilities[40:, others].ravel()

    def calibration_error(forecasts: np.ndarray) -> float:
        bins = np.array_split(np.argsort(forecasts), 10)
        return float(np.mean([abs(forecasts[b].mean() - truth[b].mean()) for b in bins]))

    assert calibration_error(made) < calibration_error(oracle) + 0.03
    # Worse than the truth, and better than the base rate.
    rate = np.mean((flips[:40].mean() - truth) ** 2)
    assert np.mean((oracle - truth) ** 2) < np.mean((made - truth) ** 2) < 0.85 * rate
    # Binomial: at 90 %, fewer than 15 of 20 intervals miss with a probability of 1 %.
    for value, lower, upper in (forecast.mean_interval(0.9), forecast.tail_interval(0.1, 0.9)):
        assert ((lower <= value) & (value <= upper)).all()
    _, lower, upper = forecast.mean_interval(0.9)
    shares = flips[40:].mean(axis=1)
    assert ((lower <= shares) & (shares <= upper)).sum() >= 15
