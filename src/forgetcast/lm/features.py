"""What one forward pass of the base model says of an example: mean hidden states, loss and length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from forgetcast.data.ids import ExampleIndex
from forgetcast.data.pool import Example, Pool
from forgetcast.errors import ConfigError, DataError, MismatchError
from forgetcast.lm.head import Head
from forgetcast.lm.load import LanguageModel
from forgetcast.lm.score import Inputs, measure_batches, prepare
from forgetcast.measure.features import DIMENSIONS, FeatureFolder, Features, FeatureSettings, Group, parts_of


def default_layers(language_model: LanguageModel) -> tuple[int, int]:
    """Return the middle layer and the last: a summary of the content, and what the next token is predicted from."""
    last = _last_layer(language_model)
    return max(last // 2, 1), last


def _last_layer(language_model: LanguageModel) -> int:
    return int(language_model.model.config.get_text_config().num_hidden_layers)


@dataclass(frozen=True)
class Pass:
    """What one forward pass gives of N examples.

    Attributes
    ----------
    nll : array, shape (N,)
        Nats per target token; NaN where it is not finite or could not be measured.
    states : array of float32, shape (N, K, D)
        Hidden states at the K layers, mean over the target tokens; NaN where `nll` is.
    inputs : Inputs
    """

    nll: np.ndarray
    states: np.ndarray
    inputs: Inputs


@torch.inference_mode()
def forward(
    language_model: LanguageModel,
    pool: Pool,
    layers: Sequence[int],
    *,
    max_length: int | None = None,
    stride: int | None = None,
    batch_tokens: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Pass:
    """Run the model once over a pool; parameters as for `score` and `hidden_states`.

    Raises
    ------
    ConfigError
        If a setting does not fit the model, or it has no such layer.
    """
    at = checked_layers(language_model, layers)
    inputs = prepare(language_model, pool, max_length, stride)

    def measure(heads: list[Head], ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        nll, states = heads[0].nll_and_states(ids, mask, labels, at)
        return torch.cat([nll.sum(dim=1, keepdim=True), states.flatten(1)], dim=1)

    width = int(language_model.model.config.get_text_config().hidden_size)
    sums = np.zeros((len(pool), 1 + len(at) * width))
    for batch, rows in measure_batches([language_model], [piece for _, piece in inputs.pieces], batch_tokens, measure):
        for i, row in zip(batch, rows, strict=True):
            sums[inputs.pieces[i][0]] += np.nan if row is None else row.numpy()
        if on_progress is not None:
            on_progress(len(batch))
    targets = np.array([example.targets for example in inputs.encoded])
    means = sums / np.maximum(targets, 1)[:, None]
    means[(targets == 0) | ~np.isfinite(means).all(axis=1)] = np.nan
    return Pass(means[:, 0], means[:, 1:].reshape(len(pool), len(at), width).astype(np.float32), inputs)


def checked_layers(language_model: LanguageModel, layers: Sequence[int]) -> tuple[int, ...]:
    """Return layers counted from the front; ConfigError if there is none, one twice, or one that the model lacks."""
    last = _last_layer(language_model)
    at = tuple(layer + last + 1 if layer < 0 else layer for layer in layers)
    if not at or len(set(at)) < len(at) or not all(0 <= layer <= last for layer in at):
        raise ConfigError(f"the layers must be different numbers from 0, the embeddings, to {last}, not {list(layers)}")
    return at


def hidden_states(
    language_model: LanguageModel,
    pool: Pool,
    *,
    layers: Sequence[int] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Return the hidden states of every example, the mean over its target tokens.

    One forward pass in the batches of `score`; long texts are truncated.

    Parameters
    ----------
    language_model : LanguageModel
    pool : Pool
        N examples.
    layers : sequence of int, optional
        0: the embeddings; l: the output of block l; negative: from the last. Default: the middle block and the last.
        Of the last, the states are those after the final normalisation.
    on_progress : callable, optional
        Called with the number of examples finished since the last call.

    Returns
    -------
    array of float32, shape (N, len(layers) * D)
        One layer after another, each of the model's width D. NaN where an example has no target token, or a state or
        the loss is not finite.

    Raises
    ------
    ConfigError
        If the model has no such layer.
    """
    chosen = default_layers(language_model) if layers is None else layers
    return forward(language_model, pool, chosen, on_progress=on_progress).states.reshape(len(pool), -1)


TASK_SAMPLE = 64
"""Examples of a task that its features are the mean of."""


