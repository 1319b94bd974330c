"""The form of what ``/v1/uploads`` answers, for ``/openapi.json``; see ``schemas.py``."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from flexllm_vllm.api.schemas import FileObject, left_out

_UPLOAD: dict[str, Any] = {
    "id": "upload_Tq8LmBk3vZ1xW6cRdY2sNa9f",
    "object": "upload",
    "bytes": 52431,
    "created_at": 1767225500,
    "expires_at": 1767229100,
    "filename": "train.jsonl",
    "purpose": "fine-tune",
    "status": "pending",
}
_PART: dict[str, Any] = {
    "id": "part_W6cRdY2sNa9fTq8LmBk3vZ1x",
    "object": "upload.part",
    "created_at": 1767225510,
    "upload_id": _UPLOAD["id"],
}


class UploadObject(BaseModel):
    """An upload in parts. ``file`` comes with the answer that completes it."""

    model_config = ConfigDict(json_schema_extra={"examples": [_UPLOAD]})

    id: str
    object: Literal["upload"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: FileObject = left_out()


class UploadPartObject(BaseModel):
    """A part of an upload."""

    model_config = ConfigDict(json_schema_extra={"examples": [_PART]})

    id: str
    object: Literal["upload.part"]
    created_at: int
    upload_id: str
