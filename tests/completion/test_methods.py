"""Each completion method beside an independent oracle; the contract that all share is in test_contract.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import optimize, special

from forgetcast import Atlas, ConfigError, DataError, ForgettingMatrix
from forgetcast.atlas.rows import StoredMatrix
from forgetcast.completion import (
    KNN,
    METHODS,
    Additive,
    Auto,
    Bayesian,
    LogisticMF,
    MatrixFactorization,
    Mean,
    SoftImpute,
)
from forgetcast.completion.additive import additive_effects
from forgetcast.completion.factorisation import choose_penalty
from forgetcast.completion.gaussian import Estimate
from forgetcast.completion.logistic import fit_logistic
from forgetcast.completion.low_rank import factor_complete, factor_incomplete, fit_low_rank
from forgetcast.evaluation import bench, bench_left_out
from support.data import make_atlas, make_pool, make_scores, planted


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    return planted(30, 120, 2, 0.1)


@pytest.fixture(scope="module")
def binary() -> np.ndarray:
    rng = np.random.default_rng(2)
    logits = (
        rng.normal(-0.5, 1, 90) + rng.normal(0, 0.7, (40, 1)) + rng.normal(size=(40, 2)) @ rng.normal(0, 1.5, (2, 90))
    )
    return (rng.random((40, 90)) < special.expit(logits)).astype(float)


class TestKNN:
    @pytest.mark.parametrize("k", [3, 40])
    @pytest.mark.parametrize("softening", [1.0, 0.01])
    def test_against_a_plain_loop(self, values: np.ndarray, k: int, softening: float) -> None:
        known, new = values[:-1].astype(np.float32).astype(float), values[-1]
        at = [4, 60, 99, 7]
        found = KNN(k=k, softening=softening).fit(known).predict(at, new[at])
        effects, columns = additive_effects(known)
        residuals = known - effects[:, None] - columns
        shift = sum(new[j] - columns[j] for j in at) / 4
        distances = [sum((new[j] - columns[j] - shift - residuals[i, j]) ** 2 for j in at) / 4 for i in range(29)]
        nearest = sorted(range(29), key=lambda i: distances[i])[:k]
        weights = {i: 1 / (distances[i] + softening) for i in nearest}
        for j in (0, 33, 119):
            expected = columns[j] + shift + sum(w * residuals[i, j] for i, w in weights.items()) / sum(weights.values())
            assert found.mean[j] == pytest.approx(expected, rel=1e-6)

    def test_settings(self, values: np.ndarray) -> None:
        for bad in ({"k": 0}, {"softening": -1.0}):
            with pytest.raises(ConfigError):
                KNN(**bad).fit(values)


class TestBlocks:
    """A complete matrix is factored in blocks; the general way is the oracle."""

    @pytest.mark.parametrize("block", [7, 64, 8192])
    def test_blocked_factorisation_matches_the_full_one(
        self, values: np.ndarray, block: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("forgetcast.completion.low_rank.BLOCK", block)
        whole = fit_low_rank(values, 4, centred=True)
        blocks, squares = factor_complete(values, 4)
        np.testing.assert_allclose(blocks.fit, whole.fit, atol=1e-10)
        np.testing.assert_allclose(blocks.rows, whole.rows, atol=1e-12)
        np.testing.assert_allclose(squares, ((values - whole.fit) ** 2).sum(axis=0), atol=1e-9)

    def test_large_matrices_stay_in_single_precision(self, values: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
        at = [3, 50, 77, 12]
        double = Bayesian().fit(values[:-1]).predict(at, values[-1, at])
        monkeypatch.setattr("forgetcast.completion.low_rank.SMALL", 0)
        model = Bayesian().fit(values[:-1])
        assert model.loadings_.dtype == np.float32
        single = model.predict(at, values[-1, at])
        np.testing.assert_allclose(single.mean, double.mean, atol=1e-3)
        np.testing.assert_allclose(single.std, double.std, rtol=1e-2)


class TestAtlasOnDisk:
    """A fit on an atlas is one on its matrix."""

    @pytest.mark.parametrize("name", ["bayesian", "additive"])
    def test_complete(self, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in ("completion.low_rank.BLOCK", "completion.low_rank.STORED_BLOCK"):
            monkeypatch.setattr(f"forgetcast.{module}", 17)
        atlas = make_atlas(tmp_path / "a.atlas", make_pool(60), tasks=12)
        read: list[int] = []
        whole = StoredMatrix.load
        monkeypatch.setattr(StoredMatrix, "load", lambda self: (read.append(1), whole(self))[1])
        stored = METHODS[name]().fit(atlas).predict([3, 30], [0.5, 1.0])
        assert bool(read) == (name == "additive")
        memory = METHODS[name]().fit(atlas.matrix()).predict([3, 30], [0.5, 1.0])
        np.testing.assert_allclose(stored.mean, memory.mean, rtol=1e-6)
        np.testing.assert_allclose(stored.std, memory.std, rtol=1e-6)
        np.testing.assert_allclose(stored.interval(0.9), memory.interval(0.9), rtol=1e-6)

    def test_partly_measured(self, tmp_path: Path) -> None:
        pool = make_pool(60)
        atlas = make_atlas(tmp_path / "a.atlas", pool, tasks=12)
        atlas.add("probed", make_scores(pool.subset(pool.ids[:5]), np.full(5, 3.4)))
        stored, memory = (Bayesian().fit(z).predict([3], [0.5]) for z in (atlas, atlas.matrix()))
        np.testing.assert_array_equal(stored.mean, memory.mean)

    def test_too_large_to_be_filled_in_memory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Planted rank two; tasks without an entry, with five, with half of them, and an example without any."""
        monkeypatch.setattr("forgetcast.completion.low_rank.SKETCH", 130)
        for module in ("completion.low_rank.BLOCK", "completion.low_rank.STORED_BLOCK"):
            monkeypatch.setattr(f"forgetcast.{module}", 37)
        rng = np.random.default_rng(0)
        truth = rng.normal(size=(14, 2)) @ rng.normal(size=(2, 300)) + rng.normal(size=300)
        values = (truth + rng.normal(0, 0.05, truth.shape)).astype(np.float32)
        values[2] = np.nan
        values[5, 5:] = np.nan
        values[9, rng.permutation(300)[:150]] = np.nan
        values[:, 77] = np.nan
        pool = make_pool(300)
        atlas = Atlas.create(tmp_path / "a.atlas", pool, make_scores(pool, np.full(300, 10.0)), model="base")
        for i, row in enumerate(values[:-1]):
            if np.isnan(row).all():
                continue
            seen = [id_ for id_, value in zip(pool.ids, row, strict=True) if not np.isnan(value)]
            atlas.add(f"t{i}", make_scores(pool, 10.0 + np.nan_to_num(row).astype(float)), examples=seen)
        at = np.arange(0, 300, 15)
        memory = Bayesian().fit(atlas).predict(at, values[-1, at])
        monkeypatch.setattr("forgetcast.completion.low_rank.SMALL", 0)
        stored, large = (Bayesian().fit(z).predict(at, values[-1, at]) for z in (atlas, atlas.matrix()))
        rest = np.setdiff1d(np.arange(300), [*at, 77])
        errors = [np.sqrt(np.mean((found.mean - truth[-1])[rest] ** 2)) for found in (stored, large, memory)]
        assert max(errors) < 1.1 * errors[-1] < 0.12
        assert stored.std[77] > 5 * np.median(stored.std)
        np.testing.assert_allclose(np.median(stored.std), np.median(memory.std), rtol=0.15)

    def test_too_few_measured_tasks(self, tmp_path: Path) -> None:
        pool = make_pool(30)
        atlas = make_atlas(tmp_path / "a.atlas", pool, tasks=1)
        for method in (Bayesian(), Additive()):
            with pytest.raises(DataError, match="at least two measured tasks; the matrix has 1"):
                method.fit(atlas)

    def test_factors_of_a_complete_matrix_are_the_same_either_way(self, values: np.ndarray) -> None:
        whole, squares = factor_complete(values, 3)
        found, own, counts = factor_incomplete(values, 3)
        np.testing.assert_allclose(found.fit, whole.fit, atol=1e-5)
        np.testing.assert_allclose(own, squares, rtol=1e-4)
        assert set(counts) == {len(values)}


