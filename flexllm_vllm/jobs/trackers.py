"""Where the metrics of jobs go, and how far each tracker is.

The metrics are the events of the store; a tracker is a reader of them that an API process works
for, under a lease. One that dies leaves a lease that ends, and another one goes on after the last
event that was recorded as sent.
"""

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Connection, Row, Select, func, insert, or_, select, update

from flexllm_vllm.jobs import schema
from flexllm_vllm.jobs.database import Database
from flexllm_vllm.jobs.event_types import NewEvent
from flexllm_vllm.jobs.names import new_id
from flexllm_vllm.jobs.rows import insert_event, now
from flexllm_vllm.jobs.tracker_types import JobTracker, TrackerSpec
from flexllm_vllm.jobs.types import JobStatus

# Seconds after which a process that does not renew its claim counts as dead.
LEASE_S = 60

_ENDED = tuple(status.value for status in JobStatus if status.finished)
_FREE: dict[str, Any] = {"claimed_by": None, "claimed_until": None}


def add_trackers(connection: Connection, job_id: str, trackers: Iterable[TrackerSpec]) -> None:
    """Within the transaction that creates a job."""
    for tracker in trackers:
        connection.execute(
            insert(schema.trackers).values(
                job_id=job_id,
                kind=tracker.kind,
                settings=tracker.settings,
                next_attempt_at=now(),
            )
        )


class TrackerStore:
    """The trackers of all jobs, as the processes that work for them see them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def claim(self, limit: int, lease_s: int = LEASE_S) -> list[JobTracker]:
        """Up to ``limit`` trackers that have something to do: new metrics, or a job that ended."""
        table = schema.trackers
        with self._database.read() as connection:  # mostly there are none: no write lock for that
            if connection.execute(_due().limit(1)).one_or_none() is None:
                return []
        claim = new_id("claim")
        with self._database.write() as connection:
            rows = connection.execute(_due().order_by(table.c.seq).limit(limit)).all()
            connection.execute(
                update(table)
                .where(table.c.seq.in_([row.seq for row in rows]))
                .values(
                    claimed_by=claim,
                    claimed_until=now() + lease_s,
                    attempts=table.c.attempts + 1,
                )
            )
        return [_tracker(row, claim) for row in rows]

    def rewind(self, tracker: JobTracker) -> int:
        """The position from which all metrics of its next step come (again): those before are of
        earlier steps."""
        table = schema.events
        step = func.json_extract(table.c.data, "$.step")
        metrics = select(func.min(step)).where(
            table.c.job_id == tracker.job_id, table.c.type == "metrics"
        )
        first = metrics.where(table.c.seq > tracker.position).scalar_subquery()
        again = select(func.min(table.c.seq)).where(
            table.c.job_id == tracker.job_id, table.c.type == "metrics", step >= first
        )
        with self._database.read() as connection:
            seq = connection.scalar(again)
        return tracker.position if seq is None else min(tracker.position, seq - 1)

    def advance(self, tracker: JobTracker, position: int, lease_s: int = LEASE_S) -> bool:
        """The tracker has all events up to ``position``; the claim is renewed. False: it is not
        ours any more."""
        return self._report(
            tracker,
            position=position,
            attempts=1,
            last_error=None,
            claimed_until=now() + lease_s,
        )

    def renew(self, tracker: JobTracker, lease_s: int = LEASE_S) -> bool:
        """We live. False: the claim is not ours any more."""
        return self._report(tracker, claimed_until=now() + lease_s)

    def release(self, tracker: JobTracker) -> bool:
        """There is nothing to do for now, or this process ends; that was no attempt."""
        return self._report(tracker, attempts=schema.trackers.c.attempts - 1, **_FREE)

    def complete(self, tracker: JobTracker) -> bool:
        """The job has ended, and the tracker has everything."""
        return self._report(tracker, next_attempt_at=None, last_error=None, **_FREE)

    def fail(
        self, tracker: JobTracker, reason: str, delay_s: int | None, warning: NewEvent
    ) -> bool:
        """The attempt has failed; the next one follows after ``delay_s``, None: it was the last
        one. ``warning`` is told on the job, once for all events of its key."""
        next_attempt_at = None if delay_s is None else now() + delay_s
        with self._database.write() as connection:
            insert_event(connection, tracker.job_id, warning)
            values = {"next_attempt_at": next_attempt_at, "last_error": reason, **_FREE}
            return _update(connection, tracker, values)

    def last_error(self, job_id: str, kind: str) -> str | None:
        """Why the last attempt failed; None: it did not."""
        table = schema.trackers
        query = select(table.c.last_error).where(table.c.job_id == job_id, table.c.kind == kind)
        with self._database.read() as connection:
            return connection.scalar(query)

    def _report(self, tracker: JobTracker, **values: Any) -> bool:
        with self._database.write() as connection:
            return _update(connection, tracker, values)


def _update(connection: Connection, tracker: JobTracker, values: dict[str, Any]) -> bool:
    table = schema.trackers
    ours = (table.c.seq == tracker.seq, table.c.claimed_by == tracker.claim)
    return connection.execute(update(table).where(*ours).values(**values)).rowcount == 1


def _due() -> Select[Any]:
    """Trackers that nobody works for and that have something to do."""
    table, jobs, events = schema.trackers, schema.jobs, schema.events
    at = now()
    news = (
        select(events.c.seq)
        .where(
            events.c.job_id == table.c.job_id,
            events.c.seq > table.c.position,
            events.c.type == "metrics",
        )
        .exists()
    )
    return (
        select(table)
        .join(jobs, jobs.c.id == table.c.job_id)
        .where(table.c.next_attempt_at <= at)
        .where(table.c.claimed_until.is_(None) | (table.c.claimed_until <= at))
        .where(or_(jobs.c.status.in_(_ENDED), news))
    )


def _tracker(row: Row[Any], claim: str) -> JobTracker:
    return JobTracker(
        seq=row.seq,
        job_id=row.job_id,
        kind=row.kind,
        settings=row.settings,
        position=row.position,
        attempt=row.attempts + 1,
        claim=claim,
    )
