"""Score a pool: mean negative log-likelihood per target token of every example, in batches that waste no padding."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import forgetcast
from forgetcast.errors import ConfigError, DataError, MismatchError
from forgetcast.lm import processes
from forgetcast.lm.head import LOGITS as CHUNK_LOGITS
from forgetcast.lm.head import Head
from forgetcast.lm.load import LanguageModel, embedding_rows
from forgetcast.lm.text import Encoded, encode, pad, pad_id, windows
from forgetcast.pool import Example, Pool
from forgetcast.scores import Scores

BATCH_TOKENS, GPU_BATCH_TOKENS = 2048, 8192
"""Default size of a batch: on a CPU, larger ones only leave its cache."""

BATCH_OVERHEAD = 1 / 32
"""What a batch costs beside its tokens, as a share of a full one: 64 tokens on a CPU (measured: 30 to 50)."""

WHOLE_LOGITS = 4 * CHUNK_LOGITS
"""Most logits at once where the model's own forward pass has to make them."""

SAMPLE = 16
"""Tokens that the output layer is checked on."""


@torch.inference_mode()
def score(
    language_model: LanguageModel,
    pool: Pool,
    *,
    max_length: int | None = None,
    stride: int | None = None,
    batch_tokens: int | None = None,
    partial: Path | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Scores:
    """Score every example of a pool.

    Where `accelerate launch` started several processes, each scores its share, and all return the whole.

    Parameters
    ----------
    language_model : LanguageModel
    pool : Pool
    max_length : int, optional
        Longest input, in tokens; default and upper limit: the model's context.
    stride : int, optional
        What is done with longer texts. None: they are cut. Otherwise they are read in windows of `max_length` tokens,
        each begun this many tokens after the last one, and every token is scored once, in the first window it is in.
    batch_tokens : int, optional
        Tokens in a batch, padding included; at least one example goes into each. Default: what suits the device.
    partial : path, optional
        File that finished examples are written to as they come. A run that finds it there goes on from it. It is
        removed at the end.
    on_progress : callable, optional
        Called with the number of examples that a batch has finished.

    Returns
    -------
    Scores
        In the pool's order. An example that cannot be scored is NaN, with the reason: no token to predict, a loss that
        is not finite, or no memory even for it alone.

    Raises
    ------
    ConfigError
        If `max_length` or `stride` does not fit the model.
    DataError
        If the model gives no example a finite loss.
    MismatchError
        If `partial` is of another model, pool or settings.
    """
    tokenizer = language_model.tokenizer
    context = _context(language_model, max_length)
    if stride is not None and not 1 <= stride < context:
        raise ConfigError(f"stride must be between 1 and {context - 1}, one token less than an input")
    encoded, reasons = [], []
    for example in pool:
        try:
            found = encode(example, tokenizer, context if stride is None else None)
            reasons.append("" if found.targets else "no token to predict: the text is a single token")
        except DataError as error:  # a conversation that the tokenizer cannot write
            found = Encoded([], [], False)
            reasons.append(str(error))
        encoded.append(found)
    pieces = [
        (i, piece)
        for i, example in enumerate(encoded)
        for piece in windows(example, context, context if stride is None else stride)
    ]
    metadata = {
        "model": language_model.name,
        "model_hash": language_model.weights_hash,
        "pool": pool.fingerprint,
        "max_length": context,
        "stride": stride,
        "dtype": str(language_model.model.dtype).removeprefix("torch."),
        "version": forgetcast.__version__,
    }
    kept = _Partial(partial, metadata)
    sums = np.zeros(len(pool))
    left = np.bincount([i for i, _ in pieces], minlength=len(pool))
    for i in np.flatnonzero(left).tolist():
        if (done := kept.found.get(pool.ids[i])) is not None:
            sums[i], reasons[i], left[i] = *done, 0
    # Several processes take turns, longest example first, so that each has as much to do.
    turns = sorted(np.flatnonzero(left).tolist(), key=lambda i: -len(encoded[i].ids))
    mine = set(turns[processes.index() :: processes.count()])
    todo = [(i, piece) for i, piece in pieces if i in mine]
    if on_progress is not None and kept.found:
        on_progress(len(kept.found))
    for batch, summed in _measure(language_model, [piece for _, piece in todo], batch_tokens):
        finished = []
        for at, nll in zip(batch, summed, strict=True):
            i = todo[at][0]
            sums[i] += np.nan if nll is None else nll
            left[i] -= 1
            if not np.isfinite(sums[i]):
                reasons[i] = reasons[i] or ("out of memory" if nll is None else f"the model's loss is {sums[i]}")
            if not left[i]:
                finished.append(i)
        kept.write([(pool.ids[i], float(sums[i]), reasons[i]) for i in finished])
        if on_progress is not None:
            on_progress(len(finished))
    for others in processes.from_all([(i, sums[i], reasons[i]) for i in mine]):
        for i, nll, reason in others:
            sums[i], reasons[i] = nll, reason
    if on_progress is not None and len(mine) < len(turns):
        on_progress(len(turns) - len(mine))
    tokens = np.array([example.targets for example in encoded])
    unscored = np.array([bool(reason) for reason in reasons])
    if unscored.all():
        bad = int(np.argmax(tokens > 0))
        raise DataError(f"{language_model.name} scores no example; of {pool.ids[bad]!r}: {reasons[bad]}")
    scores = Scores(
        ids=pool.ids,
        nll=np.where(unscored, np.nan, sums / np.maximum(tokens, 1)),
        tokens=np.where(unscored, 0, tokens),
        truncated=np.array([example.truncated for example in encoded]),
        reasons=[reason or None for reason in reasons],
        metadata=metadata,
    )
    kept.remove()
    return scores


@torch.inference_mode()
def losses(language_model: LanguageModel, examples: Iterable[Example], max_length: int | None = None) -> np.ndarray:
    """Loss of every example, shape (n,), nats per target token: as `score`, for a model in training.

    Long texts are cut. Nothing is hashed or kept, so that it costs the forward passes alone. Several processes each
    measure all.

    Parameters
    ----------
    language_model : LanguageModel
    examples : iterable of Example
    max_length : int, optional
        Longest input, in tokens; default: the model's context.

    Raises
    ------
    DataError
        If an example cannot be scored.
    """
    context = _context(language_model, max_length)
    examples = list(examples)
    encoded = [encode(example, language_model.tokenizer, context) for example in examples]
    found = np.full(len(examples), np.nan)
    rows = [i for i, example in enumerate(encoded) if example.targets]
    for batch, sums in _measure(language_model, [encoded[i] for i in rows], None):
        for at, nll in zip(batch, sums, strict=True):
            found[rows[at]] = np.nan if nll is None else nll / encoded[rows[at]].targets
    if not np.isfinite(found).all():
        bad = examples[int(np.argmin(np.isfinite(found)))]
        raise DataError(f"the model in training has no finite loss for the example {bad.id!r}")
    return found


def _measure(
    language_model: LanguageModel, pieces: Sequence[Encoded], batch_tokens: int | None
) -> Iterator[tuple[list[int], list[float | None]]]:
    """Positions of the pieces in a batch and their summed losses, batch after batch; None where memory is too small."""
    if not pieces:
        return
    model = language_model.model
    if batch_tokens is None:
        batch_tokens = GPU_BATCH_TOKENS if model.device.type == "cuda" else BATCH_TOKENS
    was_training = model.training
    model.eval()
    try:
        head = Head(model, torch.tensor([max((piece.ids for piece in pieces), key=len)[:SAMPLE]]))
        if not head.chunked:
            batch_tokens = max(min(batch_tokens, WHOLE_LOGITS // embedding_rows(model)), 1)
        for batch in _batches(pieces, batch_tokens):
            yield batch, _sums(head, [pieces[i] for i in batch], pad_id(language_model.tokenizer))
    finally:
        model.train(was_training)


class _Partial:
    """Finished examples in a file of JSON lines, of which the first says what they belong to."""

    def __init__(self, path: Path | None, metadata: dict[str, Any]) -> None:
        self._path = path
        self.found: dict[str, tuple[float, str]] = {}
        if path is None:
            return
        number = processes.index()
        if number == 0:
            # What all processes of an earlier run had finished, however many there were.
            others = [file for file in path.parent.glob(f"{path.name}.*") if file.suffix[1:].isdigit()]
            for file in (path, *others):
                self.found |= _finished(file, metadata)
            self._begin(metadata)
            for file in others:
                file.unlink()
        self.found = processes.from_first(self.found)
        if number > 0:
            self._path = path.with_name(f"{path.name}.{number}")
            self._begin(metadata)

    def _begin(self, metadata: dict[str, Any]) -> None:
        """Write the file anew, so that nothing comes after a line that was cut."""
        assert self._path is not None
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in [metadata, *([k, *v] for k, v in self.found.items())])

    def write(self, rows: Sequence[tuple[str, float, str]]) -> None:
        """Add finished examples: id, sum of losses, and why it could not be scored, if so."""
        if self._path is not None and rows:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
                file.flush()
                os.fsync(file.fileno())

    def remove(self) -> None:
        """Delete the file: all is done."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _finished(path: Path, metadata: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Sum of losses and reason by example, if the file is there.

    Raises
    ------
    MismatchError
        If it belongs to another model, pool or settings.
    """
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:  # the line that an interruption cut short
            break
    if rows and rows[0] != metadata:
        raise MismatchError(
            f"{path} holds unfinished scores of another model, pool, settings or version; finish them with the command "
            "that began them, or remove it"
        )
    return {id_: (nll, reason) for id_, nll, reason in rows[1:]}


def _context(language_model: LanguageModel, max_length: int | None) -> int:
    if max_length is None:
        return language_model.context
    if not 2 <= max_length <= language_model.context:
        raise ConfigError(f"max_length must be between 2 and the model's context of {language_model.context} tokens")
    return max_length


def _batches(pieces: Sequence[Encoded], batch_tokens: int) -> Iterator[list[int]]:
    """Positions of the pieces, longest first, in the batches of at most `batch_tokens` that cost the least together.

    A batch costs its tokens, padding included, and as much as a few tokens for itself: without that, each length would
    get batches of its own, too small to be fast.
    """
    lengths = np.array([len(piece.ids) for piece in pieces])
    order = np.argsort(-lengths, kind="stable")
    lengths, n = lengths[order], len(order)
    # From the last piece to the first: the least cost from each on, and where its batch ends.
    cost, stop = np.zeros(n + 1), np.zeros(n, dtype=np.intp)
    for i in reversed(range(n)):
        most = max(batch_tokens // int(lengths[i]), 1)
        ends = np.arange(i + 1, min(i + most, n) + 1)
        costs = (ends - i) * lengths[i] + batch_tokens * BATCH_OVERHEAD + cost[ends]
        best = int(costs.argmin())
        cost[i], stop[i] = costs[best], ends[best]
    start = 0
    while start < n:
        yield order[start : stop[start]].tolist()
        start = stop[start]


def _sums(head: Head, pieces: Sequence[Encoded], padding: int) -> list[float | None]:
    """Summed loss of each piece; a batch too large for the memory is halved, and a piece that does not fit is None."""
    try:
        return head.nll(*pad(pieces, padding)).sum(dim=1).tolist()
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
    if len(pieces) == 1:
        return [None]
    warnings.warn(
        f"out of memory with {len(pieces)} examples at once; going on with half as many (see --batch-tokens)",
        stacklevel=2,
    )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = len(pieces) // 2
    return _sums(head, pieces[:half], padding) + _sums(head, pieces[half:], padding)
