"""Ctrl-C and SIGTERM amid work that is put in order before it ends, so that the same call goes on from there."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""What asks a process to end: Ctrl-C, and what `kill`, a container and a scheduler send."""


class Interrupted(KeyboardInterrupt):
    """Work was stopped where the same call goes on; the message says where.

    Attributes
    ----------
    number : int
        The signal that asked for it.
    """

    def __init__(self, where: str, number: int) -> None:
        super().__init__(where)
        self.number = number


class Stop:
    """Whether a signal asked to stop; true if so."""

    def __init__(self) -> None:
        self.noted: list[int] = []

    def interrupted(self, where: str) -> Interrupted:
        """Return what to raise, once the work is in order."""
        return Interrupted(where, self.noted[0] if self.noted else signal.SIGINT)  # another process may have got it

    def __bool__(self) -> bool:
        """Whether one did."""
        return bool(self.noted)

    def forget(self) -> None:
        """Take it as answered: what was to be stopped has ended."""
        self.noted.clear()


class _Noting:
    """A handler that notes the first signal, and hands a second one of its kind on."""

    def __init__(self, stop: Stop, before: Mapping[int, Any], hint: str) -> None:
        self.stop, self._before, self._hint = stop, before, hint

    def __call__(self, number: int, frame: object) -> None:
        if number in self.stop.noted:
            self._before[number](number, frame)
        elif not self.stop and os.environ.get("RANK", "0") == "0":
            # Not by `print`: the signal may come while something is written there.
            again = "press Ctrl-C again" if number == signal.SIGINT else "send the signal again"
            os.write(2, f"\n{self._hint}; {again} to stop at once\n".encode())
        self.stop.noted.append(number)


@contextmanager
def stoppable(hint: str) -> Iterator[Stop]:
    """Note the first Ctrl-C or SIGTERM instead of raising; the block looks at it, and raises `Interrupted`.

    A second signal of the kind acts as it would have without the block. So does a noted one at the block's end, if
    nothing was raised for it. A block within another shares what is noted. A signal that is ignored or has the system's
    own action keeps it; threads other than the main one get no signals.

    Parameters
    ----------
    hint : str
        Written to standard error when a signal is noted, such as "stopping after this step".

    Yields
    ------
    Stop
    """
    found = {number: signal.getsignal(number) for number in SIGNALS}
    outer = [handler.stop for handler in found.values() if isinstance(handler, _Noting)]
    if outer or threading.current_thread() is not threading.main_thread():
        yield outer[0] if outer else Stop()
        return
    before: dict[int, Any] = {number: handler for number, handler in found.items() if callable(handler)}
    stop = Stop()
    for number in before:
        signal.signal(number, _Noting(stop, before, hint))
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stop:
        before[stop.noted[0]](stop.noted[0], None)
