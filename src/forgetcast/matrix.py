"""The forgetting matrix in memory: tasks by examples, in nats per token; positive is forgotten, NaN is not measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from forgetcast._files import read_json
from forgetcast.errors import DataError, MismatchError
from forgetcast.pool import Pool
from forgetcast.scores import Scores


class ForgettingMatrix:
    """How much worse each example is predicted after each fine-tune than before it.

    Parameters
    ----------
    values : array-like, shape (M, N)
        Loss after minus loss before, one row a task. NaN where it was not measured. Kept as float32.
    tasks : sequence of str, length M, optional
        Unique names; default "0", "1", ...
    examples : sequence of str, length N, optional
        Unique ids; default "0", "1", ...
    sources : sequence of str, length N, optional
        Where each example is from; default '' for all.
    pool_fingerprint : str, optional
        Fingerprint of the pool that the columns belong to.

    Raises
    ------
    DataError
        If `values` is not a matrix of numbers, holds an infinity, or a name is missing or repeats.
    """

    def __init__(
        self,
        values: Any,
        *,
        tasks: Sequence[str] | None = None,
        examples: Sequence[str] | None = None,
        sources: Sequence[str] | None = None,
        pool_fingerprint: str | None = None,
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
        if np.isinf(array).any():
            row, column = np.argwhere(np.isinf(array))[0]
            raise DataError(f"the forgetting of {self.examples[column]!r} after {self.tasks[row]!r} is infinite")

    @classmethod
    def load(cls, path: str | Path) -> ForgettingMatrix:
        """Read a matrix of numbers: `.npy`, or `.json` with a list of rows (null is NaN), alone or under the key "arr".

        Raises
        ------
        DataError
            If the file cannot be read or holds something else.
        """
        path = Path(path)
        if path.suffix == ".npy":
            try:
                return cls(np.load(path, allow_pickle=False))
            except (OSError, ValueError) as error:
                raise DataError(f"{path} is not a readable .npy file of numbers: {error}") from None
        if path.suffix != ".json":
            raise DataError(f"{path}: a matrix is read from .npy, .json, or an atlas's directory")
        content = read_json(path)
        try:
            return cls(content["arr"] if isinstance(content, dict) else content)
        except (DataError, KeyError) as error:
            raise DataError(f"{path}: a list of rows of the same length is needed: {error}") from None

    @classmethod
    def from_scores(cls, before: Scores, after: dict[str, Scores], *, pool: Pool | None = None) -> ForgettingMatrix:
        """Make the matrix from score files: one before, and one after each task.

        Raises
        ------
        MismatchError
            If a score file is of another pool, or lacks an example.
        """
        for name, scores in after.items():
            if scores.pool_fingerprint != before.pool_fingerprint:
                raise MismatchError(f"the scores after {name!r} are of another pool than the scores before")
        values = [
            scores.at(before.ids, where=f"the scores after {name!r}") - before.nll for name, scores in after.items()
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
        """Tasks and examples (M, N)."""
        return self.values.shape[0], self.values.shape[1]

    @property
    def observed(self) -> np.ndarray:
        """Where the matrix was measured, shape (M, N) of bool."""
        return ~np.isnan(self.values)

    def __repr__(self) -> str:
        """Size and share measured."""
        return (
            f"ForgettingMatrix({self.shape[0]} tasks x {self.shape[1]} examples, {self.observed.mean():.0%} measured)"
        )

    def check_pool(self, pool: Pool) -> None:
        """Raise MismatchError if the columns belong to a pool with another fingerprint."""
        check_fingerprint("the forgetting matrix", self.pool_fingerprint, pool)

    def select(self, tasks: Iterable[str] | None = None, examples: Iterable[str] | None = None) -> ForgettingMatrix:
        """Rows and columns with these names, in the order given; None keeps all.

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
            # A part of the pool is another pool; only a choice of rows leaves the columns what they were.
            pool_fingerprint=self.pool_fingerprint if examples is None else None,
        )


def check_fingerprint(what: str, fingerprint: str | None, pool: Pool) -> None:
    """Raise MismatchError if `fingerprint` is known and is not the pool's."""
    if fingerprint is not None and fingerprint != pool.fingerprint:
        raise MismatchError(
            f"{what} belongs to another pool (fingerprint {fingerprint[:12]}, this one has {pool.fingerprint[:12]}); "
            "use the pool that was scored"
        )


def _names(names: Sequence[str] | None, count: int, kind: str) -> tuple[str, ...]:
    if names is None:
        return tuple(str(i) for i in range(count))
    if len(names) != count:
        raise DataError(f"the matrix has {count} {kind}s, but {len(names)} names are given")
    if len(set(names)) != count:
        repeated = next(name for name in names if list(names).count(name) > 1)
        raise DataError(f"the {kind} {repeated!r} occurs twice")
    return tuple(names)


def _positions(names: Sequence[str], wanted: Iterable[str] | None, kind: str) -> list[int]:
    if wanted is None:
        return list(range(len(names)))
    index = {name: i for i, name in enumerate(names)}
    try:
        return [index[name] for name in wanted]
    except KeyError as error:
        raise MismatchError(f"the matrix has no {kind} {error.args[0]!r}") from None
