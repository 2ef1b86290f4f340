"""Replay as a data set: the new task's batches with whole batches of upstream examples spread evenly between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from forgetcast.errors import ConfigError, DataError
from forgetcast.lm.text import Encoded, encode, pad, pad_id
from forgetcast.pool import Pool
from forgetcast.replay import ReplayPlan


class ReplayMixture(Dataset[Encoded]):
    """Everything a fine-tune sees, in order; read it without shuffling.

    Replay comes on top of the task's examples, in whole batches: a batch is all new or all old, so the share of the
    loss that replay gets does not depend on how long its texts are.

    Parameters
    ----------
    task : Pool
        New examples; their order is drawn anew in every pass.
    tokenizer : PreTrainedTokenizerBase
    steps : int
        Batches of new examples.
    batch_size : int
        Examples that one optimiser step sees, over all devices and accumulation steps.
    max_length : int
        Longest input, in tokens.
    seed : int
        Of the order of the new examples.
    plan : ReplayPlan, optional
        One of the strategy 'padding' brings in more new examples instead of old ones.
    pool : Pool, optional
        Needed with a plan; must be the one that the plan was made for.

    Attributes
    ----------
    replayed : tuple of str
        Ids of the upstream examples in it, in order.
    steps : int
        Optimiser steps to train for, those on replayed batches included.
    batch_size : int

    Raises
    ------
    ConfigError
        If the ratio is so small that no batch would be replayed.
    DataError
        If an example has no token to train on, or is a conversation that the tokenizer cannot write.
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
    ) -> None:
        replay_steps = 0
        if plan is not None and plan.ratio > 0:
            if pool is None:
                raise ConfigError("a replay plan needs the pool that it was made for")
            plan.check_pool(pool)
            replay_steps = round(steps * plan.ratio)
            if replay_steps == 0:
                raise ConfigError(
                    f"a ratio of {plan.ratio:g} over {steps} steps replays no batch; use at least {1 / steps:.3g}"
                )
        padding = plan is not None and plan.strategy == "padding"
        self.replayed = plan.order(replay_steps * batch_size) if plan and replay_steps and not padding else ()
        self.steps, self.batch_size = steps + replay_steps, batch_size
        self._padding = pad_id(tokenizer)
        # Every arm of a comparison sees the same new batches; those that pad are drawn on their own.
        new, more, old = _passes(len(task), [seed]), _passes(len(task), [seed, 1]), iter(self.replayed)
        order = [
            (False, task.ids[next(more if extra else new)]) if padding or not extra else (True, next(old))
            for extra in spread(steps, replay_steps)
            for _ in range(batch_size)
        ]
        # Once each and before training, so that what cannot be trained on is an error here.
        encoded = {}
        for replay, id_ in dict.fromkeys(order):
            source = pool if replay and pool is not None else task
            example = source[int(source.positions([id_])[0])]
            encoded[replay, id_] = found = encode(example, tokenizer, max_length, end=True)
            if not found.targets:
                raise DataError(f"example {id_!r} has no token to train on: its text is a single token")
        self._examples = [encoded[key] for key in order]

    def __len__(self) -> int:
        """Count the examples: steps times batch size."""
        return len(self._examples)

    def __getitem__(self, index: int) -> Encoded:
        """Tokens of the example at a position."""
        return self._examples[index]

    def collate(self, batch: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """Pad a batch to what a causal language model is trained on."""
        ids, mask, labels = pad(batch, self._padding)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class ReplayCallback(TrainerCallback):
    """Refuse a Trainer that would not train on a mixture as it is laid out.

    Parameters
    ----------
    mixture : ReplayMixture
    """

    def __init__(self, mixture: ReplayMixture) -> None:
        self._mixture = mixture

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: Any,
        control: Any,  # noqa: ARG002
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """Is called by the Trainer, with arguments of these names.

        Raises
        ------
        ConfigError
            If the Trainer has a sampler of its own, or other batches or steps than the mixture.
        """
        batches = train_dataloader.batch_sampler
        while hasattr(batches, "batch_sampler"):  # Accelerate's, around that of the Trainer
            batches = batches.batch_sampler
        if not isinstance(batches.sampler, SequentialSampler):
            raise ConfigError(
                'replay has an order to keep: set train_sampling_strategy="sequential" in TrainingArguments'
            )
        examples = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if examples != self._mixture.batch_size:
            raise ConfigError(f"a step of the Trainer is {examples} examples, the mixture's {self._mixture.batch_size}")
        if state.max_steps != self._mixture.steps:
            raise ConfigError(f"set max_steps={self._mixture.steps}: the Trainer would take {state.max_steps} steps")


def spread(new: int, old: int) -> Iterator[bool]:
    """Say for each of new + old batches whether it is an old one: as evenly spaced as whole numbers allow."""
    total = new + old
    for i in range(total):
        yield ((2 * i + 2) * old + total) // (2 * total) > (2 * i * old + total) // (2 * total)


def _passes(n: int, seed: list[int]) -> Iterator[int]:
    rng = np.random.default_rng(seed)
    while True:
        yield from rng.permutation(n).tolist()