class TestFactorisation:
    def test_the_penalised_optimum_is_that_of_alternating_ridge(self, values: np.ndarray) -> None:
        """Oracle: alternating ridge regressions on the doubly centred matrix, from a random start."""
        centred = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
        ridge, rank = 2.0, 3
        rng = np.random.default_rng(0)
        left, right = rng.normal(size=(30, rank)), rng.normal(size=(120, rank))
        for _ in range(3000):
            left = centred @ right @ np.linalg.inv(right.T @ right + ridge * np.eye(rank))
            right = centred.T @ left @ np.linalg.inv(left.T @ left + ridge * np.eye(rank))
        found = fit_low_rank(values, rank, centred=True, penalty=ridge)
        shown = found.fit - found.rows[:, None] - found.columns
        np.testing.assert_allclose(shown, left @ right.T, atol=1e-6)

    def test_a_new_row_is_a_ridge_regression(self, values: np.ndarray) -> None:
        known = values[:-1].astype(np.float32).astype(float)
        model = MatrixFactorization(rank=3, penalty=0.05).fit(known)
        centred = known - known.mean(0) - known.mean(1, keepdims=True) + known.mean()
        _, strength, right = np.linalg.svd(centred)
        ridge = 0.05 * strength[0]
        q = right[:3].T * np.sqrt(np.maximum(strength[:3] - ridge, 0))
        at = np.arange(0, 60, 3)
        design = np.column_stack([np.ones(20), q[at]])
        penalty = ridge * np.diag([0.0, 1, 1, 1])
        weights = np.linalg.solve(design.T @ design + penalty, design.T @ (values[-1, at] - known.mean(0)[at]))
        expected = known.mean(0) + weights[0] + q @ weights[1:]
        found = model.predict(at, values[-1, at]).mean
        rest = np.setdiff1d(np.arange(120), at)
        np.testing.assert_allclose(found[rest], expected[rest], rtol=1e-5, atol=1e-6)

    def test_soft_impute_is_the_proximal_gradient_optimum(self, values: np.ndarray) -> None:
        """Oracle: soft-thresholded SVD of the filled matrix, repeated, with entries missing (not centred)."""
        holes = values.copy()
        holes[np.random.default_rng(0).random(values.shape) < 0.2] = np.nan
        present, filled, penalty = ~np.isnan(holes), np.nan_to_num(holes), 3.0
        for _ in range(3000):
            left, strength, right = np.linalg.svd(filled, full_matrices=False)
            low_rank = (left * np.maximum(strength - penalty, 0)) @ right
            filled = np.where(present, holes, low_rank)
        found = fit_low_rank(holes, 100, centred=False, penalty=penalty, rounds=3000).fit
        np.testing.assert_allclose(found, low_rank, atol=2e-3)

    def test_more_noise_gives_a_larger_penalty(self) -> None:
        calm, loud = (choose_penalty(planted(30, 200, 2, noise), 10_000) for noise in (0.01, 2.0))
        assert calm < loud

    @pytest.mark.parametrize("method", [MatrixFactorization, SoftImpute])
    def test_settings(self, values: np.ndarray, method: type[MatrixFactorization]) -> None:
        for bad in (0.0, 1.0, -1.0):
            with pytest.raises(ConfigError, match="penalty"):
                method(penalty=bad).fit(values)


