"""Models as people hold them: quantised, as GGUF, with adapters of all kinds, pickled, from the hub."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import (
    IA3Config,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from safetensors.torch import load_file, save_file

from forgetcast import ConfigError, DataError, Example, Pool
from forgetcast.lm import FineTuner, LanguageModel, exact_match, gradient_products, load, score
from support.adapters import adapted_model, lora, save_adapter
from support.cli import RunCommand
from support.data import make_pool
from support.models import save, tiny
from support.training import TASK, make_recipe

POOL = Pool(example for example in make_pool(12) if example.text is not None)
LORA = make_recipe(method="lora", steps=4, learning_rate=2e-2)


def plain_nll(model: Any, tokenizer: Any, example: Example, virtual: int = 0) -> float:
    """The oracle: one text, one forward pass, one loop over its tokens; virtual tokens come first in the logits."""
    ids = tokenizer(example.text)["input_ids"]
    with torch.no_grad():
        tokens = torch.tensor([ids])
        logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0, virtual:].double()
    losses = [-float(torch.log_softmax(logits[at - 1], dim=0)[ids[at]]) for at in range(1, len(ids))]
    return sum(losses) / len(losses)


def refused(run: RunCommand, model: Path | str, folder: Path, *options: str) -> str:
    """Score with a model that cannot be loaded: one line, exit code 2, nothing stored. Return the line."""
    POOL.save(folder / "pool.jsonl")
    code, _, err = run("score", model, folder / "pool.jsonl", "-o", folder / "out.parquet", *options)
    beside = ("warning: ", str(folder / "pool.jsonl:"))
    lines = [line for line in err.splitlines() if not line.startswith(beside)]
    assert code == 2, err
    assert len(lines) == 1, err
    assert not list(folder.glob("out.parquet*"))
    return lines[0]


# Quantised


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LanguageModel]:
    """A folder of int8 weights, and the same model with these weights as floating-point numbers."""
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    folder, base = tmp_path_factory.mktemp("int8"), tiny()
    save(base, folder / "plain")
    quantized: Any = AutoModelForCausalLM.from_pretrained(
        folder / "plain", quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), dtype=torch.float32
    )
    quantized.save_pretrained(folder / "int8")
    base.tokenizer.save_pretrained(folder / "int8")
    base.model.load_state_dict(
        {n: t.dequantize() if hasattr(t, "__tensor_flatten__") else t for n, t in quantized.state_dict().items()}
    )
    return folder / "int8", base


def test_quantised_weights_are_scored_as_their_values(int8: tuple[Path, LanguageModel]) -> None:
    folder, plain = int8
    loaded = load(folder)
    assert loaded.is_quantized
    found = score(loaded, POOL)
    np.testing.assert_allclose(found.nll, score(plain, POOL).nll, rtol=1e-5)
    assert (np.abs(found.nll - score(tiny(), POOL).nll) > 1e-4).any()
    assert found.metadata["quantization"] == {"method": "torchao", "dequantised": False}
    assert loaded.weights_hash == load(folder).weights_hash != plain.weights_hash
    with torch.no_grad():
        loaded.model.model.layers[1].mlp.up_proj.weight.qdata[0, 0] += 1
    assert LanguageModel(loaded.model, loaded.tokenizer).weights_hash != loaded.weights_hash


def test_quantised_weights_are_tuned_with_lora_only(int8: tuple[Path, LanguageModel], tmp_path: Path) -> None:
    base = load(int8[0])
    tuner, before = FineTuner(base), score(base, TASK).nll
    with pytest.raises(ConfigError, match="is quantised, so its weights cannot be trained; use a recipe with method"):
        tuner.tune(TASK, make_recipe())
    with pytest.raises(ConfigError, match="no fine-tune can go on from another"):
        tuner.weights()
    tuned = tuner.tune(TASK, LORA)
    after = score(tuned.language_model, TASK).nll
    assert after.mean() < before.mean() - 0.1
    tuned.save(tmp_path / "adapter")
    adapted = load(tmp_path / "adapter")
    np.testing.assert_allclose(score(adapted, TASK).nll, after, rtol=1e-6)
    with pytest.raises(ConfigError, match="cannot be merged without loss"):
        FineTuner(adapted)
    tuner.restore()
    np.testing.assert_array_equal(score(base, TASK).nll, before)


def to_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a matrix in blocks of 16 x 16: each to the range of float8, with its inverse scale."""
    blocks = weight.unflatten(0, (-1, 16)).unflatten(2, (-1, 16))
    scale = blocks.abs().amax(dim=(1, 3)) / 448
    return (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn).flatten(2, 3).flatten(0, 1), scale


