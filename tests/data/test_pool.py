from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgetcast import DataError, Example, MismatchError, Pool, load_task

CHAT = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]
TEXT = st.text(min_size=1, max_size=30).filter(str.strip)


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "a", "text": "x"}, "{not json"], "line 2: not JSON"),
        ([{"id": "a", "text": "x"}, "[1]"], "line 2: a JSON object is needed"),
        ([{"id": "a", "text": "x"}, {"id": "a", "text": "y"}], "'a' occurs twice: "),
        ([{"id": "a", "text": "  "}], "line 1: example 'a' has an empty text"),
        ([{"id": "a", "prompt": "x", "completion": ""}], "line 1: example 'a' has an empty completion"),
        ([{"id": "a", "prompt": "x"}], "the columns are id, prompt; needed are text, or prompt and completion"),
        ([{"id": "a", "text": "x", "prompt": "y"}], "keep one"),
        ([{"id": "a", "messages": CHAT, "text": "y"}], "keep one"),
        ([{"id": "a", "messages": "[{"}], "line 1: the field 'messages' is not JSON"),
        ([{"id": "a", "messages": {"role": "user"}}], "'messages' must be a list, not a dict"),
        (
            [{"id": "a", "messages": CHAT[:1]}],
            "line 1: example 'a' needs a message of the role",
        ),
        ([{"id": "a", "messages": [CHAT[0], CHAT[1] | {"weight": 0}]}], "needs a message of the role 'assistant'"),
        ([{"id": "a", "messages": [*CHAT, "bye"]}], "must be an object with a role and a content, not 'bye'"),
        ([{"id": "a", "messages": [*CHAT, {"content": "bye"}]}], "a message has no role"),
        ([{"id": "a", "messages": [*CHAT, {"role": "user"}]}], "content of a message must be a string, not None"),
        (
            [{"id": "a", "messages": [CHAT[0], {"role": "assistant", "content": " "}]}],
            "assistant's message is empty",
        ),
        ([{"id": "a", "messages": [CHAT[0], CHAT[1] | {"weight": 2}]}], "weight of a message must be 0 or 1, not 2"),
        (
            [{"id": "a", "messages": [{"role": "user", "content": [{"type": "image"}]}]}],
            "a part of the type 'image'; only text",
        ),
        ([{"id": "a", "text": 3}], "'text' must be a string, not a int"),
        ([{"id": "", "text": "x"}], "must be a string that is not empty"),
        ([], "has no examples"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, rows: list[object], message: str) -> None:
    file = write(tmp_path / "pool.jsonl", *rows)
    with pytest.raises(DataError, match=r"pool\.jsonl") as error:
        Pool.load(file)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_unreadable_files_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        Pool.load(tmp_path / "absent.jsonl")
    (tmp_path / "pool.xlsx").write_text("id,text")
    with pytest.raises(DataError, match="unknown kind of file"):
        Pool.load(tmp_path / "pool.xlsx")
    (tmp_path / "pool.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match="not a readable Parquet"):
        Pool.load(tmp_path / "pool.parquet")
    (tmp_path / "pool.jsonl").write_bytes(b'{"id": "a", "text": "\xff"}')
    with pytest.raises(DataError, match="not UTF-8"):
        Pool.load(tmp_path / "pool.jsonl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="a folder without data"):
        Pool.load(tmp_path / "folder")


@pytest.mark.parametrize("name", ["pool.jsonl", "pool.parquet"])
@given(
    texts=st.lists(st.tuples(TEXT, st.none() | TEXT, st.none() | TEXT), min_size=1, max_size=8),
)
def test_saving_keeps_everything(
    tmp_path_factory: pytest.TempPathFactory, name: str, texts: list[tuple[str, str | None, str | None]]
) -> None:
    examples = [
        Example(f"id {i}", text=text, source=source)
        if prompt is None
        else Example(f"id {i}", prompt=prompt, completion=text, source=source)
        for i, (text, prompt, source) in enumerate(texts)
    ]
    pool = Pool(examples)
    path = tmp_path_factory.mktemp("pool") / name
    pool.save(path)
    assert list(Pool.load(path)) == examples
    assert Pool.load(path).fingerprint == pool.fingerprint


def test_a_saved_data_set_is_read(tmp_path: Path, pool: Pool) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"id": e.id, "text": e.full_text} for e in pool]).save_to_disk(tmp_path / "set")
    assert Pool.load(tmp_path / "set").ids == pool.ids


