"""Features of examples, as one forward pass of the base model gives them, in a folder that a corpus is streamed into.

    NAME/features.json         what the features are, and what is complete; with a digest of itself
         basis.parquet         how hidden states became the stored numbers: center, scale, projection
         pool-00000.parquet    of the atlas's pool, in its order
         corpus-00000.parquet  of a corpus; each part is complete or does not exist

A row has the id, the source, the loss, the tokens, digests of the tokens and of the example, and the standardised
states in 16 bits: less than 1 KB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from forgetcast.data.ids import ExampleIndex, labels
from forgetcast.errors import DataError, MismatchError
from forgetcast.files import (
    check_digest,
    check_seal,
    make_folder,
    opened_parquet,
    read_json,
    read_table,
    with_digest,
    write_json,
    write_table,
)
from forgetcast.results import validated

if TYPE_CHECKING:
    import pyarrow as pa

    from forgetcast.data.example import Example

Group = Literal["pool", "corpus"]
"""Whether examples are those of an atlas or others."""

DIMENSIONS = 384
"""Stored numbers of the hidden states; longer ones are projected."""

PART = 4_096
"""Examples in a file: what an interruption costs at most."""

SAMPLE = 1_024
"""Examples that center and scale are estimated from: the first ones of the folder."""

_HEADER, _BASIS = "features.json", "basis.parquet"


class FeatureSettings(BaseModel):
    """What the features are of: two folders are comparable only where these are equal.

    Attributes
    ----------
    model, model_hash : str
    layers : tuple of int
    width : int
        Of one layer.
    dimensions : int
        Stored numbers; less than ``len(layers) * width`` if the states are projected.
    seed : int
        Of the projection.
    max_length : int
    stride : int or None
    text : dict
        What the tokens depend on: `LanguageModel.text_settings`.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    model_hash: str
    layers: tuple[int, ...]
    width: int = Field(ge=1)
    dimensions: int = Field(ge=1)
    seed: int = 0
    max_length: int = Field(ge=2)
    stride: int | None = None
    text: dict[str, Any] = {}

    @property
    def projected(self) -> bool:
        """Whether the states were projected."""
        return self.dimensions < len(self.layers) * self.width


class _Header(BaseModel):
    format: Literal[1] = 1
    settings: FeatureSettings
    complete: dict[Group, dict[str, Any]] = {}


@dataclass(frozen=True)
class Basis:
    """Linear map from hidden states (D,) to stored numbers (d,): ``((states - center) / scale) @ projection``.

    Attributes
    ----------
    center, scale : array, shape (D,)
    projection : array or None, shape (D, d)
        Random, of independent Gaussians, so that inner products are kept on average (Johnson and Lindenstrauss).
    """

    center: np.ndarray
    scale: np.ndarray
    projection: np.ndarray | None

    @classmethod
    def of(cls, states: np.ndarray, settings: FeatureSettings) -> Basis:
        """Estimate center and scale from states (n, D); rows of NaN are left out.

        Raises
        ------
        DataError
            If no row is without NaN.
        """
        usable = states[np.isfinite(states).all(axis=1)].astype(np.float64)
        if not len(usable):
            raise DataError(f"{settings.model} has finite hidden states of none of the first {len(states)} examples")
        scale = usable.std(axis=0)
        projection = None
        if settings.projected:
            rng = np.random.default_rng(settings.seed)
            projection = rng.standard_normal((states.shape[1], settings.dimensions))
            projection /= np.sqrt(settings.dimensions)
        return cls(usable.mean(axis=0), np.where(scale > 0, scale, 1.0), projection)

    def apply(self, states: np.ndarray) -> np.ndarray:
        """Map states (n, D) to stored numbers (n, d) in 16 bits; infinite where they do not fit."""
        standard = (states - self.center) / self.scale
        if self.projection is not None:
            standard = standard @ self.projection
        with np.errstate(over="ignore"):
            return np.asarray(standard, dtype=np.float16)


