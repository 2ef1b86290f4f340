"""Score a pool: mean negative log-likelihood per target token of every example, in batches with little padding."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial as partial_function
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import forgetcast
from forgetcast.data.pool import Example, Pool
from forgetcast.errors import ConfigError, DataError, MismatchError
from forgetcast.files import decode_json
from forgetcast.lm import processes
from forgetcast.lm.head import CHUNK_LOGITS, Head, kl_divergence
from forgetcast.lm.load import LanguageModel, embedding_rows
from forgetcast.lm.tokens import Encoded, digest, pad, pad_id, windows
from forgetcast.measure.scores import Scores

BATCH_TOKENS, GPU_BATCH_TOKENS = 2048, 8192
"""Default batch size: on a CPU, larger batches only fall out of the cache."""

BATCH_OVERHEAD = 1 / 32
"""Fixed cost of a batch, as a fraction of a full one: 64 tokens on a CPU (measured: 30 to 50)."""

WHOLE_LOGITS = 4 * CHUNK_LOGITS
"""Limit on the logits of a batch when the model's own forward pass computes them."""

LIBRARIES = ("torch", "transformers", "tokenizers")
"""Libraries whose versions are stored with the scores."""

SAMPLE = 16
"""Number of tokens that the output layer is checked on."""


@torch.inference_mode()
def score(
    language_model: LanguageModel,
    pool: Pool,
    *,
    max_length: int | None = None,
    stride: int | None = None,
    batch_tokens: int | None = None,
    partial: Path | None = None,
    keep_partial: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> Scores:
    """Score every example of a pool.

    Processes started by `accelerate launch` share the work, and all return the same scores.

    Parameters
    ----------
    language_model : LanguageModel
    pool : Pool
    max_length : int, optional
        Longest input, in tokens; default and upper limit: the model's context.
    stride : int, optional
        None: longer texts are truncated. Otherwise they are read in windows of `max_length` tokens that start this many
        tokens apart, and every token is scored once, in the first window that contains it.
    batch_tokens : int, optional
        Tokens in a batch, padding included; a batch has at least one example. The default depends on the device.
    partial : path, optional
        File to which finished examples are appended. If it exists, the run resumes from it. It is removed at the end.
    keep_partial : bool
        Whether it stays, for a caller that has more to do before the scores are stored.
    on_progress : callable, optional
        Called with the number of examples finished since the last call.

    Returns
    -------
    Scores
        In the pool's order. An example that cannot be scored is NaN, with the reason: no target token, a loss that is
        not finite, or not enough memory even for it alone.

    Raises
    ------
    ConfigError
        If `max_length` or `stride` does not fit the model.
    DataError
        If the model gives no example a finite loss.
    MismatchError
        If `partial` belongs to another model, pool or settings.
    """
    inputs = prepare(language_model, pool, max_length, stride)
    metadata = {
        "model": language_model.name,
        "model_hash": language_model.weights_hash,
        "pool": pool.fingerprint,
        "max_length": inputs.context,
        "stride": stride,
        "dtype": str(language_model.model.dtype).removeprefix("torch."),
        "text": language_model.text_settings,
        "thinking_left_out": sum(example.incomplete for example in inputs.encoded),
        "tokens": inputs.digest,
        "version": forgetcast.__version__,
        "versions": {library: version(library) for library in LIBRARIES},
        **language_model.loading,
    }
    checkpoint = Partial(partial, metadata)
    batches = partial_function(_measure, language_model, batch_tokens=batch_tokens)
    totals = _add_up(pool.ids, inputs, checkpoint, batches, on_progress)
    if not keep_partial:
        checkpoint.remove()  # where nothing could be scored too: the next model would be refused for it
    scores = _to_scores(pool, inputs.encoded, totals, metadata)
    return replace(scores, digests=inputs.digests)


def _add_up(
    ids: Sequence[str],
    inputs: Inputs,
    checkpoint: Partial,
    batches: Callable[[Sequence[Encoded]], Iterator[tuple[list[int], list[float | None]]]],
    on_progress: Callable[[int], None] | None,
) -> _Totals:
    """Measure the pieces of all examples that are not finished, with the other processes, and write them down."""
    progress, pieces = on_progress or (lambda _: None), inputs.pieces
    totals = _Totals(inputs.reasons, [i for i, _ in pieces])
    totals.resume(ids, checkpoint.finished)
    if checkpoint.finished:
        progress(len(checkpoint.finished))
    mine, others = _share(totals.unfinished, pieces)
    todo = [(i, piece) for i, piece in pieces if i in mine]
    for batch, sums in batches([piece for _, piece in todo]):
        finished = [todo[at][0] for at, total in zip(batch, sums, strict=True) if totals.add(todo[at][0], total)]
        checkpoint.write([(ids[i], *totals.of(i)) for i in finished])
        progress(len(finished))
    totals.gather(mine)
    if others:
        progress(others)
    return totals


def _encode(pool: Pool, language_model: LanguageModel, max_length: int | None) -> tuple[list[Encoded], list[str]]:
    """Tokens of every example, and why it cannot be scored; an empty reason if it can."""
    encoded, reasons = [], []
    for example in pool:
        try:
            tokens = language_model.encode(example, max_length)
            reasons.append("" if tokens.targets else "no token to predict: the text is a single token")
        except DataError as error:  # a conversation that the tokenizer cannot render
            tokens = Encoded([], [], False)
            reasons.append(str(error))
        encoded.append(tokens)
    return encoded, reasons


@dataclass(frozen=True)
class Inputs:
    """What is measured of a pool of N examples.

    Attributes
    ----------
    context : int
        Longest input, in tokens.
    encoded : list of Encoded, length N
    reasons : list of str, length N
        Why an example cannot be scored; empty if it can.
    pieces : list of (int, Encoded)
        The inputs that examples are measured in, each with the position of its example.
    digests : list of str or None, length N
        See `tokens.digest`.
    """

    context: int
    encoded: list[Encoded]
    reasons: list[str]
    pieces: list[tuple[int, Encoded]]
    digests: list[str | None]

    @property
    def digest(self) -> str:
        """Hash of all digests (64 hexadecimal digits)."""
        return hashlib.sha256(json.dumps(self.digests).encode()).hexdigest()


def prepare(language_model: LanguageModel, pool: Pool, max_length: int | None, stride: int | None) -> Inputs:
    """Tokenise a pool for a measurement; parameters as for `score`."""
    context = _context(language_model, max_length, stride)
    encoded, reasons = _encode(pool, language_model, context if stride is None else None)
    step = context if stride is None else stride
    each = [list(windows(example, context, step, language_model.tokenizer)) for example in encoded]
    return Inputs(
        context,
        encoded,
        reasons,
        pieces=[(i, piece) for i, pieces in enumerate(each) for piece in pieces],
        digests=[digest(pieces) if pieces else None for pieces in each],
    )


def token_digests(
    language_model: LanguageModel, pool: Pool, *, max_length: int | None = None, stride: int | None = None
) -> list[str | None]:
    """Return the digests that `score` would store, length N, without a forward pass; parameters as there."""
    return prepare(language_model, pool, max_length, stride).digests


class _Totals:
    """Summed loss of every example, which is finished when all of its pieces are added."""

    def __init__(self, reasons: list[str], owners: Sequence[int]) -> None:
        self.sums, self.reasons = np.zeros(len(reasons)), reasons
        self._remaining = np.bincount(owners, minlength=len(reasons))

    @property
    def unfinished(self) -> list[int]:
        """Examples with pieces to be measured."""
        return np.flatnonzero(self._remaining).tolist()

    def of(self, i: int) -> tuple[float, str]:
        """Sum and reason of an example."""
        return float(self.sums[i]), self.reasons[i]

    def resume(self, ids: Sequence[str], finished: Mapping[str, tuple[float, str]]) -> None:
        """Take over the examples that an interrupted run has finished."""
        for i in self.unfinished:
            if ids[i] in finished:
                self.sums[i], self.reasons[i] = finished[ids[i]]
                self._remaining[i] = 0

    def add(self, i: int, nll: float | None) -> bool:
        """Add a piece's loss, None if it ran out of memory; return whether the example is finished."""
        self.sums[i] += np.nan if nll is None else nll
        self._remaining[i] -= 1
        if not np.isfinite(self.sums[i]):
            reason = "out of memory" if nll is None else f"the model's loss is {self.sums[i]}"
            self.reasons[i] = self.reasons[i] or reason
        return not self._remaining[i]

    def gather(self, mine: Iterable[int]) -> None:
        """Exchange finished examples with the other processes."""
        for rows in processes.from_all([(i, *self.of(i)) for i in mine]):
            for i, total, reason in rows:
                self.sums[i], self.reasons[i] = total, reason


def _share(unfinished: Sequence[int], pieces: Sequence[tuple[int, Encoded]]) -> tuple[set[int], int]:
    """Examples that this process measures, and the number that the others do."""
    lengths = Counter[int]()
    for i, piece in pieces:
        lengths[i] += len(piece.ids)
    # Dealt out longest first, so that all processes get a similar number of tokens.
    longest_first = sorted(unfinished, key=lambda i: -lengths[i])
    mine = set(longest_first[processes.index() :: processes.count()])
    return mine, len(unfinished) - len(mine)


def _to_scores(pool: Pool, encoded: Sequence[Encoded], totals: _Totals, metadata: dict[str, Any]) -> Scores:
    """Mean loss of every example; NaN where there is a reason."""
    tokens = np.array([example.targets for example in encoded])
    unscored = np.array([bool(reason) for reason in totals.reasons])
    if unscored.all():
        bad = int(np.argmax(tokens > 0))
        raise DataError(f"{metadata['model']} scores no example; of {pool.ids[bad]!r}: {totals.reasons[bad]}")
    return Scores(
        ids=pool.ids,
        nll=np.where(unscored, np.nan, totals.sums / np.maximum(tokens, 1)),
        tokens=np.where(unscored, 0, tokens),
        truncated=np.array([example.truncated for example in encoded]),
        reasons=[reason or None for reason in totals.reasons],
        metadata=metadata,
    )


@torch.inference_mode()
def losses(language_model: LanguageModel, examples: Iterable[Example], max_length: int | None = None) -> np.ndarray:
    """Return the loss of every example, shape (n,), in nats per target token: a light `score` for a model in training.

    Long texts are truncated. Nothing is hashed or saved, so that only the forward passes take time. Every process
    scores all examples.

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
    encoded = [language_model.encode(example, context) for example in examples]
    nll = np.full(len(examples), np.nan)
    rows = [i for i, example in enumerate(encoded) if example.targets]
    for batch, sums in _measure(language_model, [encoded[i] for i in rows], None):
        for at, total in zip(batch, sums, strict=True):
            nll[rows[at]] = np.nan if total is None else total / encoded[rows[at]].targets
    if not np.isfinite(nll).all():
        bad = examples[int(np.argmin(np.isfinite(nll)))]
        raise DataError(f"the model in training has no finite loss for the example {bad.id!r}")
    return nll


@torch.no_grad()
def prepared_losses(language_model: LanguageModel, inputs: Inputs) -> np.ndarray:
    """Return the loss of every example, shape (n,), nats per target token: as `losses`, of inputs made once.

    NaN where there is no target token, the loss is not finite, or memory does not suffice for an example alone.
    """
    sums = np.zeros(len(inputs.encoded))
    for batch, totals in _measure(language_model, [piece for _, piece in inputs.pieces], None):
        for at, total in zip(batch, totals, strict=True):
            sums[inputs.pieces[at][0]] += np.nan if total is None else total
    targets = np.array([example.targets for example in inputs.encoded])
    nll = np.divide(sums, targets, out=np.full(len(sums), np.nan), where=targets > 0)
    return np.where(np.isfinite(nll), nll, np.nan)


def _measure(
    language_model: LanguageModel,
    pieces: Sequence[Encoded],
    batch_tokens: int | None,
    reference: LanguageModel | None = None,
) -> Iterator[tuple[list[int], list[float | None]]]:
    """Yield, for each batch, the positions of its pieces and their summed losses; None where memory runs out.

    With a reference, the KL divergences from it are summed instead.
    """
    models = [each for each in (language_model, reference) if each is not None]

    def sums(heads: list[Head], *batch: torch.Tensor) -> torch.Tensor:
        values = heads[0].nll(*batch) if reference is None else kl_divergence(heads[0], heads[1], *batch)
        return values.sum(dim=1)

    for batch, totals in measure_batches(models, pieces, batch_tokens, sums):
        yield batch, [None if total is None else float(total) for total in totals]


Measure = Callable[..., torch.Tensor]
"""Measures a batch: from the heads of the models, and ids, mask and labels (B, L), to a tensor with B rows."""


def measure_batches(
    language_models: Sequence[LanguageModel], pieces: Sequence[Encoded], batch_tokens: int | None, measure: Measure
) -> Iterator[tuple[list[int], list[torch.Tensor | None]]]:
    """Yield, for each batch, the positions of its pieces and the row of each; None where memory runs out.

    The first model's tokenizer pads. All models are in evaluation mode meanwhile.
    """
    if not pieces:
        return
    first = language_models[0]
    batch_tokens = batch_tokens or default_batch_tokens(first)
    models = [each.model for each in language_models]
    were_training = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        sample = torch.tensor([max((piece.ids for piece in pieces), key=len)[:SAMPLE]])
        heads = [Head(model, sample) for model in models]
        for head, model in zip(heads, models, strict=True):
            if not head.chunked:
                batch_tokens = max(min(batch_tokens, WHOLE_LOGITS // embedding_rows(model)), 1)
        for batch in _batches(pieces, batch_tokens):
            yield batch, _rows(partial_function(measure, heads), [pieces[i] for i in batch], pad_id(first.tokenizer))
    finally:
        for model, was_training in zip(models, were_training, strict=True):
            model.train(was_training)


def default_batch_tokens(language_model: LanguageModel) -> int:
    """Return the number of tokens in a batch that suits the model's device."""
    return GPU_BATCH_TOKENS if language_model.model.device.type == "cuda" else BATCH_TOKENS


class Partial:
    """Finished examples in a file of JSON lines; the first line is the metadata of the run."""

    def __init__(self, path: Path | None, metadata: dict[str, Any]) -> None:
        self._path = path
        self.finished: dict[str, tuple[float, str]] = {}
        if path is None:
            return
        rank = processes.index()
        if rank == 0:
            # An interrupted run may have had another number of processes.
            for file in (files := partial_files(path)):
                self.finished |= _finished(file, metadata)
            self._rewrite(metadata)
            for file in files[1:]:
                file.unlink()
        self.finished = processes.from_first(self.finished)
        if rank > 0:
            self._path = path.with_name(f"{path.name}.{rank}")
            self._rewrite(metadata)

    def _rewrite(self, metadata: dict[str, Any]) -> None:
        """Rewrite the file, so that nothing follows a truncated line."""
        assert self._path is not None
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in [metadata, *([k, *v] for k, v in self.finished.items())])

    def write(self, rows: Sequence[tuple[str, float, str]]) -> None:
        """Append finished examples: id, sum of losses, and the reason if it cannot be scored."""
        if self._path is not None and rows:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
                file.flush()
                os.fsync(file.fileno())

    def remove(self) -> None:
        """Delete the file."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def partial_files(path: Path) -> list[Path]:
    """Return the file of the first process, whether it exists or not, and those of the others, each with its own."""
    return [path, *(file for file in path.parent.glob(f"{path.name}.*") if file.suffix[1:].isdigit())]


def _finished(path: Path, metadata: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Read the sum of losses and the reason of each example; nothing if there is no file.

    Raises
    ------
    MismatchError
        If it belongs to another model, pool or settings.
    """
    rows: list[Any] = []
    try:
        lines = path.read_bytes().split(b"\n") if path.is_file() else []
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    for line in lines:
        try:
            rows.append(decode_json(line.decode()))
        except ValueError:  # the line that an interruption truncated
            break
    if rows and rows[0] != metadata:
        raise MismatchError(
            f"{path} holds unfinished scores of another model, pool, settings or version; finish them with the command "
            "that began them, or remove it"
        )
    try:
        return {str(id_): (float(nll), str(reason)) for id_, nll, reason in rows[1:]}
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{path} is no file of unfinished scores, or was damaged; remove it") from None