def task_features(language_model: LanguageModel, task: Pool, *, sample: int = TASK_SAMPLE) -> np.ndarray:
    """Return what the base model makes of a fine-tuning data set, before any training.

    Parameters
    ----------
    language_model : LanguageModel
    task : Pool
    sample : int
        Number of examples, drawn at random but always the same ones.

    Returns
    -------
    array, shape (2 D + 4,)
        Means over the examples: hidden states of the middle layer and the last; loss (nats per token); logarithm of the
        number of target tokens, and of all tokens; share of examples that have a prompt.

    Raises
    ------
    DataError
        If no example can be scored.
    """
    part = task.sample(sample)
    passed = forward(language_model, part, default_layers(language_model))
    usable = np.flatnonzero(np.isfinite(passed.nll))
    if not len(usable):
        raise DataError(
            f"of the task, none of {len(part)} examples has a finite loss and target tokens: nothing to use"
        )
    encoded = [passed.inputs.encoded[i] for i in usable.tolist()]
    others = [
        passed.nll[usable].mean(),
        np.mean(np.log([each.targets for each in encoded])),
        np.mean(np.log([len(each.ids) for each in encoded])),
        np.mean([part[i].text is None for i in usable.tolist()]),
    ]
    return np.concatenate([passed.states[usable].mean(axis=0).ravel(), others])


def feature_settings(
    language_model: LanguageModel,
    *,
    layers: Sequence[int] | None = None,
    max_length: int | None = None,
    stride: int | None = None,
) -> FeatureSettings:
    """Return the settings of a folder of features; parameters as for `hidden_states` and `score`."""
    at = checked_layers(language_model, default_layers(language_model) if layers is None else layers)
    width = int(language_model.model.config.get_text_config().hidden_size)
    return FeatureSettings(
        model=language_model.name,
        model_hash=language_model.weights_hash,
        layers=at,
        width=width,
        dimensions=min(len(at) * width, DIMENSIONS),
        max_length=language_model.context if max_length is None else max_length,
        stride=stride,
        text=language_model.text_settings,
    )


def write_features(
    language_model: LanguageModel,
    examples: Iterable[Example],
    folder: FeatureFolder,
    group: Group,
    *,
    batch_tokens: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[int, int]:
    """Measure a stream of examples part by part; what an earlier run has finished is not measured again.

    Parameters
    ----------
    language_model : LanguageModel
    examples : iterable of Example
        With different ids, in the same order in each run. Only one part of them is in memory.
    folder : FeatureFolder
        Made by `FeatureFolder.begin` with this model's `feature_settings`. The caller finishes it.
    group : 'pool' or 'corpus'
    batch_tokens : int, optional
        As for `score`.
    on_progress : callable, optional
        Called with the number of examples finished since the last call.

    Returns
    -------
    examples, without : int
        All examples, and those without features, with the reason in the folder.

    Raises
    ------
    MismatchError
        If the folder holds features of other examples.
    """
    done, total, without = folder.parts(group), 0, 0
    for number, part in enumerate(parts_of(examples)):
        contents = [example.digest() for example in part]
        if number < len(done):
            if folder.contents(done[number]) != contents:
                raise MismatchError(f"{done[number]} holds features of other examples; name another folder")
            without += folder.missing(done[number])
        else:
            features = _measured(language_model, part, contents, folder, batch_tokens)
            folder.write(group, number, features)
            without += int((~features.usable).sum())
        total += len(part)
        if on_progress is not None:
            on_progress(len(part))
    return total, without


def _measured(
    language_model: LanguageModel,
    part: Sequence[Example],
    contents: Sequence[bytes],
    folder: FeatureFolder,
    batch_tokens: int | None,
) -> Features:
    import pyarrow as pa

    settings = folder.settings
    passed = forward(
        language_model,
        Pool(part),
        settings.layers,
        max_length=settings.max_length,
        stride=settings.stride,
        batch_tokens=batch_tokens,
    )
    flat = passed.states.reshape(len(part), -1)
    states = (folder.basis or folder.set_basis(flat)).apply(flat)
    reasons: list[str | None] = [reason or None for reason in passed.inputs.reasons]
    for i in np.flatnonzero(np.isnan(passed.nll)).tolist():
        reasons[i] = reasons[i] or "its loss or a hidden state is not finite, or it needs too much memory"
    for i in np.flatnonzero(np.isinf(states).any(axis=1)).tolist():
        reasons[i] = "a hidden state is too large for 16 bits"
    missing = np.array([reason is not None for reason in reasons])
    digests = [None if text is None else bytes.fromhex(text) for text in passed.inputs.digests]
    return Features(
        ExampleIndex([example.id for example in part]),
        tuple(example.source or "" for example in part),
        np.where(missing, np.nan, passed.nll),
        np.array([encoded.targets for encoded in passed.inputs.encoded]),
        np.where(missing[:, None], np.float16(np.nan), states),
        pa.array(digests, pa.binary(16)),
        pa.array(contents, pa.binary(32)),
        tuple(reasons),
    )
