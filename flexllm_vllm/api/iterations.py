"""``/v1/finetuning/iterations``: what the engine's last iterations held."""

from typing import Annotated, Any

from fastapi import APIRouter, Query

from flexllm_vllm.api.dependencies import Service
from flexllm_vllm.api.errors import OpenAIRoute
from flexllm_vllm.api.schemas import ERRORS, FinetuningIterations, answers

router = APIRouter(
    prefix="/v1/finetuning", route_class=OpenAIRoute, tags=["finetuning"], responses=ERRORS
)


@router.get("/iterations", responses=answers(FinetuningIterations))
async def list_iterations(
    service: Service, last: Annotated[int, Query(ge=1, le=10_000)] = 100
) -> dict[str, Any]:
    """Tokens of inference and finetuning, and the time, of each iteration; oldest first."""
    return {"object": "list", "data": await service.iterations(last)}
