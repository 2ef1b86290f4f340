"""What all commands share: the application, how they read options, and how they print.

Nothing here imports numpy, Arrow or torch: a help text answers at once, and each command imports what it runs.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from forgetcast.cli.options import ATLAS
from forgetcast.errors import ConfigError, DataError
from forgetcast.interruption import SIGNALS, Interrupted
from forgetcast.model_files import check_name
from forgetcast.text import did_you_mean, visible

if TYPE_CHECKING:
    from forgetcast.atlas import Atlas, ForgettingMatrix
    from forgetcast.cli.options import DataFormat, Loading
    from forgetcast.data import Pool, Recipe, Rendering
    from forgetcast.lm import FineTuner, LanguageModel

app = typer.Typer(
    name="forgetcast",
    help="Forecast what a language model will forget before you fine-tune it, and replay just enough to keep it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
atlas_app = typer.Typer(no_args_is_help=True, help="Create, check and share atlases.")
app.add_typer(atlas_app, name="atlas", rich_help_panel=ATLAS)


class _Console(Console):
    """A console that makes control characters of all texts visible, those in tables too, before they are measured."""

    def __init__(self, *, stderr: bool = False) -> None:
        # Emoji: a name such as a:warning:b is not meant so.
        super().__init__(stderr=stderr, highlight=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)

    def print(self, *parts: Any, **options: Any) -> None:
        """Print; sentences are wrapped on a terminal only, so that a line of a log is one line."""
        _said.set()
        if not self.is_terminal and all(isinstance(part, str | Text) for part in parts):
            options.setdefault("soft_wrap", True)
        super().print(*parts, **options)


_said = threading.Event()
"""Set once anything is on the screen."""

out, err = _Console(), _Console(stderr=True)

SECONDS_OF_SILENCE = 1.0
"""After so long without a word, a command on a terminal says that it is at work; it has taken a part of a second."""


@contextmanager
def never_silent() -> Iterator[None]:
    """Say on a terminal that the command is at work, once, if it has said nothing for a while."""

    def speak() -> None:
        if not _said.wait(SECONDS_OF_SILENCE):
            err.print("working", style="dim")

    if not (err.is_terminal and is_first()):
        yield
        return
    _said.clear()
    threading.Thread(target=speak, daemon=True).start()
    try:
        yield
    finally:
        _said.set()


SECONDS_BETWEEN_LINES = 15
"""Between two progress lines where the output is a log and no terminal."""


def fail(reason: str) -> NoReturn:
    """Say in one line why the command could not be done, and exit with code 2."""
    err.print(f"error: {' '.join(reason.splitlines())}", markup=False, soft_wrap=True)
    raise SystemExit(2)


def load_recipe(name: str | None, atlas: Atlas) -> Recipe:
    """Load a recipe by its file or name; default: that of the atlas, and an error if it has none of ours."""
    from forgetcast.data import Recipe

    if name is not None:
        return Recipe.load(name)
    if (recipe := recipe_of(atlas)) is None:
        raise ConfigError(f"the atlas {atlas.path} has no recipe of ours: say with --recipe how to fine-tune")
    return recipe


def recipe_of(atlas: Atlas) -> Recipe | None:
    """Return the recipe of an atlas; None where its rows were tuned by a command, or imported without a recipe."""
    from forgetcast.data import Recipe
    from forgetcast.settings import check_settings

    if not atlas.recipe or "command" in atlas.recipe:
        return None
    return check_settings(atlas.recipe, Recipe, where=f"the recipe of {atlas.path}")


def say_ratios(ratios: Iterable[float], recipe: Recipe) -> None:
    """Say on standard error what ratios become in whole batches; one that has none is an error."""
    from forgetcast.replay.plan import ratio_note

    for ratio in dict.fromkeys(ratios):
        if (note := ratio_note(ratio, recipe.steps, recipe.batch_size)) is not None and is_first():
            err.print(f"note: {note}", markup=False, soft_wrap=True)


def check_models(loading: Loading, *models: str | None) -> None:
    """Check that there are models of these names, before anything that takes long; None is no model."""
    for name in models:
        if name is not None:
            check_name(name, loading.arguments()["model_kwargs"])


def import_torch() -> None:
    """Import what models need: it takes seconds, so it is said, and comes last."""
    if "forgetcast.lm" not in sys.modules and is_first():
        err.print("loading PyTorch and Transformers", soft_wrap=True)
    import forgetcast.lm  # noqa: F401


def load_base(
    model: str, loading: Loading, atlas: Atlas | None = None, rendering: Rendering | None = None
) -> LanguageModel:
    """Load a base model, and check that it is the atlas's; by default, conversations are rendered as for the atlas."""
    from forgetcast.data import Rendering
    from forgetcast.experiments.runs import check_base, rendering_of

    check_models(loading, model)
    import_torch()
    from forgetcast.lm import load

    rendering = rendering or (Rendering() if atlas is None else rendering_of(atlas))
    base = replace(load(model, **loading.arguments()), rendering=rendering)
    if atlas is not None:
        check_base(atlas, base)
    return base


