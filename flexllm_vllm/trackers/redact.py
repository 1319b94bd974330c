"""Secrets out of what trackers say: their errors become events and lines of the log."""

import re
from collections.abc import Mapping

_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
_USER_OF_URL = re.compile(r"://[^/\s@]+@")
_MAX_LENGTH = 300


def redact(text: str, environment: Mapping[str, str]) -> str:
    """One line of ``text`` without the values of variables whose name says that they are secret,
    and without the users of URLs."""
    for name, value in environment.items():
        if _SECRET_NAME.search(name) and len(value) >= 4:
            text = text.replace(value, "***")
    text = _USER_OF_URL.sub("://***@", " ".join(text.split()))
    return text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]}..."
