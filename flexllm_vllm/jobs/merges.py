"""Merges of adapters: queued by any API process, done by one of them, under a lease.

A process that dies leaves a lease that ends; then another one begins the merge anew. A process that
was taken for dead and comes back finds its claim gone, and its result is thrown away.
"""

from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, update

from flexllm_vllm.jobs import schema
from flexllm_vllm.jobs.adapter_types import AdapterMerge, MergeSpec, MergeStatus, ServedAdapter
from flexllm_vllm.jobs.adapters import add_adapter
from flexllm_vllm.jobs.database import Database
from flexllm_vllm.jobs.errors import (
    AdapterNotFoundError,
    CursorNotFoundError,
    MergeNotFoundError,
    TooManyMergesError,
)
from flexllm_vllm.jobs.idempotency import IdempotencyClaim, complete_claim
from flexllm_vllm.jobs.names import new_id
from flexllm_vllm.jobs.quotas import Quotas, check_adapter_quotas
from flexllm_vllm.jobs.rows import merge_from_row, now
from flexllm_vllm.jobs.types import JobError

# Seconds after which a process that does not renew its claim counts as dead.
LEASE_S = 60
MAX_ATTEMPTS = 3
# Merges that may wait at a time.
MAX_UNFINISHED = 64

_UNFINISHED = (MergeStatus.QUEUED.value, MergeStatus.RUNNING.value)


class MergeStore:
    """All merges."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self,
        merge_id: str,
        name: str,
        base_model: str,
        spec: MergeSpec,
        organization_id: str = schema.LOCAL_ORGANIZATION,
        quotas: Quotas | None = None,
        claim: IdempotencyClaim | None = None,
    ) -> AdapterMerge:
        """Queue a merge whose result will be served under ``name``.

        Args:
            quotas: of the organization.
            claim: is completed with the merge's id.

        Raises:
            AdapterNotFoundError: one of its adapters was deleted meanwhile.
            TooManyMergesError: too many wait.
            QuotaExceededError: its result would be one adapter too many.
        """
        table, adapters = schema.merges, schema.adapters
        with self._database.write() as connection:
            if quotas is not None:
                check_adapter_quotas(connection, organization_id, quotas)
            if claim is not None:
                complete_claim(connection, claim, merge_id)
            for wanted in spec.adapters:
                known = select(adapters.c.seq).where(
                    adapters.c.name == wanted.name, adapters.c.organization_id == organization_id
                )
                if connection.scalar(known) is None:
                    raise AdapterNotFoundError(wanted.name)
            waiting = select(func.count()).where(table.c.status.in_(_UNFINISHED))
            if (connection.scalar(waiting) or 0) >= MAX_UNFINISHED:
                raise TooManyMergesError(MAX_UNFINISHED)
            connection.execute(
                insert(table).values(
                    id=merge_id,
                    name=name,
                    status=MergeStatus.QUEUED.value,
                    request={"base_model": base_model, "spec": asdict(spec)},
                    created_at=now(),
                    organization_id=organization_id,
                )
            )
            return merge_from_row(_row(connection, merge_id))

    def get(self, merge_id: str, organization_id: str | None = None) -> AdapterMerge:
        """The merge of this id; ``organization_id`` limits the look to one tenant, here and below.

        Raises:
            MergeNotFoundError: no such merge.
        """
        with self._database.read() as connection:
            return merge_from_row(_row(connection, merge_id, organization_id))

    def page(
        self, after: str | None = None, limit: int = 20, organization_id: str | None = None
    ) -> tuple[list[AdapterMerge], bool]:
        """Merges, newest first, and whether there are more.

        Raises:
            CursorNotFoundError: no merge has the id ``after``.
        """
        table = schema.merges
        query = select(table).order_by(table.c.seq.desc())
        if organization_id is not None:
            query = query.where(table.c.organization_id == organization_id)
        with self._database.read() as connection:
            if after is not None:
                seq = connection.scalar(select(table.c.seq).where(table.c.id == after))
                if seq is None:
                    raise CursorNotFoundError(after)
                query = query.where(table.c.seq < seq)
            rows = connection.execute(query.limit(limit + 1)).all()
        return [merge_from_row(row) for row in rows[:limit]], len(rows) > limit

    # -- for the process that does them ----------------------------------------------------------

    def any_unfinished(self, models: Collection[str] | None = None) -> bool:
        """Whether there is anything to do, or to wait for, without the store's write lock."""
        with self._database.read() as connection:
            return bool(_unfinished(connection, models))

    def claim(
        self, lease_s: int = LEASE_S, models: Collection[str] | None = None
    ) -> AdapterMerge | None:
        """The oldest merge that nobody works on, now running and ours. None if there is none, or
        while another one runs: they are done one at a time.

        ``models`` limits it to merges of adapters of these served names. One that was begun
        ``MAX_ATTEMPTS`` times fails: it may be what ends the server.
        """
        table = schema.merges
        at = now()
        with self._database.write() as connection:
            rows = _unfinished(connection, models)
            if any(row.claimed_until is not None and row.claimed_until > at for row in rows):
                return None
            for row in rows:
                if row.attempts >= MAX_ATTEMPTS:
                    reason = (
                        f"The server stopped while this merge was running, {row.attempts} times in "
                        "a row; it is not tried again"
                    )
                    _finish(connection, row.id, JobError("server_interrupted", reason))
                    continue
                values = {
                    "status": MergeStatus.RUNNING.value,
                    "claimed_by": new_id("claim"),
                    "claimed_until": at + lease_s,
                    "attempts": row.attempts + 1,
                }
                connection.execute(update(table).where(table.c.id == row.id).values(**values))
                return merge_from_row(_row(connection, row.id))
        return None

    def renew(self, merge: AdapterMerge, lease_s: int = LEASE_S) -> bool:
        """Go on working on a merge; whether it is still ours."""
        with self._database.write() as connection:
            return _change(connection, merge, claimed_until=now() + lease_s)

    def release(self, merge: AdapterMerge) -> None:
        """Stop working on a merge; any process may begin it again, and this was no attempt."""
        with self._database.write() as connection:
            _change(
                connection,
                merge,
                status=MergeStatus.QUEUED.value,
                attempts=merge.attempts - 1,
                claimed_by=None,
                claimed_until=None,
            )

    def succeed(self, merge: AdapterMerge, folder: Path) -> ServedAdapter | None:
        """End a merge; from this transaction on its result is served. None where it is not ours
        any more."""
        with self._database.write() as connection:
            if not _change(connection, merge, claimed_until=None):
                return None
            adapter = add_adapter(
                connection, merge.name, folder, merge.base_model, "merge", merge.organization_id
            )
            _finish(connection, merge.id, None)
            return adapter

    def fail(self, merge: AdapterMerge, code: str, message: str) -> None:
        """End a merge with the reason, unless it is not ours any more."""
        with self._database.write() as connection:
            if _change(connection, merge, claimed_until=None):
                _finish(connection, merge.id, JobError(code, message))


