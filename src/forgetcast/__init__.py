"""Forecast what a language model will forget before you fine-tune it, and replay just enough to keep it."""

from forgetcast import completion, evaluation, probes
from forgetcast.atlas import Atlas
from forgetcast.errors import ConfigError, DataError, ForgetcastError, MismatchError, MissingExtraError
from forgetcast.matrix import ForgettingMatrix
from forgetcast.pool import Example, Pool, load_task
from forgetcast.replay import ReplayPlan, make_plan
from forgetcast.scores import Scores
from forgetcast.structure import Structure, analyze

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
