"""Ids, and the names of trained models."""

import re
import secrets
import string
from pathlib import Path

_ALPHABET = string.ascii_letters + string.digits
_MODEL_ID_LENGTH = 8
SUFFIX_MAX_LENGTH = 64
_SUFFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def new_id(prefix: str) -> str:
    """A random id such as ``file-b3TqXk...`` (24 letters and digits)."""
    return f"{prefix}-{''.join(secrets.choice(_ALPHABET) for _ in range(24))}"


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
