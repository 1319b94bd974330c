"""Causal attention with K and V in vLLM's paged cache: forward again, and the backward.

FlashAttention-2 (arXiv 2307.08691) read through a block table. Scores exist a tile at a time.
``dQ`` is summed by a program for each block of queries and head, ``dK`` and ``dV`` by a program for
each block of keys and K/V head, which goes through the queries that see it: no atomics, and so the
same sum in every run. The forward's row statistics are not kept for the length of a backward; the
``dQ`` kernel finds them in a first pass over the keys and leaves them to the other.

Layout of the cache (``vllm/v1/kv_cache_interface.py``; the FlashAttention, FlashInfer and Triton
back-ends of vLLM 0.32): ``[num_blocks, num_kv_heads, block_size, 2 * head_size]`` by its strides,
of each token K and then V. Its last dimension is contiguous, the others may lie in any order.
"""

import torch
import triton
import triton.language as tl

from flexllm_vllm.kernels.triton.attention_tiles import (
    dkv_tile,
    dq_tile,
    forward_tile,
    launch,
    width,
)

# float32 products on tensor cores as three of TF32 with the rounding errors of the first carried
# along: about float32's own precision. "ieee" multiplies outside tensor cores, and ptxas then
# spills kilobytes of a thread of dkv_kernel on sm_80. Products of half precision ignore it.
PRECISION: tl.constexpr = tl.constexpr("tf32x3")


