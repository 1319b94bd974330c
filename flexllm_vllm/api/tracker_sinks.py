"""Writers of trackers as the tracking threads use them."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

from flexllm_vllm.jobs.types import FinetuningJob, JobTracker
from flexllm_vllm.trackers.points import MetricPoint
from flexllm_vllm.trackers.tensorboard import TensorBoardFiles


class Sink(Protocol):
    """Where the metrics of a job go. Its methods block.

    Attributes:
        rewinds: a new session writes all of its first step again, and what was there is dropped.
        address: of the run, for the job's events, once it is known.

    Raises (all methods):
        TrackerError, OSError: the tracker cannot be used.
    """

    rewinds: bool
    address: str | None

    def write(self, points: Sequence[MetricPoint]) -> None:
        """Returns when the tracker has them."""

    def finish(self, status: str, fine_tuned_model: str | None) -> None:
        """The job has ended in this state."""

    def suspend(self) -> None:
        """Nothing more comes for now; another session may go on."""

    def kill(self) -> None:
        """Let go of everything at once; raises nothing. The last call, always."""


class TensorBoardSink:
    """Event files in the job's folder."""

    rewinds = True

    def __init__(self, job: FinetuningJob) -> None:
        self.address: str | None = None
        self._files = TensorBoardFiles(job.tensorboard_path)

    def write(self, points: Sequence[MetricPoint]) -> None:
        self._files.write(points)

    def finish(self, status: str, fine_tuned_model: str | None) -> None:
        self._files.close()

    def suspend(self) -> None:
        self._files.close()

    def kill(self) -> None:
        with suppress(OSError):  # what it could not write is not recorded as written
            self._files.close()


def open_sink(job: FinetuningJob, tracker: JobTracker, live: Callable[[], None]) -> Sink:
    """The writer of a tracker; ``live`` is called while an answer of it is waited for."""
    return TensorBoardSink(job)