@dataclass(frozen=True)
class Features:
    """Features of n examples.

    Attributes
    ----------
    ids : ExampleIndex
    sources : tuple of str
    nll : array, shape (n,)
        Loss of the base model, nats per token; NaN where it could not be measured.
    tokens : array of int, shape (n,)
    states : array of float16, shape (n, d)
        NaN where `nll` is.
    digests : pa.Array
        Of the tokens and targets, 16 bytes each, as `Scores.digests`; null where there is no target.
    contents : pa.Array
        `Example.digest` of each example, 32 bytes.
    reasons : tuple of str or None
        Why an example has no features.
    """

    ids: ExampleIndex
    sources: tuple[str, ...]
    nll: np.ndarray
    tokens: np.ndarray
    states: np.ndarray
    digests: pa.Array
    contents: pa.Array
    reasons: tuple[str | None, ...]

    def __len__(self) -> int:
        """Count the examples."""
        return len(self.ids)

    @property
    def usable(self) -> np.ndarray:
        """Whether each example has features, shape (n,)."""
        return ~np.isnan(self.nll)

    def take(self, rows: np.ndarray) -> Features:
        """Return the features of some examples."""
        import pyarrow as pa

        return Features.from_table(self.table().take(pa.array(rows)))

    def table(self) -> pa.Table:
        """Return the columns of a part."""
        import pyarrow as pa

        return pa.table(
            {
                "id": pa.array(self.ids, pa.string()),
                "source": pa.array([source or None for source in self.sources], pa.string()).dictionary_encode(),
                "nll": pa.array(self.nll, pa.float32()),
                "tokens": pa.array(self.tokens, pa.int32()),
                "digest": self.digests,
                "content": self.contents,
                "reason": pa.array(self.reasons, pa.string()),
                "states": _lists(self.states),
            }
        )

    @classmethod
    def from_table(cls, table: pa.Table) -> Features:
        """Read the columns of parts."""
        states = table["states"].combine_chunks()
        dimensions = states.type.list_size
        return cls(
            ExampleIndex.from_arrow(table["id"]),
            tuple(labels(table["source"].cast("string"))),
            table["nll"].to_numpy().astype(np.float64),
            table["tokens"].to_numpy(),
            states.flatten().to_numpy(zero_copy_only=False).reshape(-1, dimensions),
            table["digest"].combine_chunks(),
            table["content"].combine_chunks(),
            tuple(table["reason"].to_pylist()),
        )


def _lists(states: np.ndarray) -> pa.Array:
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(states.reshape(-1)), states.shape[1])


