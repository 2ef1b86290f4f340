"""The outcome of one fine-tune, with or without replay, and the metrics that outcomes are compared on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict

METRICS: Mapping[str, str] = {
    "mean": "mean forgetting",
    "worst_tenth": "worst tenth",
    "earlier_tasks": "earlier tasks",
    "new_task_loss": "new-task loss",
    "worst_hundredth": "worst hundredth",
    "lost_answers": "share of answers lost",
}
"""Every metric that arms are compared on, with its label; lower is better for each.

All are nats per token, but for the share of lost answers, whose label says so.
"""

ANSWERS = "lost_answers"
"""The metric by exact match."""

NATS = "nats per token"
"""Unit of all metrics but that of `ANSWERS`."""

PARTS: Mapping[str, int] = {"worst_tenth": 10, "worst_hundredth": 100}
"""Metrics that are the mean of a part of the judged examples: it takes so many to be one example."""

LAW_METRICS = ("mean", "worst_tenth")
"""Metrics that the law of ratios is fitted to."""


def unit_of(metrics: Iterable[str]) -> str:
    """Return the unit of figures of some metrics, as titles say it."""
    return f"{NATS}; answers: a share" if ANSWERS in metrics else NATS


@dataclass(frozen=True)
class Run:
    """One fine-tune, judged.

    Attributes
    ----------
    task, arm : str
    seed : int
    mean, worst_tenth : float
        Forgetting of the judged upstream examples, nats per token: all of them, and the most forgotten tenth.
    new_task_loss : float
        Mean loss on examples of the task that were not trained on, nats per target token.
    replayed, steps : int
    seconds : float
        Wall time of the training, and of choosing alpha.
    worst_hundredth : float or None
        As `worst_tenth`; None in files of earlier versions.
    right_to_wrong : int or None
        Judged examples that the base model answered right and the tuned one wrong; None without exact match.
    right_before : int or None
        Judged examples that the base model answered right and the tuned one answered at all; None without exact match
        and in files of earlier versions.
    strategy : str or None
        That of the replay plan, followed by "online" where the plan was revised during training; None in files of
        earlier versions, as the following.
    ratio : float or None
        Replayed examples per new one, as the plan asks for.
    setup : str or None
        Hash of what the runs of a comparison share: base model, data, judged examples, recipe without its seed.
    achieved_ratio : float or None
        Replayed examples per new one, as whole batches made it; None in files of earlier versions.
    trained_tokens : int or None
        Tokens that were trained on, without padding; None in files of earlier versions, as the following.
    generated_tokens : int or None
        Tokens of the texts that the model wrote for replay; those that a filter dropped are not counted.
    scored_tokens : int or None
        Tokens that were predicted to choose alpha; those of probes for a forecast are not known here.
    alpha : float or None
        Of an interpolation.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)  # of a file

    task: str
    arm: str
    seed: int
    mean: float
    worst_tenth: float
    new_task_loss: float
    replayed: int
    steps: int
    seconds: float
    worst_hundredth: float | None = None
    right_to_wrong: int | None = None
    strategy: str | None = None
    ratio: float | None = None
    setup: str | None = None
    achieved_ratio: float | None = None
    trained_tokens: int | None = None
    generated_tokens: int | None = None
    scored_tokens: int | None = None
    alpha: float | None = None
    right_before: int | None = None

    @property
    def lost_answers(self) -> float | None:
        """Share of the right answers that became wrong; None where it is not known, or no answer was right before."""
        if self.right_to_wrong is None or not self.right_before:
            return None
        return self.right_to_wrong / self.right_before
