"""JSON lines, one at a time, in bounded memory.

Python's parser takes more than JSON allows and keeps quiet about what it drops. Here a line is
refused where two readers could understand it differently: duplicate names, NaN and Infinity,
numbers that do not fit into 64 bits, halves of surrogate pairs, NUL.
"""

import json
import math
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from flexllm_vllm.data.errors import DataError
from flexllm_vllm.data.fields import json_object, kind, shorten

# With these two no line makes the process grow by more than 64 MB: 2 MiB are half a million tokens
# of English, and a list takes 80 bytes where its text takes 2.
MAX_LINE_BYTES = 2 * 1024 * 1024
MAX_BRACKETS = 200_000
# Levels of objects and lists. Parser and templates are recursive.
MAX_DEPTH = 64
_TOO_DEEP = f"not usable JSON: objects and lists are nested deeper than {MAX_DEPTH} levels"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class _RefusedValueError(ValueError):
    """A value that Python's parser would take."""


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield ``(line number, bytes)`` for every line that is not blank.

    Lines end in LF or CRLF; a byte order mark at the start of the file is passed over.

    Raises:
        DataError: a line is longer than ``MAX_LINE_BYTES``; no more than that of it is read.
    """
    with path.open("rb") as file:
        for line in count(1):
            raw = file.readline(MAX_LINE_BYTES + 1)
            if not raw:
                return
            if len(raw) > MAX_LINE_BYTES:
                reason = f"longer than {MAX_LINE_BYTES} bytes, the limit for one example"
                raise DataError(line, None, reason)
            if line == 1:
                raw = raw.removeprefix(_BYTE_ORDER_MARK)
            if raw.strip():
                yield line, raw


def parse_line(line: int, raw: bytes) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
        DataError: the line is not one, or not one that every reader understands alike.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 text: {error.reason} at byte {error.start}"
        raise DataError(line, None, reason) from None
    if text.startswith("\ufeff"):
        raise DataError(line, None, "begins with a byte order mark")
    value = parse_json(line, "", text)
    if not isinstance(value, dict):
        raise DataError(line, None, f"expected a JSON object, got {kind(value)}")
    return value


def parse_object(line: int, place: str, text: str) -> dict[str, Any]:
    """The JSON object that a string inside a line holds.

    Raises:
        DataError: names ``place``, or a place below it.
    """
    return json_object(line, place, parse_json(line, place, text))


def parse_json(line: int, place: str, text: str) -> Any:
    """One JSON value; ``place`` is the field that holds it, empty for the line itself.

    Raises:
        DataError: the text is not JSON, or not JSON that every reader understands alike.
    """
    if text.count("[") + text.count("{") > MAX_BRACKETS:
        raise DataError(line, place or None, f"more than {MAX_BRACKETS} brackets, the limit")
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_int=_integer,
            parse_float=_float,
        )
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")
        reason = f"not valid JSON: {what} at column {error.colno}"
        raise DataError(line, place or None, reason) from None
    except _RefusedValueError as error:
        raise DataError(line, place or None, f"not usable JSON: {error}") from None
    except RecursionError:
        raise DataError(line, place or None, _TOO_DEEP) from None
    _check(line, value, place, (), 0)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise _RefusedValueError(f"the name {shorten(name)!a} appears twice")
            seen.add(name)
    return value


def _refuse_constant(name: str) -> Any:
    raise _RefusedValueError(f"{name} is not a JSON number")


def _integer(digits: str) -> int:
    # 64 bits have at most 19 digits and a sign; int() of many digits is slow or an error.
    if len(digits) <= 20 and -(2**63) <= (value := int(digits)) < 2**64:
        return value
    raise _RefusedValueError(f"the integer {shorten(digits)} does not fit into 64 bits")


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise _RefusedValueError(f"the number {shorten(digits)} is too large")
    return value


def _check(line: int, value: Any, place: str, path: tuple[str | int, ...], depth: int) -> None:
    """Refuses deep nesting, and text that is not Unicode."""
    if isinstance(value, str):
        if reason := _wrong_with(value):
            raise DataError(line, _field(place, path), reason)
        return
    if depth == MAX_DEPTH:
        raise DataError(line, place or None, _TOO_DEEP)
    if isinstance(value, dict):
        for name, item in value.items():
            if reason := _wrong_with(name):
                raise DataError(line, _field(place, path), f"the name of a field {reason}")
            if isinstance(item, str | dict | list):
                _check(line, item, place, (*path, name), depth + 1)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            if isinstance(item, str | dict | list):
                _check(line, item, place, (*path, index), depth + 1)


def _wrong_with(text: str) -> str | None:
    if "\0" in text:
        return "holds a NUL character"
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return "holds half of a surrogate pair: not Unicode text"
    return None


def _field(place: str, path: tuple[str | int, ...]) -> str | None:
    """``messages[2].content``"""
    parts = [f"[{part}]" if isinstance(part, int) else f".{shorten(part)}" for part in path]
    return (place + shorten("".join(parts), 200)).removeprefix(".") or None
