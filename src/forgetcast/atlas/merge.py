"""Join atlases of one base model: the columns are all their examples, the rows all their tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from forgetcast.atlas.index import INDEX
from forgetcast.atlas.rows import FORGETTING
from forgetcast.atlas.storage import whole_folder
from forgetcast.atlas.store import Atlas
from forgetcast.data.pool import Pool
from forgetcast.errors import ConfigError, DataError, MismatchError
from forgetcast.measure.scores import Scores, settings_that_differ

SAME_LOSS = 1e-4
"""Nats per token by which two measurements of one base loss may differ: as much as other batches and another machine
change in single precision, and a hundredth of a small forgetting."""


def merge(
    target: str | Path,
    sources: Sequence[str | Path],
    *,
    priors: Sequence[str | Path] = (),
    keep_both: bool = False,
) -> Atlas:
    """Make an atlas of the rows of several, which are left as they are.

    An example of one source that another lacks is not measured in the other's rows. A row that several have is taken
    once: entries that both measured must be the same numbers, and others complement each other. Where the base losses
    were measured twice, the first source's count. Each row keeps its provenance, and has 'merged_from' in addition.

    Parameters
    ----------
    target : path or URL
        Where there is nothing yet.
    sources : sequence of paths or URLs
        Atlases of the same base model. Examples are the same if their ids are; then their texts, tokens and base
        losses have to be the same too.
    priors : sequence of paths or URLs
        Atlases of other versions of the model, whose tasks inform forecasts although the base is another one. A row
        of these is called TASK@ATLAS and has 'prior' and 'prior_base' in its provenance. Only examples of the
        sources are taken of it, by id and text; how many others it measured is in 'not_in_pool'.
    keep_both : bool
        Whether a row whose name another row has is kept as TASK@ATLAS if its numbers differ. Else this is an error.

    Returns
    -------
    Atlas

    Raises
    ------
    MismatchError
        If the base models, the examples that have the same id, or rows of the same name differ, or nothing says that
        the bases are the same.
    DataError
        If `target` exists, a name is taken, or a source is damaged.
    ConfigError
        If there are no sources.
    """
    if not sources:
        raise ConfigError("a merged atlas is made of at least one atlas")
    opened = [Atlas.open(source) for source in sources]
    older = [Atlas.open(prior) for prior in priors]
    with whole_folder(target, INDEX) as folder:
        pool, before = opened[0].pool, opened[0].before
        for atlas in opened[1:]:
            pool, before = _joined(opened[0], pool, before, atlas)
        recipes = [atlas.recipe for atlas in opened]
        common = recipes[0] if all(recipe == recipes[0] for recipe in recipes) else {}
        merged = Atlas.create(folder, pool, before, model=opened[0].model, recipe=common)
        rows = _Rows(merged)
        for atlas in opened:
            columns = pool.positions(atlas.examples)
            for task in atlas.tasks:
                rows.add(task, atlas, columns, keep_both)
            merged.add_replays(atlas.replays)
            rows.add_curves(atlas, columns)
        for atlas in older:
            _add_prior(rows, atlas, opened[0], pool)
    return Atlas.open(target)


@dataclass
class _Rows:
    """Writes rows in the order in which they come."""

    merged: Atlas

    def __post_init__(self) -> None:
        self.count = 0
        self.origins: dict[str, tuple[Atlas, int]] = {}

    def add(self, task: str, atlas: Atlas, columns: np.ndarray, keep_both: bool) -> None:
        """Write what a row has that is not there yet."""
        info, values = atlas.read_row(task)
        if all(np.isnan(column).all() for column in values.values()):
            return
        values = {name: self._spread(column, columns) for name, column in values.items()}
        order = self.count
        if task in self.origins:
            earlier, order = self.origins[task]
            known_info, known = self.merged.read_row(task)
            if difference := _difference(known_info, known, info, values, self.merged.examples):
                if not keep_both:
                    raise MismatchError(
                        f"the row {task!r} of {atlas.path} is another one than that of {earlier.path}: {difference}; "
                        f"drop one of them, or keep both with --keep-both, which names this one {_name(task, atlas)}"
                    )
                info, order = {**info, "name": _name(task, atlas)}, self.count
            else:
                for name, column in values.items():
                    column[~np.isnan(known[name])] = np.nan
                if all(np.isnan(column).all() for column in values.values()):
                    return
        self.write(info, values, atlas, order)

    def add_curves(self, atlas: Atlas, columns: np.ndarray) -> None:
        """Write what an atlas has of the learning curves of the rows that were taken from it."""
        for share in atlas.shares:
            source, target = atlas.at(share), self.merged.at(share)
            for task in source.tasks:
                name = next((each for each in (_name(task, atlas), task) if each in self.origins), None)
                if name is None:
                    continue
                info, values = source.read_row(task)
                values = {column: self._spread(found, columns) for column, found in values.items()}
                if name in target:
                    for column, found in target.read_row(name)[1].items():
                        values[column][~np.isnan(found)] = np.nan
                if not all(np.isnan(found).all() for found in values.values()):
                    target.write_row({**info, "name": name}, values, self.origins[name][1])

    def write(self, info: dict[str, Any], values: dict[str, np.ndarray], atlas: Atlas, order: int) -> None:
        """Write a row, or entries of one, with the atlas that it comes from."""
        task = info["name"]
        if task in self.origins and order == self.count:
            raise DataError(f"there are two rows {task!r}; rename the folder of {atlas.path}, after which one is named")
        origin = {"atlas": _label(atlas), "created": atlas.created, "pool": atlas.pool_fingerprint}
        merged_from = [*info.get("merged_from", []), origin]
        self.merged.write_row({**info, "merged_from": merged_from}, values, order)
        if order == self.count:
            self.origins[task] = atlas, order
            self.count += 1

    def _spread(self, values: np.ndarray, columns: np.ndarray) -> np.ndarray:
        everywhere = np.full(len(self.merged.examples), np.nan, np.float32)
        everywhere[columns] = values
        return everywhere


def _label(atlas: Atlas) -> str:
    """Return the name of an atlas's folder, without what may be private about its place."""
    return str(atlas.path).rstrip("/").rpartition("/")[2].removesuffix(".atlas")