def test_fingerprint_sees_ids_and_texts_but_not_order_or_source() -> None:
    a, b = Example("a", text="x", source="s"), Example("b", text="y")
    reference = Pool([a, b]).fingerprint
    assert Pool([b, Example("a", text="x")]).fingerprint == reference
    others = [
        [a, Example("b", text="z")],
        [a, Example("c", text="y")],
        [a],
        [a, Example("b", prompt="", completion="y")],
        [Example("a", text="y"), Example("b", text="x")],
    ]
    assert len({reference, *(Pool(examples).fingerprint for examples in others)}) == len(others) + 1


def test_a_task_needs_no_ids(tmp_path: Path) -> None:
    file = write(tmp_path / "task.jsonl", {"prompt": "1+1=", "completion": "2"}, {"prompt": "", "completion": "3"})
    task = load_task(file)
    assert [len(id_) for id_ in task.ids] == [16, 16]
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[::-1]))
    assert load_task(file).ids == task.ids[::-1]


@given(share=st.floats(0, 0.99), seed=st.integers(0, 100))
def test_hold_out(share: float, seed: int) -> None:
    pool = Pool([Example(str(i), text="x") for i in range(50)])
    held = pool.hold_out(share, seed=seed)
    assert len(held) == round(share * 50)
    assert set(Pool(list(pool)[::-1]).hold_out(share, seed=seed)) == set(held)
    excluded = held[::2]
    ranked = sorted(set(pool.ids) - set(excluded), key=lambda id_: hashlib.sha256(f"{seed}:{id_}".encode()).digest())
    if len(held) > len(ranked):
        with pytest.raises(DataError, match=f"is {len(held)} of 50 examples, and only {len(ranked)} can be held out"):
            pool.hold_out(share, seed=seed, exclude=excluded)
        return
    # As many as without an exclusion, and those that stay were held out before.
    made_up = pool.hold_out(share, seed=seed, exclude=excluded)
    assert set(made_up) == set(ranked[: len(held)])
    assert set(made_up) >= set(held) - set(excluded)


def test_unknown_ids_are_an_error(pool: Pool) -> None:
    with pytest.raises(MismatchError, match="'nobody'"):
        pool.subset(["e1", "nobody"])


def test_conversations_survive_every_kind_of_file(tmp_path: Path) -> None:
    calls = [{"function": {"name": "add", "arguments": {"a": 2}}}]
    tool = [CHAT[0], {"role": "assistant", "tool_calls": calls}, {"role": "tool", "content": "4"}, CHAT[1]]
    pool = Pool([Example("a", messages=CHAT, source="s"), Example("b", messages=tool), Example("c", text="a text")])
    assert pool[1].counted == (False, True, False, True)
    for name in ("pool.jsonl", "pool.parquet"):
        pool.save(tmp_path / name)
        assert list(Pool.load(tmp_path / name)) == list(pool)
        assert Pool.load(tmp_path / name).fingerprint == pool.fingerprint
    datasets = pytest.importorskip("datasets")
    rows = [{"id": e.id, "messages": None if e.messages is None else list(e.messages), "text": e.text} for e in pool]
    datasets.Dataset.from_list([rows[0], rows[2]]).save_to_disk(tmp_path / "set")
    assert [e.messages for e in Pool.load(tmp_path / "set")] == [pool[0].messages, None]
    assert pool[0].full_text == "user: What is 2 + 2?\nassistant: 4"


def test_what_a_fingerprint_of_conversations_depends_on() -> None:
    chat = Example("a", messages=CHAT)
    turned = Example("a", messages=[dict(reversed(message.items())) for message in CHAT])
    assert chat.digest() == turned.digest()
    others = [
        CHAT[::-1],
        [*CHAT, CHAT[0]],
        [CHAT[0], CHAT[1] | {"content": "5"}],
        [CHAT[0] | {"role": "system"}, CHAT[1]],
    ]
    assert len({Example("a", messages=m).digest() for m in [CHAT, *others]}) == 5


