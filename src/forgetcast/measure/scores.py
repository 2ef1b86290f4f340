"""Scores: the loss of one model on each example of a pool, and what a second model has forgotten.

The loss is the mean negative log-likelihood in nats per target token; lower is better. An example that could not be
scored is NaN, with a reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, Field

from forgetcast.data.ids import ExampleIndex
from forgetcast.errors import DataError, MismatchError
from forgetcast.files import read_table, write_table
from forgetcast.results import validated


class _Metadata(BaseModel):
    """Types of the metadata that are used; any may be absent, as in files of other tools, but not null."""

    model: str = ""
    origin: str | None = None
    units: dict[str, str] = {}
    right: dict[str, str] = {}
    model_hash: str = ""
    pool: str = Field(default="-", min_length=1)
    max_length: int = Field(default=2, ge=1, le=2**31 - 1)
    stride: int | None = Field(default=None, ge=1)
    text: dict[str, str | bool | None] = {}
    max_new_tokens: int = Field(default=1, ge=1)
    thinking_left_out: int = Field(default=0, ge=0)
    reference: str | None = None
    audit: int = Field(default=0, ge=0)
    audit_weights: list[float] | None = None


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
        Whether the text was cut to the context's length.
    reasons : sequence of str or None, length N
        Why an example could not be scored; None where it could. Default: None for all.
    metadata : mapping
        Provenance, saved with the numbers: 'model', 'model_hash', 'pool' (the pool's fingerprint), settings.
    exact_match : array of float, shape (N,), optional
        1 where the model's answer is right, 0 where it is wrong, NaN where none was asked for.
    predictions : sequence of str or None, length N, optional
        The answers.
    digests : sequence of str or None, length N, optional
        Hash of exactly what was measured of each example: its token ids and which of them are targets. Scores can be
        compared only where these are equal. None: unknown, as in files of earlier versions.
    kl : array of float, shape (N,), optional
        Mean KL divergence of the model's next-token distribution from a reference model's, nats per target token.
    repeats : array of float, shape (N,), optional
        `nll` measured a second time with the same weights and another batching: how exact a measurement is.

    Raises
    ------
    DataError
        If lengths differ, ids repeat, a loss is infinite or negative, or is NaN without a reason, or another column
        has values that it cannot have.
    """

    ids: Sequence[str]
    nll: np.ndarray
    tokens: np.ndarray
    truncated: np.ndarray
    reasons: Sequence[str | None] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    exact_match: np.ndarray | None = None
    predictions: Sequence[str | None] | None = None
    digests: Sequence[str | None] | None = None
    kl: np.ndarray | None = None
    repeats: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Convert the arrays to their dtypes and check them."""
        set_ = object.__setattr__
        set_(self, "ids", tuple(self.ids))
        set_(self, "nll", np.asarray(self.nll, dtype=np.float64))
        set_(self, "tokens", np.asarray(self.tokens, dtype=np.int64))
        truncated = np.asarray(self.truncated)
        if truncated.size and truncated.dtype.kind not in "biuf":
            raise DataError("scores: 'truncated' must be true or false")  # and "False" would be true
        set_(self, "truncated", truncated.astype(bool))
        set_(self, "reasons", tuple(self.reasons) or (None,) * len(self.ids))
        n, names = len(self.ids), ["nll", "tokens", "truncated", "reasons"]
        for name in ("exact_match", "kl", "repeats"):
            if getattr(self, name) is not None:
                set_(self, name, np.asarray(getattr(self, name), dtype=np.float64))
                names.append(name)
        for name in ("predictions", "digests"):
            if getattr(self, name) is not None:
                set_(self, name, tuple(getattr(self, name)))
                names.append(name)
        for name in names:
            if len(getattr(self, name)) != n:
                raise DataError(f"scores: {n} ids but {len(getattr(self, name))} values of {name!r}")
        if len(set(self.ids)) != n:
            raise DataError("scores: an id occurs twice")
        if (self.tokens < 0).any():
            raise DataError("scores: a number of tokens is negative")
        for name in ("kl", "repeats"):
            if (values := getattr(self, name)) is not None and np.isinf(values).any():
                raise DataError(f"scores: a value of {name!r} is not finite")
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

    def __repr__(self) -> str:
        """Size, mean loss and number of unscored examples."""
        scored = self.nll[~np.isnan(self.nll)]
        mean = f"mean {scored.mean():.2f} nats per token" if len(scored) else "no losses"
        return f"Scores({len(self)} examples, {mean}, {len(self) - len(scored)} unscored)"

    @cached_property
    def index(self) -> ExampleIndex:
        """Positions of the ids."""
        return ExampleIndex(self.ids)

    @property
    def pool_fingerprint(self) -> str | None:
        """Fingerprint of the scored pool, or None if unknown."""
        return self.metadata.get("pool")

    def at(self, ids: Iterable[str], *, where: str = "the scores") -> np.ndarray:
        """Return the losses of the examples with these ids, in the order of `ids`, shape (len(ids),).

        Raises
        ------
        MismatchError
            If an id is not in the scores.
        """
        return self.nll[self._positions(ids, where)]

    def subset(self, ids: Iterable[str], *, where: str = "the scores") -> Scores:
        """Return the scores of the examples with these ids, in the order of `ids`; raises as `at` does.

        A proper part has no `pool_fingerprint`, because a part of a pool is another pool.
        """
        rows = self._positions(ids, where)
        same = len(rows) == len(self)

        def part(values: Any) -> Any:
            if values is None or isinstance(values, np.ndarray):
                return None if values is None else values[rows]
            return [values[i] for i in rows.tolist()]

        return Scores(
            metadata={key: value for key, value in self.metadata.items() if same or key != "pool"},
            **{field.name: part(getattr(self, field.name)) for field in fields(self) if field.name != "metadata"},
        )

    def _positions(self, ids: Iterable[str], where: str) -> np.ndarray:
        ids = list(ids)
        rows = self.index.find(ids)
        if (rows < 0).any():
            raise MismatchError(f"{where}: example {ids[int(np.argmax(rows < 0))]!r} has no score")
        return rows

    def save(self, path: str | Path) -> None:
        """Write a Parquet file: id, nll, tokens, truncated, reason; what was measured in addition, if there is any."""
        import pyarrow as pa

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
        if self.digests is not None:
            columns["digest"] = pa.array(self.digests, pa.string())
        for name, values in (("kl", self.kl), ("nll_repeat", self.repeats)):
            if values is not None:
                columns[name] = pa.array(values, pa.float64())
        write_table(pa.table(columns), Path(path), self.metadata)

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read a file that `save` wrote.

        Raises
        ------
        DataError
            If the file is not a score file; the message names what is missing or invalid.
        """
        columns = {"id": str, "nll": float, "tokens": int, "truncated": bool}
        others = {
            "reason": str,
            "prediction": str,
            "digest": str,
            "exact_match": bool,
            "kl": float,
            "nll_repeat": float,
        }
        table, metadata = read_table(Path(path), columns, others, kind="score")
        validated(_Metadata, metadata, f"{path}: its metadata")

        def optional(name: str) -> list[Any] | None:
            return table.column(name).to_pylist() if name in table.column_names else None

        def numbers(name: str) -> np.ndarray | None:
            return None if (values := optional(name)) is None else np.array(values, dtype=np.float64)

        try:
            return cls(
                ids=table.column("id").to_pylist(),
                nll=table.column("nll").to_numpy(),
                tokens=table.column("tokens").to_numpy(),
                truncated=table.column("truncated").to_numpy(zero_copy_only=False),
                reasons=optional("reason") or (),
                predictions=optional("prediction"),
                exact_match=numbers("exact_match"),
                digests=optional("digest"),
                kl=numbers("kl"),
                repeats=numbers("nll_repeat"),
                metadata=metadata,
            )
        except (TypeError, ValueError) as error:  # among them DataError and Arrow's
            raise DataError(f"{path}: {error}") from None


