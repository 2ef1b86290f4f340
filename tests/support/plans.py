"""Replay plans from signals given by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from forgetcast import Pool, ReplayPlan, make_plan
from forgetcast.replay.signals import Signals
from forgetcast.replay.strategies import get_strategy


def plan_for(
    pool: Pool,
    strategy: str,
    ratio: float,
    *,
    held_out: Sequence[str] = (),
    among: Sequence[str] | None = None,
    temperature: float | None = None,
    repeat: bool = False,
    seed: int = 0,
    **signals: Any,
) -> ReplayPlan:
    """Make a plan of a strategy by its name."""
    return make_plan(
        pool,
        get_strategy(strategy, temperature=temperature),
        Signals(pool.ids, **signals),
        ratio=ratio,
        held_out=held_out,
        among=among,
        repeat=repeat,
        seed=seed,
    )
