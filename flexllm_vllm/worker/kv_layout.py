"""Makes sure that K and V can be read back from the paged cache of this machine.

vLLM's CPU attention stores K and V in a layout that depends on the instruction set it chose. The
backward reads one of them; any other would give wrong gradients without an error, so the layout
is tried at start: known values are written by vLLM's own operation and read back by ours.
"""

from typing import Any

import torch
from vllm import _custom_ops as ops

from flexllm_vllm.kernels import triton_support
from flexllm_vllm.kernels.paged_attention import read_paged_kv


def check_kv_layout(
    runner: Any, kv_cache: torch.Tensor, num_kv_heads: int, head_size: int, dtype: torch.dtype
) -> None:
    """Raises ValueError where ``read_paged_kv`` does not understand the cache."""
    if triton_support.INTERPRETED:
        raise ValueError(
            "TRITON_INTERPRET=1 sends the operations of finetuning to Triton's interpreter, which "
            "reads the KV cache as a GPU's; unset it"
        )
    groups = runner.kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise ValueError(
            f"finetuning needs one KV cache group, this model has {len(groups)} (hybrid attention)"
        )
    attention = next(module for module in runner.model.modules() if hasattr(module, "isa"))
    _, _, block_size, _ = kv_cache.shape
    if block_size != groups[0].kv_cache_spec.block_size:
        raise ValueError("finetuning needs equal KV block sizes in scheduler and attention kernel")
    num_blocks, num_tokens = 4, block_size + block_size // 2
    scratch = torch.zeros(num_blocks, *kv_cache.shape[1:], dtype=kv_cache.dtype)
    key_cache, value_cache = scratch.view(num_blocks, num_kv_heads, 2 * block_size, -1).chunk(2, 2)
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(num_tokens, num_kv_heads, head_size, generator=generator).to(dtype)
    value = torch.randn(num_tokens, num_kv_heads, head_size, generator=generator).to(dtype)
    table = torch.tensor([2, 1])
    positions = torch.arange(num_tokens)
    slot_mapping = table[positions // block_size] * block_size + positions % block_size
    ops.cpu_attn_reshape_and_cache(
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping,
        attention.isa,
        k_scale=1.0,
        v_scale=1.0,
        kv_cache_dtype="auto",
    )
    key_t, read = read_paged_kv(scratch, table, num_tokens)
    if not (torch.equal(key_t, key.permute(1, 2, 0)) and torch.equal(read, value.transpose(0, 1))):
        raise ValueError(
            f"finetuning cannot read the KV cache layout of vLLM's CPU attention '{attention.isa}' "
            f"with head size {head_size} and {dtype}; try --dtype float32"
        )
