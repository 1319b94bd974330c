"""The job store: SQLite and a folder per job, the only truth between API processes and engines.

Layout below ``root``, readable by its owner alone::

    store.db                  jobs, events, files, adapters (schema.py)
    files/<file id>           what was uploaded
    jobs/<job id>/            dataset.safetensors, adapter/ (the final PEFT folder)
    engines/<engine id>       locks of living engines (owner.py)

Everything may be called from any thread. Each process opens a store of its own.
"""

import shutil
import sqlite3
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sqlalchemy import insert, select

from flexllm_vllm.jobs import schema
from flexllm_vllm.jobs.errors import CursorNotFoundError, FileNotStoredError
from flexllm_vllm.jobs.files import FileStore
from flexllm_vllm.jobs.names import new_id
from flexllm_vllm.jobs.owner import EngineOwner
from flexllm_vllm.jobs.queue import JobQueue
from flexllm_vllm.jobs.rows import (
    adapter_from_row,
    event_from_row,
    insert_event,
    job_from_row,
    job_values,
)
from flexllm_vllm.jobs.schema import Database
from flexllm_vllm.jobs.types import (
    EventLevel,
    EventType,
    FinetuningJob,
    JobEvent,
    JobStatus,
    NewEvent,
    NewJob,
    ServedAdapter,
)


class JobStore(JobQueue):
    """Files, jobs, events and adapters on disk. The engine's methods are in :class:`JobQueue`.

    Args:
        root: folder of the store, created if missing.

    Raises:
        StoreVersionError: the folder was written by another version of this package.
    """

    def __init__(self, root: Path) -> None:
        root = root.absolute()
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.root = root
        jobs_folder = root / "jobs"
        jobs_folder.mkdir(mode=0o700, exist_ok=True)
        database = Database(root / "store.db")
        super().__init__(database, jobs_folder, EngineOwner(root / "engines"))
        self.files = FileStore(database, root / "files")
        self._watch: sqlite3.Connection = database.raw_connection()
        self._watch_lock = threading.Lock()

    # -- jobs ------------------------------------------------------------------------------------

    def new_job(self) -> tuple[str, Path]:
        """A fresh job id and its empty folder, to be filled before :meth:`create_job`."""
        job_id = new_id("ftjob")
        folder = self._jobs_folder / job_id
        folder.mkdir(mode=0o700)
        return job_id, folder

    def discard_new_job(self, job_id: str) -> None:
        """Remove the folder of a job that was never created."""
        shutil.rmtree(self._jobs_folder / job_id, ignore_errors=True)

    def create_job(self, job: NewJob) -> FinetuningJob:
        """Queue a job.

        Raises:
            FileNotStoredError: its training file was deleted meanwhile.
        """
        with self._database.write() as connection:
            file_id = select(schema.files.c.id).where(schema.files.c.id == job.training_file)
            if connection.scalar(file_id) is None:
                raise FileNotStoredError(job.training_file)
            connection.execute(insert(schema.jobs).values(**job_values(job)))
            for event in job.events:
                insert_event(connection, job.id, event)
            return job_from_row(self._row(connection, job.id), self._jobs_folder)

    def get_job(self, job_id: str) -> FinetuningJob:
        """Raises:
        JobNotFoundError: no such job.
        """
        with self._database.read() as connection:
            return job_from_row(self._row(connection, job_id), self._jobs_folder)

    def list_jobs(
        self, after: str | None = None, limit: int = 20
    ) -> tuple[list[FinetuningJob], bool]:
        """Jobs, newest first, and whether there are more.

        Raises:
            CursorNotFoundError: no job has the id ``after``.
        """
        table = schema.jobs
        query = select(table).order_by(table.c.seq.desc())
        with self._database.read() as connection:
            if after is not None:
                seq = connection.scalar(select(table.c.seq).where(table.c.id == after))
                if seq is None:
                    raise CursorNotFoundError(after)
                query = query.where(table.c.seq < seq)
            rows = connection.execute(query.limit(limit + 1)).all()
        jobs = [job_from_row(row, self._jobs_folder) for row in rows[:limit]]
        return jobs, len(rows) > limit

    def request_cancel(self, job_id: str) -> FinetuningJob:
        """Cancel a queued job at once; ask the engine to stop a running one.

        Raises:
            JobNotFoundError, JobStateError: the job has finished.
        """
        with self._database.write() as connection:
            row = self._unfinished(connection, job_id, "cancelled")
            if row.status != JobStatus.RUNNING.value:
                self._cancel(connection, job_id)
            elif not row.cancel_requested:
                self._update(connection, job_id, cancel_requested=True)
                event = NewEvent("Cancellation requested; the job stops at its next step")
                insert_event(connection, job_id, event)
            return job_from_row(self._row(connection, job_id), self._jobs_folder)

    # -- events ----------------------------------------------------------------------------------

    def add_event(
        self,
        job_id: str,
        level: EventLevel,
        message: str,
        type: EventType = "message",
        data: dict[str, Any] | None = None,
    ) -> None:
        """Append an event to a job.

        Raises:
            JobNotFoundError: no such job.
        """
        with self._database.write() as connection:
            self._row(connection, job_id)
            insert_event(connection, job_id, NewEvent(message, level, type, data))

    def list_events(
        self, job_id: str, after: str | None = None, limit: int = 20
    ) -> tuple[list[JobEvent], bool]:
        """Events of a job, newest first, and whether there are more.

        Raises:
            JobNotFoundError: no such job.
            CursorNotFoundError: the job has no event of the id ``after``.
        """
        table = schema.events
        of_job = table.c.job_id == job_id
        query = select(table).where(of_job).order_by(table.c.seq.desc())
        with self._database.read() as connection:
            self._row(connection, job_id)
            if after is not None:
                seq = connection.scalar(select(table.c.seq).where(of_job, table.c.id == after))
                if seq is None:
                    raise CursorNotFoundError(after)
                query = query.where(table.c.seq < seq)
            rows = connection.execute(query.limit(limit + 1)).all()
        return [event_from_row(row) for row in rows[:limit]], len(rows) > limit

    # -- adapters --------------------------------------------------------------------------------

    def served_adapter(self, name: str) -> ServedAdapter | None:
        """The finished adapter of this name."""
        query = select(schema.adapters).where(schema.adapters.c.name == name)
        with self._database.read() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else adapter_from_row(row)

    def list_served_adapters(self) -> list[ServedAdapter]:
        """All finished adapters, oldest first."""
        query = select(schema.adapters).order_by(schema.adapters.c.seq)
        with self._database.read() as connection:
            return [adapter_from_row(row) for row in connection.execute(query)]

    # -- cheap looks for changes -----------------------------------------------------------------

    def data_version(self) -> int:
        """A number that differs after any change by any process; some microseconds."""
        with self._watch_lock:
            return int(self._watch.execute("PRAGMA data_version").fetchone()[0])

    def adapters_version(self) -> tuple[int, int]:
        """Differs after an adapter was added or removed by any process; some microseconds."""
        with self._watch_lock:
            query = "SELECT coalesce(max(seq), 0), count(*) FROM adapters"
            newest, count = self._watch.execute(query).fetchone()
            return newest, count

    # -- life ------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close all connections; jobs that this process claimed count as interrupted."""
        with self._watch_lock:
            self._watch.close()
        self._database.close()
        self._owner.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
