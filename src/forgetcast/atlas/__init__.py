"""Many models: the forgetting matrix, in memory and on disk."""

from forgetcast.atlas.matrix import ForgettingMatrix
from forgetcast.atlas.store import Atlas

__all__ = ["Atlas", "ForgettingMatrix"]
