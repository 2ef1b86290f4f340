"""Replay as a data set: the new task's batches with whole batches of upstream examples spread evenly among them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn
from uuid import uuid4

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from forgetcast.data.pool import Pool
from forgetcast.data.rendering import DEFAULT_RENDERING, Rendering
from forgetcast.errors import ConfigError, DataError
from forgetcast.lm import processes
from forgetcast.lm.load import LanguageModel
from forgetcast.lm.selectors import ReplaySelector
from forgetcast.lm.tokens import Encoded, encode, pad, pad_id
from forgetcast.replay.plan import ReplayPlan
from forgetcast.replay.sampling import passes


class ReplayMixture(Dataset[Encoded]):
    """All training examples of a fine-tune, in order; read it without shuffling.

    Replay is added to the task's examples in whole batches: each batch is all new or all upstream, so that replay's
    share of the loss does not depend on the length of its texts.

    Parameters
    ----------
    task : Pool
        New examples, shuffled again in every pass.
    tokenizer : PreTrainedTokenizerBase
    steps : int
        Number of batches of new examples.
    batch_size : int
        Examples per optimiser step, over all devices and accumulation steps.
    max_length : int
        Longest input, in tokens.
    seed : int
        Seed of the order of the new examples.
    plan : ReplayPlan, optional
        In the phase 'padding', more new examples are added instead of upstream ones.
    pool : Pool, optional
        Required with a plan; the pool that the plan was made for.
    rendering : Rendering
        How conversations are rendered; give that of the scores.
    weights : mapping of str to float, optional
        Of the losses of new examples, by id, for `loss.WeightedTrainer`.
    sizes : callable, optional
        Returns the size of each update for a number of steps; replayed batches are spaced by it, not evenly.

    Attributes
    ----------
    steps : int
        Optimiser steps, including those on replayed batches.
    batch_size : int
    plan : ReplayPlan or None
    tokenizer : PreTrainedTokenizerBase
    rendering : Rendering

    Raises
    ------
    ConfigError
        If the ratio is so small that no batch would be replayed, or so large that the plan has too few examples.
    DataError
        If an example has no target token, or is a conversation that the tokenizer cannot render.
    """

    def __init__(
        self,
        task: Pool,
        tokenizer: PreTrainedTokenizerBase,
        *,
        steps: int,
        batch_size: int,
        max_length: int,
        seed: int = 0,
        plan: ReplayPlan | None = None,
        pool: Pool | None = None,
        rendering: Rendering = DEFAULT_RENDERING,
        weights: Mapping[str, float] | None = None,
        sizes: Callable[[int], Sequence[float]] | None = None,
    ) -> None:
        count = 0
        if plan is not None and plan.ratio > 0:
            if pool is None:
                raise ConfigError("a replay plan needs the pool that it was made for")
            plan.check_pool(pool)
            count = plan.count(steps, batch_size) // batch_size
        padding = plan is not None and plan.phase == "padding"
        replayed = plan.order(count * batch_size) if plan and count and not padding else ()
        self.steps, self.batch_size, self.plan = steps + count, batch_size, plan
        self.tokenizer, self.rendering = tokenizer, rendering
        self._max_length, self._task, self._pool, self._weights = max_length, task, pool, weights or {}
        self._padding = pad_id(tokenizer)
        # Every arm of a comparison sees the same new batches, so those that pad are drawn separately.
        new, more, old = passes(len(task), [seed]), passes(len(task), [seed, 1]), iter(replayed)
        self._order = [
            (False, task.ids[next(more if extra else new)]) if padding or not extra else (True, next(old))
            for extra in (spread(steps, count) if sizes is None else spread_by(sizes(steps + count), count))
            for _ in range(batch_size)
        ]
        # Before training, so that an example that cannot be trained on is an error here.
        self._encoded = dict[tuple[bool, str], Encoded]()
        self._encode(self._order)

    def __repr__(self) -> str:
        replayed = sum(replay for replay, _ in self._order)
        return f"ReplayMixture(steps={self.steps}, batch_size={self.batch_size}, {replayed} examples replayed)"

    def _encode(self, keys: Iterable[tuple[bool, str]]) -> None:
        for replay, id_ in dict.fromkeys(keys):
            if (replay, id_) in self._encoded:
                continue
            source = self._pool if replay and self._pool is not None else self._task
            example = source[int(source.positions([id_])[0])]
            encoded = encode(example, self.tokenizer, self._max_length, end=True, rendering=self.rendering)
            if not replay and id_ in self._weights:
                encoded = replace(encoded, weight=self._weights[id_])
            self._encoded[replay, id_] = encoded
            if not encoded.targets:
                raise DataError(f"example {id_!r} has no token to train on: its text is a single token")

    @property
    def replayed(self) -> tuple[str, ...]:
        """Ids of the replayed examples, in order."""
        return self.replayed_before(self.steps)

    def replayed_before(self, step: int) -> tuple[str, ...]:
        """Return the ids replayed in the steps before this one, counted from 0."""
        return tuple(id_ for replay, id_ in self._order[: step * self.batch_size] if replay)

    def tokens_before(self, step: int) -> int:
        """Count the tokens that are read in the steps before this one, without padding."""
        return sum(len(self[i].ids) for i in range(step * self.batch_size))

    def replays(self, step: int) -> bool:
        """Say whether the batch of a step, counted from 0, is replayed."""
        return step < self.steps and self._order[step * self.batch_size][0]

    def revise(self, step: int, ids: Sequence[str]) -> None:
        """Replay these examples first from a step on, counted from 0, followed by the others in their earlier order.

        A Trainer reads one batch ahead, so its next step can no longer be changed.

        Raises
        ------
        ConfigError
            If an example has no weight in the plan.
        """
        if self.plan is None:
            raise ConfigError("without a replay plan there is nothing to revise")
        weights = dict(zip(self.plan.ids, self.plan.weights, strict=True))
        for id_ in ids:
            if not weights.get(id_):
                raise ConfigError(f"the plan does not replay {id_!r}")
        slots = [i for i in range(step * self.batch_size, len(self._order)) if self._order[i][0]]
        first = set(ids)
        later = [self._order[i][1] for i in slots if self._order[i][1] not in first]
        order = [(True, id_) for id_ in [*ids, *later][: len(slots)]]
        self._encode(order)
        for i, key in zip(slots, order, strict=True):
            self._order[i] = key

    def __len__(self) -> int:
        """Return the number of examples: steps times batch size."""
        return len(self._order)

    def __getitem__(self, index: int) -> Encoded:
        """Return the tokens of the example at a position."""
        return self._encoded[self._order[index]]

    def collate(self, batch: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """Pad a batch to the inputs of a causal language model."""
        ids, mask, labels = pad(batch, self._padding)
        inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if any(encoded.weight != 1 for encoded in batch):
            inputs["weights"] = torch.tensor([encoded.weight for encoded in batch], dtype=torch.float32)
        return inputs

    def dataset(self) -> datasets.Dataset:
        """Return a view as a `datasets.Dataset`, which TRL's `SFTTrainer` needs.

        Its rows are the `input_ids` and `labels` of one example each, read from the mixture on access. The `SFTTrainer`
        must not change it: `dataset_kwargs={"skip_prepare_dataset": True}`. With `packing=True`, or `padding_free=True`
        and `max_length=None`, it then concatenates the examples of a batch instead of padding them.
        """
        # A Trainer keeps a column of this name; the transform replaces the positions by tokens.
        return datasets.Dataset.from_dict({"input_ids": list(range(len(self)))}).with_transform(_Rows(self))


class _Rows:
    """Transform from positions to the mixture's current tokens."""

    def __init__(self, mixture: ReplayMixture) -> None:
        self.mixture, self._name = mixture, uuid4().hex

    def __call__(self, batch: Mapping[str, Sequence[int]]) -> dict[str, list[list[int]]]:
        rows = [self.mixture[i] for i in batch["input_ids"]]
        return {"input_ids": [row.ids for row in rows], "labels": [row.labels for row in rows]}

    def __deepcopy__(self, _: Any) -> _Rows:
        """Return self: a Trainer copies its data set, and a copy of the mixture would miss its revisions."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle a name only: datasets pickles a transform to hash it, which is slow with all tokens."""
        return _refuse_unpickling, (self._name,)


