"""Replay that is decided during training: what comes next is chosen by the model as it is then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from forgetcast import probes
from forgetcast.atlas import Atlas
from forgetcast.completion import Bayesian, Forecast
from forgetcast.completion.gaussian import LinearGaussian
from forgetcast.coverage import correlation_loadings
from forgetcast.errors import ConfigError
from forgetcast.lm.load import LanguageModel
from forgetcast.lm.score import losses
from forgetcast.matrix import check_fingerprint
from forgetcast.pool import Pool
from forgetcast.replay import STRATEGIES, ReplayPlan, make_plan

if TYPE_CHECKING:
    from forgetcast.lm.replay import ReplayMixture


class Chooser(Protocol):
    """Decides during training what is replayed next; it is given to a `ReplayCallback` or to `Workbench.tune`."""

    def settings(self) -> dict[str, Any]:
        """What the choice depends on beside the plan and the model, as plain values."""
        ...

    def check(self, mixture: ReplayMixture) -> None:
        """Raise ConfigError or MismatchError if it cannot choose for this mixture."""
        ...

    def due(self, step: int, mixture: ReplayMixture) -> bool:
        """Whether to choose now, after so many steps. What is chosen can be replayed from the step after the next."""
        ...

    def choose(self, language_model: LanguageModel, mixture: ReplayMixture, replayed: Sequence[str]) -> Sequence[str]:
        """Ids to replay next, first things first, of the mixture's plan; `replayed` are those that were already."""
        ...


@dataclass(frozen=True)
class Online:
    """Forecast anew from probes of the model in training, and make the rest of the plan by that.

    Probes that were replayed meanwhile say nothing of the others any more: they are left out.

    Parameters
    ----------
    model : Completion
        Fitted to the atlas.
    pool : Pool
    before : array, shape (N,)
        Losses of the base model, nats per token.
    probes : array of int, shape (k,)
        Columns of the probes.
    at : sequence of float
        Shares of all steps, each in (0, 1), after which to do it.
    max_length : int, optional
        Longest input that the base model was scored with; default: its context.
    temperature : float, optional
        As in `make_plan`.
    """

    model: LinearGaussian
    pool: Pool
    before: np.ndarray
    probes: np.ndarray
    at: Sequence[float] = (0.25,)
    max_length: int | None = None
    temperature: float | None = None

    def __post_init__(self) -> None:
        """Check the shares of the steps."""
        for share in self.at:
            if not 0 < share < 1:
                raise ConfigError(f"online replay is decided after a share of the steps between 0 and 1, not {share}")

    @classmethod
    def of(cls, atlas: Atlas, plan: ReplayPlan, *, k: int = 30, at: Sequence[float] = (0.25,)) -> Online:
        """Fit `Bayesian` to an atlas, and choose k probes among the examples that a plan may replay."""
        model = Bayesian().fit(atlas)
        usable = np.flatnonzero((plan.weights > 0) & ~np.isnan(atlas.nll_before))
        chosen = probes.choose(model, min(k, len(usable)), usable)
        return cls(model, atlas.pool, atlas.nll_before, chosen, at, atlas.before.metadata.get("max_length"))

    def settings(self) -> dict[str, Any]:
        """As in `Chooser`."""
        return {
            "at": [float(share) for share in self.at],
            "probes": [self.pool.ids[i] for i in self.probes.tolist()],
            "temperature": self.temperature,
        }

    def check(self, mixture: ReplayMixture) -> None:
        """As in `Chooser`."""
        plan = _plan_of(mixture, self.pool)
        if "forecast" not in STRATEGIES[plan.strategy].needs:
            raise ConfigError(
                f"online replay follows a forecast, and the strategy {plan.strategy!r} does not; "
                f"use one of {', '.join(name for name, kind in STRATEGIES.items() if 'forecast' in kind.needs)}"
            )

    def due(self, step: int, mixture: ReplayMixture) -> bool:
        """As in `Chooser`."""
        return step in {max(round(share * mixture.steps), 1) for share in self.at}

    def forecast(self, language_model: LanguageModel, replayed: Sequence[str] = ()) -> Forecast:
        """Forgetting of every example by the model as it is, completed from the probes that were not replayed."""
        gone = set(replayed)
        kept = np.array([i for i in self.probes.tolist() if self.pool.ids[i] not in gone], dtype=np.intp)
        measured = losses(language_model, (self.pool[i] for i in kept.tolist()), self.max_length)
        return self.model.predict(kept, measured - self.before[kept])

    def choose(self, language_model: LanguageModel, mixture: ReplayMixture, replayed: Sequence[str]) -> Sequence[str]:
        """As in `Chooser`."""
        old = _plan_of(mixture, self.pool)
        needs = STRATEGIES[old.strategy].needs
        plan = make_plan(
            self.pool,
            old.strategy,
            old.ratio,
            held_out=old.held_out_ids,
            among=[id_ for id_, weight in zip(old.ids, old.weights, strict=True) if weight],
            forecast=self.forecast(language_model, replayed).mean,
            loadings=correlation_loadings(self.model) if "loadings" in needs else None,
            temperature=self.temperature,
            repeat=old.repeat,
            seed=old.seed,
        )
        return plan.order(len(mixture.replayed) - len(replayed), besides=replayed)


