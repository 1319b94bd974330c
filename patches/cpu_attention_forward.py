"""Attention of a batch that is finetuning windows alone, by the kernel of their backward.

vLLM's CPU attention takes 1.6 times as long for wide windows on a processor of AVX2 (float32, 9
heads of 64: 8.0 ms against 5.1 for 256 queries after 256 keys, 37.5 against 23.6 after 1792). With
AVX-512 vLLM's is the faster one (1.5 against 2.0, 6.8 against 9.9 ms on Zen 4), and stays. Batches
with requests keep vLLM's, so that no token of theirs depends on finetuning.
Why a patch: vLLM has one attention back-end for all of a model's batches.
Fits vLLM 0.32 (``vllm/v1/attention/backends/cpu_attn.py``). Needless once that is as fast.
"""

from typing import Any

import torch

from flexllm_vllm.kernels import native
from flexllm_vllm.kernels.paged_attention import attention_forward
from flexllm_vllm.kernels.triton_support import use_triton
from flexllm_vllm.patches import require

_stock: Any = None
_is_ours = False


def apply() -> None:
    """Wraps ``CPUAttentionBackendImpl.forward``; once."""
    global _stock
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    if _stock is None:
        _stock = require(CPUAttentionBackendImpl, "forward")
        CPUAttentionBackendImpl.forward = _forward


def use_ours(is_ours: bool) -> None:
    """Whether the next forward is of finetuning windows alone."""
    global _is_ours
    _is_ours = is_ours


def _forward(
    impl: Any,
    layer: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    attn_metadata: Any,
    output: torch.Tensor,
    *more: Any,
    **named: Any,
) -> torch.Tensor:
    if not (_is_ours and attn_metadata is not None and _fits(impl, query)):
        stock: torch.Tensor = _stock(
            impl, layer, query, key, value, kv_cache, attn_metadata, output, *more, **named
        )
        return stock
    for rows, start, block_ids in _windows(attn_metadata):
        output[rows] = attention_forward(query[rows], kv_cache, block_ids, start, impl.scale)
    return output


def _fits(impl: Any, query: torch.Tensor) -> bool:
    """Whether our kernel computes what the layer wants, and is the faster one."""
    return (
        query.dtype is torch.float32
        and impl.sliding_window == -1
        and not impl.logits_soft_cap
        and impl.alibi_slopes is None
        and impl.sinks is None
        and impl.head_size % native.lanes() == 0
        and native.library() is not None
        and not torch.cpu._is_avx512_supported()
        # The tests run Triton's kernels on CPU tensors, which have another layout of K and V.
        and not use_triton(query)
    )


def _windows(metadata: Any) -> list[tuple[slice, int, torch.Tensor]]:
    """Rows, first position and block table of each window; found once for all layers."""
    found: list[tuple[slice, int, torch.Tensor]] | None = getattr(metadata, "windows", None)
    if found is None:
        ends = metadata.query_start_loc.tolist()
        tables = metadata.block_table.to(torch.int64)
        found = metadata.windows = [
            (slice(first, end), length - (end - first), tables[index])
            for index, (first, end, length) in enumerate(
                zip(ends[:-1], ends[1:], metadata.seq_lens.tolist(), strict=True)
            )
            if end > first
        ]
    return found
