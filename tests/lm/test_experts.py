"""Mixtures of experts with fused weights: LoRA, merged weights, restoring, and sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from forgetcast import Atlas
from forgetcast.experiments import SequenceSettings, run_sequence
from forgetcast.lm import FineTuner, LanguageModel, load, score
from support.data import planted
from support.models import save, tiny
from support.sequences import TASKS
from support.training import POOL, TASK, make_recipe

SIZES: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 96, "num_experts_per_tok": 2,
}  # fmt: skip
RECIPE = make_recipe(method="lora", steps=4, learning_rate=2e-2)


def experts(family: str) -> LanguageModel:
    """Make a random mixture of four experts in every layer, in the first one a plain one for DeepSeek."""
    torch.manual_seed(0)
    model: Any
    match family:
        case "qwen3-moe":
            config = Qwen3MoeConfig(**SIZES, head_dim=8, num_experts=4, moe_intermediate_size=16)
            model = Qwen3MoeForCausalLM(config)
        case "mixtral":
            model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))
        case "gpt-oss":
            rope = {"rope_type": "default", "rope_theta": 1e4}
            model = GptOssForCausalLM(GptOssConfig(**SIZES, head_dim=8, num_local_experts=4, rope_parameters=rope))
        case "deepseek-v3":
            more = {
                "qk_rope_head_dim": 8,
                "qk_nope_head_dim": 8,
                "v_head_dim": 8,
                "kv_lora_rank": 8,
                "q_lora_rank": None,
            }
            more |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_routed_experts": 4}
            config = DeepseekV3Config(**SIZES | {"num_key_value_heads": 4}, **more, moe_intermediate_size=16)
            model = DeepseekV3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return LanguageModel(model.eval(), tiny().tokenizer, family)


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral", "gpt-oss", "deepseek-v3"])
def test_lora_on_experts(family: str, tmp_path: Path) -> None:
    save(experts(family), tmp_path / "base")
    base = load(tmp_path / "base")
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    tuner, untuned = FineTuner(base), score(base, TASK).nll
    tuned = tuner.tune(TASK, RECIPE)
    after = score(tuned.language_model, TASK).nll
    assert after.mean() < untuned.mean() - 0.05
    merged = tuner.weights()
    tuned.save(tmp_path / "adapter")
    assert merged.keys() == before.keys()
    changed = {name for name, value in merged.items() if not torch.equal(value, before[name])}
    # Every matrix is adapted but the embeddings, the output layer and the routers.
    matrices = {name for name, value in before.items() if value.ndim > 1 and "_bias" not in name}
    frozen = {name for name in matrices if name.split(".")[-2] in ("embed_tokens", "lm_head", "gate", "router")}
    assert changed == matrices - frozen
    np.testing.assert_allclose(score(tuner.restore(merged), TASK).nll, after, rtol=1e-5)
    tuner.restore()
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())
    np.testing.assert_allclose(score(load(tmp_path / "adapter"), TASK).nll, after, rtol=1e-5)
    np.testing.assert_allclose(score(load(tmp_path / "adapter").merged(), TASK).nll, after, rtol=1e-5)


def test_a_sequence_with_lora_on_experts(tmp_path: Path) -> None:
    base = experts("qwen3-moe")
    before = score(base, POOL)
    atlas = Atlas.create(tmp_path / "a.atlas", POOL, before, model="experts", recipe=RECIPE.model_dump())
    for i, row in enumerate(np.abs(planted(8, len(POOL), 2, 0.05))):
        atlas.add(f"t{i}", type(before)(before.ids, before.nll + row, before.tokens, before.truncated))
    tasks = {name: TASKS[name] for name in ("adding", "naming")}
    settings = SequenceSettings(ratio=0.5, orders=1, probes=4)
    result = run_sequence(FineTuner(base), atlas, RECIPE, tasks, settings, directory=tmp_path / "runs")
    assert {(stage.arm, stage.position) for stage in result.stages} == {
        (arm, position) for arm in ("none", "random", "top") for position in (1, 2)
    }
    assert all(np.isfinite(stage.mean) for stage in result.stages)
