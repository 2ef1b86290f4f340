from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from forgetcast import Atlas, DataError, MismatchError, Pool, probes
from forgetcast.completion import Bayesian
from forgetcast.completion.forecast import TaskForecast
from forgetcast.experiments.verify import Run, Verification
from forgetcast.report import figures, write_report
from support.cli import RunCommand
from support.data import make_atlas, make_pool, make_scores, planted
from support.pages import HOSTILE, Page


def forecast_of(atlas: Atlas, task: str, k: int = 5) -> TaskForecast:
    known = [name for name in atlas.tasks if name != task]
    model = Bayesian().fit(atlas.matrix(known))
    chosen = probes.choose(model, k)
    truth = atlas.matrix([task]).values[0]
    return TaskForecast.from_forecast(model.predict(chosen, truth[chosen]), atlas.pool, method="bayesian", task=task)


def verified() -> Verification:
    gain = {"none": 0.0, "random": 0.2, "top online": 0.3}
    return Verification(
        tuple(
            Run(task, arm, seed, 1 - gain[arm] + 0.01 * seed, 2 - gain[arm], 1.5, 8, 40, 2.0)
            for task in ("t6", "t7")
            for arm in gain
            for seed in (0, 1)
        ),
        judged=12,
        ratio=0.2,
        summaries={"random": "sample uniformly", "top online": "the highest forecasts first, revised during training"},
    )


@pytest.fixture
def atlas(tmp_path: Path, pool: Pool) -> Atlas:
    return make_atlas(tmp_path / "runs.atlas", pool)


def test_the_figures_in_the_page_are_those_measured(tmp_path: Path, atlas: Atlas) -> None:
    forecast = forecast_of(atlas, "t7")
    write_report(tmp_path / "report.html", atlas, forecasts=[forecast], verification=verified())
    # These runs are made up, and do not say what they replayed; the report does not claim more.
    assert "so it was not checked against the held-out examples" in (tmp_path / "report.html").read_text()
    kept = {f"{r.task}.{r.arm}.{r.seed}": tuple(atlas.pool.ids[:8]) for r in verified().runs}
    checked = replace(verified(), replayed=kept, held_out=dict.fromkeys(("t6", "t7"), tuple(atlas.pool.ids[12:])))
    write_report(tmp_path / "checked.html", atlas, verification=checked)
    said = "all 96 replayed examples of 12 runs: none is among the 12 held-out ones"
    assert said in (tmp_path / "checked.html").read_text()
    page = Page(tmp_path / "report.html")
    values = atlas.matrix().values
    assert f"On average a fine-tune costs {values.mean():.3f} nats per token" in page.text
    truth, others = values[7], ~forecast.probed
    assert f"{np.sqrt(np.mean((truth - forecast.mean)[others] ** 2)):.3f}" in page.text
    inside = np.mean((forecast.lower <= truth)[others] & (truth <= forecast.upper)[others])
    assert f"{inside:.0%} of the true values lie in the 90% interval" in page.text
    assert "none 1.005, random 0.805, top online 0.705" in page.text
    assert "top online replay is better than random" in page.text
    explained = "“random”: sample uniformly; “top online”: the highest forecasts first, revised during training."
    assert explained in " ".join(page.text.split())
    worst = forecast.ids[int(np.argmax(forecast.mean))]
    assert atlas.pool.subset([worst])[0].full_text.split("\n")[0] in page.text
    for number, source in zip(np.nanmean(values.reshape(8, 8, 3), axis=(0, 1)), ("s0", "s1", "s2"), strict=True):
        assert re.search(rf"{source} 8 3\.000 {number:.3f}", page.text)
    assert atlas.pool.fingerprint in page.text
    assert page.links == []


def test_a_bare_atlas_makes_a_report_too(tmp_path: Path, atlas: Atlas) -> None:
    write_report(tmp_path / "report.html", atlas)
    page = Page(tmp_path / "report.html")
    assert "Mean over the atlas's tasks" in page.text
    assert "Did replay help?" not in page.text


