"""The paper's analyses on any forgetting matrix: rank, correlations, completion in and out of domain, and replay.

`published.py` has the paper's numbers, `beside.py` sets these beside them. Finished parts are kept in a file, so an
interrupted reproduction continues where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, StrictInt, StrictStr, TypeAdapter, ValidationError

import forgetcast
from forgetcast.atlas.matrix import ForgettingMatrix
from forgetcast.atlas.released import PICKLES, read_split
from forgetcast.completion import METHODS
from forgetcast.completion.base import correlation, family_of
from forgetcast.completion.benchmark import BenchRow, Method, bench
from forgetcast.completion.logistic import is_binary
from forgetcast.completion.structure import Structure, analyze, reconstruction_f1
from forgetcast.errors import ConfigError, DataError
from forgetcast.experiments import published
from forgetcast.files import check_digest, read_json, with_digest, write_json
from forgetcast.progress import OnProgress
from forgetcast.replay.outcome import Run
from forgetcast.replay.strategies import NoReplay
from forgetcast.results import Result, plain, validated
from forgetcast.similarity import SideInformation, SimilarityStudy, arms_of, study
from forgetcast.stats import Compared, differences_by_task

IN_DOMAIN, OUT_OF_DOMAIN = "in domain", "out of domain"

COMPARED = ("mean", "additive", "knn", "mf", "soft-impute", "bayesian")
"""Completion methods that are compared; of binary forgetting, logistic factorisation too."""

TEST_SHARE = len(published.IN_DOMAIN_ROWS) / published.FAMILY_ROWS
"""Share of the known family's tasks that is forecast."""

FEWEST_TASKS = 4
"""Of the known family: three to learn from, and one to forecast."""

FEWEST_COMMON = 3
"""Examples that two rows must have in common for their correlation to count."""

EXACT_MATCH = "a right answer that became wrong, of the examples that the base model answers right"

T = TypeVar("T")


@dataclass(frozen=True)
class TaskSplit:
    """Which tasks are known, and which are forecast from them.

    Attributes
    ----------
    known, in_domain, out_of_domain : tuple of str
    origin : str
        How it was made.
    unused : int
        Rows of other families that are not forecast: measured in part, or on another version of the base model.
    """

    known: tuple[str, ...]
    in_domain: tuple[str, ...]
    out_of_domain: tuple[str, ...]
    origin: str
    unused: int = 0

    def __post_init__(self) -> None:
        """Check that no task is in two parts, and that there is something to learn from and to forecast."""
        names = Counter((*self.known, *self.in_domain, *self.out_of_domain))
        if repeated := [name for name, count in names.items() if count > 1]:
            raise DataError(f"the task {repeated[0]!r} is in the split twice")
        if len(self.known) < 2 or not (self.in_domain or self.out_of_domain):
            raise DataError("a split needs at least two known tasks, and one to forecast")

    @property
    def domains(self) -> dict[str, tuple[str, ...]]:
        """Tasks to forecast, by domain."""
        return {IN_DOMAIN: self.in_domain, OUT_OF_DOMAIN: self.out_of_domain}


class _SplitFile(BaseModel):
    """A split as JSON; a task is its name, or the number of its row, counted from 0."""

    model_config = ConfigDict(extra="forbid")

    known: list[StrictInt | StrictStr]
    in_domain: list[StrictInt | StrictStr] = []
    out_of_domain: list[StrictInt | StrictStr] = []


