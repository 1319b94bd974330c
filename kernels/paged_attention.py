"""Backward of causal attention for a window of queries, K and V read from vLLM's paged cache."""

import torch

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
    out: torch.Tensor,
    query: torch.Tensor,
    key_t: torch.Tensor,
    value: torch.Tensor,
    start: int,
    scale: float,
    dk: torch.Tensor,
    dv: torch.Tensor,
) -> torch.Tensor:
    """Gradient of causal attention for the queries ``[start, start + num_queries)``.

    Softmax rows are recomputed. With ``P = softmax(scale Q K^T)``, ``D = rowsum(dO * O)`` and
    ``dS = P * (dO V^T - D)``: ``dQ = scale dS K``, ``dK += scale dS^T Q``, ``dV += P^T dO``
    (FlashAttention-2, arXiv 2307.08691, section 3.1).

    Args:
        d_out: ``[num_queries, num_heads, head_size]``.
        out: like ``d_out``, the forward's output.
        query: like ``d_out``, after rotary embedding.
        key_t: ``[num_kv_heads, head_size, >= start + num_queries]``, after rotary embedding.
        value: ``[num_kv_heads, >= start + num_queries, head_size]``.
        start: position of the first query.
        scale: of the scores.
        dk: ``[num_kv_heads, num_tokens, head_size]`` float32 accumulator, updated in place.
        dv: like ``dk``.

    Returns:
        dQ, like ``query``.
    """
    num_queries, num_heads, head_size = query.shape
    num_kv_heads = key_t.shape[0]
    group = num_heads // num_kv_heads
    dq = torch.empty_like(query)
    delta = (d_out.float() * out.float()).sum(-1)  # [num_queries, num_heads]

    def by_kv_head(x: torch.Tensor, rows: slice) -> torch.Tensor:
        """``[n, num_heads, d]`` -> ``[num_kv_heads, group * n, d]``."""
        n = x[rows].shape[0]
        return (
            x[rows]
            .view(n, num_kv_heads, group, -1)
            .permute(1, 2, 0, 3)
            .reshape(num_kv_heads, group * n, -1)
        )

    for first in range(0, num_queries, QUERY_BLOCK):
        rows = slice(first, min(first + QUERY_BLOCK, num_queries))
        n = rows.stop - rows.start
        keys = start + rows.stop
        q = by_kv_head(query, rows)
        do = by_kv_head(d_out, rows)
        k_t, v = key_t[:, :, :keys], value[:, :keys]

        scores = torch.matmul(q, k_t).float().mul_(scale)
        causal = torch.ones(n, keys, dtype=torch.bool, device=q.device).tril_(start + rows.start)
        scores.view(num_kv_heads, group, n, keys).masked_fill_(~causal, float("-inf"))
        p = torch.softmax(scores, dim=-1)

        dv[:, :keys].add_(torch.matmul(p.to(do.dtype).transpose(1, 2), do))
        dp = torch.matmul(do, v.transpose(1, 2)).float()
        ds = dp.sub_(by_kv_head(delta.unsqueeze(-1), rows)).mul_(p).mul_(scale).to(q.dtype)
        dk[:, :keys].add_(torch.matmul(ds.transpose(1, 2), q))
        dq_block = torch.matmul(ds, k_t.transpose(1, 2))
        dq[rows] = (
            dq_block.view(num_kv_heads, group, n, head_size)
            .permute(2, 0, 1, 3)
            .reshape(n, num_heads, head_size)
        )
    return dq
