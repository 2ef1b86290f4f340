"""The command line: parse, call the library, print.

Exit codes: 0 done, 1 a condition of `diff` holds, 2 bad input (one line on standard error says which), 130 interrupted,
141 nobody reads the output any more.
"""

from __future__ import annotations

import os
import warnings

# Each registers its commands, in the order in which they are listed.
from forgetcast.cli import pool, measure, features, atlas, atlas_files, atlas_exchange, forecast, plan, train, report  # isort: skip
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
    "train",
]


def main() -> None:
    """Run the command line; errors raised on purpose become one line and exit code 2."""
    # Between PEFT and Transformers; nothing that a user of the command could act on.
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
    warnings.showwarning = lambda message, *_, **__: err.print(f"warning: {message}", markup=False, soft_wrap=True)
    try:
        app()
    except ForgetcastError as error:
        fail(str(error))
    except OSError as error:
        name, reason = error.filename2 or error.filename, error.strerror or str(error)
        fail(reason if name is None else f"{os.fsdecode(name)}: {reason}")
    except Exception as error:
        if (said := _foreign(error)) is None:
            raise  # a fault of this package, which a traceback helps to find
        fail(said)


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
