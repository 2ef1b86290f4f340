"""A study of similarities: what they correlate with, and what they forecast beside completion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from forgetcast.atlas.matrix import ForgettingMatrix
from forgetcast.completion.benchmark import BenchRow
from forgetcast.data.pool import Pool
from forgetcast.errors import DataError, MismatchError
from forgetcast.results import Result
from forgetcast.similarity.signals import SIMILARITIES, Material, compute_similarities
from forgetcast.similarity.statistics import Association, associate
from forgetcast.similarity.trained import SideInformation
from forgetcast.stats import mean_interval

REFERENCE = "bayesian"


@dataclass(frozen=True)
class Versus:
    """An arm against completion with as many chosen probes, paired by task.

    Attributes
    ----------
    arm, reference : str
    k : int
        Probes that each has; an arm that uses none has the same figures for all.
    rmse, spearman : float
        Means over tasks, of the arm; None where its forecast is constant.
    rmse_difference, rmse_lower, rmse_upper : float
        Arm minus reference, with its 95 % interval over tasks; positive: completion is better. The ends are None with
        a single task.
    spearman_difference, spearman_lower, spearman_upper : float
        The same of the rank correlation; negative: completion is better.
    """

    arm: str
    reference: str
    k: int
    rmse: float
    spearman: float | None
    rmse_difference: float
    rmse_lower: float | None
    rmse_upper: float | None
    spearman_difference: float | None
    spearman_lower: float | None
    spearman_upper: float | None

    def verdict(self) -> str:
        """Say which is better in RMSE and in rank correlation, where the interval excludes zero."""
        parts = []
        for what, lower, upper, sign in (
            ("RMSE", self.rmse_lower, self.rmse_upper, 1),
            ("rank correlation", self.spearman_lower, self.spearman_upper, -1),
        ):
            if lower is None or upper is None:
                parts.append(f"{what}: unknown")
            elif lower <= 0 <= upper:
                parts.append(f"{what}: no difference shown")
            else:
                parts.append(f"{what}: {self.reference if lower * sign > 0 else self.arm}")
        return "; ".join(parts)


@dataclass(frozen=True)
class SimilarityStudy(Result):
    """Result of `bench --similarity`.

    Attributes
    ----------
    tasks, examples : int
    sample : int
        At most so many examples, drawn at random, stood for a task.
    associations : tuple of Association
    versus : tuple of Versus
        Empty where nothing was forecast.
    notes : tuple of str
        What was cut.
    """

    kind: ClassVar[str] = "similarity study"

    tasks: int
    examples: int
    sample: int
    associations: tuple[Association, ...]
    versus: tuple[Versus, ...] = ()
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"SimilarityStudy({self.tasks} tasks x {self.examples} examples, {len(self.associations)} similarities)"

    @property
    def winners(self) -> tuple[str, ...]:
        """Similarity baselines that completion does not beat clearly in both figures; joined arms are none."""
        return tuple(
            each.arm
            for each in self.versus
            if each.reference != each.arm and not each.arm.startswith(f"{each.reference}+") and not _beaten(each)
        )


def _beaten(each: Versus) -> bool:
    worse = each.rmse_lower is not None and each.rmse_lower > 0
    # A constant forecast ranks nothing.
    return worse and (each.spearman_difference is None or (each.spearman_upper or 0.0) < 0)


def compare_arms(rows: Sequence[BenchRow], *, reference: str = REFERENCE) -> tuple[Versus, ...]:
    """Compare the arms of `bench` with a completion method, paired by task, each with chosen probes.

    Raises
    ------
    DataError
        If the reference is not among the rows.
    """
    of = {(row.method, row.k): row for row in rows if row.probes == "chosen"}
    found = []
    for (arm, k), row in of.items():
        if (reference, k) not in of:
            raise DataError(f"the reference {reference!r} is not among the methods")
        other = of[reference, k]
        if arm == reference:
            continue
        rmse = mean_interval(np.subtract(row.rmse_by_task, other.rmse_by_task))
        ranks = np.subtract(row.spearman_by_task, other.spearman_by_task)
        ranks = ranks[~np.isnan(ranks)]
        spearman = mean_interval(ranks) if len(ranks) else None
        found.append(
            Versus(
                arm,
                reference,
                k,
                float(np.mean(row.rmse_by_task)),
                float(np.nanmean(row.spearman_by_task)) if len(ranks) else None,
                rmse.mean,
                rmse.lower,
                rmse.upper,
                spearman.mean if spearman else None,
                spearman.lower if spearman else None,
                spearman.upper if spearman else None,
            )
        )
    return tuple(found)


def study(matrix: ForgettingMatrix, side: SideInformation, rows: Sequence[BenchRow]) -> SimilarityStudy:
    """Put together the correlations of similarities and the comparison of what is forecast from them."""
    return SimilarityStudy(
        tasks=matrix.shape[0],
        examples=matrix.shape[1],
        sample=side.sample,
        associations=tuple(associate(matrix, side.similarities)),
        versus=compare_arms(rows),
        notes=side.notes,
    )


def gather(matrix: ForgettingMatrix, material: Material, names: Sequence[str]) -> SideInformation:
    """Compute similarities and facts of the tasks and examples of a matrix, in its order.

    Representations are the base model's hidden states, else sentence embeddings, of those that the names ask for.

    Raises
    ------
    MismatchError
        If the material's pool is another one, or lacks a task of the matrix.
    ConfigError, DataError
        As `compute_similarities`.
    """
    matrix.check_pool(material.pool)
    if tuple(material.tasks) != matrix.tasks:
        raise MismatchError("the tasks of the similarities and of the matrix differ; use `tasks_of`")
    similarities = compute_similarities(names, material)
    vectors = None
    if "hidden" in similarities:
        vectors = material.hidden
    elif "embedding" in similarities:
        vectors = material.embeddings
    columns = material.pool.positions(matrix.examples)
    sources = np.array(material.pool.sources)
    facts = [np.log([len(example.full_text) for example in material.pool])]
    if material.losses is not None:
        facts.append(np.asarray(material.losses, dtype=np.float64))
    facts += [(sources == name).astype(np.float64) for name in sorted(set(material.pool.sources))[1:]]
    return SideInformation(
        matrix.tasks,
        {name: values[:, columns] for name, values in similarities.items()},
        None if vectors is None else vectors._replace(examples=vectors.examples[columns]),
        np.column_stack(facts)[columns],
        material.sample,
        tuple(material.notes),
    )


def tasks_of(matrix: ForgettingMatrix, tasks: dict[str, Pool], *, where: str = "the tasks") -> dict[str, Pool]:
    """Return the data of each of the matrix's tasks, in its order.

    Raises
    ------
    MismatchError
        If there is none for a task.
    """
    if missing := [name for name in matrix.tasks if name not in tasks]:
        others = f", and of {len(missing) - 1} more" if len(missing) > 1 else ""
        raise MismatchError(
            f"{where}: there is no file of the task {missing[0]!r}{others}; a task's file has its name, such as "
            f"{missing[0]}.jsonl"
        )
    return {name: tasks[name] for name in matrix.tasks}


def names_of(text: str) -> list[str]:
    """Parse "tfidf,hidden"; "all" is every similarity that is known before a fine-tune.

    Raises
    ------
    DataError
        If there is no name.
    """
    before = [name for name, each in SIMILARITIES.items() if "tuned" not in each.needs]
    names = before if text.strip() == "all" else [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise DataError(f"--similarity names none of {', '.join(SIMILARITIES)}")
    return names
