"""What each format's rows mean, from a file as a user has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forgetcast import ConfigError, DataError, Example, Pool, load_task
from forgetcast.cli.options import DataFormat
from forgetcast.data.formats import FORMATS, read_example

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}


def only(path: Path, row: dict[str, Any], **reading: Any) -> Example:
    """Read a file with one row."""
    path = path / "data.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (example,) = Pool.load(path, **reading)
    return example


def turns(*pairs: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"from": role, "value": value} for role, value in pairs]


def test_choices_are_those_of_the_library() -> None:
    assert [kind.value for kind in DataFormat] == list(FORMATS)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # TRL
        ({"text": "a text"}, {"text": "a text"}),
        ({"prompt": "2+2=", "completion": "4"}, {"prompt": "2+2=", "completion": "4"}),
        ({"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER]}),
        ({"prompt": [USER], "completion": [ANSWER]}, {"messages": [USER | {"weight": 0}, ANSWER]}),
        (
            {"prompt": [USER, ANSWER | {"train": True}, USER], "completion": [ANSWER]},
            {"messages": [m | {"weight": 0} for m in (USER, ANSWER, USER)] + [ANSWER]},
        ),
        (
            {"messages": [USER, ANSWER], "tools": [TOOL], "chat_template_kwargs": {"x": None}},
            {"messages": [USER, ANSWER], "tools": [TOOL], "chat_template_kwargs": {"x": None}},
        ),
        (
            {"prompt": [USER], "completion": [ANSWER], "tools": [TOOL]},
            {"messages": [USER | {"weight": 0}, ANSWER], "tools": [TOOL]},
        ),
        # Tools as JSON in strings, of the whole or of a part
        ({"messages": [USER, ANSWER], "tools": json.dumps([TOOL])}, {"messages": [USER, ANSWER], "tools": [TOOL]}),
        ({"messages": [USER, ANSWER], "tools": [json.dumps(TOOL)]}, {"messages": [USER, ANSWER], "tools": [TOOL]}),
        (
            {"messages": [USER, ANSWER], "tools": [{"name": "f", "parameters": '{"a": null}'}]},
            {"messages": [USER, ANSWER], "tools": [{"name": "f", "parameters": {"a": None}}]},
        ),
        ({"messages": [USER, ANSWER], "tools": []}, {"messages": [USER, ANSWER]}),
        # A prompt next to the conversation that starts with it, as some data sets have it
        ({"prompt": "Hi", "messages": [USER, ANSWER]}, {"messages": [USER, ANSWER]}),
        # OpenAI: parts, calls, and the earlier form of a call
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ANSWER]},
            {"messages": [USER, ANSWER]},
        ),
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 2}'}},
                    {"role": "function", "name": "add", "content": "4"},
                    ANSWER,
                ]
            },
            {
                "messages": [
                    USER,
                    {"role": "assistant", "tool_calls": [CALL]},
                    {"role": "tool", "name": "add", "content": "4"},
                    ANSWER,
                ]
            },
        ),
        # ShareGPT
        ({"conversations": turns(("human", "Hi"), ("gpt", "Hello"))}, {"messages": [USER, ANSWER]}),
        (
            {
                "conversations": turns(
                    ("human", "Hi"),
                    ("function_call", '{"name": "add", "arguments": {"a": 2}}'),
                    ("observation", "4"),
                    ("gpt", "Hello"),
                ),
                "system": "Be brief.",
                "tools": json.dumps([TOOL]),
            },
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    USER,
                    {"role": "assistant", "tool_calls": [CALL]},
                    {"role": "tool", "content": "4"},
                    ANSWER,
                ],
                "tools": [TOOL],
            },
        ),
        (
            {"conversations": [*turns(("system", "s"), ("tool", "4")), {"from": "gpt", "value": "Hello", "weight": 1}]},
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "tool", "content": "4"},
                    ANSWER | {"weight": 1},
                ]
            },
        ),
        ({"conversations": [USER, ANSWER]}, {"messages": [USER, ANSWER]}),
        ({"conversations": json.dumps(turns(("user", "Hi"), ("assistant", "Hello")))}, {"messages": [USER, ANSWER]}),
        # Alpaca
        ({"instruction": "Hi", "output": "Hello"}, {"messages": [USER, ANSWER]}),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, {"messages": [USER, ANSWER]}),
        (
            {
                "instruction": "Add",
                "input": "2, 2",
                "output": "4",
                "system": "Be brief.",
                "history": [["Hi", "Hello"]],
            },
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    USER,
                    ANSWER,
                    {"role": "user", "content": "Add\n2, 2"},
                    {"role": "assistant", "content": "4"},
                ]
            },
        ),
        # Pairs
        ({"prompt": "Hi", "response": "Hello"}, {"messages": [USER, ANSWER]}),
        ({"question": "Hi", "answer": "Hello"}, {"messages": [USER, ANSWER]}),
        ({"query": "Hi", "response": "Hello"}, {"messages": [USER, ANSWER]}),
        ({"input": "Hi", "output": "Hello"}, {"messages": [USER, ANSWER]}),
    ],
)
def test_a_row(tmp_path: Path, row: dict[str, Any], expected: dict[str, Any]) -> None:
    assert only(tmp_path, {"id": "a", "source": "s", **row}) == Example("a", source="s", **expected)


def test_names_of_columns_are_mapped(tmp_path: Path) -> None:
    row = {"nr": 7, "frage": "2+2=", "antwort": "4", "text": "not this", "herkunft": "s"}
    names = {"id": "nr", "prompt": "frage", "completion": "antwort", "source": "herkunft"}
    assert only(tmp_path, row, columns=names) == Example("7", prompt="2+2=", completion="4", source="s")
    chat = {"question": "frage", "answer": "antwort", "id": ""}
    assert only(tmp_path, {**row, "id": 3.5}, columns=chat).messages == (
        {"role": "user", "content": "2+2="},
        {"role": "assistant", "content": "4"},
    )
    # The raw form of a pair that would be a conversation
    raw = only(tmp_path, {"id": "a", "prompt": "p", "response": "r"}, columns={"completion": "response"})
    assert raw == Example("a", prompt="p", completion="r")
    with pytest.raises(DataError, match=r"there is no column 'question' for 'prompt'; the columns are nr, frage"):
        only(tmp_path, row, columns={"prompt": "question"})
    with pytest.raises(ConfigError, match="no format has the field 'promt'"):
        only(tmp_path, row, columns={"promt": "frage"})


def test_a_format_is_insisted_on(tmp_path: Path) -> None:
    row = {"id": "a", "instruction": "Hi", "input": "", "output": "Hello", "text": "Below is an instruction ..."}
    with pytest.raises(DataError, match=r"line 1: the row can be read as text \(text\) and as alpaca"):
        only(tmp_path, row)
    assert only(tmp_path, row, format="alpaca") == Example("a", messages=[USER, ANSWER])
    assert only(tmp_path, row, format="text").text == row["text"]
    assert only(tmp_path, {"id": "a", "text": "x", "prompt": "y"}, format="text").text == "x"
    with pytest.raises(DataError, match="the columns are id, instruction, input, output, text; needed are messages"):
        only(tmp_path, row, format="messages")
    with pytest.raises(ConfigError, match="unknown format 'vicuna'; choose from text"):
        only(tmp_path, row, format="vicuna")


def test_rows_of_several_formats_are_read_each_by_its_own(tmp_path: Path) -> None:
    rows = [{"text": "x"}, {"prompt": "p", "completion": "c"}, {"question": "Hi", "answer": "Hello"}]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pool = load_task(file)
    assert [(e.text, e.prompt, e.messages is not None) for e in pool] == [
        ("x", None, False),
        (None, "p", False),
        (None, None, True),
    ]
    assert pool.report is not None
    assert dict(pool.report.formats) == {"text": 1, "prompt-completion": 1, "prompt-response": 1}


def test_an_unknown_layout_names_what_is_there_and_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"the columns are body, title; needed are text, or prompt and completion, or m"
    ):
        only(tmp_path, {"body": "x", "title": "y"})
    pq.write_table(pa.table({"frage": ["x"], "antwort": ["y"]}), tmp_path / "data.parquet")
    with pytest.raises(DataError, match=r"data\.parquet: the columns are frage, antwort; .*--column prompt=NAME"):
        Pool.load(tmp_path / "data.parquet")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "the row is empty"),
        ({"id": "x"}, "the row is empty"),
        ({"text": None}, "the row is empty"),
        ({"text": " "}, "the example has an empty text"),
        ({"text": "\ud83d"}, "character 1 is '\\ud83d', half of a surrogate pair"),
        ({"prompt": "x", "completion": None}, "there is no completion"),
        ({"instruction": "x", "output": ""}, "there is no answer"),
        ({"instruction": "x", "output": None, "input": ""}, "there is no output"),
        ({"instruction": " ", "output": "x"}, "there is no question"),
        ({"instruction": 3, "output": "x"}, "must be strings"),
        ({"instruction": "x", "output": "y", "history": ["a"]}, "a list of pairs"),
        ({"question": "x", "answer": " "}, "there is no answer"),
        ({"question": "x", "answer": {"text": "y"}}, "must be a string"),
        ({"title": "x"}, "the row is empty"),
        ({"prompt": "x"}, "it has prompt; needed are text, or"),
        ({"conversations": turns(("human", "Hi"))}, "needs a message of the role 'assistant'"),
        ({"conversations": turns(("robot", "Hi"))}, "a turn is from 'robot'; known are human"),
        ({"conversations": turns(("function_call", "add(2)"))}, "'value' is not JSON"),
        ({"conversations": turns(("function_call", "[3]"))}, "must be a call"),
        ({"conversations": "[]]"}, "'conversations' is not JSON"),
        ({"conversations": ["Hi"]}, "must be a list of objects"),
        ({"text": "x", "tools": [TOOL]}, "tools or chat_template_kwargs but no messages"),
        ({"messages": [USER, ANSWER], "tools": "[{"}, "'tools' is not JSON"),
        ({"messages": [USER, ANSWER], "chat_template_kwargs": [1]}, "must be an object"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}, "of the type 'image'"),
    ],
)
def test_a_row_that_cannot_be_used(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in ({"text": "good"}, row, {"text": "good too"})))
    pool = Pool.load(file)
    assert [e.text for e in pool] == ["good", "good too"]
    ((place, said),) = pool.skipped
    assert place == f"{file}, line 2"
    assert reason in said
    with pytest.raises(DataError) as error:
        Pool.load(file, strict=True)
    assert str(error.value) == f"{place}: {said}"


def test_tables_add_nulls_and_json_does_not(tmp_path: Path) -> None:
    tools = [
        [{"type": "function", "function": {"name": name, "parameters": {"properties": {name: {"type": "string"}}}}}]
        for name in ("a", "b")
    ]
    calls = [[{"function": {"name": name, "arguments": {name: "1"}}}] for name in ("a", "b")]
    rows = [
        {"id": name, "messages": [USER, {"role": "assistant", "tool_calls": c}, ANSWER], "tools": t}
        for name, t, c in zip("ab", tools, calls, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    assert pq.read_table(tmp_path / "data.parquet")["tools"][0].as_py()[0]["function"]["parameters"] == {
        "properties": {"a": {"type": "string"}, "b": None}
    }
    assert list(Pool.load(tmp_path / "data.parquet")) == [Example(**row) for row in rows]
    # As JSON in a string, or in JSONL, a null is the user's.
    nulls = {"id": "a", "messages": [USER, ANSWER], "tools": [{"name": "f", "default": None}]}
    assert only(tmp_path, nulls) == Example(**nulls)
    in_string = nulls | {"tools": json.dumps(nulls["tools"])}
    pq.write_table(pa.Table.from_pylist([in_string]), tmp_path / "string.parquet")
    assert list(Pool.load(tmp_path / "string.parquet")) == [Example(**nulls)]


def test_one_row_with_our_own_fields() -> None:
    assert read_example({"id": 3, "text": "x", "prompt": None}) == Example("3", text="x")
    assert read_example({"text": "x"}, default_id="a") == Example("a", text="x")
    with pytest.raises(DataError, match="'id' is missing"):
        read_example({"text": "x"})
