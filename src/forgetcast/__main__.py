"""Run the command line as a process of its own: what concerns its signals and standard streams.

Ctrl-C is taken care of when this module is imported, which the installed script does first; the command line takes a
while. Only modules that are loaded by then anyway come before it.
"""

from __future__ import annotations

import io
import os
import signal
import sys


def _interrupt(number: int, _: object) -> None:
    """End at once: an exception might be swallowed, or become another one, in a module that is being imported.

    Commands with something to put in order have a handler of their own meanwhile, see `cli.app.progress`.
    """
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"interrupted\n")  # not by `print`, which may be what is interrupted
    os._exit(128 + number)


# Where they are ignored, the command was started in the background, or by nohup: it stays deaf.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _interrupt)
if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
    signal.signal(signal.SIGTERM, _interrupt)

from typing import TextIO  # noqa: E402  # takes longer than all of the above

CLOSED_PIPE = 128 + 13
"""Exit code, as a shell reports a process that ends by the signal SIGPIPE."""


def main() -> None:
    """Run the command line; its exit codes are in `forgetcast.cli`."""
    sys.stdout, sys.stderr = _stream(sys.stdout), _stream(sys.stderr)

    from forgetcast.cli import main as run

    run()


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
