"""How good a forecast was, and whether one arm of an experiment beats another: metrics and a paired interval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy  # its parts load when they are first used, which keeps starting fast

from forgetcast.completion.base import Forecast
from forgetcast.errors import DataError


@dataclass(frozen=True)
class Accuracy:
    """Of one forecast on judged examples.

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


def accuracy(forecast: Forecast, truth: Any, judged: Any, *, level: float = 0.9) -> Accuracy:
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


def judge(mean: np.ndarray, lower: np.ndarray, upper: np.ndarray, truth: Any) -> Accuracy:
    """Compare forecasts and the ends of their intervals with the truth, each of shape (n,); NaN truths are left out.

    Raises
    ------
    DataError
        If fewer than two examples have a truth.
    """
    actual = np.asarray(truth, dtype=np.float64)
    measured = ~np.isnan(actual)
    if measured.sum() < 2:
        raise DataError("at least two measured examples are needed to judge a forecast")
    mean, lower, upper, actual = (values[measured] for values in (mean, lower, upper, actual))
    constant = np.ptp(mean) == 0 or np.ptp(actual) == 0
    top = max(1, round(len(actual) / 10))
    hits = np.intersect1d(np.argsort(-mean, kind="stable")[:top], np.argsort(-actual, kind="stable")[:top])
    return Accuracy(
        rmse=float(np.sqrt(np.mean((mean - actual) ** 2))),
        mae=float(np.mean(np.abs(mean - actual))),
        spearman=float("nan") if constant else float(scipy.stats.spearmanr(mean, actual).statistic),
        recall=len(hits) / top,
        coverage=float(np.mean((lower <= actual) & (actual <= upper))),
        width=float(np.mean(upper - lower)),
    )


def worst_tenth(forgetting: Any) -> float:
    """Mean of the most forgotten tenth (at least one example), nats per token; NaN entries are passed over."""
    values = np.asarray(forgetting, dtype=np.float64)
    values = np.sort(values[~np.isnan(values)])
    return float(values[-max(1, round(len(values) / 10)) :].mean())


@dataclass(frozen=True)
class PairedDifference:
    """Mean of paired differences, with a Student-t interval and the p-value of "there is none"."""

    mean: float
    lower: float
    upper: float
    p_value: float
    pairs: int


def paired_difference(a: Any, b: Any, *, level: float = 0.95) -> PairedDifference:
    """Interval for the mean of a - b over pairs (Student's t).

    Parameters
    ----------
    a, b : array-like, shape (n,)
        n >= 2.
    """
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    if difference.ndim != 1 or len(difference) < 2:
        raise DataError("a paired interval needs at least two pairs")
    mean = float(difference.mean())
    if np.ptp(difference) == 0:
        return PairedDifference(mean, mean, mean, float(mean == 0), len(difference))
    test = scipy.stats.ttest_1samp(difference, 0.0)
    interval = test.confidence_interval(level)
    return PairedDifference(mean, float(interval.low), float(interval.high), float(test.pvalue), len(difference))