class TestLogistic:
    def test_the_additive_form_is_the_optimum_of_a_general_solver(self, binary: np.ndarray) -> None:
        part = binary[:8, :10]

        def loss(flat: np.ndarray) -> float:
            rows, columns = flat[:8], flat[8:]
            logits = rows[:, None] + columns + special.logit(np.clip(part.mean(), 0.01, 0.99))
            likelihood = (part * logits - np.logaddexp(0, logits)).sum()
            return float(-likelihood + 0.005 * (rows**2).sum() + 0.005 * (columns**2).sum())

        best = optimize.minimize(loss, np.zeros(18), method="BFGS").x
        found = fit_logistic(part, 0, 1.0)
        expected = special.logit(np.clip(part.mean(), 0.01, 0.99)) + best[8:] + best[:8].mean()
        np.testing.assert_allclose(found.logits, expected, atol=0.1)

    def test_a_new_row_is_penalised_logistic_regression(self, binary: np.ndarray) -> None:
        state = fit_logistic(binary[:-1], 2, 1.0)
        at = np.arange(0, 60, 2)
        y = binary[-1, at]

        def loss(weights: np.ndarray) -> float:
            logits = state.logits[at] + state.loadings[at] @ weights
            return float(-(y * logits - np.logaddexp(0, logits)).sum() + 0.5 * (state.precision * weights**2).sum())

        best = optimize.minimize(loss, np.zeros(3), method="BFGS", options={"gtol": 1e-9})
        logits = state.logits + state.loadings @ best.x
        curved = (state.loadings[at].T * (p := special.expit(logits[at])) * (1 - p)) @ state.loadings[at]
        covariance = np.linalg.inv(curved + np.diag(state.precision))
        spread = np.einsum("nr,rs,ns->n", state.loadings, covariance, state.loadings)
        mean, variance, _ = state.posterior(at, y[None])
        np.testing.assert_allclose(mean[0], special.expit(logits / np.sqrt(1 + np.pi * spread / 8)), rtol=1e-5)
        np.testing.assert_allclose(variance, mean * (1 - mean))

    def test_probabilities_are_better_than_the_means(self, binary: np.ndarray) -> None:
        at, rest = np.arange(0, 90, 3), np.setdiff1d(np.arange(90), np.arange(0, 90, 3))
        errors = {}
        for name, method in (("logistic", LogisticMF(rank=2)), ("mean", Mean())):
            forecast = method.fit(binary[:30]).predict(at, binary[30:][:, at])
            errors[name] = np.mean((forecast.mean - binary[30:])[:, rest] ** 2)
        assert errors["logistic"] < 0.9 * errors["mean"]

    def test_missing_entries_and_constant_columns(self, binary: np.ndarray) -> None:
        holes = binary.copy()
        holes[np.random.default_rng(0).random(holes.shape) < 0.3] = np.nan
        holes[:, 0], holes[:, 1], holes[:, 2] = 0.0, 1.0, np.nan
        forecast = LogisticMF(rank=2).fit(holes[:-1]).predict([5, 6], binary[-1, [5, 6]])
        assert np.isfinite(forecast.mean).all()
        assert forecast.mean[0] < 0.1
        assert forecast.mean[1] > 0.9

    def test_real_values_are_rejected(self, values: np.ndarray, binary: np.ndarray) -> None:
        with pytest.raises(DataError, match="0 or 1, not"):
            LogisticMF().fit(values)
        with pytest.raises(DataError, match=r"0 or 1, not 0\.5"):
            LogisticMF(rank=1).fit(binary[:5]).predict([0], [0.5])
        with pytest.raises(ConfigError):
            LogisticMF(precision=0.0).fit(binary)


