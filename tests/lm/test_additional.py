"""What is measured in addition to a score: KL from a reference, and the same losses again."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from forgetcast import ConfigError, Example, MismatchError, Pool, Scores
from forgetcast.lm import LanguageModel, additional, head, kl_divergence, score, score_again
from forgetcast.lm.tokens import encode, windows
from support.cli import RunCommand
from support.data import make_pool
from support.models import save, tiny


@pytest.fixture(scope="module")
def base() -> LanguageModel:
    return tiny()


@pytest.fixture(scope="module")
def tuned() -> LanguageModel:
    model = tiny()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return LanguageModel(model.model, model.tokenizer, "tuned")


def distributions(language_model: LanguageModel, ids: list[int]) -> np.ndarray:
    """Softmax after each token in double precision, (L, V), by a plain loop."""
    model = copy.deepcopy(language_model.model).double()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    return np.array([np.exp(row - row.max()) / np.exp(row - row.max()).sum() for row in logits])


def plain_kl(tuned: LanguageModel, base: LanguageModel, example: Example) -> float:
    """The oracle: mean over the target tokens of sum p log(p / q), p being the reference's."""
    encoded = encode(example, base.tokenizer, 96)
    p, q = distributions(base, encoded.ids), distributions(tuned, encoded.ids)
    at = [t - 1 for t, label in enumerate(encoded.labels) if label != -100]
    return sum(float((p[t] * np.log(p[t] / q[t])).sum()) for t in at) / len(at)


@pytest.mark.parametrize("family", ["llama", "gemma", "cohere"])
def test_kl_is_that_of_full_distributions(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_LOGITS", 4096 * 28)  # so that the tokens of a batch come in many chunks
    base, tuned, pool = tiny(family), tiny(family, seed=1), make_pool(8)
    found = kl_divergence(tuned, base, pool)
    expected = [plain_kl(tuned, base, example) for example in pool]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    # The direction matters: the other one is another number.
    assert (np.abs(kl_divergence(base, tuned, pool) / found - 1) > 1e-3).any()
    np.testing.assert_array_equal(kl_divergence(base, base, pool), np.zeros(8))


def test_of_one_family_from_another(base: LanguageModel) -> None:
    other, pool = tiny("qwen"), make_pool(5)
    expected = [plain_kl(base, other, example) for example in pool]
    np.testing.assert_allclose(kl_divergence(base, other, pool), expected, rtol=1e-4)


def test_rows_that_pad_the_vocabulary_are_left_out(base: LanguageModel, tuned: LanguageModel) -> None:
    padded = copy.deepcopy(tuned.model)
    padded.resize_token_embeddings(4160)
    wide, pool = LanguageModel(padded.eval(), tuned.tokenizer, "wide"), make_pool(4)
    np.testing.assert_allclose(kl_divergence(wide, base, pool), kl_divergence(tuned, base, pool), rtol=1e-5)


def test_a_token_that_neither_model_gives_adds_nothing() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf]])
    assert head._kl(logits, logits).tolist() == [0]
    assert head._kl(torch.zeros(1, 2), torch.tensor([[0.0, -torch.inf]])).tolist() == [pytest.approx(math.log(2))]
    assert head._kl(torch.tensor([[0.0, -torch.inf]]), torch.zeros(1, 2)).tolist() == [math.inf]


@pytest.mark.parametrize("stride", [None, 7])
def test_windows_are_those_of_the_score(base: LanguageModel, tuned: LanguageModel, stride: int | None) -> None:
    words = " ".join(f"word{i} of {i * i}" for i in range(12))
    found = kl_divergence(tuned, base, Pool([Example("a", text=words)]), max_length=24, stride=stride)
    encoded = encode(Example("a", text=words), base.tokenizer, None if stride else 24)
    total, count = 0.0, 0
    for window in windows(encoded, 24, stride or 24, base.tokenizer):
        p, q = distributions(base, window.ids), distributions(tuned, window.ids)
        for at in (at for at, label in enumerate(window.labels) if label != -100):
            total += float((p[at - 1] * np.log(p[at - 1] / q[at - 1])).sum())
            count += 1
    assert count == encoded.targets
    assert found[0] == pytest.approx(total / count, rel=1e-4)


