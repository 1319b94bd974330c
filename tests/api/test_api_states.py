"""docs/job-states.md: each cell of the table, over HTTP."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from sqlalchemy import update

from flexllm_vllm.jobs import JobStatus, JobStore, schema

Upload = Callable[..., str]
DOCUMENT = Path(__file__).parents[2] / "docs" / "job-states.md"


def table() -> list[tuple[str, str, str]]:
    """State, action and result of each cell."""
    lines = [line.strip("| ") for line in DOCUMENT.read_text().splitlines() if line[:2] == "| "]
    header, _, *rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    return [
        (row[0].strip("`"), action, result)
        for row in rows
        for action, result in zip(header[1:], row[1:], strict=True)
    ]


def bring_to(store: JobStore, job_id: str, state: str) -> None:
    """The engine's way to a state."""
    if state == "validating_files":  # the engine never sees it
        with store._database.write() as connection:
            of_job = schema.jobs.c.id == job_id
            connection.execute(update(schema.jobs).where(of_job).values(status=state))
        return
    if state == "queued":
        return
    job = store.claim_next_job()
    assert job is not None
    match state:
        case "paused":
            store.request_pause(job_id)
            store.paused(job_id, 0)
        case "succeeded":
            store.succeed(job_id, job.adapter_path)
        case "failed":
            store.fail(job_id, "nan_loss", "The loss is not a number")
        case "cancelled":
            store.request_cancel(job_id)
            store.cancelled(job_id)


def test_the_table_is_complete() -> None:
    cells = {(state, action) for state, action, _ in table()}
    actions = ("cancel", "pause", "resume", "delete its file")
    assert cells == {(state.value, action) for state in JobStatus for action in actions}


@pytest.mark.parametrize(("state", "action", "result"), table())
def test_a_cell(
    server: Any, client: openai.OpenAI, upload: Upload, state: str, action: str, result: str
) -> None:
    file_id = upload()
    job_id = client.fine_tuning.jobs.create(model="demo", training_file=file_id).id
    bring_to(server.store, job_id, state)
    assert client.fine_tuning.jobs.retrieve(job_id).status == state

    if action == "delete its file":
        answer = httpx.delete(f"{server.url}/v1/files/{file_id}")
    else:
        answer = httpx.post(f"{server.url}/v1/fine_tuning/jobs/{job_id}/{action}")
    body = answer.json()

    if refusal := re.fullmatch(r"(\d+) `(\w+)`", result):
        assert (str(answer.status_code), body["error"]["code"]) == refusal.groups()
        assert client.fine_tuning.jobs.retrieve(job_id).status == state
        return
    assert answer.status_code == 200
    if result == "deleted":
        assert body["deleted"]
        return
    now, *then = re.findall(r"`(\w+)`", result)
    assert body["status"] == now
    if then == ["cancelled"]:
        assert server.store.cancel_requested_jobs() == {job_id}
        server.store.cancelled(job_id)
    elif then == ["paused"]:
        assert server.store.pause_requested_jobs() == {job_id}
        server.store.paused(job_id, 0)
    assert client.fine_tuning.jobs.retrieve(job_id).status == (then or [now])[0]


def test_a_pause_is_taken_back_and_a_cancellation_is_not(
    server: Any, client: openai.OpenAI, upload: Upload
) -> None:
    jobs = client.fine_tuning.jobs
    job_id = jobs.create(model="demo", training_file=upload()).id
    server.store.claim_next_job()
    jobs.pause(job_id)
    assert jobs.resume(job_id).status == "running"
    assert server.store.pause_requested_jobs() == set()
    jobs.cancel(job_id)
    assert jobs.cancel(job_id).status == "running"
    with pytest.raises(openai.BadRequestError) as caught:
        jobs.pause(job_id)
    assert caught.value.code == "invalid_job_state"
