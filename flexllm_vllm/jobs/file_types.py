"""What the store knows of files and uploads."""

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True)
class StoredFile:
    """An uploaded file. ``bytes`` is its size."""

    id: str
    filename: str
    bytes: int
    purpose: str
    created_at: int
    expires_at: int | None = None
    organization_id: str = "local"


class UploadStatus(StrEnum):
    """OpenAI's states of an upload in parts."""

    PENDING = "pending"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


@dataclass(frozen=True)
class Upload:
    """A file that comes in parts. ``bytes`` is what its parts shall have together.

    Attributes:
        expires_at: Unix seconds, when its parts are removed unless it was completed.
        file_id: the file that its parts have become.
        file_expires_after_s: seconds that this file will exist; None: until it is deleted.
    """

    id: str
    filename: str
    bytes: int
    purpose: str
    mime_type: str
    status: UploadStatus
    created_at: int
    expires_at: int
    file_id: str | None = None
    file_expires_after_s: int | None = None
    organization_id: str = "local"


@dataclass(frozen=True)
class UploadPart:
    """A part of an upload."""

    id: str
    upload_id: str
    bytes: int
    created_at: int
