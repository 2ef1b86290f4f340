"""One model or two: scores, their difference, and other tools' logs."""

from forgetcast.measure.diff import Change, Difference, Flips, Gate, difference
from forgetcast.measure.inspect_logs import is_inspect, read_inspect
from forgetcast.measure.lm_eval import read_lm_eval
from forgetcast.measure.scores import Scores, check_tokens, flips, forgetting

__all__ = [
    "Change",
    "Difference",
    "Flips",
    "Gate",
    "Scores",
    "check_tokens",
    "difference",
    "flips",
    "forgetting",
    "is_inspect",
    "read_inspect",
    "read_lm_eval",
]
