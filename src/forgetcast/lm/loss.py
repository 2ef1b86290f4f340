"""Losses of a fine-tune other than the plain one: distance to the base model on replayed text, weights of examples."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.func import functional_call
from torch.nn import functional
from transformers import Trainer

from forgetcast.data.recipe import Recipe
from forgetcast.lm.mixture import ReplayMixture
from forgetcast.lm.tokens import IGNORED_INDEX


def easy_weights(losses: np.ndarray) -> np.ndarray:
    """Return weights exp(-loss / median loss), scaled to a mean of one, shape (n,); a NaN counts as the median.

    References
    ----------
    Sanyal et al. (2025), Upweighting easy samples in fine-tuning mitigates forgetting, arXiv 2502.02797.
    """
    middle = float(np.nanmedian(losses)) if not np.isnan(losses).all() else 1.0
    weights = np.exp(-np.nan_to_num(losses, nan=middle) / (middle or 1.0))
    return np.asarray(weights / weights.mean())


class WeightedTrainer(Trainer):
    """A Trainer whose loss follows the recipe's `kl_weight`, `replay_weight` and `easy_samples`.

    The loss of a token of a replayed batch is (1 - kl_weight) times the usual one plus kl_weight times the divergence
    KL(start || now) of the next token, in nats, from the model that the fine-tune started from. Both are means over
    the target tokens of a step, multiplied by `replay_weight`. New examples have the weights that the mixture gives
    them.

    Parameters
    ----------
    mixture : ReplayMixture
        That it trains on.
    recipe : Recipe
    start : mapping of str to Tensor, optional
        Weights that the fine-tune started from; default: those without the LoRA adapter.
    **given
        Of the Trainer.
    """

    def __init__(
        self, *, mixture: ReplayMixture, recipe: Recipe, start: Mapping[str, torch.Tensor] | None = None, **given: Any
    ) -> None:
        self._mixture, self._recipe, self._start = mixture, recipe, start
        super().__init__(**given)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Trainer hook."""
        inputs = dict(inputs)
        weights = inputs.pop("weights", None)
        replayed = self._mixture.replays(self.state.global_step)
        kl, scale = (self._recipe.kl_weight, self._recipe.replay_weight) if replayed else (0.0, 1.0)
        if weights is None and not kl:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            return (scale * loss, outputs) if return_outputs else scale * loss
        targets = inputs.pop("labels")[:, 1:]
        counted = targets != IGNORED_INDEX
        outputs = model(**inputs)
        logits = outputs.logits[:, :-1][counted].float()
        losses = functional.cross_entropy(logits, targets[counted], reduction="none")
        if kl:
            before = functional.log_softmax(self._logits_at_start(model, inputs)[:, :-1][counted].float(), dim=-1)
            now = functional.log_softmax(logits, dim=-1)
            divergence = functional.kl_div(now, before, log_target=True, reduction="none").sum(dim=-1)
            losses = (1 - kl) * losses + kl * divergence
        if weights is not None:
            losses = losses * weights[counted.nonzero()[:, 0]]
        loss = scale * losses.sum() / (counted.sum() if num_items_in_batch is None else num_items_in_batch)
        if (
            num_items_in_batch is not None
            and self.args.average_tokens_across_devices
            and self.model_accepts_loss_kwargs
        ):
            loss = loss * self.accelerator.num_processes  # over which the Trainer averages what it counted over all
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _logits_at_start(self, model: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Return the logits of the model that the fine-tune started from."""
        plain: Any = self.accelerator.unwrap_model(model)
        was_training = plain.training
        plain.eval()  # no dropout
        try:
            if self._start is None:
                with plain.disable_adapter():
                    output = plain(**inputs)
            else:
                # Once for tied weights; what is not saved, such as rotary tables, is not trained either.
                names = (name for name, _ in chain(plain.named_parameters(), plain.named_buffers()))
                start = {name: self._start[name] for name in names if name in self._start}
                output = functional_call(plain, start, args=(), kwargs=dict(inputs))
        finally:
            plain.train(was_training)
        logits: torch.Tensor = output.logits
        return logits
