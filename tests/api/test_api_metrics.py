"""``/metrics`` with vLLM's route behind ours, read back with Prometheus' own parser."""

import asyncio
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import vllm.v1.metrics.loggers
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from vllm.entrypoints.serve.instrumentator.metrics import attach_router as attach_vllms_metrics

from flexllm_vllm.api.metrics import (
    FinetuningMetrics,
    attach_metrics,
    count_queued_jobs,
)
from flexllm_vllm.jobs import JobStore, LoraSpec, NewJob, TrainingSpec
from flexllm_vllm.jobs.database import Database
from flexllm_vllm.scheduler.stats import FinetuningStats

ROOT = Path(__file__).parents[2]
OURS = {"model_name": "demo", "engine": "0"}


def engine_stats(running: tuple[str, ...] = ("ftjob-a",)) -> dict[str, Any]:
    """What an engine answers after an iteration of each kind and a step."""
    stats = FinetuningStats([0.05, 0.1])
    for kind, ms in (("inference", 30.0), ("mixed", 90.0), ("finetuning", 300.0)):
        stats.iteration(
            kind,  # type: ignore[arg-type]
            duration_ms=ms,
            target_ms=100.0,
            predicted_ms=80.0,
            share=0.5,
            forward_tokens=32,
            backward_tokens=2.5,
        )
    stats.mixed_parts({"decode_rows": 50.0, "forward_tokens": 40.0})
    stats.optimizer_step("ftjob-a", step=7, loss=1.25, grad_norm=0.5, tokens=640)
    return {
        "engine": 0,
        **stats.snapshot(
            running_jobs=running,
            dropped_packs=4,
            pages=8,
            free_pages=6,
            mape=0.1,
            margin=1.3,
            overrun=1.02,
            pace=1.1,
            knee=32.0,
            costs_ms={"forward_tokens": 2.0},
        ),
    }


class Engine:
    """Answers like the engine, or does not."""

    def __init__(self) -> None:
        self.answer = engine_stats()
        self.asked = 0
        self.stuck = asyncio.Event()
        self.stuck.set()

    async def fetch(self) -> list[dict[str, Any]]:
        self.asked += 1
        await self.stuck.wait()
        return [self.answer]


def metrics_of(engine: Engine, queued: int = 2) -> FinetuningMetrics:
    return FinetuningMetrics("demo", engine.fetch, lambda: queued)


