"""Tuned models of a sweep that are kept, so that they can be scored on another pool later."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgetcast.atlas.rows import folder_of
from forgetcast.errors import MismatchError
from forgetcast.files import read_json, temporary_folder, write_json

if TYPE_CHECKING:
    from forgetcast.lm import Tuned

_RUN = "run.json"
_LONGEST = 200


@dataclass(frozen=True)
class KeptModels:
    """A folder with a model, or a LoRA adapter, for each row of a sweep, as `forgetcast train` writes it.

    Attributes
    ----------
    folder : Path
    """

    folder: Path

    def path(self, name: str) -> Path:
        """Return the folder of a row's model: of its name, which `forgetcast add` takes for its row."""
        plain = name == Path(name).name and name[0] != "." and len(os.fsencode(name)) <= _LONGEST
        return self.folder / (name if plain else folder_of(name))

    def lacking(self, names: Iterable[str]) -> list[str]:
        """Return those of the rows that have no model here."""
        return [name for name in names if not self.path(name).is_dir()]

    def check(self, name: str, run: Mapping[str, Any]) -> None:
        """Check, before a fine-tune, that its place is free, or has a model of the same fine-tune.

        Parameters
        ----------
        name : str
            Of the row.
        run : mapping
            What the model depends on, as in `Tuned.run`: `base`, `task`, `recipe`.

        Raises
        ------
        MismatchError
            If another model is there.
        """
        path = self.path(name)
        if not path.exists():
            return
        kept = read_json(path / _RUN) if (path / _RUN).is_file() else None
        changed = [what for what in run if not isinstance(kept, dict) or kept.get(what) != run[what]]
        if changed:
            raise MismatchError(
                f"{path} is of a fine-tune with another {', '.join(changed)}; remove it, or name another folder as "
                "keep_models"
            )

    def save(self, name: str, tuned: Tuned) -> None:
        """Write a row's model, with `run.json` beside it; one of the same fine-tune that is there is replaced."""
        path, unfinished = self.path(name), self.folder / ".unfinished"
        output = temporary_folder(unfinished)
        try:
            tuned.save(output)
            write_json(output / _RUN, tuned.run)
            if path.exists():  # of a process that was stopped before it had stored the row
                shutil.rmtree(path)
            output.rename(path)
        finally:
            shutil.rmtree(output, ignore_errors=True)
            with suppress(OSError):  # another process is at work there
                unfinished.rmdir()
