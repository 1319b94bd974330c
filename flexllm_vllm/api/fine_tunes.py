"""``/v1/fine_tunes``: the same jobs in the form of OpenAI's API before ``fine_tuning/jobs``.

OpenAI documented that path; its last client for it, 0.28, calls ``/v1/fine-tunes``.
"""

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response

from flexllm_vllm.api.dependencies import Service
from flexllm_vllm.api.errors import OpenAIRoute
from flexllm_vllm.api.event_stream import stream_events
from flexllm_vllm.api.idempotency import IdempotencyKey
from flexllm_vllm.api.requests import Hyperparameters, JobCreateRequest, LegacyJobCreateRequest
from flexllm_vllm.api.responses import legacy_event_object, legacy_job_object
from flexllm_vllm.api.schemas import (
    ERRORS,
    FineTune,
    FineTuneEventList,
    FineTuneList,
    answers,
    answers_or_streams,
)
from flexllm_vllm.api.service import FinetuningService
from flexllm_vllm.api.tenants import CurrentTenant, Tenant
from flexllm_vllm.jobs.errors import FileNotStoredError
from flexllm_vllm.jobs.event_types import JobEvent
from flexllm_vllm.jobs.file_types import StoredFile
from flexllm_vllm.jobs.types import FinetuningJob

_routes = APIRouter(route_class=OpenAIRoute, tags=["finetuning"], responses=ERRORS)

# The old API has no pages.
_ALL = 1_000_000


@_routes.post("", responses=answers(FineTune))
async def create_fine_tune(
    body: LegacyJobCreateRequest,
    service: Service,
    tenant: CurrentTenant,
    idempotency_key: IdempotencyKey = None,
) -> dict[str, Any]:
    """Queue a job."""
    request = JobCreateRequest(
        model=body.model or service.base_models[0],
        training_file=body.training_file,
        validation_file=body.validation_file,
        suffix=body.suffix,
        hyperparameters=Hyperparameters(
            n_epochs=body.n_epochs,
            batch_size=body.batch_size,
            learning_rate_multiplier=body.learning_rate_multiplier,
        ),
    )
    job = await asyncio.to_thread(service.create_job, request, tenant, idempotency_key)
    return await asyncio.to_thread(_with_events, service, job, tenant)


@_routes.get("", responses=answers(FineTuneList))
async def list_fine_tunes(service: Service, tenant: CurrentTenant) -> dict[str, Any]:
    """All jobs, oldest first."""
    return {"object": "list", "data": await asyncio.to_thread(_all, service, tenant)}


@_routes.get("/{job_id}", responses=answers(FineTune))
async def get_fine_tune(job_id: str, service: Service, tenant: CurrentTenant) -> dict[str, Any]:
    """One job with its events."""
    job = await asyncio.to_thread(service.store.get_job, job_id, tenant.organization_id)
    return await asyncio.to_thread(_with_events, service, job, tenant)


@_routes.post("/{job_id}/cancel", responses=answers(FineTune))
async def cancel_fine_tune(job_id: str, service: Service, tenant: CurrentTenant) -> dict[str, Any]:
    """Cancel: a queued job at once, a running one at its next step."""
    job = await asyncio.to_thread(service.store.request_cancel, job_id, tenant.organization_id)
    return await asyncio.to_thread(_with_events, service, job, tenant)


@_routes.get(
    "/{job_id}/events",
    response_model=None,
    responses=answers_or_streams(FineTuneEventList),
)
async def list_fine_tune_events(
    request: Request, job_id: str, service: Service, tenant: CurrentTenant, stream: bool = False
) -> dict[str, Any] | Response:
    """Events of a job, oldest first. ``stream=true``: as server-sent events, also those to come."""
    if stream:
        return await stream_events(request, service, job_id, tenant, legacy_event_object)
    events = await asyncio.to_thread(_events, service, job_id, tenant)
    return {"object": "list", "data": [legacy_event_object(event) for event in events]}


def _all(service: FinetuningService, tenant: Tenant) -> list[dict[str, Any]]:
    jobs, _ = service.store.list_jobs(limit=_ALL, organization_id=tenant.organization_id)
    files = {file.id: file for file in _files(service, tenant)}
    return [legacy_job_object(job, files.get(job.training_file)) for job in reversed(jobs)]


def _files(service: FinetuningService, tenant: Tenant) -> list[StoredFile]:
    files, _ = service.store.files.page(limit=_ALL, organization_id=tenant.organization_id)
    return files


def _with_events(service: FinetuningService, job: FinetuningJob, tenant: Tenant) -> dict[str, Any]:
    return legacy_job_object(job, _training_file(service, job), _events(service, job.id, tenant))


def _training_file(service: FinetuningService, job: FinetuningJob) -> StoredFile | None:
    try:
        return service.store.files.get(job.training_file)
    except FileNotStoredError:
        return None  # a finished job outlives its file


def _events(service: FinetuningService, job_id: str, tenant: Tenant) -> list[JobEvent]:
    events, _ = service.store.list_events(
        job_id, limit=_ALL, organization_id=tenant.organization_id
    )
    return events[::-1]


router = APIRouter()
router.include_router(_routes, prefix="/v1/fine_tunes")
router.include_router(_routes, prefix="/v1/fine-tunes", include_in_schema=False)
