"""Chat messages and tools as OpenAI documents them, and as chat templates expect them."""

from dataclasses import dataclass
from typing import Any

from flexllm_vllm.data import fields
from flexllm_vllm.data.errors import DataError
from flexllm_vllm.data.jsonl import parse_object

ROLES = ("system", "developer", "user", "assistant", "tool")
# Finding the answers renders a conversation once for each of them.
MAX_MESSAGES = 1024
MAX_TOOLS = 128

_FIELDS = {"role", "content", "name"}
_FIELDS_OF = {
    "assistant": _FIELDS | {"weight", "tool_calls", "refusal"},
    "tool": _FIELDS | {"tool_call_id"},
}
# Fields of OpenAI's responses that carry nothing while they are null.
_EMPTY_FIELDS = {"audio", "function_call", "refusal", "tool_calls", "name"}
_DEPRECATED = {
    "functions": "deprecated by OpenAI: write tools: [{'type': 'function', 'function': ...}]",
    "function_call": "deprecated by OpenAI: write tool_calls: [{'id': ..., 'type': 'function', "
    "'function': ...}]",
}


@dataclass(frozen=True)
class ToolCall:
    """A function that the assistant calls. ``arguments`` is the parsed JSON object."""

    id: str
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class ChatMessage:
    """One message.

    Attributes:
        content: text; empty where an assistant only calls tools.
        weight: 1 where the message carries loss (assistant messages only).
        tool_call_id: of a tool message, the call that it answers.
    """

    role: str
    content: str
    weight: int
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None

    def as_template_input(self) -> dict[str, Any]:
        """What vLLM gives the chat template for the same message in a request."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in self.tool_calls
            ]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            message["name"] = self.name
        return message


Tool = dict[str, Any]


def parse_messages(line: int, place: str, value: Any) -> tuple[ChatMessage, ...]:
    """Parse a list of messages. Whether tool messages answer calls is not checked here.

    Raises:
        DataError: names the line and the field.
    """
    items = fields.filled_list(line, place, value, "message", MAX_MESSAGES)
    return tuple(_message(line, f"{place}[{i}]", item) for i, item in enumerate(items))


def parse_tools(line: int, place: str, value: Any) -> tuple[Tool, ...]:
    """Parse a list of tools into what vLLM gives the chat template for the same tools.

    None and an empty list are no tools.

    Raises:
        DataError: names the line and the field.
    """
    if value is None or value == []:
        return ()
    items = fields.filled_list(line, place, value, "tool", MAX_TOOLS)
    tools = tuple(_tool(line, f"{place}[{i}]", item) for i, item in enumerate(items))
    names: set[str] = set()
    for i, tool in enumerate(tools):
        name = tool["function"]["name"]
        if name in names:
            reason = f"two tools have the name {fields.show(name)}"
            raise DataError(line, f"{place}[{i}].function.name", reason)
        names.add(name)
    return tools


def check_parallel_tool_calls(
    line: int, place: str, value: Any, messages: tuple[ChatMessage, ...], places: list[str]
) -> None:
    """Raises:
    DataError: the value is no boolean, or false and a message calls several tools.
    """
    if value is None or value is True:
        return
    if value is not False:
        raise DataError(line, place, f"expected a boolean, got {fields.kind(value)}")
    for message, where in zip(messages, places, strict=True):
        if len(message.tool_calls) > 1:
            reason = f"{len(message.tool_calls)} calls, but parallel_tool_calls is false"
            raise DataError(line, f"{where}.tool_calls", reason)


def check_tool_results(line: int, messages: tuple[ChatMessage, ...], places: list[str]) -> None:
    """Raises:
    DataError: a tool message answers no call of the assistant message before it.
    """
    unanswered: set[str] = set()
    for message, place in zip(messages, places, strict=True):
        if message.role != "tool":
            unanswered = {call.id for call in message.tool_calls}
        elif message.tool_call_id in unanswered:
            unanswered.remove(message.tool_call_id)
        else:
            raise DataError(
                line,
                f"{place}.tool_call_id",
                f"answers no open call of the assistant message before it, got "
                f"{fields.show(message.tool_call_id)}",
            )


def refuse_deprecated(line: int, prefix: str, value: dict[str, Any]) -> None:
    """Raises:
    DataError: the value has ``functions`` or ``function_call``.
    """
    for name, reason in _DEPRECATED.items():
        if value.get(name) is not None:
            raise DataError(line, prefix + name, reason)


def _message(line: int, place: str, value: Any) -> ChatMessage:
    message = fields.json_object(line, place, value)
    role = message.get("role")
    if role == "function":
        reason = "'function' is deprecated by OpenAI: write a 'tool' message with a tool_call_id"
        raise DataError(line, f"{place}.role", reason)
    if role not in ROLES:
        expected = ", ".join(ROLES)
        reason = f"expected one of {expected}, got {fields.show(role)}"
        raise DataError(line, f"{place}.role", reason)
    refuse_deprecated(line, f"{place}.", message)
    present = {k: v for k, v in message.items() if v is not None or k not in _EMPTY_FIELDS}
    fields.refuse_other_fields(line, f"{place}.", present, _FIELDS_OF.get(role, _FIELDS))
    name = None
    if "name" in present:
        name = fields.required_text(line, f"{place}.name", present["name"])
    if role == "assistant":
        return _assistant_message(line, place, present, name)
    content = _content(line, f"{place}.content", message.get("content"))
    if role != "tool":
        return ChatMessage(role, content, 0, name)
    call_id = fields.required_text(line, f"{place}.tool_call_id", message.get("tool_call_id"))
    return ChatMessage(role, content, 0, name, tool_call_id=call_id)


def _assistant_message(
    line: int, place: str, message: dict[str, Any], name: str | None
) -> ChatMessage:
    weight = message.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise DataError(line, f"{place}.weight", f"must be 0 or 1, got {fields.show(weight)}")
    calls: tuple[ToolCall, ...] = ()
    if "tool_calls" in message:
        calls = _tool_calls(line, f"{place}.tool_calls", message["tool_calls"])
    content = message.get("content")
    if "refusal" in message:
        # Models here have one channel: what they would refuse with is what they say.
        if content:
            reason = "give either content or a refusal: the model can say only one of them"
            raise DataError(line, f"{place}.refusal", reason)
        said = fields.required_text(line, f"{place}.refusal", message["refusal"])
    elif content is None and calls:
        said = ""
    else:
        said = _content(line, f"{place}.content", content, ("text", "refusal"))
    return ChatMessage("assistant", said, int(weight), name, calls)


def _content(line: int, place: str, value: Any, kinds: tuple[str, ...] = ("text",)) -> str:
    """A string, or OpenAI's list of text parts, joined as vLLM joins those of a request."""
    if not isinstance(value, list):
        return fields.text(line, place, value)
    texts = []
    for i, part in enumerate(value):
        where = f"{place}[{i}]"
        got = part.get("type") if isinstance(part, dict) else None
        if got not in kinds:
            what = fields.show(got) if isinstance(part, dict) else fields.kind(part)
            raise DataError(line, where, f"only parts of type 'text' are supported, got {what}")
        fields.refuse_other_fields(line, f"{where}.", part, {"type", got})
        texts.append(fields.text(line, f"{where}.{got}", part.get(got)))
    return "\n".join(texts)


