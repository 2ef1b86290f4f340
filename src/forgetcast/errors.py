"""The exceptions of forgetcast.

    ForgetcastError
    ├── DataError           an invalid file, line, field or array
    │   └── MismatchError   inputs that do not belong together (another pool, another model, unknown ids)
    ├── ConfigError         an invalid setting or recipe
    └── MissingExtraError   an optional dependency that is not installed

The command line prints their message as one line and exits with code 2.
"""

from __future__ import annotations


class ForgetcastError(Exception):
    """Base class of all exceptions of this package."""


class DataError(ForgetcastError, ValueError):
    """An invalid file, line, field or array."""


class MismatchError(DataError):
    """Inputs that do not belong together: another pool, another base model, unknown ids."""


class ConfigError(ForgetcastError, ValueError):
    """An invalid setting or recipe."""


class MissingExtraError(ForgetcastError, ImportError):
    """An optional dependency is missing; the message is the command that installs it."""

    def __init__(self, extra: str, cause: ImportError) -> None:
        super().__init__(f"{cause.name or cause} is not installed; run: pip install 'forgetcast[{extra}]'")
