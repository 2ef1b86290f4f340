"""One model or two: scores, their difference, and other tools' logs."""

from forgetcast.measure.diff import Change, Difference, Divergence, Flips, Noise, Summary, difference, documents
from forgetcast.measure.gates import Gate, Judgement, judge
from forgetcast.measure.inspect_logs import is_inspect, read_inspect
from forgetcast.measure.lm_eval import read_lm_eval
from forgetcast.measure.scores import Scores, check_tokens, flips, forgetting

__all__ = [
    "Change",
    "Difference",
    "Divergence",
    "Flips",
    "Gate",
    "Judgement",
    "Noise",
    "Scores",
    "Summary",
    "check_tokens",
    "difference",
    "documents",
    "flips",
    "forgetting",
    "is_inspect",
    "judge",
    "read_inspect",
    "read_lm_eval",
]
