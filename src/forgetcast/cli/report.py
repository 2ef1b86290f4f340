"""Commands that show the whole workflow: report, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from forgetcast.atlas.store import Atlas
from forgetcast.cli.app import AsJson, AtlasPath, alone, app, out, print_all, print_json, progress
from forgetcast.cli.tables import demo_tables
from forgetcast.completion.forecast import TaskForecast
from forgetcast.experiments.sequence_result import SequenceResult
from forgetcast.experiments.verify import Verification


@app.command(name="report")
def report_(
    atlas: AtlasPath,
    output: Annotated[Path, typer.Option("-o", "--output", help="HTML file to write.")],
    forecast: Annotated[list[Path] | None, typer.Option(help="Forecast file; repeatable.")] = None,
    verification: Annotated[Path | None, typer.Option(help="Output of `verify`.")] = None,
    sequence: Annotated[Path | None, typer.Option(help="Output of `sequence`.")] = None,
) -> None:
    """Write one HTML file with what was measured, what is forecast, and whether replay helped.

    Example: forgetcast report runs.atlas --forecast forecast.parquet -o report.html
    """
    from forgetcast.report import write_report

    opened = Atlas.open(atlas)
    forecasts = [TaskForecast.load(path) for path in forecast or ()]
    verified = Verification.load(verification) if verification is not None else None
    sequence_result = SequenceResult.load(sequence) if sequence is not None else None
    write_report(output, opened, forecasts=forecasts, verification=verified, sequence=sequence_result)
    out.print(f"report written to {output}", markup=False)


@app.command(name="demo")
def demo_(
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory for all output.")] = Path("demo-output"),
    full: Annotated[bool, typer.Option("--full", help="40 tasks instead of 16.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run the whole workflow on the demo model: collect, forecast, replay, verify, report. Resumable.

    Example: forgetcast demo -o demo-output
    """
    from forgetcast.demo.run import FULL, STANDARD, run_demo

    alone("demo")
    with progress() as report:
        summary = run_demo(output, FULL if full else STANDARD, on_progress=report)
    if as_json:
        print_json(summary)
    else:
        print_all(demo_tables(summary))