def test_what_cannot_be_scored_has_no_kl(base: LanguageModel) -> None:
    pool = Pool(
        [Example("none", messages=[{"role": "assistant", "content": "hello"}]), Example("b", text="the loss of it")]
    )
    bare = LanguageModel(base.model, copy.deepcopy(base.tokenizer), "bare")
    bare.tokenizer.chat_template = None
    found = kl_divergence(bare, bare, pool)
    assert np.isnan(found[0])
    assert found[1] == 0


def test_models_that_read_other_tokens_are_refused(base: LanguageModel, tuned: LanguageModel) -> None:
    pool = make_pool(4)
    larger = copy.deepcopy(tuned.tokenizer)
    larger.add_tokens(["zygote"])
    wide = copy.deepcopy(tuned.model)
    wide.resize_token_embeddings(len(larger))
    with pytest.raises(MismatchError, match=r"differs .*\(4097 and 4096 tokens; 'zygote' is in one"):
        kl_divergence(base, LanguageModel(wide, larger, "wide"), pool)
    with pytest.raises(MismatchError, match=r"reads 4 example\(s\) as other tokens, e.g. 'e0'"):
        kl_divergence(base, tiny(bos=False), pool)
    short = LanguageModel(tuned.model, copy.deepcopy(tuned.tokenizer), "short")
    short.tokenizer.model_max_length = 50
    with pytest.raises(ConfigError, match="the reference's context has 50; use --max-length 50"):
        kl_divergence(base, short, pool)
    assert len(kl_divergence(base, short, pool, max_length=50)) == 4


class InterruptedRunError(Exception):
    pass


def stop_after(count: int) -> Any:
    done = 0

    def on_progress(finished: int) -> None:
        nonlocal done
        done += finished
        if done >= count:
            raise InterruptedRunError

    return on_progress


def test_an_interrupted_kl_continues(base: LanguageModel, tuned: LanguageModel, tmp_path: Path) -> None:
    partial, pool, counts = tmp_path / "out.partial", make_pool(9), []
    with pytest.raises(InterruptedRunError):
        kl_divergence(tuned, base, pool, batch_tokens=1, partial=partial, on_progress=stop_after(4))
    with pytest.raises(MismatchError, match="unfinished scores of another model"):
        kl_divergence(base, tuned, pool, partial=partial)
    found = kl_divergence(tuned, base, pool, batch_tokens=1, partial=partial, on_progress=counts.append)
    assert counts == [4] + [1] * 5
    np.testing.assert_array_equal(found, kl_divergence(tuned, base, pool, batch_tokens=1))
    assert not partial.exists()


def test_the_models_are_left_as_they_were(base: LanguageModel, tuned: LanguageModel) -> None:
    base.model.train()
    kl_divergence(tuned, base, make_pool(2))
    assert base.model.training
    assert not tuned.model.training
    base.model.eval()


