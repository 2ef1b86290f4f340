"""Results of learning tasks in sequence, and the comparison of the arms at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from pydantic import ConfigDict

from forgetcast.errors import DataError
from forgetcast.results import Result, plain
from forgetcast.stats import Compared

SEQUENCE_METRICS = ("mean", "worst_tenth", "earlier_tasks", "new_task_loss")
"""The `METRICS` that are compared at the end of a sequence."""


@dataclass(frozen=True)
class Stage:
    """One task of a sequence, learned and judged.

    Attributes
    ----------
    order : int
        Number of the order, from 0; also the seed of its fine-tunes.
    arm : str
    position : int
        Number of tasks learned so far, including this one.
    task : str
    mean, worst_tenth : float
        Forgetting of the judged upstream examples since the base model, nats per token: all of them, and the most
        forgotten tenth.
    losses : mapping of str to float
        Mean loss on the test part of every task learned so far, nats per target token.
    replayed, steps : int
        Replayed examples and optimiser steps of this stage.
    seconds : float
        Wall time of its training.
    replayed_earlier : int
        Of the replayed examples, those of tasks learned before.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)  # of a file

    order: int
    arm: str
    position: int
    task: str
    mean: float
    worst_tenth: float
    losses: Mapping[str, float]
    replayed: int
    steps: int
    seconds: float
    replayed_earlier: int = 0


@dataclass(frozen=True, repr=False)
class SequenceResult(Result, Compared):
    """Stages of all arms and orders.

    Attributes
    ----------
    stages : tuple of Stage
    judged : int
        Number of upstream examples judged after every stage.
    ratio : float
        Replayed examples per new one.
    memory : int
        Training examples of every learned task that later ones could replay.

    Raises
    ------
    DataError
        If the stages of an arm and order are not a complete sequence.
    """

    kind: ClassVar[str] = "sequence"

    stages: tuple[Stage, ...]
    judged: int
    ratio: float
    memory: int = 0

    def __repr__(self) -> str:
        """Return the arms and the length."""
        return f"SequenceResult({self.length} tasks, arms {', '.join(self.arms)}, {self.judged} examples judged)"

    def __post_init__(self) -> None:
        """Check that every sequence is complete."""
        longest = max((stage.position for stage in self.stages), default=0)
        if longest < 2:
            raise DataError("a sequence has at least two stages")
        for (arm, order), chain in self._chains.items():
            where = f"{arm} replay, order {order}"
            if [stage.position for stage in chain] != list(range(1, longest + 1)):
                raise DataError(f"{where}: a stage is missing or duplicated")
            for i, stage in enumerate(chain, 1):
                if set(stage.losses) != (learned := {earlier.task for earlier in chain[:i]}) or len(learned) < i:
                    raise DataError(f"{where}: stage {i} needs the losses of exactly the tasks learned so far")

    @cached_property
    def _chains(self) -> dict[tuple[str, int], list[Stage]]:
        chains: dict[tuple[str, int], list[Stage]] = {}
        for stage in sorted(self.stages, key=lambda stage: stage.position):
            chains.setdefault((stage.arm, stage.order), []).append(stage)
        return chains

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of the arms, in the order they were run."""
        return tuple(dict.fromkeys(stage.arm for stage in self.stages))

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics."""
        return SEQUENCE_METRICS

    @property
    def length(self) -> int:
        """Number of tasks of a sequence."""
        return max(stage.position for stage in self.stages)

    def orders(self, arm: str) -> tuple[int, ...]:
        """Return the orders that an arm was run in."""
        return tuple(sorted(order for name, order in self._chains if name == arm))

    def value(self, arm: str, order: int, metric: str, position: int | None = None) -> float:
        """Compute a metric of one sequence after `position` tasks; default: at its end.

        Parameters
        ----------
        arm : str
        order : int
        metric : str
            'mean' or 'worst_tenth' of the upstream forgetting; 'earlier_tasks': of the tasks learned before the last
            one, the mean loss now minus right after each was learned, positive = forgotten, NaN where there is none;
            'new_task_loss': the mean loss of all tasks so far, each right after it was learned. Nats per token.
        position : int, optional
        """
        stages = self._chains[arm, order][:position]
        then = {stage.task: stage.losses[stage.task] for stage in stages}
        last = stages[-1]
        if metric == "new_task_loss":
            return float(np.mean(list(then.values())))
        if metric == "earlier_tasks":
            lost = [last.losses[task] - loss for task, loss in then.items() if task != last.task]
            return float(np.mean(lost)) if lost else float("nan")
        return float(getattr(last, metric))

    def average(self, arm: str, metric: str, position: int | None = None) -> float:
        """Return the mean of a metric over an arm's orders, as in `value`."""
        return float(np.mean([self.value(arm, order, metric, position) for order in self.orders(arm)]))

    def total(self, arm: str, field: str) -> float:
        """Sum a number of the stages, such as 'replayed', over a sequence; mean over the arm's orders."""
        return sum(getattr(stage, field) for stage in self.stages if stage.arm == arm) / len(self.orders(arm))

    def _differences(self, arm: str, baseline: str, metric: str) -> list[np.ndarray]:
        both = [order for order in self.orders(arm) if (baseline, order) in self._chains]
        return [np.array([self.value(arm, o, metric) - self.value(baseline, o, metric) for o in both])] if both else []

    def as_dict(self) -> dict[str, Any]:
        """Return the stages, each arm's averages and the comparisons, ready for JSON."""

        def averages(arm: str, position: int) -> dict[str, float | None]:
            return {name: plain(self.average(arm, name, position)) for name in self.metrics}

        derived = {
            "arms": {
                arm: averages(arm, self.length)
                | {name: self.total(arm, name) for name in ("replayed", "replayed_earlier", "steps", "seconds")}
                | {"after_each_task": [averages(arm, position) for position in range(1, self.length + 1)]}
                for arm in self.arms
            },
            "comparisons": [comparison.as_dict() for comparison in self.comparisons()],
        }
        return super().as_dict() | derived
