"""Completion: from a few measured entries of a new task's row to all of them, with standard deviations.

Every method is fitted once on the atlas and then completes any number of new rows without refitting.
"""

from forgetcast.completion.additive import Additive, Mean
from forgetcast.completion.base import Forecast, LinearGaussian
from forgetcast.completion.bayesian import Bayesian

__all__ = ["Additive", "Bayesian", "Forecast", "LinearGaussian", "Mean"]
