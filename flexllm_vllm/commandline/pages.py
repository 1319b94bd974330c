"""Lists of the API, page by page."""

from collections.abc import Callable
from typing import Any, TypeVar

from openai.pagination import SyncCursorPage

T = TypeVar("T")


def collect(
    fetch: Callable[..., SyncCursorPage[T]], limit: int | None, page_size: int = 100
) -> tuple[list[T], bool]:
    """The first ``limit`` items of a list (None: all), and whether there are more.

    Args:
        fetch: asks for the first page, of ``limit=`` items.
        page_size: the most that the server puts into a page.
    """
    size = page_size if limit is None else min(limit, page_size)
    items: list[T] = []
    for page in fetch(limit=size).iter_pages():
        items += page.data
        if limit is not None and len(items) >= limit:
            return items[:limit], len(items) > limit or bool(page.has_more)
    return items, False


def list_object(items: list[Any], has_more: bool) -> dict[str, Any]:
    """The list in OpenAI's form."""
    return {"object": "list", "data": items, "has_more": has_more}
