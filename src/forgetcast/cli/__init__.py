"""The command line: parse, call the library, print.

Exit codes: 0 done, 1 a condition of `diff` holds, 2 bad input (one line on standard error says which), 130 interrupted.
"""

from __future__ import annotations

import sys
import warnings

# Each registers its commands, in the order in which they are listed.
from forgetcast.cli import pool, measure, atlas, atlas_files, atlas_exchange, forecast, plan, train, report  # isort: skip
from forgetcast.cli.app import app, err, out
from forgetcast.errors import ForgetcastError

__all__ = [
    "app",
    "atlas",
    "atlas_exchange",
    "atlas_files",
    "err",
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
        err.print(f"error: {error}", markup=False, soft_wrap=True)
        sys.exit(2)
    except OSError as error:
        err.print(f"error: {error.filename or 'writing'}: {error.strerror or error}", markup=False, soft_wrap=True)
        sys.exit(2)
