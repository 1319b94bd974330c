import json
from pathlib import Path
from typing import Any

import pytest
from toy_tokenizer import CHATML, TOOL_CHATML, toy_tokenizer

from flexllm_vllm.data import (
    DataError,
    ExampleTokenizer,
    TokenizationReport,
    TokenizedDataset,
    tokenize_file,
    tokenize_preferences,
)
from flexllm_vllm.data.records import PreferenceRecord, parse_record

USER = {"role": "user", "content": "Hi"}


def said(content: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def pair(preferred: Any, other: Any, **more: Any) -> dict[str, Any]:
    """OpenAI's form; strings stand for an assistant message."""
    outputs = [[said(o)] if isinstance(o, str) else o for o in (preferred, other)]
    return {
        "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True, **more},
        "preferred_output": outputs[0],
        "non_preferred_output": outputs[1],
    }


def tokenized(
    path: Path, lines: list[Any], max_seq_length: int = 1000, **options: Any
) -> tuple[TokenizedDataset, TokenizationReport]:
    path.write_text("\n".join(map(json.dumps, lines)))
    tokenizer = ExampleTokenizer(toy_tokenizer(**options))
    return tokenize_preferences(path, tokenizer, max_seq_length)


def learnt(dataset: TokenizedDataset, index: int) -> tuple[str, str]:
    """Text without loss, and text with loss."""
    input_ids, mask = dataset.example(index)
    texts = [[i for i, m in zip(input_ids, mask, strict=True) if m == of] for of in (0, 1)]
    without, with_loss = (toy_tokenizer().decode(ids) for ids in texts)
    return without, with_loss


def test_a_pair_is_two_examples_with_one_prompt(tmp_path: Path) -> None:
    lines = [pair("Hello!", "What?"), pair("a", "b")]
    dataset, report = tokenized(tmp_path / "data.jsonl", lines)
    assert len(dataset) == 4
    assert (report.num_examples, report.num_truncated, report.num_skipped) == (2, 0, 0)
    prompt = toy_tokenizer().apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    for index, answer in enumerate(["Hello!", "What?", "a", "b"]):
        without, with_loss = learnt(dataset, index)
        assert without == f"{prompt}\n"  # and the line break behind the end of the turn
        assert with_loss == f"{answer}<|im_end|>"
    assert report.num_loss_tokens == sum(len(a) + 1 for a in ["Hello!", "What?", "a", "b"])


@pytest.mark.parametrize("merges", [None, [("Ċ", "Ċ")]])
def test_prompt_and_completion_are_those_of_trl(
    tmp_path: Path, merges: list[tuple[str, str]] | None
) -> None:
    # TRL's DPOTrainer: the ids of the prompt with its generation prompt, then what the ids of the
    # whole conversation have behind them. With the merge, a token reaches over the border on one
    # side only; there TRL cuts the prompt on both sides, and here it stays as a request has it.
    tokenizer = toy_tokenizer(merges=merges)
    dataset, _ = tokenized(tmp_path / "data.jsonl", [pair("\nx", "y")], merges=merges)
    prompt = tokenizer.apply_chat_template([USER], add_generation_prompt=True, return_dict=True)
    size = len(prompt["input_ids"])
    for index, answer in enumerate(["\nx", "y"]):
        input_ids, mask = dataset.example(index)
        assert input_ids[:size] == prompt["input_ids"]
        assert not any(mask[:size])
        whole = tokenizer.apply_chat_template([USER, said(answer)], return_dict=True)
        if merges is None or index == 1:
            assert input_ids == whole["input_ids"]
        assert tokenizer.decode(input_ids) == tokenizer.decode(whole["input_ids"])
        with_loss = [i for i, m in zip(input_ids, mask, strict=True) if m]
        assert tokenizer.decode(with_loss) == f"{answer}<|im_end|>"


def test_a_generation_prompt_that_is_no_prefix_is_left_out_of_both(tmp_path: Path) -> None:
    template = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    dataset, _ = tokenized(tmp_path / "data.jsonl", [pair("a", "b")], chat_template=template)
    assert [learnt(dataset, i)[1] for i in (0, 1)] == ["a<|im_end|>", "b<|im_end|>"]


def call(i: str) -> dict[str, Any]:
    return {"id": i, "type": "function", "function": {"name": "weather", "arguments": "{}"}}


TOOL = {"type": "function", "function": {"name": "weather"}}


def test_an_output_may_call_tools_and_use_what_they_say(tmp_path: Path) -> None:
    turn = [
        {"role": "assistant", "tool_calls": [call("a")]},
        {"role": "tool", "tool_call_id": "a", "content": "rain"},
        said("It rains."),
    ]
    lines = [pair(turn, "No idea.", tools=[TOOL])]
    dataset, _ = tokenized(tmp_path / "data.jsonl", lines, chat_template=TOOL_CHATML)
    without, with_loss = learnt(dataset, 0)
    assert '"name": "weather"' in without
    assert "<tool_response>\nrain\n</tool_response>" in without
    text = '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call><|im_end|>'
    assert with_loss == f"{text}It rains.<|im_end|>"
    assert learnt(dataset, 1)[1] == "No idea.<|im_end|>"


def test_a_pair_is_skipped_where_truncation_leaves_one_side_nothing(tmp_path: Path) -> None:
    size = len(toy_tokenizer().apply_chat_template([USER], add_generation_prompt=True)["input_ids"])
    lines = [
        pair("abc", "xyz"),  # 4 tokens each, cut to 3
        pair("a", "b"),  # not cut: 2 tokens and the template's line break
        pair("abcdef", "abcxyz"),  # the same once they are cut
        pair("a", "b", messages=[{**USER, "content": "Hello, how are you?"}]),  # prompt alone
    ]
    dataset, report = tokenized(tmp_path / "data.jsonl", lines, max_seq_length=size + 3)
    assert (report.num_examples, report.num_truncated, report.num_skipped) == (2, 1, 2)
    assert [learnt(dataset, i)[1] for i in range(4)] == ["abc", "xyz", "a<|im_end|>", "b<|im_end|>"]
    assert report.num_tokens == 4 * (size + 3)
    with pytest.raises(DataError, match="none of the 1 examples"):
        tokenized(tmp_path / "data.jsonl", lines[2:3], max_seq_length=size + 3)


def test_a_supervised_job_refuses_the_file_and_the_reverse(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(pair("a", "b")))
    tokenizer = ExampleTokenizer(toy_tokenizer())
    with pytest.raises(DataError, match="line 1: this example is for the method 'dpo'"):
        tokenize_file(path, tokenizer, 100)
    path.write_text(json.dumps({"messages": [USER, said("a")]}))
    with pytest.raises(DataError, match="line 1: this example is for the method 'supervised'"):
        tokenize_preferences(path, tokenizer, 100)
    path.write_text("\n")
    with pytest.raises(DataError, match="empty"):
        tokenize_preferences(path, tokenizer, 100)


def test_outputs_that_differ_only_before_the_template_are_refused() -> None:
    template = CHATML.replace("{{ message['content'] }}", "{{ message['content'] | trim }}")
    record = parse_record(2, json.dumps(pair("a", " a")).encode())
    assert isinstance(record, PreferenceRecord)
    with pytest.raises(DataError, match="comes out the same") as caught:
        ExampleTokenizer(toy_tokenizer(template)).encode_pair(2, record)
    assert (caught.value.line, caught.value.field) == (2, "non_preferred_output")


def test_an_earlier_answer_that_the_template_rewrites_is_named() -> None:
    template = CHATML.replace("{{ message['content'] }}", "{{ loop.last }}{{ message['content'] }}")
    record = parse_record(2, json.dumps(pair([said("a"), said("b")], "c")).encode())
    assert isinstance(record, PreferenceRecord)
    with pytest.raises(DataError, match="let it be the last message of the output") as caught:
        ExampleTokenizer(toy_tokenizer(template)).encode_pair(2, record)
    assert caught.value.field == "preferred_output[0]"


def test_what_the_template_would_drop_is_refused() -> None:
    record = parse_record(2, json.dumps(pair("a", "b", tools=[TOOL])).encode())
    assert isinstance(record, PreferenceRecord)
    with pytest.raises(DataError, match=r"field 'input.tools': .* does not render tools"):
        ExampleTokenizer(toy_tokenizer()).encode_pair(2, record)


@pytest.mark.parametrize(
    ("value", "field", "reason"),
    [
        ({"input": {"messages": [USER]}}, "preferred_output", "at least one message"),
        ({"preferred_output": [said("a")]}, "input", "expected an object, got nothing"),
        ({**pair("a", "b"), "input": {}}, "input.messages", "got nothing"),
        ({**pair("a", "b"), "input": {"messages": []}}, "input.messages", "at least one message"),
        ({**pair("a", "b"), "input": [USER]}, "input", "expected an object, got a list"),
        ({**pair("a", "b"), "tools": []}, "tools", "not supported"),
        (pair("a", "b", functions=[{}]), "input.functions", "deprecated"),
        (pair("a", "b", tools=[{}]), "input.tools[0].type", "expected 'function'"),
        (pair("a", "a"), "non_preferred_output", "the same as preferred_output"),
        (pair("a", said("b")), "non_preferred_output", "must be a list"),
        (pair("a", []), "non_preferred_output", "at least one message"),
        (pair("a", [USER]), "non_preferred_output[0].role", "assistant and tool messages only"),
        (
            pair([said("a", tool_calls=[call("c")]), {"role": "tool", "tool_call_id": "c",
             "content": ""}], "b"),
            "preferred_output[1].role",
            "begin and end with an assistant message",
        ),
        (
            pair("a", [said("b", weight=1)]),
            "non_preferred_output[0].weight",
            "preference data has no weights",
        ),
        (
            pair("a", "b", messages=[USER, said("x", weight=0), USER]),
            "input.messages[1].weight",
            "preference data has no weights",
        ),
        (
            pair([said("a", tool_calls=[call("c"), call("d")])], "b", parallel_tool_calls=False),
            "preferred_output[0].tool_calls",
            "2 calls, but parallel_tool_calls is false",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(value: Any, field: str, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_record(3, json.dumps(value).encode())
    assert (caught.value.line, caught.value.field) == (3, field)
    assert reason in caught.value.reason


def test_the_demo_model_learns_preferences(tmp_path: Path, demo_tokenizer: Any) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(pair("Hello!", "Go away.")))
    dataset, _ = tokenize_preferences(path, ExampleTokenizer(demo_tokenizer), 200)
    prompt = demo_tokenizer.apply_chat_template(
        [USER], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    for index, answer in enumerate(["Hello!", "Go away."]):
        input_ids, mask = dataset.example(index)
        assert input_ids[: len(prompt)] == prompt
        with_loss = [i for i, m in zip(input_ids, mask, strict=True) if m]
        assert demo_tokenizer.decode(with_loss) == f"{answer}<|im_end|>"
