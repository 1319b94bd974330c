"""``/v1/files``."""

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse
from starlette.datastructures import UploadFile

from flexllm_vllm.api.dependencies import Service
from flexllm_vllm.api.errors import ApiError, OpenAIRoute, invalid
from flexllm_vllm.api.idempotency import IdempotencyKey
from flexllm_vllm.api.responses import file_object, page
from flexllm_vllm.api.schemas import ERRORS, FileDeleted, FileObject, FilePage, answers
from flexllm_vllm.api.service import FinetuningService
from flexllm_vllm.api.tenants import CurrentTenant

router = APIRouter(
    prefix="/v1/files", route_class=OpenAIRoute, tags=["finetuning"], responses=ERRORS
)

# What the multipart form adds to the file itself.
_FORM_BYTES = 64 * 1024
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["fine-tune"]},
                    },
                }
            }
        },
    }
}

_CONTENT: dict[int | str, Any] = {
    200: {
        "description": "The content of the file.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.post("", openapi_extra=_FORM, responses=answers(FileObject))
async def create_file(
    request: Request,
    service: Service,
    tenant: CurrentTenant,
    idempotency_key: IdempotencyKey = None,
) -> dict[str, Any]:
    """Upload a training file; every line is checked."""
    # The form is read here and not by FastAPI, so that the size is known before the body is read.
    announced = max(0, int(request.headers.get("content-length") or 0) - _FORM_BYTES)
    _check_size(service, announced)
    if idempotency_key is None:  # with one, the file may be there and counted already
        await asyncio.to_thread(
            service.store.files.check_quotas, tenant.organization_id, tenant.quotas, announced
        )
    async with request.form(max_files=1, max_fields=8) as form:
        for name in form:
            if name not in ("file", "purpose"):
                raise invalid(f"Unrecognized request argument supplied: {name}", name)
        file, purpose = form.get("file"), form.get("purpose")
        if not isinstance(file, UploadFile):
            raise invalid("Missing required parameter: you must upload a 'file'", "file")
        if not isinstance(purpose, str):
            raise invalid("Missing required parameter: 'purpose'", "purpose")
        _check_size(service, file.size or 0)
        filename = file.filename or "upload.jsonl"
        stored = await asyncio.to_thread(
            service.upload, file.file, filename, purpose, tenant, idempotency_key
        )
    return file_object(stored)


@router.get("", responses=answers(FilePage))
async def list_files(
    service: Service,
    tenant: CurrentTenant,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> dict[str, Any]:
    """Uploaded files."""
    files, has_more = await asyncio.to_thread(
        service.store.files.page, after, limit, order, purpose, tenant.organization_id
    )
    return page([file_object(file) for file in files], has_more)


@router.get("/{file_id}", responses=answers(FileObject))
async def get_file(file_id: str, service: Service, tenant: CurrentTenant) -> dict[str, Any]:
    """One file, without its content."""
    return file_object(
        await asyncio.to_thread(service.store.files.get, file_id, tenant.organization_id)
    )


@router.get("/{file_id}/content", response_class=FileResponse, responses=_CONTENT)
async def get_file_content(file_id: str, service: Service, tenant: CurrentTenant) -> FileResponse:
    """The file as it was uploaded."""
    path = await asyncio.to_thread(service.store.files.path, file_id, tenant.organization_id)
    return FileResponse(path, media_type="application/octet-stream")


@router.delete("/{file_id}", responses=answers(FileDeleted))
async def delete_file(file_id: str, service: Service, tenant: CurrentTenant) -> dict[str, Any]:
    """Delete a file that no unfinished job needs."""
    await asyncio.to_thread(service.store.files.delete, file_id, tenant.organization_id)
    return {"id": file_id, "object": "file", "deleted": True}


def _check_size(service: FinetuningService, size: int) -> None:
    if size > service.max_file_bytes:
        limit = service.max_file_bytes
        raise ApiError(413, f"The file is above the limit of {limit} bytes", "file", "too_large")
