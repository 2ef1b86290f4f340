"""Share an atlas as a data set of the Hugging Face Hub, and read such a data set back.

README.md            the card: what was measured, of which model, and how to load it
forgetting.parquet   a row per task: its name, the forgetting of each example, flips, provenance as JSON
pool.parquet         the examples, in the order of the numbers
before.parquet       scores of the base model on them
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from pydantic import ValidationError

from forgetcast.atlas.index import BEFORE, INDEX, POOL
from forgetcast.atlas.rows import FLIPPED, FORGETTING, PartInfo
from forgetcast.atlas.storage import FolderStorage, storage_of, whole_folder
from forgetcast.atlas.store import Atlas
from forgetcast.data.pool import Pool
from forgetcast.errors import DataError
from forgetcast.faults import in_words
from forgetcast.files import atomic_path, check_seal, opened_parquet, read_metadata, write_parquet
from forgetcast.measure.scores import Scores
from forgetcast.text import markdown_text

if TYPE_CHECKING:
    import pyarrow as pa

ROWS, CARD = "forgetting.parquet", "README.md"

_VERSION = "forgetcast_dataset"
"""Key of the format's version in the metadata of the rows."""

_SHOWN = 100
"""Tasks in the card's table."""


def export_dataset(atlas: Atlas, folder: str | Path) -> None:
    """Write an atlas as a folder that `datasets.load_dataset` reads and the Hub shows.

    Parameters
    ----------
    atlas : Atlas
    folder : path
        Where there is nothing yet.

    Raises
    ------
    DataError
        If `folder` exists, or the atlas is damaged.
    """
    tasks: list[tuple[str, float, float]] = []
    with whole_folder(folder, CARD) as made:
        made.mkdir()
        atlas.pool.save(made / POOL)
        atlas.before.save(made / BEFORE)
        about = {
            _VERSION: 1,
            "model": atlas.model,
            "pool": atlas.pool_fingerprint,
            "examples": len(atlas.examples),
            "recipe": atlas.recipe,
            "replays": atlas.replays,
        }
        with atomic_path(made / ROWS) as temporary, temporary.open("w+b") as file:
            write_parquet(_tables(atlas, tasks), _schema(atlas.has_answers), file, about)
        with atomic_path(made / CARD) as temporary:
            temporary.write_text(_card(atlas, tasks), encoding="utf-8")


def _schema(answers: bool) -> pa.Schema:
    import pyarrow as pa

    columns = [("task", pa.string()), (FORGETTING, pa.list_(pa.float32()))]
    columns += [(FLIPPED, pa.list_(pa.float32()))] if answers else []
    return pa.schema([*columns, ("provenance", pa.string())])


def _tables(atlas: Atlas, tasks: list[tuple[str, float, float]]) -> Iterator[pa.Table]:
    """Yield a table for each row, and note its name, share measured and mean."""
    import pyarrow as pa

    schema = _schema(atlas.has_answers)
    for task in atlas.tasks:
        info, values = atlas.read_row(task)
        measured = ~np.isnan(values[FORGETTING])
        mean = float(values[FORGETTING][measured].mean(dtype=np.float64)) if measured.any() else np.nan
        tasks.append((task, float(measured.mean()), mean))
        # Not measured is null, which every reader knows.
        columns = {name: [pa.array(column, pa.float32(), from_pandas=True)] for name, column in values.items()}
        lists = {name: pa.array(column, pa.list_(pa.float32())) for name, column in columns.items()}
        yield pa.table({"task": [task], **lists, "provenance": [json.dumps(info)]}, schema=schema)


def _card(atlas: Atlas, tasks: list[tuple[str, float, float]]) -> str:
    model = _public_name(atlas.model)
    examples = len(atlas.examples)
    header = {
        "pretty_name": f"Forgetting of {model}",
        "tags": ["forgetcast", "forgetting", "fine-tuning"],
        "size_categories": [_size(examples)],
        "configs": [
            {"config_name": name, "data_files": file, **({"default": True} if name == FORGETTING else {})}
            for name, file in ((FORGETTING, ROWS), ("pool", POOL), ("before", BEFORE))
        ],
    }
    more = [f"| and {len(tasks) - _SHOWN} more | | |"] if len(tasks) > _SHOWN else []
    name = markdown_text(model)
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# Forgetting of {name}",
        "",
        f"How much the loss of each of {examples:,} examples rises when {name} is fine-tuned on each of {len(tasks):,} "
        "tasks: loss after minus loss before, in nats per target token. Positive means forgotten; null means not "
        "measured.",
        "",
        f"- Base model: {name}" + (f", weights {atlas.model_hash[:12]}" if atlas.model_hash else ""),
        f"- Pool: {examples:,} examples, fingerprint {atlas.pool_fingerprint[:12]}",
        f"- Measured: {np.mean([share for _, share, _ in tasks] or [0]):.0%} of all entries",
        "- Licence: not stated here; that of the texts in `pool.parquet` applies to them",
        "",
        "## Files",
        "",
        f"- `{ROWS}`: a row per task: `task`, `{FORGETTING}` (a number per example, in the order of the pool), "
        + (f"`{FLIPPED}` (1 where a right answer became wrong), " if atlas.has_answers else "")
        + "`provenance` (JSON)",
        f"- `{POOL}`: the examples: `id`, texts, `source`",
        f"- `{BEFORE}`: the base model's loss of each example",
        "",
        "## Use",
        "",
        "```python",
        "import datasets",
        "",
        'rows = datasets.load_dataset("THIS_DATASET", "forgetting", split="train")',
        'pool = datasets.load_dataset("THIS_DATASET", "pool", split="train")',
        "```",
        "",
        "or, to forecast what a new fine-tune will forget:",
        "",
        "```console",
        "$ forgetcast atlas import FOLDER -o shared.atlas",
        "$ forgetcast probes shared.atlas -k 10 -o probes.jsonl",
        "```",
        "",
        "## Tasks",
        "",
        "| task | measured | mean forgetting |",
        "|---|---|---|",
        *(f"| {markdown_text(task)} | {share:.0%} | {mean:.4f} |" for task, share, mean in tasks[:_SHOWN]),
        *more,
    ]
    return "\n".join(lines) + "\n"


