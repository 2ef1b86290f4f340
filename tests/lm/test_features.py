from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from forgetcast import ConfigError, Example, Pool
from forgetcast.lm import LanguageModel, head, hidden_states, score
from forgetcast.lm.features import default_layers, forward
from forgetcast.lm.tokens import IGNORED_INDEX
from support.data import make_pool
from support.models import tiny

POOL = make_pool(12)


def plain_states(language_model: LanguageModel, example: Example, layer: int) -> np.ndarray:
    """The oracle: one example, one forward pass of the whole model in double precision, a mean over positions."""
    encoded = language_model.encode(example, language_model.context)
    model = copy.deepcopy(language_model.model).double()
    with torch.no_grad():
        states = model(torch.tensor([encoded.ids]), output_hidden_states=True).hidden_states[layer][0]
    return np.mean([states[i].numpy() for i, label in enumerate(encoded.labels) if label != IGNORED_INDEX], axis=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_states_are_those_of_a_plain_forward_pass(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_LOGITS", 4096 * 7)
    language_model = tiny(family)
    found = hidden_states(language_model, POOL, layers=(1, -1)).reshape(len(POOL), 2, 32)
    for i, example in enumerate(POOL):
        for k, layer in enumerate((1, 2)):
            np.testing.assert_allclose(found[i, k], plain_states(language_model, example, layer), rtol=1e-4, atol=1e-5)


def test_the_loss_of_the_same_pass_is_the_score_in_windows_too() -> None:
    language_model, texts = tiny(), Pool([Example("long", "the loss of a model " * 30), *POOL])
    for settings in ({}, {"max_length": 20}, {"max_length": 20, "stride": 10}):
        passed, scores = forward(language_model, texts, (1,), **settings), score(language_model, texts, **settings)
        np.testing.assert_allclose(passed.nll, scores.nll, rtol=1e-6)
        assert passed.inputs.digests == list(scores.digests or ())


def test_what_cannot_be_measured_is_nan_and_the_rest_is_not() -> None:
    language_model, finished = tiny(bos=False), []
    found = hidden_states(language_model, Pool([*POOL, Example("one", "a")]), on_progress=finished.append)
    assert found.shape == (13, 2 * 32)
    assert found.dtype == np.float32
    assert np.isnan(found[-1]).all()
    assert np.isfinite(found[:-1]).all()
    assert sum(finished) == len(POOL)
    with torch.no_grad():
        language_model.model.get_input_embeddings().weight[:] = float("inf")
    assert np.isnan(hidden_states(language_model, POOL)).all()


def test_layers_are_counted_from_either_end_and_checked() -> None:
    language_model = tiny()
    assert default_layers(language_model) == (1, 2)
    np.testing.assert_array_equal(
        hidden_states(language_model, POOL, layers=(-1,)), hidden_states(language_model, POOL, layers=[2])
    )
    for layers in ((), (3,), (-4,), (2, -1)):
        with pytest.raises(ConfigError, match="from 0, the embeddings, to 2"):
            hidden_states(language_model, POOL, layers=layers)
