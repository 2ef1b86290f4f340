"""The command line: parse, call the library, print.

Exit codes: 0 done, 1 a condition of `diff` holds, 2 bad input (one line on standard error says which), 130 interrupted
(143: by SIGTERM), 141 nobody reads the output any more.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

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
from forgetcast.cli.app import app, err, fail, never_silent, out
from forgetcast.errors import ForgetcastError
from forgetcast.text import did_you_mean, visible

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
    _quieten()
    command = _without_types_of_flags(typer.main.get_command(app))
    try:
        # Typer would print the user's words as they are. What a command returns here is the code of its `typer.Exit`.
        with never_silent():
            raise SystemExit(command(standalone_mode=False) or 0)
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


def _quieten() -> None:
    """Show the warnings of this package, and of the libraries their errors only, unless Python was asked for more.

    What libraries say below that is for the callers of their functions; what matters of it to who uses the command is
    said here in other words. `PYTHONWARNINGS=default forgetcast ...` shows everything.
    """
    if sys.warnoptions:
        return
    logging.disable(logging.WARNING)
    ours = str(Path(__file__).parents[1])

    def show(message: Warning | str, category: type[Warning], filename: str, *_: object, **__: object) -> None:
        if filename.startswith(ours) and not issubclass(category, DeprecationWarning | FutureWarning):
            err.print(f"warning: {message}", markup=False, soft_wrap=True)

    warnings.showwarning = show


def _without_types_of_flags(command: Any) -> Any:
    """Return a command whose help, and that of its sub-commands, does not call options without a value <bool>."""
    get_params = command.get_params

    def with_empty_names(context: Any) -> list[Any]:
        parameters: list[Any] = get_params(context)
        for parameter in parameters:
            if getattr(parameter, "is_flag", False) and parameter.metavar is None:
                parameter.metavar = ""
        return parameters

    command.get_params = with_empty_names
    for each in getattr(command, "commands", {}).values():
        _without_types_of_flags(each)
    return command


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
    if (given := getattr(error, "option_name", None)) is not None and hasattr(error, "possibilities"):
        reason = f"there is no option {visible(given)}{did_you_mean(given, error.possibilities or ())}"
    elif (choice := _CHOICE.search(reason)) is not None:
        reason += did_you_mean(choice[1], re.findall("'([^']*)'", choice[2]))
    elif (command := _COMMAND.match(reason)) is not None and context is not None:
        reason = f"there is no command '{command[1]}'{did_you_mean(command[1], context.command.commands)}"
    return reason if context is None else f"{reason}; see {context.command_path} --help"


_CHOICE = re.compile(r"'([^']*)' is not one of (.*)$")
_COMMAND = re.compile(r"No such command '([^']*)'")

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
