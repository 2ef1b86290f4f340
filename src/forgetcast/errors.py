"""Every error that forgetcast raises on purpose.

    ForgetcastError
    ├── DataError           a file, a line, a field or an array that cannot be used
    │   └── MismatchError   two things that do not belong together (another pool, another model, unknown ids)
    ├── ConfigError         a setting or a recipe that cannot be used
    └── MissingExtraError   an optional dependency that is not installed

The command line prints the message of any of them as one line and exits with code 2.
"""

from __future__ import annotations


class ForgetcastError(Exception):
    """Base of all errors raised by this package."""


class DataError(ForgetcastError, ValueError):
    """A file, a line, a field or an array that cannot be used as it is."""


class MismatchError(DataError):
    """Two things that do not belong together: another pool, another base model, unknown ids."""


class ConfigError(ForgetcastError, ValueError):
    """A setting or a recipe that cannot be used."""


class MissingExtraError(ForgetcastError, ImportError):
    """An optional dependency is missing; the message is the line that installs it."""

    def __init__(self, extra: str, cause: ImportError) -> None:
        super().__init__(f"{cause.name or cause} is not installed; run: pip install 'forgetcast[{extra}]'")
