"""Which tokens are given to the model and which are targets, of every kind of tokenizer and of chat template.

Oracles: the tokenizer's own ids of the whole; tokens spelled out along the text (`support.tokenizers.spans`); and a
second writing of each chat template that says who wrote which characters.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from forgetcast import Example, Pool
from forgetcast.lm import LanguageModel, score
from forgetcast.lm.tokens import IGNORED_INDEX, Encoded, encode
from support.models import tiny
from support.tokenizers import ADDED, BEGIN, END, KINDS, make, spans, with_template

WORDS = ("Answer:", "the answer", "42", "the other mat", "there", "cat", "yes", "x", ".", "?")
ODD = (" ", "  ", "\n", "\n\n", " \n", "\t", "🙂", "👩‍👧", "\u0301", "e\u0301", "é", "ñ", "日本", "▁", "…")
pieces = st.lists(st.sampled_from(WORDS + ODD), max_size=5).map("".join)
spoken = pieces.filter(str.strip)

every_kind = pytest.mark.parametrize("kind", KINDS)
every_tokenizer = pytest.mark.parametrize(("kind", "added"), [(kind, added) for kind in KINDS for added in ADDED])
few = settings(max_examples=12)


def check(found: Encoded, ids: Sequence[int], targets: Iterable[bool]) -> None:
    """Compare with the expected ids, and with which of them are targets."""
    assert found.ids == list(ids)
    expected = [token if target else IGNORED_INDEX for token, target in zip(ids, targets, strict=True)]
    assert found.labels == [IGNORED_INDEX, *expected[1:]]
    assert not found.truncated


def around(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[list[int], list[int]]:
    """Tokens that the tokenizer adds before and after a text that does not have them."""
    own = tokenizer("")["input_ids"]
    begin = [token for token in own if token == tokenizer.bos_token_id and not text.startswith(BEGIN)]
    return begin, [token for token in own if token == tokenizer.eos_token_id and not text.endswith(END)]


# Texts


@every_tokenizer
@few
@given(text=spoken)
def test_text(kind: str, added: str, text: str) -> None:
    tokenizer = make(kind, added)
    ids = tokenizer(text)["input_ids"]
    check(encode(Example("t", text=text), tokenizer, None), ids, [True] * len(ids))


@every_tokenizer
@few
@given(text=spoken, begin=st.booleans(), end=st.booleans())
def test_begin_and_end_tokens_in_the_text_are_not_doubled(
    kind: str, added: str, text: str, begin: bool, end: bool
) -> None:
    tokenizer = make(kind, added)
    text = BEGIN * begin + text + END * end
    before, after = around(tokenizer, text)
    ids = [*before, *tokenizer(text, add_special_tokens=False)["input_ids"], *after]
    check(encode(Example("t", text=text), tokenizer, None), ids, [True] * len(ids))
    assert ids.count(tokenizer.bos_token_id) <= 1
    closed = ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]
    check(encode(Example("t", text=text), tokenizer, None, end=True), closed, [True] * len(closed))
    assert closed.count(tokenizer.eos_token_id) == 1


# Prompts and completions


def parts(tokenizer: PreTrainedTokenizerFast, kind: str, prompt: str, completion: str) -> tuple[list[int], list[bool]]:
    """Ids of the joint text, and whether each has a character of the completion."""
    whole = prompt + completion
    before, after = around(tokenizer, whole)
    ids = [*before, *tokenizer(whole, add_special_tokens=False)["input_ids"], *after]
    inside = [stop > len(prompt) for _, stop in spans(kind, tokenizer, whole)]
    return ids, [False] * len(before) + inside + [False] * len(after)


@every_tokenizer
@few
@given(prompt=pieces, completion=spoken)
def test_prompt_and_completion(kind: str, added: str, prompt: str, completion: str) -> None:
    tokenizer = make(kind, added)
    ids, targets = parts(tokenizer, kind, prompt, completion)
    assert ids == tokenizer(prompt + completion)["input_ids"]
    example = Example("p", prompt=prompt, completion=completion)
    check(encode(example, tokenizer, None), ids, targets)
    if ids[-1] != tokenizer.eos_token_id:
        ids, targets = [*ids, tokenizer.eos_token_id], [*targets, True]
    check(encode(example, tokenizer, None, end=True), ids, [*targets[:-1], True])


@every_tokenizer
@few
@given(text=spoken, data=st.data())
def test_boundary_within_words_and_characters(kind: str, added: str, text: str, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(text.rstrip()) - 1))
    prompt, completion = text[:at], text[at:]
    tokenizer = make(kind, added)
    check(
        encode(Example("p", prompt=prompt, completion=completion), tokenizer, None),
        *parts(tokenizer, kind, prompt, completion),
    )


@every_tokenizer
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        (f"{BEGIN}Answer:", " 42"),
        ("Answer:", f" 42{END}"),
        (f"{BEGIN}Answer:", f" 42{END}"),
        (BEGIN, "42"),
        ("", f"{BEGIN}42"),
        ("<|im_start|>user\n", "42<|im_end|>"),
        ("<|im_start|>", "42"),
        ("<|im_start|>", " 42"),
        ("<|im_start|>", "\n42"),
    ],
)
def test_special_tokens_at_the_boundary(kind: str, added: str, prompt: str, completion: str) -> None:
    tokenizer = make(kind, added)
    ids, targets = parts(tokenizer, kind, prompt, completion)
    example = Example("p", prompt=prompt, completion=completion)
    check(encode(example, tokenizer, None), ids, targets)
    if completion.endswith(END):
        assert targets[-1]
        check(encode(example, tokenizer, None, end=True), ids, targets)


@pytest.mark.parametrize("added", ["", "begin"])
@every_kind
@few
@given(prompt=pieces, completion=spoken, context=st.integers(2, 12))
def test_truncation(kind: str, added: str, prompt: str, completion: str, context: int) -> None:
    tokenizer = make(kind, added)
    example = Example("p", prompt=prompt, completion=completion)
    whole, found = encode(example, tokenizer, None), encode(example, tokenizer, context)
    assert found.truncated == (len(whole.ids) > context)
    assert len(found.ids) == len(found.labels) == min(len(whole.ids), context)
    targets, kept = ([label for label in e.labels if label != IGNORED_INDEX] for e in (whole, found))
    assert kept == targets[: len(kept)]
    assert len(kept) >= min(len(targets), context - 1)
    if added and len(targets) < context - 1:
        assert found.ids[0] == tokenizer.bos_token_id
    text = encode(Example("t", text=prompt + completion), tokenizer, context)
    assert text.ids == tokenizer(prompt + completion)["input_ids"][:context]


# By hand


def by_hand(*words: str, normalizer: Any = None, pre_tokenizer: Any = None) -> PreTrainedTokenizerFast:
    """Make a tokenizer that knows `words` and their letters; it adds the begin token."""
    names = ["<unk>", BEGIN, END, "<|im_start|>", "<|im_end|>"]
    merges = [(word[:i], word[i]) for word in words for i in range(1, len(word))]
    vocabulary = [*names, *dict.fromkeys([*"".join(words), *(a + b for a, b in merges)])]
    backend = Tokenizer(models.BPE({p: i for i, p in enumerate(vocabulary)}, list(dict.fromkeys(merges))))
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizer
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    backend.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BEGIN, eos_token=END, unk_token="<unk>", chat_template=CHATML
    )


LLAMA_2 = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def marked(tokenizer: PreTrainedTokenizerFast, example: Example, *, end: bool = False) -> str:
    """The tokens, those that are targets in brackets."""
    found = encode(example, tokenizer, None, end=end)
    tokens = zip(tokenizer.convert_ids_to_tokens(found.ids), found.labels, strict=True)
    return " ".join(f"[{t}]" if label != IGNORED_INDEX else t for t, label in tokens)


def test_prefix_space_by_hand() -> None:
    tokenizer = by_hand("▁Answer", ":", "▁42", "▁user", "\n", "▁assistant", "▁Hi", "Hi", normalizer=LLAMA_2)
    pair = Example("p", prompt="Answer:", completion=" 42")
    assert marked(tokenizer, pair) == "<s> ▁Answer : [▁42]"
    assert marked(tokenizer, pair, end=True) == "<s> ▁Answer : [▁42] [</s>]"
    assert marked(tokenizer, Example("t", text="Answer: 42")) == "<s> [▁Answer] [:] [▁42]"
    assert marked(tokenizer, Example("t", text="<s>Answer: 42</s>"), end=True) == "<s> [▁Answer] [:] [▁42] [</s>]"
    chat = [{"role": "user", "content": "Answer:"}, {"role": "assistant", "content": "Hi 42"}]
    # The space that is put before "\n" after the end of a turn is the tokenizer's own habit, too.
    expected = (
        "<|im_start|> ▁user \n A n s w e r : <|im_end|> ▁ \n <|im_start|> ▁assistant \n [Hi] [▁42] [<|im_end|>] ▁ \n"
    )
    ids = tokenizer.apply_chat_template(chat)["input_ids"]
    assert encode(Example("c", messages=chat), tokenizer, None).ids == ids
    assert marked(tokenizer, Example("c", messages=chat)) == expected


def test_merge_over_the_boundary_by_hand() -> None:
    tokenizer = by_hand("there", "is", " ", "the", "re")
    assert marked(tokenizer, Example("p", prompt="is the", completion="re is")) == "<s> is   [there] [ ] [is]"


def test_metaspace_by_hand() -> None:
    first = by_hand("▁Answer", ":", "▁42", "42", pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first"))
    assert marked(first, Example("p", prompt="Answer:<|im_end|>", completion="42")) == "<s> ▁Answer : <|im_end|> [42]"
    always = by_hand("▁Answer", ":", "▁42", "42", pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="always"))
    assert marked(always, Example("p", prompt="Answer:<|im_end|>", completion="42")) == "<s> ▁Answer : <|im_end|> [▁42]"


# Conversations

Segment = tuple[str, int | None]
"""Characters, and the index of the message whose words they are, or None for what only the template writes."""
Messages = Sequence[Mapping[str, Any]]


def chatml(messages: Messages, _tools: Any) -> list[Segment]:
    found: list[Segment] = []
    for i, m in enumerate(messages):
        found += [(f"<|im_start|>{m['role']}\n", None), (f"{m['content']}<|im_end|>", i), ("\n", None)]
    return found


PLAIN_TEXT = "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}\n\n{% endfor %}"


def plain_text(messages: Messages, _tools: Any) -> list[Segment]:
    found: list[Segment] = []
    for i, m in enumerate(messages):
        found += [(f"{m['role'].upper()}: ", None), (m["content"], i), ("\n\n", None)]
    return found


INST = (
    "{% if messages[0].role == 'system' %}{% set told = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set told = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ told if loop.first }}"
    "{{ m.content.strip() }} [/INST]{% else %} {{ m.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}"
)


def inst(messages: Messages, _tools: Any) -> list[Segment]:
    found, told, opened = list[Segment](), "", False
    for i, m in enumerate(messages):
        if m["role"] == "system":
            told = f"<<SYS>>\n{m['content']}\n<</SYS>>\n\n"
        elif m["role"] == "user":
            found.append((f"{BEGIN}[INST] {'' if opened else told}{m['content'].strip()} [/INST]", None))
            opened = True
        else:
            found += [(" ", None), (f"{m['content'].strip()} {END}", i)]
    return found


LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|header|>{{ m.role }}<|/header|>\n\n{{ m.content | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}"
)


def llama_3(messages: Messages, _tools: Any) -> list[Segment]:
    found: list[Segment] = [(BEGIN, None)]
    for i, m in enumerate(messages):
        found += [(f"<|header|>{m['role']}<|/header|>\n\n", None), (f"{m['content'].strip()}<|eot|>", i)]
    return found


QWEN_3 = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% set found = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set found.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% set words = m.content or '' %}"
    "{% if m.role == 'assistant' %}{% set thought = m.reasoning_content or '' %}"
    "{% if '</think>' in words %}{% set thought = words.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set words = words.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > found.last and (loop.last or thought) %}"
    "<think>\n{{ thought.strip('\n') }}\n</think>\n\n{% endif %}{{ words }}"
    "{% for call in m.tool_calls or [] %}{{ '\n' if words or not loop.first else '' }}"
    "<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "{% else %}{{ words }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def qwen_3(messages: Messages, tools: Any) -> list[Segment]:
    told = "".join(f"{json.dumps(tool, ensure_ascii=False)}\n" for tool in tools or ())
    found: list[Segment] = [(f"<|im_start|>system\n{told}<|im_end|>\n", None)] if tools else []
    last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    for i, m in enumerate(messages):
        found.append((f"<|im_start|>{m['role']}\n", None))
        words, thought = m.get("content") or "", m.get("reasoning_content") or ""
        if m["role"] == "assistant":
            if "</think>" in words:
                thought, words = words.split("</think>")
                thought, words = thought.removeprefix("<think>").strip("\n"), words.lstrip("\n")
            if i > last and thought:
                words = f"<think>\n{thought}\n</think>\n\n{words}"
            elif i > last and i == len(messages) - 1:
                found.append(("<think>\n\n</think>\n\n", None))
            calls = [json.dumps(call["function"], ensure_ascii=False) for call in m.get("tool_calls") or ()]
            asked = "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)
            words += "\n" * bool(words and asked) + asked
        found += [(f"{words}<|im_end|>", i), ("\n", None)]
    return found


CHANNELS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if loop.last and m.thinking %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


def channels(messages: Messages, _tools: Any) -> list[Segment]:
    found: list[Segment] = []
    for i, m in enumerate(messages):
        last = i == len(messages) - 1
        if m["role"] != "assistant":
            found.append((f"<|start|>{m['role']}<|message|>{m['content']}<|end|>", None))
            continue
        final = "<|channel|>final<|message|>"
        found.append(("<|start|>assistant", None))
        if last and m.get("thinking"):
            thought = f"<|channel|>analysis<|message|>{m['thinking']}<|end|><|start|>assistant"
            found.append((f"{thought}{final}{m['content']}<|return|>", i))
        elif last:
            found += [(final, None), (f"{m['content']}<|return|>", i)]
        else:  # a model ends no answer so; the template does afterwards
            found += [(final, None), (m["content"], i), ("<|end|>", None)]
    return found


TEMPLATES: dict[str, tuple[str, Callable[..., list[Segment]], str]] = {
    "ChatML": (CHATML, chatml, "<|im_end|>"),
    "plain text": (PLAIN_TEXT, plain_text, END),
    "INST": (INST, inst, END),
    "Llama 3": (LLAMA_3, llama_3, "<|eot|>"),
    "Qwen 3": (QWEN_3, qwen_3, "<|im_end|>"),
    "channels": (CHANNELS, channels, "<|return|>"),
}
"""Each template, its second writing, and the tokenizer's end token."""

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}]


