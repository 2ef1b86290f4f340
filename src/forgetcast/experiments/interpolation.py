"""Choose how far to go from a base model to a tuned one: least forgetting at a bounded loss on the new task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import ConfigDict

from forgetcast.data.pool import Pool
from forgetcast.defaults import LOSS_MARGIN
from forgetcast.errors import ConfigError, DataError
from forgetcast.results import Result
from forgetcast.stats import mean_interval

if TYPE_CHECKING:
    from forgetcast.lm import Interpolation
    from forgetcast.measure.scores import Scores

ALPHAS = tuple(i / 10 for i in range(11))
"""Places that are tried, from the base model to the tuned one."""


@dataclass(frozen=True)
class AlphaPoint:
    """A model on the line.

    Attributes
    ----------
    alpha : float
        0 is the base model, 1 the tuned one.
    forgetting : float
        Mean of the probes, nats per token.
    new_task_loss : float
        Mean of the validation examples, nats per target token.
    excess : float or None
        Upper end of the 95 % interval of that minus the tuned model's, paired by example; None for one example.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    alpha: float
    forgetting: float
    new_task_loss: float
    excess: float | None


@dataclass(frozen=True)
class ChosenAlpha(Result):
    """A place on the line from base to tuned model, and what it was chosen by.

    Attributes
    ----------
    alpha : float
    points : tuple of AlphaPoint
        All that were tried.
    margin : float
        Nats by which the loss on the new task may exceed the tuned model's, with 95 % confidence.
    tokens : int
        Tokens that were predicted to choose.
    """

    kind: ClassVar[str] = "choice of alpha"

    alpha: float
    points: tuple[AlphaPoint, ...]
    margin: float
    tokens: int

    def sentence(self) -> str:
        """Say what was chosen, and what it is expected to save and to cost."""
        by_alpha = {point.alpha: point for point in self.points}
        here, tuned = by_alpha[self.alpha], by_alpha[1.0]
        return (
            f"alpha {self.alpha:g}: on the probes it forgets {here.forgetting:+.4f} nats per token (the tuned model "
            f"{tuned.forgetting:+.4f}); its loss on validation examples of the new task is {here.new_task_loss:.4f} "
            f"({tuned.new_task_loss:.4f}; the 95 % interval of the difference had to end by {self.margin:g})"
        )


def choose_alpha(
    interpolation: Interpolation,
    probes: Pool,
    validation: Pool,
    before: Scores | None = None,
    *,
    alphas: Sequence[float] = ALPHAS,
    margin: float = LOSS_MARGIN,
    on_progress: Callable[[int], None] | None = None,
) -> ChosenAlpha:
    """Try places on the line, and choose the one with least forgetting whose loss on the new task is shown to be low.

    It is if the 95 % interval of its difference to the tuned model's, paired by example, ends by the margin. A place
    chosen by the mean alone would use up the margin, and on other examples every second one would exceed it.

    Parameters
    ----------
    interpolation : Interpolation
    probes : Pool
        Upstream examples; none that is to be judged on.
    validation : Pool
        Examples of the new task; none that was trained on, or is to be judged on.
    before : Scores, optional
        Of the base model, with the probes; default: those of alpha 0.
    alphas : sequence of float
        The tuned model, 1, is always tried too, and may always be chosen.
    margin : float
        Nats by which the loss may exceed the tuned model's.
    on_progress : callable, optional
        Called with the number of examples scored since the last call.

    Raises
    ------
    ConfigError
        If the margin is negative, or an alpha out of range.
    DataError
        If the base or the tuned model's loss of all probes, or of all validation examples, is not finite.
    """
    from forgetcast.lm import score
    from forgetcast.measure.scores import forgetting

    if not margin >= 0:
        raise ConfigError(f"the margin on the new-task loss must not be negative, but is {margin:g}")
    settings: dict[str, Any] = {} if before is None else {"max_length": before.metadata.get("max_length")}
    # The tuned model comes first: the others are compared with it.
    tried = sorted({1.0, *alphas} | ({0.0} if before is None else set()), reverse=True)
    scores_of: dict[float, tuple[Scores, Scores]] = {}
    for alpha in tried:
        model = interpolation.at(alpha)
        scores_of[alpha] = (
            score(model, probes, on_progress=on_progress, **settings),
            score(model, validation, on_progress=on_progress),
        )
    before = scores_of[0.0][0] if before is None else before
    tokens = sum(int(scores.tokens.sum()) for pair in scores_of.values() for scores in pair)
    points, tuned = [], scores_of[1.0][1].nll
    for alpha, (upstream, new) in sorted(scores_of.items()):
        change, more = forgetting(before, upstream), new.nll - tuned
        if np.isnan(change).all() or np.isnan(more).all():
            if alpha == 1:
                raise DataError("no probe, or no validation example, has a finite loss with both models")
            continue  # no such place can be chosen
        excess = mean_interval(more[~np.isnan(more)]).upper
        points.append(AlphaPoint(alpha, float(np.nanmean(change)), float(np.nanmean(new.nll)), excess))
    return ChosenAlpha(_best(points, margin), tuple(points), margin, tokens)


def draw_probes(
    ids: Sequence[str], losses: np.ndarray | None, held_out: Iterable[str], count: int, seed: int
) -> list[str]:
    """Draw examples to choose alpha by: at random, among those that are not held out and have a loss.

    Parameters
    ----------
    ids : sequence of str, length N
    losses : array, shape (N,), or None
        Of the base model; NaN where it could not be scored. None: not known.
    held_out : iterable of str
    count : int
        At most so many.
    seed : int

    Raises
    ------
    ConfigError
        If there is none.
    """
    excluded = set(held_out)
    usable = [id_ for i, id_ in enumerate(ids) if id_ not in excluded and (losses is None or not np.isnan(losses[i]))]
    if not usable:
        raise ConfigError("every example of the pool is held out: there is no probe to choose alpha by")
    drawn = np.sort(np.random.default_rng(seed).permutation(len(usable))[:count])
    return [usable[i] for i in drawn.tolist()]


def _best(points: Sequence[AlphaPoint], margin: float) -> float:
    """Return the alpha of least forgetting among those whose loss is low enough; of two alike, the larger."""
    allowed = [p for p in points if p.alpha == 1 or (p.excess is not None and p.excess <= margin)]
    return min(allowed, key=lambda point: (point.forgetting, -point.alpha)).alpha
