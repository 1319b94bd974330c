"""Makes sure that K and V can be read back from the paged cache of this machine.

vLLM's attention stores K and V in a layout that depends on the back-end, and on CPU on the
instruction set that it chose. The backward reads one of them; any other would give wrong gradients
without an error, so the layout is tried at start: known values are written by vLLM's own operation
and read back by ours.
"""

from typing import Any

import torch

from flexllm_vllm.kernels import triton_support
from flexllm_vllm.kernels.paged_attention import (
    attention_forward,
    attention_forward_torch,
    read_paged_kv,
)
from flexllm_vllm.models.base import ModelBackward


def check_cpu_layout(runner: Any, model: ModelBackward) -> None:
    """Raises ValueError where ``read_paged_kv`` does not understand the cache."""
    from vllm import _custom_ops as ops

    if triton_support.INTERPRETED:
        raise ValueError(
            "TRITON_INTERPRET=1 sends the operations of finetuning to Triton's interpreter, which "
            "reads the KV cache as a GPU's; unset it"
        )
    kv_cache, num_kv_heads, dtype = model.kv_cache(0), model.num_kv_heads, model.dtype
    _check_blocks(runner, kv_cache)
    attention = next(module for module in runner.model.modules() if hasattr(module, "isa"))
    block_size = kv_cache.shape[2]
    num_blocks, num_tokens = 4, block_size + block_size // 2
    scratch = torch.zeros(num_blocks, *kv_cache.shape[1:], dtype=kv_cache.dtype)
    key_cache, value_cache = scratch.view(num_blocks, num_kv_heads, 2 * block_size, -1).chunk(2, 2)
    key, value = (_some_heads(model, num_tokens, seed) for seed in (0, 1))
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
            f"with head size {model.head_size} and {dtype}; try --dtype float32"
        )


def check_gpu_layout(runner: Any, model: ModelBackward) -> None:
    """Raises ValueError where the kernels of ``kernels/triton`` do not understand the cache."""
    kv_cache = model.kv_cache(0)
    _check_blocks(runner, kv_cache)
    attention = next(m for m in runner.get_model().modules() if hasattr(m, "impl"))
    block_size = kv_cache.shape[2]
    num_tokens = block_size + block_size // 2
    scratch = torch.zeros_like(kv_cache[:4])  # with its strides
    query, key, value = (_some_heads(model, num_tokens, seed) for seed in (0, 1, 2))
    table = torch.tensor([2, 1], device=model.device)
    positions = torch.arange(num_tokens, device=model.device)
    slot_mapping = table[positions // block_size] * block_size + positions % block_size
    attention.impl.do_kv_cache_update(attention, key, value, scratch, slot_mapping)
    scale = model.head_size**-0.5
    found = attention_forward(query, scratch, table, 0, scale)
    key_t, by_head = key.permute(1, 2, 0), value.transpose(0, 1)
    expected = attention_forward_torch(query, key_t, by_head, 0, scale)
    if not torch.allclose(found, expected, atol=0.05, rtol=0.05):
        raise ValueError(
            f"finetuning cannot read the KV cache layout of vLLM's attention back-end "
            f"{type(attention.impl).__name__} with head size {model.head_size} and {model.dtype}; "
            "try --attention-backend FLASH_ATTN or TRITON_ATTN"
        )


def _check_blocks(runner: Any, kv_cache: torch.Tensor) -> None:
    """Raises ValueError for a cache of several groups, or of blocks unlike the scheduler's."""
    groups = runner.kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise ValueError(
            f"finetuning needs one KV cache group, this model has {len(groups)} (hybrid attention)"
        )
    if kv_cache.dim() != 4 or kv_cache.shape[2] != groups[0].kv_cache_spec.block_size:
        raise ValueError("finetuning needs equal KV block sizes in scheduler and attention kernel")


def _some_heads(model: ModelBackward, num_tokens: int, seed: int) -> torch.Tensor:
    """``[num_tokens, num_kv_heads, head_size]``, the same in every run."""
    generator = torch.Generator().manual_seed(seed)
    heads = torch.randn(num_tokens, model.num_kv_heads, model.head_size, generator=generator)
    return heads.to(model.device, model.dtype)
