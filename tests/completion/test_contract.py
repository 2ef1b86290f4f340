from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgetcast import ConfigError, DataError, ForgettingMatrix
from forgetcast.completion import (
    KNN,
    Additive,
    Auto,
    Bayesian,
    Completion,
    MatrixFactorization,
    Mean,
    SoftImpute,
    gaussian,
    probes,
)
from forgetcast.completion.additive import additive_effects
from forgetcast.completion.base import LEVELS, clone, task_splits
from forgetcast.completion.bayesian import shrink_variances
from forgetcast.completion.low_rank import fit_low_rank, truncated_svd
from forgetcast.evaluation import accuracy, bench_left_out
from support.completion import dense_mixture
from support.data import planted

METHODS = [Mean, Additive, KNN, MatrixFactorization, SoftImpute, Bayesian, Auto]
every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    return planted(30, 120, 2, 0.1)


class TestContract:
    """What holds for every method."""

    @every_method
    def test_shapes_and_probes(self, method: type[Completion], values: np.ndarray) -> None:
        model = method().fit(values[:-2])
        at = [3, 50, 7]
        one = model.predict(at, values[-1, at])
        both = model.predict(at, values[-2:, at])
        assert one.mean.shape == one.std.shape == (120,)
        assert both.mean.shape == both.std.shape == (2, 120)
        np.testing.assert_allclose(both.mean[1], one.mean, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(both.misfit[1], one.misfit)
        np.testing.assert_array_equal(one.mean[at], values[-1, at])
        np.testing.assert_array_equal(one.std[at], 0)
        assert (np.delete(one.std, at) > 0).all()
        lower, upper = one.interval(0.9)
        wider = one.interval(0.95)
        assert (wider[0] <= lower).all()
        assert (lower <= one.mean).all()
        assert (one.mean <= upper).all()
        assert 0 <= one.misfit <= 1

    @every_method
    def test_invariant_to_permutation(
        self, method: type[Completion], values: np.ndarray, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Which tasks and probes are left out to choose the classes' weights depends on the order.
        monkeypatch.setattr("forgetcast.completion.bayesian.left_out_errors", lambda *_: ())
        rng = np.random.default_rng(0)
        rows, columns = rng.permutation(29), rng.permutation(120)
        at = np.array([3, 50, 7])
        moved = np.array([int(np.flatnonzero(columns == i)[0]) for i in at])
        straight = method().fit(values[:-1]).predict(at, values[-1, at])
        shuffled = method().fit(values[:-1][rows][:, columns]).predict(moved[::-1], values[-1, at][::-1])
        np.testing.assert_allclose(shuffled.mean, straight.mean[columns], rtol=1e-5, atol=1e-5)

    @every_method
    @pytest.mark.parametrize("factor", [1e-3, 1e3])
    def test_units_scale_and_means_shift(self, method: type[Completion], values: np.ndarray, factor: float) -> None:
        at = [3, 50, 7]
        plain = method().fit(values[:-1]).predict(at, values[-1, at])
        scaled = method().fit(values[:-1] * factor).predict(at, values[-1, at] * factor)
        np.testing.assert_allclose(scaled.mean, plain.mean * factor, rtol=1e-3, atol=1e-4 * factor)
        np.testing.assert_allclose(scaled.std, plain.std * factor, rtol=1e-3)
        # The example means' own pattern is one of Bayesian's loadings, so only a shift of all of them is nothing to it.
        shift = np.full(120, 0.7) if method in (Bayesian, Auto) else np.linspace(-1, 1, 120)
        shifted = method().fit(values[:-1] + shift).predict(at, (values[-1] + shift)[at])
        np.testing.assert_allclose(shifted.mean, plain.mean + shift, rtol=1e-3, atol=1e-3)

    @every_method
    @settings(max_examples=25)
    @given(data=st.data())
    def test_nan_anywhere(self, method: type[Completion], data: st.DataObject) -> None:
        truth = planted(8, 20, 1, 0.1).astype(np.float32)
        mask = np.array(data.draw(st.lists(st.booleans(), min_size=160, max_size=160))).reshape(8, 20)
        truth[mask] = np.nan
        if (~np.isnan(truth)).any(axis=1).sum() < 2:
            with pytest.raises(DataError, match="at least two measured tasks"):
                method().fit(truth)
            return
        forecast = method().fit(truth).predict([4], [1.0])
        assert np.isfinite(forecast.mean).all()
        assert np.isfinite(forecast.std).all()

    @every_method
    def test_bad_probes_are_named(self, method: type[Completion], values: np.ndarray) -> None:
        with pytest.raises(DataError, match="not fitted"):
            method().predict([0], [1.0])
        model = method().fit(values)
        with pytest.raises(DataError, match="twice"):
            model.predict([1, 1], [1.0, 1.0])
        with pytest.raises(DataError, match="outside the 120 examples"):
            model.predict([120], [1.0])
        with pytest.raises(DataError, match="probe '5' is not a finite number"):
            model.predict([4, 5], [1.0, np.nan])
        with pytest.raises(DataError, match="2 probes"):
            model.predict([4, 5], [1.0])
        with pytest.raises(ConfigError, match="level"):
            model.predict([4], [1.0]).interval(1.5)

    @every_method
    def test_fitting_is_deterministic(self, method: type[Completion], values: np.ndarray) -> None:
        at = [3, 50, 7]
        first, second = (method().fit(values[:-1]).predict(at, values[-1, at]) for _ in range(2))
        np.testing.assert_array_equal(first.mean, second.mean)
        np.testing.assert_array_equal(first.std, second.std)

    @every_method
    def test_intervals_cover_unseen_tasks(self, method: type[Completion]) -> None:
        truth = planted(140, 200, 2, 0.3)
        model = method().fit(truth[:40])
        at = np.arange(10)
        lower, upper = model.predict(at, truth[40:, at]).interval(0.9)
        covered = ((lower <= truth[40:]) & (truth[40:] <= upper))[:, 10:].mean()
        assert 0.85 < covered < 0.95


@pytest.mark.parametrize("share_missing", [0.0, 0.3])
def test_bayesian_recovers_planted_low_rank(share_missing: float) -> None:
    rng = np.random.default_rng(0)
    truth = planted(61, 400, 2, 0.0)
    noisy = truth + rng.normal(0, 0.1, truth.shape)
    known = noisy[:-1].copy()
    known[rng.random(known.shape) < share_missing] = np.nan
    model = Bayesian(factors=2).fit(known)
    at = probes.choose(model, 20)
    forecast = model.predict(at, noisy[-1, at])
    error = np.sqrt(np.mean((forecast.mean - truth[-1]) ** 2))
    # Three coefficients from 20 probes with noise .1 leave about .1 * sqrt(3 / 20) = .04;
    # the loadings add .1 * sqrt(3 / 60).
    assert error < 0.08
    additive = Additive().fit(known).predict(at, noisy[-1, at])
    assert error < 0.1 * np.sqrt(np.mean((additive.mean - truth[-1]) ** 2))


def test_posterior_is_dense_conditioning(values: np.ndarray) -> None:
    """Oracle: all N x N covariances written out, a mixture of multivariate Student's t by SciPy's density."""
    model = Bayesian(factors=3).fit(values[:-1])
    at = np.array([5, 17, 80, 2])
    weights, means, covariances = dense_mixture(model, at, values[-1])
    variances = [np.diag(covariance) for covariance in covariances]
    mean = weights @ np.array(means)
    variance = weights @ (np.array(variances) + (np.array(means) - mean) ** 2)
    forecast = model.predict(at, values[-1, at])
    rest = np.setdiff1d(np.arange(120), at)
    np.testing.assert_allclose(forecast.mean[rest], mean[rest], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(forecast.std[rest], np.sqrt(variance[rest]) * model.scale_, rtol=1e-6)


def test_out_of_family_task_is_completed_by_its_shift(values: np.ndarray) -> None:
    """Its pattern is unlike the atlas's, so the atlas's factors must not be read into it."""
    rng = np.random.default_rng(5)
    odd = 20.0 + rng.normal(0, 1.0, 120)
    at = np.arange(10)
    forecast = Bayesian().fit(np.abs(values[:-1])).predict(at, odd[at])
    assert np.sqrt(np.mean((forecast.mean - odd)[10:] ** 2)) < 2.5
    half = (forecast.interval(0.9)[1] - forecast.mean)[10:]
    assert np.mean(np.abs(forecast.mean - odd)[10:] < half) > 0.8


def test_variances_are_shrunk_by_empirical_bayes() -> None:
    rng = np.random.default_rng(0)
    degrees = np.full(4000, 12.0)
    same = shrink_variances(2.0 * rng.chisquare(12, 4000), degrees)
    np.testing.assert_allclose(same, 2.0, rtol=0.1)
    # Inverse chi-squared truths with 6 degrees: the best estimate given s is (6 * 1 + 12 * s) / 18.
    truth = 6 / rng.chisquare(6, 4000)
    sample = truth * rng.chisquare(12, 4000) / 12
    np.testing.assert_allclose(shrink_variances(12 * sample, degrees), (6 + 12 * sample) / 18, rtol=0.15)
    with_nothing = shrink_variances(np.append(12 * sample, 99.0), np.append(degrees, 0.0))
    assert with_nothing[-1] == pytest.approx(1.0, rel=0.1)


def test_mean_and_additive_match_plain_numpy(values: np.ndarray) -> None:
    at = [3, 50, 7]
    means = values[:-1].mean(axis=0)
    rest = np.setdiff1d(np.arange(120), at)
    np.testing.assert_allclose(Mean().fit(values[:-1]).predict(at, values[-1, at]).mean[rest], means[rest], atol=1e-5)
    expected = means + (values[-1, at] - means[at]).mean()
    np.testing.assert_allclose(
        Additive().fit(values[:-1]).predict(at, values[-1, at]).mean[rest], expected[rest], atol=1e-5
    )


def test_additive_effects_against_least_squares() -> None:
    rng = np.random.default_rng(0)
    values = planted(7, 11, 1, 0.5)
    values[rng.random(values.shape) < 0.3] = np.nan
    i, j = np.nonzero(~np.isnan(values))
    design = np.zeros((len(i), 18))
    design[np.arange(len(i)), i] = design[np.arange(len(i)), 7 + j] = 1
    solution = np.linalg.lstsq(design, values[i, j], rcond=None)[0]
    rows, columns = additive_effects(values)
    assert rows.mean() == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose((rows[:, None] + columns)[i, j], (solution[:7, None] + solution[7:])[i, j], atol=1e-6)


def test_forecasts_as_well_as_factor_analysis_by_maximum_likelihood() -> None:
    """Oracle: scikit-learn's FactorAnalysis on many tasks, and Gaussian conditioning on its covariance."""
    decomposition = pytest.importorskip("sklearn.decomposition")
    rng = np.random.default_rng(0)
    values = rng.normal(size=(600, 3)) @ rng.normal(size=(3, 80)) + rng.normal(size=80)
    values += rng.normal(size=values.shape) * rng.uniform(0.2, 1.5, 80)
    known, new, at = values[:500], values[500:], np.arange(0, 80, 4)
    rest = np.setdiff1d(np.arange(80), at)
    oracle = decomposition.FactorAnalysis(3).fit(known)
    joint = oracle.get_covariance()
    expected = oracle.mean_ + (new[:, at] - oracle.mean_[at]) @ np.linalg.solve(joint[np.ix_(at, at)], joint[at])
    found = Bayesian(factors=3, prior_scale=1.0, shift_scale=1.0).fit(known).predict(at, new[:, at]).mean
    theirs, ours = (np.sqrt(np.mean((forecast - new)[:, rest] ** 2)) for forecast in (expected, found))
    assert ours < 1.03 * theirs  # principal factors, which weigh all examples alike, lose two per cent
    assert np.sqrt(np.mean((found - expected)[:, rest] ** 2)) < 0.25 * theirs


def test_additive_agrees_with_surprise() -> None:
    surprise = pytest.importorskip("surprise")
    pandas = pytest.importorskip("pandas")
    values, at = planted(20, 60, 1, 0.2), np.arange(0, 60, 6)
    cells = [(i, j, values[i, j]) for i in range(19) for j in range(60)] + [(19, j, values[19, j]) for j in at]
    reader = surprise.Reader(rating_scale=(values.min(), values.max()))
    data = surprise.Dataset.load_from_df(pandas.DataFrame(cells, columns=["task", "example", "z"]), reader)
    options = {"method": "als", "reg_u": 0, "reg_i": 0, "n_epochs": 50}
    baseline = surprise.BaselineOnly(bsl_options=options, verbose=False).fit(data.build_full_trainset())
    theirs = np.array([baseline.predict(19, j, clip=False).est for j in range(60)])
    # Surprise lets the probes move the examples' effects too, a little: twenty rows against nineteen.
    forecast = Additive().fit(values[:-1]).predict(at, values[-1, at])
    rest = np.setdiff1d(np.arange(60), at)
    np.testing.assert_allclose(forecast.mean[rest], theirs[rest], atol=0.02)


def test_truncated_svd_is_numpys() -> None:
    values = planted(12, 50, 3, 0.2)
    left, strength, right = truncated_svd(values, 4)
    full = np.linalg.svd(values, full_matrices=False)
    np.testing.assert_allclose(strength, full[1][:4], rtol=1e-9)
    np.testing.assert_allclose((left * strength) @ right, (full[0][:, :4] * full[1][:4]) @ full[2][:4], atol=1e-8)


def test_missing_entries_are_filled_by_the_low_rank_truth() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(40, 2)) @ rng.normal(size=(2, 90))
    holes = np.where(rng.random(truth.shape) < 0.25, np.nan, truth)
    fit = fit_low_rank(holes, 2, centred=False).fit
    assert np.abs(fit - truth).max() < 0.05 * np.abs(truth).max()


def test_misfit_detects_an_out_of_family_task() -> None:
    truth = planted(60, 200, 1, 0.2)
    model = Bayesian().fit(truth[:50])
    at = probes.choose(model, 20)
    usual = model.predict(at, truth[50:, at]).misfit
    strange = model.predict(at, np.random.default_rng(1).normal(0, 6, (10, 20))).misfit
    assert np.median(usual) > 0.1
    assert strange.max() < 0.01


def test_no_probes_give_the_atlas_mean(values: np.ndarray) -> None:
    forecast = Bayesian().fit(values).predict([], [])
    np.testing.assert_allclose(forecast.mean, values.mean(axis=0), atol=1e-5)
    assert forecast.misfit == 1.0
    with pytest.raises(DataError, match="at least one probe"):
        Additive().fit(values).predict([], [])


def test_examples_never_measured_get_the_average_and_a_wide_interval(values: np.ndarray) -> None:
    holed = values.copy()
    holed[:, 9] = np.nan
    forecast = Bayesian().fit(holed[:-1]).predict([1, 2], values[-1, [1, 2]])
    assert np.isfinite(forecast.mean).all()
    assert forecast.std[9] > np.median(forecast.std)


def test_settings_are_checked_when_fitting(values: np.ndarray) -> None:
    for bad in ({"factors": -1}, {"prior_scale": 0.0}, {"shift_scale": 0.0}):
        with pytest.raises(ConfigError):
            Bayesian(**bad).fit(values)


def test_interval_is_symmetric_and_has_no_width_at_level_zero(values: np.ndarray) -> None:
    forecast = Bayesian().fit(values[:-1]).predict([0], values[-1, :1])
    for level in LEVELS:
        lower, upper = forecast.interval(level)
        np.testing.assert_allclose(upper - forecast.mean, forecast.mean - lower)
    np.testing.assert_array_equal(*forecast.interval(0.0))


def test_on_the_papers_matrix(olmo: np.ndarray) -> None:
    """The protocol of the paper, split 0: better than its three algorithms' best (RMSE .0290)."""
    test = [6, 65, 18, 8, 60, 13, 37, 22, 30, 19, 64, 50, 25, 31, 32, 61, 16, 5, 53, 49]
    rng = np.random.default_rng(0)
    order = rng.permutation(1000)
    candidates, judged = np.sort(order[:500]), order[500:]
    at = rng.choice(candidates, 30, replace=False)
    model = Bayesian().fit(olmo[np.setdiff1d(np.arange(66), test)])
    forecast = model.predict(at, olmo[test][:, at])
    error = forecast.mean[:, judged] - olmo[test][:, judged]
    assert np.sqrt(np.mean(error**2)) < 0.0290
    row = model.predict(at, olmo[test[0], at])
    assert accuracy(row, olmo[test[0]], judged).spearman > 0.4


class TestProbes:
    def test_greedy_is_brute_force(self, values: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gaussian, "BLOCK", 5)
        model = Bayesian(factors=2).fit(values[:, :12])

        def total(at: list[int]) -> float:
            loadings, noise = model.loadings_[at], model.state_.expected_noise()[at]
            covariance = np.linalg.inv(np.diag(1 / model.prior_) + loadings.T @ (loadings / noise[:, None]))
            return float(np.trace(model.loadings_ @ covariance @ model.loadings_.T))

        chosen: list[int] = []
        for _ in range(9):
            chosen.append(min((j for j in range(12) if j not in chosen), key=lambda j: total([*chosen, j])))
        assert probes.choose(model, 9).tolist() == chosen
        assert probes.choose(model, 2).tolist() == chosen[:2]

    def test_greedy_per_cost_is_brute_force(self, values: np.ndarray) -> None:
        model = Bayesian(factors=2).fit(values[:, :12])
        cost = np.random.default_rng(0).uniform(1, 20, 12)
        prior = np.diag(model.prior_)

        def total(at: list[int]) -> float:
            loadings, noise = model.loadings_[at], model.state_.expected_noise()[at]
            covariance = np.linalg.inv(np.linalg.inv(prior) + loadings.T @ (loadings / noise[:, None]))
            return float(np.trace(model.loadings_ @ covariance @ model.loadings_.T))

        chosen: list[int] = []
        for _ in range(5):
            left = [j for j in range(12) if j not in chosen]
            chosen.append(max(left, key=lambda j: (total(chosen) - total([*chosen, j])) / cost[j]))
        assert probes.choose(model, 5, cost=cost).tolist() == chosen
        assert cost[probes.choose(model, 3, cost=cost)].sum() < cost[probes.choose(model, 3)].sum()
        for bad in (np.zeros(12), np.ones(11), np.full(12, np.nan)):
            with pytest.raises(DataError, match="cost"):
                probes.choose(model, 3, cost=bad)

    def test_continuing_from_measured_probes(self, values: np.ndarray) -> None:
        model = Bayesian().fit(values)
        straight = probes.choose(model, 8)
        assert probes.choose(model, 3, measured=straight[:5]).tolist() == straight[5:].tolist()

    def test_audit_probes_are_random_and_come_last(self, values: np.ndarray) -> None:
        model = Bayesian().fit(values)
        mixed = probes.choose(model, 10, audit=4)
        assert mixed[:6].tolist() == probes.choose(model, 6).tolist()
        assert len(set(mixed)) == 10
        assert mixed.tolist() != probes.choose(model, 10).tolist()
        with pytest.raises(DataError, match="at random"):
            probes.choose(model, 3, audit=4)

    def test_only_candidates(self, values: np.ndarray) -> None:
        model = Bayesian().fit(values)
        assert set(probes.choose(model, 5, [4, 8, 15, 16, 23])) == {4, 8, 15, 16, 23}
        assert set(probes.random(120, 5, seed=1, candidates=[4, 8, 15, 16, 23])) == {4, 8, 15, 16, 23}
        assert len(set(probes.random(120, 120))) == 120

    def test_chosen_beat_random(self) -> None:
        truth = planted(80, 300, 3, 0.3)
        model = Bayesian().fit(truth[:60])

        def error(at: np.ndarray) -> float:
            forecast = model.predict(at, truth[60:, at])
            return float(np.mean(np.delete(forecast.mean - truth[60:], at, axis=1) ** 2))

        drawn = np.mean([error(probes.random(300, 8, seed=seed)) for seed in range(10)])
        assert error(probes.choose(model, 8)) < drawn

    def test_impossible_choices(self, values: np.ndarray) -> None:
        model = Bayesian().fit(values)
        for k, candidates in ((0, None), (121, None), (3, [1, 2]), (2, [1, 1])):
            with pytest.raises(DataError, match="cannot be chosen"):
                probes.choose(model, k, candidates)
        with pytest.raises(DataError, match="outside"):
            probes.choose(model, 1, [120])
        for without_loadings in (KNN(), Mean()):
            assert probes.choose(without_loadings.fit(values), 3).tolist() == probes.choose(model, 3).tolist()


class TestGroups:
    """Rows of one task with several seeds: they tell about one another, and nothing about a new task."""

    @pytest.fixture
    def matrix(self) -> ForgettingMatrix:
        rng = np.random.default_rng(3)
        tasks = rng.normal(size=(12, 60))  # nothing in common
        rows = np.repeat(tasks, 2, axis=0) + 0.01 * rng.normal(size=(24, 60))
        return ForgettingMatrix(rows, groups=[str(i // 2) for i in range(24)])

    def test_a_left_out_task_takes_its_other_rows_along(self, matrix: ForgettingMatrix) -> None:
        for similar in (0.0, 0.3):
            for split in task_splits(matrix.values, matrix.groups, similar=similar):
                assert not {matrix.groups[i] for i in split.kept} & {matrix.groups[i] for i in split.left_out}
        left = [i for split in task_splits(matrix.values, matrix.groups) for i in split.left_out.tolist()]
        assert sorted(left) == list(range(24))

    @pytest.mark.parametrize("method", [Bayesian(), KNN()])
    def test_intervals_are_as_wide_as_for_new_tasks(self, matrix: ForgettingMatrix, method: Completion) -> None:
        """Oracle: the standard deviation of the tasks, which is one; the other seed would suggest .01."""
        forecast = clone(method).fit(matrix).predict([0, 1, 2], [0.0, 0.0, 0.0])
        lower, upper = forecast.interval(0.9)
        assert np.mean((upper - lower)[3:]) / 2 > 1.0
        ungrouped = clone(method).fit(matrix.values).predict([0, 1, 2], [0.0, 0.0, 0.0]).interval(0.9)
        assert np.mean((ungrouped[1] - ungrouped[0])[3:]) < np.mean((upper - lower)[3:])

    def test_auto_compares_on_new_tasks(self, matrix: ForgettingMatrix) -> None:
        method = Auto(candidates=[KNN(k=1)])
        assert clone(method).fit(matrix).errors_["KNN"] > 0.8
        assert clone(method).fit(matrix.values).errors_["KNN"] < 0.6

    def test_bench_forecasts_a_task_from_other_tasks(self, matrix: ForgettingMatrix) -> None:
        """Oracle: an error as large as the tasks; with the other seed's row among the known ones, it would be small."""
        (row, *_) = bench_left_out(matrix, {"knn": KNN(k=1)}, ks=[10], seeds=2, baseline="knn")
        assert len(row.rmse_by_task) == 12
        assert row.accuracy.rmse > 0.8
        (row, *_) = bench_left_out(ForgettingMatrix(matrix.values), {"knn": KNN(k=1)}, ks=[10], seeds=2, baseline="knn")
        assert row.accuracy.rmse < 0.6

    def test_groups_follow_the_rows(self, matrix: ForgettingMatrix) -> None:
        assert matrix.select(["5", "2"]).groups == ("2", "1")
        with pytest.raises(DataError, match="24 tasks but 1 groups"):
            ForgettingMatrix(matrix.values, groups=["a"])

    def test_without_groups_each_row_is_a_task(self, values: np.ndarray) -> None:
        alone = [split.left_out.tolist() for split in task_splits(values)]
        named = [split.left_out.tolist() for split in task_splits(values, [f"t{i}" for i in range(len(values))])]
        assert alone == named