def test_a_forecast_without_the_truth(tmp_path: Path, atlas: Atlas) -> None:
    row = Bayesian().fit(atlas.matrix()).predict([], [])
    forecast = TaskForecast.from_forecast(row, atlas.pool, method="bayesian")
    write_report(tmp_path / "report.html", atlas, forecasts=[forecast])
    page = Page(tmp_path / "report.html")
    tail = forecast.figure("worst_tenth")
    assert tail is not None
    said = f"Forecast for the new task: {row.mean.mean():.3f} nats per token on average, {tail.value:.3f} on the worst"
    assert said in page.text  # as in the table below it
    assert "No probe was measured for this task" in page.text
    assert "against the truth" not in page.text


def test_report_flags_a_task_unlike_the_atlas(tmp_path: Path, atlas: Atlas) -> None:
    forecast = replace(forecast_of(atlas, "t7"), misfit=0.01)
    write_report(tmp_path / "report.html", atlas, forecasts=[forecast])
    assert "suggest that this task is unlike those in the atlas" in Page(tmp_path / "report.html").text


def hostile_report(folder: Path) -> Path:
    """A report in which every string that can come from data is hostile."""
    examples = [
        replace(example, id=f"{HOSTILE}{i}", text=f"{HOSTILE} text {i}", prompt=None, completion=None, source=HOSTILE)
        for i, example in enumerate(make_pool())
    ]
    pool = Pool(examples)
    atlas = Atlas.create(folder / "x.atlas", pool, make_scores(pool, np.full(24, 3.0)), model=HOSTILE)
    for i, row in enumerate(np.abs(planted(8, 24, 1, 0.05))):
        atlas.add(f"t{i} {HOSTILE}", make_scores(pool, 3.0 + row), recipe={HOSTILE: HOSTILE})
    forecast = forecast_of(atlas, atlas.tasks[-1])
    arm = f"forecast {HOSTILE}"
    runs = tuple(replace(run, arm=arm if run.arm == "top online" else run.arm, task=HOSTILE) for run in verified().runs)
    write_report(
        folder / "report.html", atlas, forecasts=[forecast], verification=replace(verified(), runs=runs), title=HOSTILE
    )
    return folder / "report.html"


def test_forecasts_of_answers_are_escaped(tmp_path: Path) -> None:
    pool = Pool(
        [replace(example, id=f"{HOSTILE}{i}", source=f"{HOSTILE}{i % 2}") for i, example in enumerate(make_pool())]
    )
    before = replace(make_scores(pool, np.full(24, 3.0)), exact_match=np.ones(24))
    atlas = Atlas.create(tmp_path / "x.atlas", pool, before, model="base")
    rng = np.random.default_rng(0)
    for i in range(8):
        atlas.add(f"t{i} {HOSTILE}", replace(before, exact_match=(rng.random(24) < 0.7).astype(float)))
    matrix, task = atlas.matrix(measure="exact_match"), atlas.tasks[-1]
    row = Bayesian().fit(matrix.select(atlas.tasks[:-1])).predict([0, 1, 2], matrix.values[-1, :3])
    made = [
        TaskForecast.from_forecast(row, matrix, method="bayesian", task=name, measure="exact_match")
        for name in (task, f"{HOSTILE} new")
    ]
    runs = tuple(replace(run, right_to_wrong=run.seed, right_before=9) for run in verified().runs)
    write_report(tmp_path / "plain.html", atlas)
    write_report(tmp_path / "r.html", atlas, forecasts=made, verification=replace(verified(), runs=runs))
    page = Page(tmp_path / "r.html")
    assert page.scripts == Page(tmp_path / "plain.html").scripts + 5  # a plot each, and three of the verification
    assert page.links == []
    content = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<img" not in content[content.index("<body>") :]
    assert "<script>alert" not in content
    assert "(nats per token; answers: a share)" in page.text


def test_text_from_data_is_escaped(tmp_path: Path, atlas: Atlas) -> None:
    write_report(tmp_path / "harmless.html", atlas, forecasts=[forecast_of(atlas, "t7")], verification=verified())
    path = hostile_report(tmp_path)
    page = Page(path)
    assert page.scripts == Page(tmp_path / "harmless.html").scripts
    assert page.links == []
    content = path.read_text(encoding="utf-8")
    assert "<img" not in content[content.index("<body>") :]
    assert "<script>alert" not in content
    assert "49 &amp;" not in content  # the template language is not applied to data