def arguments_as_scored(loading: Loading, atlas: Atlas) -> dict[str, Any]:
    """Return how to load a model to compare with an atlas's base: in the dtype of its scores, unless one is given."""
    arguments = loading.arguments()
    if "quantization" not in atlas.scored_with:
        arguments["dtype"] = arguments["dtype"] or atlas.scored_with.get("dtype")
    return arguments


def load_tuned(model: str, loading: Loading, atlas: Atlas) -> LanguageModel:
    """Load a tuned model, whose name is checked, to compare with an atlas's base: scored and rendered as that was."""
    from forgetcast.experiments.runs import rendering_of

    import_torch()
    from forgetcast.lm import load

    return replace(load(model, **arguments_as_scored(loading, atlas)), rendering=rendering_of(atlas))


def load_tuner(
    model: str,
    loading: Loading,
    atlas: Atlas | None = None,
    rendering: Rendering | None = None,
    *,
    sharded: bool = False,
) -> FineTuner:
    """Load a base model for fine-tuning, as `load_base`."""
    base = load_base(model, loading, atlas, rendering)  # first, because it says that PyTorch is imported
    from forgetcast.lm import FineTuner

    return FineTuner(base, sharded=sharded)


def load_matrix(location: str, *, exact_match: bool) -> ForgettingMatrix:
    """Read the forgetting matrix of an atlas, or one in a file."""
    from forgetcast.atlas import Atlas, ForgettingMatrix

    if not Path(location).is_file():
        return Atlas.open(location).matrix(measure="exact_match" if exact_match else "loss")
    if exact_match:
        raise ConfigError("--exact-match is for an atlas; a matrix in a file is what it is")
    return ForgettingMatrix.load(location)


def column_names(given: Iterable[str] | None) -> dict[str, str]:
    """Parse "prompt=frage" as a name here and a name in the data."""
    names = {}
    for text in given or ():
        field, sign, column = text.partition("=")
        if not sign or field in names:
            raise ConfigError(f"--column {text}: write it as prompt=NAME, once for each field")
        names[field.strip()] = column.strip()
    return names


def columns_of(given: Iterable[str] | None, names: Sequence[str], kind: str) -> tuple[list[str], dict[str, list[str]]]:
    """Tell the columns of all tasks or sources from those of one by its name, as "law:prompt=frage" is of law."""
    shared: list[str] = []
    own: dict[str, list[str]] = {name: [] for name in names}
    for text in given or ():
        name, colon, field = text.partition(":")
        if not colon or "=" in name:
            shared.append(text)
        elif name in own:
            own[name].append(field)
        else:
            hint = did_you_mean(name, names)
            raise ConfigError(f"--column {text}: there is no {kind} {name!r}; there are {', '.join(names)}{hint}")
    return shared, own