class FeatureFolder:
    """A folder of features.

    Attributes
    ----------
    path : Path
    settings : FeatureSettings
    complete : dict
        What is complete, 'pool' or 'corpus', each with its facts: 'examples', 'parts', and what was read.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a folder that `begin` made.

        Raises
        ------
        DataError
            If it is none, or was damaged.
        """
        self.path = Path(path)
        where = self.path / _HEADER
        if not where.is_file():
            raise DataError(f"{path} is no folder of features: {_HEADER} is missing; see `forgetcast features`")
        header = validated(_Header, check_digest(read_json(where), str(where)), str(where))
        self.settings, self.complete = header.settings, dict(header.complete)

    def __repr__(self) -> str:
        """Path, model and what is complete."""
        sizes = ", ".join(f"{facts['examples']} examples of the {group}" for group, facts in self.complete.items())
        return f"FeatureFolder({str(self.path)!r}, {self.settings.model!r}, {sizes or 'nothing complete'})"

    @classmethod
    def begin(cls, path: str | Path, settings: FeatureSettings) -> FeatureFolder:
        """Make a folder, or open one to go on with.

        Raises
        ------
        MismatchError
            If it holds features of another model or of other settings.
        """
        folder = Path(path)
        if not (folder / _HEADER).exists():
            make_folder(folder)
            _write_header(folder, _Header(settings=settings))
        opened = cls(folder)
        stored, wanted = opened.settings.model_dump(), settings.model_dump()
        # A name is only a name: what the weights are, the hash says.
        odd = [name for name in stored if name != "model" and stored[name] != wanted[name]]
        if odd:
            what = "another model" if "model_hash" in odd else f"another {odd[0].replace('_', ' ')}"
            raise MismatchError(f"{path} holds features of {what} ({opened.settings.model}); name another folder")
        return opened

    def check_model(self, model_hash: str | None) -> None:
        """Raise MismatchError unless the features are of the model with this hash."""
        if model_hash != self.settings.model_hash:
            raise MismatchError(
                f"{self.path} holds features of another model ({self.settings.model}) than the atlas's base; run "
                "`forgetcast features` with the base model"
            )

    @cached_property
    def basis(self) -> Basis | None:
        """How states became the stored numbers; None before anything is stored."""
        path = self.path / _BASIS
        if not path.exists():
            return None
        table, _ = read_table(path, {"center": float, "scale": float}, kind="features")
        projection = None
        if self.settings.projected:
            check_seal(path)
            with opened_parquet(path) as file:
                column = file.read(columns=["projection"])["projection"].combine_chunks()
            projection = column.flatten().to_numpy().reshape(-1, self.settings.dimensions)
        return Basis(table["center"].to_numpy(), table["scale"].to_numpy(), projection)

    def set_basis(self, states: np.ndarray) -> Basis:
        """Estimate the basis from the first states (n, D) and store it."""
        import pyarrow as pa

        basis = Basis.of(states[:SAMPLE], self.settings)
        columns = {"center": pa.array(basis.center), "scale": pa.array(basis.scale)}
        if basis.projection is not None:
            columns["projection"] = _lists(basis.projection)
        write_table(pa.table(columns), self.path / _BASIS, {})
        vars(self)["basis"] = basis
        return basis

    def parts(self, group: Group) -> list[Path]:
        """Return the files that are there, without a gap from the first on."""
        names = (self.path / f"{group}-{number:05d}.parquet" for number in range(len(list(self.path.iterdir()))))
        found = []
        for path in names:
            if not path.exists():
                break
            found.append(path)
        return found

    def write(self, group: Group, number: int, features: Features) -> None:
        """Store a part."""
        write_table(features.table(), self.path / f"{group}-{number:05d}.parquet", {"model": self.settings.model_hash})

    def finish(self, group: Group, facts: Mapping[str, Any]) -> None:
        """Store that all parts of a group are there."""
        self.complete[group] = {**facts, "parts": len(self.parts(group))}
        _write_header(self.path, _Header(settings=self.settings, complete=self.complete))

    def require(self, group: Group) -> dict[str, Any]:
        """Return the facts of a group; DataError if it is not complete or a part is lost."""
        if group not in self.complete:
            how = "with --atlas, which adds those of its pool" if group == "pool" else "again, to finish it"
            raise DataError(f"{self.path} has no complete features of the {group}: run `forgetcast features` {how}")
        facts = self.complete[group]
        if (there := len(self.parts(group))) < facts["parts"]:
            raise DataError(
                f"{self.path} has lost {group}-{there:05d}.parquet; put it back, or make the features again"
            )
        return facts

    def read(self, group: Group) -> Iterator[Features]:
        """Yield the parts of a complete group."""
        for number in range(self.require(group)["parts"]):
            yield Features.from_table(self._table(self.path / f"{group}-{number:05d}.parquet"))

    def all(self, group: Group) -> Features:
        """Read a complete group into memory."""
        import pyarrow as pa

        count = self.require(group)["parts"]
        tables = [self._table(self.path / f"{group}-{number:05d}.parquet") for number in range(count)]
        return Features.from_table(pa.concat_tables(tables, promote_options="default").combine_chunks())

    def contents(self, path: Path) -> list[bytes]:
        """Return `Example.digest` of every example of a part."""
        return list(self._table(path, ["content"])["content"].to_pylist())

    def missing(self, path: Path) -> int:
        """Count the examples of a part without features."""
        column = self._table(path, ["reason"])["reason"]
        return len(column) - int(column.null_count)

    def _table(self, path: Path, columns: Sequence[str] | None = None) -> pa.Table:
        check_seal(path)
        with opened_parquet(path) as file:
            return file.read(columns=columns)


def _write_header(folder: Path, header: _Header) -> None:
    write_json(folder / _HEADER, with_digest(header.model_dump(mode="json")))


def parts_of(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """Yield the examples of one part after another."""
    rest = iter(examples)
    while part := list(islice(rest, PART)):
        yield part
