"""Comparison of completion methods on tasks that they were not fitted on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from forgetcast.atlas.matrix import ForgettingMatrix
from forgetcast.completion.base import Forecast, clone, correlation, exclude_similar, rows_by_group
from forgetcast.completion.bayesian import Bayesian
from forgetcast.completion.errors import ForecastErrors, average, judge
from forgetcast.completion.influence import WithoutSource, most_influential
from forgetcast.completion.logistic import f1, is_binary
from forgetcast.completion.probes import choose
from forgetcast.errors import DataError
from forgetcast.results import Result


class Predictor(Protocol):
    """Completes rows from probes; see `Completion.predict`."""

    def predict(self, probes: Any, observed: Any) -> Forecast:
        """Complete the rows (B, N) from the measurements (B, k) at the probes (k,)."""
        ...


class Method(Protocol):
    """What is compared: a `Completion`, or an arm that also uses what is known of each task (`UsesTasks`)."""

    def fit(self, matrix: ForgettingMatrix) -> Any:
        """Learn from the known tasks, and return the fitted method."""
        ...


@runtime_checkable
class UsesTasks(Protocol):
    """A fitted method that forecasts by more than the probes."""

    def for_tasks(self, tasks: Sequence[str]) -> Predictor:
        """Return what completes the rows of these tasks, in their order."""
        ...


@dataclass(frozen=True)
class BenchRow(Result):
    """Figures of one method with one way to choose probes and one number of them.

    Attributes
    ----------
    method : str
    probes : 'random' or 'chosen'
    k : int
    accuracy : ForecastErrors
        Mean over seeds and test tasks; the root mean squared error is over all judged entries of a seed.
    f1 : float
        Of "forgotten" at a forecast of at least one half, for binary forgetting; NaN otherwise.
    ratio, ratio_lower, ratio_upper : float
        RMSE relative to the baseline's with the same number of random probes, and its 95 % interval by a paired
        bootstrap over the test tasks.
    seconds : float
        Time to complete one task's row, without the fit.
    median_error : float
        Median absolute error over all judged entries, mean over the seeds: a few examples cannot carry it.
    without : WithoutSource or None
        `ratio` without the source that changes it most; None where the examples have one source.
    rmse_by_task, spearman_by_task : tuple of float, length T
        Of each test task, mean over seeds.
    """

    method: str
    probes: str
    k: int
    accuracy: ForecastErrors
    f1: float
    ratio: float
    ratio_lower: float
    ratio_upper: float
    seconds: float
    median_error: float = float("nan")
    without: WithoutSource | None = None
    rmse_by_task: tuple[float, ...] = ()
    spearman_by_task: tuple[float, ...] = ()

    def __repr__(self) -> str:
        interval = f"[{self.ratio_lower:.3f}, {self.ratio_upper:.3f}]"
        return (
            f"BenchRow({self.method}, {self.k} {self.probes} probes, "
            f"RMSE {self.accuracy.rmse:.4f}, {self.ratio:.3f} {interval} of the baseline's)"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return all figures on one level, ready for JSON."""
        figures = super().as_dict()
        return figures | figures.pop("accuracy")


def bench(
    train: ForgettingMatrix,
    test: ForgettingMatrix,
    methods: Mapping[str, Method],
    *,
    ks: Sequence[int] = (10, 30),
    seeds: int = 10,
    baseline: str = "additive",
) -> list[BenchRow]:
    """Compare completion methods on tasks that they were not fitted on.

    For each seed, probes are taken from one half of the examples and errors on the other half. Random probes are the
    same for all methods; chosen ones are those that `Bayesian`, fitted on `train`, chooses.

    Parameters
    ----------
    train, test : ForgettingMatrix, shapes (M, N) and (T, N)
        Tasks to fit on and tasks to forecast, over the same examples.
    methods : mapping of name to unfitted Method
    ks : sequence of int
        Numbers of probes.
    seeds : int
        Number of splits of the examples into halves, each with its random probes.
    baseline : str
        One of `methods`.

    Raises
    ------
    DataError
        If the examples differ, `baseline` is not among `methods`, or too few examples are measured for all test tasks.
    """
    if train.examples != test.examples:
        raise DataError("the known and the unseen tasks must be measured on the same examples")
    return _bench([(train, test)], methods, ks, seeds, baseline)


