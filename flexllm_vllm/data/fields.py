"""Checks of single JSON values, with the place in the error."""

from typing import Any

from flexllm_vllm.data.errors import DataError


def text(line: int, place: str, value: Any) -> str:
    """Raises:
    DataError: the value is not a string.
    """
    if not isinstance(value, str):
        raise DataError(line, place, f"expected a string, got {kind(value)}")
    return value


def required_text(line: int, place: str, value: Any) -> str:
    """Raises:
    DataError: the value is not a string, or empty.
    """
    checked = text(line, place, value)
    if not checked:
        raise DataError(line, place, "must not be empty")
    return checked


def json_object(line: int, place: str, value: Any) -> dict[str, Any]:
    """Raises:
    DataError: the value is not an object.
    """
    if not isinstance(value, dict):
        raise DataError(line, place, f"expected an object, got {kind(value)}")
    return value


def filled_list(line: int, place: str, value: Any, of: str, most: int) -> list[Any]:
    """Raises:
    DataError: the value is not a list of 1 to ``most`` items.
    """
    if not isinstance(value, list) or not value:
        raise DataError(line, place, f"must be a list of at least one {of}")
    if len(value) > most:
        raise DataError(line, place, f"must have at most {most} items, got {len(value)}")
    return value


def refuse_other_fields(line: int, prefix: str, value: dict[str, Any], known: set[str]) -> None:
    """Raises:
    DataError: names the first field that is not known.
    """
    for name in value:
        if name not in known:
            expected = ", ".join(sorted(known))
            reason = f"not supported for training; supported here: {expected}"
            raise DataError(line, prefix + shorten(name), reason)


def kind(value: Any) -> str:
    """What a JSON value is, for an error message."""
    if value is None:
        return "nothing"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return names.get(type(value), "a number")


def show(value: Any) -> str:
    """A value for an error message, cut to 40 characters."""
    # The repr of a large object would be as large.
    return shorten(repr(value)) if not isinstance(value, dict | list) else kind(value)


def shorten(value: str, limit: int = 40) -> str:
    """The beginning of a text, marked where it was cut."""
    return value if len(value) <= limit else value[: limit - 3] + "..."
