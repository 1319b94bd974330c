"""How a route reaches the service of its application."""

from typing import Annotated

from fastapi import Depends, Request

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


Service = Annotated[FinetuningService, Depends(get_service)]
