import json
from pathlib import Path
from typing import Any

import pytest
from toy_tokenizer import CHATML, toy_tokenizer

from flexllm_vllm.data import DataError, ExampleTokenizer, TokenizedDataset, tokenize_file
from flexllm_vllm.data.errors import UnsupportedTokenizerError
from flexllm_vllm.data.records import Record, parse_record


def record(*messages: tuple[str, str], weights: dict[int, int] | None = None) -> Record:
    value: list[dict[str, Any]] = [{"role": r, "content": c} for r, c in messages]
    for index, weight in (weights or {}).items():
        value[index]["weight"] = weight
    return parse_record(1, json.dumps({"messages": value}).encode())


def learnt(tokenizer: Any, example: Record, **options: Any) -> list[str]:
    """The runs of tokens that carry loss, as text."""
    input_ids, mask = ExampleTokenizer(tokenizer, **options).encode(1, example)
    assert len(input_ids) == len(mask)
    runs: list[list[int]] = []
    for i, target in enumerate(mask):
        if target:
            if i == 0 or not mask[i - 1]:
                runs.append([])
            runs[-1].append(input_ids[i])
    return [tokenizer.decode(run) for run in runs]


def test_only_answers_and_their_end_of_turn_carry_loss() -> None:
    example = record(("user", "Hi"), ("assistant", "Hello 👋"), ("user", "?"), ("assistant", "!"))
    assert learnt(toy_tokenizer(), example) == ["Hello 👋<|im_end|>", "!<|im_end|>"]


def test_the_tokens_are_those_of_the_chat_template() -> None:
    tokenizer = toy_tokenizer()
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    input_ids, _ = ExampleTokenizer(tokenizer).encode(
        1, record(("user", "Hi"), ("assistant", "Hello"))
    )
    expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
    assert input_ids == expected["input_ids"]


def test_an_answer_of_weight_zero_carries_no_loss() -> None:
    example = record(
        ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), weights={1: 0}
    )
    assert learnt(toy_tokenizer(), example) == ["d<|im_end|>"]


def test_a_conversation_may_begin_with_the_assistant() -> None:
    # The default system message appears only once there is a message, so the generation prompt of
    # nothing is no prefix; and that message's text is an answer, too.
    example = record(("assistant", "Be helpful."))
    assert learnt(toy_tokenizer(), example) == ["Be helpful.<|im_end|>"]


def test_developer_is_the_system_role() -> None:
    tokenizer = toy_tokenizer()
    as_developer = record(("developer", "x"), ("user", "y"), ("assistant", "z"))
    input_ids, _ = ExampleTokenizer(tokenizer).encode(1, as_developer)
    assert tokenizer.decode(input_ids).startswith("<|im_start|>system\nx<|im_end|>")


def test_a_template_that_rewrites_earlier_answers_is_refused_for_those_only() -> None:
    # As reasoning models do: earlier answers lose a part.
    template = CHATML.replace(
        "{{ message['content'] }}",
        "{% if message['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
        "{{ message['content'] }}",
    )
    turns = (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    tokenizer = ExampleTokenizer(toy_tokenizer(template))
    with pytest.raises(DataError, match="weight 0") as caught:
        tokenizer.encode(7, record(*turns))
    assert (caught.value.line, caught.value.field) == (7, "messages[1]")
    last_only = record(*turns, weights={1: 0})
    assert learnt(toy_tokenizer(template), last_only) == ["<think></think>d<|im_end|>"]


def test_a_generation_prompt_that_is_no_prefix_is_not_needed() -> None:
    template = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    example = record(("user", "a"), ("assistant", " b "))
    assert learnt(toy_tokenizer(template), example) == [" b <|im_end|>"]


def test_a_token_over_the_border_carries_no_loss() -> None:
    # "\n" of the generation prompt and "\n" of the answer are one token.
    tokenizer = toy_tokenizer(merges=[("Ċ", "Ċ")])
    assert learnt(tokenizer, record(("user", "a"), ("assistant", "\nb"))) == ["b<|im_end|>"]


def test_a_template_error_is_a_data_error() -> None:
    tokenizer = toy_tokenizer("{{ raise_exception('no system messages') }}")
    with pytest.raises(DataError, match="no system messages") as caught:
        ExampleTokenizer(tokenizer).encode(4, record(("user", "a"), ("assistant", "b")))
    assert caught.value.line == 4


def test_a_model_without_template_takes_the_servers() -> None:
    example = record(("user", "a"), ("assistant", "b"))
    with pytest.raises(DataError, match="no chat template"):
        ExampleTokenizer(toy_tokenizer(None)).encode(1, example)
    assert learnt(toy_tokenizer(None), example, chat_template=CHATML) == ["b<|im_end|>"]


@pytest.mark.parametrize(("prompt", "merges"), [("2+2=", None), ("", None), ("a", [("a", "b")])])
def test_completions_follow_the_prompt_as_requests_tokenize_it(
    prompt: str, merges: list[tuple[str, str]] | None
) -> None:
    tokenizer = toy_tokenizer(merges=merges)
    raw = json.dumps({"prompt": prompt, "completion": "bc"}).encode()
    input_ids, mask = ExampleTokenizer(tokenizer).encode(1, parse_record(1, raw))
    size = len(tokenizer(prompt)["input_ids"])
    assert input_ids[:size] == tokenizer(prompt)["input_ids"]
    assert tokenizer.decode(input_ids[size:]) == "bc<|im_end|>"
    expected = [0] * size + [1] * (len(input_ids) - size)
    expected[0] = 0  # nothing precedes it
    assert mask == expected


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(UnsupportedTokenizerError, match="Slow"):
        ExampleTokenizer(Slow())


def test_long_examples_are_truncated_and_empty_ones_skipped(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    pairs = [("p", "c"), ("p", "long " * 10), ("long " * 10, "c"), ("", "c")]
    path.write_text("\n".join(json.dumps({"prompt": p, "completion": c}) for p, c in pairs))
    tokenizer = ExampleTokenizer(toy_tokenizer())
    dataset, report = tokenize_file(path, tokenizer, max_seq_length=8)
    assert (report.num_examples, report.num_truncated, report.num_skipped) == (3, 1, 1)
    assert [dataset.num_tokens(i) for i in range(3)] == [3, 8, 2]
    assert [dataset.num_loss_tokens(i) for i in range(3)] == [2, 7, 1]
    assert report.num_tokens == 13
    assert report.num_loss_tokens == 10
    dataset.save(tmp_path)
    loaded = TokenizedDataset.load(tmp_path / "dataset.safetensors")
    assert [loaded.example(i) for i in range(3)] == [dataset.example(i) for i in range(3)]


def test_a_file_without_anything_to_learn_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "a long prompt", "completion": "c"}))
    with pytest.raises(DataError, match="none of the 1 examples"):
        tokenize_file(path, ExampleTokenizer(toy_tokenizer()), max_seq_length=4)
