"""``/v1/finetuning/adapters/merge`` and ``merges``: new adapters from several."""

import asyncio

from fastapi import APIRouter

from flexllm_vllm.api.adapter_objects import (
    MergeCreateRequest,
    MergeObject,
    MergePage,
    merge_object,
)
from flexllm_vllm.api.dependencies import Adapters
from flexllm_vllm.api.errors import OpenAIRoute
from flexllm_vllm.api.idempotency import IdempotencyKey
from flexllm_vllm.api.pages import Limit
from flexllm_vllm.api.schemas import ERRORS
from flexllm_vllm.api.tenants import CurrentTenant

router = APIRouter(
    prefix="/v1/finetuning/adapters", route_class=OpenAIRoute, tags=["finetuning"], responses=ERRORS
)


@router.post("/merge")
async def create_merge(
    body: MergeCreateRequest,
    service: Adapters,
    tenant: CurrentTenant,
    idempotency_key: IdempotencyKey = None,
) -> MergeObject:
    """Merge adapters into a new one, in the background, as
    ``peft.LoraModel.add_weighted_adapter`` does."""
    return merge_object(
        await asyncio.to_thread(service.create_merge, body, tenant, idempotency_key)
    )


@router.get("/merges")
async def list_merges(
    service: Adapters,
    tenant: CurrentTenant,
    after: str | None = None,
    limit: Limit = 20,
) -> MergePage:
    """Merges, newest first."""
    merges, has_more = await asyncio.to_thread(
        service.store.merges.page, after, limit, tenant.organization_id
    )
    return MergePage.of([merge_object(merge) for merge in merges], has_more)


@router.get("/merges/{merge_id}")
async def get_merge(merge_id: str, service: Adapters, tenant: CurrentTenant) -> MergeObject:
    """One merge."""
    return merge_object(
        await asyncio.to_thread(service.store.merges.get, merge_id, tenant.organization_id)
    )
