"""What to mix into a fine-tune: signals, strategies, plans, exports, and the law of ratios."""

from forgetcast.replay.export import export_axolotl, export_llama_factory, export_mixture, export_weighted
from forgetcast.replay.law import Advice, ReplayLaw, advise
from forgetcast.replay.outcome import METRICS, Run
from forgetcast.replay.plan import ReplayPlan, make_plan, ratio_of_share, with_share_of_tokens
from forgetcast.replay.signals import Signals
from forgetcast.replay.strategies import STRATEGIES, Random, Selection, Strategy, get_strategy

__all__ = [
    "METRICS",
    "STRATEGIES",
    "Advice",
    "Random",
    "ReplayLaw",
    "ReplayPlan",
    "Run",
    "Selection",
    "Signals",
    "Strategy",
    "advise",
    "export_axolotl",
    "export_llama_factory",
    "export_mixture",
    "export_weighted",
    "get_strategy",
    "make_plan",
    "ratio_of_share",
    "with_share_of_tokens",
]
