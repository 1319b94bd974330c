"""Webhook endpoints and deliveries in the store."""

import json
import logging
import time
from collections.abc import Callable

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.exc import IntegrityError

from flexllm_vllm.jobs import (
    CursorNotFoundError,
    FinetuningJob,
    JobStore,
    WebhookEndpoint,
    WebhookEndpointNotFoundError,
    WebhookLimitError,
    schema,
    webhook_deliveries,
    webhooks,
)
from flexllm_vllm.jobs.webhook_deliveries import EVENT_TYPES

AddJob = Callable[..., FinetuningJob]
URL = "https://receiver.example/hook"


def add_endpoint(store: JobStore, *event_types: str, organization: str = "local") -> str:
    types = event_types or EVENT_TYPES
    return store.webhooks.create("ours", URL, types, organization_id=organization).id


def deliveries(store: JobStore) -> list[dict[str, object]]:
    with store._database.read() as connection:
        rows = connection.execute(select(schema.webhook_deliveries)).all()
    return [dict(row._mapping) for row in rows]


def set_due(store: JobStore, at: int) -> None:
    with store._database.write() as connection:
        connection.execute(update(schema.webhook_deliveries).values(next_attempt_at=at))


def expire_secrets(store: JobStore) -> None:
    """24 hours later."""
    with store._database.write() as connection:
        table = schema.webhook_endpoints
        row = connection.execute(select(table)).one()
        past = [{**s, "expires_at": s["expires_at"] and int(time.time())} for s in row.secrets]
        connection.execute(update(table).values(secrets=past))


def test_each_way_a_job_ends_is_told(store: JobStore, add_job: AddJob) -> None:
    endpoint = add_endpoint(store)
    jobs = [add_job() for _ in range(5)]
    store.succeed(store.claim_next_job().id, jobs[0].adapter_path)
    store.fail(store.claim_next_job().id, "code", "message")
    store.claim_next_job()
    store.cancelled(jobs[2].id)
    store.request_cancel(jobs[3].id)
    store.claim_next_job()
    with JobStore(store.root) as restarted:
        restarted.requeue_interrupted(max_attempts=1)
    claimed = store.webhooks.deliveries.claim(limit=10)
    ends = ["succeeded", "failed", "cancelled", "cancelled", "failed"]
    assert [d.event_type for d in claimed] == [f"fine_tuning.job.{end}" for end in ends]
    for job, delivery in zip(jobs, claimed, strict=True):
        event = json.loads(delivery.body)
        assert event.pop("id").startswith("evt_")
        assert event == {
            "object": "event",
            "created_at": store.get_job(job.id).finished_at,
            "type": delivery.event_type,
            "data": {"id": job.id},
        }
        assert (delivery.endpoint_id, delivery.url, delivery.attempt) == (endpoint, URL, 1)
    assert len({d.id for d in claimed}) == 5


def test_only_subscribers_of_the_jobs_organization_are_told(
    store: JobStore, add_job: AddJob
) -> None:
    add_endpoint(store, "fine_tuning.job.succeeded")
    add_endpoint(store, organization="org-b")
    wanted = {add_endpoint(store, "fine_tuning.job.cancelled") for _ in range(2)}
    store.request_cancel(add_job().id)
    rows = deliveries(store)
    assert {row["endpoint_id"] for row in rows} == wanted
    assert len({row["body"]["id"] for row in rows}) == 1
    assert len({row["id"] for row in rows}) == 2


def test_the_end_of_a_job_and_its_deliveries_are_one_transaction(
    store: JobStore, add_job: AddJob
) -> None:
    add_endpoint(store)
    job = add_job()
    with store._database.write() as connection:
        connection.execute(
            text(
                "CREATE TRIGGER no BEFORE INSERT ON webhook_deliveries "
                "BEGIN SELECT RAISE(ABORT, 'no'); END"
            )
        )
    with pytest.raises(IntegrityError):
        store.request_cancel(job.id)
    assert store.get_job(job.id) == job


def test_a_delivery_is_claimed_once_until_its_lease_ends(store: JobStore, add_job: AddJob) -> None:
    add_endpoint(store)
    store.request_cancel(add_job().id)
    queue = store.webhooks.deliveries
    with JobStore(store.root) as other:
        (lost,) = queue.claim(limit=5, lease_s=100)
        assert other.webhooks.deliveries.claim(limit=5) == []
        assert queue.next_due() > time.time() + 90
        with store._database.write() as connection:
            connection.execute(update(schema.webhook_deliveries).values(claimed_until=0))
        (again,) = other.webhooks.deliveries.claim(limit=5)
        assert (again.id, again.body, again.attempt) == (lost.id, lost.body, 2)
        queue.retry(lost, "too late to say so", 0)
        assert queue.claim(limit=5) == []
        other.webhooks.deliveries.delivered(again)
    assert queue.next_due() is None
    assert deliveries(store)[0]["delivered_at"]


def test_a_retry_waits_over_a_restart(store: JobStore, add_job: AddJob) -> None:
    add_endpoint(store)
    store.request_cancel(add_job().id)
    (first,) = store.webhooks.deliveries.claim(limit=1)
    store.webhooks.deliveries.retry(first, "HTTP status 500", 300)
    with JobStore(store.root) as restarted:
        queue = restarted.webhooks.deliveries
        assert queue.next_due() == pytest.approx(time.time() + 300, abs=5)
        assert queue.claim(limit=1) == []
        set_due(restarted, 0)
        (second,) = queue.claim(limit=1)
        assert (second.id, second.attempt) == (first.id, 2)
        queue.release(second)
        assert queue.claim(limit=1)[0].attempt == 2


