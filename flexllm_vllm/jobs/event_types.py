"""What happens to a job, as it is told."""

from dataclasses import dataclass
from typing import Any, Literal

EventLevel = Literal["info", "warn", "error"]
EventType = Literal["message", "metrics"]


@dataclass(frozen=True)
class NewEvent:
    """An event that has no id and time yet. Of several with one ``key`` the first is kept."""

    message: str
    level: EventLevel = "info"
    type: EventType = "message"
    data: dict[str, Any] | None = None
    key: str | None = None


@dataclass(frozen=True)
class JobEvent:
    """Something that happened to a job. ``created_at`` is Unix time in seconds."""

    id: str
    created_at: int
    level: EventLevel
    message: str
    type: EventType
    data: dict[str, Any] | None
