"""What a finetuning job is, and the store that the API and the engine share."""

from flexllm_vllm.jobs.errors import (
    AdapterNotFoundError,
    CursorNotFoundError,
    FileInUseError,
    FileNotStoredError,
    JobNotFoundError,
    JobStateError,
    QuotaExceededError,
    StoreVersionError,
)
from flexllm_vllm.jobs.quotas import Quotas
from flexllm_vllm.jobs.store import JobStore
from flexllm_vllm.jobs.types import (
    TARGET_MODULES,
    Checkpoint,
    FinetuningJob,
    JobError,
    JobEvent,
    JobStatus,
    LoraSpec,
    NewEvent,
    NewJob,
    ServedAdapter,
    StoredFile,
    TrainingSpec,
)

__all__ = [
    "TARGET_MODULES",
    "AdapterNotFoundError",
    "Checkpoint",
    "CursorNotFoundError",
    "FileInUseError",
    "FileNotStoredError",
    "FinetuningJob",
    "JobError",
    "JobEvent",
    "JobNotFoundError",
    "JobStateError",
    "JobStatus",
    "JobStore",
    "LoraSpec",
    "NewEvent",
    "NewJob",
    "QuotaExceededError",
    "Quotas",
    "ServedAdapter",
    "StoreVersionError",
    "StoredFile",
    "TrainingSpec",
]