def test_a_conversation_in_two_parts_counts_in_the_second(tmp_path: Path) -> None:
    again = [{"role": "user", "content": "And 3 + 3?"}]
    answer = [{"role": "assistant", "content": "6"}]
    (example,) = load_task(write(tmp_path / "task.jsonl", {"prompt": [*CHAT, *again], "completion": answer}))
    assert example.counted == (False, False, False, True)
    assert [m["content"] for m in example.messages or ()] == ["What is 2 + 2?", "4", "And 3 + 3?", "6"]


def earlier_fingerprint(pool: Pool) -> str:
    """As it was computed when a pool was a tuple of examples: a second way to the same value."""
    digests = []
    for e in pool:
        parts: list[object] = [e.id, e.prompt, e.completion]
        if e.text is not None:
            parts = [e.id, "text", e.text]
        elif e.messages is not None:
            parts = [e.id, "messages", e.messages]
            if e.tools is not None or e.chat_template_kwargs is not None:
                parts += [e.tools, e.chat_template_kwargs]
        digests.append(hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"b": 1, "a": {"default": None}}}}]


@pytest.fixture
def mixed() -> Pool:
    """Examples of every kind, more than one batch of them."""
    kinds: list[dict[str, Any]] = [
        {"text": "ein Text, größer als ASCII 🙂"},
        {"prompt": "", "completion": "x", "source": "s"},
        {"messages": CHAT, "tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}},
        {"messages": [*CHAT, {"role": "user", "content": "é"}, {"role": "assistant", "content": "no", "weight": 0}]},
    ]
    return Pool([Example(f"e{i}", **kinds[i % 4]) for i in range(200)])


def test_the_fingerprint_is_that_of_earlier_versions(mixed: Pool) -> None:
    assert mixed.fingerprint == earlier_fingerprint(mixed)
    fixed = Pool([Example("a", text="x"), Example("b", prompt="y", completion="z"), Example("c", messages=CHAT)])
    assert fixed.fingerprint == "ff6eee94347aa0c5f1eeea633ce2bf997574b5fb32260481f444fa3b0aadb664"


def test_the_held_out_examples_are_those_of_earlier_versions(mixed: Pool) -> None:
    ranked = sorted(mixed.ids, key=lambda id_: hashlib.sha256(f"3:{id_}".encode()).digest())
    assert set(mixed.hold_out(0.3, seed=3)) == set(ranked[:60])


def test_columns_behave_as_a_sequence_of_examples(mixed: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forgetcast.data.pool.CHUNK", 7)
    examples = list(mixed)
    again = Pool(examples)
    assert [again[i] for i in range(200)] == examples
    assert again[-1] == examples[-1]
    assert again[5:25:3] == tuple(examples[5:25:3])
    assert list(again) == examples
    assert again.sources == tuple(e.source or "" for e in examples)
    with pytest.raises(IndexError):
        again[200]
    order = np.random.default_rng(0).permutation(200)[:50]
    part = again.subset(again.ids[int(i)] for i in order)
    assert list(part) == [examples[i] for i in order]
    assert part.fingerprint == earlier_fingerprint(part)
    assert pickle.loads(pickle.dumps(again)).fingerprint == mixed.fingerprint
    with pytest.raises(DataError, match="'e1' occurs 2 times"):
        again.subset(["e1", "e2", "e1"])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def any_example(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["text", "prompt", "messages"]))
    fields: dict[str, Any] = {"source": draw(st.none() | TEXT)}
    if kind == "text":
        return fields | {"text": draw(TEXT)}
    if kind == "prompt":
        return fields | {"prompt": draw(st.text(max_size=10)), "completion": draw(TEXT)}
    call = {"function": {"name": "f", "arguments": draw(st.dictionaries(TEXT, JSON, max_size=2))}}
    messages = [
        {"role": "user", "content": draw(st.text(max_size=10))},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "assistant", "content": draw(TEXT), "weight": draw(st.sampled_from([0, 1]))},
    ]
    tools = draw(st.none() | st.lists(st.dictionaries(TEXT, JSON, max_size=2), min_size=1, max_size=2))
    return fields | {
        "messages": messages,
        "tools": tools,
        "chat_template_kwargs": draw(st.none() | st.just({"a": None})),
    }


