"""Other processes that run a function of `support.dying`, often to be killed within it."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess

# The server imports the slow packages once; each process is a fork of it.
_context = get_context("forkserver")
_context.set_forkserver_preload(
    ["forgetcast.lm", "transformers.trainer", "transformers.models.llama.modeling_llama", "accelerate", "peft"]
)


def start(function: Callable[..., object], *arguments: object) -> tuple[ForkServerProcess, Connection]:
    """Start `function(*arguments, connection)` in another process; return the process and our end of the connection."""
    ours, theirs = _context.Pipe()
    process = _context.Process(target=function, args=(*arguments, theirs))
    process.start()
    return process, ours


def exit_code(function: Callable[..., object], *arguments: object) -> int | None:
    """Run `function(*arguments)` in another process and return its exit code."""
    process = _context.Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode
