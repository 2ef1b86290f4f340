from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from forgetcast import ConfigError, DataError, Example, MismatchError
from forgetcast.lm import LanguageModel, score
from forgetcast.lm.gradients import _count_sketch, _gradient, projected_gradients, projected_update
from forgetcast.lm.tokens import IGNORED_INDEX
from support.adapters import adapted_model, lora
from support.data import make_pool
from support.models import tiny


def full_gradient(language_model: Any, example: Example) -> np.ndarray:
    """Gradient by a plain backward pass of one example."""
    model = language_model.model
    encoded = language_model.encode(example, language_model.context)
    ids = torch.tensor([encoded.ids])
    logits = model(input_ids=ids).logits[0, :-1]
    counted = torch.tensor(encoded.labels[1:]) != IGNORED_INDEX
    nll = torch.nn.functional.cross_entropy(logits[counted], ids[0, 1:][counted])
    model.zero_grad(set_to_none=True)
    nll.backward()
    rows = [p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in model.parameters()]
    return torch.cat(rows).numpy().astype(np.float64)


def test_products_are_those_of_the_full_gradients() -> None:
    base, pool = tiny(), [example for example in make_pool(8) if example.text is not None]
    full = np.array([full_gradient(base, example) for example in pool])
    found = np.array(list(projected_gradients(base, [(example,) for example in pool], end=False, dimensions=8192)))
    norms = np.linalg.norm(full, axis=1)
    error = (found @ found.T - full @ full.T) / np.outer(norms, norms)
    assert np.abs(error).max() < 5 * np.sqrt(2 / 8192)


def test_the_projection_is_unbiased_over_seeds() -> None:
    rng = np.random.default_rng(0)
    a, b = (torch.tensor(rng.normal(size=500), dtype=torch.float32) for _ in range(2))
    b = b + a
    exact = float(a @ b)
    products = [float(_count_sketch([a], 64, seed) @ _count_sketch([b], 64, seed)) for seed in range(400)]
    bound = np.sqrt(2 / 64) * float(a.norm() * b.norm())
    assert np.std(products) < 1.2 * bound
    assert abs(np.mean(products) - exact) < 5 * bound / np.sqrt(400)


def test_is_the_same_every_time_and_leaves_the_model_as_it_was() -> None:
    base, pool = tiny(), make_pool(4)
    before = base.weights_hash
    (first,), (second,) = (list(projected_gradients(base, [list(pool)], dimensions=16)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    vars(base).pop("weights_hash")
    assert base.weights_hash == before
    assert all(parameter.grad is None for parameter in base.model.parameters())


def test_refuses_frozen_weights_and_gradients_that_overflow() -> None:
    frozen, pool = tiny(), make_pool(4)
    frozen.model.requires_grad_(False)
    with pytest.raises(ConfigError, match="frozen or quantised"):
        next(projected_gradients(frozen, [list(pool)]))
    broken = tiny()
    with torch.no_grad():
        next(broken.model.parameters()).fill_(torch.inf)
    with pytest.raises(DataError, match="the gradient at the example 'e0' is zero or not finite"):
        next(projected_gradients(broken, [(pool[0],)]))


def moved(base: LanguageModel, size: float) -> LanguageModel:
    """The model after a step of this length along the gradients of two examples, one to forget and one to learn."""
    model, pool = copy.deepcopy(base.model), make_pool(8)
    learned, lost = (_gradient(base, [example], 1, end=False) for example in (pool[0], pool[3]))
    step = [one - other for one, other in zip(lost, learned, strict=True)]
    norm = float(torch.cat([part.flatten() for part in step]).norm())
    with torch.no_grad():
        for parameter, part in zip(model.parameters(), step, strict=True):
            parameter.add_(part, alpha=size / norm)
    return replace(base, model=model)


def test_products_with_an_update_are_directional_derivatives() -> None:
    """Oracle: central differences of each example's loss along the update, without any gradient."""
    base, pool = tiny(), make_pool(8)
    tuned = moved(base, 1.0)
    update = [(e - b).detach() for e, b in zip(tuned.model.parameters(), base.model.parameters(), strict=True)]
    step, ends = 2e-3, []
    for sign in (1, -1):
        part = copy.deepcopy(base.model)
        with torch.no_grad():
            for parameter, change in zip(part.parameters(), update, strict=True):
                parameter.add_(change, alpha=sign * step)
        ends.append(score(replace(base, model=part), pool).nll)
    derivative = (ends[0] - ends[1]) / (2 * step)
    singles = [(example,) for example in pool]
    rows = np.array(list(projected_gradients(base, singles, end=False, dimensions=2**18)))
    sketch = projected_update(base, tuned, dimensions=2**18)
    norm = float(torch.cat([part.flatten() for part in update]).norm())
    bound = 5 * np.sqrt(2 / 2**18) * norm * np.linalg.norm(rows, axis=1)
    assert (np.abs(rows @ sketch - derivative) < bound + 1e-3 * np.abs(derivative)).all()
    assert derivative.max() > 3 * bound.max() > -3 * bound.max() > derivative.min()  # or the bound would say nothing
    assert np.corrcoef(rows @ sketch, derivative)[0, 1] > 0.99
    # What is forgotten by a small step of the update is that, to first order: positive is forgotten.
    small = score(moved(base, 1e-2), pool).nll - score(base, pool).nll
    assert np.corrcoef(small, rows @ sketch)[0, 1] > 0.99


def test_updates_of_other_shapes_and_of_nothing_are_refused() -> None:
    base = tiny()
    with pytest.raises(DataError, match="no weight differs"):
        projected_update(base, replace(base, model=copy.deepcopy(base.model)))
    other = copy.deepcopy(base.model)
    other.resize_token_embeddings(len(base.tokenizer) + 64)
    with pytest.raises(MismatchError, match="differ in shape"):
        projected_update(base, replace(base, model=other))
    frozen = tiny()
    frozen.model.requires_grad_(False)
    with pytest.raises(ConfigError, match="frozen or quantised"):
        projected_update(frozen, moved(base, 0.1))


def test_an_adapter_is_merged_and_untied_weights_are_refused() -> None:
    base = tiny()
    adapted = adapted_model(copy.deepcopy(base.model), lora())
    merged = copy.deepcopy(adapted).merge_and_unload().requires_grad_(True)
    expected = projected_update(base, replace(base, model=merged), dimensions=512)
    found = projected_update(base, replace(base, model=adapted), dimensions=512)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    tied = tiny("gpt2")
    untied = copy.deepcopy(tied.model)
    with torch.no_grad():
        untied.get_input_embeddings().weight.add_(0.1)
    same = projected_update(tied, replace(tied, model=untied), dimensions=512)
    untied.get_output_embeddings().weight = torch.nn.Parameter(untied.get_input_embeddings().weight.detach().clone())
    np.testing.assert_array_equal(projected_update(tied, replace(tied, model=untied), dimensions=512), same)
    with torch.no_grad():
        untied.get_output_embeddings().weight.add_(0.1)
    with pytest.raises(MismatchError, match="which the base model ties"):
        projected_update(tied, replace(tied, model=untied))
