"""The two JSONL formats: OpenAI's chat messages, and prompt/completion pairs.

One line is one example, either

``{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}``

or ``{"prompt": "...", "completion": "..."}``. A file may mix them. Whatever the trainer would not
use (tools, images, names) is refused rather than dropped: a model trained on less than the file
says is worse than an error.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexllm_vllm.data.errors import DataError

ROLES = ("system", "developer", "user", "assistant")


@dataclass(frozen=True)
class ChatMessage:
    """One message. ``weight`` is 1 where the message carries loss (assistant messages only)."""

    role: str
    content: str
    weight: int


@dataclass(frozen=True)
class ChatRecord:
    """A conversation that ends with an assistant message."""

    messages: tuple[ChatMessage, ...]


@dataclass(frozen=True)
class CompletionRecord:
    """A prompt and the text that shall follow it."""

    prompt: str
    completion: str


Record = ChatRecord | CompletionRecord


def read_records(path: Path) -> Iterator[tuple[int, Record]]:
    """Yield ``(line number, record)`` for every line that is not blank.

    Raises:
        DataError: at the first line that is not a valid example.
    """
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            if line == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if raw.strip():
                yield line, parse_record(line, raw)


def check_file(path: Path) -> int:
    """Check every line of a file and return the number of examples.

    Raises:
        DataError: a line is not a valid example, or the file has none.
    """
    count = sum(1 for _ in read_records(path))
    if count == 0:
        raise DataError(None, None, "the file is empty: it must hold at least one example")
    return count


def parse_record(line: int, raw: bytes) -> Record:
    """Parse one line of JSON.

    Raises:
        DataError: names the line and the field.
    """
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            line, None, f"not UTF-8 text: {error.reason} at byte {error.start}"
        ) from None
    except json.JSONDecodeError as error:
        reason = f"not valid JSON: {error.msg} at column {error.colno}"
        raise DataError(line, None, reason) from None
    except (ValueError, RecursionError) as error:  # digits beyond Python's limit, deep nesting
        raise DataError(line, None, f"not usable JSON: {error}") from None
    if not isinstance(record, dict):
        raise DataError(line, None, f"expected a JSON object, got {_kind(record)}")
    if "messages" in record:
        _refuse_other_fields(line, "", record, {"messages"})
        return _chat_record(line, record["messages"])
    if "prompt" in record or "completion" in record:
        _refuse_other_fields(line, "", record, {"prompt", "completion"})
        prompt = _text(line, "prompt", record.get("prompt"))
        completion = _text(line, "completion", record.get("completion"))
        if not completion:
            raise DataError(line, "completion", "must not be empty: there is nothing to learn")
        return CompletionRecord(prompt, completion)
    raise DataError(line, None, "expected the field 'messages', or 'prompt' and 'completion'")


def _chat_record(line: int, messages: Any) -> ChatRecord:
    if not isinstance(messages, list) or not messages:
        raise DataError(line, "messages", "must be a list of at least one message")
    parsed = tuple(_message(line, f"messages[{i}]", m) for i, m in enumerate(messages))
    if parsed[-1].role != "assistant":
        place = f"messages[{len(parsed) - 1}].role"
        reason = f"the last message must be the assistant's, got '{parsed[-1].role}'"
        raise DataError(line, place, reason)
    return ChatRecord(parsed)


def _message(line: int, place: str, message: Any) -> ChatMessage:
    if not isinstance(message, dict):
        raise DataError(line, place, f"expected an object, got {_kind(message)}")
    role = message.get("role")
    if role not in ROLES:
        expected = ", ".join(ROLES)
        raise DataError(line, f"{place}.role", f"expected one of {expected}, got {_show(role)}")
    _refuse_other_fields(line, f"{place}.", message, {"role", "content", "weight"})
    weight = 1 if role == "assistant" else 0
    if "weight" in message:
        if role != "assistant":
            raise DataError(line, f"{place}.weight", "only assistant messages have a weight")
        weight = message["weight"]
        if isinstance(weight, bool) or weight not in (0, 1):
            raise DataError(line, f"{place}.weight", f"must be 0 or 1, got {_show(weight)}")
    return ChatMessage(
        role, _content(line, f"{place}.content", message.get("content")), int(weight)
    )


def _content(line: int, place: str, content: Any) -> str:
    """A string, or OpenAI's list of text parts, which are joined."""
    if not isinstance(content, list):
        return _text(line, place, content)
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else _kind(part)
            reason = f"only parts of type 'text' are supported, got {_show(kind)}"
            raise DataError(line, f"{place}[{i}]", reason)
        texts.append(_text(line, f"{place}[{i}].text", part.get("text")))
    return "".join(texts)


def _text(line: int, place: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(line, place, f"expected a string, got {_kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(line, place, "holds half of a surrogate pair: not Unicode text") from None
    return value


def _refuse_other_fields(line: int, prefix: str, value: dict[str, Any], known: set[str]) -> None:
    for name in value:
        if name not in known:
            expected = ", ".join(sorted(known))
            reason = f"not supported for training; supported here: {expected}"
            raise DataError(line, prefix + name, reason)


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return names.get(type(value), "a number")


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