def _name(task: str, atlas: Atlas) -> str:
    return f"{task}@{_label(atlas)}"


def _difference(
    known_info: dict[str, Any],
    known: dict[str, np.ndarray],
    info: dict[str, Any],
    values: dict[str, np.ndarray],
    examples: Sequence[str],
) -> str | None:
    """Say how two measurements of a row differ; None if they are of one fine-tune, as far as can be known."""
    for name, column in values.items():
        earlier = known.get(name, np.full_like(column, np.nan))
        different = np.flatnonzero(~np.isnan(earlier) & ~np.isnan(column) & (earlier != column))
        if len(different):
            at = int(different[0])
            return (
                f"{len(different)} of their numbers differ, e.g. the {name} of {examples[at]!r} is {column[at]:.6g} "
                f"and {earlier[at]:.6g}"
            )
    hashes = {known_info.get("model_hash"), info.get("model_hash")}
    if None not in hashes and len(hashes) > 1:
        return "it is of other weights"
    return None


def _joined(first: Atlas, pool: Pool, before: Scores, atlas: Atlas) -> tuple[Pool, Scores]:
    """Return the examples and base scores so far with those of one more atlas, after checking that they fit."""
    both = f"{first.path} and {atlas.path}"
    if None not in (first.model_hash, atlas.model_hash) and first.model_hash != atlas.model_hash:
        raise MismatchError(
            f"{both} are of other base models: {first.model} and {atlas.model} (by their weights); rows of another "
            f"version of one model can be used with --as-prior {atlas.path}"
        )
    if differing := settings_that_differ(before.metadata, atlas.before.metadata):
        raise MismatchError(f"{both} were scored differently: {', '.join(differing)}; score one of the pools again")
    at = pool.ids.find(atlas.examples)
    shared, new = np.flatnonzero(at >= 0), np.flatnonzero(at < 0)
    if not len(shared) and None in (first.model_hash, atlas.model_hash):
        raise MismatchError(
            f"nothing says that {both} have the same base: they share no example, and the hash of the weights is "
            "not known of both"
        )
    _check_shared(pool, before, atlas, at[shared], shared, both)
    before = _filled(before, atlas.before, at[shared], shared)
    if not len(new):
        return pool, before
    ids = atlas.examples.select(new)
    joined = Pool([*pool, *atlas.pool.subset(ids)])
    return joined, _appended(before, atlas.before.subset(ids), joined.fingerprint)


def _check_shared(pool: Pool, before: Scores, atlas: Atlas, here: np.ndarray, there: np.ndarray, both: str) -> None:
    """Raise MismatchError if examples of the same id have other texts, tokens, base losses or answers."""
    other = atlas.before
    texts = _other_texts(pool, atlas, here, there)
    losses, others = before.nll[here], other.nll[there]
    different = {
        "text": texts,
        "tokens": _other_tokens(before, other, here, there),
        "base loss": ~((np.abs(losses - others) <= SAME_LOSS) | (np.isnan(losses) & np.isnan(others))),
    }
    if before.exact_match is not None and other.exact_match is not None:
        right, right_there = before.exact_match[here], other.exact_match[there]
        different["base answer"] = ~np.isnan(right) & ~np.isnan(right_there) & (right != right_there)
    if not (anything := np.any(list(different.values()), axis=0)).any():
        return
    example = int(np.argmax(anything))
    what = [name for name, found in different.items() if found[example]]
    shown = f" ({losses[example]:.6g} and {others[example]:.6g})" if "base loss" in what else ""
    raise MismatchError(
        f"{both}: {int(anything.sum())} of {len(here)} shared examples differ, e.g. {pool.ids[int(here[example])]!r} "
        f"by {' and '.join(what)}{shown}; they are other examples or another base: give other ids, or score the pool "
        "with the same model"
    )


