"""Scoring on an accelerator: every tensor is made on it, and the processor waits for it once a batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from forgetcast.lm import LanguageModel, head, score
from forgetcast.lm.features import forward
from forgetcast.lm.score import _batches, prepare
from support.data import make_pool
from support.device import DEVICE, Accelerator, move
from support.models import tiny

BATCH_TOKENS = 128


def eager(family: str) -> LanguageModel:
    language_model = tiny(family)
    language_model.model.set_attn_implementation("eager")
    return language_model


def test_the_accelerator_refuses_tensors_of_the_cpu_and_counts_waits() -> None:
    with Accelerator() as accelerator:
        there = torch.ones(3, device=DEVICE)
        with pytest.raises(AssertionError, match="two devices"):
            there + torch.ones(3)
        assert (there + 1).device == DEVICE
        assert not accelerator.waits
        assert (there + 1).cpu().tolist() == [2.0, 2.0, 2.0]
        assert accelerator.waits.total() == 1
        assert float(there.sum()) == 3.0
        _ = there[there > 0]
        assert accelerator.waits.total() > 2


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_scoring_waits_once_a_batch(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_LOGITS", 4096 * 7)  # so that the tokens of a batch come in many chunks
    monkeypatch.setattr(head.Head, "_agrees", lambda *_: True)
    language_model, pool = eager(family), make_pool(12)
    expected = score(language_model, pool, batch_tokens=BATCH_TOKENS).nll
    pieces = [piece for _, piece in prepare(language_model, pool, None, None).pieces]
    batches = len(list(_batches(pieces, BATCH_TOKENS)))
    assert batches > 2
    _ = language_model.weights_hash
    with Accelerator() as accelerator:
        move(language_model.model)
        assert language_model.model.device == DEVICE
        found = score(language_model, pool, batch_tokens=BATCH_TOKENS).nll
    np.testing.assert_array_equal(found, expected)
    assert accelerator.waits.total() == batches, accelerator.waits


def test_hidden_states_follow_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head.Head, "_agrees", lambda *_: True)
    language_model, pool = eager("llama"), make_pool(6)
    expected = forward(language_model, pool, (1, 2))
    _ = language_model.weights_hash
    with Accelerator():
        move(language_model.model)
        found = forward(language_model, pool, (1, 2))
    np.testing.assert_array_equal(found.nll, expected.nll)
    np.testing.assert_array_equal(found.states, expected.states)
