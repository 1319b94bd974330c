"""How a route reaches the service of its application."""

from typing import Annotated

from fastapi import Depends, Request

from flexllm_vllm.api.adapter_service import AdapterService
from flexllm_vllm.api.errors import ApiError
from flexllm_vllm.api.service import FinetuningService


def get_service(request: Request) -> FinetuningService:
    """The service that ``FinetuningEndpointPlugin.init_state`` has put into the state.

    Raises:
        ApiError: this server has no engine.
    """
    service: FinetuningService | None = getattr(request.app.state, "finetuning", None)
    if service is None:
        raise ApiError(503, "Finetuning is not available: this server has no engine.")
    return service


def get_adapter_service(request: Request) -> AdapterService:
    """Likewise of adapters and merges.

    Raises:
        ApiError: this server has no engine.
    """
    service: AdapterService | None = getattr(request.app.state, "finetuning_adapters", None)
    if service is None:
        raise ApiError(503, "Adapters are not available: this server has no engine.")
    return service


Service = Annotated[FinetuningService, Depends(get_service)]
Adapters = Annotated[AdapterService, Depends(get_adapter_service)]
