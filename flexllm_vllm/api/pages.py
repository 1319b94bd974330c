"""Pages of a list with cursors, as OpenAI has them."""

from collections.abc import Sequence
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from fastapi import Query
from pydantic import BaseModel, ConfigDict

Limit = Annotated[int, Query(ge=1, le=100)]


class Listed(BaseModel):
    """An object that a cursor can point to."""

    id: str


Item = TypeVar("Item", bound=Listed)


class Page(BaseModel, Generic[Item]):
    """Objects of one kind, and whether there are more after ``last_id``."""

    object: Literal["list"] = "list"
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool

    @classmethod
    def of(cls, data: Sequence[Item], has_more: bool) -> Self:
        """The page of these objects."""
        ids = {"first_id": data[0].id, "last_id": data[-1].id} if data else _NO_IDS
        return cls(data=list(data), has_more=has_more, **ids)


_NO_IDS = {"first_id": None, "last_id": None}


def example(value: Any) -> ConfigDict:
    """Shows a value in ``/openapi.json``."""
    return ConfigDict(json_schema_extra={"examples": [value]})


def page_example(value: dict[str, Any]) -> ConfigDict:
    """Shows a page that holds one object."""
    ids = {"first_id": value["id"], "last_id": value["id"]}
    return example({"object": "list", "data": [value], **ids, "has_more": False})
