"""What else could predict forgetting: similarities of tasks and examples, and forecasters trained on them."""

from forgetcast.similarity.signals import (
    SIMILARITIES,
    Material,
    Similarity,
    Vectors,
    compute_similarities,
)
from forgetcast.similarity.statistics import Association, Correlation, associate
from forgetcast.similarity.study import SimilarityStudy, Versus, compare_arms, gather, names_of, study, tasks_of
from forgetcast.similarity.trained import (
    FromSide,
    OnSimilarity,
    RepresentationProduct,
    Ridge,
    RowForecaster,
    SideInformation,
    TaskForecaster,
    arms_of,
)

__all__ = [
    "SIMILARITIES",
    "Association",
    "Correlation",
    "FromSide",
    "Material",
    "OnSimilarity",
    "RepresentationProduct",
    "Ridge",
    "RowForecaster",
    "SideInformation",
    "Similarity",
    "SimilarityStudy",
    "TaskForecaster",
    "Vectors",
    "Versus",
    "arms_of",
    "associate",
    "compare_arms",
    "compute_similarities",
    "gather",
    "names_of",
    "study",
    "tasks_of",
]
