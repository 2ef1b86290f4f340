"""Draws with unequal probabilities, against all sequences of draws of a tiny population."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgetcast import DataError, probes
from forgetcast.completion import Additive, Bayesian
from forgetcast.completion.design import LEAST, Design, checked_weights
from support.data import planted


def sequences(weights: np.ndarray, candidates: list[int], count: int) -> dict[tuple[int, ...], float]:
    """Return every sequence of draws and its probability, by the definition of successive sampling."""
    found = {}
    for drawn in permutations(candidates, count):
        remaining, probability = weights[candidates].sum(), 1.0
        for i in drawn:
            probability *= weights[i] / remaining
            remaining -= weights[i]
        found[drawn] = probability
    assert sum(found.values()) == pytest.approx(1.0)
    return found


def test_weights_are_rounded_to_levels() -> None:
    weights = np.array([0.0, 1e-9, 1.0, 1.1, 2.0, 1.9, 4.0])
    design = Design.of(weights)
    rounded = design.weights[design.levels] * weights.mean()
    above = weights > LEAST * weights.mean()
    np.testing.assert_array_less(np.abs(np.log2(rounded[above] / weights[above])), 0.251)
    assert (rounded[~above] == rounded[0]).all()
    assert 0.8 * LEAST < rounded[0] / weights.mean() < 1.2 * LEAST
    assert len(design.weights) <= 5
    equal = Design.of(np.zeros(3))
    assert (equal.weights[equal.levels] == 1).all()
    for bad in (np.ones(6), -weights, np.where(above, weights, np.nan)):
        with pytest.raises(DataError, match="a weight is needed for each of the 7 examples"):
            checked_weights(bad, 7)


@settings(max_examples=25, deadline=None)
@given(
    levels=st.lists(st.integers(0, 2), min_size=6, max_size=6),
    count=st.integers(1, 4),
    part=st.sets(st.integers(0, 5), min_size=1),
)
def test_chances_are_those_of_all_sequences(levels: list[int], count: int, part: set[int]) -> None:
    design = Design(np.array([*levels, 0], dtype=np.uint8), np.array([0.5, 1.0, 3.0]))
    weights = design.weights[design.levels]
    every = sequences(weights, list(range(6)), count)
    candidates, among = np.arange(7) < 6, np.isin(np.arange(7), list(part))
    drawn = next(iter(every)) if count < 3 else list(every)[len(every) // 3]
    found = design.chances(candidates, np.array(drawn), among)
    for place, i in enumerate(drawn):
        others = [
            (sequence[place], probability)
            for sequence, probability in every.items()
            if sequence[:place] == drawn[:place] and sequence[place + 1 :] == drawn[place + 1 :]
        ]
        total = sum(probability for j, probability in others if j in part)
        expected = dict(others)[i] / total if i in part else np.nan
        np.testing.assert_allclose(found[place], expected, rtol=1e-9)


def test_draws_have_the_probabilities_of_successive_sampling() -> None:
    design = Design(np.array([0, 1, 2, 2, 0], dtype=np.uint8), np.array([0.5, 1.0, 3.0]))
    columns = np.arange(5)
    expected = sequences(design.weights[design.levels], columns.tolist(), 2)
    counts = dict.fromkeys(expected, 0)
    for seed in range(4000):
        drawn = design.draw(columns, 3, seed)
        np.testing.assert_array_equal(design.draw(columns, 2, seed), drawn[:2])
        counts[tuple(drawn[:2].tolist())] += 1
    for drawn, probability in expected.items():
        assert abs(counts[drawn] / 4000 - probability) < 4 * np.sqrt(probability / 4000)


def test_inclusion_adds_up_to_the_draws_and_is_that_of_simulated_draws() -> None:
    design = Design(np.repeat([0, 1, 2], [50, 30, 20]).astype(np.uint8), np.array([0.5, 1.0, 4.0]))
    columns = np.arange(100)
    inclusion = design.inclusion(columns, 25)
    assert inclusion[design.levels].sum() == pytest.approx(25)
    drawn = np.concatenate([design.draw(columns, 25, seed) for seed in range(400)])
    simulated = np.bincount(design.levels[drawn], minlength=3) / 400 / np.bincount(design.levels)
    np.testing.assert_allclose(inclusion, simulated, rtol=0.03)
    np.testing.assert_array_equal(design.inclusion(columns, 100), 1.0)
    np.testing.assert_allclose(Design.equal(40).inclusion(np.arange(40), 10), 0.25)


def test_a_guaranteed_estimate_from_unequal_draws_is_unbiased() -> None:
    """All sequences of draws: their estimates, weighted by their probabilities, average to the truth."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(6, 7)) * np.array([0.1, 0.2, 0.4, 1.0, 2.0, 3.0, 0.5])
    model, row = Additive().fit(values[:-1]), values[-1] + np.arange(7)
    weights = np.array([0.4, 0.5, 0.7, 1.0, 2.0, 4.0, 1.0])
    design = Design.of(weights)
    candidates = [0, 1, 2, 3, 4, 5]
    for population, among in ((None, None), (None, [1, 3, 5, 6]), ([0, 1, 2, 3, 4, 5, 6], [0, 2, 4])):
        estimates, probabilities, columns = [], [], np.arange(7) if among is None else np.array(among)
        for drawn, probability in sequences(design.weights[design.levels], candidates, 4).items():
            if np.isin(drawn, columns).sum() < 2:
                continue
            at = np.array([6, *drawn])
            forecast = model.predict(at, row[at], audit=4, weights=weights, population=population)
            estimates.append(forecast.mean_interval(0.9, guaranteed=True, among=among)[0])
            probabilities.append(probability)
        assert np.average(estimates, weights=probabilities) == pytest.approx(row[columns].mean(), abs=1e-9)


