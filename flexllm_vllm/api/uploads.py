"""``/v1/uploads``: files in parts."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request

from flexllm_vllm.api.dependencies import Service
from flexllm_vllm.api.errors import OpenAIRoute
from flexllm_vllm.api.multipart import announced_bytes, read_form
from flexllm_vllm.api.responses import upload_object, upload_part_object
from flexllm_vllm.api.schemas import ERRORS, answers
from flexllm_vllm.api.tenants import CurrentTenant
from flexllm_vllm.api.upload_requests import UploadCompleteRequest, UploadCreateRequest
from flexllm_vllm.api.upload_schemas import UploadObject, UploadPartObject
from flexllm_vllm.api.workers import run_long

router = APIRouter(
    prefix="/v1/uploads", route_class=OpenAIRoute, tags=["finetuning"], responses=ERRORS
)

_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["data"],
                    "additionalProperties": False,
                    "properties": {"data": {"type": "string", "format": "binary"}},
                }
            }
        },
    }
}


@router.post("", responses=answers(UploadObject))
async def create_upload(
    body: UploadCreateRequest, service: Service, tenant: CurrentTenant
) -> dict[str, Any]:
    """Announce a file whose parts follow within an hour."""
    return upload_object(await asyncio.to_thread(service.files.create_upload, body, tenant))


@router.post("/{upload_id}/parts", openapi_extra=_FORM, responses=answers(UploadPartObject))
async def create_part(
    upload_id: str, request: Request, service: Service, tenant: CurrentTenant
) -> dict[str, Any]:
    """Add a part of at most 64 MiB; several may come at once."""
    files = service.files
    announced = announced_bytes(request)
    content = await asyncio.to_thread(files.begin_part, upload_id, announced, tenant)
    try:
        await read_form(request, "data", (), content.write)
        return upload_part_object(await asyncio.to_thread(files.create_part, upload_id, content))
    finally:
        await content.aclose()


@router.post("/{upload_id}/complete", responses=answers(UploadObject))
async def complete_upload(
    upload_id: str, body: UploadCompleteRequest, service: Service, tenant: CurrentTenant
) -> dict[str, Any]:
    """Put the parts together, in the order of ``part_ids``; every line of the file is checked."""
    complete = service.files.complete_upload
    return upload_object(*await run_long(complete, upload_id, body, tenant))


@router.post("/{upload_id}/cancel", responses=answers(UploadObject))
async def cancel_upload(upload_id: str, service: Service, tenant: CurrentTenant) -> dict[str, Any]:
    """Cancel: the parts are removed."""
    cancel = service.store.uploads.cancel
    return upload_object(await asyncio.to_thread(cancel, upload_id, tenant.organization_id))
