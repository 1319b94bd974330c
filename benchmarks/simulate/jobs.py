"""Finetuning jobs in memory, in place of the store on disk."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexllm_vllm.data.dataset import DatasetBuilder
from flexllm_vllm.jobs.types import FinetuningJob, JobStatus, LoraSpec, TrainingSpec
from flexllm_vllm.plan import JobFailure
from flexllm_vllm.scheduler.feeder import ClaimedJob, NoStore


@dataclass
class Journal:
    """Stands in for the store where the engine writes: what became of each job.

    Attributes:
        status: of the jobs that ended.
        errors: messages of those that failed.
        steps: metrics of each optimizer step, by job.
    """

    status: dict[str, JobStatus] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    steps: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def record_step(self, job_id: str, step: int, metrics: dict[str, Any]) -> None:
        self.steps.setdefault(job_id, []).append(metrics)

    def record_progress(self, *_: Any) -> None:
        """The store keeps a job's last step beside its steps; here the steps are enough."""


class MemoryFeeder(NoStore):
    """Hands jobs to the engine, as a :class:`JobFeeder` does, and keeps what it writes."""

    def __init__(self) -> None:
        self.journal = Journal()
        self._jobs: list[ClaimedJob] = []
        self._cancellations: list[str] = []

    def submit(self, job: ClaimedJob) -> None:
        self._jobs.append(job)

    def cancel(self, job_id: str) -> None:
        self._cancellations.append(job_id)

    @property
    def has_news(self) -> bool:  # type: ignore[override]
        return bool(self._jobs or self._cancellations)

    def take_jobs(self) -> list[ClaimedJob]:
        jobs, self._jobs = self._jobs, []
        return jobs

    def take_cancellations(self) -> list[str]:
        cancellations, self._cancellations = self._cancellations, []
        return cancellations

    def write(self, job_id: str, action: Callable[[Any], object]) -> None:
        action(self.journal)

    def completed(self, job: FinetuningJob, result_step: int | None) -> None:
        self.journal.status[job.id] = JobStatus.SUCCEEDED

    def failed(self, job_id: str, failure: JobFailure) -> None:
        self.journal.status[job_id] = JobStatus.FAILED
        self.journal.errors[job_id] = failure.message

    def cancelled(self, job: FinetuningJob) -> None:
        self.journal.status[job.id] = JobStatus.CANCELLED

    def stop(self) -> None:
        """There is no thread."""


def make_job(
    number: int,
    lengths: Sequence[int],
    *,
    batch_size: int,
    n_epochs: int,
    weight: float = 1.0,
    unmasked_from: int = 1,
) -> ClaimedJob:
    """A job whose example ``i`` is the token ``3 + i``, repeated: targets tell examples apart.

    Args:
        number: from 1; makes its ids.
        lengths: tokens of each example.
        batch_size, n_epochs: of the training.
        weight: its share among the jobs.
        unmasked_from: first token of an example that carries loss.
    """
    builder = DatasetBuilder()
    for index, length in enumerate(lengths):
        first = min(unmasked_from, length - 1)
        mask = [0] * first + [1] * (length - first)
        builder.add([3 + index] * length, mask)
    name = f"job-{number}"
    training = TrainingSpec(
        batch_size=batch_size, max_seq_length=max(lengths), seed=0, n_epochs=n_epochs,
        scheduling_weight=weight,
    )  # fmt: skip
    job = FinetuningJob(
        id=name, model=name, status=JobStatus.RUNNING, training_file=name, suffix=None,
        lora=LoraSpec(), training=training, hyperparameters={}, created_at=0, started_at=0,
        finished_at=None, trained_tokens=0, step=0, total_steps=0, adapter_name=name,
        fine_tuned_model=None, adapter_int_id=1000 + number, init_adapter_path=None,
        folder=Path(name), error=None, cancel_requested=False, attempts=1, organization_id=name,
    )  # fmt: skip
    return ClaimedJob(job, builder.build())


def chat_lengths(count: int, seed: int) -> list[int]:
    """Tokens of examples like those of a chat data set: log-normal around 300, at most 2048."""
    rng = random.Random(f"lengths {seed}")
    return [min(2048, max(16, round(rng.lognormvariate(5.7, 0.7)))) for _ in range(count)]
