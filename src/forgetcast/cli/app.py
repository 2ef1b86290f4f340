"""What all commands share: the application, their common options, and how they print."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from forgetcast.atlas.store import Atlas
from forgetcast.cli.tables import facts_table
from forgetcast.data.recipe import Recipe
from forgetcast.errors import ConfigError
from forgetcast.experiments.runs import OnProgress
from forgetcast.settings import check_settings

app = typer.Typer(
    name="forgetcast",
    help="Forecast what a language model will forget before you fine-tune it, and replay just enough to keep it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
out, err = Console(highlight=False), Console(stderr=True, highlight=False)

SECONDS_BETWEEN_LINES = 15
"""Of progress, where the output is no terminal but a log."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
AtlasPath = Annotated[Path, typer.Argument(help="The atlas's directory.")]
ByAnswers = Annotated[
    bool, typer.Option("--exact-match", help="Forgetting as right answers that became wrong, not by the loss.")
]
ModelName = Annotated[str, typer.Argument(help="A Hugging Face model directory (or a PEFT adapter's), or a hub id.")]
Device = Annotated[
    str | None, typer.Option(help="Such as cpu or cuda:0, or auto: over all GPUs; default: a GPU if there is one.")
]
RecipeName = Annotated[
    str | None, typer.Option(help="YAML file: method, steps, learning_rate, ...; or one that ships: paper, lora.")
]
OnlineAt = Annotated[
    str | None,
    typer.Option(help="Forecast anew from probes of the model in training after these shares of the steps: 0.25,0.5."),
]
NumberOfProbes = Annotated[int, typer.Option("--probes", min=1, help="How many, with --online.")]
Repeat = Annotated[bool, typer.Option("--repeat", help="Let a long fine-tune replay examples again once all were.")]
TrustCode = Annotated[bool, typer.Option("--trust-remote-code", help="Let code that comes with the model run.")]


def recipe_of(name: str | None, atlas: Atlas) -> Recipe:
    """A recipe by its file or name, or that of the atlas."""
    if name is not None:
        return Recipe.load(name)
    return check_settings(atlas.recipe, Recipe, where=f"the recipe of {atlas.path}")


def fractions(text: str, option: str) -> list[float]:
    """Read "1/32,0.125" as numbers."""
    try:
        return [float(Fraction(part)) for part in text.split(",")]
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"{option}: {text!r} is not a share, nor several, such as 0.1,1/2") from None


def numbers(text: str, option: str) -> list[int]:
    """Read "3,5,10-12" as [3, 5, 10, 11, 12]."""
    numbers: list[int] = []
    for part in text.split(","):
        ends = part.split("-")
        if not 1 <= len(ends) <= 2 or not all(end.strip().isdigit() for end in ends):
            raise ConfigError(f"{option}: {part!r} is not a number, nor a range such as 10-19")
        numbers.extend(range(int(ends[0]), int(ends[-1]) + 1))
    return numbers


def is_first() -> bool:
    """Whether this is the process that writes and prints, of those that `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


def alone(command: str) -> None:
    """Refuse several processes where they would do the same work twice."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"`{command}` is one process's work; only `score` and `train` share theirs among several")


def print_all(parts: Iterable[RenderableType]) -> None:
    """Print tables and sentences one after the other."""
    for part in parts:
        out.print(part)


def show(facts: dict[str, Any], as_json: bool, *, title: str) -> None:
    """Print facts as a table, or as JSON."""
    if as_json:
        print_json(facts)
    else:
        out.print(facts_table(title, facts))


def print_json(value: Any) -> None:
    """Print JSON on standard output."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


@contextmanager
def progress(*, resumable: bool = True) -> Iterator[OnProgress]:
    """Bar with the time left, on standard error; where that is no terminal, a line now and then instead."""
    if not is_first():
        yield lambda *_: None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, speed_estimate_period=120) as bar:
        row = bar.add_task("starting", total=None)
        printed = time.monotonic()

        def report(what: str, done: int, total: int) -> None:
            nonlocal printed
            bar.update(row, description=what, completed=done, total=total)
            if not err.is_terminal and time.monotonic() - printed > SECONDS_BETWEEN_LINES:
                printed = time.monotonic()
                left = bar.tasks[row].time_remaining
                guess = f", {timedelta(seconds=round(left))} left" if left is not None else ""
                err.print(f"{done / total:4.0%}{guess}  {what}", markup=False)

        try:
            yield report
        except KeyboardInterrupt:
            if resumable:
                err.print("interrupted; what was finished is kept, and the same command goes on from there")
            raise typer.Exit(130) from None
