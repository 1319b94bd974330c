"""Writers of trackers as the tracking threads use them."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Protocol

from flexllm_vllm.api.tracker_access import TrackerAccess
from flexllm_vllm.api.tracker_process import ProcessSink
from flexllm_vllm.jobs.tracker_types import JobTracker
from flexllm_vllm.jobs.types import FinetuningJob
from flexllm_vllm.trackers.points import MetricPoint
from flexllm_vllm.trackers.run import RunDescription
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


OpenSink = Callable[[FinetuningJob, JobTracker, Callable[[], None]], Sink]


def sink_opener(access: TrackerAccess) -> OpenSink:
    """Makes the writers of trackers; they open nothing before there is something to write."""

    def open_sink(job: FinetuningJob, tracker: JobTracker, live: Callable[[], None]) -> Sink:
        if tracker.kind == "tensorboard":
            return TensorBoardSink(job)
        description = _description(job, tracker)
        environment = access.process_environment(tracker.kind)
        return ProcessSink(tracker.kind, description, environment, live)

    return open_sink


def _description(job: FinetuningJob, tracker: JobTracker) -> RunDescription:
    config = {
        "model": job.model,
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "method": job.method,
        "total_steps": job.total_steps,
        **asdict(job.training),
        **{f"lora.{name}": value for name, value in asdict(job.lora).items()},
        **{f"metadata.{name}": value for name, value in (job.metadata or {}).items()},
    }
    return RunDescription(
        job.id, job.adapter_name, tracker.settings, config, str(job.folder.absolute())
    )
