"""The job store: SQLite and a folder per job, the only truth between API processes and engines.

Layout below ``root``, readable by its owner alone::

    store.db                  jobs, events, files, adapters, webhooks, trackers (schema.py)
    files/<file id>           what was uploaded
    uploads/<part id>         parts of uploads that are not complete
    jobs/<job id>/            dataset.safetensors, checkpoints/, tensorboard/,
                              adapter/ (the final PEFT folder)
    engines/<engine id>       locks of living engines and API processes (owner.py)
    adapters/<id>             PEFT folders that were imported or merged
    serving/<engine id>       likewise, of engines that serve the adapters

Everything may be called from any thread. Each process opens a store of its own.
"""

import shutil
import sqlite3
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from sqlalchemy import Connection, String, cast, func, insert, select

from flexllm_vllm.jobs import schema
from flexllm_vllm.jobs.adapters import AdapterStore
from flexllm_vllm.jobs.database import Database
from flexllm_vllm.jobs.errors import (
    AdapterNotFoundError,
    CursorNotFoundError,
    FileNotStoredError,
    JobStateError,
    TooManyQueuedJobsError,
)
from flexllm_vllm.jobs.event_types import NewEvent
from flexllm_vllm.jobs.files import FileStore
from flexllm_vllm.jobs.history import JobHistory
from flexllm_vllm.jobs.idempotency import IdempotencyClaim, IdempotencyKeys, complete_claim
from flexllm_vllm.jobs.merges import MergeStore
from flexllm_vllm.jobs.names import new_id
from flexllm_vllm.jobs.owner import EngineOwner
from flexllm_vllm.jobs.quotas import Quotas, check_job_quotas
from flexllm_vllm.jobs.rows import (
    insert_event,
    job_from_row,
    job_values,
)
from flexllm_vllm.jobs.trackers import TrackerStore, add_trackers
from flexllm_vllm.jobs.types import FinetuningJob, JobStatus, NewJob
from flexllm_vllm.jobs.uploads import UploadStore
from flexllm_vllm.jobs.webhooks import WebhookStore
from flexllm_vllm.log import get_logger

logger = get_logger(__name__)


