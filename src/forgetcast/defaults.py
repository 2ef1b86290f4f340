"""Defaults and limits that the library and the command line share, one value each."""

RATIO = 1 / 8
"""Replayed examples per new one."""

HOLD_OUT = 0.2
"""Fraction of the pool that is never replayed."""

TEST_SHARE = 0.1
"""Fraction of a task that is held out for the new-task loss."""

PROBES = 30
"""Probes of a forecast that is made during an experiment."""

MAX_SEED = 2**32 - 1
"""Largest seed that all generators of random numbers take."""

MOST_EXAMPLES = 10**8
"""So many examples a fine-tune may take, new or replayed: they are listed before it begins."""
