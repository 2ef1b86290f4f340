"""Adapters that share their base model in memory give what each gives when it is loaded anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import IA3Config, LoHaConfig, PrefixTuningConfig, PromptTuningConfig
from safetensors.torch import load_file, save_file

from forgetcast.errors import DataError
from forgetcast.lm import LanguageModel, SharedBase, load, score
from support.adapters import adapted_model, lora, save_adapter
from support.data import make_pool
from support.models import save, tiny

POOL = make_pool(12)
KINDS: dict[str, Any] = {
    "LoRA": lora(),
    "DoRA": lora(use_dora=True),
    "LoRA everywhere": lora(target_modules="all-linear", r=8),
    "whole layers": lora(modules_to_save=["embed_tokens", "lm_head"]),
    "trainable tokens": lora(trainable_token_indices={"embed_tokens": [5, 6]}),
    "IA3": IA3Config(task_type="CAUSAL_LM"),
    "LoHa": LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7),
    "prefix tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, and an adapter of each kind."""
    folder = tmp_path_factory.mktemp("models")
    base = tiny()
    save(base, folder / "base")
    for kind, settings in KINDS.items():
        save_adapter(adapted_model(load(folder / "base").model, settings), base.tokenizer, folder / kind)
    return folder


def test_swapped_adapters_score_as_those_loaded_anew_bit_for_bit(folder: Path) -> None:
    shared = SharedBase()
    base = shared.base(str(folder / "base"))
    plain = base.weights_hash
    for kind in [*KINDS, *reversed(KINDS)]:
        with shared.model(str(folder / kind)) as adapted:
            found = score(adapted, POOL)
        anew = score(load(folder / kind), POOL)
        np.testing.assert_array_equal(found.nll, anew.nll, err_msg=kind)
        assert found.metadata == anew.metadata
        assert shared.base(str(folder / "base")) is base, f"{kind}: the base model had to be loaded again"
        assert LanguageModel(base.model, base.tokenizer).weights_hash == plain


def test_a_base_that_an_adapter_resized_is_loaded_again(folder: Path, tmp_path: Path) -> None:
    start = load(folder / "base")
    start.tokenizer.add_tokens(["<one>"])
    start.model.resize_token_embeddings(4097)
    trained = adapted_model(start.model, lora(modules_to_save=["embed_tokens", "lm_head"]))
    resized = save_adapter(trained, start.tokenizer, tmp_path / "resized")
    shared = SharedBase()
    base = shared.base(str(folder / "base"))
    with shared.model(str(resized)) as adapted:
        np.testing.assert_array_equal(score(adapted, POOL).nll, score(load(resized), POOL).nll)
    assert shared.base(str(folder / "base")) is not base
    with shared.model(str(folder / "LoRA")) as adapted:
        np.testing.assert_array_equal(score(adapted, POOL).nll, score(load(folder / "LoRA"), POOL).nll)


def test_an_adapter_that_does_not_fit_harms_no_other(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    save_adapter(adapted_model(load(folder / "base").model, lora()), tiny().tokenizer, broken)
    weights = load_file(broken / "adapter_model.safetensors")
    save_file(
        {key: value for key, value in weights.items() if "layers.1" not in key}, broken / "adapter_model.safetensors"
    )
    shared = SharedBase()
    with pytest.raises(DataError, match="missing adapter keys"), shared.model(str(broken)):
        pass
    with shared.model(str(folder / "LoRA")) as adapted:
        np.testing.assert_array_equal(score(adapted, POOL).nll, score(load(folder / "LoRA"), POOL).nll)


def test_a_whole_model_shares_nothing(folder: Path) -> None:
    shared = SharedBase()
    assert shared.base_name(str(folder / "base")) is None
    assert shared.base_name(str(folder / "LoRA")) == str(folder / "base")
    with shared.model(str(folder / "base")) as whole:
        np.testing.assert_array_equal(score(whole, POOL).nll, score(load(folder / "base"), POOL).nll)
