"""Finetuning on vLLM's own ``/metrics``.

The engine counts (``scheduler/stats.py``); an API process asks it for its counters when somebody
scrapes, and appends them to what vLLM exposes. They never become Prometheus objects of the process:
with several API servers vLLM adds those up over the processes, and each would hold the same engine.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterator
from typing import Any

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector
from sqlalchemy import func, select
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from vllm.v1.metrics.prometheus import get_prometheus_registry

from flexllm_vllm.jobs import schema
from flexllm_vllm.jobs.database import Database
from flexllm_vllm.jobs.types import JobStatus
from flexllm_vllm.log import get_logger

logger = get_logger(__name__)

# An engine answers between two iterations, and one with a long prompt may last a second on CPU.
# A scrape that has waited so long shows what the engine said last.
TIMEOUT_S = 1.0

PREFIX = "vllm:finetuning_"

COUNTERS = {
    "forward_tokens": "Finetuning tokens run forward, those that were redone included.",
    "backward_tokens": "Finetuning tokens run backward: token-layers over the number of layers.",
    "trained_tokens": "Tokens of the examples of finished optimizer steps.",
    "optimizer_steps": "Optimizer steps of all finetuning jobs.",
    "dropped_packs": "Packs of finetuning sequences that gave up their KV blocks and were redone.",
    "slo_iterations": "Iterations with inference that had a latency target.",
    "slo_attained_iterations": "Iterations with inference that kept their latency target.",
}
GAUGES = {
    "jobs_running": "Finetuning jobs that are running.",
    "activation_cache_pages": "Pages of the activation cache.",
    "activation_cache_usage_perc": "Activation-cache usage. 1 means 100 percent usage.",
    "latency_model_mape": "Mean absolute error of predicted iteration times. 1 means 100 percent.",
    "latency_model_margin": "Factor on predictions so that few iterations are late.",
    "deadline_overrun": "Duration of iterations that end at a deadline over what they may take.",
    "latency_model_pace": "Duration of the last iterations over what was predicted.",
    "latency_model_knee_rows": "Rows of a forward beyond which each costs more.",
}
JOB_GAUGES = {
    "step": "Optimizer steps of a running finetuning job.",
    "loss": "Mean loss of a running finetuning job's last optimizer step.",
    "grad_norm": "Gradient norm before clipping, of a running job's last optimizer step.",
}

FetchStats = Callable[[], Awaitable[list[dict[str, Any]]]]


class FinetuningMetrics:
    """The figures of all engines as one API process knows them.

    Args:
        model_name: value of that label, as in vLLM's own metrics.
        fetch: asks each engine for its ``FinetuningStats.snapshot`` and its index ``engine``.
        count_queued: jobs that wait; may block.
    """

    def __init__(self, model_name: str, fetch: FetchStats, count_queued: Callable[[], int]) -> None:
        self._model_name = model_name
        self._fetch = fetch
        self._count_queued = count_queued
        self._engines: list[dict[str, Any]] = []
        self._queued: int | None = None
        self._asking: asyncio.Task[None] | None = None
        self._failed = False

    async def refresh(self, timeout_s: float = TIMEOUT_S) -> None:
        """Asks the engines, and waits for the answer only so long. Never raises."""
        if self._asking is None or self._asking.done():
            # A task of its own, which goes on when the scrape has given up: a late engine is asked
            # once, not once for each scrape.
            self._asking = asyncio.create_task(self._ask())
        await asyncio.wait({self._asking}, timeout=timeout_s)

    async def _ask(self) -> None:
        try:
            self._queued = await asyncio.to_thread(self._count_queued)
            self._engines = await self._fetch()
            self._failed = False
        except Exception:
            if not self._failed:
                logger.exception("cannot refresh the finetuning metrics; /metrics shows the last")
            self._failed = True

    def collect(self) -> list[Metric]:
        """The metric families of the last answer; none if it cannot be read."""
        try:
            return list(self._families())
        except Exception:
            logger.exception("cannot show the finetuning metrics")
            return []

    def _families(self) -> Iterator[Metric]:
        if self._queued is not None:
            # One queue for all engines.
            waiting = "Finetuning jobs that wait to be run."
            queue = GaugeMetricFamily(f"{PREFIX}jobs_queued", waiting, labels=["model_name"])
            queue.add_metric([self._model_name], self._queued)
            yield queue
        if not self._engines:
            return
        engines = [([self._model_name, str(e["engine"])], e) for e in self._engines]
        labels = ["model_name", "engine"]
        for name, text in COUNTERS.items():
            counter = CounterMetricFamily(PREFIX + name, text, labels=labels)
            for values, engine in engines:
                counter.add_metric(values, engine["counters"][name])
            yield counter
        for name, text in GAUGES.items():
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=labels)
            for values, engine in engines:
                gauge.add_metric(values, engine["gauges"][name])
            yield gauge
        for name, text in JOB_GAUGES.items():
            gauge = GaugeMetricFamily(f"{PREFIX}job_{name}", text, labels=[*labels, "job_id"])
            for values, engine in engines:
                for job_id, job in engine["jobs"].items():
                    gauge.add_metric([*values, job_id], job[name])
            yield gauge
        yield from _term_families([*labels, "term"], engines)
        yield from _iteration_families([*labels, "kind"], engines)


def _term_families(
    labels: list[str], engines: list[tuple[list[str], dict[str, Any]]]
) -> Iterator[Metric]:
    """What the latency model knows of each of its terms (``scheduler/latency_model.py``)."""
    cost = GaugeMetricFamily(
        f"{PREFIX}latency_model_cost_seconds",
        "Time that one more unit of a term adds to an iteration.",
        labels=labels,
    )
    part = CounterMetricFamily(
        f"{PREFIX}mixed_iteration_part_seconds",
        "Expected time of iterations with inference and finetuning, by the terms of the model.",
        labels=labels,
    )
    for engine_labels, engine in engines:
        for term, cost_ms in engine["costs_ms"].items():
            cost.add_metric([*engine_labels, term], cost_ms / 1e3)
        for term, seconds in engine["mixed_parts_s"].items():
            part.add_metric([*engine_labels, term], seconds)
    yield from (cost, part)


def _iteration_families(
    labels: list[str], engines: list[tuple[list[str], dict[str, Any]]]
) -> Iterator[Metric]:
    """What is known of the iterations of each kind."""
    count = CounterMetricFamily(
        f"{PREFIX}iterations", "Engine iterations by what they held.", labels=labels
    )
    time = HistogramMetricFamily(
        f"{PREFIX}iteration_time_seconds",
        "Histogram of measured iteration time in seconds.",
        labels=labels,
    )
    predicted = SummaryMetricFamily(
        f"{PREFIX}iteration_predicted_seconds",
        "Iteration time in seconds that the latency model expects.",
        labels=labels,
    )
    target = SummaryMetricFamily(
        f"{PREFIX}iteration_target_seconds",
        "Latency target in seconds of the iterations that had one.",
        labels=labels,
    )
    share = CounterMetricFamily(
        f"{PREFIX}time_seconds",
        "The part of the iteration time that is finetuning's.",
        labels=labels,
    )
    for engine_labels, engine in engines:
        bounds = [*map(str, engine["bounds_s"]), "+Inf"]
        for kind, sums in engine["iterations"].items():
            values = [*engine_labels, kind]
            buckets = list(zip(bounds, sums["time_buckets"], strict=True))
            count.add_metric(values, sums["count"])
            time.add_metric(values, buckets, sums["time_s"])
            predicted.add_metric(values, sums["count"], sums["predicted_s"])
            target.add_metric(values, sums["target_count"], sums["target_s"])
            share.add_metric(values, sums["finetuning_s"])
    yield from (count, time, predicted, target, share)


class _WithFinetuning(Collector):
    """vLLM's metrics, and ours after them."""

    def __init__(self, own: FinetuningMetrics | None) -> None:
        self._own = own

    def collect(self) -> Iterator[Metric]:
        # Built for each scrape, as vLLM's own route does it: with several API servers the registry
        # reads the files of all processes.
        yield from get_prometheus_registry().collect()
        if self._own is not None:
            yield from self._own.collect()


async def _metrics(request: Request) -> Response:
    own: FinetuningMetrics | None = getattr(request.app.state, "finetuning_metrics", None)
    if own is not None:
        await own.refresh()
    content = await run_in_threadpool(generate_latest, _WithFinetuning(own))
    return Response(content, headers={"Content-Type": CONTENT_TYPE_LATEST})


def attach_metrics(app: FastAPI) -> None:
    """Puts routes of our own before vLLM's.

    With several API servers vLLM's route builds its registry anew in each request, so there is
    none that a collector could be added to.
    """
    for path in ("/metrics", "/metrics/"):  # vLLM answers both
        app.router.routes.insert(0, Route(path, _metrics, include_in_schema=False))


def count_queued_jobs(database: Database, models: Collection[str]) -> int:
    """Jobs in the store that wait for an engine with one of these served names."""
    table = schema.jobs
    queued = table.c.status == JobStatus.QUEUED.value
    query = select(func.count()).where(queued, table.c.model.in_(tuple(models)))
    with database.read() as connection:
        return connection.scalar(query) or 0