@pytest.mark.parametrize("name", ["pool.jsonl", "pool.parquet"])
@given(fields=st.lists(any_example(), min_size=1, max_size=6))
@settings(max_examples=30)
def test_every_example_survives_saving(
    tmp_path_factory: pytest.TempPathFactory, name: str, fields: list[dict[str, Any]]
) -> None:
    pool = Pool([Example(f"e{i}", **example) for i, example in enumerate(fields)])
    path = tmp_path_factory.mktemp("pool") / name
    pool.save(path)
    again = Pool.load(path)
    assert list(again) == list(pool)
    assert again.fingerprint == pool.fingerprint


@pytest.mark.parametrize(
    "fields",
    [
        {"text": "half \ud83d"},
        {"prompt": "\ude00", "completion": "x"},
        {"messages": [{"role": "user", "content": "\ud83d"}, CHAT[1]]},
        {"messages": CHAT, "tools": [{"name": "\ud83d"}]},
        {"text": "x", "source": "\ud83d"},
    ],
)
def test_half_a_surrogate_pair_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"field '\w+': character \d+ is '\\u\w+', half of a surrogate pair"):
        Example("a", **fields)
    with pytest.raises(DataError, match="surrogate"):
        Example("\ud83d", text="x")


def test_what_json_cannot_hold_is_refused() -> None:
    with pytest.raises(DataError, match="'tools': JSON cannot hold it"):
        Example("a", messages=CHAT, tools=[{"when": object()}])


class TestMessages:
    """What `Example` makes of the forms that a message comes in."""

    def test_train_is_weight(self) -> None:
        messages = [CHAT[0], CHAT[1] | {"train": False}, CHAT[0], CHAT[1] | {"train": True}]
        example = Example("a", messages=messages)
        assert example.counted == (False, False, False, True)
        assert example.messages == (CHAT[0], CHAT[1] | {"weight": 0}, CHAT[0], CHAT[1])
        same = Example("a", messages=[CHAT[0], CHAT[1] | {"weight": 0}, *CHAT])
        assert example.digest() == same.digest()

    @pytest.mark.parametrize(
        ("message", "reason"),
        [
            (CHAT[1] | {"train": "no"}, "must be true or false"),
            (CHAT[1] | {"train": True, "weight": 0}, "keep one"),
            (CHAT[0] | {"train": True}, "only the assistant's messages can be trained on"),
            ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "of the type 'image_url'"),
            ({"role": "user", "content": [3]}, "must be a string"),
            ({"role": "assistant", "tool_calls": "f()"}, "must be a list of objects"),
            ({"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}, "are not JSON"),
        ],
    )
    def test_what_cannot_be_used(self, message: dict[str, Any], reason: str) -> None:
        with pytest.raises(DataError, match=reason):
            Example("a", messages=[message, *CHAT])

    def test_parts_of_text_are_joined(self) -> None:
        parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 2?", "image_url": None}]
        assert Example("a", messages=[{"role": "user", "content": parts}, CHAT[1]]).messages == tuple(CHAT)

    def test_arguments_in_a_string_are_decoded(self) -> None:
        def calling(arguments: object) -> list[dict[str, Any]]:
            call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}
            return [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [call]}]

        assert Example("a", messages=calling('{"b": 1, "a": null}')) == Example(
            "a", messages=calling({"b": 1, "a": None})
        )
        assert Example("a", messages=calling("")) == Example("a", messages=calling({}))


def test_a_pool_is_extended_by_examples_that_come_last() -> None:
    pool = Pool([Example(f"e{i}", text=f"text {i}") for i in range(5)])
    more = [Example("new/0", prompt="a", completion="b", source="later"), Example("new/1", text="c")]
    found = pool.extended(more)
    assert list(found) == [*pool, *more]
    assert found.fingerprint == Pool([*more, *pool]).fingerprint != pool.fingerprint
    assert list(pool.extended([])) == list(pool)
    with pytest.raises(DataError, match="both: the id 'e0' occurs 2 times"):
        pool.extended([Example("e0", text="again")], where="both")