def bench_left_out(
    matrix: ForgettingMatrix,
    methods: Mapping[str, Method],
    *,
    similar: float = 0.0,
    ks: Sequence[int] = (10, 30),
    seeds: int = 10,
    baseline: str = "additive",
    on_progress: Callable[[str, int, int], None] | None = None,
) -> list[BenchRow]:
    """Compare completion methods on each task of a matrix, forecast from the other tasks.

    Of the rows of a group, which are of one task, the first is forecast, from the other groups.

    Parameters
    ----------
    matrix : ForgettingMatrix, shape (M, N)
    similar : float
        Share of the other tasks that is left out too: those whose rows correlate most with the task's. It shows how a
        method does on tasks that resemble none of the atlas, which leaving out single tasks cannot.
    methods, ks, seeds, baseline
        As in `bench`.
    on_progress : callable, optional
        Called before each task with its name, the number of tasks done, and the number of all tasks.

    Raises
    ------
    DataError
        As in `bench`; or if fewer than two tasks remain to fit on.
    """
    tasks = len(set(matrix.groups))
    if not 0 <= similar < 1 or tasks - 1 - round(similar * (tasks - 1)) < 2:
        raise DataError(
            f"of {tasks} tasks, leaving out one and {similar:.0%} of the others leaves too few to learn from"
        )
    correlations = correlation(matrix.values)
    splits = []
    for rows in rows_by_group(matrix.groups):
        kept = exclude_similar(correlations, rows, similar)
        known, test = (matrix.select([matrix.tasks[i] for i in part]) for part in (kept, rows[:1]))
        splits.append((known, test))
    return _bench(splits, methods, ks, seeds, baseline, on_progress)


