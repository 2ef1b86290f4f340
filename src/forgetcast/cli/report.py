"""Commands that show the whole workflow: report, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from forgetcast.cli.app import app, out, print_all, print_json, progress, require_single_process
from forgetcast.cli.options import REPORT, AsJson, AtlasPath, Output
from forgetcast.files import check_destination


@app.command(rich_help_panel=REPORT)
def report(
    atlas: AtlasPath,
    output: Output,
    forecast: Annotated[list[Path] | None, typer.Option(help="Forecast file; repeatable.")] = None,
    verification: Annotated[Path | None, typer.Option(help="Output of `verify`.")] = None,
    sequence: Annotated[Path | None, typer.Option(help="Output of `sequence`.")] = None,
    similarity: Annotated[Path | None, typer.Option(help="Output of `bench --similarity`.")] = None,
    reproduction: Annotated[Path | None, typer.Option(help="Output of `reproduce --result`.")] = None,
    watch: Annotated[list[Path] | None, typer.Option(help="forgetting.json of `train --watch`; repeatable.")] = None,
) -> None:
    """Write one HTML file with what was measured, what is forecast, and whether replay helped.

    Example: forgetcast report runs.atlas --forecast forecast.parquet -o report.html
    """
    from forgetcast.atlas import Atlas
    from forgetcast.completion.forecast import TaskForecast
    from forgetcast.completion.watch import WatchedRun
    from forgetcast.experiments import Reproduction, SequenceResult, Verification
    from forgetcast.report import write_report
    from forgetcast.similarity import SimilarityStudy

    check_destination(output)
    opened = Atlas.open(atlas)
    forecasts = [TaskForecast.load(path) for path in forecast or ()]
    verified = Verification.load(verification) if verification is not None else None
    sequence_result = SequenceResult.load(sequence) if sequence is not None else None
    study = SimilarityStudy.load(similarity) if similarity is not None else None
    watched = [WatchedRun.load(path) for path in watch or ()]
    write_report(
        output,
        opened,
        forecasts=forecasts,
        verification=verified,
        sequence=sequence_result,
        similarity=study,
        reproduction=Reproduction.load(reproduction) if reproduction is not None else None,
        watched=watched,
    )
    out.print(f"report written to {output}", markup=False)


@app.command(rich_help_panel=REPORT)
def demo(
    output: Output = Path("demo-output"),
    full: Annotated[bool, typer.Option("--full", help="40 tasks instead of 16.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run the whole workflow on the demo model: collect, forecast, replay, verify, report. Resumable.

    Example: forgetcast demo -o demo-output
    """
    from forgetcast.cli.tables import demo_tables
    from forgetcast.demo.run import FULL, STANDARD, run_demo

    require_single_process("demo")
    check_destination(output, folder=True)
    with progress() as on_progress:
        summary = run_demo(output, FULL if full else STANDARD, on_progress=on_progress)
    if as_json:
        print_json(summary)
    else:
        print_all(demo_tables(summary))
