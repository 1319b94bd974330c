"""Webhooks by the stock client, received by a real HTTP server that checks them with it."""

import io
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Annotated, Any

import httpx
import openai
import pytest
from fastapi import FastAPI, Header
from openai.types.webhooks import FineTuningJobSucceededWebhookEvent, WebhookEndpoint

from flexllm_vllm.api import webhook_sender
from flexllm_vllm.api.plugin import attach_routes
from flexllm_vllm.api.service import FinetuningService
from flexllm_vllm.api.tenants import Tenant, get_tenant
from flexllm_vllm.api.webhook_sender import WebhookSender
from flexllm_vllm.jobs import JobStore, LoraSpec, NewJob, TrainingSpec
from flexllm_vllm.jobs.names import adapter_name
from tests.api.openai_description import faults

EVENT_TYPES = [f"fine_tuning.job.{end}" for end in ("succeeded", "failed", "cancelled")]


@dataclass
class Receiver:
    """A real HTTP server. It answers with ``answers`` in turn, then with ``status``."""

    url: str = ""
    status: int = 200
    delay_s: float = 0.0
    body: bytes = b"ok"
    body_repeats: int = 1
    bytes_sent: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    answers: list[int] = field(default_factory=list)
    requests: list[tuple[float, str, dict[str, str], bytes]] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)

    def wait(self, count: int) -> list[tuple[float, str, dict[str, str], bytes]]:
        """The requests, as soon as there are so many."""
        wait_for(lambda: len(self.requests) >= count)
        return self.requests


def wait_for(condition: Callable[[], object], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing came"
        time.sleep(0.01)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            with receiver.lock:
                receiver.requests.append((time.time(), self.path, headers, body))
                status = receiver.answers.pop(0) if receiver.answers else receiver.status
            time.sleep(receiver.delay_s)
            self.send_response(status)
            for name, value in receiver.headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(receiver.body) * receiver.body_repeats))
            self.end_headers()
            with suppress(ConnectionError):
                for _ in range(receiver.body_repeats):
                    self.wfile.write(receiver.body)
                    receiver.bytes_sent += len(receiver.body)
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    receiver.url = f"http://127.0.0.1:{server.server_port}/hook?token=in-the-url"
    yield receiver
    server.shutdown()
    server.server_close()


@dataclass
class Process:
    """An API process: its store, and a client of it."""

    store: JobStore
    client: openai.OpenAI
    app: FastAPI


@pytest.fixture
def processes(tmp_path: Path, run_server: Callable[..., Any]) -> Callable[..., Any]:
    """Start API processes on one store, each until its context ends."""

    @contextmanager
    def start(allow_private: bool = True, retry_delays_s: tuple[float, ...] = (0,) * 9) -> Any:
        app = FastAPI()
        attach_routes(app)
        store = JobStore(tmp_path / "store")
        app.state.finetuning = FinetuningService(
            store=store,
            load_tokenizer=lambda: pytest.fail("no tokenizer is needed"),
            base_models=("demo",),
            max_lora_rank=32,
            max_seq_length=256,
            fetch_iterations=lambda _: pytest.fail("no engine is needed"),
            find_adapter=lambda _: None,
            num_layers=30,
        )
        app.state.finetuning_webhooks = WebhookSender(
            store, allow_private=allow_private, retry_delays_s=retry_delays_s, poll_s=0.02
        )
        server, thread, url = run_server(app)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            yield Process(store, client, app)
        server.should_exit = True
        thread.join(timeout=15)
        assert not thread.is_alive()
        store.close()

    return start


@pytest.fixture
def process(processes: Callable[..., Any]) -> Iterator[Process]:
    with processes() as process:
        yield process


@pytest.fixture
def client(process: Process) -> openai.OpenAI:
    return process.client


def end_job(store: JobStore, organization_id: str = "local", end: str = "cancelled") -> str:
    """Run a job to its end in the engine's place; returns its id."""
    file = store.files.create(io.BytesIO(b"{}"), "a", "fine-tune", organization_id=organization_id)
    job_id, _ = store.new_job()
    store.create_job(
        NewJob(
            job_id,
            "demo",
            adapter_name("demo", organization_id, None, job_id),
            file.id,
            LoraSpec(),
            TrainingSpec(batch_size=1, max_seq_length=8, seed=0),
            1,
            {},
            organization_id=organization_id,
        )
    )
    if end == "cancelled":
        store.request_cancel(job_id)
    else:
        assert store.claim_next_job().id == job_id
        if end == "succeeded":
            store.succeed(job_id, store.get_job(job_id).adapter_path)
        else:
            store.fail(job_id, "code", "message")
    return job_id


