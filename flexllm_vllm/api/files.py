"""``/v1/files``."""

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse

from flexllm_vllm.api.background import while_serving
from flexllm_vllm.api.dependencies import Service
from flexllm_vllm.api.errors import OpenAIRoute
from flexllm_vllm.api.idempotency import IdempotencyKey
from flexllm_vllm.api.multipart import announced_bytes, read_form
from flexllm_vllm.api.opened_file import OpenedFileResponse
from flexllm_vllm.api.responses import file_object, file_page
from flexllm_vllm.api.schemas import ERRORS, FileDeleted, FileObject, FilePage, answers
from flexllm_vllm.api.tenants import CurrentTenant
from flexllm_vllm.api.upload_requests import FORM_FIELDS, check_purpose, file_request
from flexllm_vllm.api.workers import run_long

router = APIRouter(
    prefix="/v1/files",
    route_class=OpenAIRoute,
    tags=["finetuning"],
    responses=ERRORS,
    lifespan=while_serving("finetuning_housekeeping"),
)

_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "additionalProperties": False,
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["fine-tune"]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {
                            "type": "integer",
                            "minimum": 3600,
                            "maximum": 2_592_000,
                        },
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
    files, key = service.files, idempotency_key
    content = await asyncio.to_thread(files.begin_file, announced_bytes(request), tenant, key)
    try:
        form = await read_form(request, "file", FORM_FIELDS, content.write, check_purpose)
        wanted = file_request(form.filename, form.fields)
        return file_object(await run_long(files.create_file, content, wanted, tenant, key))
    finally:
        await content.aclose()


@router.get("", responses=answers(FilePage))
async def list_files(
    service: Service,
    tenant: CurrentTenant,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> dict[str, Any]:
    """Uploaded files, and the results of jobs."""
    files, has_more = await asyncio.to_thread(
        service.store.files.page, after, limit, order, purpose, tenant.organization_id
    )
    return file_page(files, has_more)


@router.get("/{file_id}", responses=answers(FileObject))
async def get_file(file_id: str, service: Service, tenant: CurrentTenant) -> dict[str, Any]:
    """One file, without its content."""
    return file_object(
        await asyncio.to_thread(service.store.files.get, file_id, tenant.organization_id)
    )


@router.get("/{file_id}/content", response_class=FileResponse, responses=_CONTENT)
async def get_file_content(file_id: str, service: Service, tenant: CurrentTenant) -> FileResponse:
    """The file as it was uploaded."""
    file = await asyncio.to_thread(service.store.files.get, file_id, tenant.organization_id)
    content = await asyncio.to_thread(service.store.files.open, file_id, tenant.organization_id)
    return OpenedFileResponse(content, file.filename)


@router.delete("/{file_id}", responses=answers(FileDeleted))
async def delete_file(file_id: str, service: Service, tenant: CurrentTenant) -> dict[str, Any]:
    """Delete a file that no unfinished job needs."""
    await asyncio.to_thread(service.store.files.delete, file_id, tenant.organization_id)
    return {"id": file_id, "object": "file", "deleted": True}