def test_mismatched_inputs_are_rejected(tmp_path: Path, atlas: Atlas) -> None:
    write_report(tmp_path / "report.html", atlas)
    kept = (tmp_path / "report.html").read_bytes()
    other = replace(forecast_of(atlas, "t7"), pool_fingerprint="0" * 64)
    with pytest.raises(MismatchError, match="another pool"):
        write_report(tmp_path / "report.html", atlas, forecasts=[other])
    assert (tmp_path / "report.html").read_bytes() == kept
    empty = Atlas.create(tmp_path / "empty.atlas", atlas.pool, atlas.before, model="m")
    with pytest.raises(DataError, match="no measurements"):
        write_report(tmp_path / "report.html", empty)


def test_wide_matrices_are_averaged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, atlas: Atlas) -> None:
    monkeypatch.setattr(figures, "MOST_COLUMNS", 9)
    write_report(tmp_path / "report.html", atlas)
    assert "averages 3 neighbouring examples" in Page(tmp_path / "report.html").text


def test_partly_measured_rows(tmp_path: Path, atlas: Atlas) -> None:
    part = atlas.pool.subset(atlas.pool.ids[:3])
    atlas.add("probed", make_scores(part, np.array([3.1, 3.2, 3.3])))
    write_report(tmp_path / "report.html", atlas)
    assert "probed" in Page(tmp_path / "report.html").text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_in_a_browser(tmp_path: Path, atlas: Atlas) -> None:
    """All plots are drawn, nothing is fetched, no script of the data runs, nothing is wider than the window."""
    from playwright.sync_api import sync_playwright

    write_report(tmp_path / "report.html", atlas, forecasts=[forecast_of(atlas, "t7")], verification=verified())
    (tmp_path / "hostile").mkdir()
    files = [tmp_path / "report.html", hostile_report(tmp_path / "hostile")]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-background-networking"]
        )
        for file in files:
            for width in (1280, 400):
                page = browser.new_page(viewport={"width": width, "height": 800})
                problems: list[str] = []
                page.on("console", lambda message, found=problems: found.append(message.text))
                page.on("pageerror", lambda error, found=problems: found.append(str(error)))
                page.on("dialog", lambda dialog, found=problems: (found.append(dialog.message), dialog.dismiss()))
                page.on("request", lambda request, found=problems: found.append(request.url))
                page.goto(file.as_uri())
                page.wait_for_function(
                    "[...document.querySelectorAll('figure')].every(f => f.querySelector('.main-svg'))"
                )
                assert page.locator("figure").count() == 7
                assert page.locator("figure .trace, figure .heatmaplayer image, figure .point").count() > 20
                page.locator("#risk details").first.click()
                assert (
                    "token" in page.locator("#risk pre").first.inner_text()
                    or "text" in page.locator("#risk pre").first.inner_text()
                )
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                assert problems == [file.as_uri()]
                page.close()
        browser.close()


def test_what_is_noise_is_not_called_regular(tmp_path: Path, run: RunCommand) -> None:
    """Of five tasks, three ranks explain nearly all of any noise; of a structure that is there, they hold elsewhere."""
    pool = make_pool(42)
    before = make_scores(pool, np.full(42, 3.0))
    noise = np.random.default_rng(0).normal(-0.2, 0.1, (5, 42))
    for name, rows, regular in (("noise", noise, False), ("rank one", planted(12, 42, 1, 0.01), True)):
        atlas = Atlas.create(tmp_path / f"{name}.atlas", pool, before, model="base")
        for i, row in enumerate(rows):
            atlas.add(f"t{i}", make_scores(pool, 3.0 + row))
        write_report(tmp_path / "report.html", atlas)
        page, out = Page(tmp_path / "report.html").text, run("analyze", atlas.path)[1]
        assert ("which task is not shown to be regular" in page) == (not regular)
        assert ("which task is very regular" in page) == regular
        assert ("No rank explains entries that the fit did not see" in out) == (not regular)
        fell = rows.mean() < 0
        assert (f"lowers the loss by {-rows.mean():.3f} nats per token" in page) == fell
        assert (": the loss fell" in out) == fell