class TestAuto:
    def test_the_best_on_left_out_tasks_is_used(self, values: np.ndarray) -> None:
        auto = Auto(candidates=[Mean(), Bayesian(), Additive()]).fit(values[:-1])
        assert isinstance(auto.chosen_, Bayesian)
        assert min(auto.errors_, key=lambda name: auto.errors_[name]) == "Bayesian"
        at = [1, 2, 3]
        np.testing.assert_allclose(
            auto.predict(at, values[-1, at]).mean, Bayesian().fit(values[:-1]).predict(at, values[-1, at]).mean
        )

    def test_without_structure_the_simplest_wins(self) -> None:
        noise = np.random.default_rng(0).normal(size=(20, 200)) + np.linspace(0, 9, 200)
        assert isinstance(Auto(candidates=[KNN(k=1), Mean()]).fit(noise).chosen_, Mean)

    def test_zeros_and_ones(self, binary: np.ndarray) -> None:
        assert "LogisticMF" in Auto().fit(binary[:12, :40]).errors_

    def test_too_few_tasks_to_select_a_method(self, values: np.ndarray) -> None:
        assert isinstance(Auto(candidates=[Additive(), Mean()]).fit(values[:3]).chosen_, Additive)
        with pytest.raises(ConfigError, match="at least one candidate"):
            Auto(candidates=[]).fit(values)