def _refuse_unpickling(_: str) -> NoReturn:
    raise ConfigError("a mixture's data set can be read only in the process that made it: set dataloader_num_workers=0")


class ReplayCallback(TrainerCallback, ExportableState):
    """Refuse a Trainer that would not train on the mixture in its order, and let a selector change the next examples.

    The selection is kept in the Trainer's checkpoints, so that a resumed run replays in the same order.

    Parameters
    ----------
    mixture : ReplayMixture
    selector : ReplaySelector, optional
        Such as `OnlineSelector`; needed where the plan's phase is 'in-training'.

    Raises
    ------
    ConfigError, MismatchError
        If the selector is incompatible with the mixture.
    """

    def __init__(self, mixture: ReplayMixture, selector: ReplaySelector | None = None) -> None:
        self._mixture, self._selector = mixture, selector
        if selector is not None:
            selector.check(mixture)
        elif mixture.plan is not None and mixture.plan.phase == "in-training":
            raise ConfigError(
                f"the strategy {mixture.plan.strategy!r} selects during training: "
                "give MostForgottenSelector as the selector"
            )

    def state(self) -> dict[str, Any]:
        """Trainer hook: return the state to keep in a checkpoint."""
        return {"args": {}, "attributes": {"replayed": self._mixture.replayed if self._selector is not None else None}}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: Any,
        control: Any,  # noqa: ARG002
        model: Any = None,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """Trainer hook.

        Raises
        ------
        ConfigError
            If the Trainer shuffles, or its data, batches or steps differ from the mixture's.
        """
        if not self._reads_the_mixture(train_dataloader.dataset):
            raise ConfigError(
                "the Trainer does not train on the mixture: give it the mixture itself, or TRL's "
                'SFTTrainer the mixture\'s dataset() and dataset_kwargs={"skip_prepare_dataset": True}'
            )
        batches = train_dataloader.batch_sampler
        while hasattr(batches, "batch_sampler"):  # Accelerate wraps the Trainer's
            batches = batches.batch_sampler
        if not isinstance(batches.sampler, SequentialSampler):
            raise ConfigError(
                'the order of replay must be kept: set train_sampling_strategy="sequential" in TrainingArguments'
            )
        examples = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if examples != self._mixture.batch_size:
            raise ConfigError(f"a step of the Trainer is {examples} examples, the mixture's {self._mixture.batch_size}")
        if state.max_steps != self._mixture.steps:
            raise ConfigError(f"set max_steps={self._mixture.steps}: the Trainer would take {state.max_steps} steps")
        if self._selector is not None:
            if args.dataloader_num_workers:
                raise ConfigError(
                    "set dataloader_num_workers=0: a selection during training does not reach other workers"
                )
            kept = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {}).get("replayed")
            # A new training has this state, too: that of the callback as it was made.
            if state.global_step and kept is not None:
                self._mixture.revise(0, kept)
            elif self._selector.due(0, self._mixture):
                self._select(self._selector, model, state.global_step)

    def _reads_the_mixture(self, data: Any) -> bool:
        if not isinstance(data, datasets.Dataset):
            return data is self._mixture
        rows = data.format["format_kwargs"].get("transform")
        positions = list(data.with_format(None)["input_ids"]) if isinstance(rows, _Rows) else None
        return positions == list(range(len(self._mixture))) and rows.mixture is self._mixture

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: Any,
        control: Any,  # noqa: ARG002
        model: Any = None,
        **_: Any,
    ) -> None:
        """Trainer hook."""
        if self._selector is not None and self._selector.due(state.global_step, self._mixture):
            # The Trainer has already read the first batch of the next step.
            self._select(self._selector, model, state.global_step + 1)

    def _select(self, selector: ReplaySelector, model: Any, step: int) -> None:
        """Replay what a selector selects from a step on, counted from 0."""
        replayed = self._mixture.replayed_before(step)
        language_model = LanguageModel(model, self._mixture.tokenizer, "the model in training", self._mixture.rendering)
        selected = selector.select(language_model, self._mixture, replayed)
        self._mixture.revise(step, processes.from_first(selected))


def spread(new: int, old: int) -> Iterator[bool]:
    """Yield for each of new + old batches whether it is an old one, spaced as evenly as whole numbers allow."""
    total = new + old
    for i in range(total):
        yield ((2 * i + 2) * old + total) // (2 * total) > (2 * i * old + total) // (2 * total)


def spread_by(sizes: Sequence[float], old: int) -> list[bool]:
    """Return for each step whether its batch is an old one, after equal parts of the sum of the steps' sizes.

    Steps of size zero at the end, as of a learning rate that falls to it, get an old batch only if no other is left.
    """
    parts = np.cumsum(sizes) / max(float(np.sum(sizes)), 1e-300)
    chosen = np.zeros(len(parts), dtype=bool)
    for i in range(old):
        wanted = int(np.searchsorted(parts, (i + 0.5) / old))
        free = np.flatnonzero(~chosen)
        later = free[free >= wanted]
        chosen[later[0] if len(later) else free[-1]] = True
    return [bool(each) for each in chosen]
