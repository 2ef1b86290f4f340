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
from forgetcast.completion.watch import AtlasGauge
from forgetcast.data.pool import Pool
from forgetcast.errors import ConfigError
from forgetcast.lm.load import LanguageModel
from forgetcast.lm.monitor import ForgettingMonitor
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
        """Say whether to select after this number of steps; the result takes effect one step later.

        Asked of step 0, too, before the training begins: then it takes effect at once.
        """
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
        _check_strategy(_plan_of(mixture, self.pool))

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
        forecast = self.forecast(language_model, replayed).mean
        plan = _revised(_plan_of(mixture, self.pool), self.pool, self.before, self.model, forecast, self.temperature)
        return plan.order(len(mixture.replayed) - len(replayed), already_replayed=replayed)


@dataclass(frozen=True, repr=False)
class MonitorSelector:
    """At every look of a `ForgettingMonitor`, forecast from its probes, and revise the rest of the plan.

    The probes are scored once for both. They are never replayed, so that what the monitor logs stays a figure of
    examples that were not; and the forecast is from those that the plan does not hold out. Which of the two callbacks
    comes first does not matter.

    Parameters
    ----------
    monitor : ForgettingMonitor
        With an atlas; to be given to the Trainer, too.
    temperature : float, optional
        As in `make_plan`.

    Raises
    ------
    ConfigError
        If the monitor has no atlas.
    """

    monitor: ForgettingMonitor
    temperature: float | None = None

    def __post_init__(self) -> None:
        """Check that there is something to forecast from."""
        _ = self._gauge

    def __repr__(self) -> str:
        return f"MonitorSelector({len(self._gauge.probes)} probes, every {self.monitor.every} steps)"

    @property
    def _gauge(self) -> AtlasGauge:
        if not isinstance(self.monitor.gauge, AtlasGauge):
            raise ConfigError("a monitor without an atlas makes no forecast: give ForgettingMonitor an atlas")
        return self.monitor.gauge

    @property
    def _probes(self) -> list[str]:
        gauge = self._gauge
        return [gauge.atlas.examples[i] for i in gauge.probes.tolist()]

    def settings(self) -> dict[str, Any]:
        """As in `ReplaySelector`."""
        return {"every": self.monitor.every, "probes": self._probes, "temperature": self.temperature}

    def check(self, mixture: Layout) -> None:
        """As in `ReplaySelector`."""
        plan = _plan_of(mixture, self._gauge.atlas.pool)
        _check_strategy(plan)
        spared = set(self._probes)
        left = sum(weight > 0 and id_ not in spared for id_, weight in zip(plan.ids, plan.weights, strict=True))
        if left < (1 if plan.repeat else len(mixture.replayed)):
            raise ConfigError(
                f"{len(mixture.replayed)} examples are to be replayed, and the plan has {left} besides the monitor's "
                "probes, which never are: take fewer probes, a smaller ratio or a larger pool"
            )

    def due(self, step: int, mixture: Layout) -> bool:  # noqa: ARG002
        """As in `ReplaySelector`.

        Raises
        ------
        ConfigError
            If the monitor does not watch the training.
        """
        if step and not self.monitor.watching:
            raise ConfigError(
                "the monitor that replay is selected by does not watch this training: give it to the Trainer too, "
                "callbacks=[monitor, ReplayCallback(mixture, MonitorSelector(monitor))]"
            )
        return step % self.monitor.every == 0

    def select(
        self,
        language_model: LanguageModel,  # noqa: ARG002 - the monitor has it
        mixture: Layout,
        replayed: Sequence[str],
    ) -> Sequence[str]:
        """As in `ReplaySelector`."""
        gauge, probes, forgotten = self._gauge, self._probes, self.monitor.forgetting()
        pool, spared, left = gauge.atlas.pool, set(probes), mixture.replayed[len(replayed) :]
        plan = _plan_of(mixture, pool).without(spared)
        if forgotten is None:  # keep the order as it is, but for the probes
            kept = [id_ for id_ in left if id_ not in spared]
            return [*kept, *plan.order(len(left) - len(kept), already_replayed=[*replayed, *kept])]
        # As everywhere, what is held out does not decide what is replayed.
        held_out = set(plan.held_out_ids)
        known = np.array([id_ not in held_out for id_ in probes])
        forecast = gauge.model.predict(gauge.probes[known], forgotten[known]).mean
        revised = _revised(plan, pool, gauge.atlas.nll_before, gauge.model, forecast, self.temperature)
        return revised.order(len(left), already_replayed=replayed)


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
        return step > 0 and mixture.replays(step + 1)

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


def _check_strategy(plan: ReplayPlan) -> None:
    """Raise ConfigError unless a plan can be revised by a new forecast."""
    if "forecast" not in get_strategy(plan.strategy).needs:
        usable = [name for name, strategy in STRATEGIES.items() if "forecast" in strategy.needs]
        raise ConfigError(
            f"online replay needs a strategy that uses a forecast, and {plan.strategy!r} does not; "
            f"use one of {', '.join(sorted(usable))}"
        )


def _revised(
    plan: ReplayPlan,
    pool: Pool,
    before: np.ndarray,
    model: LinearGaussian,
    forecast: np.ndarray,
    temperature: float | None,
) -> ReplayPlan:
    """Apply the strategy of a plan to another forecast (N,), with all else as it is."""
    strategy = get_strategy(plan.strategy, temperature=temperature)
    signals = Signals(
        pool.ids,
        losses=before,
        forecast=forecast,
        loadings=correlation_loadings(model) if "loadings" in strategy.needs else None,
    )
    return make_plan(
        pool,
        strategy,
        signals,
        ratio=plan.ratio,
        held_out=plan.held_out_ids,
        among=[id_ for id_, weight in zip(plan.ids, plan.weights, strict=True) if weight],
        repeat=plan.repeat,
        seed=plan.seed,
    )


def _plan_of(mixture: Layout, pool: Pool) -> ReplayPlan:
    """Return the mixture's plan; raise MismatchError if it is of another pool."""
    if mixture.plan is None or not mixture.replayed:
        raise ConfigError("there is nothing to select during training: the mixture replays nothing")
    check_fingerprint("the replay plan", mixture.plan.pool_fingerprint, pool)
    return mixture.plan