def create(client: openai.OpenAI, receiver: Receiver, *types: Any) -> Any:
    return client.webhooks.create(
        name="ours", url=receiver.url, event_types=list(types) or EVENT_TYPES
    )


def settled(store: JobStore) -> None:
    """Until nothing waits to be delivered."""
    wait_for(lambda: store.webhooks.deliveries.next_due() is None)


def test_every_method_of_the_client(client: openai.OpenAI, receiver: Receiver) -> None:
    assert client.webhooks.event_types.list().data == EVENT_TYPES
    created = create(client, receiver, EVENT_TYPES[0])
    assert created.signing_secret.startswith("whsec_")
    assert created.signing_secret_hint == f"whsec_...{created.signing_secret[-4:]}"
    assert created.updated_at == created.created_at == pytest.approx(time.time(), abs=5)
    plain = client.webhooks.retrieve(created.id)
    expected = created.to_dict()
    secret = expected.pop("signing_secret")
    assert plain.to_dict() == expected
    WebhookEndpoint.model_validate(plain.to_dict(), strict=True)

    changed = client.webhooks.update(created.id, name="new", event_types=EVENT_TYPES[1:])
    assert (changed.name, changed.event_types, changed.url) == (
        "new",
        EVENT_TYPES[1:],
        receiver.url,
    )
    rotated = client.webhooks.rotate_secret(created.id)
    assert rotated.signing_secret != secret
    assert rotated.signing_secret.startswith("whsec_")

    others = [create(client, receiver) for _ in range(4)]
    newest_first = [other.id for other in reversed(others)] + [created.id]
    assert [endpoint.id for endpoint in client.webhooks.list(limit=2)] == newest_first
    page = client.webhooks.list(after=others[1].id, limit=1)
    assert ([e.id for e in page.data], page.has_more) == ([others[0].id], True)

    deleted = client.webhooks.delete(created.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (
        created.id,
        True,
        "webhook_endpoint.deleted",
    )
    for call in (
        client.webhooks.retrieve,
        client.webhooks.delete,
        client.webhooks.rotate_secret,
        client.webhooks.update,
    ):
        with pytest.raises(openai.NotFoundError) as error:
            call(created.id)
        assert error.value.param == "webhook_endpoint_id"


@pytest.mark.parametrize("end", ["succeeded", "failed", "cancelled"])
def test_the_client_unwraps_a_delivery(process: Process, receiver: Receiver, end: str) -> None:
    endpoint = create(process.client, receiver)
    job_id = end_job(process.store, end=end)
    ((_, path, headers, body),) = receiver.wait(1)
    event = process.client.webhooks.unwrap(body, headers, secret=endpoint.signing_secret)
    assert (event.type, event.data.id) == (f"fine_tuning.job.{end}", job_id)
    assert event.object == "event"
    assert event.created_at == process.store.get_job(job_id).finished_at
    assert faults(json.loads(body), f"WebhookFineTuningJob{end.capitalize()}") == []
    if end == "succeeded":
        FineTuningJobSucceededWebhookEvent.model_validate(json.loads(body), strict=True)
    assert path == "/hook?token=in-the-url"
    assert headers["content-type"] == "application/json"
    with pytest.raises(openai.InvalidWebhookSignatureError):
        process.client.webhooks.unwrap(body + b" ", headers, secret=endpoint.signing_secret)


def test_a_failed_attempt_is_repeated_with_a_fresh_signature(
    processes: Callable[..., Any], receiver: Receiver
) -> None:
    receiver.answers = [500, 302, 404]
    receiver.headers = {"location": "/elsewhere", "set-cookie": "a=b"}
    with processes(retry_delays_s=(1, 0, 0)) as process:
        endpoint = create(process.client, receiver)
        end_job(process.store)
        requests = receiver.wait(4)
        settled(process.store)
        for at, path, headers, body in requests:
            process.client.webhooks.unwrap(body, headers, secret=endpoint.signing_secret)
            assert abs(int(headers["webhook-timestamp"]) - at) < 1.5
            assert path.startswith("/hook")  # the redirect was not followed
            assert "cookie" not in headers
    assert len(requests) == 4
    assert len({headers["webhook-id"] for _, _, headers, _ in requests}) == 1
    assert len({body for *_, body in requests}) == 1
    timestamps = [headers["webhook-timestamp"] for _, _, headers, _ in requests]
    assert timestamps[1] > timestamps[0]
    assert requests[1][2]["webhook-signature"] != requests[0][2]["webhook-signature"]


def test_a_receiver_may_ask_for_time(processes: Callable[..., Any], receiver: Receiver) -> None:
    receiver.answers = [429]
    receiver.headers = {"retry-after": "2"}
    with processes(retry_delays_s=(0,)) as process:
        create(process.client, receiver)
        end_job(process.store)
        first, second = receiver.wait(2)
    assert 1 < second[0] - first[0] < 10


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("120", 120), ("", 0), ("soon", 0), ("-5", 0), ("9" * 30, 999_999_999), ("٣", 0)],
)
def test_retry_after_is_a_number(value: str, seconds: float) -> None:
    assert webhook_sender.retry_after_s({"retry-after": value}) == seconds