def test_unequal_draws_give_narrower_intervals_that_hold() -> None:
    """Examples differ in how noisy they are, as in measured matrices; the tasks are unlike the atlas."""
    rng = np.random.default_rng(1)
    spread = rng.lognormal(sigma=1.0, size=1500)
    model = Bayesian().fit(rng.normal(size=(20, 1500)) * spread)
    weights = probes.weights(model)
    held: dict[bool, list[bool]] = {False: [], True: []}
    width: dict[bool, list[float]] = {False: [], True: []}
    for seed in range(60):
        row = 0.3 + rng.normal(size=1500) * spread * rng.lognormal(sigma=0.3, size=1500)
        for weighted in (False, True):
            drawn_by = weights if weighted else None
            at = probes.choose(model, 30, audit=25, weights=drawn_by, seed=seed)
            forecast = model.predict(at, row[at], audit=25, weights=drawn_by)
            _, lower, upper = forecast.mean_interval(0.9, guaranteed=True)
            held[weighted].append(bool(lower <= row.mean() <= upper))
            width[weighted].append(float(upper - lower))
    assert np.median(width[True]) < 0.8 * np.median(width[False])
    assert np.mean(held[True]) > 0.83  # three standard errors below .9 are .78


def test_levels_that_are_used_up() -> None:
    """Nothing remains of the heavy level after some draws; with all drawn, each was the only one left for its place."""
    design = Design(np.repeat([0, 1], [300, 4]).astype(np.uint8), np.array([0.5, 64.0]))
    columns, every = np.arange(304), np.ones(304, dtype=bool)
    drawn = design.draw(columns, 250, 0)
    assert np.isin(np.arange(300, 304), drawn).all()
    chances = design.chances(every, drawn, every)
    heavy = design.levels[drawn] == 1
    np.testing.assert_allclose(chances[heavy], 1.0, atol=1e-3)
    np.testing.assert_allclose(chances[~heavy], 1 / 55, rtol=0.02)
    np.testing.assert_allclose(design.chances(every, design.draw(columns, 304, 1), every), 1.0)


def test_everything_measured_leaves_nothing_open_in_unequal_draws() -> None:
    values = planted(12, 40, 2, 0.1)
    model = Bayesian().fit(values[:-1])
    weights = probes.weights(model)
    at = probes.choose(model, 40, audit=36, weights=weights)
    assert sorted(at.tolist()) == list(range(40))
    forecast = model.predict(at, values[-1, at], audit=36, weights=weights)
    np.testing.assert_allclose(forecast.mean_interval(0.9, guaranteed=True), values[-1].mean(), rtol=1e-9)
