"""How good a forecast was, which method forecasts best, and whether one arm of an experiment beats another."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import scipy  # its parts load when they are first used, which keeps starting fast

from forgetcast.completion import Bayesian, Completion, Forecast
from forgetcast.completion.base import clone, correlation, without_alike
from forgetcast.completion.logistic import f1, is_binary
from forgetcast.errors import DataError
from forgetcast.matrix import ForgettingMatrix
from forgetcast.paired import PairedDifference as PairedDifference
from forgetcast.paired import paired_difference as paired_difference
from forgetcast.probes import choose


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


def average(accuracies: Iterable[Accuracy]) -> Accuracy:
    """Mean of each figure; a rank correlation that does not exist is passed over."""
    found = [asdict(accuracy) for accuracy in accuracies]
    return Accuracy(**{name: float(np.nanmean([figures[name] for figures in found])) for name in found[0]})


def worst_tenth(forgetting: Any) -> float:
    """Mean of the most forgotten tenth (at least one example), nats per token; NaN entries are passed over."""
    return worst_part(forgetting, 10)


def worst_part(forgetting: Any, parts: int) -> float:
    """The same of the worst of so many equal parts."""
    values = np.asarray(forgetting, dtype=np.float64)
    values = np.sort(values[~np.isnan(values)])
    return float(values[-max(1, round(len(values) / parts)) :].mean())


@dataclass(frozen=True)
class BenchRow:
    """Figures of one method with one kind and number of probes.

    Attributes
    ----------
    method : str
    probes : 'random' or 'chosen'
    k : int
    accuracy : Accuracy
        Mean over seeds and test tasks; the root mean squared error is over all judged entries of a seed.
    f1 : float
        Of "forgotten" at a forecast of at least one half, for binary forgetting; NaN otherwise.
    ratio, ratio_lower, ratio_upper : float
        RMSE relative to the baseline's with as many random probes, and its 95 % interval by a paired bootstrap over the
        test tasks.
    seconds : float
        Time to complete one task's row, without the fit.
    """

    method: str
    probes: str
    k: int
    accuracy: Accuracy
    f1: float
    ratio: float
    ratio_lower: float
    ratio_upper: float
    seconds: float

    def __repr__(self) -> str:
        interval = f"[{self.ratio_lower:.3f}, {self.ratio_upper:.3f}]"
        return (
            f"BenchRow({self.method}, {self.k} {self.probes} probes, "
            f"RMSE {self.accuracy.rmse:.4f}, {self.ratio:.3f} {interval} of the baseline's)"
        )

    def as_dict(self) -> dict[str, Any]:
        """All figures on one level, ready for JSON but for NaN."""
        figures = asdict(self)
        return figures | figures.pop("accuracy")


def bench(
    train: ForgettingMatrix,
    test: ForgettingMatrix,
    methods: Mapping[str, Completion],
    *,
    ks: Sequence[int] = (10, 30),
    seeds: int = 10,
    baseline: str = "additive",
) -> list[BenchRow]:
    """Compare completion methods on tasks that they have not seen.

    For each seed, probes are taken from one half of the examples and errors on the other half. Random probes are the
    same for all methods; chosen ones are those that `Bayesian`, fitted on `train`, chooses.

    Parameters
    ----------
    train, test : ForgettingMatrix, shapes (M, N) and (T, N)
        Known and unseen tasks over the same examples.
    methods : mapping of name to unfitted Completion
    ks : sequence of int
        Numbers of probes.
    seeds : int
        Numbers of halvings, and of draws of random probes.
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
    methods: Mapping[str, Completion],
    *,
    alike: float = 0.0,
    ks: Sequence[int] = (10, 30),
    seeds: int = 10,
    baseline: str = "additive",
    on_progress: Callable[[str, int, int], None] | None = None,
) -> list[BenchRow]:
    """Compare completion methods on each task of a matrix in turn, forecast from the others.

    Parameters
    ----------
    matrix : ForgettingMatrix, shape (M, N)
    alike : float
        Share of the other tasks that are left out too: those whose rows correlate most with the task's. It shows how a
        method does on tasks of a kind that the atlas does not hold, which leaving out single tasks cannot.
    methods, ks, seeds, baseline
        As in `bench`.
    on_progress : callable, optional
        Called with the task that is next, the number of tasks done, and of all.

    Raises
    ------
    DataError
        As in `bench`; or if fewer than two tasks are left to learn from.
    """
    tasks = matrix.shape[0]
    if not 0 <= alike < 1 or tasks - 1 - round(alike * (tasks - 1)) < 2:
        raise DataError(f"of {tasks} tasks, leaving out one and {alike:.0%} of the others leaves too few to learn from")
    likeness = correlation(matrix.values)
    splits = []
    for task, name in enumerate(matrix.tasks):
        kept = without_alike(likeness, task, alike)
        splits.append((matrix.select([matrix.tasks[i] for i in kept]), matrix.select([name])))
    return _bench(splits, methods, ks, seeds, baseline, on_progress)


