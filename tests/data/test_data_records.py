import json
from pathlib import Path

import pytest

from flexllm_vllm.data.errors import DataError
from flexllm_vllm.data.records import (
    ChatRecord,
    CompletionRecord,
    Method,
    check_file,
    parse_record,
)

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}


def test_both_formats_are_read(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    lines = [
        json.dumps({"messages": [USER, ANSWER]}),
        "",
        json.dumps({"prompt": "", "completion": "x"}),
    ]
    path.write_text("\ufeff" + "\n".join(lines) + "\n")
    assert check_file(path) == 2


def test_messages_have_roles_text_parts_and_weights() -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "b")]}
    messages = [{"role": "developer", "content": "d"}, parts, {**ANSWER, "weight": 0}, USER, ANSWER]
    record = parse_record(1, json.dumps({"messages": messages}).encode())
    assert isinstance(record, ChatRecord)
    assert [m.weight for m in record.messages] == [0, 0, 0, 0, 1]
    assert record.messages[1].content == "a\nb"


def test_prompt_and_completion_are_read() -> None:
    record = parse_record(1, b'{"prompt": "2+2=", "completion": " 4"}')
    assert record == CompletionRecord("2+2=", " 4")


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ('{"messages": [', None),
        ("[1]", None),
        ("{}", None),
        ("\xff\xfe", None),
        (json.dumps({"x" * 10_000: 1, "messages": [ANSWER]}), f"{'x' * 37}..."),
        ('{"messages": []}', "messages"),
        ('{"messages": "Hi"}', "messages"),
        (json.dumps({"messages": [USER]}), "messages[0].role"),
        (json.dumps({"messages": [ANSWER], "user": "me"}), "user"),
        (json.dumps({"messages": [{"role": "critic", "content": ""}]}), "messages[0].role"),
        (json.dumps({"messages": [ANSWER] * 1025}), "messages"),
        (json.dumps({"messages": [{"role": ["user"], "content": ""}]}), "messages[0].role"),
        (json.dumps({"messages": ["Hi"]}), "messages[0]"),
        (
            json.dumps({"messages": [USER, {**ANSWER, "tool_calls": []}]}),
            "messages[1].tool_calls",
        ),
        (json.dumps({"messages": [{**USER, "weight": 1}, ANSWER]}), "messages[0].weight"),
        (json.dumps({"messages": [{**ANSWER, "weight": 2}]}), "messages[0].weight"),
        (json.dumps({"messages": [{**ANSWER, "weight": True}]}), "messages[0].weight"),
        (json.dumps({"messages": [{"role": "assistant"}]}), "messages[0].content"),
        (
            json.dumps({"messages": [{**USER, "content": [{"type": "image_url"}]}, ANSWER]}),
            "messages[0].content[0]",
        ),
        ('{"messages": [{"role": "assistant", "content": "\\ud800"}]}', "messages[0].content"),
        ('{"prompt": "a"}', "completion"),
        ('{"prompt": 1, "completion": "b"}', "prompt"),
        ('{"prompt": "a", "completion": ""}', "completion"),
        ('{"prompt": "a", "completion": "b", "label": 1}', "label"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, field: str | None) -> None:
    path = tmp_path / "bad.jsonl"
    good = json.dumps({"prompt": "a", "completion": "b"})
    path.write_bytes(f"{good}\n\n".encode() + line.encode("latin-1"))
    with pytest.raises(DataError) as caught:
        check_file(path)
    assert caught.value.line == 3
    assert caught.value.field == field
    assert "line 3" in str(caught.value)


def test_null_is_the_same_as_absent_in_fields_of_openai_responses() -> None:
    nulls = dict.fromkeys(("refusal", "tool_calls", "function_call", "audio", "name"))
    value = {"messages": [USER, {**ANSWER, **nulls}], "tools": None, "functions": None}
    assert parse_record(1, json.dumps(value).encode()) == parse_record(
        1, json.dumps({"messages": [USER, ANSWER]}).encode()
    )


@pytest.mark.parametrize(
    "answer",
    [
        {"role": "assistant", "refusal": "I cannot."},
        {"role": "assistant", "content": None, "refusal": "I cannot."},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "I cannot."}]},
    ],
)
def test_a_refusal_is_what_the_assistant_says(answer: dict[str, object]) -> None:
    record = parse_record(1, json.dumps({"messages": [USER, answer]}).encode())
    assert isinstance(record, ChatRecord)
    assert (record.messages[1].content, record.messages[1].weight) == ("I cannot.", 1)


PREFERENCE = {
    "input": {"messages": [USER]},
    "preferred_output": [ANSWER],
    "non_preferred_output": [{**ANSWER, "content": "Go away"}],
}
PROMPT = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("lines", "method", "message"),
    [
        ([PREFERENCE], None, None),
        ([PREFERENCE], "dpo", None),
        ([PROMPT, {"messages": [ANSWER]}], "supervised", None),
        ([PREFERENCE], "supervised", "line 1: this example is for the method 'dpo'"),
        ([PREFERENCE], "supervised", "the job's method is 'supervised'"),
        ([PROMPT], "dpo", "line 1: this example is for the method 'supervised'"),
        ([PROMPT, PROMPT, PREFERENCE], None, "line 3: this example is for the method 'dpo'"),
        ([PREFERENCE, PROMPT], None, "the method of the lines before is 'dpo'"),
    ],
)
def test_a_file_is_for_one_method(
    tmp_path: Path, lines: list[object], method: Method | None, message: str | None
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    if message is None:
        assert check_file(path, method) == len(lines)
    else:
        with pytest.raises(DataError, match=message):
            check_file(path, method)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="empty"):
        check_file(path)
