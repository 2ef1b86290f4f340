"""What the benchmarks share: where they print and keep real models, how they draw, the targets, a JSON file of all."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def default_cache() -> Path:
    """Where real models, and texts for them, are kept."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("FORGETCAST_MODELS") or caches / "forgetcast" / "real-models")


def output() -> Console:
    """Where tables go; a log has no width, and a table that is cut there would lose its figures."""
    return Console(width=None if sys.stdout.isatty() else 140)


def figure_of(width: float, height: float) -> Figure:
    """Make an empty figure, in inches, which `save_figure` writes."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "forgetcast"})  # text as text, the same file every time
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure, without the date."""
    figure.savefig(path, metadata={"Date": None})


def target(name: str, value: float, bound: float, *, least: bool = False) -> dict[str, Any]:
    """A figure and what it has to hold up to: at most `bound`, or `least` that."""
    return {"name": name, "value": value, "bound": bound, "holds": value >= bound if least else value <= bound}


def conclude(
    console: Console, rows: list[dict[str, Any]], targets: list[dict[str, Any]], path: Path | None, *packages: str
) -> None:
    """Print the targets, and write all figures with the versions of `packages` to `path`, if there is one."""
    table = Table("target", "value", "bound", "holds", title="Targets")
    for t in targets:
        table.add_row(t["name"], f"{t['value']:.4g}", f"{t['bound']:g}", "yes" if t["holds"] else "NO")
    console.print(table)
    if path is None:
        return
    environment: dict[str, Any] = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        **{package: version(package) for package in ("forgetcast", "numpy", *packages)},
    }
    rows = [{k: None if isinstance(v, float) and np.isnan(v) else v for k, v in row.items()} for row in rows]
    path.write_text(json.dumps({"environment": environment, "rows": rows, "targets": targets}, indent=2))
