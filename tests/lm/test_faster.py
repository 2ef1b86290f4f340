"""What makes a fine-tune faster or smaller gives the same model: precision, the fused loss, compiled blocks."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MixtralConfig, MixtralForCausalLM

from forgetcast import ConfigError
from forgetcast.lm import FineTuner, LanguageModel, MostForgottenSelector, Recipe, fused, head, load, score
from forgetcast.lm.fused import fused_loss
from forgetcast.lm.load import compile_blocks
from forgetcast.lm.mixture import ReplayMixture
from forgetcast.lm.score import losses as losses_of
from forgetcast.lm.train import _precision
from support.cli import RunCommand
from support.data import make_pool
from support.models import FAMILIES, save, tiny
from support.plans import plan_for
from support.training import TASK, make_recipe, model_files

RECIPE = make_recipe(steps=4, batch_size=4, max_length=64)


def losses(recipe: Recipe, base: LanguageModel | None = None) -> np.ndarray:
    return score(FineTuner(base or tiny()).tune(TASK, recipe).language_model, TASK).nll


def changed(**changes: Any) -> Recipe:
    return RECIPE.model_copy(update=changes)


class Largest(TorchDispatchMode):
    """Keeps the size of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.size = max(self.size, result.numel())
        return result


@pytest.mark.parametrize("method", ["full", "lora"])
def test_bfloat16_training_computes_in_bfloat16_and_keeps_float32_weights(method: str) -> None:
    base, types = tiny(), set[torch.dtype]()
    layer: Any = base.model.model.layers[0].mlp
    layer.register_forward_hook(lambda _module, _args, output: types.add(output.dtype))
    tuned = FineTuner(base).tune(TASK, changed(method=method, precision="bfloat16"))
    assert types == {torch.bfloat16}
    assert tuned.precision == "bfloat16"
    assert {value.dtype for value in tuned.language_model.model.parameters()} == {torch.float32}
    types.clear()
    half = score(tuned.language_model, TASK).nll
    assert types == {torch.float32}, "the score is in the type of the weights"
    whole = losses(changed(method=method, precision="float32"))
    np.testing.assert_allclose(half, whole, rtol=0.05)
    assert np.abs(half - whole).max() > 1e-6
    np.testing.assert_array_equal(losses(changed(method=method)), whole, "the default on a CPU")


def test_a_fine_tune_leaves_the_base_models_forward_pass_as_it_was() -> None:
    base = tiny()
    tuner, inputs = FineTuner(base), {"input_ids": torch.tensor([[1, 2, 3, 4]])}
    before = base.model(**inputs).logits
    tuner.tune(TASK, changed(precision="bfloat16", fused_loss="chunked"))
    torch.testing.assert_close(tuner.restore().model(**inputs).logits, before, rtol=0, atol=0)
    assert "forward" not in vars(base.model)
    assert "forward" not in vars(base.model.lm_head)


def test_a_selection_in_training_measures_in_the_type_of_the_weights() -> None:
    """While mixed precision is around the model, the losses of a selector are neither of it nor warned of."""
    pool, base, tries = make_pool(24), tiny(), list[float]()
    before = score(base, pool).nll
    selector = MostForgottenSelector(pool, before, candidates=2)

    def select(language_model: LanguageModel, *_: Any) -> list[str]:
        twin = tiny()
        twin.model.load_state_dict(language_model.model.state_dict())
        tries.append(float(np.abs(losses_of(language_model, pool) - score(twin, pool).nll).max()))
        return []

    object.__setattr__(selector, "select", select)
    plan = plan_for(pool, "most-forgotten", 0.5)
    FineTuner(base).tune(TASK, changed(precision="bfloat16"), plan=plan, pool=pool, selector=selector)
    assert tries
    assert max(tries) < 1e-5


def test_precision_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_it in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has_it, **_: has)
        assert _precision(RECIPE, torch.device("cuda")) == ("bfloat16" if has_it else "float32")
        assert _precision(changed(precision="float32"), torch.device("cuda")) == "float32"
    with pytest.raises(ConfigError, match="this GPU does not compute in bfloat16"):
        _precision(changed(precision="bfloat16"), torch.device("cuda"))