def judge(kind: str, name: str, example: Example, added: str = "begin") -> Encoded:
    """Check a conversation against the second writing of its template."""
    template, writing, eos = TEMPLATES[name]
    tokenizer = with_template(make(kind, added), template, eos=eos)
    messages = [{k: v for k, v in m.items() if k != "weight"} for m in example.messages or ()]
    options: dict[str, Any] = {"tools": example.tools, **(example.chat_template_kwargs or {})}
    segments = writing(messages, example.tools)
    text = "".join(part for part, _ in segments)
    assert tokenizer.apply_chat_template(messages, tokenize=False, **options) == text
    counts = [i is not None and example.counted[i] for part, i in segments for _ in part]
    found = encode(example, tokenizer, None)
    targets = [any(counts[start:stop]) for start, stop in spans(kind, tokenizer, text)]
    check(found, tokenizer.apply_chat_template(messages, **options)["input_ids"], targets)
    assert encode(example, tokenizer, None, end=True) == found
    return found


@st.composite
def conversations(draw: st.DrawFn) -> Example:
    """One to three turns, perhaps after a system message; some answers do not count."""
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(spoken)})
    for _ in range(draw(st.integers(1, 3))):
        messages += [{"role": "user", "content": draw(spoken)}, {"role": "assistant", "content": draw(spoken)}]
        if draw(st.booleans()):
            messages[-1]["weight"] = draw(st.integers(0, 1))
    assume(any(m["role"] == "assistant" and m.get("weight") != 0 for m in messages))
    return Example("c", messages=messages)


