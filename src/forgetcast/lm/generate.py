"""Generate text: greedy answers compared with the expected ones, and sampled texts."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from forgetcast.data.pool import Example, Pool
from forgetcast.defaults import ANSWER_TOKENS
from forgetcast.errors import ConfigError, DataError
from forgetcast.lm import processes
from forgetcast.lm.adapters import is_prompt_learning
from forgetcast.lm.load import LanguageModel
from forgetcast.lm.score import Partial
from forgetcast.lm.tokens import IGNORED_INDEX, Encoded, pad, pad_id, question

Metric = Callable[[str, str], float]
"""Maps an answer and the expected one to 1 (right) or 0 (wrong)."""


def same_answer(answer: str, expected: str) -> float:
    """Return 1 if the two are equal up to case, punctuation, articles and spaces, else 0.

    The normalisation of Rajpurkar et al. (2016), except that numbers keep sign and decimal point.
    """
    return float(_normalised(answer) == _normalised(expected))


def _normalised(text: str) -> str:
    plain = re.sub(r"[-.](?!\d)|[^\w\s.-]", "", text.lower())
    # An answer of only articles or punctuation, such as "A" or "<", is kept.
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split()) or " ".join(text.lower().split())


@torch.inference_mode()
def exact_match(
    language_model: LanguageModel,
    pool: Pool,
    *,
    max_new_tokens: int = ANSWER_TOKENS,
    batch_size: int = 16,
    metric: Metric = same_answer,
    partial: Path | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, tuple[str | None, ...]]:
    """Answer every prompt greedily and compare with the completion or the assistant's last message.

    Parameters
    ----------
    language_model : LanguageModel
    pool : Pool
        Examples with nothing to answer are skipped.
    max_new_tokens : int
        Longest answer. It stops at the end-of-text token, or at the end of a line if one line is expected.
    batch_size : int
    metric : callable
        Judges an answer.
    partial : path, optional
        File to which finished answers are appended. If it exists, the run resumes from it. It stays at the end.
    on_progress : callable, optional
        Called with the number of prompts answered since the last call.

    Returns
    -------
    right : array of float, shape (N,)
        The metric; NaN where there is nothing to answer.
    answers : tuple of str or None, length N

    Raises
    ------
    ConfigError
        If the context has no room for a prompt in addition to the answer.
    MismatchError
        If `partial` belongs to another model, pool or settings.
    """
    _room(language_model, max_new_tokens)  # before there is a file
    right, answers = np.full(len(pool), np.nan), dict[int, str]()
    checkpoint = Partial(partial, _facts(language_model, pool, max_new_tokens) if partial is not None else {})
    for i, id_ in enumerate(pool.ids):
        if (kept := checkpoint.finished.get(id_)) is not None:
            right[i], answers[i] = kept
    if on_progress is not None and answers:
        on_progress(len(answers))
    settings = {"do_sample": False, "max_new_tokens": max_new_tokens}
    for batch in _answers(language_model, pool, settings, batch_size, on_progress, answers.keys()):
        for written in batch:
            answers[written.position] = written.answer
            right[written.position] = metric(answers[written.position], written.expected)
        checkpoint.write([(pool.ids[i], float(right[i]), answers[i]) for i, *_ in batch])
    for answered in processes.from_all({i: (right[i], answer) for i, answer in answers.items()}):
        for i, (judged, answer) in answered.items():
            right[i], answers[i] = judged, answer
    return right, tuple(answers.get(i) for i in range(len(pool)))


def _room(language_model: LanguageModel, max_new_tokens: int) -> int:
    """Return the tokens that are left for a prompt; ConfigError if there are none."""
    room = language_model.context - max_new_tokens
    if max_new_tokens < 1 or room < 1:
        raise ConfigError(f"max_new_tokens must be between 1 and {language_model.context - 1}")
    return room


class _Answer(NamedTuple):
    """What a model wrote after a prompt.

    Attributes
    ----------
    position : int
        Of the example in its pool.
    expected : str
    text : str
        As it was written, without special tokens.
    tokens : int
    ended : bool
        Whether the model ended it, and not the limit on its length.
    """

    position: int
    expected: str
    text: str
    tokens: int
    ended: bool

    @property
    def answer(self) -> str:
        """What is judged: without space around it, and of several lines the first, where one is expected."""
        text = self.text.lstrip()
        return (text if "\n" in self.expected else text.split("\n")[0]).rstrip()


def _answers(
    language_model: LanguageModel,
    pool: Pool,
    options: Mapping[str, Any],
    batch_size: int,
    on_progress: Callable[[int], None] | None,
    finished: Set[int] = frozenset(),
) -> Iterator[list[_Answer]]:
    """Answer the prompts of a pool, this process's share of them, in batches; those at `finished` are left out.

    `options` are those of a `GenerationConfig`. A batch is reported once the next one is asked for.
    """
    model: Any = language_model.model
    tokenizer: Any = language_model.tokenizer
    room = _room(language_model, options["max_new_tokens"])
    questions = {
        i: asked
        for i, example in enumerate(pool)
        if (asked := question(example, tokenizer, language_model.rendering)) is not None
    }
    # An empty prompt becomes a start token.
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else pad_id(tokenizer)
    prompts = {}
    for i, (ids, _) in questions.items():
        ids = ids[-room:] or [begin]
        prompts[i] = Encoded(ids, [IGNORED_INDEX] * len(ids), False)
    ends = _ends(language_model)
    over = {*ends, pad_id(tokenizer)}  # which follows where other rows of a batch go on
    settings = GenerationConfig(**options, pad_token_id=pad_id(tokenizer), eos_token_id=ends)
    if is_prompt_learning(model):
        batch_size = 1  # padding would come between the virtual tokens and the prompt, and move their positions apart
    was_training = model.training
    model.eval()
    order = sorted(questions.keys() - finished, key=lambda i: (-len(prompts[i].ids), i))
    order = order[processes.index() :: processes.count()]
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        # Padded on the left, so that all answers start at the same position.
        padded, mask, _ = pad([prompts[i] for i in batch], pad_id(tokenizer), left=True)
        start_of_answer, expected = padded.shape[1], [questions[i][1] for i in batch]
        line_ends = _StopAtLineEnd(tokenizer, start_of_answer, ["\n" not in text for text in expected])
        output = _generate(model, padded, mask, settings, line_ends)
        answers = []
        for i, row, wanted in zip(batch, output, expected, strict=True):
            new = row[start_of_answer:].tolist()
            length = next((at for at, token in enumerate(new) if token in over), len(new))
            text = tokenizer.decode(row[start_of_answer:], skip_special_tokens=True)
            ended = length < len(new) or ("\n" not in wanted and "\n" in text.lstrip())
            answers.append(_Answer(i, wanted, text, length, ended))
        yield answers
        if on_progress is not None:
            on_progress(len(batch))
    model.train(was_training)


@dataclass(frozen=True, repr=False)
class OnPolicyTexts:
    """A model's own answers to a pool's prompts.

    Attributes
    ----------
    pool : Pool
        The examples that were kept, under their ids, each with the model's answer in place of the one it had.
    asked : int
        Prompts that were answered.
    empty, unfinished, wrong, unlikely : int
        Answers that were dropped: of nothing, cut at the limit on their length, not the expected one, or not among the
        most likely.
    tokens : int
        Tokens that were generated, those of dropped answers included.
    """

    pool: Pool
    asked: int
    empty: int
    unfinished: int
    wrong: int
    unlikely: int
    tokens: int

    def __repr__(self) -> str:
        return f"OnPolicyTexts({len(self.pool)} of {self.asked} answers, {self.tokens} tokens generated)"


@torch.inference_mode()
def answer_prompts(
    language_model: LanguageModel,
    pool: Pool,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    right_only: bool = False,
    most_likely: float = 1.0,
    keep_unfinished: bool = False,
    seed: int = 0,
    batch_size: int = 16,
    metric: Metric = same_answer,
    on_progress: Callable[[int], None] | None = None,
) -> OnPolicyTexts:
    """Answer the prompts of a pool by the model itself: texts for on-policy replay, under the pool's ids.

    Parameters
    ----------
    language_model : LanguageModel
        The base model of the fine-tune.
    pool : Pool
        Texts, and conversations that do not end with an answer, are left out.
    max_new_tokens : int
        Longest answer. It stops at the end-of-text token, or at the end of a line if one line is expected.
    temperature : float
        Of sampling; 0 is greedy.
    right_only : bool
        Whether to keep only answers that are the expected ones by `metric`.
    most_likely : float
        Share of the answers to keep, above 0: those with the lowest mean loss by the model itself.
    keep_unfinished : bool
        Whether to keep answers that were cut. In training they end with the end-of-text token, which the model did not
        write.
    seed : int
    batch_size : int
    metric : callable
    on_progress : callable, optional
        Called with the number of prompts answered since the last call.

    Raises
    ------
    DataError
        If the pool has no prompt, or no answer is kept.
    ConfigError
        If a setting is invalid.
    """
    from forgetcast.lm.score import score

    if not 0 < most_likely <= 1 or not temperature >= 0:
        raise ConfigError("most_likely must be above 0 and at most 1, and the temperature not negative")
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    kept: dict[int, Example] = {}
    asked = empty = unfinished = wrong = tokens = 0
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        options = {**sampling, "max_new_tokens": max_new_tokens}
        for written in chain.from_iterable(_answers(language_model, pool, options, batch_size, on_progress)):
            asked, tokens = asked + 1, tokens + written.tokens
            if not written.answer:
                empty += 1
            elif not written.ended and not keep_unfinished:
                unfinished += 1
            elif right_only and not metric(written.answer, written.expected):
                wrong += 1
            else:
                begin = len(written.text) - len(written.text.lstrip())
                text = written.text[:begin] + written.answer  # a completion has its space before it
                kept[written.position] = _with_answer(pool[written.position], text)
    if not asked:
        raise DataError(
            "the pool has no prompt to answer: on-policy replay needs examples with a prompt and a completion, or "
            "conversations that end with an answer"
        )
    dropped = f"{empty} were empty, {unfinished} cut at {max_new_tokens} tokens, {wrong} not the expected answer"
    if not kept:
        raise DataError(f"none of {language_model.name}'s {asked} answers is kept: {dropped}")
    texts = Pool(kept[i] for i in sorted(kept))
    count = max(1, round(most_likely * len(texts)))
    if count < len(texts):
        likely = np.argsort(score(language_model, texts).nll, kind="stable")[:count]  # NaN comes last
        texts = texts.subset(texts.ids[i] for i in np.sort(likely).tolist())
    return OnPolicyTexts(texts, asked, empty, unfinished, wrong, len(kept) - len(texts), tokens)


def _with_answer(example: Example, text: str) -> Example:
    """Return an example with another answer: its completion, or the assistant's last message."""
    if example.messages is None:
        return replace(example, completion=text)
    last = {"role": "assistant", "content": text.strip()}
    return replace(example, messages=(*example.messages[:-1], last))


