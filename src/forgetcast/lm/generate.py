"""Answers by greedy generation, and whether they are the expected ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from forgetcast.errors import ConfigError, DataError
from forgetcast.lm import processes
from forgetcast.lm.load import LanguageModel
from forgetcast.lm.text import IGNORED, Encoded, pad, pad_id, question
from forgetcast.pool import Example, Pool

Metric = Callable[[str, str], float]
"""From an answer and the expected one to 1 (right) or 0 (wrong)."""


def same_answer(answer: str, expected: str) -> float:
    """1 if the two are equal but for case, punctuation, articles and spaces, else 0.

    As is usual since Rajpurkar et al. (2016), but that a number keeps its sign and its decimal point.
    """
    return float(_normalised(answer) == _normalised(expected))


def _normalised(text: str) -> str:
    plain = re.sub(r"[-.](?!\d)|[^\w\s.-]", "", text.lower())
    # Of an answer that is nothing but articles or punctuation, such as "A" or "<", that is the answer.
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split()) or " ".join(text.lower().split())


@torch.inference_mode()
def exact_match(
    language_model: LanguageModel,
    pool: Pool,
    *,
    max_new_tokens: int = 32,
    batch_size: int = 16,
    metric: Metric = same_answer,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, tuple[str | None, ...]]:
    """Let the model answer every prompt, and compare with the completion, or with the assistant's last message.

    Parameters
    ----------
    language_model : LanguageModel
    pool : Pool
        Examples with nothing to answer are passed over.
    max_new_tokens : int
        Longest answer. It ends earlier at the end-of-text token, or at the end of a line where one line is expected.
    batch_size : int
    metric : callable
        How an answer is judged.
    on_progress : callable, optional
        Called with the number of prompts that a batch has answered.

    Returns
    -------
    right : array of float, shape (N,)
        NaN where there is nothing to answer.
    answers : tuple of str or None, length N

    Raises
    ------
    ConfigError
        If no prompt would be left in the context beside the answer.
    """
    model: Any = language_model.model
    tokenizer: Any = language_model.tokenizer
    room = language_model.context - max_new_tokens
    if max_new_tokens < 1 or room < 1:
        raise ConfigError(f"max_new_tokens must be between 1 and {language_model.context - 1}")
    questions = {i: found for i, example in enumerate(pool) if (found := question(example, tokenizer)) is not None}
    # Without a prompt there is still a place to begin.
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else pad_id(tokenizer)
    prompts = {}
    for i, (ids, _) in questions.items():
        ids = ids[-room:] or [begin]
        prompts[i] = Encoded(ids, [IGNORED] * len(ids), False)
    right, answers = np.full(len(pool), np.nan), dict[int, str]()
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_id(tokenizer),
        eos_token_id=_ends(language_model),
    )
    was_training = model.training
    model.eval()
    order = sorted(questions, key=lambda i: -len(prompts[i].ids))[processes.index() :: processes.count()]
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        # Padded on the left, so that all answers begin at the same place.
        padded, mask, _ = pad([prompts[i] for i in batch], pad_id(tokenizer), left=True)
        longest, expected = padded.shape[1], [questions[i][1] for i in batch]
        ended = _LineEnds(tokenizer, longest, ["\n" not in text for text in expected])
        found = model.generate(
            input_ids=padded.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=settings,
            stopping_criteria=StoppingCriteriaList([ended]),
        )
        for i, row, text in zip(batch, found, expected, strict=True):
            answer = tokenizer.decode(row[longest:], skip_special_tokens=True).lstrip()
            answers[i] = (answer if "\n" in text else answer.split("\n")[0]).rstrip()
            right[i] = metric(answers[i], text)
        if on_progress is not None:
            on_progress(len(batch))
    model.train(was_training)
    for others in processes.from_all({i: (right[i], answer) for i, answer in answers.items()}):
        for i, (judged, answer) in others.items():
            right[i], answers[i] = judged, answer
    return right, tuple(answers.get(i) for i in range(len(pool)))


@torch.inference_mode()
def sample_texts(
    language_model: LanguageModel,
    count: int,
    *,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    on_progress: Callable[[int], None] | None = None,
) -> Pool:
    """Let the model write texts from nothing: a pool to replay from where the data it was trained on is not at hand.

    Parameters
    ----------
    language_model : LanguageModel
    count : int
    max_new_tokens : int
        Longest text.
    temperature : float
        Of the sampling; 1 is the model's own distribution.
    seed : int
    batch_size : int
    on_progress : callable, optional
        Called with the number of texts that a batch has written.

    Returns
    -------
    Pool
        Of `count` different texts with the source 'self-generated'.

    Raises
    ------
    ConfigError
        If a setting makes no sense.
    DataError
        If the model writes the same few texts, or nothing, again and again.
    """
    if count < 1 or batch_size < 1 or not temperature > 0:
        raise ConfigError("at least one text and one in a batch are needed, and a temperature above 0")
    if not 2 <= max_new_tokens < language_model.context:
        raise ConfigError(f"max_new_tokens must be between 2 and {language_model.context - 1}")
    model: Any = language_model.model
    tokenizer: Any = language_model.tokenizer
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if begin is None:
        raise DataError(f"{language_model.name}: the tokenizer has no token that a text could begin with")
    settings = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_id(tokenizer),
        eos_token_id=_ends(language_model),
    )
    texts: dict[str, None] = {}
    was_training = model.training
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        while len(texts) < count:
            start = torch.full((batch_size, 1), begin, device=model.device)
            rows = model.generate(input_ids=start, attention_mask=torch.ones_like(start), generation_config=settings)
            found = (tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows[:, 1:])
            before = len(texts)
            # A single token leaves nothing to predict.
            texts |= dict.fromkeys(text for text in found if len(tokenizer.tokenize(text)) > 1)
            if len(texts) == before:
                raise DataError(f"{language_model.name} writes nothing new after {before} texts; raise the temperature")
            if on_progress is not None:
                on_progress(min(len(texts), count) - before)
    model.train(was_training)
    written = list(texts)[:count]
    return Pool(Example(id=f"self-{i}", text=text, source="self-generated") for i, text in enumerate(written))


def _ends(language_model: LanguageModel) -> list[int]:
    """Tokens that end an answer: the tokenizer's, and those of a chat model's own settings."""
    own = getattr(language_model.model.generation_config, "eos_token_id", None)
    found = [language_model.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return sorted({int(token) for token in found if token is not None})


class _LineEnds(StoppingCriteria):
    """Stop a row at the end of its first line, where one line is all that is expected."""

    def __init__(self, tokenizer: Any, begin: int, single: list[bool]) -> None:
        self._tokenizer, self._begin, self._single = tokenizer, begin, single

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:  # noqa: ARG002
        """Is called by `generate` after every token, with arguments of these names."""
        ended = [
            single and "\n" in self._tokenizer.decode(row[self._begin :]).lstrip()
            for row, single in zip(input_ids, self._single, strict=True)
        ]
        return torch.tensor(ended, device=input_ids.device)