def test_dequantised_weights_are_said_to_be(tmp_path: Path, run: RunCommand) -> None:
    base = tiny()
    folder = save(base, tmp_path / "fp8")
    stored, values = load_file(folder / "model.safetensors"), dict(base.model.state_dict())
    for name in [name for name in stored if "_proj" in name]:
        stored[name], scale = to_fp8(stored[name])
        stored[f"{name}_scale_inv"] = scale
        values[name] = stored[name].float() * scale.repeat_interleave(16, 0).repeat_interleave(16, 1)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="fp8 weights were dequantised.*not those of the quantised model"):
        loaded = load(folder)
    base.model.load_state_dict(values)
    found = score(loaded, POOL)
    np.testing.assert_allclose(found.nll, score(base, POOL).nll, rtol=1e-5)
    assert found.metadata["quantization"] == {"method": "fp8", "dequantised": True}
    # Once dequantised, they are weights like others.
    with pytest.warns(UserWarning, match="dequantised"):
        FineTuner(load(folder)).tune(TASK, make_recipe(steps=1))
    POOL.save(tmp_path / "pool.jsonl")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        code, _, err = run("score", folder, tmp_path / "pool.jsonl", "-o", tmp_path / "out.parquet")
    assert code == 0
    assert "warning: " in err
    assert "dequantised" in err


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, "optimum"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32}, "gptqmodel"),
        ({"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {}}, "compressed-tensors"),
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_method": "quanto", "weights": "int8"}, "quanto"),
        ({"quant_method": "fbgemm_fp8"}, "GPU"),
        ({"quant_method": "of-tomorrow"}, "'of-tomorrow', which this version of Transformers cannot load"),
        ({"bits": 4}, "no `quant_method`"),
        ("4bit", "quantization_config in config.json must be an object"),
    ],
    ids=str,
)
def test_a_missing_library_is_named(tmp_path: Path, run: RunCommand, settings: Any, named: str) -> None:
    folder = save(tiny(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    assert named in refused(run, folder, tmp_path)


def test_quantising_while_loading(tmp_path: Path, run: RunCommand, int8: tuple[Path, LanguageModel]) -> None:
    folder = save(tiny(), tmp_path / "model")
    assert "pip install bitsandbytes" in refused(run, folder, tmp_path, "--load-in", "4bit")
    assert "quantised already (torchao)" in refused(run, int8[0], tmp_path, "--load-in", "8bit")
    with pytest.raises(ConfigError, match="load_in is 4bit or 8bit, not '3bit'"):
        load(folder, load_in="3bit")


def test_further_arguments(tmp_path: Path, run: RunCommand) -> None:
    folder = save(tiny(), tmp_path / "model")
    eager = load(folder, model_kwargs={"attn_implementation": "eager"})
    assert eager.model.config._attn_implementation == "eager"
    assert score(eager, POOL).metadata["model_kwargs"] == {"attn_implementation": "eager"}
    POOL.save(tmp_path / "pool.jsonl")
    given = '{"attn_implementation": "eager"}'
    code, _, err = run("score", folder, tmp_path / "pool.jsonl", "-o", tmp_path / "in.parquet", "--model-kwargs", given)
    assert code == 0, err
    for wrong, words in {
        "{": "--model-kwargs is not JSON",
        "[1]": "must be a JSON object",
        '{"dtype": "float16"}': "dtype cannot be given there",
        '{"no_such_argument": 1}': "no_such_argument",
        '{"attn_implementation": "magic"}': "magic",
    }.items():
        assert words in refused(run, folder, tmp_path, "--model-kwargs", wrong)


# GGUF


def write_gguf(
    path: Path, language_model: LanguageModel, *, architecture: str = "llama", kind: str = "F32", begin: bool = True
) -> None:
    """Write a Llama as llama.cpp stores it: other names, halves of the heads interleaved, a tokenizer inside."""
    gguf = pytest.importorskip("gguf")
    config, vocabulary = language_model.model.config, language_model.tokenizer.get_vocab()
    tokenizer = json.loads(language_model.tokenizer.backend_tokenizer.to_str())
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    special = set(language_model.tokenizer.all_special_ids)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control if i in special else normal for i in range(len(vocabulary))])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(language_model.tokenizer.bos_token_id)
    writer.add_eos_token_id(language_model.tokenizer.eos_token_id)
    writer.add_add_bos_token(begin)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "post_attention_layernorm": "ffn_norm", "input_layernorm": "attn_norm",
    }  # fmt: skip
    quantised = gguf.GGMLQuantizationType[kind]
    for name, tensor in language_model.model.state_dict().items():
        values = tensor.numpy()
        if heads := {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
            name.split(".")[-2]
        ):
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        for old, new in names.items():
            name = name.replace(old, new)
        if values.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(values, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("begin", [True, False])
def test_a_gguf_file_is_scored_as_the_model_it_holds(tmp_path: Path, begin: bool) -> None:
    base = tiny(bos=begin)
    write_gguf(tmp_path / "plain.gguf", base, begin=begin)
    plain = load(tmp_path / "plain.gguf")
    assert [plain.tokenizer(e.text)["input_ids"] for e in POOL] == [base.tokenizer(e.text)["input_ids"] for e in POOL]
    np.testing.assert_allclose(score(plain, POOL).nll, score(base, POOL).nll, rtol=1e-5)
    assert "quantization" not in score(plain, POOL).metadata


def test_a_quantised_gguf_file_is_said_to_be_dequantised(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    base = tiny()
    write_gguf(tmp_path / "small.gguf", base, kind="Q8_0")
    with pytest.warns(UserWarning, match="gguf weights were dequantised"):
        loaded = load(tmp_path / "small.gguf")
    kind = gguf.GGMLQuantizationType.Q8_0
    for parameter in base.model.parameters():
        if parameter.ndim == 2:
            parameter.data = torch.tensor(
                gguf.quants.dequantize(gguf.quants.quantize(parameter.detach().numpy(), kind), kind)
            )
    found = score(loaded, POOL)
    np.testing.assert_allclose(found.nll, score(base, POOL).nll, rtol=1e-5)
    assert found.metadata["quantization"] == {"method": "gguf", "dequantised": True}
    with pytest.warns(UserWarning, match="dequantised"):
        tuner = FineTuner(load(tmp_path / "small.gguf"))
    for recipe in (make_recipe(), LORA):
        tuned = tuner.tune(TASK, recipe)
        tuned.save(tmp_path / recipe.method)
        after = score(tuned.language_model, TASK).nll
        np.testing.assert_allclose(score(load(tmp_path / recipe.method), TASK).nll, after, rtol=1e-5)


def test_gguf_files_that_cannot_be_read(tmp_path: Path, run: RunCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "odd.gguf", tiny(), architecture="of-tomorrow")
    assert "use the model that the file was converted from, in safetensors" in refused(
        run, tmp_path / "odd.gguf", tmp_path
    )
    (tmp_path / "broken.gguf").write_bytes(b"GGUF?")
    assert "broken.gguf cannot be loaded" in refused(run, tmp_path / "broken.gguf", tmp_path)
    assert "no such file" in refused(run, tmp_path / "none.gguf", tmp_path)
    assert "holds GGUF files; name one, such as" in refused(run, tmp_path, tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "pip install 'forgetcast[gguf]'" in refused(run, tmp_path / "odd.gguf", tmp_path)


# Adapters


ADDED = [4096, 4097, 4098]
NEW_WORDS = Pool(
    [*POOL, Example("new", text="a <one> of the <two>"), Example("chat", prompt="<three> what?", completion=" <one>.")]
)
WITH_TOKENS = {
    "embeddings saved": lora(modules_to_save=["embed_tokens", "lm_head"]),
    "resized only": lora(),
    "trainable tokens": lora(trainable_token_indices={"embed_tokens": ADDED}),
    "LoRA on embeddings": lora(target_modules=["embed_tokens", "q_proj", "lm_head"]),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", WITH_TOKENS)
@pytest.mark.parametrize("padded", [None, 64])
def test_an_adapter_with_added_tokens(tmp_path: Path, kind: str, tied: bool, padded: int | None) -> None:
    base = tiny()
    if tied:
        base.model.config.tie_word_embeddings = True
        base.model.tie_weights()
    save(base, tmp_path / "base")
    start = load(tmp_path / "base")
    start.tokenizer.add_tokens(["<one>", "<two>", "<three>"])
    start.model.resize_token_embeddings(len(start.tokenizer), mean_resizing=False, pad_to_multiple_of=padded)
    trained = LanguageModel(adapted_model(start.model, WITH_TOKENS[kind]), start.tokenizer, "trained")
    expected = score(trained, NEW_WORDS).nll
    folder = save_adapter(trained.model, start.tokenizer, tmp_path / "adapter")
    loaded = load(folder)
    np.testing.assert_allclose(score(loaded, NEW_WORDS).nll, expected, rtol=1e-5)
    # Merged into the weights, and restored from them, it computes the same.
    tuner = FineTuner(loaded)
    assert tuner.base_hash == loaded.weights_hash
    np.testing.assert_allclose(score(tuner.base, NEW_WORDS).nll, expected, rtol=1e-5)
    tuned = tuner.tune(TASK, LORA)
    after = score(tuned.language_model, NEW_WORDS).nll
    # An adapter on top of the merged model could not name its base.
    tuned.save(tmp_path / "more")
    np.testing.assert_allclose(score(load(tmp_path / "more"), NEW_WORDS).nll, after, rtol=1e-5)
    np.testing.assert_allclose(score(tuner.restore(tuner.weights()), NEW_WORDS).nll, after, rtol=1e-5)
    # A full fine-tune of it is a model of its own, with its own output layer.
    tuned = tuner.tune(TASK, make_recipe(steps=2))
    after = score(tuned.language_model, NEW_WORDS).nll
    tuned.save(tmp_path / "full")
    np.testing.assert_allclose(score(load(tmp_path / "full"), NEW_WORDS).nll, after, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_added_tokens_without_weights_are_refused(tmp_path: Path, tied: bool) -> None:
    """Transformers would draw them at random; with tied weights, the trained embeddings are all that is needed."""
    base = tiny()
    if tied:
        base.model.config.tie_word_embeddings = True
        base.model.tie_weights()
    save(base, tmp_path / "base")
    start = load(tmp_path / "base")
    start.tokenizer.add_tokens(["<one>", "<two>", "<three>"])
    start.model.resize_token_embeddings(len(start.tokenizer), mean_resizing=False)
    trained = adapted_model(start.model, WITH_TOKENS["trainable tokens"])
    folder = save_adapter(trained, start.tokenizer, tmp_path / "adapter", save_embedding_layers=False)
    if tied:
        expected = score(LanguageModel(trained, start.tokenizer), NEW_WORDS).nll
        np.testing.assert_allclose(score(load(folder), NEW_WORDS).nll, expected, rtol=1e-5)
    else:
        with pytest.raises(
            DataError, match=r"adds the token '<one>', which has no output weights, neither in the base"
        ):
            load(folder)
    plain = save_adapter(adapted_model(tiny().model, lora()), start.tokenizer, tmp_path / "plain")
    name_base(plain, tmp_path / "base")
    with pytest.raises(DataError, match=r"adds the token '<one>', which has no embedding"):
        load(plain)


def name_base(adapter: Path, base: Path | str) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}))


@pytest.mark.parametrize("targets", [["lm_head", "q_proj"], ["embed_tokens", "lm_head"], ["embed_tokens"]], ids=str)
def test_merging_into_tied_weights(targets: list[str]) -> None:
    base = tiny()
    base.model.config.tie_word_embeddings = True
    base.model.tie_weights()
    adapted = LanguageModel(adapted_model(base.model, lora(target_modules=targets)), base.tokenizer, "adapted")
    expected = score(adapted, POOL).nll
    np.testing.assert_allclose(expected, [plain_nll(adapted.model, base.tokenizer, e) for e in POOL], atol=1e-5)
    with pytest.raises(ConfigError, match="frozen weights, which have no gradient"):
        gradient_products(adapted, TASK, POOL)
    tuner = FineTuner(adapted)
    assert np.isfinite(gradient_products(tuner.base, TASK, POOL)).all()
    np.testing.assert_allclose(score(tuner.base, POOL).nll, expected, rtol=1e-5)
    np.testing.assert_allclose(score(tuner.restore(tuner.weights()), POOL).nll, expected, rtol=1e-5)


PROMPTS = {
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7),
    "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=7, encoder_hidden_size=16),
    "prefix tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_virtual_tokens_come_before_every_text(tmp_path: Path, kind: str) -> None:
    base = tiny()
    save(base, tmp_path / "base")
    prompted = adapted_model(load(tmp_path / "base").model, PROMPTS[kind])
    folder = save_adapter(prompted, base.tokenizer, tmp_path / "adapter")
    in_front = 0 if kind == "prefix tuning" else 7
    long = Pool([*POOL, Example("long", text="the loss of a model " * 40)])
    loaded = load(folder)
    assert loaded.context == 96 - 7
    found = score(loaded, long)
    expected = [plain_nll(prompted, base.tokenizer, e, virtual=in_front) for e in POOL]
    np.testing.assert_allclose(found.nll[:-1], expected, rtol=0, atol=1e-5)
    assert found.truncated.tolist() == [False] * len(POOL) + [True]
    assert found.tokens[-1] == 88
    assert (np.abs(found.nll - score(base, long, max_length=89).nll) > 1e-3).all()
    np.testing.assert_allclose(score(loaded, long, batch_tokens=1).nll, found.nll, rtol=1e-6)
    with pytest.raises(ConfigError, match="virtual tokens, which can be scored, but not fine-tuned"):
        FineTuner(loaded)


@pytest.mark.parametrize("kind", PROMPTS)
def test_virtual_tokens_come_before_every_question(kind: str) -> None:
    base = tiny()
    prompted = adapted_model(base.model, PROMPTS[kind])
    questions = [
        Example("a", prompt="Question: what is 1 + 1?\nAnswer:", completion=" 2"),
        Example("b", prompt="the loss", completion=" is"),
    ]
    _, answers = exact_match(LanguageModel(prompted, base.tokenizer), Pool(questions), max_new_tokens=4)
    for example, answer in zip(questions, answers, strict=True):
        ids = base.tokenizer(example.prompt)["input_ids"]
        for _ in range(4):
            tokens = torch.tensor([ids])
            with torch.no_grad():
                logits = prompted(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
            ids = [*ids, int(logits[0, -1].argmax())]
        text = base.tokenizer.decode(ids[-4:], skip_special_tokens=True).lstrip()
        assert answer == text.split("\n")[0].rstrip()


@pytest.mark.parametrize(
    "settings",
    [lora(use_dora=True), lora(use_rslora=True), IA3Config(task_type="CAUSAL_LM")],
    ids=["DoRA", "rsLoRA", "IA3"],
)
def test_other_adapters(tmp_path: Path, settings: Any) -> None:
    base = tiny()
    save(base, tmp_path / "base")
    adapted = adapted_model(load(tmp_path / "base").model, settings)
    loaded = load(save_adapter(adapted, base.tokenizer, tmp_path / "adapter"))
    expected = [plain_nll(adapted, base.tokenizer, example) for example in POOL]
    np.testing.assert_allclose(score(loaded, POOL).nll, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(score(FineTuner(loaded).base, POOL).nll, expected, rtol=0, atol=1e-5)


def test_adapters_that_do_not_fit(tmp_path: Path, run: RunCommand) -> None:
    base = tiny()
    save(base, tmp_path / "base")
    adapter = save_adapter(adapted_model(load(tmp_path / "base").model, lora()), base.tokenizer, tmp_path / "adapter")
    weights, file = load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.safetensors"
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    save_file({key: value for key, value in weights.items() if key != name}, file)
    assert "missing adapter keys" in refused(run, adapter, tmp_path)
    save_file(weights | {name.replace("layers.1", "layers.2"): weights[name].clone()}, file)
    assert "does not fit its base model" in refused(run, adapter, tmp_path)
    save_file(weights | {name: torch.ones(4, 8)}, file)
    assert "size mismatch" in refused(run, adapter, tmp_path)
    file.unlink()
    assert "adapter" in refused(run, adapter, tmp_path)
    for content in (
        '{"peft_type": "LORA"',
        "[]",
        "{}",
        '{"peft_type": "LORA"}',
        '{"peft_type": "X", "base_model_name_or_path": "B"}',
    ):
        (adapter / "adapter_config.json").write_text(content.replace('"B"', json.dumps(str(tmp_path / "base"))))
        refused(run, adapter, tmp_path)


def test_an_adapter_without_a_tokenizer_takes_its_base_models(tmp_path: Path) -> None:
    base = tiny()
    save(base, tmp_path / "base")
    adapted = adapted_model(load(tmp_path / "base").model, lora())
    folder = save_adapter(adapted, None, tmp_path / "adapter")
    with pytest.warns(UserWarning, match="adapter has no tokenizer; its base model's is used: .*base"):
        found = score(load(folder), POOL).nll
    np.testing.assert_allclose(found, score(LanguageModel(adapted, base.tokenizer), POOL).nll, rtol=1e-6)


# Unsafe, foreign and absent


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("harm"),)


def test_pickled_objects_are_not_run(tmp_path: Path, run: RunCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = tiny()
    folder = save(base, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save(base.model.state_dict(), folder / "pytorch_model.bin")
    np.testing.assert_allclose(score(load(folder), POOL).nll, score(base, POOL).nll, rtol=1e-6)
    torch.save(base.model.state_dict() | {"more": Harmful()}, folder / "pytorch_model.bin")
    assert "convert them to safetensors" in refused(run, folder, tmp_path)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("family", "field", "value", "said"),
    [
        ("llama", "num_hidden_layers", 10**6, "but the weights have 21 tensors"),
        ("llama", "num_hidden_layers", 1e6, "but the weights have 21 tensors"),
        ("llama", "num_hidden_layers", 0, "at least one layer"),
        ("gpt2", "n_layer", 10**18, "but the weights have 28 tensors"),
        ("llama", "vocab_size", 10**9, "numbers; put back its own config.json"),
        ("llama", "num_key_value_heads", 10**8, "numbers; put back its own config.json"),
        ("llama", "head_dim", 10**8, "numbers; put back its own config.json"),
    ],
)
def test_sizes_that_the_weights_do_not_have(
    tmp_path: Path, run: RunCommand, family: str, field: str, value: float, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are refused before a layer is built: a million of them take minutes."""
    folder = save(tiny(family), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: value}))
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", never)
    line = refused(run, folder, tmp_path)
    assert f"{field} in config.json is {value}" in line
    assert said in line


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("a model is built")


def test_sizes_of_what_is_no_folder_of_safetensors(
    tmp_path: Path, run: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tiny(), tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**6}))
    base = tiny()
    base.model.config.num_hidden_layers = 10**6
    write_gguf(tmp_path / "deep.gguf", base)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", never)
    assert "num_hidden_layers in config.json is 1000000" in refused(run, folder, tmp_path)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", never)
    assert "llama.block_count is 1000000, but the weights have 21 tensors" in refused(
        run, tmp_path / "deep.gguf", tmp_path
    )


def test_the_rank_of_an_adapter_is_that_of_its_weights(tmp_path: Path, run: RunCommand) -> None:
    base = tiny()
    save(base, tmp_path / "base")
    adapter = save_adapter(adapted_model(load(tmp_path / "base").model, lora()), base.tokenizer, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 10**6}))
    assert "r in adapter_config.json is 1000000, and its weights are smaller" in refused(run, adapter, tmp_path)


def test_tokens_beyond_the_embeddings(tmp_path: Path, run: RunCommand) -> None:
    base = tiny()
    folder = save(base, tmp_path / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    # As many tokens as embeddings, one with an id of its own.
    word = next(token for token, i in tokenizer["model"]["vocab"].items() if i == 4095)
    tokenizer["model"]["vocab"][word] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "the tokenizer has 5001 tokens, the model only 4096" in refused(run, folder, tmp_path)


def test_a_hub_id_offline(tmp_path: Path, run: RunCommand) -> None:
    assert "run: hf download nobody/no-such-model" in refused(run, "nobody/no-such-model", tmp_path)
    assert "run: hf download nobody/no-such-model" in refused(run, "nobody/no-such-model/x.gguf", tmp_path)
    (tmp_path / "file.bin").touch()
    assert "is a file; give the model's directory" in refused(run, tmp_path / "file.bin", tmp_path)