def _row(connection: Connection, merge_id: str, organization_id: str | None = None) -> Row[Any]:
    table = schema.merges
    query = select(table).where(table.c.id == merge_id)
    if organization_id is not None:
        query = query.where(table.c.organization_id == organization_id)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise MergeNotFoundError(merge_id)
    return row


def _unfinished(connection: Connection, models: Collection[str] | None) -> list[Row[Any]]:
    """Rows of merges for these models that have not ended, oldest first."""
    table = schema.merges
    query = select(table).where(table.c.status.in_(_UNFINISHED)).order_by(table.c.seq)
    rows = connection.execute(query).all()
    return [row for row in rows if models is None or row.request["base_model"] in models]


def _change(connection: Connection, merge: AdapterMerge, **values: Any) -> bool:
    """Change a merge that is still ours; whether it is."""
    table = schema.merges
    ours = (table.c.id == merge.id, table.c.claimed_by == merge.claim)
    return connection.execute(update(table).where(*ours).values(**values)).rowcount == 1


def _finish(connection: Connection, merge_id: str, error: JobError | None) -> None:
    status = MergeStatus.SUCCEEDED if error is None else MergeStatus.FAILED
    connection.execute(
        update(schema.merges)
        .where(schema.merges.c.id == merge_id)
        .values(
            status=status.value,
            error=None if error is None else asdict(error),
            finished_at=now(),
            claimed_by=None,
            claimed_until=None,
        )
    )
