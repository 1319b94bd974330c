"""``/v1/finetuning/adapters``: list, import, export and delete adapters."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from flexllm_vllm.api.adapter_objects import AdapterDeleted, AdapterObject, AdapterPage
from flexllm_vllm.api.adapter_service import adapter_object
from flexllm_vllm.api.background import while_serving
from flexllm_vllm.api.dependencies import Adapters
from flexllm_vllm.api.errors import OpenAIRoute
from flexllm_vllm.api.idempotency import IdempotencyKey
from flexllm_vllm.api.multipart import announced_bytes, read_form
from flexllm_vllm.api.pages import Limit
from flexllm_vllm.api.schemas import ERRORS
from flexllm_vllm.api.tenants import CurrentTenant
from flexllm_vllm.api.workers import run_long

router = APIRouter(
    prefix="/v1/finetuning/adapters",
    route_class=OpenAIRoute,
    tags=["finetuning"],
    responses=ERRORS,
    lifespan=while_serving("finetuning_adapters"),
)

_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "additionalProperties": False,
                    "properties": {
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "A tar.gz of a PEFT folder.",
                        },
                        "suffix": {"type": "string", "maxLength": 64},
                    },
                }
            }
        },
    }
}
_ARCHIVE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A tar.gz of adapter_config.json and adapter_model.safetensors.",
        "content": {"application/gzip": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.post("", openapi_extra=_FORM)
async def import_adapter(
    request: Request,
    service: Adapters,
    tenant: CurrentTenant,
    idempotency_key: IdempotencyKey = None,
) -> AdapterObject:
    """Upload the ``tar.gz`` of a PEFT folder; it is checked against the base model and served."""
    key = idempotency_key
    archive = await asyncio.to_thread(service.begin_archive, announced_bytes(request), tenant, key)
    try:
        form = await read_form(request, "file", ("suffix",), archive.write)
        return adapter_object(
            await run_long(service.import_archive, archive, form.fields.get("suffix"), tenant, key)
        )
    finally:
        await archive.aclose()


@router.get("")
async def list_adapters(
    service: Adapters,
    tenant: CurrentTenant,
    after: str | None = None,
    limit: Limit = 20,
) -> AdapterPage:
    """Adapters of jobs, checkpoints, imports and merges, newest first."""

    def read() -> AdapterPage:
        adapters, has_more = service.store.adapters.page(after, limit, tenant.organization_id)
        return AdapterPage.of([adapter_object(adapter) for adapter in adapters], has_more)

    return await asyncio.to_thread(read)


@router.get("/{name:path}/content", response_class=StreamingResponse, responses=_ARCHIVE)
async def export_adapter(name: str, service: Adapters, tenant: CurrentTenant) -> StreamingResponse:
    """The PEFT folder of an adapter as a ``tar.gz``."""
    pieces = await asyncio.to_thread(service.export, name, tenant)
    filename = name.replace(":", "-").replace("/", "-").encode("ascii", "replace").decode()
    headers = {"Content-Disposition": f'attachment; filename="{filename}.tar.gz"'}
    return StreamingResponse(pieces, media_type="application/gzip", headers=headers)


@router.get("/{name:path}")
async def get_adapter(name: str, service: Adapters, tenant: CurrentTenant) -> AdapterObject:
    """One adapter."""
    return await asyncio.to_thread(lambda: adapter_object(service.get(name, tenant)))


@router.delete("/{name:path}")
async def delete_adapter(name: str, service: Adapters, tenant: CurrentTenant) -> AdapterDeleted:
    """Delete an adapter that no unfinished job or merge needs."""
    await service.delete(name, tenant)
    return AdapterDeleted(id=name)
