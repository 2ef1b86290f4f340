"""The time left, by a clock of our own that goes on as a machine of planted speed would."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from forgetcast import Example, Pool
from forgetcast.experiments import meter as module
from forgetcast.experiments.meter import Meter, Work, scoring_work, training_work


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def pool_of(lengths: list[int]) -> Pool:
    return Pool([Example(f"e{i}", text="a" * n) for i, n in enumerate(lengths)])


def test_work_is_counted_in_characters_that_are_read() -> None:
    pool = pool_of([10, 100, 1000])
    assert scoring_work(pool, None) == Work(scoring=1110)
    assert scoring_work(pool, 50, answered=True) == Work(scoring=310, answering=310)  # at most 200 each
    assert training_work(pool, 6, 50) == Work(training=6 * 310 / 3)
    pair = Pool([Example("p", prompt="Frage: ä", completion=" ja"), Example("t", text="ж" * 7)])
    np.testing.assert_array_equal(pair.lengths, [11, 7])


@pytest.mark.parametrize("seconds_of_training", [0.5, 2.0, 8.0])
@pytest.mark.parametrize("rows", [3, 12])
def test_the_estimate_is_near_the_truth_once_each_kind_was_seen(
    clock: Clock, rows: int, seconds_of_training: float
) -> None:
    """A skewed pool; how much longer a character of training takes than one of scoring is not known before."""
    rng = np.random.default_rng(0)
    pool, task = pool_of(rng.lognormal(4, 1, 400).astype(int).tolist()), pool_of([60] * 20)
    each = training_work(task, 200, None) + scoring_work(pool, None)
    whole = each.scoring * (rows + 1) * 1e-3 + each.training * rows * 1e-3 * seconds_of_training
    seen: list[tuple[float, float]] = []  # time that is left, in truth and as told
    meter = Meter(lambda _, done, total: seen.append((whole - clock.now, (total - done) / 1000)))
    meter.later = each * rows

    def score(what: str) -> None:
        count = meter.scored(pool, None, what)
        for batch in np.array_split(np.sort(pool.lengths)[::-1], 40):
            clock.now += batch.sum() * 1e-3
            count(len(batch))

    meter.begin(scoring_work(pool, None))
    score("base model: scoring")
    base = len(seen)
    meter.later = Work()
    meter.begin(each * rows)
    for _ in range(rows):
        for _ in range(200):
            clock.now += each.training / 200 * 1e-3 * seconds_of_training
            meter.advance("row: fine-tuning", "training", each.training / 200)
        score("row: scoring")
    assert clock.now == pytest.approx(whole)
    assert seen[-1][1] == pytest.approx(0, abs=0.01)
    ratios = np.array([told / truth for truth, told in seen[:-1] if truth > 1])
    assert (np.abs(np.log(ratios[base + 1 :])) < np.log(1.05)).all()
    if seconds_of_training == 2:  # before the first step, its pace is a guess: three times that of scoring
        assert (np.abs(np.log(ratios[:base])) < np.log(2)).all()


def test_nothing_is_told_before_anything_is_done(clock: Clock) -> None:
    seen: list[tuple[str, int, int]] = []
    meter = Meter(lambda *told: seen.append(told))
    meter.begin(Work(scoring=10))
    meter.waiting("loading the model")
    clock.now = 2.0
    meter.advance("scoring", "scoring", 5)
    meter.report("scoring still")
    assert seen == [("loading the model", 0, 0), ("scoring", 2000, 4000), ("scoring still", 2000, 4000)]


def test_a_part_that_another_process_made_is_no_longer_left(clock: Clock) -> None:
    meter = Meter()
    meter.begin(Work(scoring=30, training=30))
    clock.now = 1.0
    meter.advance("a", "scoring", 10)
    before = dict(meter.left)
    clock.now = 100.0  # waited
    meter.settle(before, Work(scoring=10, training=15), "a: finished")
    assert meter.left == {"scoring": 10, "training": 15, "answering": 0}
    clock.now = 101.0
    meter.advance("b", "scoring", 10)
    assert meter.seconds_left == pytest.approx(15 * 3 * 0.1)


def test_a_meter_is_shared_and_a_function_gets_one() -> None:
    seen: list[str] = []
    report: Callable[[str, int, int], None] = lambda what, *_: seen.append(what)  # noqa: E731
    meter = Meter.of(report)
    assert Meter.of(meter) is meter
    Meter.of(meter).report("x")
    assert seen == ["x"]
    Meter.of(None).report("nobody listens")
