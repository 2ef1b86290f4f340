"""Choice of the examples to measure after a new task: `forgetcast.completion.probes`."""

from forgetcast.completion.probes import choose, random, weights

__all__ = ["choose", "random", "weights"]
