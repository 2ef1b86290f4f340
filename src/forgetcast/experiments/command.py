"""Fine-tune with a program of the user's: it gets the task and a folder, and what it leaves there is scored."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from forgetcast.data.pool import Pool
from forgetcast.data.rendering import DEFAULT_RENDERING, Rendering
from forgetcast.errors import ConfigError, DataError, MismatchError
from forgetcast.experiments.meter import Meter, training_work
from forgetcast.experiments.runs import cost, score_with_progress
from forgetcast.files import make_folder, read_json, temporary_folder, write_json
from forgetcast.measure.scores import Scores

if TYPE_CHECKING:
    from forgetcast.lm import LanguageModel

PLACEHOLDERS = ("task", "output", "model", "seed")

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
"""Names of the Trainer's checkpoints."""

_RUN = "forgetcast-run.json"


class TrainerSettings(BaseModel):
    """A trainer of the user's.

    Attributes
    ----------
    command : str
        Program and arguments, run without a shell. `{task}` becomes the file of examples, `{output}` the folder for the
        model, `{model}` the base model, `{seed}` the row's seed.
    keep : bool
        Whether the model stays when its row is stored. It does not change the row, so it is no part of its recipe.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    command: str
    keep: bool = Field(default=False, exclude=True)

    @field_validator("command")
    @classmethod
    def _usable(cls, command: str) -> str:
        words = shlex.split(command)
        named = {name for word in words for name in _PLACEHOLDER.findall(word)}
        if missing := [name for name in ("task", "output") if name not in named]:
            raise ValueError(f"{{{missing[0]}}} is missing; the command must be told where the task and the output are")
        if odd := sorted(named.difference(PLACEHOLDERS)):
            raise ValueError(f"{{{odd[0]}}} is unknown; there are {', '.join(f'{{{name}}}' for name in PLACEHOLDERS)}")
        return command

    @property
    def has_seed(self) -> bool:
        """Whether the command is told the seed."""
        return "{seed}" in self.command


@dataclass(frozen=True)
class CommandTrainer:
    """Fine-tunes with a command; each run has a folder, with its log beside it.

    Attributes
    ----------
    settings : TrainerSettings
    model : str
        Directory or hub id of the base model.
    folder : Path
        Gets NAME/task.jsonl and NAME/model until the row is stored, and NAME.log.
    load : callable
        Loads a model from a folder, as the base model was loaded.
    rendering : Rendering
        That of the base model's scores.
    """

    settings: TrainerSettings
    model: str
    folder: Path
    load: Callable[[Path], LanguageModel]
    rendering: Rendering = DEFAULT_RENDERING

    def check(self) -> None:
        """Raise ConfigError if there is no such program."""
        program = shlex.split(self.settings.command)[0]
        if shutil.which(program) is None:
            raise ConfigError(f"trainer.command: there is no program {program}")

    @property
    def recipe(self) -> dict[str, Any]:
        """What the rows say of how their models were tuned."""
        return self.settings.model_dump()

    def run(
        self,
        name: str,
        task: Pool,
        judged: Pool,
        settings: Mapping[str, Any],
        meter: Meter,
        answers: Mapping[str, Any] | None = None,
    ) -> Scores:
        """Fine-tune, and score the judged examples; see `FineTune`.

        Raises
        ------
        DataError
            If the command fails, or leaves no model.
        MismatchError
            If the folder holds a model of another command or task.
        """
        started = time.monotonic()
        seed = settings["provenance"]["seed"]
        trained = self._train(name, task, seed)
        seconds = time.monotonic() - started
        meter.advance(f"{name}: fine-tuning", "training", training_work(task, len(task), None).training)
        tuned = replace(self.load(trained), rendering=self.rendering)
        started = time.monotonic()
        after = score_with_progress(tuned, judged, meter, name, answers)
        facts = {"settings": dict(settings), "cost": cost(seconds, None, time.monotonic() - started, after)}
        return replace(after, metadata={**after.metadata, **facts})

    def _train(self, name: str, task: Pool, seed: int) -> Path:
        """Return the folder of the tuned model; one that an interrupted collection left is used again."""
        folder = self._folder(name)
        log, model = folder.with_suffix(folder.suffix + ".log"), folder / "model"
        run = {"command": self.settings.command, "model": self.model, "task": task.fingerprint, "seed": seed}
        if not model.exists():
            task.save(folder / "task.jsonl")
            # A folder of its own, so that nothing of a run that was killed is taken for this one's.
            output = temporary_folder(folder / "unfinished")
            try:
                self._call(log, {"task": str(folder / "task.jsonl"), "output": str(output), "seed": str(seed)})
                find_model(output)
                write_json(output / _RUN, {**run, "keep": self.settings.keep})
                try:
                    output.rename(model)
                except OSError:  # another process has finished the same run
                    if not model.exists():
                        raise
            finally:
                shutil.rmtree(output, ignore_errors=True)
        kept = _kept(model)
        if changed := ", ".join(what for what in run if kept.get(what) != run[what]):
            raise MismatchError(f"{model} is of a run with another {changed}; remove it, or use another atlas")
        return find_model(model)

    def has_model(self, name: str) -> bool:
        """Whether a model of a row is there, which an interrupted collection left."""
        return (self._folder(name) / "model").exists()

    def discard(self, name: str) -> None:
        """Remove the model of a row that is stored, unless it was to be kept when it was made; its log stays."""
        folder = self._folder(name)
        model = folder / "model"
        if not (model / _RUN).is_file() or _kept(model).get("keep") is not False:
            return
        shutil.rmtree(model)
        (folder / "task.jsonl").unlink(missing_ok=True)
        with suppress(OSError):  # another process is at work there
            (folder / "unfinished").rmdir()
            folder.rmdir()

    def _folder(self, name: str) -> Path:
        from forgetcast.atlas.rows import folder_of

        return self.folder / folder_of(name)

    def _call(self, log: Path, values: Mapping[str, str]) -> None:
        known = {**values, "model": self.model}
        words = [_PLACEHOLDER.sub(lambda match: known[match[1]], word) for word in shlex.split(self.settings.command)]
        make_folder(log.parent)
        with log.open("ab") as file:
            file.write(f"$ {shlex.join(words)}\n".encode())
            file.flush()
            code = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=file, stderr=file, check=False).returncode
        if code < 0:  # as by the kernel where memory runs out
            raise ChildProcessError(f"the command was killed by signal {-code}; its output is in {log}")
        if code:
            raise DataError(f"the command exited with {code}; its output is in {log}")


def _kept(model: Path) -> dict[str, Any]:
    """Return what is known of how a model was made; nothing if that is no JSON object."""
    kept = read_json(model / _RUN)
    return kept if isinstance(kept, dict) else {}


def find_model(folder: Path) -> Path:
    """Return the folder of a model or adapter: the folder itself, else its newest checkpoint.

    Raises
    ------
    DataError
        If there is none; names what is there.
    """
    numbered = [(int(match[1]), path) for path in folder.iterdir() if (match := CHECKPOINT.fullmatch(path.name))]
    for path in (folder, *(path for _, path in sorted(numbered, reverse=True))):
        has_weights = any(file.suffix in (".safetensors", ".bin") for file in path.iterdir())
        if has_weights and any((path / name).is_file() for name in ("adapter_config.json", "config.json")):
            return path
    names = sorted(path.name for path in folder.iterdir())
    there = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    raise DataError(
        f"the command left neither a model, nor an adapter, nor a checkpoint; there is {there or 'nothing'}"
    )
