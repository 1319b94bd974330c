"""Attention of finetuning windows by our kernel, against vLLM's."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import _custom_ops as ops
from vllm.platforms import current_platform

from flexllm_vllm.patches import cpu_attention_forward
from flexllm_vllm.plan import ForwardWindow, StepPlan
from flexllm_vllm.worker.cpu import FinetuningCPUWorker

current_platform.import_kernels()
HEADS, KV_HEADS, SIZE, BLOCK = 6, 2, 32, 128


def batch() -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Metadata as vLLM builds it of windows of three sequences, their queries, and a cache."""
    query_start_loc = torch.tensor([0, 40, 41, 131], dtype=torch.int32)
    seq_lens = torch.tensor([300, 1, 90], dtype=torch.int32)
    metadata = SimpleNamespace(
        num_actual_tokens=131, query_start_loc=query_start_loc, seq_lens=seq_lens, causal=True,
        block_table=torch.tensor([[5, 0, 3], [1, 0, 0], [2, 0, 0]], dtype=torch.int32),
        dynamic_causal=None,
        scheduler_metadata=ops.cpu_attn_get_scheduler_metadata(
            3, HEADS, KV_HEADS, SIZE, seq_lens, torch.float32, query_start_loc, True, -1, "vec",
            True,
        ),
    )  # fmt: skip
    return metadata, torch.randn(140, HEADS, SIZE), torch.randn(6, KV_HEADS, BLOCK, 2 * SIZE)


def run(impl: Any, metadata: Any, query: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    layer = SimpleNamespace(_k_scale_float=1.0, _v_scale_float=1.0)
    out = torch.full_like(query, 7.0)
    return CPUAttentionBackendImpl.forward(impl, layer, query, query, query, cache, metadata, out)


@pytest.mark.parametrize(
    ("has_window", "has_avx512"), [(False, False), (True, False), (False, True)]
)
def test_a_batch_of_windows_alone_equals_vllms(
    has_window: bool, has_avx512: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: has_avx512)
    torch.manual_seed(0)
    cpu_attention_forward.apply()
    ours = []
    monkeypatch.setattr(
        cpu_attention_forward, "attention_forward",
        lambda *x, inner=cpu_attention_forward.attention_forward: ours.append(x) or inner(*x),
    )  # fmt: skip
    metadata, query, cache = batch()
    impl = SimpleNamespace(
        scale=0.3, sliding_window=64 if has_window else -1, logits_soft_cap=0, alibi_slopes=None,
        sinks=None, head_size=SIZE, attn_type="decoder", kv_cache_dtype="auto",
    )  # fmt: skip
    expected = run(impl, metadata, query, cache)
    assert not ours
    cpu_attention_forward.use_ours(True)
    try:
        got = run(impl, metadata, query, cache)
    finally:
        cpu_attention_forward.use_ours(False)
    assert len(ours) == (0 if has_window or has_avx512 else 3)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "is_ours"), [({"ft-1", "ft-2"}, True), ({"ft-1", "ft-2", "request"}, False)]
)
def test_the_worker_asks_for_it_where_a_batch_holds_no_request(
    rows: set[str], is_ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(cpu_attention_forward, "use_ours", asked.append)
    worker = object.__new__(FinetuningCPUWorker)
    worker._trainer = None
    worker._num_scheduled_tokens = dict.fromkeys(rows, 8)
    worker._plan = StepPlan(
        forward=[ForwardWindow(1, row, start=0, end=8, block_ids=[0]) for row in ("ft-1", "ft-2")]
    )
    worker._before_forward()
    worker._plan = None
    worker._before_forward()
    assert asked == [is_ours, False]
