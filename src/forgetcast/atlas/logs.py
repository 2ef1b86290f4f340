"""Make an atlas of the logs of another tool: those of a base model, and of its fine-tunes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from forgetcast.atlas.index import INDEX
from forgetcast.atlas.storage import whole_folder
from forgetcast.atlas.store import Atlas
from forgetcast.errors import DataError, MismatchError
from forgetcast.measure import inspect_logs, lm_eval
from forgetcast.measure.logs import LogTable
from forgetcast.measure.scores import Scores, check_units


def import_logs(base: Path, tuned: Sequence[Path], target: str | Path) -> tuple[Atlas, list[str]]:
    """Make an atlas with a row for each fine-tune; its examples are the samples that the base model was asked.

    Parameters
    ----------
    base : path
        Logs of lm-evaluation-harness or Inspect, as `read_lm_eval` and `read_inspect` take them.
    tuned : sequence of paths
        Logs of the fine-tunes. A row has the name of its folder or file.
    target : path or URL
        Where there is nothing yet.

    Returns
    -------
    Atlas
    list of str
        What was left out, a sentence each.

    Raises
    ------
    DataError
        If a log cannot be read, two have one name, or `target` exists.
    MismatchError
        If a sample was asked differently, or a fine-tune was asked nothing that the base model was.
    """
    names = [path.name if path.is_dir() else path.stem for path in tuned]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"two logs are called {repeated!r}, and a row has the name of its log; rename one")
    before, table, notes = _read(base)
    pool = table.pool(base)
    if unsaid := len(before) - len(pool):
        notes.append(f"{base}: {unsaid} samples left out: the log does not say what was asked or what is right")
    before = before.subset(pool.ids)
    before = replace(before, metadata={**before.metadata, "pool": pool.fingerprint})
    with whole_folder(target, INDEX) as made:
        atlas = Atlas.create(made, pool, before, model=str(before.metadata.get("model") or base.name))
        for name, path in zip(names, tuned, strict=True):
            after, _, more = _read(path)
            known = after.index.select(np.flatnonzero(pool.ids.find(after.ids) >= 0))
            if not known:
                raise MismatchError(f"{path} has no sample of {base}; run the same tasks on both models")
            check_units(before.metadata, after.metadata, str(path))
            if others := len(after) - len(known):
                more.append(f"{path}: {others} samples left out that {base} does not have")
            notes += more
            facts = {"origin": after.metadata["origin"], "not_in_pool": others}
            atlas.add(name, after.subset(known), provenance=facts)
    return Atlas.open(target), notes


def _read(path: Path) -> tuple[Scores, LogTable, list[str]]:
    reader = inspect_logs if inspect_logs.is_inspect(path) else lm_eval
    table, metadata = reader.read_table(path)
    scores, _ = table.scores(path, metadata)
    return scores, table, [f"{path}: {note}" for note in table.notes]
