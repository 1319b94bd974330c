"""What OpenAI's client can call and this server does not do: an answer that says so."""

from typing import Any, NoReturn

from fastapi import APIRouter

from flexllm_vllm.api.errors import OpenAIRoute, invalid
from flexllm_vllm.api.schemas import ERRORS

router = APIRouter(
    prefix="/v1/fine_tuning", route_class=OpenAIRoute, tags=["finetuning"], responses=ERRORS
)

_PERMISSIONS = "/checkpoints/{checkpoint:path}/permissions"


@router.post("/alpha/graders/run")
@router.post("/alpha/graders/validate")
async def graders() -> dict[str, Any]:
    """Graders belong to reinforcement fine-tuning, which this server does not do."""
    _unsupported("Graders are not supported: they belong to reinforcement fine-tuning")


@router.get(_PERMISSIONS)
@router.post(_PERMISSIONS)
@router.get(_PERMISSIONS + "/{permission_id}")
@router.delete(_PERMISSIONS + "/{permission_id}")
async def checkpoint_permissions(checkpoint: str) -> dict[str, Any]:
    """There are no projects between which a checkpoint could be shared."""
    _unsupported(
        "Permissions of checkpoints are not supported: every key of an organization may use its "
        "checkpoints, and no other key may"
    )


def _unsupported(message: str) -> NoReturn:
    raise invalid(message, code="unsupported")
