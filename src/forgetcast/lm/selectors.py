"""Replay selected during training: the current model decides which examples come next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from forgetcast.atlas.matrix import check_fingerprint
from forgetcast.atlas.store import Atlas
from forgetcast.completion import Bayesian, Forecast, probes
from forgetcast.completion.gaussian import LinearGaussian
from forgetcast.data.pool import Pool
from forgetcast.errors import ConfigError
from forgetcast.lm.load import LanguageModel
from forgetcast.lm.score import losses
from forgetcast.replay.coverage import correlation_loadings
from forgetcast.replay.plan import ReplayPlan, make_plan
from forgetcast.replay.signals import Signals
from forgetcast.replay.strategies import STRATEGIES, get_strategy


class Layout(Protocol):
    """The part of a `ReplayMixture` that a selector uses."""

    plan: ReplayPlan | None
    steps: int
    batch_size: int

    @property
    def replayed(self) -> tuple[str, ...]:
        """Ids of the replayed examples, in order."""
        ...

    def replays(self, step: int) -> bool:
        """Say whether the batch of a step, counted from 0, is replayed."""
        ...


class ReplaySelector(Protocol):
    """Selects the next replayed examples during training; for a `ReplayCallback` or `FineTuner.tune`."""

    def settings(self) -> dict[str, Any]:
        """Return what the selection depends on in addition to plan and model, as plain values."""
        ...

    def check(self, mixture: Layout) -> None:
        """Raise ConfigError or MismatchError if it cannot select for this mixture."""
        ...

    def due(self, step: int, mixture: Layout) -> bool:
        """Say whether to select after this number of steps; the result takes effect one step later."""
        ...

    def select(self, language_model: LanguageModel, mixture: Layout, replayed: Sequence[str]) -> Sequence[str]:
        """Return ids of the mixture's plan to replay next, most urgent first; `replayed` are the ids so far."""
        ...


@dataclass(frozen=True, repr=False)
class OnlineSelector:
    """Forecast again from probes of the model in training, and revise the rest of the plan.

    Replayed probes are excluded: they no longer represent the other examples.

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
        Fractions of all steps, each in (0, 1), after which to revise.
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
        """Check the fractions."""
        for fraction in self.at:
            if not 0 < fraction < 1:
                raise ConfigError(
                    f"online replay is revised after a fraction of the steps between 0 and 1, not {fraction}"
                )

    def __repr__(self) -> str:
        return f"OnlineSelector({type(self.model).__name__}, {len(self.probes)} probes, at={tuple(self.at)})"

    @classmethod
    def from_atlas(
        cls, atlas: Atlas, plan: ReplayPlan, *, k: int = 30, at: Sequence[float] = (0.25,)
    ) -> OnlineSelector:
        """Fit `Bayesian` to an atlas, and choose k probes among the examples that a plan may replay."""
        model = Bayesian().fit(atlas)
        usable = np.flatnonzero((plan.weights > 0) & ~np.isnan(atlas.nll_before))
        columns = probes.choose(model, min(k, len(usable)), usable)
        return cls(model, atlas.pool, atlas.nll_before, columns, at, atlas.before.metadata.get("max_length"))

    def settings(self) -> dict[str, Any]:
        """As in `ReplaySelector`."""
        return {
            "at": [float(fraction) for fraction in self.at],
            "probes": [self.pool.ids[i] for i in self.probes.tolist()],
            "temperature": self.temperature,
        }

    def check(self, mixture: Layout) -> None:
        """As in `ReplaySelector`."""
        plan = _plan_of(mixture, self.pool)
        if "forecast" not in get_strategy(plan.strategy).needs:
            usable = [name for name, strategy in STRATEGIES.items() if "forecast" in strategy.needs]
            raise ConfigError(
                f"online replay needs a strategy that uses a forecast, and {plan.strategy!r} does not; "
                f"use one of {', '.join(sorted(usable))}"
            )

    def due(self, step: int, mixture: Layout) -> bool:
        """As in `ReplaySelector`."""
        return step in {max(round(fraction * mixture.steps), 1) for fraction in self.at}

    def forecast(self, language_model: LanguageModel, replayed: Sequence[str] = ()) -> Forecast:
        """Forecast the current model's forgetting of every example from the probes that were not replayed."""
        excluded = set(replayed)
        kept = np.array([i for i in self.probes.tolist() if self.pool.ids[i] not in excluded], dtype=np.intp)
        measured = losses(language_model, (self.pool[i] for i in kept.tolist()), self.max_length)
        return self.model.predict(kept, measured - self.before[kept])

    def select(self, language_model: LanguageModel, mixture: Layout, replayed: Sequence[str]) -> Sequence[str]:
        """As in `ReplaySelector`."""
        old = _plan_of(mixture, self.pool)
        strategy = get_strategy(old.strategy, temperature=self.temperature)
        signals = Signals(
            self.pool.ids,
            losses=self.before,
            forecast=self.forecast(language_model, replayed).mean,
            loadings=correlation_loadings(self.model) if "loadings" in strategy.needs else None,
        )
        plan = make_plan(
            self.pool,
            strategy,
            signals,
            ratio=old.ratio,
            held_out=old.held_out_ids,
            among=[id_ for id_, weight in zip(old.ids, old.weights, strict=True) if weight],
            repeat=old.repeat,
            seed=old.seed,
        )
        return plan.order(len(mixture.replayed) - len(replayed), already_replayed=replayed)


