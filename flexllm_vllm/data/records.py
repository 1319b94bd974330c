"""The three JSONL formats: OpenAI's chat and preference data, and prompt/completion pairs.

One line is one example:

``{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}``

``{"prompt": "...", "completion": "..."}``

``{"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}``

The first two are for the method ``supervised`` and may be mixed; the last is for ``dpo``. Whatever
the trainer would not use is refused rather than dropped: a model trained on less than the file
says is worse than an error.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

from flexllm_vllm.data import fields
from flexllm_vllm.data.errors import DataError
from flexllm_vllm.data.jsonl import parse_line, read_lines
from flexllm_vllm.data.messages import (
    ChatMessage,
    Tool,
    check_parallel_tool_calls,
    check_tool_results,
    parse_messages,
    parse_tools,
    refuse_deprecated,
)

Method = Literal["supervised", "dpo"]

_KINDS: dict[Method, str] = {
    "supervised": "'messages' or 'prompt' and 'completion'",
    "dpo": "'input', 'preferred_output' and 'non_preferred_output'",
}


@dataclass(frozen=True)
class ChatRecord:
    """A conversation that ends with an assistant message, and the tools that it could call."""

    messages: tuple[ChatMessage, ...]
    tools: tuple[Tool, ...] = ()


@dataclass(frozen=True)
class CompletionRecord:
    """A prompt and the text that shall follow it."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class PreferenceRecord:
    """A conversation and two ways to go on, each an assistant's turn with what its tools answered.

    Both begin and end with an assistant message.
    """

    messages: tuple[ChatMessage, ...]
    preferred: tuple[ChatMessage, ...]
    non_preferred: tuple[ChatMessage, ...]
    tools: tuple[Tool, ...] = ()


SupervisedRecord = ChatRecord | CompletionRecord
Record = SupervisedRecord | PreferenceRecord


@overload
def read_records(
    path: Path, method: Literal["supervised"], max_examples: int | None = None
) -> Iterator[tuple[int, SupervisedRecord]]: ...
@overload
def read_records(
    path: Path, method: Literal["dpo"], max_examples: int | None = None
) -> Iterator[tuple[int, PreferenceRecord]]: ...
@overload
def read_records(
    path: Path, method: Method | None = None, max_examples: int | None = None
) -> Iterator[tuple[int, Record]]: ...
def read_records(
    path: Path, method: Method | None = None, max_examples: int | None = None
) -> Iterator[tuple[int, Any]]:
    """Yield ``(line number, record)`` for every line that is not blank.

    Args:
        path: the file; one line of it is in memory at a time.
        method: what the examples are for; None takes that of the first for the whole file.
        max_examples: the most examples that the file may have.

    Raises:
        DataError: at the first line that is not a valid example, is one for another method, or is
            one too many.
    """
    expected = method
    for number, (line, raw) in enumerate(read_lines(path), start=1):
        if max_examples is not None and number > max_examples:
            raise DataError(line, None, f"more than {max_examples} examples, the limit of a file")
        record = parse_record(line, raw)
        found = method_of(record)
        expected = expected or found
        if found != expected:
            whose = "the job's method" if method else "the method of the lines before"
            reason = (
                f"this example is for the method '{found}' ({_KINDS[found]}); {whose} is "
                f"'{expected}', which learns from {_KINDS[expected]}"
            )
            raise DataError(line, None, reason)
        yield line, record


def check_file(path: Path, method: Method | None = None, max_examples: int | None = None) -> int:
    """Check every line of a file and return the number of examples.

    Raises:
        DataError: see :func:`read_records`; or the file has no example.
    """
    count = sum(1 for _ in read_records(path, method, max_examples))
    if count == 0:
        raise DataError(None, None, "the file is empty: it must hold at least one example")
    return count


def method_of(record: Record) -> Method:
    """The method that learns from a record."""
    return "dpo" if isinstance(record, PreferenceRecord) else "supervised"


def parse_record(line: int, raw: bytes) -> Record:
    """Parse one line of JSON.

    Raises:
        DataError: names the line and the field.
    """
    record = parse_line(line, raw)
    if "messages" in record:
        return _chat_record(line, record)
    if "prompt" in record or "completion" in record:
        return _completion_record(line, record)
    if {"input", "preferred_output", "non_preferred_output"} & set(record):
        return _preference_record(line, record)
    reason = f"expected the fields {_KINDS['supervised']}, or {_KINDS['dpo']}"
    raise DataError(line, None, reason)


