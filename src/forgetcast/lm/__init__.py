"""Language models: loading, scoring and fine-tuning. Nothing outside this folder imports torch."""

from forgetcast.errors import MissingExtraError

try:
    import datasets as _datasets  # noqa: F401  # probing for the extra
    import peft as _peft  # noqa: F401
    import torch as _torch  # noqa: F401
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise MissingExtraError("lm", error) from error

from forgetcast.data.recipe import Recipe
from forgetcast.data.rendering import Rendering
from forgetcast.lm.additional import kl_divergence, score_again
from forgetcast.lm.features import hidden_states
from forgetcast.lm.generate import OnPolicyTexts, answer_prompts, exact_match, sample_texts
from forgetcast.lm.gradients import gradient_products
from forgetcast.lm.interpolate import Interpolation
from forgetcast.lm.load import LanguageModel, SharedBase, load
from forgetcast.lm.mixture import ReplayCallback, ReplayMixture
from forgetcast.lm.monitor import ForgettingMonitor
from forgetcast.lm.score import score, token_digests
from forgetcast.lm.selectors import MonitorSelector, MostForgottenSelector, OnlineSelector, ReplaySelector
from forgetcast.lm.train import FineTuner, InitialState, Tuned

__all__ = [
    "FineTuner",
    "ForgettingMonitor",
    "InitialState",
    "Interpolation",
    "LanguageModel",
    "MonitorSelector",
    "MostForgottenSelector",
    "OnPolicyTexts",
    "OnlineSelector",
    "Recipe",
    "Rendering",
    "ReplayCallback",
    "ReplayMixture",
    "ReplaySelector",
    "SharedBase",
    "Tuned",
    "answer_prompts",
    "exact_match",
    "gradient_products",
    "hidden_states",
    "kl_divergence",
    "load",
    "sample_texts",
    "score",
    "score_again",
    "token_digests",
]
