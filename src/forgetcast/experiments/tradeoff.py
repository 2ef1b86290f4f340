"""Arms at equal new-task loss: what each costs and saves against no replay, and the simplest that is good enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from forgetcast.replay.outcome import ANSWERS, LAW_METRICS, METRICS
from forgetcast.results import Result

if TYPE_CHECKING:
    from forgetcast.experiments.verify import Verification
    from forgetcast.stats import Comparison

COSTS = {
    "trained_tokens": "trained",
    "generated_tokens": "generated",
    "scored_tokens": "scored to choose",
    "seconds": "seconds",
}
"""What a run costs, with its label: tokens, and the wall time of training and choosing."""


class Estimate(NamedTuple):
    """A mean difference to the arm without replay; the ends are None where there is one task with one seed."""

    mean: float
    lower: float | None
    upper: float | None


@dataclass(frozen=True)
class Tradeoff:
    """An arm against no replay, paired by task and seed.

    Attributes
    ----------
    arm : str
    new_task_loss, mean, worst_tenth : Estimate
        Differences in nats per token, with the intervals of `Comparison.difference`: 95 % after Holm's correction.
    lost_answers : Estimate or None
        Likewise, of the share of answers lost; None without exact match.
    equal : bool or None
        Whether the interval of the new-task loss shows that it is at most the margin higher; None where there is none.
    on_front : bool
        Whether no other arm has both a lower new-task loss and lower mean forgetting, by the estimates.
    cost : dict of str to float or None
        Averages of `COSTS`; None where a run does not say.
    """

    arm: str
    new_task_loss: Estimate
    mean: Estimate
    worst_tenth: Estimate
    equal: bool | None
    on_front: bool
    cost: dict[str, float | None] = field(default_factory=dict)
    lost_answers: Estimate | None = None


@dataclass(frozen=True)
class RecipeAdvice(Result):
    """What a verification says to do.

    Attributes
    ----------
    arm : str or None
        The simplest arm at equal new-task loss that is not shown to forget more than the best; None where nothing can
        be shown.
    best : str or None
        The arm of least mean forgetting among those at equal new-task loss.
    sentences : tuple of str
    """

    kind: ClassVar[str] = "advice on the recipe"

    arm: str | None
    best: str | None
    sentences: tuple[str, ...]


def tradeoffs(result: Verification) -> tuple[Tradeoff, ...]:
    """Return every arm's place, in the order of the arms; that without replay is the origin."""
    if "none" not in result.arms:
        return ()
    shown = ("new_task_loss", *_forgotten(result))
    places = {arm: {metric: _estimate(result, arm, metric) for metric in shown} for arm in result.arms}
    found = []
    for arm, place in places.items():
        loss, forgetting = place["new_task_loss"], place["mean"]
        dominated = any(
            x <= loss.mean and y <= forgetting.mean and (x, y) != (loss.mean, forgetting.mean)
            for x, y in ((other["new_task_loss"].mean, other["mean"].mean) for other in places.values())
        )
        equal = True if arm == "none" else None if loss.upper is None else loss.upper <= result.margin
        tail, answers = place["worst_tenth"], place.get(ANSWERS)
        found.append(Tradeoff(arm, loss, forgetting, tail, equal, not dominated, _cost(result, arm), answers))
    return tuple(found)


def _forgotten(result: Verification) -> tuple[str, ...]:
    """Return the metrics by which an arm forgets more than another."""
    return (*LAW_METRICS, *([ANSWERS] if ANSWERS in result.metrics else []))


def _estimate(result: Verification, arm: str, metric: str) -> Estimate:
    if arm == "none":
        return Estimate(0.0, 0.0, 0.0)
    if (found := result.compare(arm, "none", metric)) is not None:
        return Estimate(found.difference.mean, found.difference.lower, found.difference.upper)
    return Estimate(result.average(arm, metric) - result.average("none", metric), None, None)


def _cost(result: Verification, arm: str) -> dict[str, float | None]:
    """Average the costs of an arm's runs; None where a run of an earlier version does not say."""
    values = {name: [getattr(run, name) for run in result.runs if run.arm == arm] for name in COSTS}
    return {name: None if None in each else sum(each) / len(each) for name, each in values.items()}


def recipe_advice(result: Verification) -> RecipeAdvice:
    """Advise an arm: the simplest that is not shown to be worse than the best, at equal new-task loss.

    Arms come in the order of the verification, the simplest first. Those that know what was forgotten, and the control
    with more new examples, are left out. One test decides, as for all verdicts: Student's t after Holm's correction, on
    the mean, on the worst tenth and, where the models answered, on the share of answers lost.
    """
    candidates = [each for each in tradeoffs(result) if not {"truth", "padding"} & set(each.arm.split())]
    if len(candidates) < 2 or all(each.equal is None for each in candidates if each.arm != "none"):
        return RecipeAdvice(None, None, ("One task with one seed shows nothing: no arm is advised.",))
    equal = [each for each in candidates if each.equal]
    unequal = [each.arm for each in candidates if not each.equal]
    best = min(equal, key=lambda each: each.mean.mean)
    lines = [
        f"At equal new-task loss, shown to be at most {result.margin:g} nats above that without replay: "
        f"{', '.join(each.arm for each in equal if each.arm != 'none') or 'no arm'}."
        + (f" Not shown: {', '.join(unequal)}." if unequal else "")
    ]
    chosen = next(each for each in equal if not _shown_worse(result, each.arm, best.arm))
    simpler = [each.arm for each in equal[: equal.index(chosen)]]
    if len(equal) == 1:
        lines.append(f"Advice: {_what(chosen.arm)}, because no arm is shown to learn the new task as well.")
    elif chosen.arm == best.arm:
        lines.append(
            f"Advice: {_what(chosen.arm)}, which forgets least there"
            + (f"; what is simpler is shown to forget more ({', '.join(simpler)})." if simpler else ".")
        )
    else:
        apart = [result.compare(chosen.arm, best.arm, metric) for metric in _forgotten(result)]
        lines.append(
            f"Advice: {_what(chosen.arm)}. By the estimates {best.arm} forgets least, but {_what(chosen.arm)} is "
            f"simpler, and not shown to forget more: {_differences(apart)}."
        )
        lines.append(f"This is as much as {_units(result)} can show: a difference within these intervals may be there.")
    return RecipeAdvice(chosen.arm, best.arm, tuple(lines))


def _what(arm: str) -> str:
    return "no replay" if arm == "none" else arm


def _shown_worse(result: Verification, arm: str, best: str) -> bool:
    if arm == best:
        return False
    found = (result.compare(arm, best, metric) for metric in _forgotten(result))
    return any(each is not None and each.worse for each in found)


def _differences(comparisons: Sequence[Comparison | None]) -> str:
    return ", ".join(
        f"{METRICS[c.metric]} {c.difference.mean:+.4f} ({c.difference.lower:+.4f} to {c.difference.upper:+.4f})"
        for c in comparisons
        if c is not None
    )


def _units(result: Verification) -> str:
    tasks = len({run.task for run in result.runs})
    seeds = len({run.seed for run in result.runs})
    return f"{tasks} tasks" if tasks > 1 else f"{seeds} seeds of one task"
