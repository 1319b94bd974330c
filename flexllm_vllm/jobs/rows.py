"""Between rows of the store and the dataclasses of :mod:`flexllm_vllm.jobs.types`."""

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row, insert

from flexllm_vllm.jobs import schema
from flexllm_vllm.jobs.adapter_types import (
    FIRST_TRAINING_INT_ID,
    AdapterMerge,
    MergeSpec,
    MergeStatus,
    ServedAdapter,
    WeightedAdapter,
)
from flexllm_vllm.jobs.event_types import JobEvent, NewEvent
from flexllm_vllm.jobs.file_types import StoredFile, Upload, UploadStatus
from flexllm_vllm.jobs.names import new_id
from flexllm_vllm.jobs.types import (
    Checkpoint,
    FinetuningJob,
    JobError,
    JobStatus,
    LoraSpec,
    NewJob,
    TrainingSpec,
)


def now() -> int:
    """Unix time in whole seconds."""
    return int(time.time())


def training_int_id(seq: int) -> int:
    """vLLM's id of the adapter that the job in row ``seq`` (from 1, never used twice) trains."""
    return FIRST_TRAINING_INT_ID + seq - 1


def job_from_row(row: Row[Any], jobs_folder: Path) -> FinetuningJob:
    """The job of a row of ``jobs``."""
    value = row._mapping
    status = JobStatus(value["status"])
    lora = {**value["lora"], "target_modules": tuple(value["lora"]["target_modules"])}
    return FinetuningJob(
        id=value["id"],
        model=value["model"],
        status=status,
        training_file=value["training_file"],
        suffix=value["suffix"],
        lora=LoraSpec(**lora),
        training=TrainingSpec(**value["training"]),
        hyperparameters=value["hyperparameters"],
        created_at=value["created_at"],
        started_at=value["started_at"],
        finished_at=value["finished_at"],
        trained_tokens=value["trained_tokens"],
        step=value["step"],
        total_steps=value["total_steps"],
        adapter_name=value["adapter_name"],
        fine_tuned_model=value["adapter_name"] if status is JobStatus.SUCCEEDED else None,
        adapter_int_id=training_int_id(value["seq"]),
        init_adapter_path=value["init_adapter_path"],
        folder=jobs_folder / value["id"],
        error=JobError(**value["error"]) if value["error"] else None,
        cancel_requested=value["cancel_requested"],
        attempts=value["attempts"],
        organization_id=value["organization_id"],
        metadata=value["metadata"],
        method=value["method"],
        validation_file=value["validation_file"],
        result_file=value["result_file"],
        integrations=value["integrations"],
        pause_requested=value["pause_requested"],
        first_step=value["first_step"],
    )


def job_values(job: NewJob) -> dict[str, Any]:
    """Column values of a job that is queued now."""
    return {
        "id": job.id,
        "model": job.model,
        "status": JobStatus.QUEUED.value,
        "training_file": job.training_file,
        "suffix": job.suffix,
        "lora": asdict(job.lora),
        "training": asdict(job.training),
        "hyperparameters": job.hyperparameters,
        "created_at": now(),
        "total_steps": job.total_steps,
        "adapter_name": job.adapter_name,
        "init_adapter_path": job.init_adapter_path,
        "organization_id": job.organization_id,
        "metadata": job.metadata,
        "method": job.method,
        "validation_file": job.validation_file,
        "integrations": job.integrations,
    }


def insert_event(connection: Connection, job_id: str, event: NewEvent) -> None:
    """Append an event to a job, unless it has one of this key."""
    connection.execute(
        insert(schema.events)
        .prefix_with("OR IGNORE")
        .values(
            id=new_id("ftevent"),
            job_id=job_id,
            created_at=now(),
            level=event.level,
            message=event.message,
            type=event.type,
            data=finite(event.data),
            key=event.key,
        )
    )


def event_from_row(row: Row[Any]) -> JobEvent:
    """The event of a row of ``events``."""
    value = row._mapping
    return JobEvent(
        id=value["id"],
        created_at=value["created_at"],
        level=value["level"],
        message=value["message"],
        type=value["type"],
        data=value["data"],
    )


def file_from_row(row: Row[Any]) -> StoredFile:
    """The file of a row of ``files``."""
    value = row._mapping
    return StoredFile(
        id=value["id"],
        filename=value["filename"],
        bytes=value["bytes"],
        purpose=value["purpose"],
        created_at=value["created_at"],
        expires_at=value["expires_at"],
        organization_id=value["organization_id"],
    )


def upload_from_row(row: Row[Any]) -> Upload:
    """The upload of a row of ``uploads``; one whose time is over is expired."""
    value = row._mapping
    status = UploadStatus(value["status"])
    if status is UploadStatus.PENDING and value["expires_at"] <= now():
        status = UploadStatus.EXPIRED
    return Upload(
        id=value["id"],
        filename=value["filename"],
        bytes=value["bytes"],
        purpose=value["purpose"],
        mime_type=value["mime_type"],
        status=status,
        created_at=value["created_at"],
        expires_at=value["expires_at"],
        file_id=value["file_id"],
        file_expires_after_s=value["file_expires_after_s"],
        organization_id=value["organization_id"],
    )


def checkpoint_from_row(row: Row[Any]) -> Checkpoint:
    """The checkpoint of a row of ``checkpoints``."""
    value = row._mapping
    return Checkpoint(
        id=value["id"],
        job_id=value["job_id"],
        step=value["number"],
        name=value["name"],
        metrics=value["metrics"],
        created_at=value["created_at"],
    )


def adapter_from_row(row: Row[Any]) -> ServedAdapter:
    """The adapter of a row of ``adapters``."""
    value = row._mapping
    return ServedAdapter(
        name=value["name"],
        int_id=value["int_id"],
        path=value["path"],
        base_model=value["base_model"],
        created_at=value["created_at"],
        source=value["source"],
        job_id=value["job_id"],
        organization_id=value["organization_id"],
    )


def merge_from_row(row: Row[Any]) -> AdapterMerge:
    """The merge of a row of ``merges``."""
    value = row._mapping
    spec = value["request"]["spec"]
    adapters = tuple(WeightedAdapter(**adapter) for adapter in spec["adapters"])
    return AdapterMerge(
        id=value["id"],
        name=value["name"],
        base_model=value["request"]["base_model"],
        spec=MergeSpec(**{**spec, "adapters": adapters}),
        status=MergeStatus(value["status"]),
        error=JobError(**value["error"]) if value["error"] else None,
        created_at=value["created_at"],
        finished_at=value["finished_at"],
        attempts=value["attempts"],
        claim=value["claimed_by"],
        organization_id=value["organization_id"],
    )


def finite(data: dict[str, Any] | None) -> dict[str, Any] | None:
    """JSON has no NaN and no infinity: a diverged loss is null."""
    if data is None:
        return None
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in data.items()
    }
