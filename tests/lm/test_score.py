from __future__ import annotations

import copy
import json
import sys
import warnings
from collections.abc import Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from forgetcast import ConfigError, DataError, Example, MismatchError, Pool
from forgetcast.lm import LanguageModel, head, load, score
from forgetcast.lm.score import BATCH_OVERHEAD, _batches
from forgetcast.lm.tokens import Encoded, encode
from support.data import make_pool
from support.dying import score_pool
from support.models import FAMILIES, save, tiny
from support.processes import exit_code


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    return tiny()


def plain_nll(language_model: LanguageModel, example: Example) -> float:
    """The oracle: one example, one forward pass, one Python loop over its target tokens."""
    tokenizer = language_model.tokenizer
    if example.text is not None:
        ids, first = tokenizer(example.text)["input_ids"], 1
    else:
        encoding = tokenizer(f"{example.prompt}{example.completion}", return_offsets_mapping=True)
        ids, boundary = encoding["input_ids"], len(example.prompt or "")
        first = next(i for i, (_, end) in enumerate(encoding["offset_mapping"]) if i and end > boundary)
    model = copy.deepcopy(language_model.model).double()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    losses = [-float(torch.log_softmax(logits[at - 1], dim=0)[ids[at]]) for at in range(first, len(ids))]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("bos", [True, False], ids=["bos", "no bos"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_a_plain_forward_pass_in_double_precision(
    family: str, bos: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CHUNK_LOGITS", 4096 * 7)  # so that the tokens of a batch come in many chunks
    language_model, pool = tiny(family, bos=bos), make_pool(12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the output layer must be understood
        scores = score(language_model, pool)
    expected = [plain_nll(language_model, example) for example in pool]
    assert np.ptp(expected) > 0.01  # a constant would agree with anything
    np.testing.assert_allclose(scores.nll, expected, rtol=0, atol=1e-5)
    assert scores.tokens.tolist() == [encode(e, language_model.tokenizer, 96).targets for e in pool]
    assert not scores.truncated.any()


def test_the_rare_words_of_a_large_vocabulary_count() -> None:
    """Oracle: the model's logits, summed in double precision."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=200_000, num_attention_heads=2, **sizes)).eval()
    torch.nn.init.normal_(model.lm_head.weight)
    language_model, words = LanguageModel(model, tiny().tokenizer, "large"), "the loss of a model " * 20
    ids = torch.tensor([encode(Example("t", text=words), language_model.tokenizer, None).ids])
    with torch.inference_mode():
        hidden = model.model(ids).last_hidden_state[0, :-1]
        logits = hidden.double() @ model.lm_head.weight.double().T
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
    found = score(language_model, Pool([Example("t", text=words)])).nll[0]
    assert found == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_invariant_to_batch_size_order_and_padding(family: str) -> None:
    language_model, pool = tiny(family), make_pool(12)
    reference = score(language_model, pool, batch_tokens=1).nll  # one example a batch, no padding
    for batch_tokens in (100, 300, 8192):
        np.testing.assert_allclose(score(language_model, pool, batch_tokens=batch_tokens).nll, reference, rtol=1e-6)
    reverse = Pool(reversed(list(pool)))
    np.testing.assert_allclose(score(language_model, reverse).nll[::-1], reference, rtol=1e-6)


def test_invariant_to_the_padding_token(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool(12)
    reference = score(llama, pool).nll
    for padding in (0, 17, 4095):
        monkeypatch.setattr(sys.modules[score.__module__], "pad_id", lambda _, padding=padding: padding)
        np.testing.assert_allclose(score(llama, pool).nll, reference, rtol=1e-6)


def test_only_the_completion_counts(llama: LanguageModel) -> None:
    both = Pool([Example("a", prompt="def area(r):\n", completion="    return 3 * r * r")])
    joined = Pool([Example("a", text="def area(r):\n    return 3 * r * r")])
    scores = score(llama, both)
    assert scores.tokens[0] < score(llama, joined).tokens[0]
    np.testing.assert_allclose(scores.nll, [plain_nll(llama, both[0])], rtol=2e-5)


@pytest.mark.parametrize("bos", [True, False], ids=["bos", "no bos"])
def test_empty_prompt_equals_no_prompt(bos: bool) -> None:
    """Without a token to begin with, the first token has nothing before it, so the rest is scored."""
    language_model = tiny(bos=bos)
    bare = score(language_model, Pool([Example("a", prompt="", completion="return 3 * r")]))
    text = score(language_model, Pool([Example("a", text="return 3 * r")]))
    np.testing.assert_allclose(bare.nll, text.nll, rtol=1e-6)


def test_single_token_is_not_scored_with_a_reason() -> None:
    scores = score(tiny(bos=False), Pool([Example("one", text="a"), Example("more", text="a model of the world")]))
    assert np.isnan(scores.nll[0])
    assert scores.tokens[0] == 0
    assert "single token" in str(scores.reasons[0])
    assert np.isfinite(scores.nll[1])
    assert scores.reasons[1] is None


def test_long_texts_are_marked_as_truncated(llama: LanguageModel) -> None:
    long = "the loss of a model " * 60
    scores = score(llama, Pool([Example("long", text=long), Example("short", text="the loss")]))
    assert scores.truncated.tolist() == [True, False]
    assert scores.tokens[0] == 95
    cut = score(llama, Pool([Example("long", text=long)]), max_length=10)
    assert cut.tokens[0] == 9
    for length in (1, 97):
        with pytest.raises(ConfigError, match="between 2 and the model's context of 96"):
            score(llama, make_pool(2), max_length=length)


@given(st.integers(0, 60), st.integers(1, 60), st.integers(2, 40), st.booleans())
def test_cutting_keeps_the_completion_and_the_end_of_the_prompt(
    prompt: int, completion: int, context: int, end: bool
) -> None:
    tokenizer = tiny_tokenizer()
    words = [f" w{i}" for i in range(prompt)], [f" c{i}" for i in range(completion)]
    example = Example("x", prompt="".join(words[0]), completion="".join(words[1]))
    before = tokenizer(example.prompt)["input_ids"]
    after = tokenizer(example.completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * end
    found = encode(example, tokenizer, context, end=end)
    assert len(found.ids) == min(context, len(before) + len(after))
    assert found.truncated == (len(before) + len(after) > context)
    if before and len(before) + len(after) > context:
        kept = after[: context - 1]
        assert found.ids[-len(kept) :] == kept
        room = context - len(kept)
        # The token that begins every text stays, if there is room for another one of the prompt.
        expected = [before[0], *before[len(before) - room + 1 :]] if room > 1 else before[-1:]
        assert found.ids[:room] == expected
        assert found.targets == len(kept)
    if not found.truncated:
        assert found.ids == before + after


def tiny_tokenizer(cache: list[Any] = []) -> Any:  # noqa: B006  # loaded once for all of hypothesis's examples
    if not cache:
        cache.append(tiny().tokenizer)
    return cache[0]


def test_model_with_nan_losses_is_rejected() -> None:
    broken = tiny()
    with torch.no_grad():
        next(broken.model.parameters())[:] = float("nan")
    with pytest.raises(DataError, match="llama scores no example; of 'e0': the model's loss is nan"):
        score(broken, make_pool(4))


def test_an_example_without_a_finite_loss_keeps_the_reason() -> None:
    language_model, pool = tiny("gpt-neox"), make_pool(6)
    odd = Pool([*pool, Example("odd", text="a model of the zygote")])
    tokens = [set(language_model.tokenizer(e.full_text)["input_ids"]) for e in odd]
    own = tokens[-1] - set.union(*tokens[:-1])
    with torch.no_grad():
        language_model.model.get_input_embeddings().weight[sorted(own)] = float("inf")
    scores = score(language_model, odd)
    assert scores.reasons[:6] == (None,) * 6
    np.testing.assert_allclose(scores.nll[:6], score(tiny("gpt-neox"), pool).nll, rtol=1e-6)
    assert np.isnan(scores.nll[6])
    assert scores.tokens[6] == 0
    assert "the model's loss is" in str(scores.reasons[6])


def test_unknown_output_layer_falls_back_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(LlamaForCausalLM):
        def forward(self, *arguments: Any, **options: Any) -> Any:
            found = super().forward(*arguments, **options)
            found.logits = found.logits * 1.5 + torch.linspace(0, 1, found.logits.shape[-1])
            return found

    monkeypatch.setattr(sys.modules[score.__module__], "WHOLE_LOGITS", 4096 * 100)
    plain = tiny()
    model = Odd(plain.model.config)
    model.load_state_dict(plain.model.state_dict())
    odd, pool = LanguageModel(model.eval(), plain.tokenizer, "odd"), make_pool(6)
    with pytest.warns(UserWarning, match="Odd changes its logits in an unknown way"):
        found = score(odd, pool)
    np.testing.assert_allclose(found.nll, [plain_nll(odd, example) for example in pool], rtol=0, atol=1e-5)
    assert (np.abs(found.nll - score(plain, pool).nll) > 0.1).all()


def test_an_adapter_scores_as_the_merged_model_does() -> None:
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(1)
    base = tiny()
    adapted: Any = get_peft_model(base.model, lora)
    pool = make_pool(6)
    found = score(LanguageModel(adapted.eval(), base.tokenizer, "adapted"), pool).nll
    merged = LanguageModel(adapted.merge_and_unload(), base.tokenizer, "merged")
    np.testing.assert_allclose(found, score(merged, pool).nll, rtol=1e-5)
    assert (np.abs(found - score(tiny(), pool).nll) > 1e-3).all()


@pytest.mark.parametrize("stride", [1, 7, 20, 23])
@pytest.mark.parametrize("prompt", [0, 60])
def test_a_stride_is_an_exact_sliding_window(llama: LanguageModel, stride: int, prompt: int) -> None:
    words = " ".join(f"word{i} of {i * i}" for i in range(40))
    example = (
        Example("long", text=words) if not prompt else Example("long", prompt=words[:prompt], completion=words[prompt:])
    )
    scores = score(llama, Pool([example, Example("short", text="the loss")]), max_length=24, stride=stride)
    whole = encode(example, llama.tokenizer, None)
    total, scored, end = 0.0, 0, len(whole.ids) - whole.targets
    for start in range(0, len(whole.ids), stride):
        # The begin token is the first of every window.
        window = whole.ids[:24] if start == 0 else [whole.ids[0], *whole.ids[start : start + 23]]
        with torch.no_grad():
            logits = llama.model(input_ids=torch.tensor([window])).logits[0].double()
        shift = start - (start > 0)
        for at in range(end, shift + len(window)):
            total -= float(torch.log_softmax(logits[at - shift - 1], dim=0)[whole.ids[at]])
            scored += 1
        end = max(end, shift + len(window))
    assert scores.tokens[0] == scored == whole.targets
    assert scores.nll[0] == pytest.approx(total / scored, abs=1e-5)
    assert not scores.truncated.any()
    assert scores.metadata["stride"] == stride
    for wrong in (0, 24):
        with pytest.raises(ConfigError, match="stride must be between 1 and 23"):
            score(llama, make_pool(2), max_length=24, stride=wrong)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(1, 120))
def test_batches_are_the_cheapest(lengths: list[int], batch_tokens: int) -> None:
    """Oracle: every way to cut the sorted lengths."""
    found = list(_batches([Encoded([0] * n, 1, False) for n in lengths], batch_tokens))
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    assert [lengths[i] for batch in found for i in batch] == sorted(lengths, reverse=True)

    def cost(batches: Sequence[Sequence[int]]) -> float:
        if any(len(batch) > 1 and len(batch) * max(batch) > batch_tokens for batch in batches):
            return float("inf")
        return sum(len(batch) * max(batch) + batch_tokens * BATCH_OVERHEAD for batch in batches)

    ordered, n = sorted(lengths, reverse=True), len(lengths)
    ways = (
        [ordered[a:b] for a, b in pairwise([0, *cuts, n])]
        for count in range(n)
        for cuts in combinations(range(1, n), count)
    )
    assert cost([[lengths[i] for i in batch] for batch in found]) == pytest.approx(min(map(cost, ways)))


def test_a_batch_that_does_not_fit_is_halved(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, sizes, plain = make_pool(12), [], head.Head.nll
    expected = score(llama, pool).nll

    def small(self: head.Head, ids: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        sizes.append(len(ids))
        if len(ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, ids, *rest)

    monkeypatch.setattr(head.Head, "nll", small)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = score(llama, pool).nll
    too_many = next(size for size in sizes if size > 2)
    assert f"out of memory with {too_many} examples at once" in str(said[0].message)
    np.testing.assert_allclose(found, expected, rtol=1e-6)

    def tiny_memory(self: head.Head, ids: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] > 90:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return plain(self, ids, *rest)

    monkeypatch.setattr(head.Head, "nll", tiny_memory)
    long = Pool([*pool, Example("long", text="the loss of a model " * 20)])
    scores = score(llama, long, batch_tokens=1)
    assert scores.reasons[-1] == "out of memory"
    np.testing.assert_allclose(scores.nll[:-1], expected, rtol=1e-6)


def test_killed_run_resumes_where_it_stopped(llama: LanguageModel, tmp_path: Path) -> None:
    partial, pool = tmp_path / "out.partial", make_pool(12)
    assert exit_code(score_pool, partial) == 9
    with partial.open("a") as file:
        file.write('["e0", 3.')  # a line cut short
    counts: list[int] = []
    found = score(llama, pool, batch_tokens=1, partial=partial, on_progress=counts.append)
    assert counts == [5] + [1] * 7
    assert not partial.exists()
    np.testing.assert_array_equal(found.nll, score(llama, pool, batch_tokens=1).nll)
    # What was scored with other settings is neither used nor lost.
    unfinished = json.dumps(dict(found.metadata) | {"max_length": 10}) + '\n["e0", 3.0, ""]\n'
    partial.write_text(unfinished)
    with pytest.raises(MismatchError, match=r"out.partial holds unfinished scores of another model, pool, settings"):
        score(llama, pool, partial=partial)
    assert partial.read_text() == unfinished


def test_scores_know_their_model_and_pool(llama: LanguageModel) -> None:
    pool = make_pool(4)
    metadata = score(llama, pool).metadata
    assert metadata["pool"] == pool.fingerprint
    assert metadata["model_hash"] == llama.weights_hash == tiny().weights_hash
    assert metadata["model_hash"] != tiny(seed=1).weights_hash
    assert metadata["dtype"] == "float32"


def test_bfloat16_is_near_float32(llama: LanguageModel, tmp_path: Path) -> None:
    save(llama, tmp_path)
    half = load(tmp_path, dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    np.testing.assert_allclose(score(half, make_pool(6)).nll, score(llama, make_pool(6)).nll, rtol=0.05)


def test_scoring_leaves_the_model_as_it_was(llama: LanguageModel) -> None:
    llama.model.train()
    score(llama, make_pool(2))
    assert llama.model.training
    llama.model.eval()


def test_invalid_model_directories_are_rejected(llama: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"config\.json is missing"):
        load(tmp_path)
    llama.model.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="has no tokenizer"):
        load(tmp_path)
    llama.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="unknown dtype 'int3'"):
        load(tmp_path, dtype="int3")
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"weights of model\.layers\.0\.mlp\.up_proj\.weight and 0 other"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(DataError, match="cannot be loaded"):
        load(tmp_path)


def test_a_model_is_shown_in_one_line(llama: LanguageModel) -> None:
    parameters = sum(tensor.numel() for tensor in llama.model.state_dict().values())
    assert repr(llama) == f"LanguageModel('llama', {parameters:,} parameters, float32, cpu)"


def test_a_tokenizer_of_another_model_is_refused(llama: LanguageModel) -> None:
    small = tiny()
    small.model.resize_token_embeddings(100)
    with pytest.raises(DataError, match="the tokenizer has 4096 tokens, the model only 100"):
        LanguageModel(small.model, llama.tokenizer)


def test_an_adapter_without_its_base(tmp_path: Path) -> None:
    base = tiny()
    save(base, tmp_path / "base")
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(load(tmp_path / "base").model, lora)
    adapted.save_pretrained(tmp_path / "adapter")
    base.tokenizer.save_pretrained(tmp_path / "adapter")
    assert load(tmp_path / "adapter").context == 96
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(DataError, match=r"adapter is an adapter, and its base model .*base does not exist"):
        load(tmp_path / "adapter")


def test_model_missing_from_the_cache_is_an_error() -> None:
    with pytest.raises(DataError, match="no such directory, nor a copy in the cache of the Hub"):
        load("nobody/no-such-model")
