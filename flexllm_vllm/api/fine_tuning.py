"""``/v1/fine_tuning/jobs``."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response

from flexllm_vllm.api.background import while_serving
from flexllm_vllm.api.dependencies import Service
from flexllm_vllm.api.errors import OpenAIRoute
from flexllm_vllm.api.event_stream import stream_events
from flexllm_vllm.api.idempotency import IdempotencyKey
from flexllm_vllm.api.pages import Limit
from flexllm_vllm.api.requests import JobCreateRequest
from flexllm_vllm.api.responses import checkpoint_object, event_object, job_object, page
from flexllm_vllm.api.schemas import (
    ERRORS,
    FineTuningJob,
    FineTuningJobCheckpointPage,
    FineTuningJobEventPage,
    FineTuningJobPage,
    answers,
    answers_or_streams,
)
from flexllm_vllm.api.tenants import CurrentTenant

router = APIRouter(
    prefix="/v1/fine_tuning/jobs",
    route_class=OpenAIRoute,
    tags=["finetuning"],
    responses=ERRORS,
    lifespan=while_serving("finetuning_tracking"),
)

_METADATA = {
    "parameters": [
        {
            "name": "metadata",
            "in": "query",
            "style": "deepObject",
            "explode": True,
            "description": "Only jobs that have these pairs; `metadata=null`: jobs without any.",
            "schema": {"type": "object", "additionalProperties": {"type": "string"}},
        }
    ]
}


@router.post("", responses=answers(FineTuningJob))
async def create_job(
    body: JobCreateRequest,
    service: Service,
    tenant: CurrentTenant,
    idempotency_key: IdempotencyKey = None,
) -> dict[str, Any]:
    """Queue a job. Its data is tokenized before the answer, so that data errors are answers."""
    return job_object(await asyncio.to_thread(service.create_job, body, tenant, idempotency_key))


@router.get("", responses=answers(FineTuningJobPage), openapi_extra=_METADATA)
async def list_jobs(
    request: Request,
    service: Service,
    tenant: CurrentTenant,
    after: str | None = None,
    limit: Limit = 20,
) -> dict[str, Any]:
    """Jobs, newest first. ``metadata[key]=value`` asks for jobs that have this pair,
    ``metadata=null`` for jobs without metadata."""
    jobs, has_more = await asyncio.to_thread(
        service.store.list_jobs, after, limit, tenant.organization_id, _metadata_filter(request)
    )
    return page([job_object(job) for job in jobs], has_more)


@router.get("/{job_id}", responses=answers(FineTuningJob))
async def get_job(job_id: str, service: Service, tenant: CurrentTenant) -> dict[str, Any]:
    """One job."""
    job = await asyncio.to_thread(service.store.get_job, job_id, tenant.organization_id)
    return job_object(job)


@router.post("/{job_id}/cancel", responses=answers(FineTuningJob))
async def cancel_job(job_id: str, service: Service, tenant: CurrentTenant) -> dict[str, Any]:
    """Cancel: a queued or paused job at once, a running one at its next step."""
    job = await asyncio.to_thread(service.store.request_cancel, job_id, tenant.organization_id)
    return job_object(job)


@router.post("/{job_id}/pause", responses=answers(FineTuningJob))
async def pause_job(job_id: str, service: Service, tenant: CurrentTenant) -> dict[str, Any]:
    """Pause: a queued job at once, a running one at its next step, with a checkpoint."""
    job = await asyncio.to_thread(service.store.request_pause, job_id, tenant.organization_id)
    return job_object(job)


@router.post("/{job_id}/resume", responses=answers(FineTuningJob))
async def resume_job(job_id: str, service: Service, tenant: CurrentTenant) -> dict[str, Any]:
    """Queue a paused job again; it continues where it was."""
    job = await asyncio.to_thread(service.store.resume, job_id, tenant.organization_id)
    return job_object(job)


@router.get(
    "/{job_id}/events",
    response_model=None,
    responses=answers_or_streams(FineTuningJobEventPage),
)
async def list_events(
    request: Request,
    job_id: str,
    service: Service,
    tenant: CurrentTenant,
    after: str | None = None,
    limit: Limit = 20,
    stream: bool = False,
) -> dict[str, Any] | Response:
    """Events of a job, newest first. ``stream=true``: all of them as server-sent events, oldest
    first, then each new one until the job has ended."""
    if stream:
        return await stream_events(request, service, job_id, tenant, event_object)
    events, has_more = await asyncio.to_thread(
        service.store.list_events, job_id, after, limit, tenant.organization_id
    )
    return page([event_object(event) for event in events], has_more)


@router.get("/{job_id}/checkpoints", responses=answers(FineTuningJobCheckpointPage))
async def list_checkpoints(
    job_id: str,
    service: Service,
    tenant: CurrentTenant,
    after: str | None = None,
    limit: Limit = 10,
) -> dict[str, Any]:
    """Checkpoints of a job that can be named as a model, newest first."""
    checkpoints, has_more = await asyncio.to_thread(
        service.store.list_checkpoints, job_id, after, limit, tenant.organization_id
    )
    return page([checkpoint_object(checkpoint) for checkpoint in checkpoints], has_more)


def _metadata_filter(request: Request) -> dict[str, str] | None:
    """``metadata[key]=value``, as the openai client writes it."""
    query = request.query_params
    if query.get("metadata") in ("null", ""):
        return {}
    pairs = {
        name.removeprefix("metadata[").removesuffix("]"): value
        for name, value in query.items()
        if name.startswith("metadata[") and name.endswith("]")
    }
    return pairs or None
