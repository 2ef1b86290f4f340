"""Losses from hidden states, a few tokens at a time, so that the logits of all tokens never exist at once."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

LOGITS = 2**24
"""Most logits that are computed at once: 64 MiB in float32, whatever the vocabulary."""

TOLERANCE = 1e-3
"""Largest difference from the whole model's losses, relative to their size; that of float32 is near 1e-6."""


class Head:
    """Negative log-likelihoods of a causal language model, by its decoder and its output layer apart.

    The logits are the output layer's, soft-capped or scaled as the configuration says (Gemma, Cohere, Granite). Whether
    that is all the model does is checked on a few tokens against its own forward pass; if it is not, that one is used
    throughout, with a warning.

    Parameters
    ----------
    model : PreTrainedModel
        In evaluation mode; an adapter of PEFT's may be on it.
    sample : tensor of int, shape (1, L)
        Tokens to check it on, L >= 2.
    """

    def __init__(self, model: PreTrainedModel, sample: torch.Tensor) -> None:
        whole: Any = model
        self._model = whole
        inner = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
        self._decoder: Any = getattr(inner, inner.base_model_prefix, None)
        self._output: Any = inner.get_output_embeddings()
        config = inner.config.get_text_config()
        self._cap = getattr(config, "final_logit_softcapping", None)
        self._scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        self.chunked = self._decoder is not None and self._output is not None
        if self.chunked and not self._agrees(sample):
            warnings.warn(
                f"{type(inner).__name__} does more to its logits than forgetcast knows; its own forward pass is used, "
                "which takes more memory",
                stacklevel=2,
            )
            self.chunked = False

    def nll(self, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Loss of each token that counts, shape (B, L), nats; 0 elsewhere.

        Parameters
        ----------
        ids, mask : tensor of int, shape (B, L)
        labels : tensor of int, shape (B, L)
            The token where it counts, else -100. The first place never does.
        """
        device = self._model.device
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "use_cache": False}
        counts = labels[:, 1:] != -100  # what each place but the last predicts
        found = torch.zeros(labels.shape, dtype=torch.float64)
        if not self.chunked:
            logits = self._model(**inputs).logits
            found[:, 1:][counts] = _losses(logits[:, :-1][counts.to(logits.device)], labels[:, 1:][counts])
            return found
        hidden = self._decoder(**inputs).last_hidden_state
        hidden = hidden[:, :-1][counts.to(hidden.device)]
        targets = labels[:, 1:][counts]
        at_once = max(LOGITS // self._output.weight.shape[0], 1)
        parts = [
            _losses(self._logits(hidden[start : start + at_once]), targets[start : start + at_once])
            for start in range(0, len(targets), at_once)
        ]
        found[:, 1:][counts] = torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)
        return found

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self._output(hidden)
        if self._scale != 1.0:
            logits = logits * self._scale
        if self._cap is not None:
            logits = torch.tanh(logits / self._cap) * self._cap
        return logits

    def _agrees(self, sample: torch.Tensor) -> bool:
        labels = sample.clone()
        labels[:, 0] = -100
        mask = torch.ones_like(sample)
        chunked = self.nll(sample, mask, labels)
        self.chunked = False
        whole = self.nll(sample, mask, labels)
        self.chunked = True
        if not torch.isfinite(whole).all():
            return True  # not a matter of the head; the scores will say so
        tolerance = max(TOLERANCE, 10 * torch.finfo(self._model.dtype).eps)
        return bool(torch.allclose(chunked, whole, rtol=tolerance, atol=tolerance))


def _losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Of logits (T, V) and tokens (T,), on the CPU in double precision."""
    return cross_entropy(logits.float(), targets.to(logits.device), reduction="none").double().cpu()