class TestAgain:
    def test_noise_is_small(self, base: LanguageModel) -> None:
        pool, rms = make_pool(40), {}
        for dtype in (torch.float32, torch.bfloat16):
            model = LanguageModel(copy.deepcopy(base.model).to(dtype), base.tokenizer)
            scores = score(model, pool)
            gap = score_again(model, pool, scores) - scores.nll
            rms[dtype] = float(np.sqrt((gap**2).mean()))
        assert rms[torch.float32] < 1e-6
        assert rms[torch.bfloat16] < 0.05, "some processors give the same in any batch, others do not"

    def test_is_the_same_pool_in_other_batches(self, base: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
        given: list[tuple[Any, ...]] = []

        def spy(_: LanguageModel, pool: Pool, **settings: Any) -> Scores:
            given.append((pool.ids, settings["batch_tokens"], settings["stride"], settings["max_length"]))
            return score(base, pool, **settings)

        monkeypatch.setattr(additional, "score", spy)
        pool = make_pool(6)
        for first, second in ((None, 1024), (300, 2048), (4000, 2000)):
            scores = score(base, pool, batch_tokens=first, stride=7, max_length=24)
            again = score_again(base, pool, scores, batch_tokens=first)
            assert given.pop() == (pool.ids[::-1], second, 7, 24)
            np.testing.assert_allclose(again, scores.nll, rtol=1e-5)

    def test_of_another_model_is_refused(self, base: LanguageModel, tuned: LanguageModel) -> None:
        pool = make_pool(3)
        with pytest.raises(MismatchError, match="of another model, pool or tokens"):
            score_again(tuned, pool, score(base, pool))


class TestCommand:
    @pytest.fixture
    def folder(self, base: LanguageModel, tuned: LanguageModel, tmp_path: Path) -> Path:
        save(base, tmp_path / "base")
        save(tuned, tmp_path / "tuned")
        make_pool(10).save(tmp_path / "pool.jsonl")
        return tmp_path

    def test_columns_and_metadata(
        self, folder: Path, base: LanguageModel, tuned: LanguageModel, run: RunCommand
    ) -> None:
        words = ("score", folder / "tuned", folder / "pool.jsonl", "-o", folder / "s.parquet", "--json")
        code, out, err = run(*words, "--repeat", 2, "--reference", folder / "base")
        assert code == 0, err
        scores, pool = Scores.load(folder / "s.parquet"), make_pool(10)
        assert scores.kl is not None
        assert scores.repeats is not None
        np.testing.assert_allclose(scores.kl, kl_divergence(tuned, base, pool), rtol=1e-5)
        np.testing.assert_allclose(scores.repeats, scores.nll, rtol=1e-5)
        assert json.loads(out)["mean_kl"] == pytest.approx(scores.kl.mean())
        assert scores.metadata["reference"] == str(folder / "base")
        assert scores.metadata["reference_hash"] == base.weights_hash
        assert not list(folder.glob("*.partial"))
        for bad in (0, 3):
            assert run(*words, "--repeat", bad)[0] == 2

    @pytest.mark.parametrize("stage", ["score_again", "kl_divergence"])
    def test_an_interruption_keeps_what_is_finished(
        self, stage: str, folder: Path, run: RunCommand, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        words = ("score", folder / "tuned", folder / "pool.jsonl", "-o", folder / "s.parquet", "--batch-tokens", 1)
        words += ("--repeat", 2, "--reference", folder / "base", "--json")
        whole, stages = getattr(additional, stage), []

        def interrupted(*arguments: Any, **settings: Any) -> np.ndarray:
            return whole(*arguments, **{**settings, "on_progress": stop_after(3)})

        with monkeypatch.context() as patch:
            patch.setattr(f"forgetcast.lm.{stage}", interrupted)
            with pytest.raises(InterruptedRunError):
                run(*words)
        kept = Scores.load(folder / "s.parquet")
        assert (kept.repeats is None) == (stage == "score_again")
        measure = additional._measure

        def counting(*arguments: Any, **settings: Any) -> Any:
            stages.append(len(arguments[1]))
            return measure(*arguments, **settings)

        for module in (additional, sys.modules[score.__module__]):
            monkeypatch.setattr(module, "_measure", counting)
        assert run(*words)[0] == 0
        found = Scores.load(folder / "s.parquet")
        np.testing.assert_array_equal(found.nll, kept.nll)
        assert found.kl is not None
        assert found.repeats is not None
        assert not np.isnan(found.kl + found.repeats).any()
        assert not list(folder.glob("*.partial"))
        # The scores themselves were not measured again, nor what was finished of the divergences.
        assert stages[-1] == (7 if stage == "kl_divergence" else 10)
        assert len(stages) == (1 if stage == "kl_divergence" else 2)

    def test_what_another_command_left_is_refused(self, folder: Path, run: RunCommand) -> None:
        pool = folder / "pool.jsonl"
        assert run("score", folder / "base", pool, "-o", folder / "s.parquet")[0] == 0
        (folder / "s.parquet.kl.partial").write_text("{}\n")
        code, _, err = run("score", folder / "tuned", pool, "-o", folder / "s.parquet", "--reference", folder / "base")
        assert code == 2
        assert "s.parquet is unfinished and of another model, pool or settings" in err
