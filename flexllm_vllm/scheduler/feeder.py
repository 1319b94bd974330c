"""The engine's link to the job store: a thread, so that no disk access delays an iteration."""

import queue
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from flexllm_vllm.checkpoints import Checkpoint
from flexllm_vllm.data.dataset import TokenizedDataset
from flexllm_vllm.jobs.errors import JobNotFoundError, JobStateError
from flexllm_vllm.jobs.store import JobStore
from flexllm_vllm.jobs.types import FinetuningJob
from flexllm_vllm.log import get_logger
from flexllm_vllm.plan import JobFailure
from flexllm_vllm.scheduler import job_files
from flexllm_vllm.scheduler.training_loop import Save

logger = get_logger(__name__)

T = TypeVar("T")

# How soon a new job or a cancellation is seen, in seconds. A look costs one SQLite pragma.
POLL_INTERVAL = 0.2
# How often it is looked for jobs of other engines that were killed, likewise.
TAKE_OVER_INTERVAL = 5.0


@dataclass(frozen=True)
class ClaimedJob:
    """A job that this engine runs from now on."""

    job: FinetuningJob
    dataset: TokenizedDataset
    validation: TokenizedDataset | None = None
    resume: Checkpoint | None = None


@dataclass(frozen=True)
class _Write:
    """What is to be done to the store; ``is_last`` if it ends the job's run."""

    job_id: str
    action: Callable[[JobStore], object]
    is_last: bool = False


