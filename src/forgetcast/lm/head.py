"""Losses and KL divergences from hidden states, in chunks: the logits of all tokens are never in memory at once."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import log_softmax
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
    sample : tensor of int, shape (1, L), or None
        Tokens for the comparison, L >= 2; None: the caller compares.

    Attributes
    ----------
    chunk : int
        Number of tokens whose logits are computed at once.
    chunked : bool
        Whether decoder and output layer run separately; otherwise all logits of a batch are in memory at once.
    decoder, output : Module
    scale : float
        What the logits are multiplied by.
    cap : float or None
        What the logits are soft-capped to.
    """

    def __init__(self, model: PreTrainedModel, sample: torch.Tensor | None) -> None:
        untyped: Any = model
        self._model = untyped
        inner = base_model(model)
        self.decoder: Any = getattr(inner, inner.base_model_prefix, None)
        self.output: Any = inner.get_output_embeddings()
        config = inner.config.get_text_config()
        self.cap = getattr(config, "final_logit_softcapping", None)
        self.scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        self.chunk = max(CHUNK_LOGITS // embedding_rows(model), 1)
        # Virtual tokens are added by the adapter's forward pass, which is around the model's own.
        self.chunked = self.decoder is not None and self.output is not None and not is_prompt_learning(model)
        if self.chunked and sample is not None and not self._agrees(sample):
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
        return self._nll(self._run(ids, mask), labels)

    def _nll(self, output: Any, labels: torch.Tensor) -> torch.Tensor:
        # On the device at once, and back at once: each way makes the processor wait for all work so far.
        targets = labels[:, 1:][_predicted(labels)].to(self._model.device).split(self.chunk)
        chunks = zip(self._chunks(output, labels, self.chunk), targets, strict=True)
        parts = torch.cat([_parts_of_losses(logits, expected) for logits, expected in chunks]).cpu().double()
        chosen, largest, total = parts.unbind(dim=1)
        return _by_token(labels, [total.log() + largest - chosen])

    def nll_and_states(
        self, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor, layers: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the losses, as `nll` does, and hidden states summed over the target tokens, by one forward pass.

        Parameters
        ----------
        ids, mask, labels : tensor of int, shape (B, L)
            As in `nll`.
        layers : sequence of int
            0: the embeddings; l: the output of block l. Of the last one, the states after the final normalisation.

        Returns
        -------
        nll : tensor, shape (B, L)
        states : tensor of double, shape (B, len(layers), D)
        """
        output = self._run(ids, mask, states=True)
        # Adapters that add virtual tokens put them first.
        states = torch.stack([output.hidden_states[layer][:, -labels.shape[1] :] for layer in layers], dim=1)
        targets = (labels != IGNORED_INDEX).to(states.device, torch.float64)
        return self._nll(output, labels), torch.einsum("bkld,bl->bkd", states.double(), targets).cpu()

    def logits(self, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor, chunk: int) -> Iterator[torch.Tensor]:
        """Yield the logits that predict the target tokens, row by row: tensors of shape (T, V), T at most `chunk`.

        Parameters
        ----------
        ids, mask, labels : tensor of int, shape (B, L)
            As in `nll`.
        chunk : int
        """
        return self._chunks(self._run(ids, mask), labels, chunk)

    def _run(self, ids: torch.Tensor, mask: torch.Tensor, *, states: bool = False) -> Any:
        """Output of the decoder, or of the whole model where they cannot be separated; on request with all states."""
        device = self._model.device
        # In training with mixed precision, the decoder is still that of the weights' type, and the model is not.
        run = self.decoder if self.chunked else vars(self._model).get("_original_forward", self._model)
        further = {"output_hidden_states": True} if states else {}
        return run(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, **further)

    def _chunks(self, output: Any, labels: torch.Tensor, chunk: int) -> Iterator[torch.Tensor]:
        # The logits of virtual tokens, if there are any, come first.
        hidden = output.last_hidden_state if self.chunked else output.logits[:, -labels.shape[1] :]
        # A mask on the device would be counted there, and waited for.
        rows, columns = (at.to(hidden.device) for at in _predicted(labels).nonzero(as_tuple=True))
        for part in hidden[rows, columns].split(chunk):
            yield self.finish(self.output(part)) if self.chunked else part

    def finish(self, logits: torch.Tensor) -> torch.Tensor:
        """Scale and soft-cap what the output layer gives, as the model does; any shape."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
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


def kl_divergence(
    head: Head, reference: Head, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Return KL(reference || model) of the distribution at each target token, in nats, shape (B, L), 0 elsewhere.

    If one model has more output rows, which pad its vocabulary, they are left out.

    Parameters
    ----------
    head, reference : Head
    ids, mask, labels : tensor of int, shape (B, L)
        As in `Head.nll`.
    """
    chunk = max(min(head.chunk, reference.chunk) // 4, 1)  # two models, and in double precision
    pairs = zip(head.logits(ids, mask, labels, chunk), reference.logits(ids, mask, labels, chunk), strict=True)
    return _by_token(labels, (_kl(logits, expected) for logits, expected in pairs))


def _predicted(labels: torch.Tensor) -> torch.Tensor:
    """Whether each position but the last predicts a target, shape (B, L - 1): position t predicts token t + 1."""
    return labels[:, 1:] != IGNORED_INDEX


def _by_token(labels: torch.Tensor, parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """Put the values of the target tokens, row by row, into a tensor of shape (B, L)."""
    values = torch.zeros(labels.shape, dtype=torch.float64)
    values[:, 1:][_predicted(labels)] = torch.cat(list(parts))
    return values


def _kl(logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Divergences (T,) of two logits (T, V), on the CPU in double precision."""
    rows = min(logits.shape[1], reference.shape[1])
    log_q = log_softmax(logits[:, :rows].double(), dim=1)
    log_p = log_softmax(reference[:, :rows].to(logits.device).double(), dim=1)
    terms = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q))  # 0 log 0 is 0
    return terms.sum(dim=1).clamp(min=0).cpu()  # rounding may give -1e-17


def _parts_of_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """What the losses are computed from, float32 of shape (T, 3), of logits (T, V) and tokens (T,), on their device.

    The target's logit, the largest, and the sum of the exponentials of all less the largest. Overwrites the logits.
    Not PyTorch's cross entropy: on the CPU it adds the words one after the other, and what the rare ones of a large
    vocabulary have in common gets lost.
    """
    logits = logits.float()
    chosen = logits.gather(1, targets.to(logits.device)[:, None])
    largest = logits.amax(dim=1, keepdim=True)
    total = logits.sub_(largest).exp_().sum(dim=1, keepdim=True)
    return torch.cat([chosen, largest, total], dim=1)
