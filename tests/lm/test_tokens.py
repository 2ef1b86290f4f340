"""Conversations: what of them counts, when they are scored, answered and trained on."""

from __future__ import annotations

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forgetcast import DataError, Example, Pool, Scores
from forgetcast.lm import FineTuner, LanguageModel, Recipe, exact_match, score
from forgetcast.lm.conversation import _limited_time
from forgetcast.lm.tokens import IGNORED_INDEX, encode
from support.cli import RunCommand
from support.models import save, tiny

TURN = "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}"
REST = (
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PLAIN = TURN + "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}" + REST
THINKING = TURN + "{% if loop.last %}<think></think>{% endif %}{{ m.content }}{{ eos_token }}" + REST
LOUD = TURN + "{{ m.content | upper }}{{ eos_token }}" + REST
PICKY = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}" + PLAIN


def said(*words: str, first: str = "user", **weights: int) -> list[dict[str, Any]]:
    other = {"user": "assistant", "assistant": "user"}
    return [{"role": first if i % 2 == 0 else other[first], "content": word, **weights} for i, word in enumerate(words)]


CHAT = said("What is two and two?", "Four.", "And three and three?", "It is six.")


def chat_model(template: str = PLAIN, *, bos: bool = False) -> LanguageModel:
    language_model = tiny(bos=bos)
    language_model.tokenizer.chat_template = template
    return language_model


def counted(language_model: LanguageModel, messages: list[dict[str, Any]], context: int | None = None) -> list[str]:
    """Text of each run of tokens that count."""
    found = encode(Example("c", messages=messages), language_model.tokenizer, context)
    assert len(found.ids) == len(found.labels)
    runs: list[list[int]] = [[]]
    for token, label in zip(found.ids, found.labels, strict=True):
        if label != IGNORED_INDEX:
            assert label == token
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [language_model.tokenizer.decode(run) for run in runs if run]


def test_target_tokens_match_the_templates_generation_marks() -> None:
    """Oracle: the template's own generation marks, read by Transformers."""
    language_model = chat_model()
    tokenizer: Any = language_model.tokenizer
    marked = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    text = tokenizer.decode([t for t, m in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if m])
    eos = tokenizer.eos_token
    assert counted(language_model, CHAT) == [f"Four.{eos}", f"It is six.{eos}"]
    assert "".join(counted(language_model, CHAT)) == text
    whole = encode(Example("c", messages=CHAT), tokenizer, None)
    assert tokenizer.decode(whole.ids) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    # Training adds nothing to what the template ends a conversation with.
    assert encode(Example("c", messages=CHAT), tokenizer, None, end=True) == whole


def test_weight_zero_and_conversation_opened_by_the_assistant() -> None:
    language_model = chat_model()
    eos = language_model.tokenizer.eos_token
    silent = [CHAT[0], CHAT[1] | {"weight": 0}, *CHAT[2:]]
    assert counted(language_model, silent) == [f"It is six.{eos}"]
    (opening,) = counted(language_model, said("Hello.", "Hi.", first="assistant"))
    assert opening.endswith(f"Hello.{eos}")


def test_template_with_a_different_last_turn() -> None:
    language_model = chat_model(THINKING)
    eos = language_model.tokenizer.eos_token
    assert counted(language_model, CHAT) == [f"Four.{eos}", f"It is six.{eos}"]


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (None, CHAT, "'c' is a conversation, but the tokenizer has no chat template"),
        (PICKY, said("Hi.", "Hello.", first="assistant"), "the chat template rejects example 'c': begin with the user"),
        (LOUD, CHAT, "the chat template does not show message 2 of example 'c' as it is"),
    ],
)
def test_unencodable_conversations_are_not_scored_with_a_reason(template: Any, messages: Any, reason: str) -> None:
    language_model = chat_model(template)
    bad, good = Example("c", messages=messages), Example("t", text="the loss of a model")
    scores = score(language_model, Pool([bad, good]))
    assert np.isnan(scores.nll[0])
    assert scores.tokens[0] == 0
    assert reason in str(scores.reasons[0])
    assert np.isfinite(scores.nll[1])
    with pytest.raises(DataError, match=f"scores no example; of 'c': .*{reason[:20]}"):
        score(language_model, Pool([bad]))
    with pytest.raises(DataError, match=reason[:20]):
        FineTuner(language_model).tune(Pool([bad, good]), Recipe(steps=1, batch_size=2))


