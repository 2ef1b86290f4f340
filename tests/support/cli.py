"""The command line in this process."""

from __future__ import annotations

from collections.abc import Callable

RunCommand = Callable[..., tuple[int, str, str]]
"""Exit code, standard output and standard error of a command, given its words."""