def test_retry_after_is_a_date() -> None:
    in_a_minute = formatdate(time.time() + 60, usegmt=True)
    assert 55 < webhook_sender.retry_after_s({"retry-after": in_a_minute}) <= 60
    assert webhook_sender.retry_after_s({"retry-after": formatdate(0, usegmt=True)}) == 0


def test_it_gives_up_in_the_end(processes: Callable[..., Any], receiver: Receiver) -> None:
    receiver.status = 503
    with processes(retry_delays_s=(0, 0)) as process:
        create(process.client, receiver)
        end_job(process.store)
        settled(process.store)
    assert len(receiver.requests) == 3


def test_a_receiver_that_does_not_answer_in_time_is_tried_again(
    processes: Callable[..., Any],
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(webhook_sender, "TIMEOUT_S", 0.3)
    receiver.delay_s = 1
    with processes() as process:
        create(process.client, receiver)
        end_job(process.store)
        receiver.wait(1)
        receiver.delay_s = 0
        receiver.wait(2)
        settled(process.store)
    assert "attempt 1 failed (no answer within" in caplog.text


def test_the_body_of_an_answer_is_not_read(process: Process, receiver: Receiver) -> None:
    receiver.body, receiver.body_repeats = bytes(1 << 20), 1000
    create(process.client, receiver)
    end_job(process.store)
    receiver.wait(1)
    settled(process.store)
    assert receiver.bytes_sent < 100 << 20  # what fits into buffers of the system
    assert len(receiver.requests) == 1


def test_all_attempts_are_made_within_72_hours() -> None:
    assert 48 * 3600 < sum(webhook_sender.RETRY_DELAYS_S) < 72 * 3600


def test_a_restart_between_two_attempts(
    processes: Callable[..., Any], receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.answers = [500]
    with processes(retry_delays_s=(2,)) as process:
        endpoint = create(process.client, receiver)
        end_job(process.store)
        receiver.wait(1)
        wait_for(lambda: "attempt 1 failed" in caplog.text)
    with processes() as process:
        (_, _, first, _), (_, _, second, body) = receiver.wait(2)
        settled(process.store)
        process.client.webhooks.unwrap(body, second, secret=endpoint.signing_secret)
        assert first["webhook-id"] == second["webhook-id"]
        assert int(second["webhook-timestamp"]) > int(first["webhook-timestamp"])


def test_an_attempt_that_the_servers_end_breaks_off_is_begun_again(
    processes: Callable[..., Any], receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook_sender, "STOP_S", 0.1)
    receiver.delay_s = 1
    with processes() as process:
        create(process.client, receiver)
        end_job(process.store)
        receiver.wait(1)
    receiver.delay_s = 0
    with processes() as process:
        receiver.wait(2)
        settled(process.store)
    assert len({headers["webhook-id"] for _, _, headers, _ in receiver.requests}) == 1


def test_two_processes_deliver_each_event_once(
    processes: Callable[..., Any], receiver: Receiver
) -> None:
    receiver.delay_s = 0.02
    with processes() as one, processes() as two:
        create(one.client, receiver)
        create(two.client, receiver)
        jobs = {end_job(store) for store in (one.store, two.store) * 8}
        receiver.wait(32)
        settled(one.store)
        settled(two.store)
    ids = [headers["webhook-id"] for _, _, headers, _ in receiver.requests]
    assert len(ids) == len(set(ids)) == 32
    told = [json.loads(body)["data"]["id"] for *_, body in receiver.requests]
    assert {job: told.count(job) for job in jobs} == dict.fromkeys(jobs, 2)


def test_410_ends_what_waits_for_the_endpoint(process: Process, receiver: Receiver) -> None:
    receiver.answers = [410]
    create(process.client, receiver)
    end_job(process.store)
    settled(process.store)
    assert len(receiver.requests) == 1


def test_after_a_rotation_the_old_secret_signs_if_asked_to(
    process: Process, receiver: Receiver
) -> None:
    endpoint = create(process.client, receiver)
    first = endpoint.signing_secret
    rotate = process.client.webhooks.rotate_secret
    second = rotate(endpoint.id, keep_old_secret_active_for_24_hours=True).signing_secret
    unwrap = process.client.webhooks.unwrap
    end_job(process.store)
    _, _, headers, body = receiver.wait(1)[0]
    for secret in (first, second):
        unwrap(body, headers, secret=secret)
    third = rotate(endpoint.id).signing_secret
    end_job(process.store)
    _, _, headers, body = receiver.wait(2)[1]
    unwrap(body, headers, secret=third)
    for secret in (first, second):
        with pytest.raises(openai.InvalidWebhookSignatureError):
            unwrap(body, headers, secret=secret)


def test_a_test_sends_at_once_and_reports_the_status(
    client: openai.OpenAI, receiver: Receiver, process: Process
) -> None:
    endpoint = create(client, receiver, "fine_tuning.job.failed")
    receiver.answers = [204, 500, 410, 302]
    for index, status in enumerate((204, 500, 410, 302)):
        result = client.webhooks.test(endpoint.id, event_type="fine_tuning.job.succeeded")
        assert result.to_dict() == {
            "object": "webhook_endpoint.test",
            "webhook_endpoint_id": endpoint.id,
            "event_type": "fine_tuning.job.succeeded",
            "status_code": status,
            "success": True,
        }
        _, _, headers, body = receiver.requests[index]
        event = client.webhooks.unwrap(body, headers, secret=endpoint.signing_secret)
        assert event.type == "fine_tuning.job.succeeded"
    assert process.store.webhooks.deliveries.next_due() is None
    client.webhooks.update(endpoint.id, url="http://127.0.0.1:1/nobody")
    with pytest.raises(openai.BadRequestError, match="could not be delivered") as error:
        client.webhooks.test(endpoint.id, event_type="fine_tuning.job.succeeded")
    assert error.value.code == "webhook_test_failed"


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"event_types": ["batch.completed"]}, "event_types.0", "it sends fine_tuning.job.succ"),
        ({"event_types": ["\ud800"]}, "event_types.0", "is no event"),
        ({"event_types": [{}]}, "event_types.0", "is no event"),
        ({"event_types": []}, "event_types", "at least 1"),
        ({"event_types": None}, "event_types", "list"),
        ({"name": ""}, "name", "at least 1"),
        ({"url": "ftp://receiver.example/"}, "url", "begins with https:// or http://"),
        ({"url": "/hook"}, "url", "absolute"),
        ({"url": "https://"}, "url", "absolute"),
        ({"url": "https://a:b@receiver.example/"}, "url", "user name"),
        ({"url": "https://receiver.example:99999/"}, "url", "no valid port"),
        ({"url": "https://receiver.example:0/"}, "url", "no valid port"),
        ({"url": "https://receiver.example:x/"}, "url", "not a valid URL"),
        ({"url": "https://[::1/"}, "url", "not a valid URL"),
        ({"url": "https://" + "a" * 3000}, "url", "2048"),
        ({"secret": "mine"}, "secret", "Unrecognized"),
    ],
)
def test_a_wrong_request_is_refused(
    client: openai.OpenAI, change: dict[str, Any], param: str, message: str
) -> None:
    body = {"name": "x", "url": "https://receiver.example/", "event_types": EVENT_TYPES}
    answer = httpx.post(
        f"{client.base_url}webhook_endpoints",
        content=json.dumps({**body, **change}),
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert message in error["message"]


def test_other_events_of_the_client_are_refused_everywhere(
    client: openai.OpenAI, receiver: Receiver
) -> None:
    endpoint = create(client, receiver)
    with pytest.raises(openai.BadRequestError, match=r"'batch\.failed' is no event"):
        client.webhooks.update(endpoint.id, event_types=["batch.failed"])
    with pytest.raises(openai.BadRequestError, match=r"'batch\.failed' is no event"):
        client.webhooks.test(endpoint.id, event_type="batch.failed")


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "localhost", "[::1]", "10.1.2.3", "192.168.0.1", "172.16.0.1",
        "169.254.169.254", "100.64.0.1", "0.0.0.0", "[::ffff:10.0.0.1]", "[fe80::1]",
        "[fd00::1]", "2130706433", "[64:ff9b::7f00:1]", "224.0.0.1", "[2002:7f00:1::]",
    ],
)  # fmt: skip
def test_private_addresses_are_refused(processes: Callable[..., Any], host: str) -> None:
    with processes(allow_private=False) as process:
        for call in (
            lambda url: process.client.webhooks.create(name="x", url=url, event_types=EVENT_TYPES),
            lambda url: process.client.webhooks.update("whe_x", url=url),
        ):
            with pytest.raises(openai.BadRequestError, match="not public") as error:
                call(f"https://{host}/hook")
            assert (error.value.param, error.value.code) == ("url", "invalid_webhook_url")
        with pytest.raises(openai.BadRequestError, match="begins with https://"):
            process.client.webhooks.create(name="x", url="http://1.1.1.1/", event_types=EVENT_TYPES)


