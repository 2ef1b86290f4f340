"""The report as it is drawn: no label overlaps another, and none is cut, on a wide and on a narrow screen."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("plotly")
pytest.importorskip("playwright")
if shutil.which("chromium") is None:
    pytest.skip("chromium is not installed", allow_module_level=True)

from playwright.sync_api import Browser, Page, sync_playwright

from forgetcast import Atlas, ForgettingMatrix, probes
from forgetcast.completion import Bayesian
from forgetcast.completion.forecast import TaskForecast
from forgetcast.completion.structure import analyze
from forgetcast.report import figures, write_report
from support.data import make_scores, planted
from support.long_names import TASK, long_pool, sequence, verification

WIDTHS = (1200, 420)
SLACK = 1.0
"""Pixels that boxes may overlap or stand out: they are larger than the letters."""

TEXTS = """() => [...document.querySelectorAll("figure")].flatMap((figure) => {
  const frame = figure.querySelector(".plotly-graph-div").getBoundingClientRect();
  return [...figure.querySelectorAll(".main-svg text")].filter((text) => {
    const style = getComputedStyle(text), box = text.getBoundingClientRect();
    return text.textContent.trim() && box.width && style.opacity > 0 && style.visibility != "hidden";
  }).map((text) => {
    const box = text.getBBox(), matrix = text.getScreenCTM(), right = box.x + box.width, bottom = box.y + box.height;
    const corner = (x, y) => [matrix.a * x + matrix.c * y + matrix.e, matrix.b * x + matrix.d * y + matrix.f];
    return {
      figure: figure.getAttribute("aria-label"),
      text: text.textContent,
      corners: [corner(box.x, box.y), corner(right, box.y), corner(right, bottom), corner(box.x, bottom)],
      frame: [frame.left, frame.top, frame.right, frame.bottom],
    };
  });
})"""
"""Every text of the plots with the corners of its box, which may be turned, and its plot's frame."""


HIDDEN = """[...document.querySelectorAll(".scroll")]
  .filter(each => each.scrollWidth > each.clientWidth + 1).map(each => each.innerText.slice(0, 60))"""
"""Tables that are wider than the page."""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a report with every plot and long names."""
    folder = tmp_path_factory.mktemp("layout")
    pool = long_pool(90, 13)
    atlas = Atlas.create(
        folder / "a.atlas", pool, make_scores(pool, np.full(90, 9.0)), model="organisation/" + "m" * 80
    )
    # Task means, example means and their sum explain nearly the same.
    for i, row in enumerate(0.02 * planted(12, 90, 2, 1.0)):
        atlas.add(TASK.format(i), make_scores(pool, 9.0 + row))
    known = Bayesian().fit(atlas.matrix(atlas.tasks[:-1]))
    at = probes.choose(known, 10)
    row = known.predict(at, atlas.matrix(atlas.tasks[-1:]).values[0][at])
    forecasts = [
        TaskForecast.from_forecast(row, atlas.pool, method="bayesian", task=name)
        for name in (atlas.tasks[-1], "a new one with a name that is not short at all")
    ]
    write_report(folder / "report.html", atlas, forecasts=forecasts, verification=verification(), sequence=sequence())
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield launched
        launched.close()


def drawn(browser: Browser, file: Path, width: int) -> Page:
    """Open a report, and wait until every plot has its final size."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.set_default_timeout(600_000)  # milliseconds; a busy machine is no failure
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-drawn=true]", state="attached")
    return page


