"""The command line's own copies and promises."""

from __future__ import annotations

import subprocess
import sys

from forgetcast.cli.options import ExportFormat, Method
from forgetcast.completion import METHODS
from forgetcast.replay.export import FORMATS


def test_choices_are_those_of_the_library() -> None:
    assert [method.value for method in Method] == list(METHODS)
    assert [kind.value for kind in ExportFormat] == list(FORMATS)


def test_help_needs_no_heavy_library() -> None:
    heavy = ("numpy", "scipy", "pyarrow", "torch", "zarr", "plotly")
    code = f"import sys, forgetcast.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
