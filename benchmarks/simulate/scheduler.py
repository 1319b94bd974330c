"""The finetuning scheduler with a virtual clock, jobs in memory, and stopwatches."""

import time
from collections.abc import Callable
from typing import Any
from unittest import mock

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

from benchmarks.simulate.jobs import MemoryFeeder
from flexllm_vllm.scheduler import FinetuningScheduler
from flexllm_vllm.scheduler import scheduler as scheduler_module
from flexllm_vllm.scheduler.latency_model import LatencyModel
from flexllm_vllm.scheduler.planner import Planner


class TimedScheduler(Scheduler):
    """Stock vLLM's, which stops the time of its last calls: the processor's, since a neighbour on
    the machine is no part of it.

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


class SimulatedScheduler(FinetuningScheduler, TimedScheduler):
    """Ours. ``super()`` in the finetuning scheduler means the timed stock scheduler.

    Args:
        clock: virtual seconds.

    Attributes:
        feeder: takes jobs.
        own_schedule: CPU seconds of the last ``schedule()`` that were ours.
        own_update: the same of ``update_from_output()``.
    """

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
        return output

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        began = time.thread_time()
        outputs = super().update_from_output(*args, **kwargs)
        self.own_update = time.thread_time() - began - self.stock_update
        return outputs

    @property
    def planner(self) -> Planner:
        return self._planner

    @property
    def latency_model(self) -> LatencyModel:
        return self._budget.model

    @property
    def target_ms(self) -> float | None:
        """Longest that the last iteration was to take because of finetuning."""
        return self._target_ms
