"""Losses from hidden states, in chunks, so that the logits of all tokens are never in memory at once."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import PreTrainedModel

from forgetcast.lm.adapters import base_model, is_prompt_learning
from forgetcast.lm.load import embedding_rows
from forgetcast.lm.tokens import IGNORED_INDEX

CHUNK_LOGITS = 2**24
"""Limit on the logits computed at once: 64 MiB in float32, whatever the vocabulary."""

TOLERANCE = 1e-3
"""Largest relative difference from the losses of the model's own forward pass; in float32 it is near 1e-6."""


class Head:
    """Compute token losses of a causal language model, running decoder and output layer separately.

    The logits are those of the output layer, soft-capped or scaled as configured (Gemma, Cohere, Granite). They are
    compared with the model's own forward pass on a few tokens. If they differ, that pass is used throughout, with a
    warning.

    Parameters
    ----------
    model : PreTrainedModel
        In evaluation mode; may have a PEFT adapter.
    sample : tensor of int, shape (1, L)
        Tokens for the comparison, L >= 2.

    Attributes
    ----------
    chunked : bool
        Whether decoder and output layer run separately; otherwise all logits of a batch are in memory at once.
    """

    def __init__(self, model: PreTrainedModel, sample: torch.Tensor) -> None:
        untyped: Any = model
        self._model = untyped
        inner = base_model(model)
        self._decoder: Any = getattr(inner, inner.base_model_prefix, None)
        self._output: Any = inner.get_output_embeddings()
        config = inner.config.get_text_config()
        self._cap = getattr(config, "final_logit_softcapping", None)
        self._scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        self._chunk = max(CHUNK_LOGITS // embedding_rows(model), 1)
        # Virtual tokens are added by the adapter's forward pass, which is around the model's own.
        self.chunked = self._decoder is not None and self._output is not None and not is_prompt_learning(model)
        if self.chunked and not self._agrees(sample):
            warnings.warn(
                f"{type(inner).__name__} changes its logits in an unknown way; its own forward pass is used, which "
                "takes more memory",
                stacklevel=2,
            )
            self.chunked = False

    def nll(self, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss of each target token, in nats, as a tensor of shape (B, L) that is 0 elsewhere.

        Parameters
        ----------
        ids, mask : tensor of int, shape (B, L)
        labels : tensor of int, shape (B, L)
            The token's id if it is a target, else IGNORED_INDEX. The first token of a row is never a target.
        """
        device = self._model.device
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "use_cache": False}
        is_target = labels[:, 1:] != IGNORED_INDEX  # shifted: position t predicts token t + 1
        targets = labels[:, 1:][is_target]
        losses = torch.zeros(labels.shape, dtype=torch.float64)
        if not self.chunked:
            # The logits of virtual tokens, if there are any, come first.
            logits = self._model(**inputs).logits[:, -labels.shape[1] :]
            losses[:, 1:][is_target] = _losses(logits[:, :-1][is_target.to(logits.device)], targets)
            return losses
        hidden = self._decoder(**inputs).last_hidden_state
        hidden = hidden[:, :-1][is_target.to(hidden.device)]
        parts = [
            _losses(self._logits(hidden[start : start + self._chunk]), targets[start : start + self._chunk])
            for start in range(0, len(targets), self._chunk)
        ]
        losses[:, 1:][is_target] = torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)
        return losses

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (T, V) of hidden states (T, D)."""
        logits = self._output(hidden)
        if self._scale != 1.0:
            logits = logits * self._scale
        if self._cap is not None:
            logits = torch.tanh(logits / self._cap) * self._cap
        return logits

    def _agrees(self, sample: torch.Tensor) -> bool:
        """Whether the losses are those of the model's own forward pass."""
        labels = sample.clone()
        labels[:, 0] = IGNORED_INDEX
        mask = torch.ones_like(sample)
        chunked = self.nll(sample, mask, labels)
        self.chunked = False
        reference = self.nll(sample, mask, labels)
        self.chunked = True
        if not torch.isfinite(reference).all():
            return True  # not caused by the head; scoring reports it
        tolerance = max(TOLERANCE, 10 * torch.finfo(self._model.dtype).eps)
        return bool(torch.allclose(chunked, reference, rtol=tolerance, atol=tolerance))


def _losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Losses (T,) of logits (T, V) and tokens (T,), on the CPU in double precision.

    Not PyTorch's cross entropy: on the CPU it adds the words one after the other, and what the rare ones of a large
    vocabulary have in common gets lost.
    """
    logits = logits.float()
    chosen = logits.gather(1, targets.to(logits.device)[:, None])[:, 0]
    return (torch.logsumexp(logits, dim=1).double() - chosen.double()).cpu()
