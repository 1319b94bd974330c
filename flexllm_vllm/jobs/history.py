"""What jobs leave behind while they run: events, and checkpoints that are served."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, Table, select

from flexllm_vllm.jobs import schema
from flexllm_vllm.jobs.errors import CursorNotFoundError
from flexllm_vllm.jobs.event_types import EventLevel, EventType, JobEvent, NewEvent
from flexllm_vllm.jobs.queue import JobQueue
from flexllm_vllm.jobs.rows import checkpoint_from_row, event_from_row, insert_event
from flexllm_vllm.jobs.types import Checkpoint, JobStatus


class JobHistory(JobQueue):
    """Lists what the queue's jobs have left behind."""

    # -- checkpoints -----------------------------------------------------------------------------

    def list_checkpoints(
        self,
        job_id: str,
        after: str | None = None,
        limit: int = 10,
        organization_id: str | None = None,
    ) -> tuple[list[Checkpoint], bool]:
        """Checkpoints of a job that are served, newest first, and whether there are more.

        Raises:
            JobNotFoundError: no such job.
            CursorNotFoundError: the job has no checkpoint of the id ``after``.
        """
        rows, more = self._page_of_job(schema.checkpoints, job_id, after, limit, organization_id)
        return [checkpoint_from_row(row) for row in rows], more

    def _page_of_job(
        self, table: Table, job_id: str, after: str | None, limit: int, organization_id: str | None
    ) -> tuple[Sequence[Row[Any]], bool]:
        of_job = table.c.job_id == job_id
        query = select(table).where(of_job).order_by(table.c.seq.desc())
        with self._database.read() as connection:
            self._row(connection, job_id, organization_id)
            if after is not None:
                seq = connection.scalar(select(table.c.seq).where(of_job, table.c.id == after))
                if seq is None:
                    raise CursorNotFoundError(after)
                query = query.where(table.c.seq < seq)
            rows = connection.execute(query.limit(limit + 1)).all()
        return rows[:limit], len(rows) > limit

    # -- events ----------------------------------------------------------------------------------

    def add_event(
        self,
        job_id: str,
        level: EventLevel,
        message: str,
        type: EventType = "message",
        data: dict[str, Any] | None = None,
        key: str | None = None,
    ) -> None:
        """Append an event to a job; of several with one ``key`` the first is kept.

        Raises:
            JobNotFoundError: no such job.
        """
        with self._database.write() as connection:
            self._row(connection, job_id)
            insert_event(connection, job_id, NewEvent(message, level, type, data, key))

    def list_events(
        self,
        job_id: str,
        after: str | None = None,
        limit: int = 20,
        organization_id: str | None = None,
    ) -> tuple[list[JobEvent], bool]:
        """Events of a job, newest first, and whether there are more.

        Raises:
            JobNotFoundError: no such job.
            CursorNotFoundError: the job has no event of the id ``after``.
        """
        rows, more = self._page_of_job(schema.events, job_id, after, limit, organization_id)
        return [event_from_row(row) for row in rows], more

    def metrics_events(self, job_id: str) -> list[dict[str, Any]]:
        """Data of all metrics events of a job, oldest first."""
        table = schema.events
        query = select(table.c.data).where(table.c.job_id == job_id, table.c.type == "metrics")
        with self._database.read() as connection:
            return list(connection.scalars(query.order_by(table.c.seq)))

    def events_since(
        self, job_id: str, seq: int, limit: int = 1000, organization_id: str | None = None
    ) -> tuple[list[JobEvent], int, bool]:
        """Events after the one numbered ``seq`` (0: from the first), oldest first; the number of
        the last one; and whether the job has ended and no more will come.

        Raises:
            JobNotFoundError: no such job.
        """
        table = schema.events
        query = select(table).where(table.c.job_id == job_id, table.c.seq > seq)
        with self._database.read() as connection:
            job = self._row(connection, job_id, organization_id)
            rows = connection.execute(query.order_by(table.c.seq).limit(limit)).all()
        events = [event_from_row(row) for row in rows]
        ended = JobStatus(job.status).finished and len(rows) < limit
        return events, rows[-1].seq if rows else seq, ended
