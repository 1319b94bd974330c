"""Whatever a file holds, reading it ends in examples or in a DataError."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_tokenizer import TOOL_CHATML, toy_tokenizer

from flexllm_vllm.data import DataError, ExampleTokenizer, check_file
from flexllm_vllm.data.records import (
    ChatRecord,
    CompletionRecord,
    PreferenceRecord,
    Record,
    parse_record,
)

fuzz = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# Text as files hold it; NUL is refused, and tested elsewhere.
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
filled = texts.filter(bool)
# Also what is no text: halves of surrogate pairs, NUL.
any_text = st.text(max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(any_text, inner, max_size=4),
    max_leaves=8,
)


@st.composite
def tool_turns(draw: st.DrawFn) -> list[dict[str, Any]]:
    """An assistant's calls, and their results in order."""
    ids = draw(st.lists(filled, min_size=1, max_size=3, unique=True))
    arguments = st.dictionaries(texts, texts | st.integers(-9, 9), max_size=3)
    calls = [
        {
            "id": i,
            "type": "function",
            "function": {"name": draw(filled), "arguments": json.dumps(draw(arguments))},
        }
        for i in ids
    ]
    results = [{"role": "tool", "tool_call_id": i, "content": draw(texts)} for i in ids]
    content = draw(st.none() | texts)
    return [{"role": "assistant", "content": content, "tool_calls": calls}, *results]


def plain(*roles: str) -> st.SearchStrategy[list[dict[str, Any]]]:
    content = texts | st.lists(
        st.fixed_dictionaries({"type": st.just("text"), "text": texts}), max_size=3
    )
    message = st.fixed_dictionaries(
        {"role": st.sampled_from(roles), "content": content}, optional={"name": filled}
    )
    return message.map(lambda m: [m])


conversations = st.lists(
    plain("system", "developer", "user", "assistant") | tool_turns(), max_size=4
).map(lambda turns: [message for turn in turns for message in turn])
answers = plain("assistant").map(lambda messages: messages[0])
tools = st.lists(
    st.fixed_dictionaries(
        {
            "type": st.just("function"),
            "function": st.fixed_dictionaries(
                {"name": filled},
                optional={
                    "description": st.none() | texts,
                    "parameters": st.dictionaries(texts, texts, max_size=2),
                    "strict": st.none() | st.booleans(),
                },
            ),
        }
    ),
    max_size=3,
    unique_by=lambda tool: tool["function"]["name"],
)
options = {"tools": tools, "parallel_tool_calls": st.none() | st.just(True)}
chats = st.builds(
    lambda messages, answer, weight, more: {
        "messages": [*messages, {**answer, "weight": weight}],
        **more,
    },
    conversations, answers, st.integers(0, 1), st.fixed_dictionaries({}, optional=options),
)  # fmt: skip
completions = st.fixed_dictionaries({"prompt": texts, "completion": filled})
preferences = st.builds(
    lambda messages, question, preferred, more: {
        "input": {"messages": [*messages, *question], **more},
        "preferred_output": [preferred],
        "non_preferred_output": [{"role": "assistant", "content": "something else than that"}],
    },
    conversations, plain("user"), answers, st.fixed_dictionaries({}, optional=options),
)  # fmt: skip
examples = chats | completions | preferences


def refusal(read: Callable[[], object]) -> DataError | None:
    """What reading ends with; any other exception fails the test."""
    try:
        read()
    except DataError as error:
        return error
    return None


def content_of(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content)
    return content or ""


def said(record: Record) -> Any:
    """What a record says, in the file's own terms."""
    if isinstance(record, CompletionRecord):
        return {"prompt": record.prompt, "completion": record.completion}
    parts = [record.messages]
    if isinstance(record, PreferenceRecord):
        parts += [record.preferred, record.non_preferred]
    messages = [
        [
            (
                m.role,
                m.content,
                m.name,
                m.tool_call_id,
                [(c.id, c.name, c.arguments) for c in m.tool_calls],
            )
            for m in part
        ]
        for part in parts
    ]
    return messages, [
        {k: v for k, v in t["function"].items() if v is not None} for t in record.tools
    ]