def _public_name(model: str) -> str:
    """Return a hub id as it is, and of a path the last part: the rest is only true on one machine."""
    return (
        model
        if model.count("/") == 1 and model[0] not in "./~"
        else model.rstrip("/\\").replace("\\", "/").rpartition("/")[2]
    )


def _size(examples: int) -> str:
    """Return the Hub's category of a size."""
    steps = ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B"]
    return steps[min(max(len(str(examples)) - 3, 0), len(steps) - 1)]


def import_dataset(source: str | Path, target: str | Path) -> Atlas:
    """Make an atlas of a folder that `export_dataset` wrote, with the same numbers, texts and provenance.

    Parameters
    ----------
    source : path or URL
        Such as `hf://datasets/NAME`.
    target : path or URL
        Where there is nothing yet.

    Raises
    ------
    DataError
        If `target` exists, or a file is missing, damaged or something else.
    MismatchError
        If the files do not belong together.
    """
    storage = storage_of(source)
    if isinstance(storage, FolderStorage):
        return _imported(storage.location, target)
    with tempfile.TemporaryDirectory(prefix="forgetcast-") as folder:
        for name in (ROWS, POOL, BEFORE):
            try:
                (Path(folder) / name).write_bytes(storage.read(name))
            except FileNotFoundError:
                raise DataError(f"{source} is not the data set of an atlas: {name} is missing") from None
        return _imported(Path(folder), target)


def _imported(folder: Path, target: str | Path) -> Atlas:
    for name in (ROWS, POOL, BEFORE):
        if not (folder / name).is_file():
            raise DataError(f"{folder} is not the data set of an atlas: {name} is missing")
        check_seal(folder / name)
    about, pool, before = _about(folder / ROWS), Pool.load(folder / POOL), Scores.load(folder / BEFORE)
    if pool.fingerprint != about["pool"]:
        raise DataError(f"{folder / POOL} is another pool than the one that was scored; put back a copy of it")
    with whole_folder(target, INDEX) as made:
        atlas = Atlas.create(made, pool, before, model=about["model"], recipe=about["recipe"])
        names: set[str] = set()
        for order, (info, values) in enumerate(_rows(folder / ROWS, atlas)):
            if info["name"] in names:
                raise DataError(f"{folder / ROWS}: the task {info['name']!r} occurs twice")
            names.add(info["name"])
            atlas.write_row(info, values, order)
        atlas.add_replays(about["replays"])
    return Atlas.open(target)


def _about(path: Path) -> dict[str, Any]:
    about = read_metadata(path)
    if about.get(_VERSION) != 1:
        raise DataError(f"{path} was not exported by `forgetcast atlas export`, or by a newer version of it")
    for name, type_ in (("model", str), ("pool", str), ("recipe", dict), ("replays", list)):
        if not isinstance(about.get(name), type_):
            raise DataError(f"{path}: {name} is missing in its metadata; export the atlas again")
    if not all(isinstance(run, Mapping) for run in about["replays"]):
        raise DataError(f"{path}: replays are not fine-tunes; export the atlas again")
    return about


def _rows(path: Path, atlas: Atlas) -> Iterator[tuple[dict[str, Any], dict[str, np.ndarray]]]:
    schema = _schema(atlas.has_answers)
    with opened_parquet(path) as file:
        if not file.schema_arrow.equals(schema):
            raise DataError(f"{path} has other columns than {', '.join(schema.names)}; export the atlas again")
        for batch in file.iter_batches(batch_size=1):
            (row,) = batch.select(["task", "provenance"]).to_pylist()
            where = f"{path}: the task {row['task']!r}"
            info = _info(row, where)
            values = {}
            for name in schema.names[1:-1]:
                values[name] = column = batch[name].values.to_numpy(zero_copy_only=False).astype(np.float32)
                if len(column) != len(atlas.examples):
                    raise DataError(f"{where} has {len(column)} numbers for {len(atlas.examples)} examples")
                found = column[~np.isnan(column)]
                if np.isinf(found).any() or (name == FLIPPED and not np.isin(found, (0, 1)).all()):
                    raise DataError(f"{where}: {name} has numbers that it cannot have")
            yield info, values


def _info(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    try:
        info = json.loads(row["provenance"])
        PartInfo.model_validate({"base": "", "examples": 0, **info})
    except ValidationError as error:
        raise DataError(f"{where}: {in_words(error)}") from None
    except (TypeError, ValueError, RecursionError):
        raise DataError(f"{where}: its provenance is no JSON object") from None
    if not row["task"] or info["name"] != row["task"]:
        raise DataError(f"{where}: its provenance is that of {info['name']!r}")
    return dict(info)
