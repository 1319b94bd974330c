"""Turns on, for an engine that is started next, what vLLM does on GPUs by default
(``without_gpu/sitecustomize.py`` lets it run on a CPU)."""

import os
from pathlib import Path
from typing import Any

import pytest
from vllm.platforms import current_platform


def _prepare(patch: pytest.MonkeyPatch, feature: str) -> None:
    """The engine's processes are started anew, with what they need on their path."""
    patch.setenv(feature, "1")
    patch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    folder = str(Path(__file__).parent / "without_gpu")
    paths = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p not in ("", folder)]
    patch.setenv("PYTHONPATH", os.pathsep.join([folder, *paths]))


def schedule_asynchronously(patch: pytest.MonkeyPatch) -> str:
    """vLLM turns it off on CPU, where it gains nothing. Returns the scheduler to be used."""
    platform = type(current_platform)
    update = platform.check_and_update_config.__func__  # type: ignore[attr-defined]

    def update_config(cls: Any, vllm_config: Any) -> None:
        update(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    patch.setattr(platform, "check_and_update_config", classmethod(update_config))
    _prepare(patch, "FLEXLLM_TEST_STREAMS")
    return "window_scheduler.AsyncWindowScheduler"


def train_by_triton(patch: pytest.MonkeyPatch) -> str:
    """In Triton's interpreter. Returns the worker to be used."""
    _prepare(patch, "FLEXLLM_TEST_KERNELS")
    return "triton_worker.TritonWorker"


def use_model_runner_v2(patch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter."""
    # This process has loaded vLLM without Triton.
    patch.setattr("vllm.config.vllm.HAS_TRITON", True)
    patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    _prepare(patch, "FLEXLLM_TEST_INTERPRETER")
