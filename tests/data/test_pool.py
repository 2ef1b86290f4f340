from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
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
        ([{"id": "a", "text": "x"}, {"text": "y"}], "line 2: the field 'id' is missing"),
        ([{"id": "a", "text": "x"}, {"id": "a", "text": "y"}], "'a' occurs 2 times"),
        ([{"id": "a", "text": "  "}], "line 1: example 'a' has an empty text"),
        ([{"id": "a", "prompt": "x", "completion": ""}], "line 1: example 'a' has an empty completion"),
        ([{"id": "a", "prompt": "x"}], "needs a 'text', a 'prompt' and a 'completion', or 'messages'"),
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
        ([{"id": "a", "messages": [{"role": "user", "content": [{"type": "image"}]}]}], "must be a string, not [{"),
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
    (tmp_path / "pool.csv").write_text("id,text")
    with pytest.raises(DataError, match="unknown kind of file"):
        Pool.load(tmp_path / "pool.csv")
    (tmp_path / "pool.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match="not a readable Parquet"):
        Pool.load(tmp_path / "pool.parquet")
    (tmp_path / "pool.jsonl").write_bytes(b'{"id": "a", "text": "\xff"}')
    with pytest.raises(DataError, match="not UTF-8"):
        Pool.load(tmp_path / "pool.jsonl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="save_to_disk"):
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
    assert load_task(file).ids == ("1", "2")


@given(share=st.floats(0, 0.99), seed=st.integers(0, 100))
def test_hold_out(share: float, seed: int) -> None:
    pool = Pool([Example(str(i), text="x") for i in range(50)])
    held = pool.hold_out(share, seed=seed)
    assert len(held) == round(share * 50)
    assert set(Pool(list(pool)[::-1]).hold_out(share, seed=seed)) == set(held)
    excluded = held[::2]
    assert set(pool.hold_out(share, seed=seed, exclude=excluded)) == set(held) - set(excluded)


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