def test_a_name_that_became_private_is_not_called(
    processes: Callable[..., Any], receiver: Receiver
) -> None:
    private = receiver.url.replace("http://127.0.0.1", "https://localhost")
    with processes(allow_private=False, retry_delays_s=()) as process:
        # As if the name had led elsewhere when the endpoint was created.
        endpoint = process.store.webhooks.create("x", private, EVENT_TYPES)
        with pytest.raises(openai.BadRequestError, match="not public"):
            process.client.webhooks.test(endpoint.id, event_type="fine_tuning.job.failed")
        # And an endpoint of the time when http was allowed.
        process.store.webhooks.create("x", receiver.url, EVENT_TYPES)
        end_job(process.store)
        settled(process.store)
    assert receiver.requests == []


def test_endpoints_and_events_stay_in_their_tenant(process: Process, receiver: Receiver) -> None:
    def tenant(authorization: Annotated[str, Header()]) -> Tenant:
        return Tenant(authorization.removeprefix("Bearer "))

    process.app.dependency_overrides[get_tenant] = tenant
    a, b = (process.client.with_options(api_key=key) for key in ("org-a", "org-b"))
    endpoint = create(a, receiver)
    assert list(b.webhooks.list()) == []
    for call in (b.webhooks.retrieve, b.webhooks.delete, b.webhooks.rotate_secret):
        with pytest.raises(openai.NotFoundError):
            call(endpoint.id)
    with pytest.raises(openai.NotFoundError):
        b.webhooks.update(endpoint.id, name="theirs")
    with pytest.raises(openai.NotFoundError):
        b.webhooks.test(endpoint.id, event_type="fine_tuning.job.failed")
    end_job(process.store, "org-b")
    job = end_job(process.store, "org-a")
    settled(process.store)
    assert [json.loads(body)["data"]["id"] for *_, body in receiver.wait(1)] == [job]