@contextmanager
def naming_columns(kind: str, count: int) -> Iterator[None]:
    """Say of columns that are not there how those of one among several tasks or sources are named."""
    from forgetcast.data.formats import NoColumnError

    try:
        yield
    except NoColumnError as error:
        if count < 2:
            raise
        one = kind.upper()
        raise DataError(f"{error}; to name a column of one {kind}, write --column {one}:FIELD=NAME") from None


def load_data(
    path: Path, format: DataFormat | None = None, columns: Iterable[str] | None = None, strict: bool = False
) -> Pool:
    """Read a pool or a task with a bar, and say on standard error what was understood."""
    from forgetcast.data import Pool

    with progress(resumable=False) as report:
        pool = Pool.load(
            path,
            format=format.value if format is not None else None,
            columns=column_names(columns),
            strict=strict,
            on_progress=lambda done, total: report(f"reading {path}", done, total),
        )
    say_read(pool)
    return pool


def load_tasks(
    where: Path | Sequence[Path], format: DataFormat | None, columns: Iterable[str] | None, strict: bool
) -> dict[str, Pool]:
    """Read every task of a folder, or of a list of files; the column "law:prompt=frage" is one of the task law."""
    from forgetcast.experiments.collect import load_tasks as read_tasks
    from forgetcast.experiments.collect import task_files

    return read_tasks(where, task_reader(list(task_files(where)), format, columns, strict))


def task_reader(
    names: Sequence[str], format: DataFormat | None, columns: Iterable[str] | None, strict: bool
) -> Callable[[Path], Pool]:
    """Return what reads the files of tasks of these names; the column "law:prompt=frage" is one of the task law."""
    from forgetcast.data.reader import data_name

    shared, own = columns_of(columns, names, "task")

    def read(path: Path) -> Pool:
        with naming_columns("task", len(own)):
            return load_data(path, format, [*shared, *own[data_name(path)]], strict)

    return read


def say_read(pool: Pool) -> None:
    """Say on standard error what was understood of a file, and what was skipped."""
    if is_first() and pool.report is not None:
        err.print(pool.report.line(), markup=False, soft_wrap=True)


def check_output_directory(path: Path) -> None:
    """Raise ConfigError unless the directory is new or empty."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} exists and is not empty; choose another directory")


def fractions(text: str, option: str) -> list[float]:
    """Parse "1/32,0.125" as numbers."""
    fault = ConfigError(f"{option}: {text!r} is no fraction, nor a list such as 0.1,1/2")
    values = []
    for part in text.split(","):
        above, sign, below = part.partition("/")
        try:
            values.append(float(above) / (float(below) if sign else 1.0))
        except (ValueError, ZeroDivisionError):
            raise fault from None
    if not all(map(math.isfinite, values)):
        raise fault
    return values


def seconds(text: str, option: str) -> float:
    """Parse "90s", "30m" or "2h" as a number of seconds."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smh])", text.strip())
    if found is None or not float(found[1]):
        raise ConfigError(f"{option}: {text!r} is no time such as 90s, 30m or 2h")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


MOST_NUMBERS = 100_000
"""So many numbers an option may list, ranges counted."""


def numbers(text: str, option: str) -> list[int]:
    """Parse "3,5,10-12" as [3, 5, 10, 11, 12]."""
    numbers: list[int] = []
    for part in text.split(","):
        if not (ends := re.fullmatch(r"\s*([0-9]{1,18})\s*(?:-\s*([0-9]{1,18})\s*)?", part)):
            raise ConfigError(f"{option}: {part!r} is not a number, nor a range such as 10-19")
        first, last = int(ends[1]), int(ends[2] or ends[1])
        if last - first + len(numbers) >= MOST_NUMBERS:
            raise ConfigError(f"{option}: {part!r} makes more than {MOST_NUMBERS:,} numbers")
        numbers.extend(range(first, last + 1))
    return numbers


