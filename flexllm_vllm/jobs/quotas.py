"""What one organization may have in the store; looked at in the transaction that adds to it."""

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from sqlalchemy import Connection, func, select, true

from flexllm_vllm.jobs import schema
from flexllm_vllm.jobs.adapter_types import MergeStatus
from flexllm_vllm.jobs.errors import QuotaExceededError
from flexllm_vllm.jobs.file_types import UploadStatus
from flexllm_vllm.jobs.types import JobStatus, NewJob

_UNFINISHED_MERGE = tuple(status.value for status in MergeStatus if not status.finished)
_UNFINISHED = tuple(status.value for status in JobStatus if not status.finished)


@dataclass(frozen=True)
class Quotas:
    """Limits of an organization; None: no limit.

    Attributes:
        max_jobs: jobs that have not finished.
        max_files: stored files.
        max_bytes: their size together.
        max_adapters: imported and merged adapters, with merges that have not finished.
        max_trained_tokens: tokens of all its jobs together: of those that have finished what they
            have trained, of the others what they are going to train.
        max_scheduling_weight: the largest ``scheduling_weight`` of a job.
    """

    max_jobs: int | None = None
    max_files: int | None = None
    max_bytes: int | None = None
    max_adapters: int | None = None
    max_trained_tokens: int | None = None
    max_scheduling_weight: float | None = None


def check_file_quotas(
    connection: Connection, organization_id: str, quotas: Quotas, new_bytes: int
) -> None:
    """Whether the organization may store a file of ``new_bytes`` more. An upload that is pending
    counts as the file that it will be.

    Raises:
        QuotaExceededError: names the quota.
    """
    files = size = 0
    for table, counted in (
        (schema.files, true()),
        (schema.uploads, schema.uploads.c.status == UploadStatus.PENDING.value),
    ):
        query = select(func.count(), func.coalesce(func.sum(table.c.bytes), 0)).where(
            counted, table.c.organization_id == organization_id
        )
        count, num_bytes = connection.execute(query).one()
        files, size = files + count, size + num_bytes
    if quotas.max_files is not None and files >= quotas.max_files:
        raise QuotaExceededError("max_files", quotas.max_files, "delete a file first")
    if quotas.max_bytes is not None and size + new_bytes > quotas.max_bytes:
        raise QuotaExceededError(
            "max_bytes",
            quotas.max_bytes,
            f"{size} bytes are stored and this file would add {new_bytes}; delete a file first",
        )


def check_adapter_quotas(connection: Connection, organization_id: str, quotas: Quotas) -> None:
    """Whether the organization may import or merge one adapter more.

    Raises:
        QuotaExceededError: names the quota.
    """
    if quotas.max_adapters is None:
        return
    count = 0
    for table, counted in (
        (schema.adapters, schema.adapters.c.source.in_(("import", "merge"))),
        (schema.merges, schema.merges.c.status.in_(_UNFINISHED_MERGE)),
    ):
        query = select(func.count()).where(counted, table.c.organization_id == organization_id)
        count += connection.scalar(query) or 0
    if count >= quotas.max_adapters:
        raise QuotaExceededError("max_adapters", quotas.max_adapters, "delete an adapter first")


def check_job_quotas(
    connection: Connection,
    quotas: Quotas,
    new: NewJob,
    jobs_folder: Path,
) -> None:
    """Whether the organization may queue one job more, whose dataset lies in its folder already.

    Raises:
        QuotaExceededError: names the quota.
    """
    table = schema.jobs
    own = table.c.organization_id == new.organization_id
    unfinished = table.c.status.in_(_UNFINISHED)
    if quotas.max_jobs is not None:
        count = connection.scalar(select(func.count()).where(own, unfinished)) or 0
        if count >= quotas.max_jobs:
            raise QuotaExceededError(
                "max_jobs", quotas.max_jobs, "wait for the end of a job, or cancel one"
            )
    if quotas.max_trained_tokens is not None:
        trained = select(func.coalesce(func.sum(table.c.trained_tokens), 0))
        tokens = connection.scalar(trained.where(own, ~unfinished)) or 0
        columns = (table.c.id, table.c.training, table.c.total_steps)
        for row in connection.execute(select(*columns).where(own, unfinished)):
            tokens += _planned_tokens(
                jobs_folder / row.id, row.total_steps, row.training["batch_size"]
            )
        new_tokens = _planned_tokens(jobs_folder / new.id, new.total_steps, new.training.batch_size)
        if tokens + new_tokens > quotas.max_trained_tokens:
            raise QuotaExceededError(
                "max_trained_tokens",
                quotas.max_trained_tokens,
                f"{tokens} are trained or queued and this job would add {new_tokens}",
            )


def _planned_tokens(folder: Path, steps: int, batch_size: int) -> int:
    """Tokens of the examples that a job's steps take.

    Reads the header of the dataset only; one that is gone or broken counts nothing, its job fails.
    """
    try:
        with safe_open(folder / "dataset.safetensors", framework="np") as tensors:
            tokens = tensors.get_slice("input_ids").get_shape()[0]
            examples = tensors.get_slice("offsets").get_shape()[0] - 1
    except (OSError, SafetensorError):
        return 0
    steps_of_an_epoch = -(-examples // batch_size)
    return int(tokens * steps / steps_of_an_epoch)