def _other_texts(pool: Pool, atlas: Atlas, here: np.ndarray, there: np.ndarray) -> np.ndarray:
    if pool.fingerprint == atlas.pool_fingerprint:
        return np.zeros(len(here), dtype=bool)
    pairs = zip(here.tolist(), there.tolist(), strict=True)
    return np.array([pool[i].digest() != atlas.pool[j].digest() for i, j in pairs], dtype=bool)


def _other_tokens(before: Scores, other: Scores, here: np.ndarray, there: np.ndarray) -> np.ndarray:
    if before.digests is None or other.digests is None:
        return np.zeros(len(here), dtype=bool)
    pairs = [(before.digests[i], other.digests[j]) for i, j in zip(here.tolist(), there.tolist(), strict=True)]
    return np.array([None not in pair and pair[0] != pair[1] for pair in pairs], dtype=bool)


def _filled(before: Scores, other: Scores, here: np.ndarray, there: np.ndarray) -> Scores:
    """Return the base scores with the answers and digests that only the other ones have of the same examples."""
    changes: dict[str, Any] = {}
    if other.exact_match is not None:
        right = np.full(len(before), np.nan) if before.exact_match is None else before.exact_match.copy()
        use = np.isnan(right[here])
        right[here[use]] = other.exact_match[there[use]]
        changes["exact_match"] = right
    for name in ("predictions", "digests"):
        if (values := getattr(other, name)) is not None:
            kept = list(getattr(before, name) or [None] * len(before))
            for i, j in zip(here.tolist(), there.tolist(), strict=True):
                kept[i] = values[j] if kept[i] is None else kept[i]
            changes[name] = kept
    return replace(before, **changes)


def _appended(before: Scores, more: Scores, fingerprint: str) -> Scores:
    """Return two scores one after the other; what one of them lacks is NaN or None there."""

    def joined(name: str) -> Any:
        parts = [getattr(scores, name) for scores in (before, more)]
        if all(part is None for part in parts):
            return None
        if any(isinstance(part, np.ndarray) for part in parts):
            sizes = zip(parts, (before, more), strict=True)
            return np.concatenate([np.full(len(s), np.nan) if part is None else part for part, s in sizes])
        return [
            value
            for part, scores in zip(parts, (before, more), strict=True)
            for value in (part if part is not None else [None] * len(scores))
        ]

    names = [field.name for field in fields(Scores) if field.name != "metadata"]
    return Scores(metadata={**before.metadata, "pool": fingerprint}, **{name: joined(name) for name in names})


def _add_prior(rows: _Rows, atlas: Atlas, first: Atlas, pool: Pool) -> None:
    """Write the rows of an atlas of another version of the base model, marked."""
    if atlas.model_hash is not None and atlas.model_hash == first.model_hash:
        raise MismatchError(f"{atlas.path} has the same base as {first.path}; give it without --as-prior")
    at = pool.ids.find(atlas.examples)
    there = np.flatnonzero(at >= 0)
    here = at[there]
    if not len(there):
        raise MismatchError(f"{atlas.path} has no example of {first.path}, so its rows say nothing about them")
    if (different := _other_texts(pool, atlas, here, there)).any():
        example = atlas.examples[int(there[int(np.argmax(different))])]
        raise MismatchError(
            f"{int(different.sum())} of {len(there)} examples of {atlas.path} have other texts than in {first.path}, "
            f"e.g. {example!r}; they are other examples: give other ids"
        )
    for task in atlas.tasks:
        info, values = atlas.read_row(task)
        measured = ~np.isnan(values[FORGETTING])
        # Whether an answer is lost depends on what the base answers right, so only losses are taken.
        kept = np.full(len(pool), np.nan, np.float32)
        kept[here] = values[FORGETTING][there]
        if np.isnan(kept).all():
            continue
        marks = {
            "name": _name(task, atlas),
            "prior": True,
            "prior_base": {"model": atlas.model, "model_hash": atlas.model_hash},
            "not_in_pool": int(measured.sum() - measured[there].sum()),
        }
        rows.write({**info, **marks}, {FORGETTING: kept}, atlas, rows.count)
