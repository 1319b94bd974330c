"""What an iteration's finetuning work has come to, read when the device is through with it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from flexllm_vllm.log import get_logger
from flexllm_vllm.plan import JobFailure, StepResult
from flexllm_vllm.worker.transfer import HostCopy

logger = get_logger(__name__)

Take = Callable[[StepResult, list[float]], None]


@dataclass(frozen=True)
class _Reading:
    job_id: str
    values: torch.Tensor
    take: Take


class Readings:
    """Numbers that the device has yet to compute, and what is to be done with them.

    The host does not wait for them in the middle of an iteration: they are copied when its work is
    planned, and read when its output is (:class:`PendingResult`).
    """

    def __init__(self) -> None:
        self._readings: list[_Reading] = []

    def add(self, job_id: str, values: torch.Tensor, take: Take) -> None:
        """Has ``values`` read.

        Args:
            job_id: whose numbers they are. Where ``take`` raises, it fails.
            values: ``[n]`` float64; they must not change before :meth:`collect`.
            take: puts them into the iteration's result.
        """
        self._readings.append(_Reading(job_id, values, take))

    def collect(self, result: StepResult) -> "PendingResult":
        """The result of an iteration, with what was added since the last call."""
        readings, self._readings = self._readings, []
        return PendingResult(result, readings)


class PendingResult:
    """A :class:`StepResult` of which some numbers are still on the device."""

    def __init__(self, result: StepResult, readings: list[_Reading]) -> None:
        self._result = result
        self._readings = readings
        self._copy = HostCopy(torch.cat([r.values for r in readings])) if readings else None

    def __bool__(self) -> bool:
        return bool(self._readings) or self._result != StepResult()

    def get(self) -> StepResult:
        """The result; waits for the device. To be called once."""
        numbers = self._copy.wait() if self._copy is not None else []
        for reading in self._readings:
            count = len(reading.values)
            own, numbers = numbers[:count], numbers[count:]
            try:
                reading.take(self._result, own)
            except Exception as error:
                if not isinstance(error, FloatingPointError):
                    logger.exception("finetuning job %s failed", reading.job_id)
                self._result.failures.setdefault(reading.job_id, failure_of(error))
        return self._result


def failure_of(error: Exception) -> JobFailure:
    """What a user is told of an exception in a job's work."""
    if isinstance(error, FloatingPointError):
        return JobFailure("non_finite_loss", str(error))
    return JobFailure("training_error", f"{type(error).__name__}: {error}")
