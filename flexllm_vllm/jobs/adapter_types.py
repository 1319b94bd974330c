"""What the store knows of adapters that are served, and of merges."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal

from flexllm_vllm.jobs.types import JobError

# vLLM's integer ids of adapters. Below are those that vLLM numbers itself (--lora-modules), from 1;
# an adapter has one id while it is trained and another one when it is served.
FIRST_TRAINING_INT_ID = 1_000_000
FIRST_SERVED_INT_ID = 500_000_000

AdapterSource = Literal["job", "checkpoint", "import", "merge"]

# ``combination_type`` of ``peft.LoraModel.add_weighted_adapter``.
MergeMethod = Literal[
    "linear",
    "cat",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter that requests may name as their model. ``path`` is a PEFT folder."""

    name: str
    int_id: int
    path: str
    base_model: str
    created_at: int
    source: AdapterSource = "job"
    job_id: str | None = None
    organization_id: str = "local"


@dataclass(frozen=True)
class DeletedAdapter:
    """An adapter that is not served any more.

    Attributes:
        path: its folder, which may still be needed.
        job_unfinished: whether the job that has written it may go on.
    """

    seq: int
    int_id: int
    path: Path
    job_unfinished: bool


class MergeStatus(StrEnum):
    """States of a merge."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"

    @property
    def finished(self) -> bool:
        """Whether the merge can never change again."""
        return self in (MergeStatus.SUCCEEDED, MergeStatus.FAILED)


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter of a merge, and what it is multiplied by."""

    name: str
    weight: float


@dataclass(frozen=True)
class MergeSpec:
    """What to merge and how, in the words of ``peft.LoraModel.add_weighted_adapter``.

    Attributes:
        density: share of the values that pruning methods keep.
        svd_rank: of the result; None: the largest of the adapters.
        seed: of what DARE drops.
    """

    adapters: tuple[WeightedAdapter, ...]
    method: MergeMethod
    density: float | None = None
    svd_rank: int | None = None
    majority_sign_method: Literal["total", "frequency"] = "total"
    seed: int = 0


@dataclass(frozen=True)
class AdapterMerge:
    """A merge of adapters into a new one. Times are Unix seconds.

    Attributes:
        name: of the new adapter.
        claim: of the process that works on it now.
        attempts: how often a process has begun it.
    """

    id: str
    name: str
    base_model: str
    spec: MergeSpec
    status: MergeStatus
    error: JobError | None
    created_at: int
    finished_at: int | None
    attempts: int
    claim: str | None
    organization_id: str = "local"