@dataclass(frozen=True)
class Baseline:
    """Losses and answers of a base model that an atlas has on disk; `Scores` has the same attributes.

    Attributes
    ----------
    index : ExampleIndex
    nll : array, shape (N,)
    exact_match : array, shape (N,), or None
    digests : sequence of str or None, length N, or None
    """

    index: ExampleIndex
    nll: np.ndarray
    exact_match: np.ndarray | None
    digests: Sequence[str | None] | None = None


NATS_PER_TOKEN = "nats per token"
"""Unit of the losses that we measure; logs of other tools have others."""

UNKNOWN_UNIT = "unit unknown"


def unit_of(before: Scores, after: Scores) -> str:
    """Return the unit of both losses: that of every score without an `origin`, else what the logs state.

    Where tasks have different units, all are named. `UNKNOWN_UNIT` where a log states none.

    Raises
    ------
    MismatchError
        If a task has other units on the two sides.
    """
    sides = [
        {"": NATS_PER_TOKEN} if scores.metadata.get("origin") is None else dict(scores.metadata.get("units", {}))
        for scores in (before, after)
    ]
    check_units(before.metadata, after.metadata)
    known = [set(units.values()) for units in sides]
    if all(known) and (known[0] == {NATS_PER_TOKEN}) != (known[1] == {NATS_PER_TOKEN}):
        one, other = (", ".join(sorted(units)) for units in known)
        raise MismatchError(f"the losses of the two sides are in different units: {one} before, {other} after")
    return ", ".join(sorted(set.union(*known))) or UNKNOWN_UNIT


