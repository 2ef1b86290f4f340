"""The exceptions of forgetcast.

    ForgetcastError
    ├── DataError           an invalid file, line, field or array
    │   └── MismatchError   inputs that do not belong together (another pool, another model, unknown ids)
    ├── ConfigError         an invalid setting or recipe
    ├── MissingExtraError   an optional dependency that is not installed
    └── IncompleteError     a part of the work failed, and the rest is done

The command line prints their message as one line and exits with code 2, or 1 for an IncompleteError.
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


class IncompleteError(ForgetcastError):
    """A part of the work failed, and the rest is done.

    Attributes
    ----------
    failures : dict
        Reason by the name of what failed.
    """

    def __init__(self, done: str, failures: dict[str, str]) -> None:
        super().__init__(f"{done}; failed: " + "; ".join(f"{name}: {reason}" for name, reason in failures.items()))
        self.failures = failures
