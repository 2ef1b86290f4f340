"""Published numbers of the paper that `reproduce` sets its own beside.

X. Jin and X. Ren, "Demystifying Language Model Forgetting with Low-rank Example Associations" (arXiv 2406.14026,
NeurIPS 2025), its released code and its project page. A number from elsewhere is marked as second-hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

CITATION = (
    "X. Jin and X. Ren, Demystifying Language Model Forgetting with Low-rank Example Associations, "
    "arXiv 2406.14026, NeurIPS 2025"
)

RANK_R2 = (0.512, 0.633, 0.715, 0.762, 0.790)
"""R^2 of the truncated singular value decomposition of rank 1 to 5, not centred, around the grand mean."""

RANK_R2_OF = "OLMo-7B, 85 tasks x 10,000 Dolma examples"

MATRICES = f"R^2: {RANK_R2_OF}; completion: 141,871 examples; binary: OLMo-7B-Instruct, 142 tasks x 4,764 examples"

RANK_3_R2 = 0.69
"""R^2 of rank 3 is above it for every model of the paper."""

RANK_F1 = (0.506, 0.593, 0.651, 0.682, 0.707)
"""F1 of the entries that logistic factorisation of rank 1 to 5 gives a probability of at least one half."""

RANK_F1_OF = "the paper's binary forgetting, by exact match"

COMPLETION_F1 = 0.5816
"""Best F1 of completion."""

COMPLETION_F1_OF = "OLMo-7B-Instruct, 142 tasks x 4,764 examples answered right, by exact match; the best figure"


class PublishedCorrelation(NamedTuple):
    """Pearson's and Spearman's correlation of a similarity with forgetting."""

    model: str
    similarity: str
    pearson: float
    spearman: float


CORRELATIONS = (
    PublishedCorrelation("OLMo-7B", "commercial embedding", 0.158, 0.233),
    PublishedCorrelation("OLMo-7B", "SBERT embedding", 0.043, 0.092),
    PublishedCorrelation("OLMo-1B", "commercial embedding", 0.065, 0.082),
    PublishedCorrelation("OLMo-1B", "SBERT embedding", 0.054, 0.074),
)

GRADIENT_CORRELATION = "near 0"
"""Correlation of gradient products with forgetting; second-hand."""

ROW_CORRELATION = (0.4, 0.6)
"""Range of the correlation of two tasks' rows; second-hand."""

REPLAY: Mapping[str, float] = {"none": 2.3092, "random": 2.2747, "predicted": 2.2730, "truth": 2.2711}
"""Mean log-perplexity of upstream examples after fine-tuning with each replay, nats per token; the project page's."""

REPLAY_OF = "OLMo-7B"

REPLAY_RATIO = 1 / 32
"""Replayed examples per new one."""

PROBES, SEEDS = 30, 10
"""Probes of a new task, drawn at random, and seeds of the draw."""

FAMILY, FAMILY_ROWS = "flan", 66
"""The family of the OLMo-7B tasks that is learned from and tested on, and its number of tasks."""

IN_DOMAIN_ROWS = (6, 65, 18, 8, 60, 13, 37, 22, 30, 19, 64, 50, 25, 31, 32, 61, 16, 5, 53, 49)
"""Rows of that family which are forecast; the other 46 are known, and all tasks of other families are out of domain."""
