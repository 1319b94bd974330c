"""Ids, and the names of trained models."""

import re
import secrets
import string
from pathlib import Path

_ALPHABET = string.ascii_letters + string.digits
_MODEL_ID_LENGTH = 8
SUFFIX_MAX_LENGTH = 64
_SUFFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
FILENAME_MAX_LENGTH = 255
# Control characters, what ends a line or turns the writing direction, halves of surrogate pairs.
_NOT_SHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def new_id(prefix: str, separator: str = "-") -> str:
    """A random id such as ``file-b3TqXk...`` (24 letters and digits)."""
    return f"{prefix}{separator}{''.join(secrets.choice(_ALPHABET) for _ in range(24))}"


def display_name(filename: str) -> str:
    """The name under which an uploaded file is shown: what was given, without its folder.

    It is never a path here: content is stored under its id.

    Raises:
        ValueError: it is longer than 255 characters, empty, or cannot be shown.
    """
    name = re.split(r"[/\\]", filename)[-1]
    if len(name) > FILENAME_MAX_LENGTH:
        raise ValueError(f"must be at most {FILENAME_MAX_LENGTH} characters, got {len(name)}")
    if _NOT_SHOWN.search(name):
        raise ValueError("must not hold control characters")
    if name.strip() in ("", ".", ".."):
        raise ValueError("must name a file")
    return name


def check_suffix(suffix: str) -> None:
    """Refuse a suffix that does not fit into a model name.

    At most 64 characters: letters, digits, ``.``, ``_`` and ``-``, the first a letter or digit. A
    colon would break the name apart, a slash would make it a path.

    Raises:
        ValueError: says what is allowed.
    """
    if len(suffix) > SUFFIX_MAX_LENGTH or not _SUFFIX.fullmatch(suffix):
        raise ValueError(
            f"must be at most {SUFFIX_MAX_LENGTH} letters, digits, '.', '_' or '-', beginning with "
            f"a letter or digit, got '{suffix[:80]}'"
        )


def adapter_name(served_name: str, organization: str, suffix: str | None, job_id: str) -> str:
    """``ft:<base>:<organization>:<suffix or empty>:<id>``, OpenAI's form."""
    model_id = job_id.rpartition("-")[2][:_MODEL_ID_LENGTH]
    return f"ft:{base_name(served_name)}:{organization}:{suffix or ''}:{model_id}"


def checkpoint_name(adapter_name: str, step: int) -> str:
    """Under which a checkpoint of a job is served."""
    return f"{adapter_name}:ckpt-step-{step}"


def base_name(served_name: str) -> str:
    """The served name, or the last component where vLLM serves the model under its path."""
    name = served_name.rstrip("/\\")
    is_path = (
        name.startswith(("/", "./", "../", "~"))
        or "\\" in name
        or name.count("/") > 1
        or Path(name).is_dir()
    )
    return re.split(r"[/\\]", name)[-1] if is_path else name