def expected(value: dict[str, Any]) -> Any:
    if "prompt" in value:
        return value
    source = value.get("input", value)
    parts = [source["messages"]]
    if "input" in value:
        parts += [value["preferred_output"], value["non_preferred_output"]]
    messages = [
        [
            (
                m["role"],
                content_of(m),
                m.get("name"),
                m.get("tool_call_id"),
                [
                    (c["id"], c["function"]["name"], json.loads(c["function"]["arguments"]))
                    for c in m.get("tool_calls") or []
                ],
            )
            for m in part
        ]
        for part in parts
    ]
    return messages, [
        {k: v for k, v in t["function"].items() if v is not None} for t in source.get("tools", [])
    ]


@given(value=examples, ascii_only=st.booleans())
@settings(fuzz, max_examples=150)
def test_valid_examples_survive(value: dict[str, Any], ascii_only: bool) -> None:
    record = parse_record(1, json.dumps(value, ensure_ascii=ascii_only).encode())
    assert said(record) == expected(value)
    if isinstance(record, ChatRecord):
        assert record.messages[-1].weight == value["messages"][-1]["weight"]


@given(value=examples)
@settings(fuzz, max_examples=300)
def test_valid_examples_are_tokenized_or_refused_by_the_template(value: dict[str, Any]) -> None:
    record = parse_record(1, json.dumps(value).encode())
    tokenizer = ExampleTokenizer(toy_tokenizer(TOOL_CHATML))

    def encode() -> None:
        if isinstance(record, PreferenceRecord):
            sides = list(tokenizer.encode_pair(1, record))
        else:
            sides = [tokenizer.encode(1, record)]
        for input_ids, mask in sides:
            assert len(input_ids) == len(mask)
            assert set(mask) <= {0, 1}
            assert mask[0] == 0

    error = refusal(encode)
    if error is not None:
        assert error.line == 1
        str(error).encode()  # it can be sent to the user


@st.composite
def damaged(draw: st.DrawFn) -> Any:
    """A valid example in which one value, name or item is another, twice, or missing."""
    value = copy.deepcopy(draw(examples))
    at: Any = value
    while True:
        key = draw(st.sampled_from(list(at) if isinstance(at, dict) else range(len(at))))
        inner = at[key]
        if isinstance(inner, dict | list) and inner and draw(st.integers(0, 4)):
            at = inner
            continue
        action = draw(st.sampled_from(["replace", "remove", "add"]))
        if action == "replace":
            at[key] = draw(json_values)
        elif action == "remove":
            del at[key]
        elif isinstance(at, dict):
            at[draw(any_text)] = draw(json_values)
        else:
            at.insert(key, draw(json_values | st.just(inner)))
        return value


def parses_or_is_refused(raw: bytes) -> None:
    error = refusal(lambda: parse_record(1, raw))
    if error is not None:
        assert error.line == 1
        str(error).encode()  # it can be sent to the user
        assert len(str(error)) < 1000


@given(value=damaged(), ascii_only=st.booleans())
@settings(fuzz, max_examples=1000)
def test_damaged_examples_are_refused_by_name(value: Any, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    parses_or_is_refused(text.encode("utf-8", "surrogatepass"))


@given(value=examples, start=st.integers(0), length=st.integers(0, 8), put=st.binary(max_size=8))
@settings(fuzz, max_examples=300)
def test_damaged_bytes_are_refused(
    value: dict[str, Any], start: int, length: int, put: bytes
) -> None:
    raw = json.dumps(value).encode()
    start %= len(raw)
    parses_or_is_refused(raw[:start] + put + raw[start + length :])


@given(st.binary(max_size=200) | st.lists(examples.map(json.dumps)).map("\n".join).map(str.encode))
@settings(fuzz, max_examples=100)
def test_any_file_is_read_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    error = refusal(lambda: check_file(path))
    if error is not None:
        assert error.line is None or 1 <= error.line <= content.count(b"\n") + 1


@pytest.mark.parametrize("text", ["{" * 3000, '{"a":' * 3000, "[[" * 90_000, '"' + "\\" * 3000])
def test_repeated_openings_are_refused(text: str) -> None:
    parses_or_is_refused(text.encode())