def _bench(
    splits: Sequence[tuple[ForgettingMatrix, ForgettingMatrix]],
    methods: Mapping[str, Completion],
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
    for (name, kind, k), found in figures.items():
        own = np.mean([f.squared for f in found], axis=0)
        theirs = np.mean([f.squared for f in figures[baseline, "random", k]], axis=0)
        resampled = np.random.default_rng(0).integers(len(own), size=(2000, len(own)))
        ratios = np.sqrt(own[resampled].mean(axis=1) / theirs[resampled].mean(axis=1))
        lower, upper = np.quantile(ratios, [0.025, 0.975])
        rmse, base = (
            float(np.mean([np.sqrt(np.mean(f.squared)) for f in of_method]))
            for of_method in (found, figures[baseline, "random", k])
        )
        rows.append(
            BenchRow(
                method=name,
                probes=kind,
                k=k,
                accuracy=replace(average(a for f in found for a in f.accuracies), rmse=rmse),
                f1=float(np.mean([f.f1 for f in found])),
                ratio=rmse / base,
                ratio_lower=float(lower),
                ratio_upper=float(upper),
                seconds=float(np.median([f.seconds for f in found])),
            )
        )
    return rows


def _figures_of(
    train: ForgettingMatrix, test: ForgettingMatrix, methods: Mapping[str, Completion], ks: Sequence[int], seeds: int
) -> dict[tuple[str, str, int], list[_Figures]]:
    """For each method, kind and number of probes: the figures of every seed."""
    truth = test.values.astype(np.float64)
    complete, most = np.flatnonzero(test.observed.all(axis=0)), max(ks)
    if len(complete) // 2 < most or min(ks) < 1:
        raise DataError(
            f"{most} probes cannot be taken from half of the {len(complete)} examples that all test tasks measured"
        )
    chooser = Bayesian().fit(train)
    fitted = {name: clone(method).fit(train) for name, method in methods.items()}
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
            for kind, at in (("random", at_random[:k]), ("chosen", chosen[:k])):
                for name, model in fitted.items():
                    started = time.perf_counter()
                    forecast = model.predict(at, truth[:, at])
                    seconds = (time.perf_counter() - started) / len(truth)
                    figures.setdefault((name, kind, k), []).append(_figures(forecast, truth, judged, seconds))
    return figures


class _Figures(NamedTuple):
    """Of one method at one seed.

    Attributes
    ----------
    squared : array, shape (T,)
        Mean squared error of each test task.
    accuracies : list of Accuracy
    hits, forgotten, said : int
        Judged entries that were truly forgotten and said to be, that were, and that were said to be.
    binary : bool
        Whether every measured entry is 0 or 1.
    seconds : float
        For one task's row.
    """

    squared: np.ndarray
    accuracies: list[Accuracy]
    hits: int
    forgotten: int
    said: int
    binary: bool
    seconds: float

    @property
    def f1(self) -> float:
        """F1 of "forgotten" over all entries; NaN where they are not binary."""
        return f1(self.hits, self.forgotten, self.said) if self.binary else float("nan")


def _together(parts: Sequence[_Figures]) -> _Figures:
    return _Figures(
        squared=np.concatenate([part.squared for part in parts]),
        accuracies=[accuracy for part in parts for accuracy in part.accuracies],
        hits=sum(part.hits for part in parts),
        forgotten=sum(part.forgotten for part in parts),
        said=sum(part.said for part in parts),
        binary=all(part.binary for part in parts),
        seconds=float(np.median([part.seconds for part in parts])),
    )


def _figures(forecast: Forecast, truth: np.ndarray, judged: np.ndarray, seconds: float) -> _Figures:
    lower, upper = forecast.interval(0.9)
    accuracies = [
        judge(*(part[row, judged] for part in (forecast.mean, lower, upper, truth))) for row in range(len(truth))
    ]
    forgotten, said = truth[:, judged] == 1, forecast.mean[:, judged] >= 0.5
    return _Figures(
        squared=np.array([found.rmse**2 for found in accuracies]),
        accuracies=accuracies,
        hits=int((forgotten & said).sum()),
        forgotten=int(forgotten.sum()),
        said=int(said.sum()),
        binary=is_binary(truth),
        seconds=seconds,
    )