class JobFeeder:
    """Claims queued jobs, reports cancellations, and writes what the engine has to say.

    Args:
        root: the finetuning folder.
        max_jobs: jobs that train at once.
        models: names of the base model; jobs for others are left to other servers.
        wake: called (from the thread) when there is something to take.
    """

    def __init__(
        self, root: Path, max_jobs: int, models: Collection[str], wake: Callable[[], None]
    ) -> None:
        self._store = JobStore(root)
        self._store.announce_engine()
        self._max_jobs = max_jobs
        self._models = models
        self._wake = wake
        self._claimed: queue.SimpleQueue[ClaimedJob] = queue.SimpleQueue()
        self._cancelled: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._paused: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[_Write] = queue.SimpleQueue()
        self._unwritten: list[_Write] = []
        self._broken: queue.SimpleQueue[tuple[str, JobFailure]] = queue.SimpleQueue()
        self._unwritable: set[str] = set()
        self._running: set[str] = set()
        self._cancelling: set[str] = set()
        self._pausing: set[str] = set()
        self._stopping = threading.Event()
        self._look = threading.Event()
        self._thread = threading.Thread(target=self._run, name="finetuning-jobs", daemon=True)
        self._thread.start()

    # -- called by the engine ----------------------------------------------------------------

    @property
    def has_news(self) -> bool:
        return not (
            self._claimed.empty()
            and self._cancelled.empty()
            and self._paused.empty()
            and self._broken.empty()
        )

    def take_jobs(self) -> list[ClaimedJob]:
        return _drain(self._claimed)

    def take_cancellations(self) -> list[str]:
        return _drain(self._cancelled)

    def take_pauses(self) -> list[str]:
        return _drain(self._paused)

    def write(self, job_id: str, action: Callable[[JobStore], object]) -> None:
        """Has the thread run ``action(store)``, in order. Where it raises the job is
        :meth:`take_broken`: it has no events with a gap among them."""
        self._put(_Write(job_id, action))

    def _put(self, write: _Write) -> None:
        self._outbox.put(write)
        self._look.set()

    def take_broken(self) -> list[tuple[str, JobFailure]]:
        """Jobs that cannot go on, since what they have done cannot be written, and why."""
        return _drain(self._broken)

    def checkpointed(self, job: FinetuningJob, save: Save, best_step: int) -> None:
        """A checkpoint is written. If it cannot be kept the job is :meth:`take_broken`."""

        def add(store: JobStore) -> None:
            try:
                job_files.add_checkpoint(store, job, save, best_step)
            except Exception as error:
                logger.exception("cannot keep a checkpoint of finetuning job %s", job.id)
                reason = f"its checkpoint cannot be kept: {error}"
                self._break(job.id, JobFailure("checkpoint_failed", reason))

        self.write(job.id, add)

    def completed(self, job: FinetuningJob, result_step: int | None) -> None:
        """Training is over; ``result_step`` is the checkpoint that is its result, if it is one."""

        def complete(store: JobStore) -> None:
            try:
                job_files.complete(store, job, result_step)
            except JobStateError:
                raise  # cancelled meanwhile
            except Exception as error:
                logger.exception("cannot complete finetuning job %s", job.id)
                reason = f"its result cannot be written: {error}"
                store.fail(job.id, "checkpoint_failed", reason)

        self._finish(job.id, complete)

    def failed(self, job_id: str, failure: JobFailure) -> None:
        """The job cannot go on."""

        def fail(store: JobStore) -> None:
            job_files.keep_last(store, job_id)
            store.fail(job_id, failure.code, failure.message)

        self._finish(job_id, fail)

    def cancelled(self, job: FinetuningJob) -> None:
        """The engine has let go of a job that was to be cancelled."""

        def cancel(store: JobStore) -> None:
            store.cancelled(job.id)
            job_files.clean_up(store, job)

        self._finish(job.id, cancel)

    def paused(self, job: FinetuningJob, step: int) -> None:
        """A checkpoint of this step holds all of a job that was to be paused."""
        self._finish(job.id, lambda store: store.paused(job.id, step))

    def _finish(self, job_id: str, action: Callable[[JobStore], object]) -> None:
        """Like :meth:`write`, the job's last word: another one may be claimed after it. It is
        written as soon as the store can be: a full disk leaves no job that runs for ever."""
        self._put(_Write(job_id, action, is_last=True))

    def stop(self) -> None:
        """Writes what is left and ends the thread."""
        self._stopping.set()
        self._look.set()
        self._thread.join(timeout=10)
        self._store.close()

    # -- the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        recover_at, readable, version = 0.0, True, -1
        while not self._stopping.is_set():
            had_room = len(self._running) < self._max_jobs
            self._write_all()
            try:
                if time.monotonic() >= recover_at:
                    if self._recover():
                        version = -1
                    recover_at = time.monotonic() + TAKE_OVER_INTERVAL
                current = self._store.data_version()
                # Our own writes do not change data_version: a job that just ended makes room.
                made_room = not had_room and len(self._running) < self._max_jobs
                if current != version or made_room:
                    self._claim()
                    self._find_requests()
                    version = current
                readable = True
            except Exception:
                if readable:  # it is tried five times a second
                    logger.exception("cannot use the finetuning job store; trying again")
                readable = False
            if self.has_news:
                self._wake()
            self._look.wait(POLL_INTERVAL)
            self._look.clear()
        self._write_all()

    def _recover(self) -> bool:
        """Queues jobs again whose engine is gone; whether there were any."""
        ours = self._running | {write.job_id for write in self._unwritten}
        job_ids = self._store.requeue_interrupted(leave=ours)
        for job_id in job_ids:
            logger.info("finetuning job %s was interrupted, and is queued again", job_id)
        return bool(job_ids)

    def _write_all(self) -> None:
        again, self._unwritten = self._unwritten, []
        for write in again:
            self._write_last(write, first=False)
        for write in _drain(self._outbox):
            if write.is_last:
                self._write_last(write)
            elif write.job_id not in self._unwritable:
                self._write(write)

    def _write(self, write: _Write) -> None:
        try:
            write.action(self._store)
        except Exception as error:
            logger.exception("cannot write the state of finetuning job %s", write.job_id)
            reason = f"what it has done cannot be written: {error}"
            self._break(write.job_id, JobFailure("store_failed", reason))

    def _break(self, job_id: str, failure: JobFailure) -> None:
        self._unwritable.add(job_id)
        self._broken.put((job_id, failure))

    def _write_last(self, write: _Write, first: bool = True) -> None:
        if first:
            for jobs in (self._running, self._cancelling, self._pausing, self._unwritable):
                jobs.discard(write.job_id)
        try:
            write.action(self._store)
        except (JobNotFoundError, JobStateError) as error:
            logger.info("finetuning job %s: %s", write.job_id, error)  # cancelled meanwhile
        except Exception:
            if first:
                logger.exception(
                    "cannot write the end of finetuning job %s; trying again", write.job_id
                )
            self._unwritten.append(write)

    def _claim(self) -> None:
        while len(self._running) < self._max_jobs:
            job = self._store.claim_next_job(self._models)
            if job is None:
                return
            try:
                claimed = self._load(job)
            except Exception as error:
                logger.exception("cannot read the data set of finetuning job %s", job.id)
                reason = f"cannot read its data: {error}"
                self.failed(job.id, JobFailure("dataset_unreadable", reason))
                continue
            self._running.add(job.id)
            self._claimed.put(claimed)

    def _load(self, job: FinetuningJob) -> ClaimedJob:
        has_validation = job.validation_file is not None
        return ClaimedJob(
            job,
            TokenizedDataset.load(job.dataset_path),
            TokenizedDataset.load(job.validation_path) if has_validation else None,
            job_files.resume_point(self._store, job),
        )

    def _find_requests(self) -> None:
        for job_id in self._store.cancel_requested_jobs() & self._running - self._cancelling:
            self._cancelling.add(job_id)
            self._cancelled.put(job_id)
        asked = self._store.pause_requested_jobs() & self._running
        for job_id in asked - self._pausing - self._cancelling:
            self._pausing.add(job_id)
            self._paused.put(job_id)


class NoStore:
    """Stands in for a :class:`JobFeeder`: no job comes, and nobody hears of what is done."""

    has_news = False

    def take_jobs(self) -> list[Any]:
        return []

    def take_cancellations(self) -> list[str]:
        return []

    def take_pauses(self) -> list[str]:
        return []

    def take_broken(self) -> list[tuple[str, JobFailure]]:
        return []

    def write(self, job_id: str, action: Any) -> None:
        pass

    def checkpointed(self, job: FinetuningJob, save: Save, best_step: int) -> None:
        pass

    def completed(self, job: FinetuningJob, result_step: int | None) -> None:
        pass

    def failed(self, job_id: str, failure: JobFailure) -> None:
        pass

    def cancelled(self, job: FinetuningJob) -> None:
        pass

    def paused(self, job: FinetuningJob, step: int) -> None:
        pass


def _drain(source: "queue.SimpleQueue[T]") -> list[T]:
    items = []
    while True:
        try:
            items.append(source.get_nowait())
        except queue.Empty:
            return items