@triton.jit
def load_keys(
    cache, blocks, keys, known, cache_block, cache_token,
    HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """K and V of ``keys``, each ``[KEYS, WIDTH]``; zero where not ``known``."""
    block = tl.load(blocks + keys // BLOCK_SIZE, mask=known, other=0).to(tl.int64)
    token = cache + block * cache_block + (keys % BLOCK_SIZE) * cache_token
    width = tl.arange(0, WIDTH)
    inside = known[:, None] & (width < HEAD_SIZE)
    k = tl.load(token[:, None] + width, mask=inside, other=0.0)
    v = tl.load(token[:, None] + HEAD_SIZE + width, mask=inside, other=0.0)
    return k, v


@triton.jit
def attention_scores(
    products, position, keys, known, window, scale, soft_cap,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Scores of ``q k`` products, -inf where a key is not seen; and ``d score / d (scale q k)``.

    ``position`` (of the queries) and ``keys`` with ``known`` are two-dimensional: one is a row, the
    others are columns.
    """
    scores = products * scale
    slope = 1.0
    if CAPPED:
        bent = 2.0 * tl.sigmoid(2.0 * scores / soft_cap) - 1.0  # tanh
        scores = soft_cap * bent
        slope = 1.0 - bent * bent
    seen = known & (keys <= position)
    if WINDOWED:
        seen = seen & (position - keys < window)
    return tl.where(seen, scores, float("-inf")), slope


@triton.jit
def online_softmax(scores, largest, total):
    """A tile of a row more: its ``exp(scores - largest)``, the factor by which what was summed
    before shrinks, and the new largest score and sum."""
    new = tl.maximum(largest, tl.max(scores, 1))
    # A row that has not seen a key yet: nothing minus nothing.
    shift = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp(scores - shift[:, None])
    shrunk = tl.exp(largest - shift)
    return p, shrunk, new, total * shrunk + tl.sum(p, 1)


# Sizes of a window change from call to call: were Triton to specialise on them, a call would now
# and then wait seconds for the compiler.
@triton.jit(do_not_specialize=["num_queries", "start", "window"])
def forward_kernel(
    query, cache, blocks, out,
    num_queries, start, window, scale, soft_cap, cache_block, cache_head, cache_token,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The output of a block of queries of a head."""
    head = tl.program_id(1)
    first = tl.program_id(0) * QUERIES
    rows = first + tl.arange(0, QUERIES)
    position = start + rows
    width = tl.arange(0, WIDTH)
    base = (tl.cast(first, tl.int64) * HEADS + head) * HEAD_SIZE
    at = tl.arange(0, QUERIES)[:, None] * (HEADS * HEAD_SIZE) + width
    tile = (rows < num_queries)[:, None] & (width < HEAD_SIZE)
    q = tl.load(query + base + at, mask=tile, other=0.0)
    cache += (head // GROUP).to(tl.int64) * cache_head
    end = start + tl.minimum(first + QUERIES, num_queries)
    begin = 0
    if WINDOWED:
        begin = tl.maximum(0, (start + first - window + 1) // KEYS * KEYS)
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    result = tl.zeros((QUERIES, WIDTH), tl.float32)
    for key_start in range(begin, end, KEYS):
        keys = key_start + tl.arange(0, KEYS)
        known = keys < end
        k, v = load_keys(
            cache, blocks, keys, known, cache_block, cache_token, HEAD_SIZE, BLOCK_SIZE, WIDTH
        )
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores, _ = attention_scores(
            products, position[:, None], keys[None, :], known[None, :], window, scale, soft_cap,
            WINDOWED, CAPPED,
        )  # fmt: skip
        p, shrunk, largest, total = online_softmax(scores, largest, total)
        result = tl.dot(p.to(v.dtype), v, result * shrunk[:, None], input_precision=PRECISION)
    total = tl.where(total == 0.0, 1.0, total)
    tl.store(out + base + at, result / total[:, None], mask=tile)


@triton.jit(do_not_specialize=["num_queries", "start", "window"])
def dq_kernel(
    query, d_out, cache, blocks, dq, row_norm, row_delta,
    num_queries, start, window, scale, soft_cap, cache_block, cache_head, cache_token,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """``dQ`` of a block of queries of a head, and what the other kernel needs of each row: the
    logarithm of its softmax's norm, and ``rowsum(P dP)``."""
    head = tl.program_id(1)
    first = tl.program_id(0) * QUERIES
    rows = first + tl.arange(0, QUERIES)
    valid = rows < num_queries
    position = start + rows
    width = tl.arange(0, WIDTH)
    base = (tl.cast(first, tl.int64) * HEADS + head) * HEAD_SIZE
    at = tl.arange(0, QUERIES)[:, None] * (HEADS * HEAD_SIZE) + width
    tile = valid[:, None] & (width < HEAD_SIZE)
    q = tl.load(query + base + at, mask=tile, other=0.0)
    do = tl.load(d_out + base + at, mask=tile, other=0.0)
    cache += (head // GROUP).to(tl.int64) * cache_head
    end = start + tl.minimum(first + QUERIES, num_queries)
    begin = 0
    if WINDOWED:
        begin = tl.maximum(0, (start + first - window + 1) // KEYS * KEYS)
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    weighted = tl.zeros((QUERIES,), tl.float32)
    for key_start in range(begin, end, KEYS):
        keys = key_start + tl.arange(0, KEYS)
        known = keys < end
        k, v = load_keys(
            cache, blocks, keys, known, cache_block, cache_token, HEAD_SIZE, BLOCK_SIZE, WIDTH
        )
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores, _ = attention_scores(
            products, position[:, None], keys[None, :], known[None, :], window, scale, soft_cap,
            WINDOWED, CAPPED,
        )  # fmt: skip
        p, shrunk, largest, total = online_softmax(scores, largest, total)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        weighted = weighted * shrunk + tl.sum(p * dp, 1)
    # Rows beyond the last query may see no key at all; any finite norm will do.
    none = total == 0.0
    norm = tl.where(none, 0.0, largest) + tl.log(tl.where(none, 1.0, total))
    delta = weighted / tl.where(none, 1.0, total)
    tl.store(row_norm + head * num_queries + rows, norm, mask=valid)
    tl.store(row_delta + head * num_queries + rows, delta, mask=valid)
    result = tl.zeros((QUERIES, WIDTH), tl.float32)
    for key_start in range(begin, end, KEYS):
        keys = key_start + tl.arange(0, KEYS)
        known = keys < end
        k, v = load_keys(
            cache, blocks, keys, known, cache_block, cache_token, HEAD_SIZE, BLOCK_SIZE, WIDTH
        )
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores, slope = attention_scores(
            products, position[:, None], keys[None, :], known[None, :], window, scale, soft_cap,
            WINDOWED, CAPPED,
        )  # fmt: skip
        p = tl.exp(scores - norm[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None]) * slope * scale
        result = tl.dot(ds.to(k.dtype), k, result, input_precision=PRECISION)
    tl.store(dq + base + at, result, mask=tile)


@triton.jit(do_not_specialize=["num_queries", "start", "window", "first_block", "dk_head"])
def dkv_kernel(
    query, d_out, cache, blocks, dk, dv, row_norm, row_delta,
    num_queries, start, window, scale, soft_cap, cache_block, cache_head, cache_token,
    first_block, dk_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Adds the window's share to ``dK`` and ``dV`` of a block of keys."""
    kv_head = tl.program_id(1)
    key_start = (first_block + tl.program_id(0)) * KEYS
    keys = key_start + tl.arange(0, KEYS)
    known = keys < start + num_queries
    width = tl.arange(0, WIDTH)
    inside = width < HEAD_SIZE
    cache += kv_head.to(tl.int64) * cache_head
    k, v = load_keys(
        cache, blocks, keys, known, cache_block, cache_token, HEAD_SIZE, BLOCK_SIZE, WIDTH
    )
    dk_sum = tl.zeros((KEYS, WIDTH), tl.float32)
    dv_sum = tl.zeros((KEYS, WIDTH), tl.float32)
    # Queries before the first key do not see it; those a window after the last neither.
    begin = tl.maximum(0, key_start - start) // QUERIES * QUERIES
    end = num_queries
    if WINDOWED:
        end = tl.minimum(end, tl.maximum(0, key_start + KEYS - 1 + window - start))
    local = tl.arange(0, QUERIES)[:, None] * (HEADS * HEAD_SIZE) + width
    for head in range(kv_head * GROUP, kv_head * GROUP + GROUP):
        for first in range(begin, end, QUERIES):
            rows = first + tl.arange(0, QUERIES)
            valid = rows < num_queries
            base = (tl.cast(first, tl.int64) * HEADS + head) * HEAD_SIZE
            tile = valid[:, None] & inside
            # Rows beyond the last query are zero in both: they add nothing to a product.
            q = tl.load(query + base + local, mask=tile, other=0.0)
            do = tl.load(d_out + base + local, mask=tile, other=0.0)
            norm = tl.load(row_norm + head * num_queries + rows, mask=valid, other=0.0)
            delta = tl.load(row_delta + head * num_queries + rows, mask=valid, other=0.0)
            # Transposed, [KEYS, QUERIES]: as the left factors, K and V are spread over the warps;
            # as right factors each warp would hold all of both in its registers.
            products = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            scores, slope = attention_scores(
                products, start + rows[None, :], keys[:, None], known[:, None], window, scale,
                soft_cap, WINDOWED, CAPPED,
            )  # fmt: skip
            p = tl.exp(scores - norm[None, :])
            dv_sum = tl.dot(p.to(do.dtype), do, dv_sum, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            ds = (p * (dp - delta[None, :]) * slope * scale).to(q.dtype)
            dk_sum = tl.dot(ds, q, dk_sum, input_precision=PRECISION)
    target = kv_head.to(tl.int64) * dk_head + tl.cast(key_start, tl.int64) * HEAD_SIZE
    at = tl.arange(0, KEYS)[:, None] * HEAD_SIZE + width
    mask = known[:, None] & inside
    dk += target
    dv += target
    tl.store(dk + at, tl.load(dk + at, mask=mask, other=0.0) + dk_sum, mask=mask)
    tl.store(dv + at, tl.load(dv + at, mask=mask, other=0.0) + dv_sum, mask=mask)


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
    """See :func:`flexllm_vllm.kernels.paged_attention.attention_backward`.

    Raises:
        ValueError: for a cache, or accumulators, that the kernels cannot read.
    """
    query, d_out = query.contiguous(), d_out.contiguous()
    _check_cache(query, kv_cache)
    _check_accumulators(query, kv_cache, dk, dv)
    num_queries, num_heads, head_size = query.shape
    dq = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    if num_queries == 0:
        return dq
    norm, delta = (dq.new_empty(num_heads, num_queries) for _ in range(2))
    sizes = (
        num_queries,
        start,
        sliding_window or 0,
        scale,
        soft_cap or 1.0,
        *kv_cache.stride()[:3],
    )
    constants = _constants(query, kv_cache, sliding_window, soft_cap)
    tile = dq_tile(head_size, query.dtype)
    dq_kernel[triton.cdiv(num_queries, tile.queries), num_heads](
        query, d_out, kv_cache, block_ids, dq, norm, delta, *sizes, **constants, **launch(tile)
    )
    tile = dkv_tile(head_size, query.dtype)
    # No query of the window sees the keys before its first one's.
    first_block = max(0, start - sliding_window + 1) // tile.keys if sliding_window else 0
    num_blocks = triton.cdiv(start + num_queries, tile.keys) - first_block
    dkv_kernel[num_blocks, kv_cache.shape[1]](
        query, d_out, kv_cache, block_ids, dk, dv, norm, delta, *sizes, first_block, dk.stride(0),
        **constants, **launch(tile),
    )  # fmt: skip
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
    """See :func:`flexllm_vllm.kernels.paged_attention.attention_forward`.

    Raises:
        ValueError: for a cache that the kernel cannot read.
    """
    query = query.contiguous()
    _check_cache(query, kv_cache)
    num_queries, num_heads, head_size = query.shape
    out = torch.empty_like(query)
    if num_queries == 0:
        return out
    tile = forward_tile(head_size, query.dtype)
    forward_kernel[triton.cdiv(num_queries, tile.queries), num_heads](
        query, kv_cache, block_ids, out, num_queries, start, sliding_window or 0, scale,
        soft_cap or 1.0, *kv_cache.stride()[:3],
        **_constants(query, kv_cache, sliding_window, soft_cap), **launch(tile),
    )  # fmt: skip
    return out


def _constants(
    query: torch.Tensor, kv_cache: torch.Tensor, sliding_window: int | None, soft_cap: float | None
) -> dict[str, int | bool]:
    _, num_heads, head_size = query.shape
    return {
        "HEADS": num_heads,
        "GROUP": num_heads // kv_cache.shape[1],
        "HEAD_SIZE": head_size,
        "BLOCK_SIZE": kv_cache.shape[2],
        "WINDOWED": sliding_window is not None,
        "CAPPED": soft_cap is not None,
        "WIDTH": width(head_size),
    }


def _check_cache(query: torch.Tensor, kv_cache: torch.Tensor) -> None:
    _, num_heads, head_size = query.shape
    if (
        kv_cache.dim() != 4
        or kv_cache.shape[3] != 2 * head_size
        or kv_cache.stride(3) != 1
        or num_heads % kv_cache.shape[1]
        or kv_cache.dtype != query.dtype
    ):
        wanted = f"[num_blocks, num_kv_heads, block_size, {2 * head_size}] of {query.dtype}"
        raise ValueError(
            f"the KV cache must be {wanted}, not quantised, contiguous in its last dimension, "
            f"num_kv_heads a divisor of {num_heads}; got {tuple(kv_cache.shape)} of "
            f"{kv_cache.dtype} with strides {kv_cache.stride()}"
        )


def _check_accumulators(
    query: torch.Tensor, kv_cache: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor
) -> None:
    head_size = query.shape[2]
    for x in (dk, dv):
        if (
            x.dtype != torch.float32
            or x.shape[0] != kv_cache.shape[1]
            or x.stride() != (dk.stride(0), head_size, 1)
        ):
            raise ValueError(
                f"dk and dv must be float32 [{kv_cache.shape[1]}, sequence_length, {head_size}], "
                f"with contiguous rows and the same strides; got {x.dtype} {tuple(x.shape)} with "
                f"strides {x.stride()}"
            )
