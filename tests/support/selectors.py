"""Replay that is decided during training: its recipe, plan and arguments."""

from __future__ import annotations

from typing import Any

from forgetcast import Atlas, ReplayPlan, completion, make_plan
from forgetcast.lm import MostForgottenSelector, OnlineSelector
from support.training import POOL, make_recipe

RECIPE = make_recipe(steps=12, max_length=96, learning_rate=1e-2)
HELD_OUT = POOL.ids[::2]


def plan_for(atlas: Atlas, strategy: str = "top", ratio: float = 0.5) -> ReplayPlan:
    model = completion.Bayesian().fit(atlas)
    return make_plan(POOL, strategy, ratio, held_out=HELD_OUT, forecast=model.predict([], []).mean, seed=3)


def arguments(kind: str, atlas: Atlas) -> dict[str, Any]:
    if kind == "most-forgotten":
        plan = make_plan(POOL, "most-forgotten", 0.5, held_out=HELD_OUT, seed=3)
        return {"plan": plan, "pool": POOL, "selector": MostForgottenSelector(POOL, atlas.nll_before)}
    plan = plan_for(atlas)
    return {"plan": plan, "pool": POOL, "selector": OnlineSelector.of(atlas, plan, k=6, at=(0.5,))}