def load_split(path: str | Path, matrix: ForgettingMatrix) -> TaskSplit:
    """Read a split: JSON with `known`, `in_domain` and `out_of_domain`, or a split of the released statistics.

    Of a released split, the test tasks of a known family are in domain, and the others out of it.

    Raises
    ------
    DataError
        If the file cannot be read, a task is in it twice, or too few are known or forecast.
    MismatchError
        If the matrix has no such task.
    """
    path = Path(path)
    try:
        if path.suffix in PICKLES:
            known, tested = (part["tasks"] for part in read_split(path))
            families = set(map(family_of, known))
            # Without names, the rows are numbered as train/0 and test/0, which are no families.
            unnamed = families == {"train"} and set(map(family_of, tested)) == {"test"}
            inside = [name for name in tested if unnamed or family_of(name) in families]
            outside = [name for name in tested if name not in set(inside)]
            split = TaskSplit(tuple(known), tuple(inside), tuple(outside), f"that of {path.name}")
            if unnamed:
                split = replace(split, origin=f"{split.origin}, which names no families: all count as in domain")
        else:
            content = validated(_SplitFile, read_json(path), str(path))
            split = TaskSplit(
                known=tuple(_name(task, matrix) for task in content.known),
                in_domain=tuple(_name(task, matrix) for task in content.in_domain),
                out_of_domain=tuple(_name(task, matrix) for task in content.out_of_domain),
                origin=f"that of {path.name}",
            )
        matrix.select([*split.known, *split.in_domain, *split.out_of_domain])
    except DataError as error:
        raise type(error)(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    return split


def _name(task: int | str, matrix: ForgettingMatrix) -> str:
    if isinstance(task, str):
        return task
    if not 0 <= task < len(matrix.tasks):
        raise DataError(f"there is no row {task}: the matrix has {len(matrix.tasks)} tasks, counted from 0")
    return matrix.tasks[task]


def draw_split(matrix: ForgettingMatrix, priors: Collection[str] = ()) -> TaskSplit:
    """Split the tasks as the paper does: part of the largest family is known, the rest of it in domain.

    The family of a task is what its name has before the first slash; tasks of other families are out of domain. The
    rows of a family FLAN with 66 tasks are split as published; of another family, 20 of 66 tasks are drawn. Only rows
    that measured all that any row did are forecast; the other ones are known, or unused if they are out of domain.

    Parameters
    ----------
    matrix : ForgettingMatrix
        Rows of one group stay together.
    priors : collection of str, optional
        Rows that were measured on another version of the base model: `Atlas.priors`. They are not forecast.

    Raises
    ------
    DataError
        If the family has too few tasks, or no row of it can be forecast.
    """
    families = Counter(map(family_of, matrix.tasks))
    largest, size = families.most_common(1)[0]
    inside = [name for name in matrix.tasks if family_of(name) == largest]
    observed = matrix.observed
    whole = np.flatnonzero(observed[:, observed.any(axis=0)].all(axis=1))
    complete = {matrix.tasks[row] for row in whole}.difference(priors)
    others = [name for name in matrix.tasks if family_of(name) != largest]
    outside = tuple(name for name in others if name in complete)
    named = f"of the family {largest}" if largest else "without a family in their names"
    if largest.lower() == published.FAMILY and size == published.FAMILY_ROWS and complete.issuperset(inside):
        tested = {inside[row] for row in published.IN_DOMAIN_ROWS}
        origin = f"the published rows {named}"
    else:
        task_of = dict(zip(matrix.tasks, matrix.groups, strict=True))
        tasks = list(dict.fromkeys(task_of[name] for name in inside))
        partly = {task_of[name] for name in inside if name not in complete}
        usable = [task for task in tasks if task not in partly]
        if len(tasks) < FEWEST_TASKS or not usable:
            raise DataError(
                f"{len(tasks)} tasks {named} are too few, {len(usable)} of them measured as a whole on this base: "
                f"completion is judged with at least {FEWEST_TASKS}, one of them whole; name the tasks with --split"
            )
        count = min(max(1, round(TEST_SHARE * len(tasks))), len(usable), len(tasks) - FEWEST_TASKS + 1)
        drawn = {usable[i] for i in np.random.default_rng(0).choice(len(usable), count, replace=False)}
        tested = {name for name in inside if task_of[name] in drawn}
        origin = f"{count} of {len(tasks)} tasks {named}, drawn at random"
    return TaskSplit(
        known=tuple(name for name in inside if name not in tested),
        in_domain=tuple(name for name in inside if name in tested),
        out_of_domain=outside,
        origin=origin,
        unused=len(others) - len(outside),
    )


@dataclass(frozen=True)
class Completed:
    """Figures of one completion method in one domain, as in `BenchRow`.

    Attributes
    ----------
    domain, method : str
    probes : 'random' or 'chosen'
    k : int
    rmse : float
        Nats per token; of binary forgetting, of its probability.
    ratio, ratio_lower, ratio_upper : float
        RMSE relative to the additive method's with random probes, and its 95 % interval over tasks.
    spearman, f1 : float or None
        None where it is undefined, or the forgetting is no 0 or 1.
    """

    domain: str
    method: str
    probes: str
    k: int
    rmse: float
    ratio: float
    ratio_lower: float
    ratio_upper: float
    spearman: float | None
    f1: float | None

    @classmethod
    def of(cls, domain: str, row: BenchRow) -> Self:
        """Keep the figures of a row of `bench`."""
        spearman, f1 = (None if np.isnan(value) else value for value in (row.accuracy.spearman, row.f1))
        ratios = (row.ratio, row.ratio_lower, row.ratio_upper)
        return cls(domain, row.method, row.probes, row.k, row.accuracy.rmse, *ratios, spearman, f1)


@dataclass(frozen=True)
class Forgotten:
    """Binary forgetting: which examples are forgotten, and how well that is completed.

    Attributes
    ----------
    measure : str
        What counts as forgotten.
    tasks, examples : int
    shares : dict of str to float
        Share of the entries of the tasks to forecast that are forgotten, by domain.
    rank_f1 : tuple of float
        F1 of the entries that logistic factorisation of rank 1 to 5 gives a probability of at least one half.
    completion : tuple of Completed
    """

    measure: str
    tasks: int
    examples: int
    shares: dict[str, float]
    rank_f1: tuple[float, ...]
    completion: tuple[Completed, ...] = ()


@dataclass(frozen=True)
class RowCorrelation:
    """Correlations of each two tasks' rows: the quartiles of all pairs that have enough examples in common."""

    lower_quartile: float
    median: float
    upper_quartile: float
    pairs: int


@dataclass(frozen=True, repr=False)
class ReplayArms(Compared):
    """Fine-tunes without replay, and with that of several strategies at one ratio.

    Runs are paired by task, seed and all other settings that they share.

    Attributes
    ----------
    ratio : float
        Replayed examples per new one.
    runs : tuple of Run
    """

    ratio: float
    runs: tuple[Run, ...]

    def __repr__(self) -> str:
        return f"ReplayArms(ratio {self.ratio:.4g}, {len(self.runs)} runs, arms {', '.join(self.arms)})"

    @property
    def arms(self) -> tuple[str, ...]:
        """Strategies."""
        return tuple(dict.fromkeys(str(run.strategy) for run in self.runs))

    @property
    def metrics(self) -> tuple[str, ...]:
        """Mean forgetting, that of the worst tenth, and new-task loss."""
        return ("mean", "worst_tenth", "new_task_loss")

    def pairs(self, arm: str, metric: str) -> np.ndarray:
        """Return the differences from the runs without replay, one for each pair."""
        return np.concatenate(self._differences(arm, NoReplay.name, metric))

    def _differences(self, arm: str, baseline: str, metric: str) -> list[np.ndarray]:
        """Return the paired differences of each task."""
        values = {(run.task, (run.setup, run.seed), str(run.strategy)): getattr(run, metric) for run in self.runs}
        return differences_by_task(values, arm, baseline)


@dataclass(frozen=True)
class ReproductionSettings:
    """How completion is judged.

    Attributes
    ----------
    k : int
        Probes of a new task.
    seeds : int
        Halvings of the examples, each with its random probes.
    threshold : float
        Nats per token. Where there is no exact match, what is forgotten more counts as forgotten.
    """

    k: int = published.PROBES
    seeds: int = published.SEEDS
    threshold: float = 0.0

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.k < 1 or self.seeds < 1 or not np.isfinite(self.threshold):
            raise ConfigError("a reproduction needs k >= 1, seeds >= 1 and a finite threshold")


@dataclass(frozen=True)
class Reproduction(Result):
    """Result of `reproduce`.

    Attributes
    ----------
    name : str
        Of the matrix.
    settings : ReproductionSettings
    split : TaskSplit
    structure : Structure
    row_correlation : RowCorrelation or None
        None where no two rows can be correlated.
    losses : tuple of Completed
        Of forgetting in nats; empty for a matrix of 0 and 1.
    forgotten : Forgotten or None
    similarity : SimilarityStudy or None
        Its forecasts are of the tasks in domain.
    replay : tuple of ReplayArms
        One for each ratio.
    left_out : tuple of str
        What could not be computed, and why.
    """

    kind: ClassVar[str] = "reproduction"

    name: str
    settings: ReproductionSettings
    split: TaskSplit
    structure: Structure
    row_correlation: RowCorrelation | None
    losses: tuple[Completed, ...]
    forgotten: Forgotten | None
    similarity: SimilarityStudy | None = None
    replay: tuple[ReplayArms, ...] = ()
    left_out: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Reproduction({self.name}, {self.structure.tasks} tasks x {self.structure.examples} examples)"

    def as_dict(self) -> dict[str, Any]:
        """Return all figures and the tests of the replay arms, ready for JSON."""
        tests = [{"ratio": arms.ratio} | plain(c.as_dict()) for arms in self.replay for c in arms.comparisons()]
        return super().as_dict() | {"comparisons": tests}


class _Parts:
    """Finished parts, in one file that is written again after each, and bound to the inputs they were computed from."""

    def __init__(self, path: Path | None, key: str, total: int, on_progress: OnProgress | None) -> None:
        self._path, self._key, self._total, self._on_progress = path, key, total, on_progress
        self._done = 0
        self._kept: dict[str, Any] = {}
        if path is not None and path.exists():
            content = check_digest(read_json(path), str(path))
            if not {"key", "parts"} <= content.keys():
                raise DataError(f"{path} is not the parts of a reproduction; move it away")
            if content["key"] == key:
                self._kept = content["parts"]

    def get(self, name: str, adapter: TypeAdapter[T], compute: Callable[[], T]) -> T:
        """Return a part, from the file if it has it."""
        if self._on_progress is not None:
            self._on_progress(name, self._done, self._total)
        self._done += 1
        if name in self._kept:
            return adapter.validate_python(self._kept[name])
        found = compute()
        if self._path is not None:
            self._kept[name] = plain(found)
            write_json(self._path, with_digest({"key": self._key, "parts": self._kept}))
        return found


def reproduce(
    matrix: ForgettingMatrix,
    split: TaskSplit,
    *,
    name: str = "this matrix",
    flips: ForgettingMatrix | None = None,
    side: SideInformation | None = None,
    settings: ReproductionSettings | None = None,
    parts_file: str | Path | None = None,
    on_progress: OnProgress | None = None,
) -> Reproduction:
    """Do the paper's analyses of a matrix, all but those of replay, which `replay_arms` does.

    Parameters
    ----------
    matrix : ForgettingMatrix, shape (M, N)
        Of losses, nats per token; or of 0 and 1.
    split : TaskSplit
        Of its tasks; see `draw_split` and `load_split`.
    name : str
    flips : ForgettingMatrix, optional
        The same tasks' forgetting by exact match, of 0 and 1. Without it, losses above a threshold count as forgotten.
    side : SideInformation, optional
        What similarities are correlated and compared; see `similarity.gather`.
    settings : ReproductionSettings, optional
    parts_file : path, optional
        Keeps finished parts, which a second call with the same inputs reads.
    on_progress : callable, optional

    Raises
    ------
    DataError
        If the matrix has no structure, completion cannot be judged in any domain, or the file of parts is another one.
    MismatchError
        If the matrix has no task of the split.
    """
    settings = settings or ReproductionSettings()
    binary = is_binary(matrix.values)
    if binary and side is not None:
        raise DataError("similarities are compared on losses; this matrix is of 0 and 1")
    parts = _Parts(
        None if parts_file is None else Path(parts_file),
        key=_key(matrix, split, flips, side, settings),
        total=2 + (1 if binary else 2) * sum(map(bool, split.domains.values())),
        on_progress=on_progress,
    )
    structure = parts.get("structure", TypeAdapter(Structure), lambda: analyze(matrix))
    left_out: list[str] = []
    losses: list[Completed] = []
    found: SimilarityStudy | None = None
    if binary:
        left_out.append("RMSE of losses: the matrix is of 0 and 1")
    else:
        methods: dict[str, Method] = {method: METHODS[method]() for method in COMPARED}
        if side is not None:
            methods |= arms_of(side)
        judged = _judge(parts, "losses", matrix, split, methods, settings, side)
        losses, found = judged.rows, judged.study
        left_out += judged.left_out
        if not losses:
            raise DataError(f"completion cannot be judged: {judged.left_out[0]}")
    if flips is not None:
        measure = EXACT_MATCH
    elif binary:
        flips, measure = matrix, "a 1 of the matrix"
    else:
        flips, measure = _above(matrix, settings.threshold), f"a loss that rose by more than {settings.threshold:g}"
    forgotten, reasons = _forgotten(parts, flips, measure, split, settings)
    left_out += reasons
    if binary and (forgotten is None or not forgotten.completion):
        raise DataError(f"completion cannot be judged: {reasons[0]}")
    return Reproduction(
        name=name,
        settings=settings,
        split=split,
        structure=structure,
        row_correlation=_row_correlation(matrix.values),
        losses=tuple(losses),
        forgotten=forgotten,
        similarity=found,
        left_out=tuple(left_out),
    )


def _above(matrix: ForgettingMatrix, threshold: float) -> ForgettingMatrix:
    """Return 1 where a loss is above the threshold, else 0, and NaN where it was not measured."""
    values = np.where(matrix.observed, matrix.values > threshold, np.nan)
    return ForgettingMatrix(
        values, tasks=matrix.tasks, examples=matrix.examples, sources=matrix.sources, groups=matrix.groups
    )


@dataclass(frozen=True)
class _Judged:
    """Figures of all methods in the domains, the study of similarities, and what was left out."""

    rows: list[Completed]
    left_out: list[str]
    study: SimilarityStudy | None = None


def _judge(
    parts: _Parts,
    what: str,
    matrix: ForgettingMatrix,
    split: TaskSplit,
    methods: Mapping[str, Method],
    settings: ReproductionSettings,
    side: SideInformation | None = None,
) -> _Judged:
    """Compare the methods in each domain that has tasks; one that cannot be judged is left out, with the reason."""
    judged = _Judged([], [])
    known = matrix.select(split.known)
    for domain, names in split.domains.items():
        if not names:
            judged.left_out.append(f"{what} {domain}: no task is {domain}")
            continue
        compare = partial(
            bench, known, matrix.select(names), methods, ks=(settings.k,), seeds=settings.seeds, baseline="additive"
        )
        studied = side if domain == IN_DOMAIN else None
        try:
            rows, found = parts.get(
                f"{what} {domain}",
                TypeAdapter(tuple[tuple[Completed, ...], SimilarityStudy | None]),
                partial(_compare, compare, domain, matrix, studied),
            )
        except DataError as error:
            judged.left_out.append(f"{what} {domain}: {error}")
            continue
        judged.rows.extend(rows)
        if found is not None:
            judged = replace(judged, study=found)
    return judged


def _compare(
    compare: Callable[[], list[BenchRow]], domain: str, matrix: ForgettingMatrix, side: SideInformation | None
) -> tuple[tuple[Completed, ...], SimilarityStudy | None]:
    rows = compare()
    return tuple(Completed.of(domain, row) for row in rows), None if side is None else study(matrix, side, rows)


def _forgotten(
    parts: _Parts, flips: ForgettingMatrix, measure: str, split: TaskSplit, settings: ReproductionSettings
) -> tuple[Forgotten | None, list[str]]:
    """Analyse binary forgetting; where it is the same everywhere, there is nothing to analyse."""
    values = flips.values[flips.observed]
    if not len(values) or values.min() == values.max():
        return None, [f"F1: no entry differs from another, with {measure}"]
    rank_f1 = parts.get("f1 by rank", TypeAdapter(tuple[float, ...]), lambda: reconstruction_f1(flips.values))
    methods: dict[str, Method] = {method: METHODS[method]() for method in (*COMPARED, "logistic-mf")}
    judged = _judge(parts, "F1", flips, split, methods, settings)
    shares = {}
    for domain in dict.fromkeys(row.domain for row in judged.rows):
        shares[domain] = float(np.nanmean(flips.select(split.domains[domain]).values))
    return Forgotten(measure, *flips.shape, shares, rank_f1, tuple(judged.rows)), judged.left_out


def _row_correlation(values: np.ndarray) -> RowCorrelation | None:
    """Correlate each two rows over their common examples."""
    observed = (~np.isnan(values)).astype(np.int64)
    usable = np.triu(observed @ observed.T >= FEWEST_COMMON, 1)
    found = correlation(values.astype(np.float64))[usable]
    found = found[found > -1.0]  # -1 stands for undefined
    if not len(found):
        return None
    lower, median, upper = np.quantile(found, [0.25, 0.5, 0.75]).tolist()
    return RowCorrelation(lower, median, upper, len(found))


def replay_arms(runs: Iterable[Mapping[str, Any]]) -> tuple[ReplayArms, ...]:
    """Put together the fine-tunes that an atlas keeps: `Atlas.replays`.

    Those without a strategy, of earlier versions, are left out, and ratios at which no run has one without replay
    beside it.

    Raises
    ------
    DataError
        If one is no `Run`.
    """
    try:
        valid = TypeAdapter(list[Run]).validate_python(list(runs))
    except ValidationError as error:
        raise DataError(f"the outcome of a fine-tune cannot be read: {error.errors()[0]['msg']}") from None
    named = [run for run in valid if run.strategy is not None and run.ratio is not None]
    without = {(run.task, run.setup, run.seed): run for run in named if run.strategy == NoReplay.name}
    arms = []
    for ratio in sorted({run.ratio for run in named if run.ratio and run.strategy != NoReplay.name}):
        at = [run for run in named if run.ratio == ratio and (run.task, run.setup, run.seed) in without]
        if at:
            none = dict.fromkeys((run.task, run.setup, run.seed) for run in at)
            arms.append(ReplayArms(ratio, (*(without[key] for key in none), *at)))
    return tuple(arms)


def _key(
    matrix: ForgettingMatrix,
    split: TaskSplit,
    flips: ForgettingMatrix | None,
    side: SideInformation | None,
    settings: ReproductionSettings,
) -> str:
    """Hash all that the parts depend on."""
    sha = hashlib.sha256()
    arrays: list[np.ndarray] = [matrix.values] + ([] if flips is None else [flips.values])
    named: list[Sequence[str]] = [matrix.tasks, matrix.sources] + ([] if flips is None else [flips.sources])
    if side is not None:
        named += [list(side.similarities), list(side.notes)]
        arrays += list(side.similarities.values())
        arrays += [] if side.facts is None else [side.facts]
        arrays += [] if side.vectors is None else [side.vectors.tasks, side.vectors.examples]
    texts = [forgetcast.__version__, plain(split), plain(settings), [list(names) for names in named]]
    sha.update(json.dumps(texts, sort_keys=True).encode())
    for array in arrays:
        sha.update(f"{array.shape} {array.dtype}".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()
