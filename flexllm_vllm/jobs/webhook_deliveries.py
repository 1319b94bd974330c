"""What is to be delivered to webhook endpoints: written as a job ends, sent by API processes.

A delivery is claimed for one attempt under a lease, so that one process at a time sends it. A
process that dies leaves a lease that ends; then another one tries again under the same id. So a
receiver may get an event twice, but an event is never forgotten between attempts.
"""

import json
import secrets
from typing import Any

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from flexllm_vllm.jobs import schema
from flexllm_vllm.jobs.database import Database
from flexllm_vllm.jobs.names import new_id
from flexllm_vllm.jobs.rows import now
from flexllm_vllm.jobs.types import JobStatus
from flexllm_vllm.jobs.webhook_types import WebhookDelivery

EVENT_TYPES = tuple(
    f"fine_tuning.job.{status.value}"
    for status in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)
)

# Seconds that an attempt may take, its report to the store included; then it counts as lost.
LEASE_S = 60
# How long a delivery that has ended is kept, for whoever asks what became of it.
REMEMBERED_S = 30 * 24 * 3600

_FREE: dict[str, Any] = {"claimed_by": None, "claimed_until": None}


def webhook_event(event_type: str, object_id: str, created_at: int) -> dict[str, Any]:
    """OpenAI's event object, with an id of its own. ``created_at`` is Unix time in seconds."""
    return {
        "id": f"evt_{secrets.token_hex(16)}",
        "object": "event",
        "created_at": created_at,
        "type": event_type,
        "data": {"id": object_id},
    }


def new_webhook_id() -> str:
    """The ``webhook-id`` of a delivery, by which a receiver knows a second attempt."""
    return f"wh_{secrets.token_hex(16)}"


def event_text(event: dict[str, Any]) -> str:
    """The event as it is signed and sent."""
    return json.dumps(event, separators=(",", ":"))


def valid_secrets(stored: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of ``webhook_endpoints.secrets`` that have not expired."""
    return [s for s in stored if s["expires_at"] is None or s["expires_at"] > now()]


def add_deliveries(connection: Connection, job: Row[Any]) -> None:
    """Within the transaction that has ended a job: a delivery to each endpoint that subscribes."""
    endpoints = schema.webhook_endpoints
    of_organization = endpoints.c.organization_id == job.organization_id
    event_type = f"fine_tuning.job.{job.status}"
    event = webhook_event(event_type, job.id, job.finished_at)
    query = select(endpoints.c.id, endpoints.c.event_types).where(of_organization)
    for endpoint in connection.execute(query).all():
        if event_type in endpoint.event_types:
            connection.execute(
                insert(schema.webhook_deliveries).values(
                    id=new_webhook_id(),
                    endpoint_id=endpoint.id,
                    event_type=event_type,
                    body=event,
                    created_at=job.finished_at,
                    next_attempt_at=job.finished_at,
                )
            )


class DeliveryQueue:
    """The deliveries, as the processes that send them see them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def next_due(self) -> int | None:
        """Unix time from which a delivery can be claimed; None if there is none to send."""
        table = schema.webhook_deliveries
        free_at = func.max(table.c.next_attempt_at, func.coalesce(table.c.claimed_until, 0))
        query = select(free_at.label("at")).where(table.c.next_attempt_at.is_not(None))
        with self._database.read() as connection:
            return connection.scalar(query.order_by("at").limit(1))

    def claim(self, limit: int, lease_s: int = LEASE_S) -> list[WebhookDelivery]:
        """Up to ``limit`` deliveries that are due, for one attempt each."""
        table, endpoints = schema.webhook_deliveries, schema.webhook_endpoints
        at = now()
        query = (
            select(table, endpoints.c.url, endpoints.c.secrets)
            .join(endpoints, endpoints.c.id == table.c.endpoint_id)
            .where(table.c.next_attempt_at <= at)
            .where(table.c.claimed_until.is_(None) | (table.c.claimed_until <= at))
            .order_by(table.c.next_attempt_at, table.c.seq)
            .limit(limit)
        )
        claim = new_id("claim")
        with self._database.write() as connection:
            rows = connection.execute(query).all()
            connection.execute(
                update(table)
                .where(table.c.seq.in_([row.seq for row in rows]))
                .values(claimed_by=claim, claimed_until=at + lease_s, attempts=table.c.attempts + 1)
            )
        return [_delivery(row, claim) for row in rows]

    def delivered(self, delivery: WebhookDelivery) -> None:
        """The endpoint has it, whoever holds the claim by now."""
        table = schema.webhook_deliveries
        done = {"next_attempt_at": None, "delivered_at": now(), "last_error": None}
        with self._database.write() as connection:
            connection.execute(
                update(table).where(table.c.id == delivery.id).values(**done, **_FREE)
            )

    def retry(self, delivery: WebhookDelivery, reason: str, delay_s: int) -> None:
        """The attempt has failed, the next one follows."""
        self._report(delivery, next_attempt_at=now() + delay_s, last_error=reason)

    def give_up(self, delivery: WebhookDelivery, reason: str) -> None:
        """The attempt has failed and was the last one."""
        self._report(delivery, next_attempt_at=None, last_error=reason)

    def give_up_endpoint(self, endpoint_id: str, reason: str) -> None:
        """Nothing that waits for this endpoint is sent any more."""
        table = schema.webhook_deliveries
        pending = (table.c.endpoint_id == endpoint_id, table.c.next_attempt_at.is_not(None))
        done = {"next_attempt_at": None, "last_error": reason}
        with self._database.write() as connection:
            connection.execute(update(table).where(*pending).values(**done, **_FREE))

    def sweep(self) -> None:
        """Forget what was delivered or given up long ago."""
        table = schema.webhook_deliveries
        over = (
            table.c.next_attempt_at.is_(None),
            func.coalesce(table.c.delivered_at, table.c.created_at) <= now() - REMEMBERED_S,
        )
        with self._database.read() as connection:
            if connection.scalar(select(table.c.seq).where(*over).limit(1)) is None:
                return
        with self._database.write() as connection:
            connection.execute(delete(table).where(*over))

    def release(self, delivery: WebhookDelivery) -> None:
        """The attempt was broken off and does not count; any process may begin it again."""
        self._report(delivery, attempts=delivery.attempt - 1)

    def _report(self, delivery: WebhookDelivery, **values: Any) -> None:
        # Where the claim was lost nothing happens: another attempt decides.
        table = schema.webhook_deliveries
        ours = (table.c.id == delivery.id, table.c.claimed_by == delivery.claim)
        with self._database.write() as connection:
            connection.execute(update(table).where(*ours).values(**values, **_FREE))


def _delivery(row: Row[Any], claim: str) -> WebhookDelivery:
    value = row._mapping
    return WebhookDelivery(
        id=value["id"],
        endpoint_id=value["endpoint_id"],
        url=value["url"],
        secrets=tuple(secret["secret"] for secret in valid_secrets(value["secrets"])),
        event_type=value["event_type"],
        body=event_text(value["body"]),
        attempt=value["attempts"] + 1,
        claim=claim,
    )