def test_secrets_are_in_no_log_and_no_other_answer(
    process: Process, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    receiver.answers = [500]
    endpoint = create(process.client, receiver)
    rotated = process.client.webhooks.rotate_secret(
        endpoint.id, keep_old_secret_active_for_24_hours=True
    )
    end_job(process.store)
    receiver.wait(2)
    settled(process.store)
    base = str(process.client.base_url)
    answers = httpx.get(base + "webhook_endpoints").text
    answers += httpx.get(f"{base}webhook_endpoints/{endpoint.id}").text
    answers += httpx.post(f"{base}webhook_endpoints/{endpoint.id}", json={"name": "n"}).text
    ours = "".join(
        record.getMessage() for record in caplog.records if not record.name.startswith("openai")
    )
    assert "attempt 1 failed (HTTP status 500)" in ours
    for secret in (endpoint.signing_secret, rotated.signing_secret):
        assert secret.removeprefix("whsec_") not in answers
        assert secret.removeprefix("whsec_") not in ours


def test_the_routes_have_schemas(process: Process) -> None:
    schema = process.app.openapi()
    routes = {path: item for path, item in schema["paths"].items() if "webhook" in path}
    assert len(routes) == 5
    for path, item in routes.items():
        for method, operation in item.items():
            answer = operation["responses"]["200"]["content"]["application/json"]["schema"]
            assert "$ref" in answer, (path, method)
            if method == "post":
                assert operation["requestBody"]["content"]["application/json"]["schema"]
