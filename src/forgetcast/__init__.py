"""Forecast what a language model will forget before you fine-tune it, and replay just enough to keep it."""

from forgetcast import completion, evaluation, probes
from forgetcast.atlas.matrix import ForgettingMatrix
from forgetcast.atlas.store import Atlas
from forgetcast.completion.structure import Structure, analyze
from forgetcast.data.pool import Example, Pool, load_task
from forgetcast.errors import ConfigError, DataError, ForgetcastError, MismatchError, MissingExtraError
from forgetcast.measure.scores import Scores
from forgetcast.replay.plan import ReplayPlan, make_plan

__version__ = "0.1.0"

__all__ = [
    "Atlas",
    "ConfigError",
    "DataError",
    "Example",
    "ForgetcastError",
    "ForgettingMatrix",
    "MismatchError",
    "MissingExtraError",
    "Pool",
    "ReplayPlan",
    "Scores",
    "Structure",
    "analyze",
    "completion",
    "evaluation",
    "load_task",
    "make_plan",
    "probes",
]
