"""The command line: parse, call the library, print.

Exit codes: 0 done, 1 a condition of `diff` holds, 2 bad input (one line on standard error says which), 130 interrupted,
141 nobody reads the output any more.
"""

from __future__ import annotations

import os
import warnings

import typer

# Each registers its commands, in the order in which they are listed.
from forgetcast.cli import (  # isort: skip
    pool,
    measure,
    features,
    start,
    atlas,
    atlas_files,
    atlas_exchange,
    forecast,
    plan,
    train,
    report,
    reproduce,
)
from forgetcast.cli.app import app, err, fail, out
from forgetcast.errors import ForgetcastError

__all__ = [
    "app",
    "atlas",
    "atlas_exchange",
    "atlas_files",
    "err",
    "features",
    "forecast",
    "main",
    "measure",
    "out",
    "plan",
    "pool",
    "report",
    "reproduce",
    "start",
    "train",
]


def main() -> None:
    """Run the command line; errors raised on purpose become one line and exit code 2."""
    # Between PEFT and Transformers; nothing that a user of the command could act on.
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
    warnings.showwarning = lambda message, *_, **__: err.print(f"warning: {message}", markup=False, soft_wrap=True)
    try:
        # Typer would print the user's words as they are. What a command returns here is the code of its `typer.Exit`.
        raise SystemExit(app(standalone_mode=False) or 0)
    except ForgetcastError as error:
        fail(str(error))
    except OSError as error:
        name, reason = error.filename2 or error.filename, error.strerror or str(error)
        fail(reason if name is None else f"{os.fsdecode(name)}: {reason}")
    except typer.Abort:  # into which Typer turns an EOFError
        fail("what was read ends too early")
    except Exception as error:
        if (said := _usage(error) or _foreign(error)) is None:
            raise  # a fault of this package, which a traceback helps to find
        fail(said)


def _usage(error: Exception) -> str | None:
    """Say in one line what is wrong with the words of a command; None if something else is wrong.

    The base class of Typer's exceptions is Click's in some of its versions and a copy of it in others, so they are told
    by what they can do.
    """
    message, context = getattr(error, "format_message", None), getattr(error, "ctx", None)
    if message is None:
        return None
    if type(error).__name__ == "NoArgsIsHelpError":  # the help text is printed already
        raise SystemExit(2)
    reason = " ".join(message().split()).removesuffix(".").replace(": Value error, ", ": ", 1)
    return reason if context is None else f"{reason}; see {context.command_path} --help"


_FOREIGN = (
    "_pickle",
    "pickle",
    "pyarrow",
    "safetensors",
    "torch",
    "yaml",
    "jinja2",
    "zipfile",
    "zlib",
    "huggingface_hub",
)
"""Packages whose errors are about what a file holds, or about the machine."""


def _foreign(error: Exception) -> str | None:
    """Say in one line what a library or the machine has met; None where the fault may be ours."""
    first = (str(error).splitlines() or [""])[0][:300]
    if isinstance(error, MemoryError) or "allocate memory" in first or "out of memory" in first:
        return "out of memory; take fewer or shorter examples at once, or a machine with more" + f" ({first})" * bool(
            first
        )
    if isinstance(error, RecursionError):
        return "what was read is nested too deeply"
    if isinstance(error, OverflowError | UnicodeError) or type(error).__module__.partition(".")[0] in _FOREIGN:
        return f"{first or 'what was read cannot be used'} ({type(error).__name__})"
    return None