class JobStore(JobHistory):
    """Files, jobs and adapters on disk. The engine's methods are in :class:`JobQueue`, a job's
    events and checkpoints in :class:`JobHistory`.

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
        self.idempotency = IdempotencyKeys(database, self._owner)
        self.files = FileStore(database, root / "files")
        self.uploads = UploadStore(database, root / "uploads", self.files)
        self.adapters_folder = root / "adapters"
        self.adapters_folder.mkdir(mode=0o700, exist_ok=True)
        self.adapters = AdapterStore(database)
        self.merges = MergeStore(database)
        self.webhooks = WebhookStore(database)
        self.trackers = TrackerStore(database)
        self._serving = EngineOwner(root / "serving")
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

    def create_job(
        self,
        job: NewJob,
        quotas: Quotas | None = None,
        claim: IdempotencyClaim | None = None,
        max_queued: int | None = None,
    ) -> FinetuningJob:
        """Queue a job; ``claim`` is completed with it.

        Raises:
            FileNotStoredError: one of its files was deleted meanwhile.
            QuotaExceededError: the organization may not queue it.
            TooManyQueuedJobsError: ``max_queued`` jobs are waiting.
            AdapterNotFoundError: the adapter to continue from was.
        """
        with self._database.write() as connection:
            if max_queued is not None:
                _check_queue(connection, max_queued)
            if quotas is not None:
                check_job_quotas(connection, quotas, job, self._jobs_folder)
            for wanted in filter(None, (job.training_file, job.validation_file)):
                file_id = select(schema.files.c.id).where(schema.files.c.id == wanted)
                if connection.scalar(file_id) is None:
                    raise FileNotStoredError(wanted)
            self._check_init_adapter(connection, job)
            connection.execute(insert(schema.jobs).values(**job_values(job)))
            for event in job.events:
                insert_event(connection, job.id, event)
            add_trackers(connection, job.id, job.trackers)
            if claim is not None:
                complete_claim(connection, claim, job.id)
            return job_from_row(self._row(connection, job.id), self._jobs_folder)

    def check_queue(self, max_queued: int) -> None:
        """Whether :meth:`create_job` may queue one more.

        Raises:
            TooManyQueuedJobsError: ``max_queued`` jobs are waiting.
        """
        with self._database.read() as connection:
            _check_queue(connection, max_queued)

    def _check_init_adapter(self, connection: Connection, job: NewJob) -> None:
        path = job.init_adapter_path
        if path is None or not Path(path).is_relative_to(self.root):
            return  # an adapter of --lora-modules is none of ours
        adapters = schema.adapters
        if connection.scalar(select(adapters.c.seq).where(adapters.c.path == path)) is None:
            raise AdapterNotFoundError(job.lora.init_from or path)

    def get_job(self, job_id: str, organization_id: str | None = None) -> FinetuningJob:
        """The job of this id; ``organization_id`` limits the look to one tenant, here and below.

        Raises:
            JobNotFoundError: no such job.
        """
        with self._database.read() as connection:
            row = self._row(connection, job_id, organization_id)
            return job_from_row(row, self._jobs_folder)

    def list_jobs(
        self,
        after: str | None = None,
        limit: int = 20,
        organization_id: str | None = None,
        metadata: dict[str, str] | None = None,
    ) -> tuple[list[FinetuningJob], bool]:
        """Jobs, newest first, and whether there are more.

        ``metadata`` asks for jobs that have all of these pairs; empty, for jobs without any.

        Raises:
            CursorNotFoundError: no job has the id ``after``.
        """
        table = schema.jobs
        query = select(table).order_by(table.c.seq.desc())
        if organization_id is not None:
            query = query.where(table.c.organization_id == organization_id)
        if metadata == {}:
            query = query.where(
                table.c.metadata.is_(None) | (cast(table.c.metadata, String) == "{}")
            )
        for key, value in (metadata or {}).items():
            pair = func.json_each(table.c.metadata).table_valued("key", "value")
            query = query.where(
                select(pair.c.key).where(pair.c.key == key, pair.c.value == value).exists()
            )
        with self._database.read() as connection:
            if after is not None:
                seq = connection.scalar(
                    query.with_only_columns(table.c.seq).where(table.c.id == after)
                )
                if seq is None:
                    raise CursorNotFoundError(after)
                query = query.where(table.c.seq < seq)
            rows = connection.execute(query.limit(limit + 1)).all()
        jobs = [job_from_row(row, self._jobs_folder) for row in rows[:limit]]
        return jobs, len(rows) > limit

    def request_cancel(self, job_id: str, organization_id: str | None = None) -> FinetuningJob:
        """Cancel a queued or paused job at once; ask the engine to stop a running one.

        Raises:
            JobNotFoundError, JobStateError: the job has finished.
        """
        with self._database.write() as connection:
            row = self._unfinished(connection, job_id, "cancelled", organization_id)
            if row.status != JobStatus.RUNNING.value:
                self._cancel(connection, job_id)
            elif not row.cancel_requested:
                self._update(connection, job_id, cancel_requested=True)
                event = NewEvent("Cancellation requested; the job stops at its next step")
                insert_event(connection, job_id, event)
            return job_from_row(self._row(connection, job_id), self._jobs_folder)

    def request_pause(self, job_id: str, organization_id: str | None = None) -> FinetuningJob:
        """Pause a queued job at once; ask the engine to write a checkpoint of a running one and
        stop. A job that is paused, or about to be, stays as it is.

        Raises:
            JobNotFoundError, JobStateError: the job has finished, or is being cancelled.
        """
        with self._database.write() as connection:
            row = self._unfinished(connection, job_id, "paused", organization_id)
            if row.cancel_requested:
                raise JobStateError(job_id, "cancelling", "paused")
            if row.status == JobStatus.RUNNING.value:
                if not row.pause_requested:
                    self._update(connection, job_id, pause_requested=True)
                    event = NewEvent("Pause requested; the job stops after its current step")
                    insert_event(connection, job_id, event)
            elif row.status != JobStatus.PAUSED.value:
                self._pause(connection, job_id, "Fine-tuning job paused")
            return job_from_row(self._row(connection, job_id), self._jobs_folder)

    def resume(self, job_id: str, organization_id: str | None = None) -> FinetuningJob:
        """Queue a paused job again; it continues where it was. A pause that was asked for and has
        not happened yet is taken back; a job that is queued or running stays as it is.

        Raises:
            JobNotFoundError, JobStateError: the job has finished.
        """
        with self._database.write() as connection:
            row = self._unfinished(connection, job_id, "resumed", organization_id)
            if row.status == JobStatus.PAUSED.value:
                self._update(connection, job_id, status=JobStatus.QUEUED.value, attempts=0)
                insert_event(connection, job_id, NewEvent("Fine-tuning job resumed; it is queued"))
            elif row.pause_requested:
                self._update(connection, job_id, pause_requested=False)
                insert_event(connection, job_id, NewEvent("The request to pause is taken back"))
            return job_from_row(self._row(connection, job_id), self._jobs_folder)

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

    # -- content on disk -------------------------------------------------------------------------

    def sweep(self) -> None:
        """Remove what is over: files and uploads with their content, deliveries of webhooks and
        idempotency keys."""
        self.files.sweep()
        self.uploads.sweep()
        self.webhooks.deliveries.sweep()
        self.idempotency.sweep()

    def clean_up(self) -> None:
        """The same, and what processes that died left. To be called when a server starts."""
        self.sweep()
        removed = self.files.remove_leftovers() + self.uploads.remove_leftovers()
        if removed:
            logger.info("removed %d files that an interrupted process had left", removed)

    def announce_engine(self) -> None:
        """This process is an engine that serves the adapters of this store, until it ends."""
        self._serving.hold()

    def other_engines(self) -> int:
        """How many engines, of whatever server, serve the adapters of this store beside this
        process."""
        return len(self._serving.others())

    # -- life ------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close all connections; jobs that this process claimed count as interrupted."""
        with self._watch_lock:
            self._watch.close()
        self._database.close()
        self._owner.release()
        self._serving.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _check_queue(connection: Connection, max_queued: int) -> None:
    queued = schema.jobs.c.status == JobStatus.QUEUED.value
    count = connection.scalar(select(func.count()).select_from(schema.jobs).where(queued)) or 0
    if count >= max_queued:
        raise TooManyQueuedJobsError(max_queued)
