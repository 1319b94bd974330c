"""``/v1/models/{name}``: look at a model, delete an adapter. vLLM itself has the list only."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request

from flexllm_vllm.api.adapter_objects import ModelDeleted, ModelObject
from flexllm_vllm.api.adapters import created_at
from flexllm_vllm.api.dependencies import Adapters
from flexllm_vllm.api.errors import ApiError, OpenAIRoute
from flexllm_vllm.api.schemas import ERRORS
from flexllm_vllm.api.tenants import CurrentTenant
from flexllm_vllm.jobs.errors import AdapterNotFoundError

router = APIRouter(
    prefix="/v1/models", route_class=OpenAIRoute, tags=["finetuning"], responses=ERRORS
)

# What vLLM's list says of every model.
_OWNER = "vllm"


@router.get("/{name:path}")
async def get_model(
    name: str, request: Request, service: Adapters, tenant: CurrentTenant
) -> ModelObject:
    """A base model, or an adapter that is served."""
    adapter = await asyncio.to_thread(service.store.adapters.get, name, tenant.organization_id)
    if adapter is not None and adapter.base_model in service.base_models:
        return ModelObject(id=name, created=adapter.created_at, owned_by=_OWNER)
    root = _root_of(name, request.app.state.openai_serving_models)
    if root is None:
        raise AdapterNotFoundError(name)
    created = await asyncio.to_thread(created_at, root)
    return ModelObject(id=name, created=created, owned_by=_OWNER)


@router.delete("/{name:path}")
async def delete_model(
    name: str, request: Request, service: Adapters, tenant: CurrentTenant
) -> ModelDeleted:
    """Delete an adapter or a checkpoint that no unfinished job or merge needs."""
    try:
        await service.delete(name, tenant)
    except AdapterNotFoundError:
        if _root_of(name, request.app.state.openai_serving_models) is None:
            raise
        raise ApiError(
            403,
            f"The model '{name}' was given to this server by its operator; only adapters that were "
            "trained, imported or merged here can be deleted",
            "model",
            "model_not_deletable",
        ) from None
    return ModelDeleted(id=name)


def _root_of(name: str, models: Any) -> str | None:
    """Where a model lies that the operator has given to vLLM; None if it knows no such model."""
    for base in models.base_model_paths:
        if base.name == name:
            return str(base.model_path)
    lora = models.lora_requests.get(name)
    is_ours = lora is not None and models.lora_requests.created(name) is not None
    return None if lora is None or is_ours else str(lora.lora_path)