def _tool_calls(line: int, place: str, value: Any) -> tuple[ToolCall, ...]:
    items = fields.filled_list(line, place, value, "tool call", MAX_TOOLS)
    calls = tuple(_tool_call(line, f"{place}[{i}]", item) for i, item in enumerate(items))
    for i, call in enumerate(calls):
        if any(call.id == other.id for other in calls[:i]):
            reason = f"two calls of the message have the id {fields.show(call.id)}"
            raise DataError(line, f"{place}[{i}].id", reason)
    return calls


def _tool_call(line: int, place: str, value: Any) -> ToolCall:
    call = fields.json_object(line, place, value)
    fields.refuse_other_fields(line, f"{place}.", call, {"id", "type", "function"})
    _check_type(line, place, call)
    function = fields.json_object(line, f"{place}.function", call.get("function"))
    where = f"{place}.function"
    fields.refuse_other_fields(line, f"{where}.", function, {"name", "arguments"})
    arguments = fields.text(line, f"{where}.arguments", function.get("arguments"))
    return ToolCall(
        fields.required_text(line, f"{place}.id", call.get("id")),
        fields.required_text(line, f"{where}.name", function.get("name")),
        parse_object(line, f"{where}.arguments", arguments),
    )


def _tool(line: int, place: str, value: Any) -> Tool:
    tool = fields.json_object(line, place, value)
    fields.refuse_other_fields(line, f"{place}.", tool, {"type", "function"})
    _check_type(line, place, tool)
    where = f"{place}.function"
    function = fields.json_object(line, where, tool.get("function"))
    known = {"name", "description", "parameters", "strict"}
    fields.refuse_other_fields(line, f"{where}.", function, known)
    description, parameters = function.get("description"), function.get("parameters")
    strict = function.get("strict")
    if description is not None:
        fields.text(line, f"{where}.description", description)
    if parameters is not None:
        fields.json_object(line, f"{where}.parameters", parameters)
    if strict is not None and not isinstance(strict, bool):
        reason = f"expected a boolean, got {fields.kind(strict)}"
        raise DataError(line, f"{where}.strict", reason)
    # As vLLM's ChatCompletionToolsParam: absent is None, except for strict.
    definition = {
        "name": fields.required_text(line, f"{where}.name", function.get("name")),
        "description": description,
        "parameters": parameters,
    }
    if strict is not None:
        definition["strict"] = strict
    return {"type": "function", "function": definition}


def _check_type(line: int, place: str, value: dict[str, Any]) -> None:
    if value.get("type") != "function":
        reason = f"expected 'function', got {fields.show(value.get('type'))}"
        raise DataError(line, f"{place}.type", reason)
