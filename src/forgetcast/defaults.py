"""Defaults and limits that the library and the command line share, one value each."""

RATIO = 1 / 8
"""Replayed examples per new one."""

HOLD_OUT = 0.2
"""Fraction of the pool that is never replayed."""

TEST_SHARE = 0.1
"""Fraction of a task that is held out for the new-task loss."""

LOSS_MARGIN = 0.02
"""Nats per target token by which a loss on the new task may be higher and still count as equal."""

PROBES = 30
"""Probes of a forecast that is made during an experiment."""

CHOSEN_SHARE = 1 / 6
"""Share of the first probes that are chosen; the others are random. `benchmarks/forecast.py` compares shares."""

ORDERS = 6
"""Random orders of a sequence's tasks: with fewer pairs, a test of ranks can show nothing at 5 % (2 / 2^5 = 6 %)."""

MEMORY = 100
"""Training examples of each learned task that a sequence keeps, to replay them in later tasks."""

ALPHA_PROBES = 60
"""Upstream examples by which a place between base and tuned model is chosen."""

MAX_SEED = 2**32 - 1
"""Largest seed that all generators of random numbers take."""

MOST_EXAMPLES = 10**8
"""So many examples a fine-tune may take, new or replayed: they are listed before it begins."""

ANSWER_TOKENS = 32
"""Longest answer to a prompt, in tokens, where exact match is measured."""

WATCH_EVERY = 50
"""Optimiser steps between two looks at a model in training."""
