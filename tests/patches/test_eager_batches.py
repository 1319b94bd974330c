"""Batches with finetuning rows run outside of CUDA graphs, by switches that vLLM has."""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.worker.gpu.dp_utils import dispatch_cg_and_sync_dp
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from flexllm_vllm.patches import eager_batches


def test_vllm_has_the_switches() -> None:
    dispatch = GPUModelRunner._determine_batch_execution_and_padding
    assert "force_eager" in inspect.signature(dispatch).parameters
    assert "need_eager" in inspect.signature(dispatch_cg_and_sync_dp).parameters


@pytest.mark.parametrize("needs_eager", [False, True])
def test_the_first_runner_is_told_which_batches_are_eager(needs_eager: bool) -> None:
    asked: list[dict[str, Any]] = []
    runner = SimpleNamespace(
        input_batch=None,
        _determine_batch_execution_and_padding=lambda **options: asked.append(options),
    )
    eager_batches.apply(runner, torch.nn.Module(), lambda: needs_eager)
    runner._determine_batch_execution_and_padding(num_tokens=3)
    assert asked == [{"num_tokens": 3, **({"force_eager": True} if needs_eager else {})}]


def test_a_runner_without_the_switch_is_refused() -> None:
    with pytest.raises(RuntimeError, match="_determine_batch_execution_and_padding"):
        eager_batches.apply(SimpleNamespace(input_batch=None), torch.nn.Module(), lambda: True)
