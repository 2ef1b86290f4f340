"""Errors of a forecast on examples that were not probes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import scipy  # submodules load lazily, so that starting is fast

from forgetcast.completion.base import Forecast
from forgetcast.errors import DataError


@dataclass(frozen=True)
class ForecastErrors:
    """Errors of one forecast on judged examples.

    Attributes
    ----------
    rmse, mae : float
        Nats per token.
    spearman : float
        Rank correlation of forecast and truth; NaN where either is constant.
    recall : float
        Share of the truly most forgotten tenth that is in the forecast's top tenth.
    coverage : float
        Share of the truths inside the interval.
    width : float
        Mean width of the interval, nats per token.
    """

    rmse: float
    mae: float
    spearman: float
    recall: float
    coverage: float
    width: float


def accuracy(forecast: Forecast, truth: Any, judged: Any, *, level: float = 0.9) -> ForecastErrors:
    """Compare one row's forecast with the truth.

    Parameters
    ----------
    forecast : Forecast
        Of a single row, N examples.
    truth : array-like, shape (N,)
        Measured forgetting; NaN entries are not judged.
    judged : array-like of int
        Columns to judge on; probes among them are an error, because their forecast is their measurement.
    level : float
        Level of the interval.
    """
    judged = np.asarray(judged, dtype=np.intp)
    if np.isin(judged, forecast.probes).any():
        raise DataError("a probe cannot be judged on: its forecast is its measurement")
    lower, upper = forecast.interval(level)
    return judge(*(np.asarray(part)[judged] for part in (forecast.mean, lower, upper, truth)))


def judge(mean: np.ndarray, lower: np.ndarray, upper: np.ndarray, truth: Any) -> ForecastErrors:
    """Compare forecasts and the ends of their intervals with the truth, each of shape (n,); NaN truths are skipped.

    Raises
    ------
    DataError
        If fewer than two examples have a truth.
    """
    actual = np.asarray(truth, dtype=np.float64)
    observed = ~np.isnan(actual)
    if observed.sum() < 2:
        raise DataError("at least two measured examples are needed to judge a forecast")
    mean, lower, upper, actual = (values[observed] for values in (mean, lower, upper, actual))
    constant = np.ptp(mean) == 0 or np.ptp(actual) == 0
    top = max(1, round(len(actual) / 10))
    hits = np.intersect1d(np.argsort(-mean, kind="stable")[:top], np.argsort(-actual, kind="stable")[:top])
    return ForecastErrors(
        rmse=float(np.sqrt(np.mean((mean - actual) ** 2))),
        mae=float(np.mean(np.abs(mean - actual))),
        spearman=float("nan") if constant else float(scipy.stats.spearmanr(mean, actual).statistic),
        recall=len(hits) / top,
        coverage=float(np.mean((lower <= actual) & (actual <= upper))),
        width=float(np.mean(upper - lower)),
    )


@dataclass(frozen=True)
class ReliabilityBin:
    """Forecasts of about the same probability, and how often what they are of happened.

    Attributes
    ----------
    count : int
    forecast : float
        Mean of their probabilities.
    share : float
        Of them, what happened; with its 95 % interval of a binomial share (Wilson 1927).
    lower, upper : float
    """

    count: int
    forecast: float
    share: float
    lower: float
    upper: float


@dataclass(frozen=True)
class ProbabilityErrors:
    """Errors of one forecast of probabilities on judged examples.

    Attributes
    ----------
    examples : int
    forecast, share : float
        Mean probability, and the share that happened.
    brier : float
        Mean squared error of the probabilities (Brier 1950); 0 is best.
    brier_of_share : float
        The same if each example had the share as its probability: what a forecast must be below to tell examples apart.
    bins : tuple of ReliabilityBin
        At most `RELIABILITY_BINS`, of about as many examples each, by ascending probability.
    """

    examples: int
    forecast: float
    share: float
    brier: float
    brier_of_share: float
    bins: tuple[ReliabilityBin, ...]


RELIABILITY_BINS, LEAST_IN_BIN = 10, 5
"""Bins of a reliability curve, and the examples that each has at least."""


def judge_probabilities(probabilities: np.ndarray, truth: Any) -> ProbabilityErrors:
    """Compare probabilities with what happened, 1 or 0, both of shape (n,); NaN truths are skipped.

    Raises
    ------
    DataError
        If fewer than two examples have a truth, or one is neither 0 nor 1.
    """
    actual = np.asarray(truth, dtype=np.float64)
    observed = ~np.isnan(actual)
    if observed.sum() < 2:
        raise DataError("at least two measured examples are needed to judge a forecast")
    made, actual = probabilities[observed], actual[observed]
    if not np.isin(actual, (0, 1)).all():
        raise DataError("a forecast of probabilities is judged by zeros and ones")
    share, count = float(actual.mean()), len(actual)
    order = np.argsort(made, kind="stable")
    bins = []
    for part in np.array_split(order, min(RELIABILITY_BINS, max(count // LEAST_IN_BIN, 1))):
        happened = int(actual[part].sum())
        ends = scipy.stats.binomtest(happened, len(part)).proportion_ci(0.95, method="wilson")
        mean = float(made[part].mean())
        bins.append(ReliabilityBin(len(part), mean, happened / len(part), float(ends.low), float(ends.high)))
    return ProbabilityErrors(
        count, float(made.mean()), share, float(np.mean((made - actual) ** 2)), share * (1 - share), tuple(bins)
    )


def average(errors: Iterable[ForecastErrors]) -> ForecastErrors:
    """Average each figure; an undefined rank correlation is skipped, and NaN if all are."""
    figures = [asdict(each) for each in errors]
    means = {}
    for name in figures[0]:
        defined = [each[name] for each in figures if not np.isnan(each[name])]
        means[name] = float(np.mean(defined)) if defined else float("nan")
    return ForecastErrors(**means)
