"""What finetuning has done since the engine began, as plain counters.

The engine process only counts. The API processes ask for a snapshot when somebody scrapes
``/metrics`` and give it the names of Prometheus (``api/metrics.py``).
"""

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from flexllm_vllm.scheduler.latency_model import TERMS

Kind = Literal["inference", "finetuning", "mixed"]


@dataclass(slots=True)
class _Iterations:
    """Sums over the iterations of one kind. Times are in seconds.

    Attributes:
        buckets: iterations whose time lies in each bucket of the histogram, the last one open.
        finetuning: the part of their time that was finetuning's.
    """

    buckets: list[int]
    count: int = 0
    time: float = 0.0
    predicted: float = 0.0
    target: float = 0.0
    target_count: int = 0
    finetuning: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "time_buckets": list(accumulate(self.buckets)),
            "time_s": self.time,
            "predicted_s": self.predicted,
            "target_s": self.target,
            "target_count": self.target_count,
            "finetuning_s": self.finetuning,
        }


@dataclass(frozen=True, slots=True)
class _LastStep:
    step: int
    loss: float
    grad_norm: float


class FinetuningStats:
    """Counters of one engine. All methods belong to the engine's main thread.

    Args:
        bounds_s: upper bounds of the buckets for the time of an iteration, ascending, in seconds.
    """

    def __init__(self, bounds_s: Sequence[float]) -> None:
        self._bounds = list(bounds_s)
        self._kinds: dict[Kind, _Iterations] = {
            kind: _Iterations([0] * (len(self._bounds) + 1))
            for kind in ("inference", "finetuning", "mixed")
        }
        self._forward_tokens = 0
        self._backward_tokens = 0.0
        self._trained_tokens = 0
        self._optimizer_steps = 0
        self._mixed_parts: dict[str, float] = dict.fromkeys(TERMS, 0.0)
        self._slo_iterations = 0
        self._slo_attained = 0
        self._last_steps: dict[str, _LastStep] = {}

    def iteration(
        self,
        kind: Kind,
        *,
        duration_ms: float,
        target_ms: float | None,
        predicted_ms: float,
        share: float,
        forward_tokens: int,
        backward_tokens: float,
    ) -> None:
        """Counts an iteration.

        Args:
            kind: what it held.
            duration_ms: measured.
            target_ms: longest that it was to take; None where nothing was to be kept.
            predicted_ms: by the latency model.
            share: of its predicted time that is finetuning's, 0 to 1.
            forward_tokens: finetuning tokens run forward.
            backward_tokens: token-layers run backward, divided by the number of layers.
        """
        seconds = duration_ms / 1e3
        sums = self._kinds[kind]
        # A bucket holds its upper bound, as Prometheus defines it.
        sums.buckets[bisect_left(self._bounds, seconds)] += 1
        sums.count += 1
        sums.time += seconds
        sums.predicted += predicted_ms / 1e3
        sums.finetuning += seconds * share
        if target_ms is not None:
            sums.target += target_ms / 1e3
            sums.target_count += 1
            # Nobody waits for the tokens of an iteration without inference.
            if kind != "finetuning":
                self._slo_iterations += 1
                self._slo_attained += duration_ms <= target_ms
        self._forward_tokens += forward_tokens
        self._backward_tokens += backward_tokens

    def mixed_parts(self, parts_ms: Mapping[str, float]) -> None:
        """Counts what an iteration with inference and finetuning consists of, by the model's terms
        (:meth:`LatencyModel.parts_ms`)."""
        for term, part in parts_ms.items():
            self._mixed_parts[term] += part / 1e3

    def optimizer_step(
        self, job_id: str, *, step: int, loss: float, grad_norm: float, tokens: int
    ) -> None:
        """Counts a step of a job: its number from 1, mean loss, norm before clipping, tokens."""
        self._optimizer_steps += 1
        self._trained_tokens += tokens
        self._last_steps[job_id] = _LastStep(step, loss, grad_norm)

    def snapshot(
        self,
        *,
        running_jobs: Collection[str],
        dropped_packs: int,
        pages: int,
        free_pages: int,
        mape: float,
        margin: float,
        overrun: float,
        pace: float,
        knee: float,
        costs_ms: Mapping[str, float],
    ) -> dict[str, Any]:
        """Everything counted, and the state given here, as plain data that msgpack can carry.

        Keys of ``counters``, ``gauges`` and of a job are the metrics' names without
        ``vllm:finetuning_`` (``job_`` for a job's). ``time_buckets`` are cumulative.

        Args:
            running_jobs: ids; what is kept of all others is forgotten.
            dropped_packs: since the engine began.
            pages, free_pages: of the activation cache; 0 while no job has needed it.
            mape, margin, pace, knee: of the latency model.
            overrun: of iterations that end at a deadline.
            costs_ms: its coefficients, by term.
        """
        # Here and not where jobs end: they end in many ways, and only a scrape shows them.
        self._last_steps = {j: s for j, s in self._last_steps.items() if j in running_jobs}
        gauges: dict[str, float] = {
            "jobs_running": len(running_jobs),
            "activation_cache_pages": pages,
            "activation_cache_usage_perc": (pages - free_pages) / pages if pages else 0.0,
            "latency_model_mape": mape,
            "latency_model_margin": margin,
            "deadline_overrun": overrun,
            "latency_model_pace": pace,
            "latency_model_knee_rows": knee,
        }
        return {
            "counters": {
                "forward_tokens": self._forward_tokens,
                "backward_tokens": self._backward_tokens,
                "trained_tokens": self._trained_tokens,
                "optimizer_steps": self._optimizer_steps,
                "dropped_packs": dropped_packs,
                "slo_iterations": self._slo_iterations,
                "slo_attained_iterations": self._slo_attained,
            },
            "gauges": gauges,
            "costs_ms": dict(costs_ms),
            "mixed_parts_s": dict(self._mixed_parts),
            "bounds_s": self._bounds,
            "iterations": {kind: sums.as_dict() for kind, sums in self._kinds.items()},
            "jobs": {
                job_id: {"step": last.step, "loss": last.loss, "grad_norm": last.grad_norm}
                for job_id, last in self._last_steps.items()
            },
        }
