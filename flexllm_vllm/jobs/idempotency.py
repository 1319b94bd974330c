"""``Idempotency-Key``: which object a request has created already."""

from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, delete, insert, select, update

from flexllm_vllm.jobs import schema
from flexllm_vllm.jobs.database import Database
from flexllm_vllm.jobs.errors import IdempotencyConflictError, IdempotencyPendingError
from flexllm_vllm.jobs.owner import EngineOwner
from flexllm_vllm.jobs.rows import now

KEPT_S = 24 * 3600
# Stands in place of the object's id while it is being created, before the id of who does it.
_PENDING = "pending:"


@dataclass(frozen=True)
class IdempotencyClaim:
    """A key; of another organization or route it is another one."""

    organization_id: str
    route: str
    key: str


class IdempotencyKeys:
    """The keys of the last 24 hours."""

    def __init__(self, database: Database, owner: EngineOwner) -> None:
        self._database = database
        self._owner = owner

    def sweep(self) -> None:
        """Forget the keys of the time before."""
        over = schema.idempotency_keys.c.created_at < now() - KEPT_S
        with self._database.read() as connection:
            if (
                connection.scalar(select(schema.idempotency_keys.c.seq).where(over).limit(1))
                is None
            ):
                return
        with self._database.write() as connection:
            connection.execute(delete(schema.idempotency_keys).where(over))

    def claim(self, claim: IdempotencyClaim, request_hash: str) -> str | None:
        """The id of the object that a request with this key has created; None: none has, and it is
        now the caller's to create it and to call :func:`complete_claim`, or :meth:`release`.

        Raises:
            IdempotencyConflictError: the key belongs to another request.
            IdempotencyPendingError: the same request is being served at this moment.
        """
        table = schema.idempotency_keys
        where = _where(claim)
        pending = _PENDING + self._owner.hold()
        with self._database.write() as connection:
            connection.execute(delete(table).where(table.c.created_at < now() - KEPT_S))
            row = connection.execute(select(table).where(*where)).one_or_none()
            if row is not None:
                if row.request_hash != request_hash:
                    raise IdempotencyConflictError(claim.key)
                if not row.object_id.startswith(_PENDING):
                    return str(row.object_id)
                owner = row.object_id.removeprefix(_PENDING)
                if owner == self._owner.id or self._owner.is_alive(owner):
                    raise IdempotencyPendingError(claim.key)
                connection.execute(delete(table).where(*where))  # its process has died over it
            values = {
                **asdict(claim),
                "request_hash": request_hash,
                "object_id": pending,
                "created_at": now(),
            }
            connection.execute(insert(table).values(**values))
        return None

    def release(self, claim: IdempotencyClaim) -> None:
        """Nothing was created for a claimed key: the request may be tried again."""
        table = schema.idempotency_keys
        with self._database.write() as connection:
            pending = table.c.object_id.startswith(_PENDING)
            connection.execute(delete(table).where(*_where(claim), pending))


def complete_claim(connection: Connection, claim: IdempotencyClaim, object_id: str) -> None:
    """The object that was created for a claimed key. To be called within the transaction that
    creates it: both are there, or neither."""
    table = schema.idempotency_keys
    connection.execute(update(table).where(*_where(claim)).values(object_id=object_id))


def _where(claim: IdempotencyClaim) -> tuple[ColumnElement[Any], ...]:
    table = schema.idempotency_keys
    return (
        table.c.organization_id == claim.organization_id,
        table.c.route == claim.route,
        table.c.key == claim.key,
    )
