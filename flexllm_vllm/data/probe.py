"""What a chat template can express, found out by rendering.

Templates pass over what they do not know: tools, names, the text beside a tool call. So a
conversation of the same shape is rendered with a marker of its own in place of each of its parts;
a part whose marker is missing from the text would be dropped.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from flexllm_vllm.data.conversation import Conversation
from flexllm_vllm.data.errors import DataError
from flexllm_vllm.data.messages import ChatMessage, Tool

Render = Callable[[Conversation], str]

_DOES_NOT_RENDER = "the model's chat template does not render"


@dataclass(frozen=True)
class _Mark:
    text: str
    place: str
    what: str


class _Marks:
    """Gives out markers, and keeps where each stands."""

    def __init__(self) -> None:
        self.all: list[_Mark] = []

    def new(self, place: str, what: str) -> str:
        text = f"flexllm0marker{len(self.all)}x"
        self.all.append(_Mark(text, place, what))
        return text


def check_expressible(render: Render, conversation: Conversation) -> None:
    """Raises:
    DataError: names the first part of the conversation that the template would drop.
    """
    marks = _Marks()
    tools = tuple(
        _mark_tool(marks, f"{conversation.tools_place}[{i}]", tool, conversation.tools_place)
        for i, tool in enumerate(conversation.tools)
    )
    redundant = _names_of_answered_calls(conversation)
    messages = tuple(
        _mark_message(marks, place, message, redundant[i])
        for i, (place, message) in enumerate(
            zip(conversation.places, conversation.messages, strict=True)
        )
    )
    text = render(replace(conversation, messages=messages, tools=tools))
    for mark in marks.all:
        if mark.text not in text:
            raise DataError(conversation.line, mark.place, f"{_DOES_NOT_RENDER} {mark.what}")
    _check_roles(render, conversation)
    _check_order_of_results(render, conversation)


def shape(conversation: Conversation) -> tuple[Any, ...]:
    """What the outcome of :func:`check_expressible` depends on, beside the template."""
    redundant = _names_of_answered_calls(conversation)
    messages = tuple(
        (
            message.role,
            bool(message.content.strip()),
            message.name is not None and message.name != redundant[i],
            tuple(bool(call.arguments) for call in message.tool_calls),
        )
        for i, message in enumerate(conversation.messages)
    )
    tools = tuple(
        (bool(tool["function"]["description"]), bool(_properties(tool)))
        for tool in conversation.tools
    )
    return messages, tools, _first_out_of_order(conversation)


def _mark_message(
    marks: _Marks, place: str, message: ChatMessage, redundant_name: str | None
) -> ChatMessage:
    content, name = message.content, message.name
    if name is not None and name != redundant_name:
        name = marks.new(f"{place}.name", "names of messages")
    calls = []
    for i, call in enumerate(message.tool_calls):
        where = f"{place}.tool_calls"
        call_name = marks.new(where, "tool calls" if i == 0 else "a second tool call")
        arguments = dict(call.arguments)
        if arguments:
            where = f"{where}[{i}].function.arguments"
            what = "the arguments of tool calls"
            arguments = {marks.new(where, what): marks.new(where, what)}
        calls.append(replace(call, name=call_name, arguments=arguments))
    if content.strip():
        what = f"the content of '{message.role}' messages here"
        if calls:
            what = "the text beside tool calls"
        content = marks.new(f"{place}.content", what)
    return replace(message, content=content, name=name, tool_calls=tuple(calls))


def _mark_tool(marks: _Marks, place: str, tool: Tool, all_tools: str) -> Tool:
    function = {**tool["function"], "name": marks.new(all_tools, "tools")}
    if function["description"]:
        where = f"{place}.function.description"
        function["description"] = marks.new(where, "the descriptions of tools")
    properties = _properties(tool)
    if properties:
        name = marks.new(f"{place}.function.parameters", "the parameters of tools")
        parameters = {**function["parameters"]}
        parameters["properties"] = {**properties, name: {"type": "string", "description": name}}
        function["parameters"] = parameters
    return {**tool, "function": function}


def _properties(tool: Tool) -> dict[str, Any] | None:
    properties = (tool["function"]["parameters"] or {}).get("properties")
    return properties if isinstance(properties, dict) else None


def _names_of_answered_calls(conversation: Conversation) -> list[str | None]:
    """Of each tool message, the function whose result it is: a ``name`` that repeats it is no
    loss where the template leaves it out."""
    names: dict[str | None, str] = {}
    answered: list[str | None] = []
    for message in conversation.messages:
        if message.role == "tool":
            answered.append(names.get(message.tool_call_id))
        else:
            names = {call.id: call.name for call in message.tool_calls}
            answered.append(None)
    return answered


def _check_roles(render: Render, conversation: Conversation) -> None:
    """A template may take every role that it does not know for another."""
    text: str | None = None
    for role in ("system", "developer", "tool"):
        of_role = [i for i, message in enumerate(conversation.messages) if message.role == role]
        if not of_role:
            continue
        text = render(conversation) if text is None else text
        for other in ("user", "assistant"):
            messages = tuple(
                replace(message, role=other, tool_call_id=None) if message.role == role else message
                for message in conversation.messages
            )
            try:
                same = render(replace(conversation, messages=messages)) == text
            except DataError:
                continue  # the template tells the roles apart so well that it refuses this one
            if same:
                reason = f"{_DOES_NOT_RENDER} the role '{role}' otherwise than '{other}'"
                place = f"{conversation.places[of_role[0]]}.role"
                raise DataError(conversation.line, place, reason)


def _check_order_of_results(render: Render, conversation: Conversation) -> None:
    """Results in another order than their calls can only be told apart by ids."""
    index = _first_out_of_order(conversation)
    if index is None:
        return
    message = conversation.messages[index]
    caller = max(i for i in range(index) if conversation.messages[i].role == "assistant")
    other = next(
        call.id
        for call in conversation.messages[caller].tool_calls
        if call.id != message.tool_call_id
    )
    changed = conversation.with_message(index, replace(message, tool_call_id=other))
    if render(changed) == render(conversation):
        reason = f"{_DOES_NOT_RENDER} ids of tool calls: give the results in the order of the calls"
        raise DataError(conversation.line, f"{conversation.places[index]}.tool_call_id", reason)


def _first_out_of_order(conversation: Conversation) -> int | None:
    """Index of the first tool message that is not the result of the next unanswered call."""
    expected: list[str] = []
    for index, message in enumerate(conversation.messages):
        if message.role != "tool":
            expected = [call.id for call in message.tool_calls]
        elif expected.pop(0) != message.tool_call_id:
            return index
    return None
