"""The backward of attention by xformers, in place of the kernels of ``kernels/triton``.

xformers has no paged backward: K and V of the sequence are gathered from the cache first, and each
K/V head is repeated for the queries of its group. That costs ``2 * num_keys * num_heads *
head_size`` elements and their traffic for each window and layer, against kernels that were tuned
for each GPU (CUTLASS, FlashAttention) where ours are written in Triton. It should win with wide
windows of long sequences and few query heads per K/V head; it has not been measured.
"""

import torch

from flexllm_vllm.kernels import paged_attention

_BLOCK = 16


def attention_backward(
    d_out: torch.Tensor,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_ids: torch.Tensor,
    start: int,
    scale: float,
    dk: torch.Tensor,
    dv: torch.Tensor,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """See :func:`flexllm_vllm.kernels.paged_attention.attention_backward`, which takes over where
    there is a soft cap: xformers has none.

    Args:
        kv_cache: one layer's cache as vLLM has it on a GPU (``kernels/triton/paged_attention.py``).
    """
    if soft_cap is not None:
        return paged_attention.attention_backward(
            d_out, query, kv_cache, block_ids, start, scale, dk, dv, sliding_window, soft_cap
        )
    from xformers.ops import fmha

    num_queries, num_heads, head_size = query.shape
    num_keys, num_kv_heads = start + num_queries, dk.shape[0]
    group = num_heads // num_kv_heads
    key, value = (
        x.repeat_interleave(group, dim=1).unsqueeze(0)
        for x in read_gpu_kv(kv_cache, block_ids, num_keys)
    )
    query, d_out = query.unsqueeze(0), d_out.contiguous().unsqueeze(0)
    # The last query is that of the last key.
    mask = fmha.attn_bias.LowerTriangularFromBottomRightMask()
    if sliding_window is not None:
        mask = mask.make_local_attention(sliding_window)
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(
        query, key, value, attn_bias=mask, scale=scale
    )
    dq, d_key, d_value = fmha.memory_efficient_attention_backward(
        d_out, out, lse, query, key, value, attn_bias=mask, scale=scale
    )
    heads = (num_keys, num_kv_heads, group, head_size)
    dk[:, :num_keys] += d_key.view(heads).sum(2, dtype=torch.float32).transpose(0, 1)
    dv[:, :num_keys] += d_value.view(heads).sum(2, dtype=torch.float32).transpose(0, 1)
    found: torch.Tensor = dq.squeeze(0).float()
    return found


def read_gpu_kv(
    kv_cache: torch.Tensor, block_ids: torch.Tensor, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of one sequence, ``[num_tokens, num_kv_heads, head_size]`` each."""
    _, num_kv_heads, block_size, twice = kv_cache.shape
    blocks = kv_cache.index_select(0, block_ids[: -(-num_tokens // block_size)])
    tokens = blocks.transpose(1, 2).reshape(-1, num_kv_heads, twice)[:num_tokens]
    key, value = tokens.chunk(2, dim=2)
    return key, value


def check(
    num_heads: int, num_kv_heads: int, head_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Tries it on this device, against the same in torch's operations.

    Raises:
        ValueError: xformers is not installed, has no kernel for this, or gives another result.
    """
    flag = "--finetuning-attention-backend xformers"
    try:
        import xformers  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{flag}: {error}; pip install xformers") from error
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    num_tokens, start = 2 * _BLOCK - 5, 7
    cache = some(4, num_kv_heads, _BLOCK, 2 * head_size)
    blocks = torch.tensor([2, 1], device=device)
    query, d_out = (some(num_tokens - start, num_heads, head_size) for _ in range(2))
    scale = head_size**-0.5

    def accumulators() -> tuple[torch.Tensor, torch.Tensor]:
        shape = (num_kv_heads, num_tokens, head_size)
        return torch.zeros(shape, device=device), torch.zeros(shape, device=device)

    found, expected = accumulators(), accumulators()
    try:
        dq = attention_backward(d_out, query, cache, blocks, start, scale, *found)
    except NotImplementedError as error:
        raise ValueError(f"{flag}: {error}") from error
    key, value = read_gpu_kv(cache, blocks, num_tokens)
    by_torch = paged_attention.attention_backward_torch(
        d_out, query, key.permute(1, 2, 0), value.transpose(0, 1), start, scale, *expected
    )
    for got, wanted in zip((dq, *found), (by_torch, *expected), strict=True):
        if not (got - wanted).norm() <= 0.02 * wanted.norm():
            raise ValueError(f"{flag}: it gives other gradients than torch does on {device}")