def samples(text: str) -> dict[str, dict[frozenset[tuple[str, str]], float]]:
    """Values by name and labels."""
    found: dict[str, dict[frozenset[tuple[str, str]], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values = found.setdefault(sample.name, {})
            labels = frozenset(sample.labels.items())
            assert labels not in values, f"{sample.name} is there twice"
            values[labels] = sample.value
    return found


def value(text: str, name: str, **labels: str) -> float | None:
    return samples(text).get(name, {}).get(frozenset(labels.items()))


def exposition(metrics: FinetuningMetrics) -> str:
    asyncio.run(metrics.refresh())
    registry = CollectorRegistry()
    registry.register(metrics)  # type: ignore[arg-type]
    return generate_latest(registry).decode()


@pytest.fixture
def scrape(serve: Callable[[FastAPI], str]) -> Callable[[FinetuningMetrics | None], str]:
    """Scrapes an application with vLLM's routes for metrics and ours."""

    def scrape(metrics: FinetuningMetrics | None) -> str:
        app = FastAPI()
        attach_vllms_metrics(app)
        attach_metrics(app)
        app.state.finetuning_metrics = metrics
        url = serve(app)
        response, slashed = (httpx.get(url + path) for path in ("/metrics", "/metrics/"))
        assert (response.status_code, slashed.status_code) == (200, 200)
        assert set(samples(response.text)) <= set(samples(slashed.text))
        assert response.headers["content-type"].startswith("text/plain; version=")
        return response.text

    return scrape


def test_all_figures_are_exposed_beside_vllms(
    scrape: Callable[[FinetuningMetrics | None], str],
) -> None:
    text = scrape(metrics_of(Engine()))
    assert "python_info" in text  # what vLLM's registry holds is still there
    for name, expected in {
        "forward_tokens_total": 96,
        "backward_tokens_total": 7.5,
        "trained_tokens_total": 640,
        "optimizer_steps_total": 1,
        "dropped_packs_total": 4,
        "slo_iterations_total": 2,
        "slo_attained_iterations_total": 2,
        "jobs_running": 1,
        "activation_cache_pages": 8,
        "activation_cache_usage_perc": 0.25,
        "latency_model_mape": 0.1,
        "latency_model_margin": 1.3,
        "deadline_overrun": 1.02,
        "latency_model_pace": 1.1,
        "latency_model_knee_rows": 32,
    }.items():
        assert value(text, f"vllm:finetuning_{name}", **OURS) == expected, name
    assert value(text, "vllm:finetuning_jobs_queued", model_name="demo") == 2
    job = {**OURS, "job_id": "ftjob-a"}
    assert value(text, "vllm:finetuning_job_loss", **job) == 1.25
    assert value(text, "vllm:finetuning_job_grad_norm", **job) == 0.5
    assert value(text, "vllm:finetuning_job_step", **job) == 7
    term = {**OURS, "term": "forward_tokens"}
    assert value(text, "vllm:finetuning_latency_model_cost_seconds", **term) == 0.002
    assert value(text, "vllm:finetuning_mixed_iteration_part_seconds_total", **term) == 0.04
    mixed = {**OURS, "kind": "mixed"}
    assert value(text, "vllm:finetuning_iterations_total", **mixed) == 1
    assert value(text, "vllm:finetuning_time_seconds_total", **mixed) == 0.045
    assert value(text, "vllm:finetuning_iteration_target_seconds_sum", **mixed) == 0.1
    assert value(text, "vllm:finetuning_iteration_target_seconds_count", **mixed) == 1
    assert value(text, "vllm:finetuning_iteration_predicted_seconds_sum", **mixed) == 0.08
    bucket = "vllm:finetuning_iteration_time_seconds_bucket"
    assert [value(text, bucket, **mixed, le=le) for le in ("0.05", "0.1", "+Inf")] == [0, 1, 1]


def test_a_job_that_has_ended_leaves_no_series() -> None:
    engine = Engine()
    metrics = metrics_of(engine)
    assert "ftjob-a" in exposition(metrics)
    engine.answer = engine_stats(running=())
    assert "ftjob-a" not in exposition(metrics)


def test_several_api_servers_do_not_add_up_the_engines_counters(
    scrape: Callable[[FinetuningMetrics | None], str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    count = "from prometheus_client import Counter; Counter('vllm:of_processes', '').inc()"
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for _ in range(2):  # two API processes, and what vLLM counts in each
        subprocess.run([sys.executable, "-c", count], env=env, check=True)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    for _ in range(2):  # whichever process answers
        text = scrape(metrics_of(Engine()))
        assert value(text, "vllm:of_processes_total") == 2
        assert value(text, "vllm:finetuning_trained_tokens_total", **OURS) == 640


def test_without_finetuning_metrics_the_route_is_vllms(
    scrape: Callable[[FinetuningMetrics | None], str],
) -> None:
    text = scrape(None)
    assert "python_info" in text
    assert "finetuning" not in text


def test_a_stuck_engine_delays_a_scrape_a_little_and_is_asked_once() -> None:
    async def scrapes() -> None:
        engine = Engine()
        metrics = metrics_of(engine)
        await metrics.refresh()
        engine.answer = engine_stats(running=())
        engine.stuck.clear()
        began = time.monotonic()
        for _ in range(3):
            await metrics.refresh(timeout_s=0.05)
        assert time.monotonic() - began < 1.0
        assert engine.asked == 2
        assert _loss_of(metrics) == [1.25]  # what it said last
        engine.stuck.set()
        await metrics.refresh()  # the late answer
        await metrics.refresh()
        assert engine.asked == 3
        assert _loss_of(metrics) == []

    asyncio.run(scrapes())


def _loss_of(metrics: FinetuningMetrics) -> list[float]:
    return [
        sample.value
        for family in metrics.collect()
        if family.name == "vllm:finetuning_job_loss"
        for sample in family.samples
    ]


def test_an_engine_that_fails_leaves_vllms_metrics_and_the_queue(
    scrape: Callable[[FinetuningMetrics | None], str],
) -> None:
    async def dead() -> list[dict[str, Any]]:
        raise RuntimeError("dead")

    text = scrape(FinetuningMetrics("demo", dead, lambda: 3))
    assert "python_info" in text
    assert value(text, "vllm:finetuning_jobs_queued", model_name="demo") == 3


def test_an_answer_that_cannot_be_read_breaks_nothing(
    scrape: Callable[[FinetuningMetrics | None], str],
) -> None:
    engine = Engine()
    engine.answer = {"engine": 0}
    assert "python_info" in scrape(metrics_of(engine))


def test_the_queue_is_what_this_servers_engine_could_run(tmp_path: Path) -> None:
    line = b'{"prompt": "a", "completion": "b"}'
    with JobStore(tmp_path) as store:
        file = store.files.create(io.BytesIO(line), "a", "fine-tune")
        spec = TrainingSpec(batch_size=1, max_seq_length=8, seed=0)
        for number, model in enumerate(("demo", "alias", "demo", "another")):
            job_id, _ = store.new_job()
            name = f"ft:{model}:local::{number}"
            store.create_job(NewJob(job_id, model, name, file.id, LoraSpec(), spec, 1, {}))
        database = Database(tmp_path / "store.db")
        assert count_queued_jobs(database, ("demo", "alias")) == 3
        store.claim_next_job(["demo"])
        assert count_queued_jobs(database, ("demo", "alias")) == 2
        database.close()


# -- documentation and dashboard -------------------------------------------------------------


def _exposed() -> set[str]:
    return {name for name in samples(exposition(metrics_of(Engine()))) if "finetuning" in name}


def test_every_metric_is_documented() -> None:
    documented = (ROOT / "docs" / "metrics.md").read_text()
    for name in _exposed():
        family = re.sub(r"_(bucket|sum|count)$", "", name)
        assert f"`{family}`" in documented, family


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    dashboard = json.loads((ROOT / "examples" / "grafana" / "finetuning.json").read_text())
    queries = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", [])]
    used = set(re.findall(r"vllm:\w+", " ".join(queries)))
    of_vllm = Path(vllm.v1.metrics.loggers.__file__).read_text()
    for name in used - _exposed():
        family = re.sub(r"_(bucket|sum|count|total)$", "", name)
        assert f'"{family}"' in of_vllm, name
