"""The store's dataclasses as OpenAI's objects."""

import time
from typing import Any

from flexllm_vllm.jobs.event_types import JobEvent
from flexllm_vllm.jobs.file_types import StoredFile, Upload, UploadPart
from flexllm_vllm.jobs.types import Checkpoint, FinetuningJob, JobStatus

OPENAI_NAMES = ("n_epochs", "batch_size", "learning_rate_multiplier")


def page(data: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """A page of a list with cursors."""
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }


def file_page(files: list[StoredFile], has_more: bool) -> dict[str, Any]:
    """A page of files. Its ids are texts always: an empty list's are empty."""
    found = page([file_object(file) for file in files], has_more)
    return {**found, "first_id": found["first_id"] or "", "last_id": found["last_id"] or ""}


def file_object(file: StoredFile) -> dict[str, Any]:
    """``openai.types.FileObject``. Every line was checked at the door: the file is processed.
    ``expires_at`` is left out where there is none, since OpenAI's is never null."""
    expires = {} if file.expires_at is None else {"expires_at": file.expires_at}
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        **expires,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
    }


def upload_object(upload: Upload, file: StoredFile | None = None) -> dict[str, Any]:
    """``openai.types.Upload``; ``file`` is what it has become."""
    became = {} if file is None else {"file": file_object(file)}
    return {
        "id": upload.id,
        "object": "upload",
        "bytes": upload.bytes,
        "created_at": upload.created_at,
        "expires_at": upload.expires_at,
        "filename": upload.filename,
        "purpose": upload.purpose,
        "status": upload.status.value,
        **became,
    }


def upload_part_object(part: UploadPart) -> dict[str, Any]:
    """``openai.types.uploads.UploadPart``."""
    return {
        "id": part.id,
        "object": "upload.part",
        "created_at": part.created_at,
        "upload_id": part.upload_id,
    }


def job_object(job: FinetuningJob) -> dict[str, Any]:
    """``openai.types.fine_tuning.FineTuningJob``; ``method.supervised`` also holds our own
    hyperparameters and the adapter's, resolved."""
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.created_at,
        "error": _error(job),
        "estimated_finish": _estimated_finish(job),
        "fine_tuned_model": job.fine_tuned_model,
        "finished_at": job.finished_at,
        "hyperparameters": {name: job.hyperparameters.get(name, "auto") for name in OPENAI_NAMES},
        "integrations": job.integrations or [],
        "metadata": job.metadata,
        "method": {
            "type": job.method,
            job.method: {"hyperparameters": _hyperparameters(job), "lora": _lora(job)},
        },
        "model": job.model,
        "organization_id": job.organization_id,
        "result_files": [job.result_file] if job.result_file else [],
        "seed": job.training.seed,
        "status": job.status.value,
        "trained_tokens": job.trained_tokens if job.status.finished else None,
        "training_file": job.training_file,
        "user_provided_suffix": job.suffix,
        "validation_file": job.validation_file,
    }


def checkpoint_object(checkpoint: Checkpoint) -> dict[str, Any]:
    """``openai.types.fine_tuning.jobs.FineTuningJobCheckpoint``; a metric that is no number is
    left out."""
    return {
        "id": checkpoint.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": checkpoint.created_at,
        "fine_tuned_model_checkpoint": checkpoint.name,
        "fine_tuning_job_id": checkpoint.job_id,
        "metrics": {name: value for name, value in checkpoint.metrics.items() if value is not None},
        "step_number": checkpoint.step,
    }


def event_object(event: JobEvent) -> dict[str, Any]:
    """``openai.types.fine_tuning.FineTuningJobEvent``; ``data`` of a message is empty."""
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": event.created_at,
        "level": event.level,
        "message": event.message,
        "type": event.type,
        "data": event.data or {},
    }


def legacy_job_object(
    job: FinetuningJob, file: StoredFile | None, events: list[JobEvent] | None = None
) -> dict[str, Any]:
    """The ``fine-tune`` object of OpenAI's API before ``fine_tuning/jobs``.

    ``events`` (oldest first) are part of it except in lists. A training file that was deleted
    since is left out.
    """
    waiting = job.status in (JobStatus.QUEUED, JobStatus.VALIDATING_FILES)
    legacy: dict[str, Any] = {
        "id": job.id,
        "object": "fine-tune",
        "model": job.model,
        "created_at": job.created_at,
        "fine_tuned_model": job.fine_tuned_model,
        "hyperparams": {
            "n_epochs": job.training.n_epochs,
            "batch_size": job.training.batch_size,
            "learning_rate_multiplier": job.training.learning_rate_multiplier,
            "prompt_loss_weight": 0.0,
        },
        "organization_id": job.organization_id,
        "result_files": [],
        "status": "pending" if waiting else job.status.value,
        "training_files": [file_object(file)] if file else [],
        "validation_files": [],
        "updated_at": job.finished_at or job.started_at or job.created_at,
    }
    if events is not None:
        legacy["events"] = [legacy_event_object(event) for event in events]
    return legacy


def legacy_event_object(event: JobEvent) -> dict[str, Any]:
    """The ``fine-tune-event`` object."""
    return {
        "object": "fine-tune-event",
        "created_at": event.created_at,
        "level": event.level,
        "message": event.message,
    }


def _error(job: FinetuningJob) -> dict[str, Any] | None:
    if job.error is None:
        return None
    return {"code": job.error.code, "message": job.error.message, "param": job.error.param}


def _estimated_finish(job: FinetuningJob) -> int | None:
    """Unix time, if every step takes as long as those of the current run so far."""
    done = job.step - job.first_step
    if job.status is not JobStatus.RUNNING or done <= 0 or not job.started_at:
        return None
    now = time.time()
    seconds_per_step = (now - job.started_at) / done
    return int(now + seconds_per_step * (job.total_steps - job.step))


def _hyperparameters(job: FinetuningJob) -> dict[str, Any]:
    training = job.training
    return {
        **job.hyperparameters,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.lr_scheduler_type,
        "warmup_ratio": training.warmup_ratio,
        "weight_decay": training.weight_decay,
        "adam_beta1": training.adam_beta1,
        "adam_beta2": training.adam_beta2,
        "adam_epsilon": training.adam_epsilon,
        "max_grad_norm": training.max_grad_norm,
        "max_steps": training.max_steps,
        "max_seq_length": training.max_seq_length,
        "shuffle": training.shuffle,
        "scheduling_weight": training.scheduling_weight,
        "eval_steps": training.eval_steps,
        "save_steps": training.save_steps,
        "save_total_limit": training.save_total_limit,
        "early_stopping_patience": training.early_stopping_patience,
        "load_best_model_at_end": training.load_best_model_at_end,
    }


def _lora(job: FinetuningJob) -> dict[str, Any]:
    return {
        "r": job.lora.r,
        "lora_alpha": job.lora.lora_alpha,
        "use_rslora": job.lora.use_rslora,
        "target_modules": list(job.lora.target_modules),
        "layers_to_transform": job.lora.layers_to_transform and list(job.lora.layers_to_transform),
        "init_from": job.lora.init_from,
    }
