"""``/v1/fine_tuning/jobs``."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from flexllm_vllm.api.dependencies import Service
from flexllm_vllm.api.errors import OpenAIRoute, invalid
from flexllm_vllm.api.requests import JobCreateRequest
from flexllm_vllm.api.responses import event_object, job_object, page

router = APIRouter(prefix="/v1/fine_tuning/jobs", route_class=OpenAIRoute, tags=["finetuning"])

Limit = Annotated[int, Query(ge=1, le=100)]


@router.post("")
async def create_job(body: JobCreateRequest, service: Service) -> dict[str, Any]:
    """Queue a job. Its data is tokenized before the answer, so that data errors are answers."""
    return job_object(await asyncio.to_thread(service.create_job, body))


@router.get("")
async def list_jobs(
    request: Request, service: Service, after: str | None = None, limit: Limit = 20
) -> dict[str, Any]:
    """Jobs, newest first."""
    if any(name.startswith("metadata") for name in request.query_params):
        raise invalid("Filtering by metadata is not supported yet", "metadata")
    jobs, has_more = await asyncio.to_thread(service.store.list_jobs, after, limit)
    return page([job_object(job) for job in jobs], has_more)


@router.get("/{job_id}")
async def get_job(job_id: str, service: Service) -> dict[str, Any]:
    """One job."""
    return job_object(await asyncio.to_thread(service.store.get_job, job_id))


@router.post("/{job_id}/cancel")
async def cancel_job(job_id: str, service: Service) -> dict[str, Any]:
    """Cancel: a queued job at once, a running one at its next step."""
    return job_object(await asyncio.to_thread(service.store.request_cancel, job_id))


@router.get("/{job_id}/events")
async def list_events(
    job_id: str, service: Service, after: str | None = None, limit: Limit = 20
) -> dict[str, Any]:
    """Events of a job, newest first."""
    events, has_more = await asyncio.to_thread(service.store.list_events, job_id, after, limit)
    return page([event_object(event) for event in events], has_more)