def _bench(
    splits: Sequence[tuple[ForgettingMatrix, ForgettingMatrix]],
    methods: Mapping[str, Method],
    ks: Sequence[int],
    seeds: int,
    baseline: str,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> list[BenchRow]:
    if baseline not in methods:
        raise DataError(f"the baseline {baseline!r} is not among the methods: {', '.join(methods)}")
    parts: list[dict[tuple[str, str, int], list[_Figures]]] = []
    for train, test in splits:
        if on_progress is not None:
            on_progress(test.tasks[0], len(parts), len(splits))
        parts.append(_figures_of(train, test, methods, ks, seeds))
    figures = {key: [_together([part[key][seed] for part in parts]) for seed in range(seeds)] for key in parts[0]}
    rows = []
    for (name, choice, k), of_method in figures.items():
        of_baseline = figures[baseline, "random", k]
        mse, baseline_mse = (np.mean([f.squared for f in each], axis=0) for each in (of_method, of_baseline))
        resampled = np.random.default_rng(0).integers(len(mse), size=(2000, len(mse)))
        ratios = np.sqrt(mse[resampled].mean(axis=1) / baseline_mse[resampled].mean(axis=1))
        lower, upper = np.quantile(ratios, [0.025, 0.975])
        rmse, baseline_rmse = (
            float(np.mean([np.sqrt(np.mean(f.squared)) for f in each])) for each in (of_method, of_baseline)
        )
        rows.append(
            BenchRow(
                method=name,
                probes=choice,
                k=k,
                accuracy=replace(average(e for f in of_method for e in f.errors), rmse=rmse),
                f1=float(np.mean([f.f1 for f in of_method])),
                ratio=rmse / baseline_rmse,
                ratio_lower=float(lower),
                ratio_upper=float(upper),
                seconds=float(np.median([f.seconds for f in of_method])),
                median_error=float(np.mean([np.nanmedian(np.sqrt(f.entries)) for f in of_method])),
                without=_without(splits[0][1].sources, rmse / baseline_rmse, of_method, of_baseline),
                rmse_by_task=_by_task([[each.rmse for each in f.errors] for f in of_method]),
                spearman_by_task=_by_task([[each.spearman for each in f.errors] for f in of_method]),
            )
        )
    return rows


def _without(
    sources: Sequence[str], ratio: float, of_method: Sequence[_Figures], of_baseline: Sequence[_Figures]
) -> WithoutSource | None:
    """Return the ratio of RMSE without the source that changes it most."""

    def rmse(figures: Sequence[_Figures], kept: np.ndarray) -> float:
        with np.errstate(invalid="ignore", divide="ignore"):  # a task may have no other source: NaN
            return float(np.mean([np.sqrt(np.mean(_row_means(f.entries[:, kept]))) for f in figures]))

    return most_influential(sources, ratio, lambda kept: rmse(of_method, kept) / rmse(of_baseline, kept))


def _row_means(entries: np.ndarray) -> np.ndarray:
    """Average each row's entries that are not NaN; NaN where there are none."""
    known = ~np.isnan(entries)
    return np.where(known, entries, 0.0).sum(axis=1) / known.sum(axis=1)


def _by_task(figures: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Average over seeds (S, T); NaN where a figure is undefined for every seed."""
    values = np.array(figures)
    counts = (~np.isnan(values)).sum(axis=0)
    return tuple(np.where(counts > 0, np.nansum(values, axis=0) / np.maximum(counts, 1), np.nan).tolist())


def _figures_of(
    train: ForgettingMatrix, test: ForgettingMatrix, methods: Mapping[str, Method], ks: Sequence[int], seeds: int
) -> dict[tuple[str, str, int], list[_Figures]]:
    """Compute the figures of every seed, by method, way to choose probes, and number of probes."""
    truth = test.values.astype(np.float64)
    complete, most = np.flatnonzero(test.observed.all(axis=0)), max(ks)
    if len(complete) // 2 < most or min(ks) < 1:
        raise DataError(
            f"{most} probes cannot be taken from half of the {len(complete)} examples that all test tasks measured"
        )
    chooser = Bayesian().fit(train)
    fitted: dict[str, Predictor] = {}
    for name, method in methods.items():
        model = clone(method).fit(train)
        fitted[name] = model.for_tasks(test.tasks) if isinstance(model, UsesTasks) else model
    figures: dict[tuple[str, str, int], list[_Figures]] = {}
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        order = rng.permutation(truth.shape[1])
        half = len(order) // 2
        candidates, judged = np.intersect1d(order[:half], complete), order[half:]
        if len(candidates) < most:
            raise DataError(
                f"all test tasks measured only {len(candidates)} of one half's examples, too few for {most}"
            )
        at_random = rng.choice(candidates, most, replace=False)
        chosen = choose(chooser, most, candidates)
        for k in ks:
            for choice, at in (("random", at_random[:k]), ("chosen", chosen[:k])):
                for name, model in fitted.items():
                    started = time.perf_counter()
                    forecast = model.predict(at, truth[:, at])
                    seconds = (time.perf_counter() - started) / len(truth)
                    figures.setdefault((name, choice, k), []).append(_figures(forecast, truth, judged, seconds))
    return figures


class _Figures(NamedTuple):
    """Figures of one method at one seed.

    Attributes
    ----------
    squared : array, shape (T,)
        Mean squared error of each test task.
    entries : array, shape (T, N)
        Squared error of each entry; NaN where it is not judged.
    errors : list of ForecastErrors
    hits, forgotten, predicted : int
        Numbers of judged entries that were forgotten and predicted to be, that were, and that were predicted to be.
    binary : bool
        Whether every observed entry is 0 or 1.
    seconds : float
        For one task's row.
    """

    squared: np.ndarray
    entries: np.ndarray
    errors: list[ForecastErrors]
    hits: int
    forgotten: int
    predicted: int
    binary: bool
    seconds: float

    @property
    def f1(self) -> float:
        """F1 of "forgotten" over all entries; NaN where they are not binary."""
        return f1(self.hits, self.forgotten, self.predicted) if self.binary else float("nan")


def _together(parts: Sequence[_Figures]) -> _Figures:
    return _Figures(
        squared=np.concatenate([part.squared for part in parts]),
        entries=np.concatenate([part.entries for part in parts]),
        errors=[errors for part in parts for errors in part.errors],
        hits=sum(part.hits for part in parts),
        forgotten=sum(part.forgotten for part in parts),
        predicted=sum(part.predicted for part in parts),
        binary=all(part.binary for part in parts),
        seconds=float(np.median([part.seconds for part in parts])),
    )


def _figures(forecast: Forecast, truth: np.ndarray, judged: np.ndarray, seconds: float) -> _Figures:
    lower, upper = forecast.interval(0.9)
    errors = [judge(*(part[row, judged] for part in (forecast.mean, lower, upper, truth))) for row in range(len(truth))]
    entries = np.full(truth.shape, np.nan, dtype=np.float32)
    entries[:, judged] = (forecast.mean[:, judged] - truth[:, judged]) ** 2
    forgotten, predicted = truth[:, judged] == 1, forecast.mean[:, judged] >= 0.5
    return _Figures(
        squared=np.array([each.rmse**2 for each in errors]),
        entries=entries,
        errors=errors,
        hits=int((forgotten & predicted).sum()),
        forgotten=int(forgotten.sum()),
        predicted=int(predicted.sum()),
        binary=is_binary(truth),
        seconds=seconds,
    )