def _context(language_model: LanguageModel, max_length: int | None, stride: int | None = None) -> int:
    context = language_model.context if max_length is None else max_length
    if not 2 <= context <= language_model.context:
        raise ConfigError(f"max_length must be between 2 and the model's context of {language_model.context} tokens")
    if stride is not None and not 1 <= stride < context:
        raise ConfigError(f"stride must be between 1 and {context - 1}, one token less than an input")
    return context


def _batches(pieces: Sequence[Encoded], batch_tokens: int) -> Iterator[list[int]]:
    """Yield the positions of the pieces, longest first, in batches of at most `batch_tokens` with the least total cost.

    A batch costs its tokens, padding included, plus a fixed overhead: without that, each length would get separate
    batches, too small to be fast.
    """
    lengths = np.array([len(piece.ids) for piece in pieces])
    order = np.argsort(-lengths, kind="stable")
    lengths, n = lengths[order], len(order)
    # Dynamic programming from the last piece to the first: least cost from each on, and the end of its batch.
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


def _rows(
    measure: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor], pieces: Sequence[Encoded], padding: int
) -> list[torch.Tensor | None]:
    """Measure each piece; a batch that runs out of memory is halved, and a piece that does not fit is None."""
    try:
        return list(measure(*pad(pieces, padding)))
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
    return _rows(measure, pieces[:half], padding) + _rows(measure, pieces[half:], padding)
