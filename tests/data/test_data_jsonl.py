import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flexllm_vllm.data.errors import DataError
from flexllm_vllm.data.jsonl import MAX_BRACKETS, MAX_DEPTH, MAX_LINE_BYTES, parse_line, read_lines
from flexllm_vllm.data.records import check_file

PAIR = {"prompt": "a", "completion": "b"}
ROOT = Path(__file__).parents[2]

# Prints by how many bytes reading a file raised the peak of the process's memory, and the outcome.
# VmHWM, not ru_maxrss: the latter is inherited from the process that started this one.
MEASURE = """
import re, sys
from pathlib import Path
from flexllm_vllm.data import DataError, check_file

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

before = peak()
try:
    outcome = check_file(Path(sys.argv[1]))
except DataError as error:
    outcome = error
print(peak() - before)
print(outcome)
"""


def measure(path: Path) -> tuple[int, str]:
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    grown, outcome = run.stdout.splitlines()
    return int(grown), outcome


def no_line_break(path: Path) -> str:
    """A gigabyte of NUL bytes; as a sparse file it takes no room."""
    with path.open("wb") as file:
        file.write(json.dumps(PAIR).encode() + b"\n")
        file.truncate(1 << 30)
    return f"line 2: longer than {MAX_LINE_BYTES} bytes, the limit for one example"


def text_without_line_break(path: Path) -> str:
    with path.open("wb") as file:
        file.write(b'{"prompt": "')
        for _ in range(200):
            file.write(b"x" * (1 << 20))
    return f"line 1: longer than {MAX_LINE_BYTES} bytes, the limit for one example"


def long_lines(path: Path) -> str:
    line = json.dumps({**PAIR, "prompt": "\N{GRINNING FACE}" + "x" * 1_000_000}, ensure_ascii=False)
    with path.open("wb") as file:
        for _ in range(100):
            file.write(line.encode() + b"\n")
    return "100"


def many_objects(path: Path) -> str:
    path.write_bytes(b'{"messages": [' + b'{"a":0},' * (MAX_BRACKETS - 3) + b"{}]}")
    return "line 1, field 'messages': must have at most 1024 items, got "


def many_lists(path: Path) -> str:
    path.write_bytes(b'{"messages": [' + b"[[[[[[[[]]]]]]]]," * (MAX_LINE_BYTES // 18) + b"[]]}")
    return f"line 1: more than {MAX_BRACKETS} brackets"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "write", [no_line_break, text_without_line_break, long_lines, many_objects, many_lists]
)
def test_memory_does_not_grow_with_the_file(tmp_path: Path, write: Callable[[Path], str]) -> None:
    path = tmp_path / "large.jsonl"
    expected = write(path)
    try:
        grown, outcome = measure(path)
    finally:
        path.unlink()
    assert outcome.startswith(expected)
    assert grown < 64e6


@pytest.mark.parametrize(
    ("raw", "field", "reason"),
    [
        (b'{"prompt": "a", "completion": "b", "prompt": "c"}', None, "'prompt' appears twice"),
        (b'{"messages": [{"role": "user", "role": "x"}]}', None, "'role' appears twice"),
        (b'{"a": NaN}', None, "NaN is not a JSON number"),
        (b'{"a": -Infinity}', None, "-Infinity is not a JSON number"),
        (b'{"a": 1e999}', None, "the number 1e999 is too large"),
        (b'{"a": 18446744073709551616}', None, "does not fit into 64 bits"),
        (b'{"a": -' + b"9" * 5000 + b"}", None, "does not fit into 64 bits"),
        (b'{"a": ' + b"[" * 500_00 + b"]" * 500_00 + b"}", None, f"deeper than {MAX_DEPTH}"),
        (b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}", None, f"deeper than {MAX_DEPTH}"),
        (b'{"a": "\xff"}', None, "not UTF-8 text: invalid start byte at byte 7"),
        ('{"a": 1}'.encode("utf-16"), None, "not UTF-8 text"),
        (b'\xef\xbb\xbf{"a": 1}', None, "byte order mark"),
        (b'{"a": "\x00"}', None, "not valid JSON: Invalid control character at column 8"),
        (b'{"a": ["b", "\\u0000"]}', "a[1]", "holds a NUL character"),
        (b'{"a": {"b": "\\ud83d"}}', "a.b", "half of a surrogate pair"),
        (b'{"a": {"\\udc00": 1}}', "a", "half of a surrogate pair"),
        (b'{"a": "\\x"}', None, "not valid JSON: Invalid \\escape at column 8"),
        (b'{"a": 1} {"b": 2}', None, "not valid JSON: Extra data at column 10"),
        (b'{"a": 1}\r{"b": 2}', None, "not valid JSON: Extra data"),
        (b"[1]", None, "expected a JSON object, got a list"),
        (b"null", None, "expected a JSON object, got nothing"),
    ],
)
def test_what_two_readers_could_understand_differently_is_refused(
    raw: bytes, field: str | None, reason: str
) -> None:
    with pytest.raises(DataError) as caught:
        parse_line(7, raw)
    assert (caught.value.line, caught.value.field) == (7, field)
    assert reason in caught.value.reason
    assert len(str(caught.value)) < 300
    str(caught.value).encode()  # it can be sent


def test_numbers_and_nesting_within_the_limits_are_read() -> None:
    raw = b'{"a": [18446744073709551615, -9223372036854775808, 1.5e300, -0.0]}'
    assert parse_line(1, raw) == {"a": [2**64 - 1, -(2**63), 1.5e300, 0.0]}
    value = parse_line(1, b'{"a": ' + b"[" * 63 + b"]" * 63 + b"}")
    assert json.dumps(value).count("[") == 63
    assert parse_line(1, b'{"a": "\\ud83d\\ude00"}') == {"a": "\N{GRINNING FACE}"}


def test_windows_files_are_read_as_others(tmp_path: Path) -> None:
    path = tmp_path / "windows.jsonl"
    line = json.dumps(PAIR).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n \t\r\n" + line)
    assert check_file(path) == 2
    assert [number for number, _ in read_lines(path)] == [1, 4]


def test_a_line_of_exactly_the_limit_is_read(tmp_path: Path) -> None:
    path = tmp_path / "limit.jsonl"
    empty = len(json.dumps({**PAIR, "prompt": ""})) + 1
    line = json.dumps({**PAIR, "prompt": "x" * (MAX_LINE_BYTES - empty)}) + "\n"
    path.write_text(line * 2)
    assert check_file(path) == 2
    path.write_text(line + line.replace("x", "xx", 1))
    with pytest.raises(DataError, match="line 2: longer than"):
        check_file(path)


def test_the_number_of_examples_is_limited_by_the_caller(tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text((json.dumps(PAIR) + "\n\n") * 3)
    assert check_file(path, max_examples=3) == 3
    with pytest.raises(DataError, match="line 5: more than 2 examples"):
        check_file(path, max_examples=2)