def is_first() -> bool:
    """Whether this process writes and prints, of those that `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


def require_single_process(command: str) -> None:
    """Raise ConfigError if several processes would do the same work twice."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"`{command}` runs in one process; only `score` and `train` share their work among several")


def print_all(parts: Iterable[RenderableType]) -> None:
    """Print tables and sentences one after another."""
    for part in parts:
        out.print(part)


def show(facts: dict[str, Any], as_json: bool, *, title: str) -> None:
    """Print facts as a table, or as JSON."""
    from forgetcast.cli.tables import facts_table

    if as_json:
        print_json(facts)
    else:
        out.print(facts_table(title, facts))


def print_json(value: Any) -> None:
    """Print JSON on standard output."""
    print_text(json.dumps(value, indent=2, ensure_ascii=False))


def print_text(text: str) -> None:
    """Print text on standard output as it is, its lines not wrapped, but control characters visible."""
    sys.stdout.write(visible(text) + "\n")
    sys.stdout.flush()


class Pace:
    """Estimates the time left from all the work so far, whose total may change meanwhile."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None

    def left(self, done: int, total: int) -> float | None:
        """Return the seconds left after a report of finished and all units of work; None if they are not known yet."""
        now = time.monotonic()
        if self._first is None or done < self._first[1]:
            self._first = now, done
        since, before = self._first
        if done == before or now == since or not total:
            return None
        return max(total - done, 0) * (now - since) / (done - before)


@contextmanager
def progress(
    *, resumable: bool = True, above: Callable[[], RenderableType] | None = None
) -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar with the time left on standard error; if that is no terminal, print a line now and then.

    On a terminal, what `above` returns is shown above the bar.
    """

    class Bar(Progress):
        def get_renderables(self) -> Iterable[RenderableType]:
            return [*([above()] if above is not None else []), *super().get_renderables()]

    if not is_first():
        yield lambda *_: None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left: {task.fields[left]}"),
    )
    _said.set()
    with Bar(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        row = bar.add_task("starting", total=None, left="unknown")
        printed, doing, pace = time.monotonic(), "", Pace()

        def report(what: str, done: int, total: int) -> None:
            nonlocal printed, doing
            waits = not done and not total and what != doing  # for what a log would say nothing of
            doing, left = visible(what), pace.left(done, total)
            shown = str(timedelta(seconds=round(left))) if left is not None else "unknown"
            bar.update(row, description=doing, completed=done, total=total or None, left=shown)
            if err.is_terminal or not (waits or time.monotonic() - printed > SECONDS_BETWEEN_LINES):
                return
            printed = time.monotonic()
            if waits:
                err.print(doing, markup=False)
            elif total:
                err.print(f"{done / total:4.0%}, {shown} left  {what}", markup=False)
            else:  # of a stream
                err.print(f"{done:,}  {what}", markup=False)

        with _interruptible() as interrupted:
            try:
                yield report
            except BaseException as error:  # an import that is interrupted raises something else
                if not (interrupted or isinstance(error, Interrupted)):
                    raise
                bar.stop()
                if isinstance(error, Interrupted):
                    said, number = f"interrupted {error}; the same command goes on from there", error.number
                else:
                    said, number = "interrupted" + f" in {doing}" * bool(doing), interrupted[-1]
                    said += "; what was finished is kept, and the same command goes on from there" * resumable
                err.print(said, markup=False, soft_wrap=True)
                raise typer.Exit(128 + number) from None


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Let Ctrl-C and SIGTERM raise KeyboardInterrupt, for work that has something to put in order.

    Yield a list of the signals that came.
    """
    signals: list[int] = []

    def interrupt(number: int, _: object) -> None:
        signals.append(number)
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in SIGNALS}
    ours = {number: handler for number, handler in before.items() if callable(handler)}
    if threading.current_thread() is not threading.main_thread():
        ours = {}
    for number in ours:
        signal.signal(number, interrupt)
    try:
        yield signals
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