@dataclass(frozen=True, repr=False)
class MostForgottenSelector:
    """Before every replayed batch, sample groups of candidates and take the most forgotten one of each.

    Forgetting is the loss increase since the base model. Maximally interfered retrieval (Aljundi et al. 2019) ranks by
    the loss increase of one virtual step instead. The cost is the candidates' forward passes.

    Parameters
    ----------
    pool : Pool
    before : array, shape (N,)
        Losses of the base model, nats per token; NaN excludes an example.
    candidates : int
        Number of candidates per replayed example.
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
            raise ConfigError(f"at least 2 candidates are needed, not {self.candidates}")

    def __repr__(self) -> str:
        return f"MostForgottenSelector(candidates={self.candidates})"

    def settings(self) -> dict[str, Any]:
        """As in `ReplaySelector`."""
        return {"candidates": self.candidates}

    def check(self, mixture: Layout) -> None:
        """As in `ReplaySelector`."""
        _plan_of(mixture, self.pool)

    def due(self, step: int, mixture: Layout) -> bool:
        """As in `ReplaySelector`."""
        return mixture.replays(step + 1)

    def select(self, language_model: LanguageModel, mixture: Layout, replayed: Sequence[str]) -> Sequence[str]:
        """As in `ReplaySelector`."""
        plan, excluded = _plan_of(mixture, self.pool), set(replayed)
        fresh = [i for i in np.flatnonzero(plan.weights > 0).tolist() if self.pool.ids[i] not in excluded]
        fresh = [i for i in fresh if not np.isnan(self.before[i])]
        each = min(self.candidates, len(fresh) // mixture.batch_size)
        if each < 2:  # nearly all were replayed: keep the plan's order
            return ()
        # Seeded by the number replayed, so that a resumed run draws the same candidates.
        rng = np.random.default_rng([plan.seed, len(replayed)])
        drawn = rng.choice(fresh, size=(mixture.batch_size, each), replace=False)
        measured = losses(language_model, (self.pool[i] for i in drawn.ravel().tolist()), self.max_length)
        forgotten = measured.reshape(drawn.shape) - self.before[drawn]
        return [self.pool.ids[row[best]] for row, best in zip(drawn, forgotten.argmax(axis=1), strict=True)]


def _plan_of(mixture: Layout, pool: Pool) -> ReplayPlan:
    """Return the mixture's plan; raise MismatchError if it is of another pool."""
    if mixture.plan is None or not mixture.replayed:
        raise ConfigError("there is nothing to select during training: the mixture replays nothing")
    check_fingerprint("the replay plan", mixture.plan.pool_fingerprint, pool)
    return mixture.plan
