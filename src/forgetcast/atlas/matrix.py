"""The forgetting matrix in memory: tasks by examples, in nats per token; positive is forgotten, NaN is not measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from forgetcast.atlas.released import read_matrix
from forgetcast.data.ids import ExampleIndex
from forgetcast.data.pool import Pool
from forgetcast.errors import DataError, MismatchError
from forgetcast.measure.scores import Scores, forgetting


class ForgettingMatrix:
    """How much the loss of each example rises in each fine-tune.

    Parameters
    ----------
    values : array-like, shape (M, N)
        Loss after minus loss before, one row per task. NaN where not measured. Stored as float32.
    tasks : sequence of str, length M, optional
        Unique names; default "0", "1", ...
    examples : sequence of str, length N, optional
        Unique ids; default "0", "1", ...
    sources : sequence of str, length N, optional
        Label of each example's origin; default '' for all.
    pool_fingerprint : str, optional
        Fingerprint of the pool of the columns.
    groups : sequence of str, length M, optional
        Name that rows of one task or run share, such as those of several seeds: they say much about one another, so
        what is judged on left-out tasks leaves out all rows of a group. Default: `tasks`; each row is a group.

    Raises
    ------
    DataError
        If `values` is not a matrix of numbers or has an infinity, or a name is missing or occurs twice.
    """

    def __init__(
        self,
        values: Any,
        *,
        tasks: Sequence[str] | None = None,
        examples: Sequence[str] | None = None,
        sources: Sequence[str] | None = None,
        pool_fingerprint: str | None = None,
        groups: Sequence[str] | None = None,
    ) -> None:
        try:
            array = np.array(values, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise DataError(f"a forgetting matrix needs numbers: {error}") from None
        if array.ndim != 2:
            raise DataError(f"a forgetting matrix has two dimensions (tasks, examples), not {array.ndim}")
        self.values = array
        self.tasks = _names(tasks, array.shape[0], "task")
        self.examples = _names(examples, array.shape[1], "example")
        self.sources = tuple(sources) if sources is not None else ("",) * array.shape[1]
        self.pool_fingerprint = pool_fingerprint
        if len(self.sources) != array.shape[1]:
            raise DataError(f"{array.shape[1]} examples but {len(self.sources)} sources")
        self.groups = tuple(groups) if groups is not None else self.tasks
        if len(self.groups) != array.shape[0]:
            raise DataError(f"{array.shape[0]} tasks but {len(self.groups)} groups")
        if np.isinf(array).any():
            row, column = np.argwhere(np.isinf(array))[0]
            raise DataError(f"the forgetting of {self.examples[column]!r} after {self.tasks[row]!r} is infinite")

    @classmethod
    def load(cls, path: str | Path) -> ForgettingMatrix:
        """Read a matrix of numbers, and the names of its rows and columns where the file has them.

        Parameters
        ----------
        path : path
            `.npy`; `.json` with a list of rows (null is NaN), alone or under the key "arr"; and the files of the
            paper's released statistics: `.npy` with a `.npy.meta` beside it, `.pkl` with a split (the training rows,
            then the test rows; nothing in the pickle is run), and the project page's `.json`. In these, the values
            that stand for "not measured" become NaN.

        Raises
        ------
        DataError
            If the file cannot be read or is something else, or a pickle has more than numbers and names.
        """
        path = Path(path)
        try:
            return cls(**read_matrix(path))
        except DataError as error:
            raise DataError(str(error) if str(path) in str(error) else f"{path}: {error}") from None

    @classmethod
    def from_scores(cls, before: Scores, after: dict[str, Scores], *, pool: Pool | None = None) -> ForgettingMatrix:
        """Make the matrix from the scores before, and those after each task.

        Raises
        ------
        MismatchError
            If scores are of another pool, or lack an example.
        """
        for name, scores in after.items():
            if scores.pool_fingerprint != before.pool_fingerprint:
                raise MismatchError(f"the scores after {name!r} are of another pool than the scores before")
        values = [
            forgetting(before, scores.subset(before.ids, where=f"the scores after {name!r}"))
            for name, scores in after.items()
        ]
        matrix = cls(
            np.reshape(values, (len(after), len(before))),
            tasks=list(after),
            examples=before.ids,
            sources=pool.subset(before.ids).sources if pool is not None else None,
            pool_fingerprint=before.pool_fingerprint,
        )
        if pool is not None:
            matrix.check_pool(pool)
        return matrix

    @property
    def shape(self) -> tuple[int, int]:
        """Number of tasks and of examples (M, N)."""
        return self.values.shape[0], self.values.shape[1]

    @property
    def observed(self) -> np.ndarray:
        """Mask of the measured entries, shape (M, N) of bool."""
        return ~np.isnan(self.values)

    def __repr__(self) -> str:
        """Size and fraction measured."""
        return (
            f"ForgettingMatrix({self.shape[0]} tasks x {self.shape[1]} examples, {self.observed.mean():.0%} measured)"
        )

    def check_pool(self, pool: Pool) -> None:
        """Raise MismatchError if the columns are of a pool with another fingerprint."""
        check_fingerprint("the forgetting matrix", self.pool_fingerprint, pool)

    def select(self, tasks: Iterable[str] | None = None, examples: Iterable[str] | None = None) -> ForgettingMatrix:
        """Return the rows and columns with these names, in the given order; None keeps all.

        Raises
        ------
        MismatchError
            If a name is unknown.
        """
        rows = _positions(self.tasks, tasks, "task")
        columns = _positions(self.examples, examples, "example")
        return ForgettingMatrix(
            self.values[np.ix_(rows, columns)],
            tasks=[self.tasks[i] for i in rows],
            examples=[self.examples[j] for j in columns],
            sources=[self.sources[j] for j in columns],
            # A part of the pool is another pool.
            pool_fingerprint=self.pool_fingerprint if examples is None else None,
            groups=[self.groups[i] for i in rows],
        )


def check_fingerprint(what: str, fingerprint: str | None, pool: Pool) -> None:
    """Raise MismatchError if `fingerprint` is given and is not the pool's."""
    if fingerprint is not None and fingerprint != pool.fingerprint:
        raise MismatchError(
            f"{what} belongs to another pool (fingerprint {fingerprint[:12]}, this one has {pool.fingerprint[:12]}); "
            "use the pool that was scored"
        )


def _names(names: Sequence[str] | None, count: int, axis: str) -> tuple[str, ...]:
    if names is None:
        return tuple(str(i) for i in range(count))
    if len(names) != count:
        raise DataError(f"the matrix has {count} {axis}s, but {len(names)} names are given")
    if len(set(names)) != count:
        repeated = next(name for name in names if list(names).count(name) > 1)
        raise DataError(f"the {axis} {repeated!r} occurs twice")
    return tuple(names)


def _positions(names: Sequence[str], wanted: Iterable[str] | None, axis: str) -> list[int]:
    if wanted is None:
        return list(range(len(names)))
    wanted = list(wanted)
    positions: list[int] = ExampleIndex(names).find(wanted).tolist()
    if -1 in positions:
        raise MismatchError(f"the matrix has no {axis} {wanted[positions.index(-1)]!r}")
    return positions
