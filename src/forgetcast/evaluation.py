"""Errors of a forecast, comparison of completion methods, and statistics of paired experiments."""

from forgetcast.completion.benchmark import BenchRow, bench, bench_left_out
from forgetcast.completion.errors import ForecastErrors, accuracy, average, judge
from forgetcast.stats import (
    PairedDifference,
    bootstrap_interval,
    holm,
    paired_difference,
    wilcoxon_p,
    worst_part,
    worst_tenth,
)

__all__ = [
    "BenchRow",
    "ForecastErrors",
    "PairedDifference",
    "accuracy",
    "average",
    "bench",
    "bench_left_out",
    "bootstrap_interval",
    "holm",
    "judge",
    "paired_difference",
    "wilcoxon_p",
    "worst_part",
    "worst_tenth",
]
