"""Completion: from a few measured entries of a new task's row to all of them, with standard deviations.

Every method is fitted once on the atlas and then completes any number of new rows without refitting.
"""

from forgetcast.completion.additive import Additive, Mean
from forgetcast.completion.auto import Auto
from forgetcast.completion.base import Completion, Forecast
from forgetcast.completion.bayesian import Bayesian
from forgetcast.completion.factorisation import MatrixFactorization, SoftImpute
from forgetcast.completion.gaussian import LinearGaussian
from forgetcast.completion.logistic import LogisticMF
from forgetcast.completion.neighbours import KNN

METHODS: dict[str, type[Completion]] = {
    "mean": Mean,
    "additive": Additive,
    "knn": KNN,
    "mf": MatrixFactorization,
    "soft-impute": SoftImpute,
    "logistic-mf": LogisticMF,
    "bayesian": Bayesian,
    "auto": Auto,
}
"""Every method by the name that the command line knows it by."""

__all__ = [
    "KNN",
    "METHODS",
    "Additive",
    "Auto",
    "Bayesian",
    "Completion",
    "Forecast",
    "LinearGaussian",
    "LogisticMF",
    "MatrixFactorization",
    "Mean",
    "SoftImpute",
]
