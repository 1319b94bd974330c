"""Tools, calls and names through chat templates that know them, and through those that do not."""

import json
from typing import Any

import pytest
from toy_tokenizer import CHATML, TOOL_CHATML, toy_tokenizer
from vllm.renderers.hf import _consolidate_system_messages, _convert_developer_to_system

from flexllm_vllm.data import DataError, ExampleTokenizer
from flexllm_vllm.data.records import ChatRecord, parse_record

SYSTEM = {"role": "system", "content": "Be brief."}
DEVELOPER = {"role": "developer", "content": "Say it twice."}
USER = {"role": "user", "content": "Weather in Oslo?"}
ANSWER = {"role": "assistant", "content": "It rains."}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather now.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def calls(*ids: str, **fields: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": '{"city":"Oslo"}'}
    tool_calls = [{"id": i, "type": "function", "function": function} for i in ids]
    return {"role": "assistant", "content": None, "tool_calls": tool_calls, **fields}


def result(call: str, **fields: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call, "content": "rain", **fields}


def chat(*messages: dict[str, Any], tools: Any = (TOOL,)) -> ChatRecord:
    value = {"messages": messages, "tools": list(tools)}
    record = parse_record(3, json.dumps(value).encode())
    assert isinstance(record, ChatRecord)
    return record


def learnt(template: str, record: ChatRecord) -> list[str]:
    """The runs of tokens that carry loss, as text."""
    tokenizer = toy_tokenizer(template)
    input_ids, mask = ExampleTokenizer(tokenizer).encode(3, record)
    runs: list[list[int]] = []
    for i, target in enumerate(mask):
        if target and not mask[i - 1]:
            runs.append([])
        if target:
            runs[-1].append(input_ids[i])
    return [tokenizer.decode(run) for run in runs]


def refused(template: str, record: ChatRecord) -> str:
    with pytest.raises(DataError) as caught:
        ExampleTokenizer(toy_tokenizer(template)).encode(3, record)
    return str(caught.value)


CALL_TEXT = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def test_calls_carry_loss_and_results_do_not() -> None:
    record = chat(USER, calls("a"), result("a"), ANSWER)
    assert learnt(TOOL_CHATML, record) == [f"{CALL_TEXT}<|im_end|>", "It rains.<|im_end|>"]


def test_a_call_of_weight_zero_carries_no_loss() -> None:
    record = chat(USER, calls("a", weight=0), result("a"), ANSWER)
    assert learnt(TOOL_CHATML, record) == ["It rains.<|im_end|>"]


def test_several_calls_and_the_text_before_them_are_one_answer() -> None:
    record = chat(USER, calls("a", "b", content="Wait."))
    assert learnt(TOOL_CHATML, record) == [f"Wait.\n{CALL_TEXT}\n{CALL_TEXT}<|im_end|>"]


def test_the_tokens_are_those_of_the_chat_template() -> None:
    tokenizer = toy_tokenizer(TOOL_CHATML)
    record = chat(SYSTEM, USER, calls("a"), result("a"), {**ANSWER, "name": "Ann"})
    input_ids, _ = ExampleTokenizer(tokenizer).encode(3, record)
    messages = [SYSTEM, USER, calls("a", content=""), result("a"), {**ANSWER, "name": "Ann"}]
    messages[2]["tool_calls"][0]["function"]["arguments"] = {"city": "Oslo"}
    expected = tokenizer.apply_chat_template(messages, tools=[TOOL], return_dict=True)
    assert input_ids == expected["input_ids"]
    assert "# Tools" in tokenizer.decode(input_ids)


def without(*texts: str) -> str:
    """The template with tools, less what it renders."""
    template = TOOL_CHATML
    for text in texts:
        assert text in template
        template = template.replace(text, "")
    return template


ONLY_NAMES = TOOL_CHATML.replace("{{ tool | tojson }}", "{{ tool.function.name }}")
NO_PARAMETERS = TOOL_CHATML.replace(
    "{{ tool | tojson }}", "{{ tool.function.name }}: {{ tool.function.description }}"
)
TOOL_AS_USER = TOOL_CHATML.replace("message.role == 'tool'", "false").replace(
    "<|im_start|>{{ message.role }}",
    "<|im_start|>{{ 'user' if message.role == 'tool' else message.role }}",
)
ONE_CALL = TOOL_CHATML.replace("message.tool_calls or []", "(message.tool_calls or [])[:1]")
NO_TEXT_BESIDE_CALLS = TOOL_CHATML.replace(
    "{{ message.content }}{% for", "{% if not message.tool_calls %}{{ message.content }}{% endif %}"
    "{% for",
)  # fmt: skip
NO_RESULT = without("{{ message.content }}\n</tool_response>")
TEXT_ONLY = {"tools": ()}


@pytest.mark.parametrize(
    ("template", "record", "field", "reason"),
    [
        (CHATML, chat(USER, ANSWER), "tools", "tools"),
        (
            ONLY_NAMES,
            chat(USER, ANSWER),
            "tools[0].function.description",
            "the descriptions of tools",
        ),
        (
            NO_PARAMETERS,
            chat(USER, ANSWER),
            "tools[0].function.parameters",
            "the parameters of tools",
        ),
        (CHATML, chat(USER, calls("a"), **TEXT_ONLY), "messages[1].tool_calls", "tool calls"),
        (ONE_CALL, chat(USER, calls("a", "b")), "messages[1].tool_calls", "a second tool call"),
        (
            without("{{ call.function.arguments | tojson }}"),
            chat(USER, calls("a")),
            "messages[1].tool_calls[0].function.arguments",
            "the arguments of tool calls",
        ),
        (
            NO_TEXT_BESIDE_CALLS,
            chat(USER, calls("a", content="Wait.")),
            "messages[1].content",
            "the text beside tool calls",
        ),
        (
            NO_RESULT,
            chat(USER, calls("a"), result("a"), ANSWER),
            "messages[2].content",
            "the content of 'tool' messages here",
        ),
        (
            TOOL_AS_USER,
            chat(USER, calls("a"), result("a"), ANSWER, **TEXT_ONLY),
            "messages[2].role",
            "the role 'tool' otherwise than 'user'",
        ),
        (
            CHATML,
            chat(USER, {**ANSWER, "name": "Ann"}, **TEXT_ONLY),
            "messages[1].name",
            "names of messages",
        ),
        (
            TOOL_CHATML,
            chat(USER, calls("a"), result("a", name="other"), ANSWER),
            "messages[2].name",
            "names of messages",
        ),
        (
            "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n"
            "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}",
            chat(SYSTEM, USER, ANSWER, **TEXT_ONLY),
            "messages[0].content",
            "the content of 'system' messages here",
        ),
        (
            "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'user' else 'bot' }}\n"
            "{{ m.content }}<|im_end|>\n{% endfor %}",
            chat(SYSTEM, USER, ANSWER, **TEXT_ONLY),
            "messages[0].role",
            "the role 'system' otherwise than 'assistant'",
        ),
    ],
)
def test_what_the_template_would_drop_is_refused(
    template: str, record: ChatRecord, field: str, reason: str
) -> None:
    expected = f"line 3, field '{field}': the model's chat template does not render {reason}"
    assert refused(template, record) == expected


def test_an_answer_that_the_template_shortens_is_refused() -> None:
    # As DeepSeek-R1's does, which shows no thinking.
    template = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
    record = chat(USER, {**ANSWER, "content": "<think>Rain?</think> It rains."}, **TEXT_ONLY)
    reason = "the model's chat template leaves out or changes a part of this answer"
    assert refused(template, record) == f"line 3, field 'messages[1].content': {reason}"


def test_an_answer_may_be_trimmed_and_set_off() -> None:
    template = CHATML.replace(
        "{{ message['content'] }}",
        "{{ message['content'].replace('</think>', '\\n</think>') | trim }}",
    )
    record = chat(USER, {**ANSWER, "content": "<think>Rain?</think> Yes. "}, **TEXT_ONLY)
    assert learnt(template, record) == ["<think>Rain?\n</think> Yes.<|im_end|>"]


def test_results_out_of_order_need_ids_in_the_template() -> None:
    record = chat(USER, calls("a", "b"), result("b"), result("a"), ANSWER)
    assert "does not render ids of tool calls" in refused(TOOL_CHATML, record)
    with_ids = TOOL_CHATML.replace("<tool_response>", "<tool_response {{ message.tool_call_id }}>")
    assert learnt(with_ids, record)[-1] == "It rains.<|im_end|>"


def test_a_result_may_repeat_the_name_of_its_function() -> None:
    record = chat(USER, calls("a"), result("a", name="weather"), ANSWER)
    assert learnt(TOOL_CHATML, record)[-1] == "It rains.<|im_end|>"


def test_a_shape_that_was_refused_is_refused_again() -> None:
    tokenizer = ExampleTokenizer(toy_tokenizer(CHATML))
    for _ in range(2):
        with pytest.raises(DataError, match="does not render tools"):
            tokenizer.encode(3, chat(USER, ANSWER))
    tokenizer.encode(3, chat(USER, ANSWER, tools=()))


@pytest.mark.parametrize(
    "messages",
    [
        [DEVELOPER, USER, ANSWER],
        [SYSTEM, DEVELOPER, USER, ANSWER],
        [USER, DEVELOPER, ANSWER],
        [{**SYSTEM, "content": ""}, USER, DEVELOPER, ANSWER],
    ],
)
def test_the_developer_role_is_renamed_as_vllm_does_it(messages: list[dict[str, Any]]) -> None:
    tokenizer = toy_tokenizer(CHATML)
    input_ids, _ = ExampleTokenizer(tokenizer).encode(3, chat(*messages, tools=()))
    served: Any = _consolidate_system_messages(_convert_developer_to_system(messages))  # type: ignore[arg-type]
    expected = tokenizer.apply_chat_template(served, return_dict=True)
    assert input_ids == expected["input_ids"]


def test_the_developer_role_stays_where_the_template_knows_it() -> None:
    tokenizer = toy_tokenizer(CHATML + "{# 'developer' #}")
    messages = [SYSTEM, DEVELOPER, USER, ANSWER]
    input_ids, _ = ExampleTokenizer(tokenizer).encode(3, chat(*messages, tools=()))
    expected = tokenizer.apply_chat_template(messages, return_dict=True)
    assert input_ids == expected["input_ids"]


# A template that writes earlier answers without the thinking block that the last one has, and
# marks its answers as transformers defines it.
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{% if loop.last %}<think></think>{% endif %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}\n{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)


def test_a_template_that_marks_its_answers_is_taken_at_its_word() -> None:
    turns = [USER, {**ANSWER, "content": "a"}, USER, {**ANSWER, "content": "b"}]
    record = chat(*turns, tools=())
    assert learnt(MARKED, record) == ["a<|im_end|>", "<think></think>b<|im_end|>"]
    tokenizer = toy_tokenizer(MARKED)
    expected = tokenizer.apply_chat_template(
        turns, return_dict=True, return_assistant_tokens_mask=True
    )
    assert ExampleTokenizer(tokenizer).encode(3, record)[1] == expected["assistant_masks"]
    turns[1]["weight"] = 0
    assert learnt(MARKED, chat(*turns, tools=())) == ["<think></think>b<|im_end|>"]
    unmarked = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    turns[1]["weight"] = 1
    assert "differently when messages follow" in refused(unmarked, chat(*turns, tools=()))


def test_an_answer_and_its_end_may_be_marked_separately() -> None:
    template = MARKED.replace(
        "<|im_end|>{% endgen", "{% endgeneration %}{% generation %}<|im_end|>{% endgen"
    )
    assert learnt(template, chat(USER, ANSWER, tools=())) == ["<think></think>It rains.<|im_end|>"]
    missing = MARKED.replace("{% generation %}", "{% if not loop.last %}{% generation %}", 1)
    missing = missing.replace("{% endgeneration %}", "{% endgeneration %}{% endif %}", 1)
    assert "does not render" in refused(missing, chat(USER, ANSWER, tools=()))


def test_the_demo_model_has_no_tools(demo_tokenizer: Any) -> None:
    tokenizer = ExampleTokenizer(demo_tokenizer)
    for record, field in (
        (chat(USER, ANSWER), "tools"),
        (chat(USER, calls("a"), result("a"), ANSWER, tools=()), "messages[1].tool_calls"),
        (chat(USER, {**ANSWER, "name": "Ann"}, tools=()), "messages[1].name"),
    ):
        with pytest.raises(DataError, match="does not render") as caught:
            tokenizer.encode(3, record)
        assert (caught.value.line, caught.value.field) == (3, field)
    input_ids, mask = tokenizer.encode(3, chat(SYSTEM, USER, ANSWER, tools=()))
    answer = [i for i, m in zip(input_ids, mask, strict=True) if m]
    assert demo_tokenizer.decode(answer) == "It rains.<|im_end|>"
    expected = demo_tokenizer.apply_chat_template([SYSTEM, USER, ANSWER], return_dict=True)
    assert input_ids == expected["input_ids"]