def loops(depth: int) -> str:
    return "{% for i in range(99999) %}" * depth + "{% set x = i %}" + "{% endfor %}" * depth


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (loops(3) + PLAIN, "does not come to an end with example 'c'"),
        (PLAIN + "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}" + loops(2), "does not come to an end"),
        ("{{ 10 ** 10 ** 10 }}" + PLAIN, "computes a power"),
        ("{% set n = 9 %}{{ n ** (n ** n) }}" + PLAIN, "computes a power"),
    ],
)
def test_a_template_that_does_not_end(
    tmp_path: Path, run: RunCommand, monkeypatch: pytest.MonkeyPatch, template: str, said: str
) -> None:
    monkeypatch.setattr("forgetcast.lm.conversation.MOST_SECONDS", 0.2)
    handler = signal.getsignal(signal.SIGVTALRM)
    save(chat_model(template), tmp_path / "model")
    Pool([Example(id_, messages=CHAT) for id_ in "cd"]).save(tmp_path / "pool.jsonl")
    code, _, err = run("score", tmp_path / "model", tmp_path / "pool.jsonl", "-o", tmp_path / "s.parquet")
    assert (code, "Traceback" in err) == (2, False)
    assert err.splitlines()[-1].startswith("error: the chat template ")
    assert said in err.splitlines()[-1]
    assert signal.getsignal(signal.SIGVTALRM) == handler
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def test_only_the_time_of_the_template_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither other threads that compute meanwhile, nor rendering in another thread, change anything."""
    language_model = chat_model(PLAIN + "{{ dict(**{'a': '2 ** 3'}).b }}")
    expected = encode(Example("c", messages=CHAT), language_model.tokenizer, None)
    monkeypatch.setattr("forgetcast.lm.conversation.MOST_SECONDS", 0.1)

    def compute() -> None:
        started = time.thread_time()
        while time.thread_time() - started < 0.3:
            pass

    with _limited_time():
        for _ in range(2):
            busy = threading.Thread(target=compute)
            busy.start()
            busy.join()
    with ThreadPoolExecutor() as pool:
        found = pool.submit(encode, Example("c", messages=CHAT), language_model.tokenizer, None).result()
    assert found == expected


@pytest.mark.parametrize("bos", [True, False])
def test_single_turn_scores_as_prompt_and_completion(bos: bool) -> None:
    language_model = chat_model("{{ bos_token }}" * bos + PLAIN, bos=bos)
    eos = language_model.tokenizer.eos_token
    pair = Example("p", prompt=f"<|user|>\nWhat is two and two?{eos}\n<|assistant|>\n", completion=f"Four.{eos}")
    chat = Example("c", messages=CHAT[:2])
    scores = score(language_model, Pool([pair, chat]))
    assert scores.tokens[0] == scores.tokens[1] > 1
    assert scores.nll[0] == pytest.approx(scores.nll[1], rel=1e-6)


def test_two_answers_score_as_their_tokens_in_one_pass() -> None:
    language_model = chat_model()
    tokenizer: Any = language_model.tokenizer
    whole = score(language_model, Pool([Example("c", messages=CHAT)]))
    alone = score(
        language_model,
        Pool(
            [
                Example("first", messages=CHAT[:2]),
                Example("second", messages=[CHAT[0], CHAT[1] | {"weight": 0}, *CHAT[2:]]),
            ]
        ),
    )
    assert whole.tokens[0] == alone.tokens.sum() == len(tokenizer("Four.It is six.")["input_ids"]) + 2
    assert whole.nll[0] == pytest.approx(np.average(alone.nll, weights=alone.tokens), rel=1e-5)
    strided = score(language_model, Pool([Example("c", messages=CHAT)]), max_length=24, stride=8)
    assert strided.tokens[0] == whole.tokens[0]


def test_a_long_conversation_is_cut_before_its_answers() -> None:
    language_model = chat_model()
    eos = language_model.tokenizer.eos_token
    long = said("the loss of a model " * 60, "Four.")
    assert counted(language_model, long, 40) == [f"Four.{eos}"]
    assert encode(Example("c", messages=long), language_model.tokenizer, 40).truncated
    assert counted(language_model, said("Hi.", "the loss of a model " * 60), 10)[0].startswith("the loss")


def test_trained_assistant_answers(tmp_path: Path, run: RunCommand) -> None:
    pool = Pool(
        [
            Example("a", messages=said("What is two and two?", "four")),
            Example("b", messages=said("The capital of France is", "Rome", "No.", "Paris")),
            Example("last word is the user's", messages=said("Name a colour:", "red", "Thanks.")),
            Example("not counted", messages=[*said("Hi.", "x"), *said("Bye.", "y", weight=0)]),
        ]
    )
    pool.save(tmp_path / "pool.jsonl")
    recipe = Recipe(steps=120, learning_rate=1e-2, batch_size=4, max_length=96)
    taught = FineTuner(chat_model()).tune(pool, recipe).language_model
    right, answers = exact_match(taught, pool, max_new_tokens=8)
    np.testing.assert_array_equal(right, [1, 1, np.nan, np.nan])
    assert answers == ("four", "Paris", None, None)
    # The template is saved with the tokenizer, and the command reads it.
    save(taught, tmp_path / "model")
    words = ("score", tmp_path / "model", tmp_path / "pool.jsonl", "-o", tmp_path / "s.parquet", "--exact-match")
    code, _, _ = run(*words, "--max-new-tokens", 8)
    assert code == 0
    scores = Scores.load(tmp_path / "s.parquet")
    assert scores.predictions == ("four", "Paris", None, None)
    np.testing.assert_allclose(scores.nll, score(taught, pool).nll, rtol=1e-5)
    assert scores.nll.max() < 0.5
