"""Causal attention for a window of queries, K and V read from vLLM's paged cache: the backward, and
the forward again."""

import torch

from flexllm_vllm.kernels import native
from flexllm_vllm.kernels.triton_support import use_triton

# Queries a block holds. Scores exist for one block at a time, [heads, block, keys so far], and the
# keys beyond the block's last query are never touched: half of the work of a full square.
QUERY_BLOCK = 128


def read_paged_kv(
    kv_cache: torch.Tensor, block_ids: torch.Tensor, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gathers the K and V of one sequence from the cache of vLLM's CPU attention back-end.

    Layout (``vllm/v1/attention/backends/cpu_attn.py``, ISA "vec"): ``[num_blocks, num_kv_heads,
    block_size, 2 * head_size]``, of which each ``(block, head)`` holds first K, transposed
    (``[head_size, block_size]``), then V (``[block_size, head_size]``).

    Args:
        kv_cache: one layer's cache.
        block_ids: ``[num_blocks_of_sequence]`` int64, the sequence's block table.
        num_tokens: tokens to read, from the first.

    Returns:
        K ``[num_kv_heads, head_size, num_tokens]`` (transposed) and V
        ``[num_kv_heads, num_tokens, head_size]``.
    """
    _, num_kv_heads, block_size, twice = kv_cache.shape
    head_size = twice // 2
    num_blocks = -(-num_tokens // block_size)
    blocks = kv_cache.index_select(0, block_ids[:num_blocks]).view(
        num_blocks, num_kv_heads, 2, block_size * head_size
    )
    key = blocks[:, :, 0].reshape(num_blocks, num_kv_heads, head_size, block_size)
    key = key.permute(1, 2, 0, 3).reshape(num_kv_heads, head_size, -1)
    value = blocks[:, :, 1].reshape(num_blocks, num_kv_heads, block_size, head_size)
    value = value.transpose(0, 1).reshape(num_kv_heads, -1, head_size)
    return key[:, :, :num_tokens], value[:, :num_tokens]


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
    """Gradient of causal attention for the queries ``[start, start + num_queries)``.

    Softmax rows are recomputed. With ``P = softmax(scale Q K^T)``, ``dP = dO V^T`` and
    ``dS = P * (dP - rowsum(P * dP))``: ``dQ = scale dS K``, ``dK += scale dS^T Q``,
    ``dV += P^T dO`` (FlashAttention-2, arXiv 2307.08691, section 3.1; its ``D = rowsum(dO * O)`` is
    written in a form that does not need the forward's output).

    Args:
        d_out: ``[num_queries, num_heads, head_size]``.
        query: like ``d_out``, with its rotary embedding.
        kv_cache: one layer's cache, see :func:`read_paged_kv`; on a GPU see
            ``kernels/triton/paged_attention.py``.
        block_ids: ``[num_blocks_of_sequence]`` int64.
        start: position of the first query.
        scale: of the scores.
        dk: ``[num_kv_heads, sequence_length, head_size]`` float32, accumulated in place.
        dv: like ``dk``.
        sliding_window: keys that a query sees, itself among them; None for all before it.
        soft_cap: scores are ``soft_cap * tanh(scores / soft_cap)`` (Gemma 2, arXiv 2408.00118).

    Returns:
        dQ ``[num_queries, num_heads, head_size]`` float32.
    """
    if use_triton(query):
        from flexllm_vllm.kernels.triton import paged_attention

        return paged_attention.attention_backward(
            d_out, query, kv_cache, block_ids, start, scale, dk, dv, sliding_window, soft_cap
        )
    dq = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    num_queries, num_heads, head_size = query.shape
    plain = sliding_window is None and soft_cap is None
    if plain and head_size % native.lanes() == 0 and native.call(
        "attention_backward", d_out.contiguous(), query.contiguous(), kv_cache, kv_cache.stride(0),
        kv_cache.stride(1), block_ids, num_queries, start, num_heads, dk.shape[0], head_size,
        kv_cache.shape[2], scale, dk, dv, dk.stride(0), dq,
    ):  # fmt: skip
        return dq
    key_t, value = read_paged_kv(kv_cache, block_ids, start + num_queries)
    return attention_backward_torch(
        d_out, query, key_t, value, start, scale, dk, dv, sliding_window, soft_cap
    )


def attention_backward_torch(
    d_out: torch.Tensor,
    query: torch.Tensor,
    key_t: torch.Tensor,
    value: torch.Tensor,
    start: int,
    scale: float,
    dk: torch.Tensor,
    dv: torch.Tensor,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """:func:`attention_backward` in torch operations, on K and V as :func:`read_paged_kv` gives
    them."""
    num_queries, num_heads, head_size = query.shape
    num_kv_heads = key_t.shape[0]
    group = num_heads // num_kv_heads
    dq = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    for first in range(0, num_queries, QUERY_BLOCK):
        rows = slice(first, min(first + QUERY_BLOCK, num_queries))
        n = rows.stop - rows.start
        keys = start + rows.stop
        q = _by_kv_head(query[rows], num_kv_heads)
        do = _by_kv_head(d_out[rows], num_kv_heads)
        k_t, v = key_t[:, :, :keys], value[:, :keys]
        p, bent = _softmax_rows(q, k_t, start + rows.start, n, scale, sliding_window, soft_cap)
        dv[:, :keys].add_(torch.matmul(p.to(do.dtype).transpose(1, 2), do))
        dp = torch.matmul(do, v.transpose(1, 2)).float()
        ds = dp.sub_((p * dp).sum(-1, keepdim=True)).mul_(p).mul_(scale)
        if bent is not None:
            ds = ds.mul_(1 - bent.square())  # the slope of tanh
        ds = ds.to(q.dtype)
        dk[:, :keys].add_(torch.matmul(ds.transpose(1, 2), q))
        dq_block = torch.matmul(ds, k_t.transpose(1, 2))
        dq[rows] = (
            dq_block.view(num_kv_heads, group, n, head_size)
            .permute(2, 0, 1, 3)
            .reshape(n, num_heads, head_size)
        )
    return dq


def attention_forward(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_ids: torch.Tensor,
    start: int,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """Causal attention again, where its output was not kept.

    Args:
        query, kv_cache, block_ids, start, scale, sliding_window, soft_cap: as for
            :func:`attention_backward`.

    Returns:
        ``[num_queries, num_heads, head_size]`` in the dtype of ``query``.
    """
    if use_triton(query):
        from flexllm_vllm.kernels.triton import paged_attention

        return paged_attention.attention_forward(
            query, kv_cache, block_ids, start, scale, sliding_window, soft_cap
        )
    query = query.contiguous()
    out = torch.empty_like(query)
    num_queries, num_heads, head_size = query.shape
    plain = sliding_window is None and soft_cap is None
    num_kv_heads, block_size = kv_cache.shape[1:3]
    if plain and head_size % native.lanes() == 0 and native.call(
        "attention_forward", query, kv_cache, kv_cache.stride(0), kv_cache.stride(1), block_ids,
        num_queries, start, num_heads, num_kv_heads, head_size, block_size, scale, out,
    ):  # fmt: skip
        return out
    key_t, value = read_paged_kv(kv_cache, block_ids, start + num_queries)
    return attention_forward_torch(query, key_t, value, start, scale, sliding_window, soft_cap)


def attention_forward_torch(
    query: torch.Tensor,
    key_t: torch.Tensor,
    value: torch.Tensor,
    start: int,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """:func:`attention_forward` in torch operations."""
    num_queries, num_heads, head_size = query.shape
    num_kv_heads = key_t.shape[0]
    out = torch.empty_like(query)
    for first in range(0, num_queries, QUERY_BLOCK):
        rows = slice(first, min(first + QUERY_BLOCK, num_queries))
        n = rows.stop - rows.start
        keys = start + rows.stop
        q = _by_kv_head(query[rows], num_kv_heads)
        p, _ = _softmax_rows(
            q, key_t[:, :, :keys], start + rows.start, n, scale, sliding_window, soft_cap
        )
        out[rows] = (
            torch.matmul(p.to(q.dtype), value[:, :keys])
            .view(num_kv_heads, num_heads // num_kv_heads, n, head_size)
            .permute(2, 0, 1, 3)
            .reshape(n, num_heads, head_size)
        )
    return out


def _by_kv_head(x: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """``[n, num_heads, d]`` -> ``[num_kv_heads, group * n, d]``."""
    n, num_heads, d = x.shape
    group = num_heads // num_kv_heads
    return x.view(n, num_kv_heads, group, d).permute(1, 2, 0, 3).reshape(num_kv_heads, -1, d)


def _softmax_rows(
    q: torch.Tensor,
    k_t: torch.Tensor,
    first: int,
    n: int,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Softmax of the scores of ``n`` queries from position ``first``, causal, in float32; and
    ``tanh(scores / soft_cap)`` where there is a cap."""
    num_kv_heads, keys = q.shape[0], k_t.shape[2]
    scores = torch.matmul(q, k_t).float().mul_(scale)
    bent = None
    if soft_cap is not None:
        bent = torch.tanh(scores / soft_cap)
        scores = bent * soft_cap
    seen = torch.ones(n, keys, dtype=torch.bool, device=q.device).tril_(first)
    if sliding_window is not None:
        seen.triu_(first - sliding_window + 1)
    scores.view(num_kv_heads, -1, n, keys).masked_fill_(~seen, float("-inf"))
    return torch.softmax(scores, dim=-1), bent
