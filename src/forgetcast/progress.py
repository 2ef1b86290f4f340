"""Progress of long work: what all stages report by, and the command line shows."""

from __future__ import annotations

from collections.abc import Callable

OnProgress = Callable[[str, int, int], None]
"""Called with a description, the finished units of work, and their total; 0 where that is unknown."""


def counted(report: OnProgress, what: str, total: int = 0) -> Callable[[int], None]:
    """Return a function that adds up what it is called with, and reports the sum."""
    done = 0

    def add(finished: int) -> None:
        nonlocal done
        done += finished
        report(what, done, total)

    return add