def check_units(before: Mapping[str, Any], after: Mapping[str, Any], where: str = "the second log") -> None:
    """Check that tasks of two logs, given by their metadata, have the same unit of the loss and kind of exact match.

    Raises
    ------
    MismatchError
        If one has not.
    """
    for what in ("units", "right"):
        for task, unit in before.get(what, {}).items():
            if (other := after.get(what, {}).get(task, unit)) != unit:
                raise MismatchError(f"{where}: {task} is measured in {other}, and in {unit} before; log both alike")


def length_settings(metadata: Mapping[str, Any], context: int) -> dict[str, Any]:
    """Return the lengths, as arguments of `lm.score`, that scores were made with, as far as a model's context allows.

    Parameters
    ----------
    metadata : mapping
        Of the scores.
    context : int
        Longest input of the model, in tokens.
    """
    longest = metadata.get("max_length")
    return {"max_length": None if longest is None else min(longest, context), "stride": metadata.get("stride")}


def check_tokens(before: Scores | Baseline, after: Scores, *, allow_different: bool = False) -> int | None:
    """Return how many examples of `after` were scored on other tokens or targets than before.

    None if that is unknown: a side has no digests, as files of earlier versions.

    Parameters
    ----------
    before : Scores or Baseline
    after : Scores
    allow_different : bool
        Whether to count them only.

    Raises
    ------
    MismatchError
        If there are any and they are not allowed, or `before` lacks an example of `after`.
    """
    if before.digests is None or after.digests is None:
        return None
    rows = before.index.positions(after.ids, where="the score file")
    stored = before.digests
    # A column on disk is read at once, not value by value.
    earlier = stored.select(rows) if isinstance(stored, ExampleIndex) else [stored[row] for row in rows.tolist()]
    pairs = list(zip(earlier, after.digests, strict=True))
    # An example that could not be tokenised on a side has no loss to be compared.
    known = [i for i, pair in enumerate(pairs) if None not in pair]
    different = [i for i in known if pairs[i][0] != pairs[i][1]]
    if different and not allow_different:
        raise MismatchError(
            f"{len(different)} of {len(after)} examples were scored on other tokens or targets than before, e.g. "
            f"{after.ids[different[0]]!r}: {_what_differs(before, after)}; score both models on the same tokens, or "
            "give --allow-different-tokens to compare all the same"
        )
    return len(different) if known else None


def _what_differs(before: Scores | Baseline, after: Scores) -> str:
    """Name the settings that differ between two score files, as far as they are stored."""
    if not isinstance(before, Scores):
        return "tokenizer, chat template or context differs"
    differing = settings_that_differ(before.metadata, after.metadata)
    return f"different: {', '.join(differing)}" if differing else "what was asked differs"


def settings_that_differ(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Name the settings of tokens and targets that differ between the metadata of two scores."""
    one, other = ({**m.get("text", {}), **m} for m in (before, after))
    names = {
        "tokenizer": "the tokenizer",
        "template": "the chat template",
        "date": "the date that the template writes",
        "thinking": "whether thinking is scored",
        "max_length": "the longest input",
        "stride": "the stride",
    }
    return [text for name, text in names.items() if one.get(name) != other.get(name)]


def forgetting(before: Scores | Baseline, after: Scores) -> np.ndarray:
    """Return loss after minus loss before, nats per token, shape (len(after),), in the order of `after.ids`.

    Positive means forgotten; NaN where either is NaN.

    Raises
    ------
    MismatchError
        If `before` lacks an example of `after`.
    """
    return after.nll - before.nll[before.index.positions(after.ids, where="the score file")]


def flips(before: Scores | Baseline, after: Scores) -> np.ndarray:
    """Return 1 where a right answer became wrong and 0 where it stayed right, shape (len(after),), as `after.ids`.

    NaN elsewhere: where the answer was not right before, or an exact match is missing.

    Raises
    ------
    MismatchError
        If `before` lacks an example of `after`.
    """
    if before.exact_match is None or after.exact_match is None:
        return np.full(len(after), np.nan)
    right = before.exact_match[before.index.positions(after.ids, where="the score file")] == 1
    return np.where(right, 1 - after.exact_match, np.nan)


def count_flips(before: Scores, after: Scores) -> tuple[int, int] | None:
    """Count the right answers that became wrong in `after`, and those that could: right before, answered after.

    None if no example was answered on both sides.
    """
    before = before.subset(after.ids)
    if before.exact_match is None or after.exact_match is None:
        return None
    if np.isnan(before.exact_match + after.exact_match).all():
        return None
    lost = flips(before, after)
    return int((lost == 1).sum()), int((~np.isnan(lost)).sum())