class TestFallBack:
    """A task of another kind, which the method for unlike tasks completes better than the one for like tasks."""

    @pytest.fixture
    def families(self) -> np.ndarray:
        rng = np.random.default_rng(0)
        patterns = np.repeat(rng.normal(size=(6, 200)), 3, axis=0)
        return rng.normal(size=(18, 1)) + patterns + 0.05 * rng.normal(size=(18, 200))

    def test_out_of_family_tasks_use_the_fallback(self, families: np.ndarray) -> None:
        model = Auto(candidates=[KNN(k=2), Additive()]).fit(families[:-1])
        assert (type(model.chosen_), type(model.fallback_)) == (KNN, Additive)
        assert model.errors_["KNN"] < 0.5 * model.errors_["Additive"]
        assert model.errors_unlike_["KNN"] > model.errors_unlike_["Additive"]
        rng, at = np.random.default_rng(1), np.arange(0, 200, 10)
        odd = 5.0 + 4 * rng.normal(size=200)
        both = model.predict(at, np.stack([families[-1, at], odd[at]]))
        assert both.misfit[0] > 0.05 > both.misfit[1]
        for row, (kind, truth) in enumerate(((KNN(k=2), families[-1]), (Additive(), odd))):
            alone = kind.fit(families[:-1]).predict(at, truth[at])
            single = model.predict(at, truth[at])
            for found in (alone.mean, single.mean):
                np.testing.assert_allclose(both.mean[row], found)
            for found in (alone.interval(0.8), single.interval(0.8)):
                np.testing.assert_allclose([end[row] for end in both.interval(0.8)], found)
            assert single.misfit == pytest.approx(both.misfit[row])