def _facts(language_model: LanguageModel, pool: Pool, max_new_tokens: int) -> dict[str, Any]:
    """Return what unfinished answers are of."""
    return {
        "model_hash": language_model.weights_hash,
        "text": language_model.text_settings,
        "pool": pool.fingerprint,
        "max_new_tokens": max_new_tokens,
    }


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
    """Sample texts from the model without a prompt: a pool for replay when its training data is not available.

    Parameters
    ----------
    language_model : LanguageModel
    count : int
    max_new_tokens : int
        Longest text.
    temperature : float
        Sampling temperature; 1 is the model's distribution.
    seed : int
    batch_size : int
    on_progress : callable, optional
        Called with the number of texts generated since the last call.

    Returns
    -------
    Pool
        `count` distinct texts with the source 'self-generated'.

    Raises
    ------
    ConfigError
        If a setting is invalid.
    DataError
        If the model keeps generating the same few texts, or nothing.
    """
    if count < 1 or batch_size < 1 or not temperature > 0:
        raise ConfigError("count and batch_size must be at least 1, and the temperature above 0")
    if not 2 <= max_new_tokens < language_model.context:
        raise ConfigError(f"max_new_tokens must be between 2 and {language_model.context - 1}")
    model: Any = language_model.model
    tokenizer: Any = language_model.tokenizer
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if begin is None:
        raise DataError(f"{language_model.name}: the tokenizer has no token that could start a text")
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
            rows = _generate(model, start, torch.ones_like(start), settings)
            sampled = (tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows[:, 1:])
            before = len(texts)
            # A single token has no target.
            texts |= dict.fromkeys(text for text in sampled if len(tokenizer.tokenize(text)) > 1)
            if len(texts) == before:
                raise DataError(f"{language_model.name} writes nothing new after {before} texts; raise the temperature")
            if on_progress is not None:
                on_progress(min(len(texts), count) - before)
    model.train(was_training)
    kept = list(texts)[:count]
    return Pool(Example(id=f"self-{i}", text=text, source="self-generated") for i, text in enumerate(kept))