def test_an_endpoint_that_is_gone_gets_nothing_that_waits(store: JobStore, add_job: AddJob) -> None:
    gone, other = add_endpoint(store), add_endpoint(store)
    store.request_cancel(add_job().id)
    store.request_cancel(add_job().id)
    store.webhooks.deliveries.give_up_endpoint(gone, "410")
    assert {d.endpoint_id for d in store.webhooks.deliveries.claim(limit=9)} == {other}
    store.request_cancel(add_job().id)
    assert {d.endpoint_id for d in store.webhooks.deliveries.claim(limit=9)} == {gone, other}


def test_a_deleted_endpoint_takes_its_deliveries_along(store: JobStore, add_job: AddJob) -> None:
    endpoint = add_endpoint(store)
    store.request_cancel(add_job().id)
    (claimed,) = store.webhooks.deliveries.claim(limit=1)
    store.webhooks.delete(endpoint)
    store.webhooks.deliveries.retry(claimed, "HTTP status 500", 1)
    assert deliveries(store) == []


def test_old_secrets_sign_as_long_as_was_asked(store: JobStore) -> None:
    endpoint = add_endpoint(store)
    first = store.webhooks.get(endpoint).secrets
    both = store.webhooks.rotate_secret(endpoint, keep_old=True).secrets
    assert both[1:] == first
    three = store.webhooks.rotate_secret(endpoint, keep_old=True).secrets
    assert three[1:] == both
    expire_secrets(store)
    assert store.webhooks.get(endpoint).secrets == three[:1]
    alone = store.webhooks.rotate_secret(endpoint).secrets
    assert len(alone) == 1
    assert alone[0] not in three
    for _ in range(webhooks.MAX_SECRETS - 1):
        store.webhooks.rotate_secret(endpoint, keep_old=True)
    with pytest.raises(WebhookLimitError, match="without keeping"):
        store.webhooks.rotate_secret(endpoint, keep_old=True)
    assert len(store.webhooks.rotate_secret(endpoint).secrets) == 1


def test_updates_that_change_nothing_leave_the_time(store: JobStore) -> None:
    endpoint = store.webhooks.get(add_endpoint(store))
    with store._database.write() as connection:
        connection.execute(update(schema.webhook_endpoints).values(created_at=1, updated_at=1))
    same = store.webhooks.update(endpoint.id, endpoint.name, URL, endpoint.event_types)
    assert same.updated_at == 1
    changed = store.webhooks.update(endpoint.id, url="https://receiver.example/2")
    assert changed.updated_at > 1
    assert (changed.name, changed.created_at, changed.secrets) == ("ours", 1, endpoint.secrets)


def test_endpoints_belong_to_a_tenant(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = add_endpoint(store, organization="a"), add_endpoint(store, organization="b")
    assert [e.id for e in store.webhooks.page(organization_id="a")[0]] == [ours]
    for use in (store.webhooks.get, store.webhooks.update, store.webhooks.delete):
        with pytest.raises(WebhookEndpointNotFoundError):
            use(theirs, organization_id="a")
    with pytest.raises(WebhookEndpointNotFoundError):
        store.webhooks.rotate_secret(theirs, organization_id="a")
    with pytest.raises(CursorNotFoundError):
        store.webhooks.page(after=theirs, organization_id="a")
    monkeypatch.setattr(webhooks, "MAX_ENDPOINTS", 1)
    with pytest.raises(WebhookLimitError):
        add_endpoint(store, organization="a")
    assert add_endpoint(store, organization="c")


def test_secrets_are_in_no_repr_and_no_error(
    store: JobStore, add_job: AddJob, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint = store.webhooks.get(add_endpoint(store))
    store.request_cancel(add_job().id)
    claimed = store.webhooks.deliveries.claim(limit=1)
    with store._database.write() as connection:
        connection.execute(
            text(
                "CREATE TRIGGER no BEFORE UPDATE ON webhook_endpoints "
                "BEGIN SELECT RAISE(ABORT, 'no'); END"
            )
        )
    log = logging.getLogger("test")
    try:
        store.webhooks.rotate_secret(endpoint.id, keep_old=True)
    except IntegrityError:
        log.exception("%r %r", endpoint, claimed)
    secret = endpoint.secrets[0].removeprefix("whsec_")
    assert len(secret) == 32
    assert isinstance(endpoint, WebhookEndpoint)
    assert "UPDATE webhook_endpoints" in caplog.text
    assert endpoint.id in caplog.text
    assert secret not in caplog.text


def test_what_was_delivered_is_forgotten_in_the_end(
    store: JobStore, add_job: AddJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_endpoint(store)
    for _ in range(3):
        store.request_cancel(add_job().id)
    delivered, given_up, waiting = store.webhooks.deliveries.claim(3)
    store.webhooks.deliveries.delivered(delivered)
    store.webhooks.deliveries.give_up(given_up, "x")
    store.webhooks.deliveries.retry(waiting, "x", 0)

    store.sweep()
    assert len(deliveries(store)) == 3
    later = webhook_deliveries.now() + webhook_deliveries.REMEMBERED_S
    monkeypatch.setattr(webhook_deliveries, "now", lambda: later)
    store.sweep()
    assert [delivery["id"] for delivery in deliveries(store)] == [waiting.id]
