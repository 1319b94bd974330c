"""The engine's side of the store: claim a job, report on it, end it.

Called from a background thread of the engine process. Every change is one transaction that first
looks at the job's state, so that a user who cancels at the same moment is never overwritten.
"""

from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select, update

from flexllm_vllm.jobs import schema
from flexllm_vllm.jobs.adapters import add_adapter, add_deleted, is_deleted
from flexllm_vllm.jobs.database import Database
from flexllm_vllm.jobs.errors import JobNotFoundError, JobStateError
from flexllm_vllm.jobs.event_types import NewEvent
from flexllm_vllm.jobs.names import checkpoint_name, new_id
from flexllm_vllm.jobs.owner import EngineOwner
from flexllm_vllm.jobs.rows import finite, insert_event, job_from_row, now
from flexllm_vllm.jobs.types import FinetuningJob, JobError, JobStatus
from flexllm_vllm.jobs.webhook_deliveries import add_deliveries


class JobQueue:
    """Jobs as an engine sees them."""

    def __init__(self, database: Database, jobs_folder: Path, owner: EngineOwner) -> None:
        self._database = database
        self._jobs_folder = jobs_folder
        self._owner = owner

    def claim_next_job(self, models: Collection[str] | None = None) -> FinetuningJob | None:
        """The oldest queued job, now running and ours; None if there is none.

        ``models`` limits the choice to jobs for these served names: a store may outlive the model
        that it was used with.
        """
        table = schema.jobs
        query = select(table).where(table.c.status == JobStatus.QUEUED.value)
        if models is not None:
            query = query.where(table.c.model.in_(tuple(models)))
        owner = self._owner.hold()
        with self._database.write() as connection:
            row = connection.execute(query.order_by(table.c.seq).limit(1)).one_or_none()
            if row is None:
                return None
            self._update(
                connection,
                row.id,
                status=JobStatus.RUNNING.value,
                owner=owner,
                attempts=row.attempts + 1,
                started_at=now(),
                first_step=row.step,
            )
            insert_event(connection, row.id, NewEvent("Fine-tuning job started", key="started"))
            return job_from_row(self._row(connection, row.id), self._jobs_folder)

    def cancel_requested_jobs(self) -> set[str]:
        """Ids of running jobs that shall stop."""
        return self._running_jobs(schema.jobs.c.cancel_requested)

    def pause_requested_jobs(self) -> set[str]:
        """Ids of running jobs that shall stop for now."""
        return self._running_jobs(schema.jobs.c.pause_requested)

    def _running_jobs(self, condition: Any) -> set[str]:
        table = schema.jobs
        running = table.c.status == JobStatus.RUNNING.value
        with self._database.read() as connection:
            return set(connection.scalars(select(table.c.id).where(running, condition)))

    def record_progress(
        self, job_id: str, step: int, total_steps: int, trained_tokens: int
    ) -> None:
        """How far a running job is. ``trained_tokens`` counts from the beginning of the job.

        A run that continues from a checkpoint repeats steps: they do not set the job back.

        Raises:
            JobNotFoundError, JobStateError: the job is not running.
        """
        with self._database.write() as connection:
            row = self._running(connection, job_id, "updated")
            values: dict[str, Any] = {"total_steps": total_steps}
            if step > row.step:
                values |= {"step": step, "trained_tokens": trained_tokens, "attempts": 0}
            self._update(connection, job_id, **values)

    def record_step(self, job_id: str, step: int, metrics: dict[str, Any]) -> None:
        """A metrics event of one optimizer step: ``train_loss``, ``learning_rate``, ...

        Raises:
            JobNotFoundError, JobStateError: the job is not running.
        """
        with self._database.write() as connection:
            row = self._running(connection, job_id, "updated")
            message = f"Step {step}/{row.total_steps}"
            if isinstance(metrics.get("train_loss"), float):
                message += f": training loss={metrics['train_loss']:.4f}"
            data = {"step": step, "total_steps": row.total_steps, **metrics}
            insert_event(
                connection, job_id, NewEvent(message, type="metrics", data=data, key=f"step-{step}")
            )

    def record_evaluation(self, job_id: str, step: int, metrics: dict[str, Any]) -> None:
        """A metrics event of an evaluation: ``valid_loss``, ``valid_mean_token_accuracy``.

        Raises:
            JobNotFoundError, JobStateError: the job is not running.
        """
        with self._database.write() as connection:
            row = self._running(connection, job_id, "updated")
            message = f"Step {step}/{row.total_steps}: validation"
            if isinstance(metrics.get("valid_loss"), float):
                message += f" loss={metrics['valid_loss']:.4f}"
            data = {"step": step, "total_steps": row.total_steps, **metrics}
            insert_event(
                connection, job_id, NewEvent(message, type="metrics", data=data, key=f"eval-{step}")
            )

    def record_checkpoint(
        self, job_id: str, step: int, folder: Path, metrics: dict[str, Any]
    ) -> None:
        """A checkpoint of a running job, served from this transaction on; once. One that was
        deleted stays so, when the job comes to its step again.

        Raises:
            JobNotFoundError, JobStateError: the job is not running.
        """
        table = schema.checkpoints
        with self._database.write() as connection:
            row = self._running(connection, job_id, "updated")
            known = select(table.c.id).where(table.c.job_id == job_id, table.c.number == step)
            if connection.scalar(known) is not None or is_deleted(connection, folder):
                return
            name = checkpoint_name(row.adapter_name, step)
            add_adapter(
                connection,
                name,
                folder,
                row.model,
                "checkpoint",
                row.organization_id,
                job_id=job_id,
            )
            connection.execute(
                insert(table).values(
                    id=new_id("ftckpt"),
                    job_id=job_id,
                    number=step,
                    name=name,
                    metrics=finite(metrics),
                    created_at=now(),
                )
            )
            insert_event(connection, job_id, NewEvent(f"Checkpoint created at step {step}"))

    def forget_checkpoint(self, job_id: str, step: int) -> None:
        """Stop serving a checkpoint. Its folder goes as that of any deleted adapter."""
        table, adapters = schema.checkpoints, schema.adapters
        with self._database.write() as connection:
            where = (table.c.job_id == job_id, table.c.number == step)
            name = connection.scalar(select(table.c.name).where(*where))
            row = connection.execute(select(adapters).where(adapters.c.name == name)).one_or_none()
            if row is not None:
                add_deleted(connection, row, by_job=True)
            connection.execute(delete(table).where(*where))

    def checkpoint_steps(self, job_id: str) -> list[int]:
        """Steps of the checkpoints that are served, in order."""
        table = schema.checkpoints
        query = select(table.c.number).where(table.c.job_id == job_id).order_by(table.c.number)
        with self._database.read() as connection:
            return list(connection.scalars(query))

    def paused(self, job_id: str, step: int) -> None:
        """A running job has stopped for now, at a checkpoint of ``step``.

        Raises:
            JobNotFoundError, JobStateError: the job is not running.
        """
        with self._database.write() as connection:
            row = self._running(connection, job_id, "paused")
            if row.pause_requested:
                self._pause(connection, job_id, f"Fine-tuning job paused at step {step}")
            else:  # taken back, too late for the engine
                self._update(connection, job_id, status=JobStatus.QUEUED.value, owner=None)

    def succeed(self, job_id: str, adapter_path: Path, result_file: str | None = None) -> None:
        """End a running job; from this transaction on its adapter is served.

        Raises:
            JobNotFoundError, JobStateError: the job is not running.
        """
        with self._database.write() as connection:
            row = self._running(connection, job_id, "succeeded")
            self._finish(connection, job_id, JobStatus.SUCCEEDED, result_file=result_file)
            add_adapter(
                connection,
                row.adapter_name,
                adapter_path,
                row.model,
                "job",
                row.organization_id,
                job_id=job_id,
            )
            created = f"New fine-tuned model created: {row.adapter_name}"
            insert_event(connection, job_id, NewEvent(created))
            insert_event(connection, job_id, NewEvent("The job has successfully completed"))

    def fail(self, job_id: str, code: str, message: str, param: str | None = None) -> None:
        """End a job that has not finished, with the reason.

        Raises:
            JobNotFoundError, JobStateError: the job has finished.
        """
        with self._database.write() as connection:
            self._unfinished(connection, job_id, "failed")
            self._fail(connection, job_id, JobError(code, message, param))

    def cancelled(self, job_id: str) -> None:
        """End a job that the user has cancelled; the engine has let go of it.

        Raises:
            JobNotFoundError, JobStateError: the job has finished.
        """
        with self._database.write() as connection:
            self._unfinished(connection, job_id, "cancelled")
            self._cancel(connection, job_id)

    def requeue_interrupted(
        self,
        max_attempts: int = 3,
        models: Collection[str] | None = None,
        leave: Collection[str] = (),
    ) -> list[str]:
        """Take care of running jobs whose engine is gone, all but those to ``leave``: an engine
        that has begun already leaves its own.

        They are queued again, to continue from their last checkpoint; a job that was to be
        cancelled or paused is; one that was begun ``max_attempts`` times without a step further
        fails, since it may be what ends the server. Jobs of an engine that lives are left alone.

        Returns:
            Ids of the jobs that are queued again.
        """
        table = schema.jobs
        query = select(table).where(table.c.status == JobStatus.RUNNING.value)
        if models is not None:
            query = query.where(table.c.model.in_(tuple(models)))
        requeued: list[str] = []
        with self._database.read() as connection:
            rows = connection.execute(query).all()
        if not any(self._is_interrupted(row, leave) for row in rows):
            return requeued
        with self._database.write() as connection:
            for row in connection.execute(query.order_by(table.c.seq)).all():
                if not self._is_interrupted(row, leave):
                    continue
                if row.cancel_requested:
                    self._cancel(connection, row.id)
                elif row.pause_requested:
                    self._pause(connection, row.id, "Fine-tuning job paused")
                elif row.attempts >= max_attempts:
                    reason = (
                        f"The server stopped while the job was running, {row.attempts} times in a "
                        "row; it is not tried again"
                    )
                    self._fail(connection, row.id, JobError("server_interrupted", reason))
                else:
                    self._requeue(connection, row)
                    requeued.append(row.id)
        return requeued

    def _is_interrupted(self, row: Row[Any], leave: Collection[str]) -> bool:
        return row.id not in leave and not self._owner.is_alive(row.owner)

    def _requeue(self, connection: Connection, row: Row[Any]) -> None:
        self._update(
            connection,
            row.id,
            status=JobStatus.QUEUED.value,
            owner=None,
            started_at=None,
        )
        message = (
            f"The server stopped at step {row.step} of {row.total_steps}; the job is queued again "
            "and continues from its last checkpoint"
        )
        insert_event(connection, row.id, NewEvent(message, "warn"))

    def _pause(self, connection: Connection, job_id: str, message: str) -> None:
        self._update(
            connection,
            job_id,
            status=JobStatus.PAUSED.value,
            pause_requested=False,
            owner=None,
            started_at=None,
        )
        insert_event(connection, job_id, NewEvent(message))

    def _cancel(self, connection: Connection, job_id: str) -> None:
        self._finish(connection, job_id, JobStatus.CANCELLED)
        insert_event(connection, job_id, NewEvent("Fine-tuning job cancelled"))

    def _fail(self, connection: Connection, job_id: str, error: JobError) -> None:
        self._finish(connection, job_id, JobStatus.FAILED, error=asdict(error))
        insert_event(connection, job_id, NewEvent(error.message, "error"))

    def _finish(
        self, connection: Connection, job_id: str, status: JobStatus, **values: Any
    ) -> None:
        self._update(
            connection,
            job_id,
            status=status.value,
            finished_at=now(),
            owner=None,
            pause_requested=False,
            **values,
        )
        add_deliveries(connection, self._row(connection, job_id))

    def _update(self, connection: Connection, job_id: str, **values: Any) -> None:
        connection.execute(update(schema.jobs).where(schema.jobs.c.id == job_id).values(**values))

    def _row(
        self, connection: Connection, job_id: str, organization_id: str | None = None
    ) -> Row[Any]:
        query = select(schema.jobs).where(schema.jobs.c.id == job_id)
        if organization_id is not None:
            query = query.where(schema.jobs.c.organization_id == organization_id)
        row = connection.execute(query).one_or_none()
        if row is None:
            raise JobNotFoundError(job_id)
        return row

    def _running(self, connection: Connection, job_id: str, wanted: str) -> Row[Any]:
        row = self._row(connection, job_id)
        if row.status != JobStatus.RUNNING.value:
            raise JobStateError(job_id, row.status, wanted)
        return row

    def _unfinished(
        self,
        connection: Connection,
        job_id: str,
        wanted: str,
        organization_id: str | None = None,
    ) -> Row[Any]:
        row = self._row(connection, job_id, organization_id)
        if JobStatus(row.status).finished:
            raise JobStateError(job_id, row.status, wanted)
        return row