def overlap(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two turned rectangles of corners (4, 2) share more than SLACK in every direction of their sides."""
    for corners in (first, second):
        for side in (corners[1] - corners[0], corners[2] - corners[1]):
            axis = side / (np.linalg.norm(side) or 1.0)
            one, other = first @ axis, second @ axis
            if min(one.max(), other.max()) - max(one.min(), other.min()) <= SLACK:
                return False
    return True


def test_boxes_by_hand() -> None:
    square = np.array([[0, 0], [10, 0], [10, 10], [0, 10]], dtype=float)
    turned = np.array([[0, 8], [8, 0], [16, 8], [8, 16]], dtype=float)
    assert overlap(square, square + 5)
    assert not overlap(square, square + np.array([10.5, 0]))
    assert overlap(square, turned)
    # Their upright frames overlap; they do not.
    assert not overlap(square, turned + 7)


@pytest.mark.parametrize("width", WIDTHS)
def test_no_label_overlaps_or_is_cut(browser: Browser, report: Path, width: int) -> None:
    page = drawn(browser, report, width)
    assert page.locator("figure").count() == 10
    found: list[dict[str, Any]] = page.evaluate(TEXTS)
    if folder := os.environ.get("FORGETCAST_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"report-{width}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if width == max(WIDTHS):  # what a wide window has room for is not hidden behind a scroll bar
        assert page.evaluate(HIDDEN) == []
    page.close()
    assert len({text["figure"] for text in found}) == 10
    assert len(found) > 100
    cut = [
        (text["figure"], text["text"])
        for text in found
        for (left, top, right, bottom), corners in [(text["frame"], np.array(text["corners"]))]
        if corners[:, 0].min() < left - SLACK
        or corners[:, 0].max() > right + SLACK
        or corners[:, 1].min() < top - SLACK
        or corners[:, 1].max() > bottom + SLACK
    ]
    assert cut == []
    overlapping = [
        (one["figure"], one["text"], other["text"])
        for one, other in itertools.combinations(found, 2)
        if one["figure"] == other["figure"] and overlap(np.array(one["corners"]), np.array(other["corners"]))
    ]
    assert overlapping == []


COVERED = """(label) => {
  const figure = document.querySelector(`figure[aria-label="${label}"]`);
  const boxes = [...figure.querySelectorAll(".annotation text")].map((text) => text.getBoundingClientRect());
  const points = [...figure.querySelectorAll(".scatterlayer path.js-line")].flatMap((path) => {
    const matrix = path.getScreenCTM();
    return [...Array(201).keys()].map((i) => {
      const point = path.getPointAtLength((path.getTotalLength() * i) / 200);
      return [matrix.a * point.x + matrix.e, matrix.d * point.y + matrix.f];
    });
  });
  const inside = ([x, y], box) => box.left < x && x < box.right && box.top < y && y < box.bottom;
  return [boxes.length, points.length, points.filter((point) => boxes.some((box) => inside(point, box))).length];
}"""
"""Labels and points of the curves of a plot, and how many of the points are behind a label."""


@pytest.mark.parametrize("width", WIDTHS)
def test_no_curve_is_behind_a_label(browser: Browser, report: Path, tmp_path: Path, width: int) -> None:
    """A curve falls steeply at its end, through the heights of all labels; drawn by the report's own script."""
    label = "How much of the forgetting each rank explains"
    structure = analyze(ForgettingMatrix(planted(8, 40, 2, 1.0)))
    ranks = len(structure.rank_r2)
    curves = {
        "rank_r2": tuple(np.linspace(0.2, 0.99, ranks)),
        "held_out_r2": (*[0.8] * (ranks - 1), -0.4),
        "row_r2": 0.3,
        "column_r2": 0.32,
        "additive_r2": 0.62,
    }
    text, drawn_again = report.read_text(), figures.spectrum(dataclasses.replace(structure, **curves))
    start = text.index(f'<figure role="img" aria-label="{label}"')
    end = text.index("</figure>", start) + len("</figure>")
    (tmp_path / "report.html").write_text(text[:start] + drawn_again + text[end:])
    page = drawn(browser, tmp_path / "report.html", width)
    labels, points, covered = page.evaluate(COVERED, label)
    page.close()
    assert (labels, points) == (3, 402)
    assert covered == 0


def test_lines_that_are_close_have_their_names_apart() -> None:
    assert figures._spread([0.1, 0.5, 0.9], 0.1, 1.1) == [0.1, 0.5, 0.9]
    assert figures._spread([0.1, 0.12, 0.13], 0.1, 1.1) == pytest.approx([0.1, 0.2, 0.3])
    assert figures._spread([0.97, 0.98, 1.0], 0.1, 1.1) == pytest.approx([0.8, 0.9, 1.0])
