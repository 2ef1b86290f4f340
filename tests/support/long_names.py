"""Names as long as real ones are, and results that have them."""

from __future__ import annotations

import numpy as np

from forgetcast import Example, Pool
from forgetcast.experiments.sequence_result import SequenceResult, Stage
from forgetcast.experiments.verify import Run, Verification

TASK = "[bold]company-wide_question-answering_{}_with-retrieved-passages_日本語の指示データ_v2.1-final"
SOURCE = "web-crawl-2024-51_deduplicated/language=en/domain-{}.example.org/quality-filtered"
EXAMPLE = "numpy-docs/numpy/lib/_array_api_info.py:__array_namespace_info__.capabilities.section-{}#part-3"
ARMS = ("none", "random", "top", "coverage-of-clusters online", "a_strategy_that_we_wrote_for_the_quarterly_release")


def long_pool(n: int, sources: int) -> Pool:
    """One source has two examples."""
    labels = [0, 0, *(1 + i % (sources - 1) for i in range(n - 2))]
    return Pool([Example(EXAMPLE.format(i), text=f"text {i} of it", source=SOURCE.format(labels[i])) for i in range(n)])


def verification() -> Verification:
    rng = np.random.default_rng(0)
    return Verification(
        tuple(
            Run(TASK.format(0), arm, seed, *(-12.345 + rng.normal(size=3)), 1234, 5678, 90123.4, -0.00012, 1234)
            for arm in ARMS
            for seed in (0, 1)
        ),
        judged=240,
        ratio=0.03125,
    )


def sequence() -> SequenceResult:
    rng = np.random.default_rng(0)
    names = [TASK.format(i) for i in range(3)]
    return SequenceResult(
        tuple(
            Stage(order, arm, i, names[i - 1], *rng.normal(-10, 1, 2), dict.fromkeys(names[:i], 2.5), 1234, 99, 12345.6)
            for order in (0, 1)
            for arm in ARMS
            for i in (1, 2, 3)
        ),
        judged=240,
        ratio=0.03125,
    )
