"""What bodies of requests have in common."""

from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator


class RequestBody(BaseModel):
    """Types are taken as they are (no "3" for 3), unknown fields are refused, text is Unicode."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @field_validator("*")
    @classmethod
    def _only_text(cls, value: Any) -> Any:
        if not is_text(value):
            raise ValueError("holds half of a surrogate pair, which is no character")
        return value


def is_text(value: Any) -> bool:
    """Whether all strings below a JSON value can be written as UTF-8; JSON's escapes can make ones
    that cannot, and what is stored has to be shown again."""
    match value:
        case str():
            return not any("\ud800" <= character <= "\udfff" for character in value)
        case dict():
            return all(is_text(part) for pair in value.items() for part in pair)
        case list():
            return all(is_text(part) for part in value)
    return True
