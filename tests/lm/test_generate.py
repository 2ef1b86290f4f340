from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from forgetcast import ConfigError, Example, Pool, Scores
from forgetcast.lm import FineTuner, LanguageModel, Recipe, exact_match
from forgetcast.lm.generate import same_answer
from support.cli import RunCommand
from support.models import save, tiny

QUESTIONS = {"What is two and two?": "four", "The capital of France is": "Paris", "Name a colour:": "deep blue"}


def asked(questions: dict[str, str]) -> Pool:
    return Pool([Example(f"q{i}", prompt=q, completion=f" {a}") for i, (q, a) in enumerate(questions.items())])


@pytest.fixture(scope="module")
def taught() -> LanguageModel:
    """A model that has learned the three answers by heart."""
    recipe = Recipe(steps=120, learning_rate=1e-2, batch_size=3, max_length=64)
    return FineTuner(tiny()).tune(asked(QUESTIONS), recipe).language_model


def greedy(language_model: LanguageModel, prompt: str, count: int) -> str:
    """The oracle: one token after the other, each by a forward pass over all."""
    ids = language_model.tokenizer(prompt)["input_ids"]
    begin = len(ids)
    for _ in range(count):
        with torch.no_grad():
            ids = [*ids, int(language_model.model(torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] == language_model.tokenizer.eos_token_id:
            break
    answer: str = language_model.tokenizer.decode(ids[begin:], skip_special_tokens=True)
    return answer.lstrip().split("\n")[0].rstrip()


def test_trained_model_answers_and_untrained_model_does_not(taught: LanguageModel) -> None:
    pool = Pool([*asked(QUESTIONS), Example("text", text="no question")])
    right, answers = exact_match(taught, pool, max_new_tokens=8)
    np.testing.assert_array_equal(right, [1, 1, 1, np.nan])
    assert answers == ("four", "Paris", "deep blue", None)
    np.testing.assert_array_equal(exact_match(tiny(), pool, max_new_tokens=8)[0], [0, 0, 0, np.nan])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neox", "gemma", "qwen3"])
def test_answers_are_greedy_for_any_batch_size(family: str) -> None:
    language_model = tiny(family)
    pool = asked(QUESTIONS | {"Why": "so", "A much longer question about the loss of a model, which ends here:": "x"})
    _, answers = exact_match(language_model, pool, max_new_tokens=6, batch_size=2)
    assert list(answers) == [greedy(language_model, str(example.prompt), 6) for example in pool]
    assert len(set(answers)) > 1


def test_custom_metric(taught: LanguageModel) -> None:
    seen: list[tuple[str, str]] = []
    right, _ = exact_match(
        taught,
        asked({"Name a colour:": "red"}),
        max_new_tokens=8,
        metric=lambda *pair: float(seen.append(pair) is None),
    )
    assert seen == [("deep blue", "red")]
    assert right.tolist() == [1.0]


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        ("The Rhine.", "rhine", True), ("a  cat", "A cat!", True), ("four", "five", False), ("", "x", False),
        ("A", "a", True), ("A", "the", False), ("<", ">", False), ("-1", "1", False),
        ("1,000", "1000.", True), ("3.5", "35", False),
    ],
)  # fmt: skip
def test_answer_normalisation(answer: str, expected: str, same: bool) -> None:
    assert bool(same_answer(answer, expected)) == same


def test_no_room_for_an_answer(taught: LanguageModel) -> None:
    for count in (0, 96):
        with pytest.raises(ConfigError, match="between 1 and 95"):
            exact_match(taught, asked(QUESTIONS), max_new_tokens=count)


def test_command_saves_answers_and_losses(taught: LanguageModel, tmp_path: Path, run: RunCommand) -> None:
    save(taught, tmp_path / "model")
    Pool([*asked(QUESTIONS), Example("text", text="no question")]).save(tmp_path / "pool.jsonl")
    words = ("score", tmp_path / "model", tmp_path / "pool.jsonl", "-o", tmp_path / "s.parquet", "--exact-match")
    code, out, _ = run(*words, "--max-new-tokens", 8, "--json")
    assert code == 0
    assert '"right_answers": 1.0' in out
    scores = Scores.load(tmp_path / "s.parquet")
    np.testing.assert_array_equal(np.array(scores.exact_match), [1, 1, 1, np.nan])
    assert scores.predictions == ("four", "Paris", "deep blue", None)
    assert np.isfinite(scores.nll).all()
