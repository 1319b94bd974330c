"""The endpoints to which the ends of jobs are reported.

Their signing secrets must be readable to sign with, so they lie in the database in clear. They
leave it only as ``secrets`` of an endpoint or a delivery, which no ``repr`` shows.
"""

import base64
import secrets
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from flexllm_vllm.jobs import schema
from flexllm_vllm.jobs.database import Database
from flexllm_vllm.jobs.errors import (
    CursorNotFoundError,
    WebhookEndpointNotFoundError,
    WebhookLimitError,
)
from flexllm_vllm.jobs.rows import now
from flexllm_vllm.jobs.webhook_deliveries import DeliveryQueue, valid_secrets
from flexllm_vllm.jobs.webhook_types import WebhookEndpoint

# A job that ends writes a row and makes a request for each endpoint that subscribes to it.
MAX_ENDPOINTS = 100
# Each signs every delivery.
MAX_SECRETS = 8
KEEP_OLD_SECRET_S = 24 * 3600

# Standard Webhooks asks for 24 to 64 bytes; 24 are 32 characters of base64 without padding.
_SECRET_BYTES = 24


class WebhookStore:
    """The webhook endpoints of all organizations; ``deliveries`` is what is sent to them."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.deliveries = DeliveryQueue(database)

    def create(
        self,
        name: str,
        url: str,
        event_types: Sequence[str],
        organization_id: str = schema.LOCAL_ORGANIZATION,
    ) -> WebhookEndpoint:
        """A new endpoint with a secret of its own.

        Raises:
            WebhookLimitError: the organization has :data:`MAX_ENDPOINTS`.
        """
        table = schema.webhook_endpoints
        of_organization = table.c.organization_id == organization_id
        endpoint_id = f"whe_{secrets.token_hex(16)}"
        created_at = now()
        with self._database.write() as connection:
            query = select(func.count()).select_from(table).where(of_organization)
            count = connection.scalar(query) or 0
            if count >= MAX_ENDPOINTS:
                raise WebhookLimitError(
                    f"There are {count} webhook endpoints; at most {MAX_ENDPOINTS} are allowed, "
                    "delete one first"
                )
            connection.execute(
                insert(table).values(
                    id=endpoint_id,
                    name=name,
                    url=url,
                    event_types=list(event_types),
                    secrets=[_new_secret()],
                    created_at=created_at,
                    updated_at=created_at,
                    organization_id=organization_id,
                )
            )
            return _endpoint(_row(connection, endpoint_id))

    def get(self, endpoint_id: str, organization_id: str | None = None) -> WebhookEndpoint:
        """The endpoint of this id; ``organization_id`` limits the look to one tenant, here and
        below.

        Raises:
            WebhookEndpointNotFoundError: no such endpoint.
        """
        with self._database.read() as connection:
            return _endpoint(_row(connection, endpoint_id, organization_id))

    def page(
        self, after: str | None = None, limit: int = 20, organization_id: str | None = None
    ) -> tuple[list[WebhookEndpoint], bool]:
        """Endpoints, newest first, and whether there are more.

        Raises:
            CursorNotFoundError: no endpoint has the id ``after``.
        """
        table = schema.webhook_endpoints
        query = select(table).order_by(table.c.seq.desc())
        if organization_id is not None:
            query = query.where(table.c.organization_id == organization_id)
        with self._database.read() as connection:
            if after is not None:
                try:
                    seq = _row(connection, after, organization_id).seq
                except WebhookEndpointNotFoundError:
                    raise CursorNotFoundError(after) from None
                query = query.where(table.c.seq < seq)
            rows = connection.execute(query.limit(limit + 1)).all()
        return [_endpoint(row) for row in rows[:limit]], len(rows) > limit

    def update(
        self,
        endpoint_id: str,
        name: str | None = None,
        url: str | None = None,
        event_types: Sequence[str] | None = None,
        organization_id: str | None = None,
    ) -> WebhookEndpoint:
        """Change what is given. Deliveries on their way go to the new address from now on.

        Raises:
            WebhookEndpointNotFoundError: no such endpoint.
        """
        given = {
            "name": name,
            "url": url,
            "event_types": None if event_types is None else list(event_types),
        }
        with self._database.write() as connection:
            row = _row(connection, endpoint_id, organization_id)
            changed = {
                column: value
                for column, value in given.items()
                if value is not None and value != row._mapping[column]
            }
            if changed:
                _update(connection, endpoint_id, **changed)
            return _endpoint(_row(connection, endpoint_id))

    def rotate_secret(
        self, endpoint_id: str, keep_old: bool = False, organization_id: str | None = None
    ) -> WebhookEndpoint:
        """A new secret. The old ones sign nothing more, or with ``keep_old`` for another 24 hours.

        Raises:
            WebhookEndpointNotFoundError: no such endpoint.
            WebhookLimitError: :data:`MAX_SECRETS` are valid already.
        """
        with self._database.write() as connection:
            row = _row(connection, endpoint_id, organization_id)
            rotated: list[dict[str, Any]] = [_new_secret()]
            if keep_old:
                valid = valid_secrets(row.secrets)
                if len(valid) >= MAX_SECRETS:
                    raise WebhookLimitError(
                        f"{len(valid)} secrets of this webhook endpoint are valid; rotate without "
                        "keeping the old ones, or wait until one expires"
                    )
                until = now() + KEEP_OLD_SECRET_S
                rotated += [{**old, "expires_at": old["expires_at"] or until} for old in valid]
            _update(connection, endpoint_id, secrets=rotated)
            return _endpoint(_row(connection, endpoint_id))

    def delete(self, endpoint_id: str, organization_id: str | None = None) -> None:
        """Delete an endpoint, and what was to be delivered to it.

        Raises:
            WebhookEndpointNotFoundError: no such endpoint.
        """
        table = schema.webhook_endpoints
        with self._database.write() as connection:
            row = _row(connection, endpoint_id, organization_id)
            connection.execute(delete(table).where(table.c.seq == row.seq))


def _new_secret() -> dict[str, Any]:
    random = base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()
    return {"secret": f"whsec_{random}", "expires_at": None}


def _row(connection: Connection, endpoint_id: str, organization_id: str | None = None) -> Row[Any]:
    table = schema.webhook_endpoints
    query = select(table).where(table.c.id == endpoint_id)
    if organization_id is not None:
        query = query.where(table.c.organization_id == organization_id)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise WebhookEndpointNotFoundError(endpoint_id)
    return row


def _update(connection: Connection, endpoint_id: str, **values: Any) -> None:
    table = schema.webhook_endpoints
    connection.execute(
        update(table).where(table.c.id == endpoint_id).values(updated_at=now(), **values)
    )


def _endpoint(row: Row[Any]) -> WebhookEndpoint:
    value = row._mapping
    return WebhookEndpoint(
        id=value["id"],
        name=value["name"],
        url=value["url"],
        event_types=tuple(value["event_types"]),
        secrets=tuple(secret["secret"] for secret in valid_secrets(value["secrets"])),
        created_at=value["created_at"],
        updated_at=value["updated_at"],
    )
