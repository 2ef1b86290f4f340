"""Replay that is decided during training: its recipe, plan and arguments."""

from __future__ import annotations

from typing import Any

from forgetcast import Atlas, ReplayPlan, completion
from forgetcast.lm import ForgettingMonitor, MonitorSelector, MostForgottenSelector, OnlineSelector
from support.plans import plan_for
from support.training import POOL, make_recipe

RECIPE = make_recipe(steps=12, max_length=96, learning_rate=1e-2)
HELD_OUT = POOL.ids[::2]


def atlas_plan(atlas: Atlas, strategy: str = "top", ratio: float = 0.5) -> ReplayPlan:
    model = completion.Bayesian().fit(atlas)
    return plan_for(POOL, strategy, ratio, held_out=HELD_OUT, forecast=model.predict([], []).mean, seed=3)


def arguments(kind: str, atlas: Atlas) -> dict[str, Any]:
    if kind == "most-forgotten":
        plan = plan_for(POOL, "most-forgotten", 0.5, held_out=HELD_OUT, seed=3)
        return {"plan": plan, "pool": POOL, "selector": MostForgottenSelector(POOL, atlas.nll_before)}
    plan = atlas_plan(atlas)
    if kind == "monitor":
        monitor = ForgettingMonitor(atlas, probes=8, every=5)
        return {"plan": plan, "pool": POOL, "selector": MonitorSelector(monitor), "callbacks": [monitor]}
    return {"plan": plan, "pool": POOL, "selector": OnlineSelector.from_atlas(atlas, plan, k=6, at=(0.5,))}
