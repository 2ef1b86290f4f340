"""Scores: how well one model predicts each example of a pool, and how a later model's scores differ from them.

The unit is the mean negative log-likelihood in nats per target token; lower is better. An example that could not be
scored is NaN, with the reason beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from forgetcast._files import atomic_path
from forgetcast.errors import DataError, MismatchError

_METADATA_KEY = b"forgetcast"


@dataclass(frozen=True)
class Scores:
    """Per-example losses of one model on one pool.

    Parameters
    ----------
    ids : sequence of str, length N
    nll : array of float, shape (N,)
        Mean negative log-likelihood, nats per target token. NaN where the example could not be scored.
    tokens : array of int, shape (N,)
        Number of target tokens; 0 where the example could not be scored.
    truncated : array of bool, shape (N,)
        Whether the text was longer than the context and was cut.
    reasons : sequence of str or None, length N
        Why an example could not be scored; None where it was. Default: None for all.
    metadata : mapping
        Provenance that is saved with the numbers: 'model', 'model_hash', 'pool' (the pool's fingerprint), settings.
    exact_match : array of float, shape (N,), optional
        1 where the model's answer was right, 0 where it was wrong, NaN where it was not asked for one.
    predictions : sequence of str or None, length N, optional
        The answers.

    Raises
    ------
    DataError
        If lengths differ, ids repeat, a loss is infinite or negative, or is NaN without a reason.
    """

    ids: Sequence[str]
    nll: np.ndarray
    tokens: np.ndarray
    truncated: np.ndarray
    reasons: Sequence[str | None] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    exact_match: np.ndarray | None = None
    predictions: Sequence[str | None] | None = None

    def __post_init__(self) -> None:
        """Bring the arrays to their types and check them."""
        set_ = object.__setattr__
        set_(self, "ids", tuple(self.ids))
        set_(self, "nll", np.asarray(self.nll, dtype=np.float64))
        set_(self, "tokens", np.asarray(self.tokens, dtype=np.int64))
        set_(self, "truncated", np.asarray(self.truncated, dtype=bool))
        set_(self, "reasons", tuple(self.reasons) or (None,) * len(self.ids))
        n, names = len(self.ids), ["nll", "tokens", "truncated", "reasons"]
        if self.exact_match is not None:
            set_(self, "exact_match", np.asarray(self.exact_match, dtype=np.float64))
            names.append("exact_match")
        if self.predictions is not None:
            set_(self, "predictions", tuple(self.predictions))
            names.append("predictions")
        for name in names:
            if len(getattr(self, name)) != n:
                raise DataError(f"scores: {n} ids but {len(getattr(self, name))} values of {name!r}")
        if len(set(self.ids)) != n:
            raise DataError("scores: an id occurs twice")
        if self.exact_match is not None and not np.isin(self.exact_match[~np.isnan(self.exact_match)], (0, 1)).all():
            raise DataError("scores: an exact match must be 0, 1 or NaN")
        for i in np.flatnonzero(~((self.nll >= 0) & (self.nll < np.inf))).tolist():
            id_, value = self.ids[i], self.nll[i]
            if not np.isnan(value):
                raise DataError(f"scores: the loss of example {id_!r} is {value}; it must be finite and not negative")
            if self.reasons[i] is None:
                raise DataError(f"scores: the loss of example {id_!r} is NaN and no reason is given")

    def __len__(self) -> int:
        """Count the examples."""
        return len(self.ids)

    @property
    def pool_fingerprint(self) -> str | None:
        """Fingerprint of the pool that was scored, if it is known."""
        return self.metadata.get("pool")

    def at(self, ids: Iterable[str], *, where: str = "the scores") -> np.ndarray:
        """Losses of the examples with these ids, in their order, shape (len(ids),); NaN where there is none.

        Raises
        ------
        MismatchError
            If an id was not scored at all.
        """
        positions = {id_: i for i, id_ in enumerate(self.ids)}
        try:
            return self.nll[[positions[id_] for id_ in ids]]
        except KeyError as error:
            raise MismatchError(f"{where}: example {error.args[0]!r} has no score") from None

    def save(self, path: str | Path) -> None:
        """Write a Parquet file: id, nll, tokens, truncated, reason; exact_match and prediction where there are any."""
        columns = {
            "id": pa.array(self.ids, pa.string()),
            "nll": pa.array(self.nll, pa.float64()),
            "tokens": pa.array(self.tokens, pa.int64()),
            "truncated": pa.array(self.truncated, pa.bool_()),
            "reason": pa.array(self.reasons, pa.string()),
        }
        if self.exact_match is not None:
            columns["exact_match"] = pa.array(self.exact_match == 1, pa.bool_(), mask=np.isnan(self.exact_match))
        if self.predictions is not None:
            columns["prediction"] = pa.array(self.predictions, pa.string())
        write_table(pa.table(columns), Path(path), self.metadata)

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read a file that `save` wrote.

        Raises
        ------
        DataError
            If the file is not a score file; the message names what is missing.
        """
        table, metadata = read_table(Path(path), ("id", "nll", "tokens", "truncated"), kind="score")

        def optional(name: str) -> list[Any] | None:
            return table.column(name).to_pylist() if name in table.column_names else None

        right = optional("exact_match")
        try:
            return cls(
                ids=table.column("id").to_pylist(),
                nll=table.column("nll").to_numpy(),
                tokens=table.column("tokens").to_numpy(),
                truncated=table.column("truncated").to_numpy(zero_copy_only=False),
                reasons=optional("reason") or (),
                predictions=optional("prediction"),
                exact_match=None if right is None else np.array(right, dtype=np.float64),
                metadata=metadata,
            )
        except (DataError, pa.ArrowInvalid, TypeError, ValueError) as error:
            raise DataError(f"{path}: {error}") from None


def write_table(table: pa.Table, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write a Parquet file, atomically, with `metadata` as JSON in its schema."""
    with atomic_path(path) as temporary:
        pq.write_table(table.replace_schema_metadata({_METADATA_KEY: json.dumps(dict(metadata))}), temporary)


def read_table(path: Path, columns: Iterable[str], *, kind: str) -> tuple[pa.Table, dict[str, Any]]:
    """Read a Parquet file of ours and its metadata; an error names what the file lacks."""
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}") from None
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise DataError(f"{path} is not a {kind} file: the column {missing[0]!r} is missing")
    ids = table.column("id").to_pylist()
    if any(not isinstance(id_, str) for id_ in ids):
        raise DataError(f"{path}: an id is missing or is not a string")
    return table, json.loads((table.schema.metadata or {}).get(_METADATA_KEY, b"{}"))