@every_kind
@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=5)
@given(example=conversations())
def test_conversation(kind: str, name: str, example: Example) -> None:
    judge(kind, name, example)


def said(*words: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": word} for i, word in enumerate(words)]


@every_kind
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_same_words_twice_and_words_of_the_template(kind: str, name: str) -> None:
    judge(kind, name, Example("c", messages=said("yes", "yes", "yes", "yes")))
    judge(kind, name, Example("c", messages=said("assistant", "assistant", "user", "user:")))
    judge(kind, name, Example("c", messages=[*said("s", "s"), {"role": "assistant", "content": "s"}]))


@every_kind
def test_thinking(kind: str) -> None:
    for words in ("<think>\nthe cat\n</think>\n\nyes", "<think>\nthe\n\n cat 🙂\n</think>\n\n🙂"):
        judge(kind, "Qwen 3", Example("c", messages=said("Question", words)))
    asked = said("Question", "yes")
    thought = [asked[0], asked[1] | {"reasoning_content": "the cat"}]
    judge(kind, "Qwen 3", Example("c", messages=thought))
    judge(kind, "Qwen 3", Example("c", messages=asked))
    judge(kind, "Qwen 3", Example("c", messages=asked, chat_template_kwargs={"enable_thinking": False}))
    judge(kind, "Qwen 3", Example("c", messages=[*asked, *thought]))
    judge(kind, "ChatML", Example("c", messages=said("Question", "<think>\nthe cat\n</think>\n\nyes")))
    channelled = [asked[0], asked[1] | {"thinking": "the cat"}]
    judge(kind, "channels", Example("c", messages=channelled))
    judge(kind, "channels", Example("c", messages=[*asked, *channelled]))


@every_kind
def test_tools(kind: str) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    turns = [
        {"role": "user", "content": "the weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "It is 42."},
    ]
    judge(kind, "Qwen 3", Example("c", messages=turns, tools=TOOLS))
    judge(kind, "Qwen 3", Example("c", messages=turns[:2], tools=TOOLS))
    judge(kind, "Qwen 3", Example("c", messages=[turns[0], turns[1] | {"content": "yes"}, *turns[2:]], tools=TOOLS))


MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content }}<|im_end|>{{ '\n' }}{% endif %}{% endfor %}"
)
MARKED_WITH_BREAK = MARKED.replace("{% endgeneration %}{{ '\n' }}", "{{ '\n' }}{% endgeneration %}")


