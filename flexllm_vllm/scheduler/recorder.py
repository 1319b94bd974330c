"""Measures each iteration: for the latency model, the metrics and the log of iterations."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from flexllm_vllm.plan import BackwardWindow, StepPlan, StepResult
from flexllm_vllm.scheduler.budget import LatencyBudget, OptionalWork
from flexllm_vllm.scheduler.iterations import Iteration, IterationLog, inference_work
from flexllm_vllm.scheduler.latency_model import IterationWork
from flexllm_vllm.scheduler.stats import FinetuningStats, Kind


@dataclass
class InFlight:
    """An iteration that is scheduled and whose output has not come yet.

    Attributes:
        started: seconds since the epoch.
        began: by the recorder's clock.
        output: vLLM's ``SchedulerOutput``, by which the iteration is known when it ends.
        inference: its part without finetuning; None: to be told from the output.
        target_ms: longest that it is to take because of finetuning; None where there is none to
            run.
        deadline_ms: when the worker is to end what is optional, from ``began``.
    """

    started: float
    began: float
    output: Any = None
    inference: IterationWork | None = None
    target_ms: float | None = None
    deadline_ms: float | None = None

    @property
    def plan(self) -> StepPlan:
        return getattr(self.output, "finetuning", None) or StepPlan()


class IterationRecorder:
    """Follows iterations from their scheduling to their output.

    With asynchronous scheduling the next one is scheduled before the output of the last has come;
    the worker runs them one after the other. An iteration takes from the later of its own
    scheduling and the output before it, until its own output.

    Args:
        clock: seconds; a simulation has its own.
        budget: learns from what is measured.
        stats: count it.
        num_layers: decoder layers.
        layer_cost: cost of a layer's backward, in decoder layers.

    Attributes:
        log: of the last iterations.
        calibrate: takes what is measured, in place of all others, while it is not None.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        budget: LatencyBudget,
        stats: FinetuningStats,
        num_layers: int,
        layer_cost: Callable[[int], float],
    ) -> None:
        self._clock = clock
        self._budget = budget
        self._stats = stats
        self._num_layers = num_layers
        self._layer_cost = layer_cost
        self._in_flight: deque[InFlight] = deque()
        self._last_end = float("-inf")
        self.log = IterationLog()
        self.calibrate: Callable[[IterationWork, float], None] | None = None

    def begin(self) -> InFlight:
        """An iteration is about to be scheduled."""
        iteration = InFlight(time.time(), self._clock())
        self._in_flight.append(iteration)
        return iteration

    @property
    def num_in_flight(self) -> int:
        """Iterations that are scheduled and whose output has not come yet."""
        return len(self._in_flight)

    @property
    def last_target_ms(self) -> float | None:
        """Target of the iteration that was scheduled last, while it is in flight."""
        return self._in_flight[-1].target_ms

    def end(self, output: Any, result: StepResult | None = None) -> None:
        """The output of an iteration was processed, and what came of its finetuning work."""
        iteration = self._take(output)
        if iteration is None:
            return
        now = self._clock()
        duration_ms = 1e3 * (now - max(iteration.began, self._last_end))
        self._last_end = now
        inference = iteration.inference or inference_work(output)
        result, plan = result or StepResult(), iteration.plan
        firm = self._work(inference, plan, plan.backward)
        work = self._work(inference, plan, [*plan.backward, *result.optional])
        if not (work.has_inference or work.has_finetuning):
            return
        if self.calibrate is not None:
            self.calibrate(work, duration_ms)
            return
        self._add(iteration, work, inference, duration_ms, result.optional)
        # An adapter's start and end are no part of what the model describes.
        if plan.start or plan.save or plan.end:
            return
        optional = None
        if result.optional and iteration.deadline_ms is not None:
            optional = OptionalWork(
                self._work(IterationWork(), StepPlan(), result.optional),
                result.optional_ms,
                iteration.deadline_ms,
                was_cut=result.optional != [x.window for x in plan.optional],
            )
        firm_ms = duration_ms - (optional.duration_ms if optional else 0.0)
        self._budget.observe(firm, firm_ms, iteration.target_ms, optional)

    def _take(self, output: Any) -> InFlight | None:
        """The iteration of this output; those before it vLLM has given up."""
        while self._in_flight:
            iteration = self._in_flight.popleft()
            if iteration.output is output:
                return iteration
        return None

    def _work(
        self, inference: IterationWork, plan: StepPlan, windows: list[BackwardWindow]
    ) -> IterationWork:
        """Of an iteration's plan, with these backward windows."""
        if not (plan or windows):
            return inference
        forward = sum(w.end - w.start for w in plan.forward)
        backward = sum(w.num_token_layers * self._layer_cost(w.layer) for w in windows)
        return replace(
            inference,
            has_finetuning_rows=float(forward > 0),
            forward_tokens=float(forward),
            backward_tokens=backward / self._num_layers,
            backward_windows=float(sum(w.num_layers for w in windows)),
            optimizer_steps=float(len(plan.optimize)),
        )

    def _add(
        self,
        iteration: InFlight,
        work: IterationWork,
        inference: IterationWork,
        duration_ms: float,
        optional: list[BackwardWindow],
    ) -> None:
        """Logs and counts an iteration."""
        model = self._budget.model
        predicted_ms = model.predict_ms(work)
        kind: Kind = "inference"
        share = 0.0
        if work.has_finetuning:
            kind, share = "finetuning", 1.0
            if work.has_inference:
                self._stats.mixed_parts(model.parts_ms(work))
                kind, share = "mixed", 1 - model.predict_ms(inference) / max(predicted_ms, 1e-3)
        backward = [*iteration.plan.backward, *optional]
        self.log.add(
            Iteration(
                start_time=iteration.started,
                duration_ms=duration_ms,
                target_ms=iteration.target_ms,
                predicted_ms=predicted_ms,
                decode_tokens=int(work.decode_rows),
                prefill_tokens=int(work.prefill_tokens),
                finetuning_forward_tokens=int(work.forward_tokens),
                finetuning_backward_tokens=sum(
                    w.num_token_layers for w in backward if w.layer < self._num_layers
                ),
                finetuning_loss_tokens=sum(
                    w.num_token_layers for w in backward if w.layer >= self._num_layers
                ),
            )
        )
        self._stats.iteration(
            kind,
            duration_ms=duration_ms,
            target_ms=iteration.target_ms,
            predicted_ms=predicted_ms,
            share=share,
            forward_tokens=int(work.forward_tokens),
            backward_tokens=work.backward_tokens,
        )
