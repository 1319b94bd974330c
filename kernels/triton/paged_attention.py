"""Causal attention with K and V in vLLM's paged cache: forward again, and the backward.

FlashAttention-2 (arXiv 2307.08691) read through a block table. Scores exist a tile at a time.
``dQ`` is summed by a program for each block of queries and head, ``dK`` and ``dV`` by a program for
each block of keys and K/V head, which goes through the queries that see it: no atomics.

Layout of the cache (``vllm/v1/kv_cache_interface.py``, all GPU back-ends): ``[num_blocks,
num_kv_heads, block_size, 2 * head_size]`` by its strides, of each token K and then V.
"""

import torch
import triton
import triton.language as tl

QUERIES, KEYS = 32, 32


@triton.jit
def load_keys(
    cache, blocks, keys, known, width, inside, head_size, block_size, cache_block, cache_token
):
    """K and V ``[KEYS, WIDTH]`` of these positions, through the block table."""
    block = tl.load(blocks + keys // block_size, mask=known, other=0).to(tl.int64)
    token = cache + block * cache_block + (keys % block_size) * cache_token
    tile = known[:, None] & inside
    k = tl.load(token[:, None] + width, mask=tile, other=0.0)
    v = tl.load(token[:, None] + head_size + width, mask=tile, other=0.0)
    return k, v


@triton.jit
def masked_scores(
    q, k, position, keys, seen, window, scale, soft_cap, WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
):  # fmt: skip
    """Scores of a tile, minus infinity where a query does not see a key, and their slope by the
    product of query and key."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    slope = tl.full(scores.shape, 1.0, tl.float32) * scale
    if CAPPED:
        bent = 2.0 * tl.sigmoid(2.0 * scores / soft_cap) - 1.0  # tanh
        scores = soft_cap * bent
        slope *= 1.0 - bent * bent
    seen = seen & (keys <= position[:, None])
    if WINDOWED:
        seen = seen & (position[:, None] - keys < window)
    return tl.where(seen, scores, float("-inf")), slope


@triton.jit
def dq_kernel(
    query, d_out, cache, blocks, dq, row_norm, row_delta,
    num_queries, num_heads, group, start, window, scale, soft_cap, head_size, block_size,
    cache_block, cache_head, cache_token,
    FORWARD: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The output again (``FORWARD``, into ``dq``), or ``dQ`` with what the other kernel needs of
    each row: the logarithm of its softmax's norm, and ``rowsum(P dP)``."""
    head = tl.program_id(1)
    first = tl.program_id(0) * QUERIES
    rows = first + tl.arange(0, QUERIES)
    valid = rows < num_queries
    position = start + rows
    width = tl.arange(0, WIDTH)
    inside = width < head_size
    at = rows.to(tl.int64)[:, None] * num_heads * head_size + head * head_size + width
    tile = valid[:, None] & inside
    q = tl.load(query + at, mask=tile, other=0.0)
    cache += (head // group).to(tl.int64) * cache_head
    end = tl.minimum(start + first + QUERIES, start + num_queries)
    begin = 0
    if WINDOWED:
        begin = tl.maximum(0, (start + first - window + 1) // KEYS * KEYS)
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    weighted = tl.zeros((QUERIES,), tl.float32)
    result = tl.zeros((QUERIES, WIDTH), tl.float32)
    if not FORWARD:
        do = tl.load(d_out + at, mask=tile, other=0.0)
    for key_start in range(begin, end, KEYS):
        keys = key_start + tl.arange(0, KEYS)
        known = keys < end
        k, v = load_keys(cache, blocks, keys, known, width, inside, head_size, block_size,
                         cache_block, cache_token)  # fmt: skip
        scores, _ = masked_scores(q, k, position, keys, known, window, scale, soft_cap, WINDOWED,
                                  CAPPED)  # fmt: skip
        new = tl.maximum(largest, tl.max(scores, 1))
        # A row that has not seen a key yet: nothing minus nothing.
        shift = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp(scores - shift[:, None])
        shrunk = tl.exp(largest - shift)
        total = total * shrunk + tl.sum(p, 1)
        if FORWARD:
            result = result * shrunk[:, None]
            result = tl.dot(p.to(v.dtype), v, result, input_precision="ieee")
        else:
            dp = tl.dot(do, tl.trans(v), input_precision="ieee")
            weighted = weighted * shrunk + tl.sum(p * dp, 1)
        largest = new
    total = tl.where(total == 0.0, 1.0, total)
    if FORWARD:
        tl.store(dq + at, result / total[:, None], mask=tile)
    else:
        norm = tl.where(valid, largest + tl.log(total), 0.0)
        delta = weighted / total
        tl.store(row_norm + head * num_queries + rows, norm, mask=valid)
        tl.store(row_delta + head * num_queries + rows, delta, mask=valid)
        for key_start in range(begin, end, KEYS):
            keys = key_start + tl.arange(0, KEYS)
            known = keys < end
            k, v = load_keys(cache, blocks, keys, known, width, inside, head_size, block_size,
                             cache_block, cache_token)  # fmt: skip
            scores, slope = masked_scores(q, k, position, keys, known & valid[:, None], window,
                                          scale, soft_cap, WINDOWED, CAPPED)  # fmt: skip
            p = tl.exp(scores - norm[:, None])
            dp = tl.dot(do, tl.trans(v), input_precision="ieee")
            ds = p * (dp - delta[:, None]) * slope
            result = tl.dot(ds.to(k.dtype), k, result, input_precision="ieee")
        tl.store(dq + at, result, mask=tile)


@triton.jit
def dkv_kernel(
    query, d_out, cache, blocks, dk, dv, row_norm, row_delta,
    num_queries, num_heads, group, start, window, scale, soft_cap, head_size, block_size,
    cache_block, cache_head, cache_token, dk_head,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Adds the window's share to ``dK`` and ``dV`` of a block of keys."""
    kv_head = tl.program_id(1)
    keys = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    num_keys = start + num_queries
    known = keys < num_keys
    width = tl.arange(0, WIDTH)
    inside = width < head_size
    cache += kv_head.to(tl.int64) * cache_head
    k, v = load_keys(cache, blocks, keys, known, width, inside, head_size, block_size, cache_block,
                     cache_token)  # fmt: skip
    tile_kv = known[:, None] & inside
    dk_sum = tl.zeros((KEYS, WIDTH), tl.float32)
    dv_sum = tl.zeros((KEYS, WIDTH), tl.float32)
    # Queries before the first key do not see it; those a window later neither.
    begin = tl.maximum(0, tl.program_id(0) * KEYS - start) // QUERIES * QUERIES
    end = num_queries
    if WINDOWED:
        end = tl.minimum(num_queries, tl.maximum(0, (tl.program_id(0) + 1) * KEYS + window - start))
    for member in range(group):
        head = kv_head * group + member
        for first in range(begin, end, QUERIES):
            rows = first + tl.arange(0, QUERIES)
            valid = rows < num_queries
            position = start + rows
            at = rows.to(tl.int64)[:, None] * num_heads * head_size + head * head_size + width
            tile = valid[:, None] & inside
            q = tl.load(query + at, mask=tile, other=0.0)
            do = tl.load(d_out + at, mask=tile, other=0.0)
            norm = tl.load(row_norm + head * num_queries + rows, mask=valid, other=0.0)
            delta = tl.load(row_delta + head * num_queries + rows, mask=valid, other=0.0)
            scores, slope = masked_scores(q, k, position, keys, known & valid[:, None], window,
                                          scale, soft_cap, WINDOWED, CAPPED)  # fmt: skip
            p = tl.exp(scores - norm[:, None])
            dv_sum = tl.dot(tl.trans(p.to(do.dtype)), do, dv_sum, input_precision="ieee")
            dp = tl.dot(do, tl.trans(v), input_precision="ieee")
            ds = (p * (dp - delta[:, None]) * slope).to(q.dtype)
            dk_sum = tl.dot(tl.trans(ds), q, dk_sum, input_precision="ieee")
    target = kv_head.to(tl.int64) * dk_head + keys.to(tl.int64)[:, None] * head_size + width
    dk_sum += tl.load(dk + target, mask=tile_kv, other=0.0)
    dv_sum += tl.load(dv + target, mask=tile_kv, other=0.0)
    tl.store(dk + target, dk_sum, mask=tile_kv)
    tl.store(dv + target, dv_sum, mask=tile_kv)


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
    """See :func:`flexllm_vllm.kernels.paged_attention.attention_backward`."""
    query, d_out = query.contiguous(), d_out.contiguous()
    num_queries, num_heads, head_size = query.shape
    num_kv_heads = dk.shape[0]
    dq = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    if num_queries == 0:
        return dq
    norm, delta = (dq.new_empty(num_heads, num_queries) for _ in range(2))
    shape = (num_queries, num_heads, num_heads // num_kv_heads, start, sliding_window or 0, scale,
             soft_cap or 1.0, head_size, kv_cache.shape[2], *kv_cache.stride()[:3])  # fmt: skip
    tile = _tile(head_size, sliding_window, soft_cap)
    dq_kernel[triton.cdiv(num_queries, QUERIES), num_heads](
        query, d_out, kv_cache, block_ids, dq, norm, delta, *shape, FORWARD=False, **tile
    )
    dkv_kernel[triton.cdiv(start + num_queries, KEYS), num_kv_heads](
        query, d_out, kv_cache, block_ids, dk, dv, norm, delta, *shape, dk.stride(0), **tile
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
    """See :func:`flexllm_vllm.kernels.paged_attention.attention_forward`."""
    query = query.contiguous()
    num_queries, num_heads, head_size = query.shape
    out = torch.empty_like(query)
    if num_queries == 0:
        return out
    num_kv_heads, block_size = kv_cache.shape[1:3]
    dq_kernel[triton.cdiv(num_queries, QUERIES), num_heads](
        query, query, kv_cache, block_ids, out, out, out, num_queries, num_heads,
        num_heads // num_kv_heads, start, sliding_window or 0, scale, soft_cap or 1.0, head_size,
        block_size, *kv_cache.stride()[:3],
        FORWARD=True, **_tile(head_size, sliding_window, soft_cap),
    )  # fmt: skip
    return out


def num_warps(width: int) -> int:
    """Warps of a program: with four of them the sums of wide heads do not fit into the registers
    (ptxas for sm_80, bfloat16, 128 elements: 132 bytes spilled by ``dQ``)."""
    return 8 if width > 64 else 4


def _tile(head_size: int, sliding_window: int | None, soft_cap: float | None) -> dict[str, object]:
    width = max(16, triton.next_power_of_2(head_size))
    return {
        "num_warps": num_warps(width),
        "WINDOWED": sliding_window is not None,
        "CAPPED": soft_cap is not None,
        "QUERIES": QUERIES,
        "KEYS": KEYS,
        "WIDTH": width,
    }
