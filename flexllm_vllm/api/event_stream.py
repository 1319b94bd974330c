"""Events of a job as server-sent events: those there are, then each one as it happens."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse

from flexllm_vllm.api.service import FinetuningService
from flexllm_vllm.api.tenants import Tenant
from flexllm_vllm.jobs.event_types import JobEvent

# A comment is sent after so long without an event: proxies close connections that are silent.
HEARTBEAT_S = 15.0
# How soon a stream notices that the server is to end, which waits for open connections.
_LOOK_S = 1.0

# Events that are read at once: a long job has more of them than should be in memory.
_AT_ONCE = 1000

EVENT_STREAM = "text/event-stream"


async def stream_events(
    request: Request,
    service: FinetuningService,
    job_id: str,
    tenant: Tenant,
    as_object: Callable[[JobEvent], dict[str, Any]],
) -> StreamingResponse:
    """``data: <event>`` for each event, oldest first, and ``data: [DONE]`` when the job has ended.

    Raises:
        JobNotFoundError: no such job.
    """
    version, start = await asyncio.to_thread(_read, service, job_id, 0, tenant)

    async def follow() -> AsyncIterator[str]:
        seen, (events, seq, ended) = version, start
        last_sent = time.monotonic()
        while not _is_stopping(request):
            for event in events:
                yield f"data: {json.dumps(as_object(event), ensure_ascii=False)}\n\n"
                last_sent = time.monotonic()
            if ended:
                yield "data: [DONE]\n\n"
                return
            more = len(events) == _AT_ONCE
            events = []
            if more or await service.watch.changed(seen, _LOOK_S):
                seen, (events, seq, ended) = await asyncio.to_thread(
                    _read, service, job_id, seq, tenant
                )
            elif time.monotonic() - last_sent >= HEARTBEAT_S:
                yield ": heartbeat\n\n"
                last_sent = time.monotonic()

    # The last one: nginx would keep events back until its buffer is full.
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(follow(), media_type=EVENT_STREAM, headers=headers)


def _read(
    service: FinetuningService, job_id: str, seq: int, tenant: Tenant
) -> tuple[int, tuple[list[JobEvent], int, bool]]:
    version = service.store.data_version()  # first: a change after it is not missed
    return version, service.store.events_since(job_id, seq, _AT_ONCE, tenant.organization_id)


def _is_stopping(request: Request) -> bool:
    """vLLM keeps its HTTP server here."""
    return getattr(getattr(request.app.state, "server", None), "should_exit", False)
