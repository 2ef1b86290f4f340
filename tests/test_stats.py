"""Paired statistics beside SciPy and plain loops."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from rich.console import Console
from scipy import stats

from forgetcast import DataError
from forgetcast.cli.tables import verification_tables
from forgetcast.evaluation import worst_part, worst_tenth
from forgetcast.experiments.verify import Verification
from forgetcast.measure.scores import count_flips
from forgetcast.replay import METRICS, Run
from forgetcast.stats import bootstrap_interval, holm, mean_interval, paired_difference, wilcoxon_p
from support.data import make_pool, make_scores


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_the_step_down_procedure(p: list[float]) -> None:
    """An arm is found at a level if its p-value and all smaller ones pass their steps."""
    corrected = holm(p)
    for level in (0.01, 0.05, 0.2, 0.7):
        found, step = [False] * len(p), 0
        for i in sorted(range(len(p)), key=lambda i: p[i]):
            if p[i] * (len(p) - step) > level:
                break
            found[i], step = True, step + 1
        assert (corrected <= level).tolist() == found


def test_wilcoxon_is_scipys() -> None:
    differences = np.random.default_rng(0).normal(0.2, 1, 15)
    assert wilcoxon_p(differences) == stats.wilcoxon(differences).pvalue
    assert wilcoxon_p([0.0, 0.0]) == 1


def test_bootstrap_of_one_group_is_scipys() -> None:
    values = np.random.default_rng(0).normal(0.2, 1, 20)
    other = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1))
    expected = other.confidence_interval
    spread = values.std() / np.sqrt(20)
    np.testing.assert_allclose(bootstrap_interval([values]), (expected.low, expected.high), atol=0.05 * spread)
    assert bootstrap_interval([np.array([2.0])] * 3) == (2.0, 2.0)
    with pytest.raises(DataError, match="at least one value"):
        bootstrap_interval([values, np.empty(0)])


def test_bootstrap_draws_groups_and_then_their_values() -> None:
    """Beside plain loops, with groups of different sizes."""
    rng = np.random.default_rng(3)
    groups = [rng.normal(shift, 0.3, n) for shift, n in ((0.0, 2), (1.0, 4), (0.5, 3), (2.0, 2))]
    means = []
    for _ in range(8000):
        values: list[float] = []
        for group in rng.integers(4, size=4):
            values += rng.choice(groups[group], len(groups[group])).tolist()
        means.append(np.mean(values))
    np.testing.assert_allclose(bootstrap_interval(groups), np.quantile(means, [0.025, 0.975]), atol=0.04)
    pooled = bootstrap_interval([np.concatenate(groups)])
    clustered = bootstrap_interval(groups)
    assert clustered[1] - clustered[0] > 1.2 * (pooled[1] - pooled[0])


def test_clustered_interval_covers_where_the_paired_one_does_not() -> None:
    """Tasks differ, seeds hardly: pairs taken as independent promise too much."""
    rng = np.random.default_rng(0)
    held = np.zeros(2)
    for _ in range(300):
        groups = [shift + rng.normal(0, 0.1, 3) for shift in rng.normal(0, 1, 12)]
        lower, upper = bootstrap_interval(groups, resamples=400)
        pairs = np.concatenate(groups)
        plain = paired_difference(pairs, np.zeros(len(pairs)))
        held += lower < 0 < upper, plain.lower < 0 < plain.upper
    assert held[0] / 300 > 0.88
    assert held[1] / 300 < 0.8


def verification(tasks: int = 6, seeds: int = 3) -> Verification:
    """Three arms with planted gains over no replay."""
    rng = np.random.default_rng(0)
    gain = {"none": 0.0, "random": 0.3, "forecast": 0.4, "top": 0.32}
    runs = []
    for task in range(tasks):
        own = rng.normal(0, 0.05, len(gain))
        for arm, tilt in zip(gain, own, strict=True):
            for seed in range(seeds):
                mean = 1 - gain[arm] + tilt + rng.normal(0, 0.02)
                runs.append(Run(f"t{task}", arm, seed, mean, 2 * mean, 1.0 + rng.normal(0, 0.1), 8, 40, 1.0, 3 * mean))
    return Verification(tuple(runs), judged=100, ratio=0.1)


def test_a_comparison_clusters_by_task_and_corrects_for_the_arms() -> None:
    result = verification()
    assert result.metrics == ("mean", "worst_tenth", "new_task_loss", "worst_hundredth")
    value = {(run.task, run.arm, run.seed): run.worst_hundredth for run in result.runs}
    raw = {}
    for arm in ("forecast", "top"):
        groups = [
            np.array([value[f"t{t}", arm, s] - value[f"t{t}", "random", s] for s in range(3)])  # type: ignore[operator]
            for t in range(6)
        ]
        pairs = np.concatenate(groups)
        raw[arm] = (
            stats.ttest_1samp([group.mean() for group in groups], 0).pvalue,
            stats.wilcoxon([group.mean() for group in groups]).pvalue,
            bootstrap_interval(groups),
            pairs.mean(),
        )
    for arm, other in (("forecast", "top"), ("top", "forecast")):
        found = result.compare(arm, "random", "worst_hundredth")
        assert found is not None
        assert found.tasks == 6
        assert found.difference.mean == pytest.approx(raw[arm][3])
        assert found.difference.p_value == pytest.approx(raw[arm][0])
        assert found.wilcoxon_p == pytest.approx(raw[arm][1])
        assert (found.bootstrap_lower, found.bootstrap_upper) == pytest.approx(raw[arm][2])
        for which, corrected in ((0, found.corrected_p), (1, found.corrected_wilcoxon_p)):
            mine, theirs = raw[arm][which], raw[other][which]
            by_hand = 2 * mine if mine <= theirs else max(mine, 2 * theirs)
            assert corrected == pytest.approx(min(by_hand, 1))
    # Against no replay, three arms are a family; against random, two.
    none = result.compare("forecast", "none", "mean")
    assert none is not None
    assert none.corrected_wilcoxon_p == pytest.approx(min(3 * none.wilcoxon_p, 1))
    backwards = result.compare("none", "random", "mean")
    assert backwards is not None
    assert backwards.verdict() == "none replay is worse than random"


def test_single_task_is_paired_by_seed() -> None:
    result = verification(tasks=1, seeds=8)
    found = result.compare("forecast", "random", "mean")
    assert found is not None
    value = {(run.arm, run.seed): run.mean for run in result.runs}
    differences = [value["forecast", s] - value["random", s] for s in range(8)]
    assert found.wilcoxon_p == stats.wilcoxon(differences).pvalue
    assert (found.bootstrap_lower, found.bootstrap_upper) == bootstrap_interval([np.array(differences)])


def test_a_verdict_rests_on_the_tasks() -> None:
    """Two tasks that disagree: many seeds make the pairs look sure, drawing tasks again does not."""
    runs = [
        Run(task, arm, seed, base - (gain if arm == "forecast" else 0) + 1e-3 * seed, 1.0, 1.0, 8, 40, 1.0)
        for task, base, gain in (("a", 1.0, 0.5), ("b", 2.0, 0.4), ("c", 1.5, -0.1))
        for arm in ("random", "forecast")
        for seed in range(12)
    ]
    found = Verification(tuple(runs), 10, 0.1).compare("forecast", "random", "mean")
    assert found is not None
    assert found.difference.upper > 0
    assert found.bootstrap_upper > 0
    assert "not shown to be better" in found.verdict()


def test_files_of_earlier_versions_still_load() -> None:
    content = json.loads(json.dumps(verification().as_dict()))
    for run in content["runs"]:
        del run["worst_hundredth"], run["right_to_wrong"]
    old = Verification.from_dict(content)
    assert old.metrics == ("mean", "worst_tenth", "new_task_loss")
    assert {c.metric for c in old.comparisons()} == set(old.metrics)
    assert Verification.from_dict(json.loads(json.dumps(verification().as_dict()))) == verification()


def answered(lost: dict[str, int], right: int = 20) -> Verification:
    """The same runs with answers, of which each arm loses so many, and one more with every other seed."""
    runs = (
        replace(run, right_to_wrong=lost[run.arm] + run.seed % 2, right_before=right) for run in verification().runs
    )
    return replace(verification(), runs=tuple(runs))


def test_arms_are_compared_by_the_share_of_answers_lost() -> None:
    """Oracle: the shares by hand, and SciPy's test of the tasks' mean differences."""
    result = answered({"none": 10, "random": 6, "forecast": 2, "top": 6})
    assert result.average("forecast", "lost_answers") == pytest.approx((2 + 1 / 3) / 20)
    found = result.compare("forecast", "random", "lost_answers")
    assert found is not None
    assert found.difference.mean == pytest.approx(-4 / 20)
    assert found.better
    same = result.compare("top", "random", "lost_answers")
    assert same is not None
    assert (same.difference.mean, same.better, same.worse) == (0, False, False)
    assert Verification.from_dict(json.loads(json.dumps(result.as_dict()))) == result
    # Of shares that differ from task to task, the test is Student's t of the tasks, as of every other metric.
    rng = np.random.default_rng(1)
    uneven = replace(result, runs=tuple(replace(run, right_to_wrong=int(rng.integers(21))) for run in result.runs))
    share = {(r.task, r.arm, r.seed): r.right_to_wrong / 20 for r in uneven.runs if r.right_to_wrong is not None}
    gaps = [np.mean([share[f"t{t}", "top", s] - share[f"t{t}", "none", s] for s in range(3)]) for t in range(6)]
    tested = uneven.compare("top", "none", "lost_answers")
    assert tested is not None
    assert tested.difference.p_value == pytest.approx(stats.ttest_1samp(gaps, 0).pvalue)


def test_a_share_of_answers_that_is_not_known_is_left_out_and_said() -> None:
    lost = {"none": 10, "random": 6, "forecast": 2, "top": 6}
    old = replace(answered(lost), runs=tuple(replace(run, right_before=None) for run in answered(lost).runs))
    assert "lost_answers" not in old.metrics
    assert old.notes() == (
        "The share of answers lost is left out: the run t0.none.0 does not say how many were right before.",
    )
    none = replace(answered(lost), runs=tuple(replace(r, right_to_wrong=0, right_before=0) for r in old.runs))
    (note,) = none.notes()
    assert note.endswith("of the examples that t0 is judged on, the base model answers none right.")
    assert verification().notes() == ()


def test_the_table_has_a_column_for_all_that_was_measured() -> None:
    result = verification()
    result = replace(result, runs=tuple(replace(run, right_to_wrong=run.seed, right_before=5) for run in result.runs))
    console = Console(width=200, record=True, file=StringIO())
    for part in verification_tables(result):
        console.print(part)
    text = console.export_text()
    assert all(name in text for name in (METRICS[metric] for metric in result.metrics))
    found = result.compare("forecast", "random", "mean")
    assert found is not None
    assert f"{found.difference.lower:+.3f} to {found.difference.upper:+.3f}" in text
    assert f"{found.corrected_p:.2g}" in text
    assert text.count("answers: a share") == 2  # the arms, and each against no replay
    assert f"{1 / 5:.3f}" in text
    assert "On the share of answers lost, forecast replay is not shown to be better than random" in text


@given(
    st.lists(
        st.lists(st.integers(-1000, 1000).map(lambda thousandths: thousandths / 1000), min_size=3, max_size=3),
        min_size=2,
        max_size=9,
    ),
)
@settings(max_examples=40)
def test_a_verdict_never_contradicts_what_is_printed(losses: list[list[float]]) -> None:
    """The verdict, the interval and the corrected p-value are of one test."""
    runs = [
        Run("t", arm, seed, value, value, 1.0, 8, 40, 1.0)
        for seed, values in enumerate(losses)
        for arm, value in zip(("random", "top", "forecast"), values, strict=True)
    ]
    for c in Verification(tuple(runs), 40, 0.1).comparisons():
        excludes = c.difference.upper < 0 or c.difference.lower > 0
        if abs(c.corrected_p - 0.05) > 1e-6:
            assert (c.better or c.worse) == excludes == (c.corrected_p < 0.05)
        assert (c.wilcoxon_p is None) == (len(losses) < 6)
        assert c.difference.p_value <= c.corrected_p


def test_what_the_sample_does_not_support_is_left_out_and_said() -> None:
    result = replace(verification(), judged=32)
    assert result.metrics == ("mean", "worst_tenth", "new_task_loss")
    assert result.notes() == ("The worst hundredth is left out: it takes 100 judged examples, and there are 32.",)
    assert len(replace(result, judged=9).notes()) == 2
    text = " ".join(str(part) for part in verification_tables(replace(verification(tasks=1, seeds=2), judged=32)))
    assert "rest on 2 seeds of the task" in text
    assert "takes 6" in text
    assert result.notes()[0] in text


def test_flips_are_counted_over_examples_answered_twice() -> None:
    pool = make_pool(6)
    before, after = make_scores(pool, np.ones(6)), make_scores(pool.subset(pool.ids[::-1]), np.ones(6))
    assert count_flips(before, after) is None
    before = replace(before, exact_match=np.array([1, 1, 1, 0, np.nan, 1]))
    assert count_flips(before, after) is None
    after = replace(after, exact_match=np.array([0, 0, 1, 0, 1, np.nan]))
    # in the pool's order: before 1 1 1 0 - 1, after - 1 0 1 0 0
    assert count_flips(before, after) == (2, 3)
    assert count_flips(before, replace(after, exact_match=np.full(6, np.nan))) is None
    assert worst_part(np.arange(300.0), 100) == 298


numbers = st.floats(-5, 5, allow_nan=False, width=32)


@given(hnp.arrays(np.float64, st.integers(1, 60), elements=numbers))
def test_worst_tenth_is_the_mean_of_the_largest(values: np.ndarray) -> None:
    count = max(1, round(len(values) / 10))
    assert worst_tenth(values) == pytest.approx(sum(sorted(values, reverse=True)[:count]) / count, abs=1e-9)
    assert worst_tenth(np.append(values, np.nan)) == worst_tenth(values)
    assert worst_tenth(values) >= values.mean() - 1e-9


def test_paired_difference_is_the_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 1, 12), rng.normal(0.5, 1, 12)
    found = paired_difference(a, b)
    test = stats.ttest_rel(a, b)
    interval = test.confidence_interval(0.95)
    assert found.mean == pytest.approx((a - b).mean())
    assert (found.lower, found.upper) == pytest.approx((interval.low, interval.high))
    assert found.p_value == pytest.approx(test.pvalue)
    assert found.pairs == 12


def test_paired_interval_covers_at_its_level() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        found = paired_difference(rng.normal(0.3, 1, 8), np.zeros(8))
        inside += found.lower <= 0.3 <= found.upper
    # 950 expected; four standard deviations are 28.
    assert 922 <= inside <= 978


def test_degenerate_pairs() -> None:
    same = paired_difference([1.0, 2.0], [0.0, 1.0])
    assert (same.mean, same.lower, same.upper, same.p_value) == (1.0, 1.0, 1.0, 0.0)
    assert paired_difference([1.0, 2.0], [1.0, 2.0]).p_value == 1
    with pytest.raises(DataError, match="two pairs"):
        paired_difference([1.0], [2.0])


class TestMeanInterval:
    @pytest.mark.parametrize("size", [1, 4])
    def test_against_a_plain_loop(self, size: int) -> None:
        """Oracle: resample whole clusters one by one, and widen the percentiles to Student's t."""
        rng = np.random.default_rng(0)
        sizes = rng.integers(1, 2 * size, 40) if size > 1 else np.ones(40, int)
        labels = np.repeat([f"c{i:02}" for i in range(40)], sizes)
        values = np.repeat(rng.normal(0, 1, 40), sizes) + rng.normal(0, 0.5, sizes.sum())
        groups = [values[labels == name] for name in sorted(set(labels.tolist()))]
        means = []
        for _ in range(20_000):
            drawn = [groups[i] for i in rng.integers(0, 40, 40)]
            means.append(sum(float(group.sum()) for group in drawn) / sum(len(group) for group in drawn))
        wide = stats.t.ppf(0.975, 39) * np.sqrt(40 / 39)
        expected = np.quantile(means, [stats.norm.cdf(-wide), stats.norm.cdf(wide)])
        order = rng.permutation(len(values))
        found = mean_interval(values[order], None if size == 1 else labels[order])
        assert found.units == 40
        assert found.mean == pytest.approx(values.mean())
        assert found.standard_error == pytest.approx(np.std(means), rel=0.05)
        tolerance = 0.1 * float(np.std(means))  # of 2,000 resamples
        assert (found.lower, found.upper) == pytest.approx(tuple(expected), abs=tolerance)

    def test_coverage_of_correlated_clusters(self) -> None:
        """Planted: parts of a document change together, so there are as many independent values as documents."""
        rng, covered, naive, rounds = np.random.default_rng(1), 0, 0, 250
        for _ in range(rounds):
            labels = np.repeat(np.arange(30), rng.integers(4, 16, 30))
            values = 0.03 + rng.normal(0, 0.1, 30)[labels] + rng.normal(0, 0.02, len(labels))
            clustered, plain = mean_interval(values, labels), mean_interval(values)
            assert clustered.lower is not None
            assert clustered.upper is not None
            assert plain.lower is not None
            assert plain.upper is not None
            covered += clustered.lower <= 0.03 <= clustered.upper
            naive += plain.lower <= 0.03 <= plain.upper
        assert 0.91 <= covered / rounds <= 0.99
        assert naive / rounds < 0.65

    def test_few_units_have_students_interval(self) -> None:
        values = np.random.default_rng(0).normal(0.2, 1, 7)
        t = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        found = mean_interval(values)
        assert (found.lower, found.upper) == pytest.approx((t.low, t.high))
        paired = mean_interval(np.repeat(values, 3), np.repeat(np.arange(7), 3))
        assert (paired.lower, paired.upper) == pytest.approx((t.low, t.high))
        for one in (mean_interval([0.3]), mean_interval([0.3, 0.4], ["a", "a"])):
            assert (one.lower, one.upper, one.standard_error, one.units) == (None, None, None, 1)
        same = mean_interval([0.3, 0.3])
        assert (same.lower, same.upper, same.standard_error) == (0.3, 0.3, 0)