class TestBench:
    def test_figures_against_plain_code(self, values: np.ndarray) -> None:
        train, test = ForgettingMatrix(values[:24]), ForgettingMatrix(values[24:])
        rows = bench(train, test, {"additive": Additive(), "bayesian": Bayesian()}, ks=(5, 10), seeds=3)
        assert {(r.method, r.probes, r.k) for r in rows} == {
            (m, p, k) for m in ("additive", "bayesian") for p in ("random", "chosen") for k in (5, 10)
        }
        errors = []
        for seed in range(3):
            rng = np.random.default_rng(seed)
            order = rng.permutation(120)
            at, judged = rng.choice(np.sort(order[:60]), 10, replace=False), order[60:]
            forecast = Bayesian().fit(train).predict(at, test.values[:, at])
            errors.append(np.sqrt(np.mean((forecast.mean - test.values)[:, judged] ** 2)))
        row = next(r for r in rows if (r.method, r.probes, r.k) == ("bayesian", "random", 10))
        assert row.accuracy.rmse == pytest.approx(np.mean(errors), rel=1e-6)
        base = next(r for r in rows if (r.method, r.probes, r.k) == ("additive", "random", 10))
        assert row.ratio == pytest.approx(row.accuracy.rmse / base.accuracy.rmse)
        assert row.ratio_lower <= row.ratio <= row.ratio_upper < 1
        assert (base.ratio, base.ratio_lower, base.ratio_upper) == (1, 1, 1)
        assert np.isnan(row.f1)

    def test_each_task_in_turn_is_forecast_from_the_others(self, values: np.ndarray) -> None:
        matrix, method = ForgettingMatrix(values[:6]), {"additive": Additive()}
        seen: list[tuple[str, int, int]] = []
        rows = bench_left_out(matrix, method, ks=[5], seeds=2, on_progress=lambda *what: seen.append(what))
        assert seen == [(str(i), i, 6) for i in range(6)]
        singly = [
            bench(
                ForgettingMatrix(np.delete(values[:6], i, 0)),
                ForgettingMatrix(values[i : i + 1]),
                method,
                ks=[5],
                seeds=2,
            )
            for i in range(6)
        ]
        for i, row in enumerate(rows):
            assert row.accuracy.mae == pytest.approx(np.mean([found[i].accuracy.mae for found in singly]), rel=1e-6)

    def test_excluding_similar_tasks_leaves_out_a_whole_family(self) -> None:
        """Two families of five tasks; with its own family known, a task is completed well."""
        rng = np.random.default_rng(0)
        patterns = np.repeat(rng.normal(size=(2, 200)), 5, axis=0)
        matrix = ForgettingMatrix(patterns + 0.1 * rng.normal(size=(10, 200)))
        errors = [
            bench_left_out(
                matrix, {"mean": Mean(), "bayesian": Bayesian()}, similar=similar, ks=[20], seeds=1, baseline="mean"
            )
            for similar in (0.0, 4 / 9)
        ]
        own, other = (next(r for r in rows if r.method == "bayesian").accuracy.rmse for rows in errors)
        assert own < 0.3
        assert other > 1.0
        for similar in (-0.1, 0.9, 1.0):
            with pytest.raises(DataError, match="too few to learn from"):
                bench_left_out(matrix, {"additive": Additive()}, similar=similar)

    def test_binary_forgetting_has_an_f1(self, binary: np.ndarray) -> None:
        rows = bench(
            ForgettingMatrix(binary[:30]), ForgettingMatrix(binary[30:]), {"logistic": LogisticMF(rank=2)},
            ks=[20], seeds=1, baseline="logistic",
        )  # fmt: skip
        assert all(0.5 < row.f1 < 1 for row in rows)

    def test_invalid_comparisons_are_rejected(self, values: np.ndarray) -> None:
        train, test = ForgettingMatrix(values[:20]), ForgettingMatrix(values[20:])
        with pytest.raises(DataError, match="same examples"):
            bench(train, ForgettingMatrix(values[20:, :50]), {"additive": Additive()})
        with pytest.raises(DataError, match="baseline 'additive'"):
            bench(train, test, {"mean": Mean()})
        with pytest.raises(DataError, match="61 probes cannot be taken"):
            bench(train, test, {"additive": Additive()}, ks=[61])


def degenerate() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    plain = rng.normal(size=(6, 40))
    return {
        "zeros": np.zeros((6, 40)),
        "constant columns": np.tile(np.linspace(0, 1, 40), (6, 1)),
        "two tasks": plain[:2],
        "three tasks": plain[:3],
        "one column": plain[:, :1],
        "an empty row": np.vstack([plain, np.full((1, 40), np.nan)]),
        "an empty column": np.hstack([plain, np.full((6, 1), np.nan)]),
        "mostly missing": np.where(rng.random((9, 40)) < 0.8, np.nan, rng.normal(size=(9, 40))),
        "large": 1e6 * plain,
        "small": 1e-8 * plain,
        "rank one, no noise": np.outer(np.arange(8.0), np.arange(40.0)),
        "zeros and ones": (plain > 0.5).astype(float),
    }


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("case", degenerate())
def test_degenerate_matrices_give_numbers_or_say_why_not(name: str, case: str) -> None:
    """Never a NaN, an infinity or a warning (which is an error here)."""
    values = degenerate()[case]
    if name == "logistic-mf" and not np.isin(values[~np.isnan(values)], (0, 1)).all():
        with pytest.raises(DataError, match="0 or 1"):
            METHODS[name]().fit(values)
        return
    model = METHODS[name]().fit(values)
    at = [0] if values.shape[1] < 3 else [0, 2, 5]
    forecast = model.predict(at, np.nan_to_num(values[0, at]))
    assert np.isfinite(forecast.mean).all()
    assert np.isfinite(forecast.std).all()
    assert (forecast.std >= 0).all()
    if isinstance(model.state_, Estimate) and np.isinf(model.state_.prior).any():  # a shift without a prior
        with pytest.raises(DataError, match="at least one probe"):
            model.predict([], [])
    else:
        assert np.isfinite(model.predict([], []).mean).all()
