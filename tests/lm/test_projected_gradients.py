from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from forgetcast import ConfigError, DataError, Example
from forgetcast.lm.gradients import _count_sketch, projected_gradients
from forgetcast.lm.tokens import IGNORED_INDEX
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