def _generate(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, settings: GenerationConfig, *stops: StoppingCriteria
) -> torch.Tensor:
    """Continue the rows of `ids`; return them with what was written."""
    with warnings.catch_warnings():
        # Said of virtual tokens, where without padding none are needed.
        warnings.filterwarnings("ignore", "Position ids are not supported")
        written: torch.Tensor = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=settings,
            stopping_criteria=StoppingCriteriaList(stops),
        )
    return written


def _ends(language_model: LanguageModel) -> list[int]:
    """Tokens that end an answer: the tokenizer's, and those of the model's generation settings."""
    configured = getattr(language_model.model.generation_config, "eos_token_id", None)
    tokens = [language_model.tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])]
    return sorted({int(token) for token in tokens if token is not None})


class _StopAtLineEnd(StoppingCriteria):
    """Stop a row at the end of its first line if its answer is a single line."""

    def __init__(self, tokenizer: Any, start: int, single_line: list[bool]) -> None:
        self._tokenizer, self._start, self._single_line = tokenizer, start, single_line

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:  # noqa: ARG002
        """Hook of `generate`, called after every token."""
        ended = [
            single and "\n" in self._tokenizer.decode(row[self._start :]).lstrip()
            for row, single in zip(input_ids, self._single_line, strict=True)
        ]
        return torch.tensor(ended, device=input_ids.device)
