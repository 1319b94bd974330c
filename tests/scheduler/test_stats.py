"""Counters of the engine, against the same sums taken by hand."""

import random
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry, Histogram

from flexllm_vllm.scheduler.latency_model import TERMS, IterationWork, LatencyModel
from flexllm_vllm.scheduler.stats import FinetuningStats

BOUNDS = [0.01, 0.1, 1.0]


def snapshot(stats: FinetuningStats, **changes: Any) -> dict[str, Any]:
    state: dict[str, Any] = {
        "running_jobs": [],
        "dropped_packs": 0,
        "pages": 0,
        "free_pages": 0,
        "mape": 0.2,
        "margin": 1.5,
        "overrun": 1.04,
        "pace": 1.1,
        "knee": 16.0,
        "costs_ms": dict.fromkeys(TERMS, 0.5),
    }
    return stats.snapshot(**{**state, **changes})


def iteration(stats: FinetuningStats, kind: Any, duration_ms: float, **changes: Any) -> None:
    figures: dict[str, Any] = {
        "target_ms": 100.0,
        "predicted_ms": 50.0,
        "share": 0.5,
        "forward_tokens": 0,
        "backward_tokens": 0.0,
    }
    stats.iteration(kind, duration_ms=duration_ms, **{**figures, **changes})


def test_the_time_of_iterations_falls_into_the_buckets_that_prometheus_would_choose() -> None:
    stats = FinetuningStats(BOUNDS)
    reference = Histogram("t", "t", buckets=BOUNDS, registry=CollectorRegistry())
    rng = random.Random(0)
    times = [10.0, 100.0, 1000.0, *(rng.lognormvariate(4, 2) for _ in range(200))]
    for ms in times:
        iteration(stats, "mixed", ms)
        reference.observe(ms / 1e3)
    expected = [s.value for s in reference.collect()[0].samples if s.name == "t_bucket"]
    mixed = snapshot(stats)["iterations"]["mixed"]
    assert mixed["time_buckets"] == expected
    assert mixed["time_buckets"][-1] == mixed["count"] == len(times)
    assert mixed["time_s"] == pytest.approx(sum(times) / 1e3)


def test_kinds_are_counted_apart_and_tokens_together() -> None:
    stats = FinetuningStats(BOUNDS)
    iteration(stats, "inference", 20, target_ms=None, share=0.0)
    iteration(stats, "mixed", 80, share=0.25, forward_tokens=32, backward_tokens=1.5)
    iteration(stats, "mixed", 80, share=0.75, forward_tokens=16)
    iteration(stats, "finetuning", 200, share=1.0, backward_tokens=0.5)
    counted = snapshot(stats)
    assert {k: s["count"] for k, s in counted["iterations"].items()} == {
        "inference": 1,
        "mixed": 2,
        "finetuning": 1,
    }
    assert counted["counters"]["forward_tokens"] == 48
    assert counted["counters"]["backward_tokens"] == 2.0
    mixed = counted["iterations"]["mixed"]
    assert mixed["finetuning_s"] == pytest.approx(0.08)
    assert mixed["predicted_s"] == pytest.approx(0.1)
    assert (mixed["target_count"], mixed["target_s"]) == (2, pytest.approx(0.2))
    assert counted["iterations"]["inference"]["target_count"] == 0


def test_only_iterations_with_inference_and_a_target_count_for_the_slo() -> None:
    stats = FinetuningStats(BOUNDS)
    iteration(stats, "mixed", 100.0)  # exactly the target
    iteration(stats, "mixed", 100.1)
    iteration(stats, "inference", 99.0)
    iteration(stats, "inference", 5.0, target_ms=None)
    iteration(stats, "finetuning", 5.0)
    counters = snapshot(stats)["counters"]
    assert (counters["slo_iterations"], counters["slo_attained_iterations"]) == (3, 2)


def test_a_job_that_has_ended_is_forgotten_but_its_steps_stay_counted() -> None:
    stats = FinetuningStats(BOUNDS)
    for step in (1, 2):
        stats.optimizer_step("a", step=step, loss=2.0 / step, grad_norm=0.5, tokens=100)
    stats.optimizer_step("b", step=1, loss=3.0, grad_norm=1.0, tokens=10)
    both = snapshot(stats, running_jobs={"a": 0, "b": 0, "not yet stepped": 0})
    assert both["jobs"] == {
        "a": {"step": 2, "loss": 1.0, "grad_norm": 0.5},
        "b": {"step": 1, "loss": 3.0, "grad_norm": 1.0},
    }
    assert both["gauges"]["jobs_running"] == 3
    assert list(snapshot(stats, running_jobs=["b"])["jobs"]) == ["b"]
    last = snapshot(stats, running_jobs=["a", "b"])
    assert list(last["jobs"]) == ["b"]
    assert last["counters"]["optimizer_steps"] == 3
    assert last["counters"]["trained_tokens"] == 210


def test_the_state_at_the_time_of_the_snapshot() -> None:
    stats = FinetuningStats(BOUNDS)
    gauges = snapshot(stats, pages=8, free_pages=6, mape=0.07, margin=1.2)["gauges"]
    assert gauges["activation_cache_pages"] == 8
    assert gauges["activation_cache_usage_perc"] == 0.25
    assert gauges["latency_model_mape"] == 0.07
    assert gauges["latency_model_margin"] == 1.2
    assert gauges["deadline_overrun"] == 1.04
    assert gauges["latency_model_pace"] == 1.1
    assert gauges["latency_model_knee_rows"] == 16.0
    assert snapshot(stats)["gauges"]["activation_cache_usage_perc"] == 0.0


def test_mixed_iterations_by_the_terms_of_the_model() -> None:
    model, stats = LatencyModel(), FinetuningStats(BOUNDS)
    work = IterationWork(decode_rows=2, has_finetuning_rows=1, forward_tokens=40)
    for _ in range(3):
        stats.mixed_parts(model.parts_ms(work))
    parts = snapshot(stats, costs_ms=model.coefficients)["mixed_parts_s"]
    assert sum(parts.values()) == pytest.approx(3e-3 * model.predict_ms(work))
    assert parts["forward_tokens"] == pytest.approx(3e-3 * 40 * model.cost_ms("forward_tokens"))
    assert parts["rows_beyond_knee"] == pytest.approx(
        3e-3 * (42 - model.knee) * model.cost_ms("rows_beyond_knee")
    )
    assert parts["backward_tokens"] == 0


def test_a_snapshot_crosses_to_the_api_process_unchanged() -> None:
    stats = FinetuningStats(BOUNDS)
    iteration(stats, "mixed", 30, forward_tokens=8, backward_tokens=0.25)
    stats.optimizer_step("a", step=1, loss=float("inf"), grad_norm=0.1, tokens=7)
    sent = snapshot(stats, running_jobs=["a"], dropped_packs=3)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(sent)) == sent
    iteration(stats, "mixed", 30)
    assert sent["iterations"]["mixed"]["count"] == 1
