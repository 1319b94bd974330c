"""The examples of docs/data-formats.md are valid, and its figures are those of the code."""

import re
from pathlib import Path

import pytest
from toy_tokenizer import TOOL_CHATML, toy_tokenizer

from flexllm_vllm.data import (
    ExampleTokenizer,
    Method,
    check_file,
    tokenize_file,
    tokenize_preferences,
)
from flexllm_vllm.data.jsonl import MAX_BRACKETS, MAX_DEPTH, MAX_LINE_BYTES
from flexllm_vllm.data.messages import MAX_MESSAGES, MAX_TOOLS

DOCUMENT = (Path(__file__).parents[2] / "docs" / "data-formats.md").read_text()
# Heading -> its first block of JSON lines.
EXAMPLES = dict(
    re.findall(r"^##+ ([^\n]+)\n(?:(?!^#).)*?^```json\n(.*?)^```$", DOCUMENT, re.M | re.S)
)


@pytest.mark.parametrize(
    ("heading", "lines", "method"),
    [
        ("Chat", 3, "supervised"),
        ("Tools", 1, "supervised"),
        ("Prompt and completion", 1, "supervised"),
        ("Preferences", 1, "dpo"),
    ],
)
def test_examples_are_valid(tmp_path: Path, heading: str, lines: int, method: Method) -> None:
    path = tmp_path / "example.jsonl"
    path.write_text(EXAMPLES[heading])
    assert check_file(path, method) == lines
    tokenizer = ExampleTokenizer(toy_tokenizer(TOOL_CHATML))
    tokenize = tokenize_file if method == "supervised" else tokenize_preferences
    _, report = tokenize(path, tokenizer, 1000)
    assert (report.num_examples, report.num_skipped) == (lines, 0)


def test_every_example_is_tested() -> None:
    assert DOCUMENT.count("```json") == len(EXAMPLES) == 4


def test_figures_are_those_of_the_code() -> None:
    assert f"{MAX_LINE_BYTES // 2**20} MiB or {MAX_BRACKETS:,} brackets" in DOCUMENT
    assert f"{MAX_MESSAGES:,} messages or {MAX_TOOLS} tools" in DOCUMENT
    assert f"beyond {MAX_DEPTH} levels" in DOCUMENT
