"""What a tracker is told of a job, and what it can do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flexllm_vllm.trackers.points import MetricPoint


@dataclass(frozen=True)
class RunDescription:
    """A job as its trackers show it. Crosses a process border as JSON.

    Attributes:
        job_id: also the run's id where the tracker lets us choose it.
        adapter_name: under which the result will be served; the run's name unless one is given.
        settings: the tracker's, as the job's ``integrations`` gave them.
        config: model, files, hyperparameters and LoRA settings.
        folder: of the job, for what the tracker keeps on disk.
    """

    job_id: str
    adapter_name: str
    settings: dict[str, Any]
    config: dict[str, Any]
    folder: str


class TrackerRun(Protocol):
    """A run of a tracker, found again or begun when it is made. Every method may raise anything.

    Attributes:
        address: where a person finds the run, None if there is nothing to tell.
    """

    address: str | None

    def write(self, points: Sequence[MetricPoint]) -> None:
        """Add points in the order of their steps."""

    def finish(self, status: str, fine_tuned_model: str | None) -> None:
        """The job has ended in this state."""

    def suspend(self) -> None:
        """Nothing more comes for now."""
