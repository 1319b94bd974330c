"""Events of a job as server-sent events."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from openai.types.fine_tuning import FineTuningJobEvent

from flexllm_vllm.api import event_stream
from flexllm_vllm.jobs import JobStore

Upload = Callable[..., str]


@pytest.fixture
def job_id(client: openai.OpenAI, upload: Upload) -> str:
    return client.fine_tuning.jobs.create(model="demo", training_file=upload()).id


@pytest.fixture
def engine(server: Any) -> Iterator[JobStore]:
    """The store as another process has it."""
    with JobStore(server.store.root) as engine:
        yield engine


def data_of(lines: Iterator[str]) -> Iterator[str]:
    return (line.removeprefix("data: ") for line in lines if line.startswith("data: "))


@pytest.mark.parametrize("path", ["/v1/fine_tuning/jobs", "/v1/fine_tunes"])
def test_events_come_as_they_happen_until_the_job_has_ended(
    server: Any, job_id: str, engine: JobStore, path: str
) -> None:
    url = f"{server.url}{path}/{job_id}/events?stream=true"
    with httpx.stream("GET", url) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        data = data_of(answer.iter_lines())
        assert json.loads(next(data))["message"] == f"Created fine-tuning job: {job_id}"
        assert [json.loads(next(data))["level"] for _ in range(2)] == ["info", "info"]
        job = engine.claim_next_job()
        assert job is not None
        assert json.loads(next(data))["message"] == "Fine-tuning job started"
        engine.record_step(job_id, 1, {"train_loss": 0.5})
        assert json.loads(next(data))["message"].startswith("Step 1/")
        engine.succeed(job_id, job.adapter_path)
        rest = list(data)
    assert json.loads(rest[-2])["message"] == "The job has successfully completed"
    assert rest[-1] == "[DONE]"
    with httpx.stream("GET", url) as answer:  # all at once, now
        again = list(data_of(answer.iter_lines()))
    assert (len(again), again[-3:]) == (8, rest[-3:])


def test_the_objects_are_those_of_the_list(server: Any, client: openai.OpenAI, job_id: str) -> None:
    client.fine_tuning.jobs.cancel(job_id)
    listed = [event.to_dict() for event in client.fine_tuning.jobs.list_events(job_id)]
    answer = httpx.get(f"{server.url}/v1/fine_tuning/jobs/{job_id}/events?stream=true")
    *events, done = (json.loads(d) if d[0] == "{" else d for d in data_of(answer.iter_lines()))
    assert (events[::-1], done) == (listed, "[DONE]")
    for event in events:
        FineTuningJobEvent.model_validate(event, strict=True)
    legacy = httpx.get(f"{server.url}/v1/fine_tunes/{job_id}/events?stream=true")
    first = json.loads(next(data_of(legacy.iter_lines())))
    assert first["object"] == "fine-tune-event"


def test_many_events_come_in_order_and_once(
    server: Any, client: openai.OpenAI, job_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_stream, "_AT_ONCE", 3)
    server.store.claim_next_job()
    for step in range(5):
        server.store.record_step(job_id, step, {"train_loss": 1.0})
    server.store.fail(job_id, "nan_loss", "The loss is not a number")
    listed = [event.id for event in client.fine_tuning.jobs.list_events(job_id)]
    answer = httpx.get(f"{server.url}/v1/fine_tuning/jobs/{job_id}/events?stream=true")
    *events, done = data_of(answer.iter_lines())
    assert [json.loads(event)["id"] for event in events] == listed[::-1]
    assert (len(events), done) == (10, "[DONE]")


def test_an_unknown_job_is_a_404(server: Any) -> None:
    for path in ("fine_tuning/jobs", "fine_tunes"):
        answer = httpx.get(f"{server.url}/v1/{path}/ftjob-none/events?stream=true")
        assert answer.status_code == 404
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_stream_ends_when_the_client_goes_away(server: Any, job_id: str) -> None:
    url = f"{server.url}/v1/fine_tuning/jobs/{job_id}/events?stream=true"
    with httpx.stream("GET", url) as answer:
        lines = answer.iter_lines()  # kept: httpx closes the stream of one that is collected
        next(lines)
        _until(lambda: server.service.watch.waiting == 1)
    _until(lambda: server.service.watch.waiting == 0)
    time.sleep(1.1)  # longer than a stream would rest
    assert server.service.watch.waiting == 0


def test_a_silent_stream_has_heartbeats(
    server: Any, job_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_stream, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(event_stream, "_LOOK_S", 0.1)
    url = f"{server.url}/v1/fine_tuning/jobs/{job_id}/events?stream=true"
    with httpx.stream("GET", url) as answer:
        assert next(line for line in answer.iter_lines() if line.startswith(":")) == ": heartbeat"


def test_a_stream_does_not_keep_the_server_from_ending(server: Any, job_id: str) -> None:
    server.app.state.server = SimpleNamespace(should_exit=False)
    url = f"{server.url}/v1/fine_tuning/jobs/{job_id}/events?stream=true"
    with httpx.stream("GET", url) as answer:
        lines = answer.iter_lines()
        next(lines)
        threading.Timer(0.1, lambda: setattr(server.app.state.server, "should_exit", True)).start()
        assert "[DONE]" not in "".join(lines)


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