def _completion_record(line: int, record: dict[str, Any]) -> CompletionRecord:
    fields.refuse_other_fields(line, "", record, {"prompt", "completion"})
    prompt = fields.text(line, "prompt", record.get("prompt"))
    completion = fields.text(line, "completion", record.get("completion"))
    if not completion:
        raise DataError(line, "completion", "must not be empty: there is nothing to learn")
    return CompletionRecord(prompt, completion)


def _chat_record(line: int, record: dict[str, Any]) -> ChatRecord:
    messages, tools = _conversation(line, "", record)
    if messages[-1].role != "assistant":
        place = f"messages[{len(messages) - 1}].role"
        reason = f"the last message must be the assistant's, got '{messages[-1].role}'"
        raise DataError(line, place, reason)
    return ChatRecord(messages, tools)


def _preference_record(line: int, record: dict[str, Any]) -> PreferenceRecord:
    fields.refuse_other_fields(line, "", record, set(PREFERENCE_FIELDS))
    source = fields.json_object(line, "input", record.get("input"))
    if "messages" not in source:
        raise DataError(line, "input.messages", "expected a list of messages, got nothing")
    messages, tools = _conversation(line, "input.", source)
    _refuse_weights(line, "input.messages", source["messages"])
    outputs = []
    for field in PREFERENCE_FIELDS[1:]:
        output = parse_messages(line, field, record.get(field))
        _refuse_weights(line, field, record[field])
        _check_output(line, field, output)
        places = [*places_of("input.messages", messages), *places_of(field, output)]
        check_tool_results(line, messages + output, places)
        check_parallel_tool_calls(
            line, "input.parallel_tool_calls", source.get("parallel_tool_calls"),
            messages + output, places,
        )  # fmt: skip
        outputs.append(output)
    preferred, non_preferred = outputs
    if preferred == non_preferred:
        reason = "the same as preferred_output: there is nothing to prefer"
        raise DataError(line, "non_preferred_output", reason)
    return PreferenceRecord(messages, preferred, non_preferred, tools)


PREFERENCE_FIELDS = ("input", "preferred_output", "non_preferred_output")


def places_of(field: str, messages: tuple[ChatMessage, ...]) -> list[str]:
    """The paths of messages in their line: ``messages[0]``, ``messages[1]``..."""
    return [f"{field}[{i}]" for i in range(len(messages))]


def _conversation(
    line: int, prefix: str, value: dict[str, Any]
) -> tuple[tuple[ChatMessage, ...], tuple[Tool, ...]]:
    """``messages``, ``tools`` and ``parallel_tool_calls`` of an object."""
    refuse_deprecated(line, prefix, value)
    known = {"messages", "tools", "parallel_tool_calls"}
    deprecated = {"functions", "function_call"}  # null, or they were refused
    present = {name: item for name, item in value.items() if name not in deprecated}
    fields.refuse_other_fields(line, prefix, present, known)
    messages = parse_messages(line, f"{prefix}messages", value["messages"])
    places = places_of(f"{prefix}messages", messages)
    check_tool_results(line, messages, places)
    check_parallel_tool_calls(
        line, f"{prefix}parallel_tool_calls", value.get("parallel_tool_calls"), messages, places
    )
    return messages, parse_tools(line, f"{prefix}tools", value.get("tools"))


def _check_output(line: int, field: str, output: tuple[ChatMessage, ...]) -> None:
    for place, message in zip(places_of(field, output), output, strict=True):
        if message.role not in ("assistant", "tool"):
            reason = f"an output has assistant and tool messages only, got '{message.role}'"
            raise DataError(line, f"{place}.role", reason)
    for index in (0, len(output) - 1):
        if output[index].role != "assistant":
            reason = "an output must begin and end with an assistant message, got 'tool'"
            raise DataError(line, f"{field}[{index}].role", reason)


def _refuse_weights(line: int, field: str, messages: list[dict[str, Any]]) -> None:
    for index, message in enumerate(messages):
        if "weight" in message:
            reason = "preference data has no weights: both outputs are learnt from as a whole"
            raise DataError(line, f"{field}[{index}].weight", reason)