@dataclass(frozen=True)
class MostInterfered:
    """Before every replayed batch, draw candidates at random, and of each few take the one that was forgotten most.

    This is maximally interfered retrieval, by the increase of the loss since the base model. It costs the forward
    passes of the candidates.

    Parameters
    ----------
    pool : Pool
    before : array, shape (N,)
        Losses of the base model, nats per token; what has none is no candidate.
    candidates : int
        Of how many one is taken.
    max_length : int, optional
        Longest input that the base model was scored with; default: its context.

    References
    ----------
    Aljundi et al. (2019), Online continual learning with maximally interfered retrieval.
    """

    pool: Pool
    before: np.ndarray
    candidates: int = 4
    max_length: int | None = None

    def __post_init__(self) -> None:
        """Check the number of candidates."""
        if self.candidates < 2:
            raise ConfigError(f"one of at least 2 candidates can be chosen, not of {self.candidates}")

    def settings(self) -> dict[str, Any]:
        """As in `Chooser`."""
        return {"candidates": self.candidates}

    def check(self, mixture: ReplayMixture) -> None:
        """As in `Chooser`."""
        _plan_of(mixture, self.pool)

    def due(self, step: int, mixture: ReplayMixture) -> bool:
        """As in `Chooser`."""
        return mixture.replays(step + 1)

    def choose(self, language_model: LanguageModel, mixture: ReplayMixture, replayed: Sequence[str]) -> Sequence[str]:
        """As in `Chooser`."""
        plan, gone = _plan_of(mixture, self.pool), set(replayed)
        fresh = [i for i in np.flatnonzero(plan.weights > 0).tolist() if self.pool.ids[i] not in gone]
        fresh = [i for i in fresh if not np.isnan(self.before[i])]
        each = min(self.candidates, len(fresh) // mixture.batch_size)
        if each < 2:  # nearly all were replayed: the plan's own order goes on
            return ()
        # A draw of its own for every batch, and the same one again when a run that was interrupted comes here.
        rng = np.random.default_rng([plan.seed, len(replayed)])
        drawn = rng.choice(fresh, size=(mixture.batch_size, each), replace=False)
        measured = losses(language_model, (self.pool[i] for i in drawn.ravel().tolist()), self.max_length)
        forgotten = measured.reshape(drawn.shape) - self.before[drawn]
        return [self.pool.ids[row[best]] for row, best in zip(drawn, forgotten.argmax(axis=1), strict=True)]


def _plan_of(mixture: ReplayMixture, pool: Pool) -> ReplayPlan:
    """The mixture's plan, checked to be of this pool."""
    if mixture.plan is None or not mixture.replayed:
        raise ConfigError("there is nothing to choose during training: the mixture replays nothing")
    check_fingerprint("the replay plan", mixture.plan.pool_fingerprint, pool)
    return mixture.plan