@every_kind
@pytest.mark.parametrize("template", [MARKED, MARKED_WITH_BREAK], ids=["through the end", "and the line break"])
@settings(max_examples=5)
@given(example=conversations())
def test_the_templates_own_marks(kind: str, template: str, example: Example) -> None:
    """What is between the template's marks is a target, whoever wrote it; a turn with weight 0 is not."""
    tokenizer = with_template(make(kind, "begin"), template, eos="<|im_end|>")
    messages = [{k: v for k, v in m.items() if k != "weight"} for m in example.messages or ()]
    text, counts = "", list[bool]()
    for m, counted in zip(messages, example.counted, strict=True):
        for part, target in (
            (f"<|im_start|>{m['role']}\n", False),
            (f"{m['content']}<|im_end|>", counted),
            ("\n", counted and template == MARKED_WITH_BREAK),
        ):
            text += part
            counts += [target] * len(part)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == text
    targets = [any(counts[start:stop]) for start, stop in spans(kind, tokenizer, text)]
    check(encode(example, tokenizer, None), tokenizer.apply_chat_template(messages)["input_ids"], targets)


@every_kind
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_completion_scores_as_the_equal_conversation(kind: str, name: str) -> None:
    template, writing, eos = TEMPLATES[name]
    tokenizer = with_template(make(kind), template, eos=eos)
    messages = said("the cat?", "yes 🙂", "Why", "the other")
    messages[1]["weight"] = 0
    chat = Example("c", messages=messages)
    segments = writing([{k: v for k, v in m.items() if k != "weight"} for m in messages], None)
    (at,) = (k for k, (_, i) in enumerate(segments) if i == 3)
    prompt = "".join(part for part, _ in segments[:at])
    pair = Example("p", prompt=prompt, completion=segments[at][0])
    model = tiny().model
    model.config.max_position_embeddings = 512  # its positions are rotations; there is no table of them
    scores = score(LanguageModel(model, tokenizer, "tiny"), Pool([chat, pair]))
    assert scores.tokens[0] == scores.tokens[1] > 1
    np.testing.assert_allclose(scores.nll[0], scores.nll[1], rtol=1e-6)


@pytest.mark.filterwarnings("ignore:This sequence already has")
def test_tokenizer_without_offsets() -> None:
    """A tokenizer in Python tells no offsets; this one gives each byte plus three, and adds an end token."""
    tokenizer = ByT5Tokenizer()
    prompt, completion = "Answer: é", " 42 🙂"
    counts = [False] * len(prompt.encode()) + [True] * len(completion.encode())
    ids = [byte + 3 for byte in (prompt + completion).encode()]
    pair = Example("p", prompt=prompt, completion=completion)
    check(encode(pair, tokenizer, None), [*ids, 1], [*counts, False])
    check(encode(pair, tokenizer, None, end=True), [*ids, 1], [*counts, True])
    closed = Example("p", prompt=prompt, completion=completion + END)
    check(encode(closed, tokenizer, None), [*ids, 1], [*counts, True])
    tokenizer.chat_template = CHATML
    prompt = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    text = f"{prompt}{completion}<|im_end|>\n"
    counts = [False] * len(prompt.encode()) + [True] * len(f"{completion}<|im_end|>".encode()) + [False]
    chat = Example("c", messages=said("Answer: é", completion))
    check(encode(chat, tokenizer, None), [byte + 3 for byte in text.encode()], counts)
