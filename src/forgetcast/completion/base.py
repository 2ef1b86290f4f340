"""Base of all completion methods: the contract, the forecast, and calibration on left-out tasks."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self, TypeVar

import numpy as np
import scipy  # submodules load lazily, so that starting is fast

from forgetcast.atlas import Atlas
from forgetcast.atlas.matrix import ForgettingMatrix
from forgetcast.atlas.rows import StoredMatrix
from forgetcast.completion.design import checked_weights
from forgetcast.completion.whole import (
    LEVELS,
    Above,
    Joint,
    LeftOut,
    MeanOf,
    Statistic,
    Tail,
    Whole,
    check_level,
    check_share,
    check_threshold,
    each_row,
)
from forgetcast.errors import DataError

if TYPE_CHECKING:
    from forgetcast.completion.gaussian import LinearGaussian

CALIBRATION_FOLDS, CALIBRATION_TASKS, CALIBRATION_EXAMPLES, CALIBRATION_PROBES = 10, 40, 1_000, 10
"""Of `leave_tasks_out`: groups of tasks, or single tasks where entries are missing; examples; probes of each task."""

FEWEST_SPLIT = 4
"""Tasks, below which none is left out."""

SIMILAR_SHARE = 1 / 3
"""Share of the other tasks, the most similar, to leave out too for a comparison on tasks unlike the atlas."""

MISFIT_THRESHOLD = 0.05
"""A task whose misfit is below this counts as unlike the atlas."""

AnyMethod = TypeVar("AnyMethod")

BLOCK = 8_192
"""Examples processed at once, so that they fit the cache."""


@dataclass(frozen=True)
class Forecast:
    """A completed row, or B of them.

    Attributes
    ----------
    mean, std : array, shape (N,) or (B, N)
        Expected forgetting and its standard deviation, nats per token. At a probe: the measurement, and 0.
    probes : array of int, shape (k,)
        Columns that were measured.
    misfit : float or array, shape () or (B,)
        p-value of "this task is like those in the atlas", from how well the model explains the probes together.
        Small (say below .05) means unlike the atlas, so trust the forecast less. 1.0 where there are no probes.
    widths : array, shape (len(LEVELS),) or (B, len(LEVELS))
        Half-width of the interval at each level of LEVELS, in standard deviations.
    audit : int
        Number of the last probes that were drawn at random.
    wholes : tuple of Whole, length 1 or B
        What the intervals of the rows as wholes are computed from, once they are asked for.
    """

    mean: np.ndarray
    std: np.ndarray
    probes: np.ndarray
    misfit: np.ndarray | float
    widths: np.ndarray
    audit: int = 0
    wholes: tuple[Whole, ...] = field(default=(), repr=False)

    def __repr__(self) -> str:
        *rows, examples = self.mean.shape
        size = f"{rows[0]} rows x {examples} examples" if rows else f"{examples} examples"
        figures = "" if rows else f", mean {self.mean.mean():.3f}, misfit {self.misfit:.2f}"
        return f"Forecast({size}, {len(self.probes)} probes{figures})"

    def interval(self, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
        """Return the ends of the interval that should contain `level` of the true values, shapes like `mean`.

        Raises
        ------
        ConfigError
            If `level` is not in [0, .99].
        """
        check_level(level)
        widths = np.array([np.interp(level, LEVELS, row) for row in np.atleast_2d(self.widths)], self.std.dtype)
        half = (widths[:, None] if self.widths.ndim == 2 else widths[0]) * self.std
        return self.mean - half, self.mean + half

    def mean_interval(
        self, level: float = 0.9, guaranteed: bool = False, *, among: Any = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the mean forgetting of all examples and its interval: value, lower and upper end.

        Parameters
        ----------
        level : float
        guaranteed : bool
            False: *model-based*, from the joint posterior, calibrated on left-out tasks; it holds for tasks like those
            of the atlas. True: *guaranteed*, from the probes that were drawn at random, whatever the atlas.
        among : array-like of int, optional
            Columns to average over, such as those of a source; default: all, or the population given to `predict`.

        Returns
        -------
        value, lower, upper : array, each of shape () or (B,)
            Nats per token.

        Raises
        ------
        ConfigError
            If `level` is not in [0, .99].
        DataError
            If a guaranteed interval is asked for, and fewer than two probes were drawn at random.
        """
        return self._interval(MeanOf(), level, guaranteed, among)

    def tail_interval(
        self, share: float = 0.1, level: float = 0.9, guaranteed: bool = False, *, among: Any = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the mean of the most forgotten share of the examples, by the truth, and its interval.

        It is above the mean of the highest forecasts, because the truth has noise that a forecast has not. The
        guaranteed interval takes the threshold of the tail from the forecast, and its lower end also from the random
        probes, because a threshold that is far off makes it too high. Otherwise as `mean_interval`.
        """
        check_share(share)
        return self._interval(Tail(share), level, guaranteed, among)

    def above_interval(
        self, threshold: float = 0.1, level: float = 0.9, guaranteed: bool = False, *, among: Any = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the share of the examples above a threshold in nats per token, and its interval; as `mean_interval`.

        Raises
        ------
        ConfigError
            If the threshold is not a finite number.
        """
        check_threshold(threshold)
        return self._interval(Above(threshold), level, guaranteed, among)

    def _interval(
        self, statistic: Statistic, level: float, guaranteed: bool, among: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if not self.wholes:
            raise DataError("this forecast has no joint posterior; make it with predict")
        columns = None if among is None else among_columns(among, self.mean.shape[-1])
        return each_row(
            self.wholes,
            self.mean.ndim == 1,
            lambda whole: whole.interval(statistic, level, guaranteed=guaranteed, among=columns),
        )


class State(Protocol):
    """Fitted parameters of a method: enough to complete new rows."""

    def posterior(self, probes: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Condition on rows (B, k) measured at the probes (k,).

        Returns
        -------
        mean : array, shape (B, N)
        variance : array, shape (N,) or (B, N)
        log_misfit : array, shape (B,)
            Log of how badly the probes fit, on any scale that left-out tasks can be compared on.
        """
        ...

    def joint(self, probes: np.ndarray, row: np.ndarray) -> Joint:
        """Return the joint posterior of one row, given its measurements (k,) at the probes (k,)."""
        ...

    def extend(self, observed: np.ndarray) -> State:
        """Give examples without any entry, where `observed` (N,) is False, the parameters of the average one."""
        ...

    def choose(self, k: int, candidates: np.ndarray) -> np.ndarray:
        """Return the k most informative of the columns `candidates`; none if the method has no loadings."""
        ...


class Completion(ABC):
    """Base of all completion methods: checks, conditioning on probes, calibration on left-out tasks.

    A new method subclasses this class, or `LinearGaussian` as most methods do, and implements `estimate`. Its
    constructor only stores keyword settings under their names, which `clone` and the repr read; `prepare` checks them.

    Attributes
    ----------
    state_ : State
        Fitted parameters.
    examples_ : sequence of str, length N
    widths_ : array, shape (len(LEVELS),)
        Interval half-widths in standard deviations, from left-out tasks.
    scale_ : float
        Factor of the model's standard deviations that gives standardised errors on left-out tasks variance one.
    """

    state_: State
    examples_: Sequence[str]
    widths_: np.ndarray
    scale_: float
    _left_out: LeftOut
    _log_misfits: np.ndarray
    _fitted_on: ForgettingMatrix | StoredMatrix
    _gaussian: LinearGaussian | None = None
    _groups: Sequence[str] | None = None
    _reads_blocks: ClassVar[bool] = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in settings(self).items())})"

    @abstractmethod
    def estimate(self, values: Any) -> State:
        """Learn from `values` without changing the method, so that calibration can call it on parts of the atlas.

        Parameters
        ----------
        values : array, shape (M, N)
            M >= 2, float64; no row or column is all NaN. If the class sets `_reads_blocks`, it is the matrix itself,
            float32 or on disk; on disk, rows and columns may be all NaN.
        """

    def prepare(self, values: Any) -> None:  # noqa: B027  # most methods have nothing to prepare
        """Check the settings and choose hyper-parameters, once per fit; `estimate` then sees parts of `values`."""

    def fit(self, matrix: ForgettingMatrix | Atlas | StoredMatrix | Any) -> Self:
        """Learn from the tasks of a forgetting matrix; NaN is legal anywhere.

        Of an atlas, all tasks are used; `Atlas.stored` selects some of them. `Bayesian` reads a few columns at a time,
        so the matrix may exceed memory; other methods load it whole.

        Rows without entries are skipped. An example without entries gets the average example's parameters and a noise
        that covers the spread of all examples.

        Raises
        ------
        DataError
            If fewer than two tasks have measurements.
        """
        if isinstance(matrix, Atlas):
            matrix = matrix.stored()
        if not isinstance(matrix, (StoredMatrix, ForgettingMatrix)):
            matrix = ForgettingMatrix(matrix)
        self._fitted_on, self._gaussian = matrix, None
        if isinstance(matrix, StoredMatrix):
            if self._reads_blocks:
                self._groups = matrix.groups
                return self._learn(matrix, matrix.examples, None)
            matrix = matrix.load()
        values, observed, self._groups = matrix.values, None, matrix.groups
        flat = values.ravel()
        if np.isnan(np.vdot(flat, flat)):  # one pass without a temporary, where most matrices are complete
            rows = np.flatnonzero(matrix.observed.any(axis=1))
            values, self._groups = values[rows], tuple(matrix.groups[i] for i in rows)
            observed = np.any(~np.isnan(values), axis=0)
            values = values[:, observed]
        return self._learn(values if self._reads_blocks else values.astype(np.float64), matrix.examples, observed)

    def _learn(self, values: np.ndarray | StoredMatrix, examples: Sequence[str], observed: np.ndarray | None) -> Self:
        """Learn from the observed columns of a matrix; `observed` (N,) says which those are, None all."""
        check_tasks(values.shape[0])
        self.prepare(values)
        state = self.estimate(values)
        self.state_ = state if observed is None or observed.all() else state.extend(observed)
        self.examples_ = examples
        self._calibrate(values)
        return self

    def predict(
        self, probes: Any, observed: Any, *, audit: int = 0, weights: Any = None, population: Any = None
    ) -> Forecast:
        """Complete new rows from their probes.

        Parameters
        ----------
        probes : array-like of int, shape (k,)
            Columns that were measured; all different. k = 0 gives the forecast before anything is measured.
        observed : array-like, shape (k,) or (B, k)
            Forgetting there, nats per token.
        audit : int
            Number of the last probes that were drawn at random from the population without the other probes, as
            `probes.choose` does; guaranteed intervals need them.
        weights : array-like, shape (N,), optional
            That they were drawn by, given to `probes.choose`; then they are in the order of the draws. Default: equal.
        population : array-like of int, optional
            Columns that the intervals of the whole are of, such as those that can be measured; default: all.

        Raises
        ------
        DataError
            If a probe is out of range or repeats, a measurement is not a finite number, `audit` is not in [0, k], a
            random probe is not of the population, or a weight is negative or not finite.
        """
        self._check_fitted()
        probes = np.asarray(probes, dtype=np.intp).reshape(-1)
        rows = np.asarray(observed, dtype=np.float64)
        single = rows.ndim == 1
        rows = np.atleast_2d(rows)
        if rows.ndim != 2 or rows.shape[1] != len(probes):
            raise DataError(f"{len(probes)} probes, but the measurements have the shape {np.shape(observed)}")
        if len(np.unique(probes)) < len(probes):
            raise DataError("a probe is given twice")
        if len(probes) and not (probes.min() >= 0 and probes.max() < len(self.examples_)):
            raise DataError(f"a probe is outside the {len(self.examples_)} examples of the atlas")
        if not np.isfinite(rows).all():
            bad = self.examples_[probes[np.argwhere(~np.isfinite(rows))[0, 1]]]
            raise DataError(f"the measurement of the probe {bad!r} is not a finite number")
        if not 0 <= audit <= len(probes):
            raise DataError(f"of {len(probes)} probes, {audit} cannot have been drawn at random")
        columns = None if population is None else among_columns(population, len(self.examples_))
        if columns is not None and not np.isin(probes[len(probes) - audit :], columns).all():
            raise DataError("a random probe is not of the population that it was to be drawn from")
        weights = None if weights is None else checked_weights(weights, len(self.examples_))
        mean, variance, log_misfit = self.state_.posterior(probes, rows)
        std = np.sqrt(variance, out=variance if variance.shape == mean.shape else np.empty_like(mean))
        std *= self.scale_
        std[:, probes] = 0.0
        mean[:, probes] = rows
        misfit = self._p_value(log_misfit) if len(probes) else np.ones(len(rows))
        wholes = tuple(
            Whole(self.state_, mean.shape[1], probes, row, audit, weights, columns, self.scale_, self._left_out)
            for row in rows
        )
        if single:
            return Forecast(mean[0], std[0], probes, float(misfit[0]), self.widths_, audit, wholes)
        return Forecast(mean, std, probes, misfit, self.widths_, audit, wholes)

    @property
    def gaussian_(self) -> LinearGaussian:
        """Linear-Gaussian model with loadings of the same data, to choose probes with: the method or a `Bayesian`.

        A `Bayesian` is fitted on first use. The matrix is kept by reference; one on disk stays there.
        """
        self._check_fitted()
        if self._gaussian is None:
            from forgetcast.completion.bayesian import Bayesian  # it derives from this module's classes

            self._gaussian = Bayesian().fit(self._fitted_on)
        return self._gaussian

    def _check_fitted(self) -> None:
        if not hasattr(self, "state_"):
            raise DataError(f"{type(self).__name__} is not fitted; call fit first")

    def _p_value(self, log_misfit: np.ndarray) -> np.ndarray:
        """Compute the one-sided p-value of a new task's log misfit, given those of the left-out tasks."""
        reference = self._log_misfits
        if len(reference) < 3 or (spread := reference.std(ddof=1)) == 0:
            return np.ones_like(log_misfit)
        t = (log_misfit - reference.mean()) / (spread * np.sqrt(1 + 1 / len(reference)))
        return np.asarray(scipy.special.stdtr(len(reference) - 1, -t))

    def _calibrate(self, values: np.ndarray | StoredMatrix) -> None:
        """Estimate scale and widths on left-out tasks, forecast from random probes."""
        self.scale_, self.widths_ = 1.0, scipy.special.ndtri(0.5 + LEVELS / 2)
        self._log_misfits = np.empty(0)
        known = values.shape[0] if self._groups is None else len(set(self._groups))
        self._left_out = LeftOut((), 1.0, known)
        ratios: list[np.ndarray] = []
        misfits: list[float] = []
        left_out = []
        for rest, rows, probes in leave_tasks_out(values, self._groups):
            state = self.estimate(rest)
            mean, variance, log_misfit = state.posterior(probes, rows[:, probes])
            left_out.append((state, rows))
            ratios.append(np.delete((rows - mean) / np.sqrt(variance), probes, axis=1).ravel())
            misfits.extend(log_misfit)
        if not ratios:
            return
        self.scale_, self.widths_ = interval_widths(np.concatenate(ratios))
        self._log_misfits = np.array(misfits)
        self._left_out = LeftOut(left_out, self.scale_, known)


def interval_widths(errors: np.ndarray) -> tuple[float, np.ndarray]:
    """Return scale and widths, as attributes of `Completion`, from standardised errors (n,) on left-out data."""
    sizes = np.abs(errors)
    scale = float(np.sqrt(np.mean(sizes**2))) or 1.0
    widths = np.quantile(sizes, LEVELS) / scale
    widths[0] = 0.0
    return scale, widths


def settings(method: object) -> dict[str, Any]:
    """Return the parameters that a method was constructed with."""
    return {name: getattr(method, name) for name in inspect.signature(type(method)).parameters}


def clone(method: AnyMethod) -> AnyMethod:
    """Return an unfitted copy of a method with the same settings."""
    return type(method)(**settings(method))


def among_columns(columns: Any, n: int) -> np.ndarray:
    """Return these columns among n, sorted and unique.

    Raises
    ------
    DataError
        If there are none, or one is out of range.
    """
    found = np.unique(np.asarray(columns, dtype=np.intp).reshape(-1))
    if not len(found) or not (found[0] >= 0 and found[-1] < n):
        raise DataError(f"columns among the {n} examples of the atlas are needed, at least one")
    return found


def check_tasks(measured: int) -> None:
    """Raise DataError for fewer than two tasks."""
    if measured < 2:
        raise DataError(f"completion needs at least two measured tasks; the matrix has {measured}")


def correlation(values: np.ndarray) -> np.ndarray:
    """Compute the correlation of each two rows over their common columns, shape (M, M); -1 where it is undefined."""
    masked = np.ma.masked_invalid(values)
    return np.asarray(np.ma.corrcoef(masked).filled(-1.0))  # type: ignore[no-untyped-call]


def exclude_similar(correlations: np.ndarray, left_out: Sequence[int] | np.ndarray, share: float) -> np.ndarray:
    """Return the rows, sorted, without those left out and the share most similar to their first, by `correlation`."""
    others = np.argsort(-correlations[left_out[0]], kind="stable")
    others = others[~np.isin(others, left_out)]
    return np.sort(others[round(share * len(others)) :])


def family_of(task: str) -> str:
    """Return what a task's name has before the first slash; empty if it has none."""
    family, slash, _ = task.partition("/")
    return family if slash else ""


def rows_by_group(groups: Sequence[str]) -> list[np.ndarray]:
    """Return the rows of each group, in the order of the groups' first rows."""
    rows: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    return [np.array(each) for each in rows.values()]


def leave_tasks_out(
    values: np.ndarray | StoredMatrix, groups: Sequence[str] | None = None, *, similar: float = 0.0
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield splits on a part of the columns: the remaining rows, the left-out rows, and random probes.

    See `task_splits`, which also says which rows and columns those are.
    """
    for split in task_splits(values, groups, similar=similar):
        yield split.rest, split.rows, split.probes


class Split(NamedTuple):
    """Tasks that are left out, on n columns.

    Attributes
    ----------
    rest, rows : array, shapes (m, n) and (b, n)
        The remaining rows and those left out, which are complete.
    probes : array of int, shape (CALIBRATION_PROBES,)
        Positions among the n columns.
    kept, left_out, columns : array of int, shapes (m,), (b,) and (n,)
        Rows and columns of the matrix.
    """

    rest: np.ndarray
    rows: np.ndarray
    probes: np.ndarray
    kept: np.ndarray
    left_out: np.ndarray
    columns: np.ndarray


def calibration_columns(examples: int, rng: np.random.Generator, always: np.ndarray | None = None) -> np.ndarray:
    """Draw the columns that left-out tasks are judged on, sorted: at most CALIBRATION_EXAMPLES, and `always`."""
    drawn = rng.permutation(examples)[:CALIBRATION_EXAMPLES]
    return np.sort(drawn) if always is None else np.union1d(drawn, always)


def task_splits(
    values: np.ndarray | StoredMatrix,
    groups: Sequence[str] | None = None,
    *,
    similar: float = 0.0,
    fewest: int = FEWEST_SPLIT,
    always: np.ndarray | None = None,
) -> Iterator[Split]:
    """Yield splits on a part of the columns.

    Rows of one group are fine-tunes on one task, and are left out together; default: each row is a task. A complete
    matrix is split into at most CALIBRATION_FOLDS parts, so that every task is left out once. Where entries are
    missing, at most CALIBRATION_TASKS are left out singly, each on its observed columns; so too for `similar`, the
    share of the other rows, the most similar, to leave out as well. At most CALIBRATION_EXAMPLES columns are used, and
    besides these the ones in `always`. Fewer tasks than `fewest` yield nothing. The splits are fixed, so that a fit is
    a function of the matrix alone.
    """
    tasks = [np.array([i]) for i in range(values.shape[0])] if groups is None else rows_by_group(groups)
    if len(tasks) < fewest:
        return
    rng = np.random.default_rng(0)
    columns = calibration_columns(values.shape[1], rng, always)
    part = values[:, columns].astype(np.float64)
    observed, order = ~np.isnan(part), rng.permutation(len(tasks))
    folds = np.array_split(order, min(len(order), CALIBRATION_FOLDS))
    if similar or not observed.all():
        folds = list(order[:CALIBRATION_TASKS, None])
    correlations = correlation(part) if similar else None
    for of_tasks in folds:
        fold = np.concatenate([tasks[i] for i in of_tasks])
        kept = np.delete(np.arange(len(part)), fold)
        if correlations is not None:
            kept = exclude_similar(correlations, fold, similar)
        usable = np.flatnonzero(observed[fold].all(axis=0) & observed[kept].any(axis=0))
        kept = kept[observed[np.ix_(kept, usable)].any(axis=1)]
        if len(usable) >= 2 * CALIBRATION_PROBES and len(kept) >= 2:
            probes = rng.permutation(len(usable))[:CALIBRATION_PROBES]
            rest, rows = part[np.ix_(kept, usable)], part[np.ix_(fold, usable)]
            yield Split(rest, rows, probes, kept, fold, columns[usable])