def test_half_precision_weights_are_warned_of_where_they_are_trained() -> None:
    half = tiny()
    half.model.to(torch.bfloat16)
    with pytest.warns(UserWarning, match="weights are in bfloat16, which rounds small updates away"):
        FineTuner(half).tune(TASK, changed(steps=1))
    FineTuner(half).tune(TASK, changed(steps=1, method="lora"))  # whose weights are float32


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fused_loss_and_its_gradients_are_the_models_own(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_LOGITS", 4096 * 5)
    language_model = tiny(family)
    model: Any = language_model.model
    mixture = ReplayMixture(TASK, language_model.tokenizer, steps=1, batch_size=6, max_length=64)
    batch = mixture.collate([mixture[i] for i in range(6)])

    def gradients(count: int | None) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad(set_to_none=True)
        loss = model(**batch, **({} if count is None else {"num_items_in_batch": count})).loss
        loss.backward()
        return float(loss.detach()), {name: value.grad.clone() for name, value in model.named_parameters()}

    for count in (None, 17):
        expected, plain = gradients(count)
        with fused_loss(model, "chunked", batch):
            found, ours = gradients(count)
        assert found == pytest.approx(expected, rel=1e-5)
        for name, value in plain.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("changes", [{}, {"micro_batch_size": 2}, {"gradient_checkpointing": True}], ids=str)
def test_training_with_the_fused_loss_gives_the_same_model(method: str, changes: dict[str, Any]) -> None:
    recipe = changed(method=method, **changes)
    calls: list[int] = []
    base = tiny()
    base.model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    found = losses(recipe.model_copy(update={"fused_loss": "chunked"}), base)
    assert calls
    np.testing.assert_allclose(found, losses(recipe), rtol=1e-4)


def test_the_fused_loss_never_has_the_logits_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_LOGITS", 4096 * 4)
    language_model = tiny()
    pool = make_pool(8)
    mixture = ReplayMixture(pool, language_model.tokenizer, steps=1, batch_size=8, max_length=64)
    batch = mixture.collate([mixture[i] for i in range(8)])
    weights = 4096 * 32
    sizes = {}
    for kind in (None, "chunked"):
        with fused_loss(language_model.model, kind, batch), Largest() as largest:
            language_model.model(**batch).loss.backward()
        sizes[kind] = largest.size
    assert sizes[None] >= batch["input_ids"].numel() * 4096
    assert sizes["chunked"] <= weights


def test_a_model_with_another_loss_is_refused() -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_local_experts": 4}
    config = MixtralConfig(
        vocab_size=4096, num_attention_heads=4, num_key_value_heads=2, output_router_logits=True,
        router_aux_loss_coef=1.0, **sizes,
    )  # fmt: skip
    model = LanguageModel(MixtralForCausalLM(config).eval(), tiny().tokenizer)
    with pytest.raises(ConfigError, match="fused_loss: MixtralForCausalLM has another loss"):
        FineTuner(model).tune(TASK, changed(fused_loss="chunked"))
    assert "forward" not in vars(model.model)


def test_a_kernel_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="run: pip install liger-kernel"):
        FineTuner(tiny()).tune(TASK, changed(fused_loss="liger"))
    monkeypatch.setattr(fused.importlib.util, "find_spec", lambda _: sys)
    with pytest.raises(ConfigError, match="liger needs a GPU; on a CPU use chunked"):
        FineTuner(tiny()).tune(TASK, changed(fused_loss="liger"))


def test_blocks_are_compiled_once_for_all_lengths() -> None:
    torch._dynamo.reset()
    graphs = []

    def counting(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    language_model, pool = tiny(), make_pool(16)
    expected = score(language_model, pool, batch_tokens=1).nll
    compile_blocks(language_model.model, backend=counting)
    tried = len(graphs)
    first = score(language_model, pool.subset(pool.ids[:6]), batch_tokens=200).nll
    compiled = len(graphs) - tried
    assert 1 <= compiled <= 4
    found = score(language_model, pool, batch_tokens=300).nll
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(first, expected[:6], rtol=1e-5)
    assert len(graphs) - tried <= compiled + 2, "another length is no other program"
    copied = copy.deepcopy(language_model.model)
    before = len(graphs)
    copied(input_ids=torch.tensor([[1, 2, 3]]))
    assert len(graphs) == before, "a copy is not compiled, and does not run the blocks of the original"
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("method", ["full", "lora"])
def test_compiled_training_gives_the_same_model(method: str) -> None:
    torch._dynamo.reset()
    base = tiny()
    compile_blocks(base.model, backend="aot_eager")
    np.testing.assert_allclose(losses(changed(method=method), base), losses(changed(method=method)), rtol=1e-4)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_the_compiler_gives_the_same_scores_and_the_same_training(tmp_path: Path) -> None:
    save(tiny(), tmp_path)
    try:
        compiled = load(tmp_path, compile=True)
    except ConfigError as error:
        pytest.skip(str(error))
    pool = make_pool(24)
    found = score(compiled, pool)
    assert found.metadata["compiled"] is True
    np.testing.assert_allclose(found.nll, score(tiny(), pool).nll, rtol=1e-5)
    np.testing.assert_allclose(losses(RECIPE, compiled), losses(RECIPE), rtol=1e-4)


def test_a_machine_without_a_compiler(run: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_files(tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    torch._dynamo.reset()
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    code, _, err = run(
        "score", tmp_path / "model", tmp_path / "pool.jsonl", "--compile", "-o", tmp_path / "scores.parquet"
    )
    assert code == 2
    assert "compile: torch.compile does not work on this machine" in err
    assert not (tmp_path / "scores.parquet").exists()
    torch._dynamo.reset()


def test_a_model_that_does_not_name_its_blocks() -> None:
    model: Any = tiny().model
    model._no_split_modules = None
    with pytest.raises(ConfigError, match="does not say which of its modules are its blocks"):
        compile_blocks(model)
