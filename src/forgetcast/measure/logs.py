"""What the logs of other evaluation tools have in common: files of runs, and the table that becomes scores."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from forgetcast.data.pool import Example, Pool
from forgetcast.errors import DataError
from forgetcast.measure.scores import Scores


@dataclass(frozen=True)
class LogFile:
    """A file of one task. Names of runs sort by time; the model is whatever tells models apart in a folder."""

    path: Path
    task: str
    model: str
    run: str


def one_run(path: Path, files: Sequence[LogFile]) -> tuple[list[LogFile], str | None]:
    """Return the files of one run of one model, and a sentence about earlier runs, which are not read.

    Runs of different tasks are read together.

    Raises
    ------
    DataError
        If there are several models, or the newest run lacks a task of an earlier one.
    """
    models = sorted({file.model for file in files})
    if len(models) > 1:
        raise DataError(f"{path} has logs of several models: {_listed(models)}; give the folder or the file of one")
    if len({file.task for file in files}) == len(files):
        return list(files), None
    runs: dict[str, Counter[str]] = {}
    for file in files:
        runs.setdefault(file.run, Counter())[file.task] += 1
    newest = max(runs)
    if set(runs[newest]) != {file.task for file in files} or max(runs[newest].values()) > 1:
        listed = _listed([f"{run} ({', '.join(sorted(tasks.elements()))})" for run, tasks in sorted(runs.items())])
        raise DataError(
            f"{path} has several runs, and the newest does not have every task once: {listed}; "
            "give a file, or a folder with one run"
        )
    return [file for file in files if file.run == newest], f"read the newest of {len(runs)} runs, {newest}"


def _listed(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def digest_of(value: Any) -> str:
    """Return a hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclass
class LogTable:
    """Rows by id, which `scores` turns into scores with their tasks, and `pool` into what was asked."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def scores(self, path: Path, metadata: Mapping[str, Any]) -> tuple[Scores, tuple[str, ...]]:
        """Return scores and the task of each; fields of a row: task, nll, reason, exact_match, digest.

        Raises
        ------
        DataError
            If there are no rows.
        """
        if not self.rows:
            raise DataError(f"{path} has no samples")
        rows = list(self.rows.values())
        scores = Scores(
            ids=tuple(self.rows),
            nll=np.array([row["nll"] for row in rows]),
            tokens=np.zeros(len(rows), dtype=int),
            truncated=np.zeros(len(rows), dtype=bool),
            reasons=[row["reason"] for row in rows],
            exact_match=np.array([row["exact_match"] for row in rows]),
            digests=[row["digest"] for row in rows] if any(row["digest"] for row in rows) else None,
            metadata={**metadata, "notes": self.notes},
        )
        return scores, tuple(row["task"] for row in rows)

    def pool(self, path: Path) -> Pool:
        """Return what was asked in the rows that say it; their source is the task.

        Raises
        ------
        DataError
            If no row says it.
        """
        return Pool(
            (Example(id_, source=row["task"], **row["asked"]) for id_, row in self.rows.items() if row["asked"]),
            where=str(path),
        )
