"""Replay from a corpus that was never measured: candidates and signals of a pool and the corpus together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from forgetcast.completion.unmeasured import Transfer
from forgetcast.data.ids import ExampleIndex
from forgetcast.data.pool import fingerprint_of
from forgetcast.errors import ConfigError, DataError, MismatchError
from forgetcast.measure.features import FeatureFolder, Features
from forgetcast.replay.signals import FROM_ATLAS, Signals


@dataclass(frozen=True)
class Candidates:
    """What a plan says of examples, without their texts.

    Attributes
    ----------
    ids : ExampleIndex
    sources : tuple of str
    fingerprint : str
        That of a pool of these examples.
    """

    ids: ExampleIndex
    sources: tuple[str, ...]
    fingerprint: str

    def __len__(self) -> int:
        """Count the examples."""
        return len(self.ids)

    def positions(self, ids: Iterable[str], *, where: str = "the request") -> np.ndarray:
        """Return the positions of `ids`, as `Pool.positions`."""
        return self.ids.positions(ids, where=where)


@dataclass(frozen=True)
class Joined:
    """A pool of N examples, and after it those of a corpus that are no member of it.

    Attributes
    ----------
    candidates : Candidates
    signals : Signals
    held_out : list of str
        Never replayed: those held out of the pool, and what has the same tokens in the corpus.
    among : list of str
        What may be replayed: without a second copy of an example of the pool, and what has no features.
    overlapping, overlapping_held_out, without_features : int
        Examples of the corpus that are left out: copies of the pool's examples, those of held-out ones among them, and
        those that the base model could not score.
    """

    candidates: Candidates
    signals: Signals
    held_out: list[str]
    among: list[str]
    overlapping: int
    overlapping_held_out: int
    without_features: int

    def as_dict(self) -> dict[str, int]:
        """Return the counts of what is used and left out of the corpus."""
        return {
            "corpus_overlapping": self.overlapping,
            "corpus_overlapping_held_out": self.overlapping_held_out,
            "corpus_without_features": self.without_features,
        }


def join_corpus(signals: Signals, folder: FeatureFolder, held_out: Sequence[str], *, needs: Iterable[str]) -> Joined:
    """Add a corpus to the signals of a pool: its losses as measured, forecast and loadings by `Transfer`.

    Copies of the pool's examples are found by the digest of their tokens and targets, whatever their ids.

    Parameters
    ----------
    signals : Signals
        Of the pool's N examples.
    folder : FeatureFolder
        With features of the pool and of the corpus.
    held_out : sequence of str
        Examples of the pool that are never replayed.
    needs : iterable of str
        Signals that are wanted.

    Raises
    ------
    ConfigError
        If a signal is wanted that features cannot give.
    MismatchError
        If the features are of another pool.
    DataError
        If an id names one example of the pool and another one of the corpus.
    """
    wanted = [name for name in needs if name in signals.names]
    if cannot := sorted(set(wanted) - FROM_ATLAS):
        raise ConfigError(f"the {cannot[0]} of a corpus that was not measured are unknown; use another strategy")
    pool = folder.all("pool")
    if len(pool) != len(signals) or (pool.ids.find(signals.ids) < 0).any():
        raise MismatchError(f"{folder.path} holds features of another pool than that of the signals")
    corpus = _compare(pool, folder, held_out)
    kept, fresh = np.flatnonzero(~corpus.again), corpus.usable & ~corpus.copy
    transfer, values = Transfer(pool, signals.ids), dict[str, np.ndarray]()
    for name in wanted:
        added = corpus.nll if name == "losses" else transfer.predict(signals[name], folder.read("corpus"))
        values[name] = np.concatenate([signals[name], added[kept]])
    union = ExampleIndex([*signals.ids, *corpus.ids.select(kept)])
    order = pool.ids.positions(signals.ids)
    return Joined(
        Candidates(
            union,
            (*(pool.sources[i] for i in order.tolist()), *(corpus.sources[i] for i in kept.tolist())),
            fingerprint_of([*pool.contents.to_pylist(), *(corpus.contents[i] for i in kept.tolist())]),
        ),
        Signals(union, **values),
        [*held_out, *corpus.ids.select(np.flatnonzero(corpus.held & ~corpus.again))],
        [*signals.ids, *corpus.ids.select(np.flatnonzero(fresh & ~corpus.again))],
        int(corpus.copy.sum()),
        int(corpus.held.sum()),
        int((~corpus.usable & ~corpus.copy).sum()),
    )


class _Corpus(NamedTuple):
    """Examples of a corpus: their columns, and how they compare with those of a pool, all of shape (M,).

    `copy`: the pool has an example of the same tokens and targets; `held`: a held-out one; `again`: it is an example of
    the pool, id and all; `usable`: it has features.
    """

    ids: ExampleIndex
    sources: list[str]
    contents: list[bytes]
    nll: np.ndarray
    copy: np.ndarray
    held: np.ndarray
    again: np.ndarray
    usable: np.ndarray


def _compare(pool: Features, folder: FeatureFolder, held_out: Sequence[str]) -> _Corpus:
    import pyarrow as pa
    import pyarrow.compute as pc

    held = pool.digests.take(pa.array(pool.ids.positions(held_out, where="the held-out list"), pa.int64()))
    ids, sources, contents, arrays = [], list[str](), list[bytes](), []
    for part in folder.read("corpus"):
        copy, same, again = (
            pc.is_in(values, value_set=known, skip_nulls=True).to_numpy(zero_copy_only=False)
            for values, known in (
                (part.digests, pool.digests),
                (part.digests, held),
                (part.contents, pool.contents),
            )
        )
        clash = (pool.ids.find(part.ids) >= 0) & ~again
        if clash.any():
            raise DataError(
                f"the id {part.ids[int(np.argmax(clash))]!r} names one example of the pool and another one of the "
                "corpus; rename it in the corpus"
            )
        ids.append(pa.array(part.ids, pa.string()))
        sources.extend(part.sources)
        contents.extend(part.contents.to_pylist())
        arrays.append((part.nll, copy, same, again, part.usable))
    index = ExampleIndex.from_arrow(pa.chunked_array(ids, pa.string()))
    return _Corpus(index, sources, contents, *(np.concatenate(each) for each in zip(*arrays, strict=True)))
