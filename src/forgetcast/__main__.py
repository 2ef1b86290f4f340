"""Run the command line as a process of its own: what concerns its signals and standard streams.

Only modules that are loaded anyway are imported before Ctrl-C is taken care of; the command line takes a while.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import TextIO

CLOSED_PIPE, INTERRUPTED = 128 + 13, 128 + 2
"""Exit codes, as a shell reports processes that end by the signals SIGPIPE and SIGINT."""


def main() -> None:
    """Run the command line; its exit codes are in `forgetcast.cli`."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else started in the background: stay deaf
        signal.signal(signal.SIGINT, _interrupt)
    sys.stdout, sys.stderr = _stream(sys.stdout), _stream(sys.stderr)

    from forgetcast.cli import main as run

    run()


def _interrupt(*_: object) -> None:
    """End at once: an exception might be swallowed, or become another one, in a module that is being imported.

    Commands with something to put in order have a handler of their own meanwhile, see `cli.app.progress`.
    """
    os._exit(INTERRUPTED)


class _Stream(io.TextIOWrapper):
    """A standard stream that escapes what its encoding lacks, and ends the process quietly once nobody reads it."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            self._end()
            raise

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            self._end()
            raise

    def _end(self) -> None:
        """Raise SystemExit; what is still buffered goes nowhere, so that Python says nothing about it at its end."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        raise SystemExit(CLOSED_PIPE)


def _stream(stream: TextIO) -> TextIO:
    if not isinstance(stream, io.TextIOWrapper):  # closed, or replaced by a notebook
        return stream
    stream.flush()
    return _Stream(
        stream.buffer,
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


if __name__ == "__main__":
    main()
