"""Adapters that requests may name as their model: a row here, a PEFT folder on disk."""

from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select

from flexllm_vllm.jobs import schema
from flexllm_vllm.jobs.adapter_types import (
    FIRST_SERVED_INT_ID,
    AdapterSource,
    DeletedAdapter,
    MergeStatus,
    ServedAdapter,
)
from flexllm_vllm.jobs.database import Database
from flexllm_vllm.jobs.errors import AdapterInUseError, AdapterNotFoundError, CursorNotFoundError
from flexllm_vllm.jobs.idempotency import IdempotencyClaim, complete_claim
from flexllm_vllm.jobs.quotas import Quotas, check_adapter_quotas
from flexllm_vllm.jobs.rows import adapter_from_row, now
from flexllm_vllm.jobs.types import JobStatus

_UNFINISHED_JOB = tuple(status.value for status in JobStatus if not status.finished)
_UNFINISHED_MERGE = tuple(status.value for status in MergeStatus if not status.finished)


class AdapterStore:
    """The adapters of all jobs, checkpoints, imports and merges."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(
        self,
        name: str,
        path: Path,
        base_model: str,
        source: AdapterSource,
        organization_id: str = schema.LOCAL_ORGANIZATION,
        quotas: Quotas | None = None,
        claim: IdempotencyClaim | None = None,
    ) -> ServedAdapter:
        """Serve a PEFT folder under a name; the id that vLLM loads it by is new.

        Args:
            quotas: of the organization.
            claim: is completed with the name.

        Raises:
            sqlalchemy.exc.IntegrityError: the name is taken.
            QuotaExceededError: it would be one too many.
        """
        with self._database.write() as connection:
            if quotas is not None:
                check_adapter_quotas(connection, organization_id, quotas)
            if claim is not None:
                complete_claim(connection, claim, name)
            return add_adapter(connection, name, path, base_model, source, organization_id)

    def check_quotas(self, organization_id: str, quotas: Quotas) -> None:
        """Whether the organization may have one adapter more; to be asked before it is read, since
        :meth:`add` asks after it.

        Raises:
            QuotaExceededError: it may not.
        """
        with self._database.read() as connection:
            check_adapter_quotas(connection, organization_id, quotas)

    def get(self, name: str, organization_id: str | None = None) -> ServedAdapter | None:
        """The adapter of this name; ``organization_id`` limits the look to one tenant."""
        query = select(schema.adapters).where(schema.adapters.c.name == name)
        if organization_id is not None:
            query = query.where(schema.adapters.c.organization_id == organization_id)
        with self._database.read() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else adapter_from_row(row)

    def all(self, organization_id: str | None = None) -> list[ServedAdapter]:
        """All adapters, oldest first."""
        query = select(schema.adapters).order_by(schema.adapters.c.seq)
        if organization_id is not None:
            query = query.where(schema.adapters.c.organization_id == organization_id)
        with self._database.read() as connection:
            return [adapter_from_row(row) for row in connection.execute(query)]

    def page(
        self, after: str | None = None, limit: int = 20, organization_id: str | None = None
    ) -> tuple[list[ServedAdapter], bool]:
        """Adapters, newest first, and whether there are more.

        Raises:
            CursorNotFoundError: no adapter has the name ``after``.
        """
        table = schema.adapters
        query = select(table).order_by(table.c.seq.desc())
        if organization_id is not None:
            query = query.where(table.c.organization_id == organization_id)
        with self._database.read() as connection:
            if after is not None:
                seq = connection.scalar(select(table.c.seq).where(table.c.name == after))
                if seq is None:
                    raise CursorNotFoundError(after)
                query = query.where(table.c.seq < seq)
            rows = connection.execute(query.limit(limit + 1)).all()
        return [adapter_from_row(row) for row in rows[:limit]], len(rows) > limit

    def delete(self, name: str, organization_id: str | None = None) -> ServedAdapter:
        """Stop serving an adapter; of a checkpoint, forget it. Its folder stays for now: see
        :meth:`removable`.

        Raises:
            AdapterNotFoundError: no adapter of this name.
            AdapterInUseError: a job that has not finished continues from it, or a merge needs it.
        """
        table = schema.adapters
        query = select(table).where(table.c.name == name)
        if organization_id is not None:
            query = query.where(table.c.organization_id == organization_id)
        with self._database.write() as connection:
            row = connection.execute(query).one_or_none()
            if row is None:
                raise AdapterNotFoundError(name)
            if users := _jobs_from(connection, row.path) + _merges_of(connection, name):
                raise AdapterInUseError(name, users)
            checkpoints = schema.checkpoints
            connection.execute(delete(checkpoints).where(checkpoints.c.name == name))
            add_deleted(connection, row)
            return adapter_from_row(row)

    def removable(self, deleted_before: int) -> list[DeletedAdapter]:
        """Adapters deleted at ``deleted_before`` (Unix seconds) or earlier that no unfinished job
        needs: none continues from it, and it is not a checkpoint that may become its result."""
        table, jobs = schema.deleted_adapters, schema.jobs
        unfinished = jobs.c.status.in_(_UNFINISHED_JOB)
        needed = select(jobs.c.seq).where(jobs.c.init_adapter_path == table.c.path, unfinished)
        written = select(jobs.c.seq).where(jobs.c.id == table.c.job_id, unfinished)
        query = (
            select(table, written.exists().label("job_unfinished"))
            .where(table.c.deleted_at <= deleted_before, ~needed.exists())
            .where(table.c.by_job | ~written.exists())
            .order_by(table.c.seq)
        )
        with self._database.read() as connection:
            return [
                DeletedAdapter(row.seq, row.int_id, Path(row.path), row.job_unfinished)
                for row in connection.execute(query)
            ]

    def deleted_folders(self, job_id: str) -> set[Path]:
        """Folders of adapters of a job that were deleted and that requests may still need."""
        table = schema.deleted_adapters
        query = select(table.c.path).where(table.c.job_id == job_id)
        with self._database.read() as connection:
            return {Path(path) for path in connection.scalars(query)}

    def folders(self) -> set[Path]:
        """Folders of all adapters that are served, or deleted and still there."""
        with self._database.read() as connection:
            return {
                Path(path)
                for table in (schema.adapters, schema.deleted_adapters)
                for path in connection.scalars(select(table.c.path))
            }

    def forget_deleted(self, adapter: DeletedAdapter) -> None:
        """The folder of a deleted adapter is gone."""
        table = schema.deleted_adapters
        with self._database.write() as connection:
            connection.execute(delete(table).where(table.c.seq == adapter.seq))


def _jobs_from(connection: Connection, path: str) -> list[str]:
    """Ids of unfinished jobs that continue from the adapter in this folder."""
    jobs = schema.jobs
    query = select(jobs.c.id).where(
        jobs.c.init_adapter_path == path, jobs.c.status.in_(_UNFINISHED_JOB)
    )
    return list(connection.scalars(query))


def _merges_of(connection: Connection, name: str) -> list[str]:
    """Ids of unfinished merges of the adapter of this name."""
    query = select(schema.merges).where(schema.merges.c.status.in_(_UNFINISHED_MERGE))
    return [
        row.id
        for row in connection.execute(query)
        if name in (adapter["name"] for adapter in row.request["spec"]["adapters"])
    ]


def add_deleted(connection: Connection, row: Row[Any], by_job: bool = False) -> None:
    """Take an adapter of the table out of it, within a transaction; its folder is to be removed
    when nothing needs it. ``by_job``: the job that has written it does not need it."""
    connection.execute(delete(schema.adapters).where(schema.adapters.c.seq == row.seq))
    connection.execute(
        insert(schema.deleted_adapters).values(
            int_id=row.int_id,
            path=row.path,
            job_id=row.job_id,
            by_job=by_job,
            deleted_at=now(),
        )
    )


def is_deleted(connection: Connection, path: Path) -> bool:
    """Whether the adapter in this folder was deleted."""
    table = schema.deleted_adapters
    return connection.scalar(select(table.c.seq).where(table.c.path == str(path))) is not None


def add_adapter(
    connection: Connection,
    name: str,
    path: Path,
    base_model: str,
    source: AdapterSource,
    organization_id: str,
    **columns: Any,
) -> ServedAdapter:
    """Insert an adapter within a transaction, under an id that no other one ever has.

    vLLM's API processes each count the adapters that they load from 1, and a worker loads an id
    only once: two adapters of one id would get each other's weights.
    """
    table = schema.adapters
    # AUTOINCREMENT: numbers of deleted rows are not given again; a worker may still hold them.
    issued = connection.exec_driver_sql(
        "SELECT seq FROM sqlite_sequence WHERE name = 'adapters'"
    ).scalar()
    values = {
        "name": name,
        "int_id": FIRST_SERVED_INT_ID + (issued or 0),
        "path": str(path),
        "base_model": base_model,
        "created_at": now(),
        "source": source,
        "organization_id": organization_id,
        **columns,
    }
    connection.execute(insert(table).values(**values))
    row = connection.execute(select(table).where(table.c.name == name)).one()
    return adapter_from_row(row)
