"""The finetuning scheduler with a virtual clock, jobs in memory, and stopwatches."""

import time
from collections.abc import Callable
from typing import Any
from unittest import mock

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

from benchmarks.simulate.jobs import MemoryFeeder
from flexllm_vllm.scheduler import scheduler as scheduler_module
from flexllm_vllm.scheduler.latency_model import LatencyModel
from flexllm_vllm.scheduler.planner import Planner
from flexllm_vllm.scheduler.scheduler import FinetuningMixin


class _Timed(Scheduler):
    """Stops the time of its last calls: the processor's, since a neighbour on the machine is no
    part of it.

    Attributes:
        stock_schedule: CPU seconds of the last ``schedule()``.
        stock_update: CPU seconds of the last ``update_from_output()``.
    """

    stock_schedule = 0.0
    stock_update = 0.0

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        began = time.thread_time()
        output = super().schedule(*args, **kwargs)
        self.stock_schedule = time.thread_time() - began
        return output

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        began = time.thread_time()
        outputs = super().update_from_output(*args, **kwargs)
        self.stock_update = time.thread_time() - began
        return outputs


class TimedScheduler(_Timed, Scheduler):
    """Stock vLLM's."""


class TimedAsyncScheduler(_Timed, AsyncScheduler):
    """Stock vLLM's that schedules ahead of results."""


class _Simulated(FinetuningMixin):
    """Ours. ``super()`` in the finetuning scheduler means the timed stock scheduler.

    Args:
        clock: virtual seconds.

    Attributes:
        feeder: takes jobs.
        own_schedule: CPU seconds of the last ``schedule()`` that were ours.
        own_update: the same of ``update_from_output()``.
        target_ms: longest that the last iteration was to take because of finetuning.
        has_deadlines: its worker ends the backward when it is time, as on a CPU.
    """

    target_ms: float | None = None
    has_deadlines = False

    def __init__(self, *args: Any, clock: Callable[[], float], **kwargs: Any) -> None:
        self.feeder = MemoryFeeder()
        self._clock = clock
        self.own_schedule = 0.0
        self.own_update = 0.0
        with mock.patch.object(scheduler_module, "JobFeeder", return_value=self.feeder):
            super().__init__(*args, **kwargs)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        began = time.thread_time()
        output = super().schedule(*args, **kwargs)
        self.own_schedule = time.thread_time() - began - self.stock_schedule
        self.target_ms = self._recorder.last_target_ms
        return output

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        began = time.thread_time()
        outputs = super().update_from_output(*args, **kwargs)
        self.own_update = time.thread_time() - began - self.stock_update
        return outputs

    def _can_end_backward(self) -> bool:
        return self.has_deadlines

    @property
    def planner(self) -> Planner:
        return self._planner

    @property
    def latency_model(self) -> LatencyModel:
        return self._budget.model


class SimulatedScheduler(_Simulated, TimedScheduler):
    """Over :class:`TimedScheduler`."""


class AsyncSimulatedScheduler(_Simulated, TimedAsyncScheduler):
    """Over :class:`TimedAsyncScheduler`."""
