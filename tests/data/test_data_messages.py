"""OpenAI's chat data with tools: what is read, and what is refused where."""

import json
from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionToolsParam

from flexllm_vllm.data.errors import DataError
from flexllm_vllm.data.messages import ToolCall
from flexllm_vllm.data.records import ChatRecord, parse_record

USER = {"role": "user", "content": "Weather in Oslo?"}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"n": 1}'}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "rain"}
ANSWER = {"role": "assistant", "content": "It rains."}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather now.",
        "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}},
        "strict": True,
    },
}
FULL = {
    "messages": [USER, CALLING, RESULT, ANSWER],
    "tools": [TOOL],
    "parallel_tool_calls": True,
}


def parse(value: Any) -> ChatRecord:
    record = parse_record(3, json.dumps(value).encode())
    assert isinstance(record, ChatRecord)
    return record


def call(**fields: Any) -> dict[str, Any]:
    return {**CALLING, "tool_calls": [{**CALL, **fields}]}


def function(**fields: Any) -> dict[str, Any]:
    return call(function={**CALL["function"], **fields})  # type: ignore[dict-item]


def test_a_conversation_with_tools_is_read() -> None:
    record = parse(FULL)
    assert [m.role for m in record.messages] == ["user", "assistant", "tool", "assistant"]
    assert record.messages[1].tool_calls == (ToolCall("c1", "weather", {"n": 1}),)
    assert record.messages[2].tool_call_id == "c1"
    assert [m.weight for m in record.messages] == [0, 1, 0, 1]


def test_the_last_message_may_be_a_call() -> None:
    assert parse({"messages": [USER, CALLING], "tools": []}).messages[1].content == ""


def test_the_template_gets_a_message_as_from_a_request() -> None:
    assert parse(FULL).messages[1].as_template_input() == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{**CALL, "function": {"name": "weather", "arguments": {"n": 1}}}],
    }
    assert parse(FULL).messages[2].as_template_input() == RESULT


@pytest.mark.parametrize(
    "function",
    [
        TOOL["function"],
        {"name": "weather"},
        {"parameters": {}, "name": "weather", "strict": None},
        {"name": "weather", "description": "x", "strict": False},
    ],
)
def test_the_template_gets_tools_as_from_a_request(function: dict[str, Any]) -> None:
    tool = {"type": "function", "function": function}
    (parsed,) = parse({**FULL, "tools": [tool]}).tools
    served = ChatCompletionToolsParam.model_validate(tool).model_dump()
    assert json.dumps(parsed) == json.dumps(served)  # the order of the fields too


@pytest.mark.parametrize(
    ("value", "field", "reason"),
    [
        ({**FULL, "functions": []}, "functions", "deprecated by OpenAI: write tools"),
        ({**FULL, "function_call": "auto"}, "function_call", "deprecated by OpenAI: write tool_c"),
        ({**FULL, "tools": {}}, "tools", "must be a list"),
        ({**FULL, "tools": ["weather"]}, "tools[0]", "expected an object, got a string"),
        ({**FULL, "tools": [TOOL["function"]]}, "tools[0].name", "not supported"),
        ({**FULL, "tools": [{**TOOL, "type": "x"}]}, "tools[0].type", "expected 'function'"),
        ({**FULL, "tools": [{"type": "function"}]}, "tools[0].function", "got nothing"),
        ({**FULL, "tools": [TOOL, TOOL]}, "tools[1].function.name", "two tools"),
        ({**FULL, "tools": [TOOL] * 129}, "tools", "at most 128"),
        ({**FULL, "parallel_tool_calls": 1}, "parallel_tool_calls", "expected a boolean"),
        ({"messages": [USER, {**ANSWER, "name": ""}]}, "messages[1].name", "not be empty"),
        ({"messages": [USER, {**ANSWER, "refusal": "x"}]}, "messages[1].refusal", "either"),
        ({"messages": [USER, {**ANSWER, "refusal": 1}]}, "messages[1].refusal", "either"),
        ({"messages": [USER, {**ANSWER, "audio": {}}]}, "messages[1].audio", "not supported"),
        (
            {"messages": [USER, {**ANSWER, "function_call": {}}]},
            "messages[1].function_call",
            "deprecated by OpenAI: write tool_calls",
        ),
        (
            {"messages": [USER, {"role": "function", "name": "f", "content": ""}, ANSWER]},
            "messages[1].role",
            "write a 'tool' message",
        ),
        (
            {"messages": [USER, {**ANSWER, "tool_calls": []}]},
            "messages[1].tool_calls",
            "at least one",
        ),
        (
            {"messages": [{**USER, "tool_calls": [CALL]}, ANSWER]},
            "messages[0].tool_calls",
            "not supported",
        ),
        ({"messages": [USER, call(id="")]}, "messages[1].tool_calls[0].id", "not be empty"),
        ({"messages": [USER, call(type=None)]}, "messages[1].tool_calls[0].type", "'function'"),
        ({"messages": [USER, call(index=0)]}, "messages[1].tool_calls[0].index", "not supported"),
        (
            {"messages": [USER, function(name=None)]},
            "messages[1].tool_calls[0].function.name",
            "expected a string",
        ),
        (
            {"messages": [USER, function(arguments={"n": 1})]},
            "messages[1].tool_calls[0].function.arguments",
            "expected a string, got an object",
        ),
        (
            {"messages": [USER, function(arguments="{n: 1}")]},
            "messages[1].tool_calls[0].function.arguments",
            "not valid JSON",
        ),
        (
            {"messages": [USER, function(arguments="[1]")]},
            "messages[1].tool_calls[0].function.arguments",
            "expected an object, got a list",
        ),
        (
            {"messages": [USER, function(arguments='{"n": "\\u0000"}')]},
            "messages[1].tool_calls[0].function.arguments.n",
            "NUL",
        ),
        (
            {"messages": [USER, {**CALLING, "tool_calls": [CALL, CALL]}]},
            "messages[1].tool_calls[1].id",
            "two calls",
        ),
        (
            {
                "messages": [USER, {**CALLING, "tool_calls": [CALL, {**CALL, "id": "c2"}]}],
                "parallel_tool_calls": False,
            },
            "messages[1].tool_calls",
            "2 calls, but parallel_tool_calls is false",
        ),
        ({"messages": [USER, RESULT, ANSWER]}, "messages[1].tool_call_id", "no open call"),
        (
            {"messages": [USER, CALLING, RESULT, RESULT, ANSWER]},
            "messages[3].tool_call_id",
            "no open call",
        ),
        (
            {"messages": [USER, CALLING, {**RESULT, "tool_call_id": "c2"}, ANSWER]},
            "messages[2].tool_call_id",
            "got 'c2'",
        ),
        (
            {"messages": [USER, CALLING, {**RESULT, "tool_call_id": None}, ANSWER]},
            "messages[2].tool_call_id",
            "expected a string",
        ),
        (
            {"messages": [USER, CALLING, {**RESULT, "content": None}, ANSWER]},
            "messages[2].content",
            "expected a string",
        ),
    ],
)
def test_what_is_wrong_is_named(value: Any, field: str, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        parse(value)
    assert (caught.value.line, caught.value.field) == (3, field)
    assert reason in caught.value.reason
