"""Arms of a verification that do otherwise than replay by a plan: each is a name, a plan and a variant of the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from forgetcast.data.pool import Pool
from forgetcast.data.recipe import Recipe
from forgetcast.defaults import LOSS_MARGIN
from forgetcast.errors import ConfigError
from forgetcast.experiments.interpolation import ALPHAS
from forgetcast.replay.plan import ReplayPlan
from forgetcast.replay.strategies import NoReplay, Random
from forgetcast.settings import check_settings
from forgetcast.text import did_you_mean


@dataclass(frozen=True)
class Interpolating:
    """How the tuned weights are interpolated with the base model's.

    Attributes
    ----------
    alpha : float or None
        Between 0, the base model, and 1, the tuned one; None: chosen by `choose_alpha`.
    probes : sequence of str
        Upstream examples to choose by; none is held out.
    validation : Pool or None
        Examples of the new task to choose by, which neither train nor judge.
    margin : float
        As in `choose_alpha`.
    """

    alpha: float | None
    probes: Sequence[str] = ()
    validation: Pool | None = None
    margin: float = LOSS_MARGIN

    @property
    def scored(self) -> int:
        """Number of examples that are scored to choose alpha."""
        if self.alpha is not None or self.validation is None:
            return 0
        return len(ALPHAS) * (len(self.probes) + len(self.validation))

    def settings(self) -> dict[str, Any]:
        """Return what the outcome depends on."""
        if self.alpha is not None or self.validation is None:
            return {"alpha": self.alpha}
        return {"probes": list(self.probes), "validation": self.validation.fingerprint, "margin": self.margin}


@dataclass(frozen=True)
class Variant:
    """What an arm does otherwise than tune by the recipe, and replay the pool's texts by its plan.

    Attributes
    ----------
    summary : str
        One line, shown in reports.
    recipe : mapping
        Fields of the recipe that are changed.
    texts : Pool or None
        Replayed in place of the pool's texts; their ids are among the pool's.
    interpolation : Interpolating or None
        What is done with the tuned weights.
    """

    summary: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    texts: Pool | None = None
    interpolation: Interpolating | None = None

    def settings(self) -> dict[str, Any]:
        """Return what the outcome depends on in addition to the recipe."""
        found: dict[str, Any] = {}
        if self.texts is not None:
            found["texts"] = self.texts.fingerprint
        if self.interpolation is not None:
            found["interpolation"] = self.interpolation.settings()
        return found


class AskedArm(NamedTuple):
    """An arm as a user names it: its kind, and its number if it has one."""

    kind: str
    value: float | None

    @property
    def name(self) -> str:
        """Name of the arm in results."""
        return self.kind if self.value is None else f"{self.kind} {self.value:g}"


class _Kind(NamedTuple):
    """A kind of arm: what its number must be, and the changes of the recipe that it makes."""

    number: str | None
    fits: Callable[[float], bool]
    optional: bool = False


ON_POLICY = "on-policy"
"""What follows the name of a plan whose texts the model wrote itself."""

KINDS: Mapping[str, _Kind] = {
    "interpolation": _Kind("alpha, from 0 to 1", lambda value: 0 <= value <= 1, optional=True),
    "learning-rate": _Kind("a factor above 0", lambda value: value > 0),
    "steps": _Kind("a share of the steps, above 0 and below 1", lambda value: 0 < value < 1),
    "easy": _Kind(None, lambda _: False),
    "spacing": _Kind(None, lambda _: False),
    "weight": _Kind("a factor above 0", lambda value: value > 0),
    "kl": _Kind("a weight above 0, at most 1", lambda value: 0 < value <= 1),
}
"""What `--arm` takes, in the order of the arms."""

OF_REPLAY = ("spacing", "weight", "kl")
"""Kinds that change how a plan is replayed: each is an arm of every plan, or of random replay if that is the only."""


def parse_arm(text: str) -> AskedArm:
    """Parse "interpolation", "interpolation=0.7" or "learning-rate=0.3".

    Raises
    ------
    ConfigError
        If there is no such arm, or its number is missing, out of range, or not expected.
    """
    kind, sign, number = text.partition("=")
    if kind not in KINDS:
        raise ConfigError(f"there is no arm {kind!r}; there are {', '.join(KINDS)}{did_you_mean(kind, KINDS)}")
    rule = KINDS[kind]
    if not sign:
        if rule.number is not None and not rule.optional:
            raise ConfigError(f"the arm {kind!r} needs a number, as {kind}=0.3: {rule.number}")
        return AskedArm(kind, None)
    try:
        value = float(number)
    except ValueError:
        value = float("nan")
    if rule.number is None or not rule.fits(value):
        wanted = "takes no number" if rule.number is None else f"takes {rule.number}"
        raise ConfigError(f"the arm {kind!r} {wanted}, not {number!r}")
    return AskedArm(kind, value)


def add_arms(
    asked: Sequence[AskedArm],
    plans: Mapping[str, ReplayPlan],
    recipe: Recipe,
    *,
    choosing: Interpolating | None = None,
    texts: Pool | None = None,
) -> tuple[dict[str, ReplayPlan], dict[str, Variant]]:
    """Add arms to those of plans; all together are in order, the simplest first.

    Parameters
    ----------
    asked : sequence of AskedArm
    plans : mapping of str to ReplayPlan
        As `verify.arms` makes them: the first is that without replay.
    recipe : Recipe
        That the arms change.
    choosing : Interpolating, optional
        By what alpha is chosen; needed for an interpolation without one.
    texts : Pool, optional
        The base model's own answers, under ids of the pool: every plan that is made before training is an arm with
        these too.

    Returns
    -------
    plans : dict of str to ReplayPlan
        Of all arms.
    variants : dict of str to Variant
        Of the added ones.
    """
    none = plans[NoReplay.name]
    variants: dict[str, Variant] = {}
    ordered = [arm for kind in KINDS for arm in dict.fromkeys(asked) if arm.kind == kind]
    for arm in ordered:
        if arm.kind not in OF_REPLAY:
            variants[arm.name] = _variant(arm, recipe, choosing)
    every = {NoReplay.name: none, **dict.fromkeys(variants, none), **plans}
    replayed = {name: plan for name, plan in plans.items() if plan.phase == "planned"}
    if len(replayed) > 1:
        replayed.pop(Random.name, None)
    for arm in ordered:
        if arm.kind in OF_REPLAY and not replayed:
            raise ConfigError(f"the arm {arm.kind!r} needs a plan that replays")
        for name, plan in replayed.items() if arm.kind in OF_REPLAY else ():
            every[f"{name} {arm.name}"] = plan
            variants[f"{name} {arm.name}"] = _of_replay(arm, plan, recipe)
    for name, plan in plans.items() if texts is not None else ():
        if plan.phase == "planned" and texts is not None:
            every[f"{name} {ON_POLICY}"] = plan.of_texts(texts)
            variants[f"{name} {ON_POLICY}"] = Variant(f"{plan.summary}; the base model's own answers", texts=texts)
    return every, variants


def _variant(arm: AskedArm, recipe: Recipe, choosing: Interpolating | None) -> Variant:
    value = arm.value
    match arm.kind:
        case "interpolation":
            if value is None and choosing is None:
                raise ConfigError("an interpolation without an alpha needs probes and validation examples to choose it")
            how = choosing if value is None else Interpolating(value)
            at = "alpha chosen on probes" if value is None else f"alpha {value:g}"
            return Variant(f"replay nothing; weights between base and tuned model, {at}", interpolation=how)
        case "learning-rate":
            changed = {"learning_rate": recipe.learning_rate * (value or 1)}
            return Variant(f"replay nothing; {value:g} times the learning rate", _checked(recipe, changed))
        case "easy":
            said = "replay nothing; new examples that the base model predicts well weigh more (FLOW)"
            return Variant(said, _checked(recipe, {"easy_samples": True}))
        case _:
            changed = {"steps": max(1, round(recipe.steps * (value or 1)))}
            return Variant(f"replay nothing; {changed['steps']} of {recipe.steps} steps", _checked(recipe, changed))


def _of_replay(arm: AskedArm, plan: ReplayPlan, recipe: Recipe) -> Variant:
    field, value, said = {
        "spacing": ("spacing", "updates", "spaced by the size of the updates"),
        "weight": ("replay_weight", arm.value, f"its loss times {arm.value}"),
        "kl": ("kl_weight", arm.value, f"{arm.value} of its loss is the divergence from the base model"),
    }[arm.kind]
    return Variant(f"{plan.summary}; {said}", _checked(recipe, {field: value}))


def _checked(recipe: Recipe, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the changes; ConfigError if the recipe does not take them."""
    check_settings(recipe.model_dump() | dict(changes), Recipe, where="--arm")
    return dict(changes)
