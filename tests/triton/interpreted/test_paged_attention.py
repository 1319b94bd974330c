"""Attention over a paged cache in the layout of vLLM's GPU back-ends, against autograd."""

import pytest
import torch
from near import assert_near

from flexllm_vllm.kernels.triton.paged_attention import attention_backward, attention_forward

BLOCK = 16


def reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, start: int, scale: float,
    window: int | None, cap: float | None,
) -> torch.Tensor:  # fmt: skip
    """Plain attention of ``query`` [n, heads, d] over ``key`` [kv_heads, length, d]."""
    n, heads, _ = query.shape
    group = heads // key.shape[0]
    key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    scores = torch.einsum("nhd,htd->hnt", query, key) * scale
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    distance = (start + torch.arange(n))[:, None] - torch.arange(key.shape[1])
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    p = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hnt,htd->nhd", p, value)


@pytest.mark.parametrize(
    ("dtype", "heads", "kv_heads", "head_size", "start", "rows", "window", "cap"),
    [
        (torch.float32, 4, 2, 20, 0, 1, None, None),
        (torch.float32, 4, 2, 20, 35, 37, None, None),
        (torch.float32, 2, 2, 16, 50, 20, 11, None),
        (torch.float32, 2, 1, 32, 3, 40, None, 2.0),
        (torch.float32, 2, 1, 16, 70, 33, 40, 1.5),
        (torch.float16, 4, 2, 20, 35, 37, None, None),
        (torch.float16, 3, 1, 16, 9, 50, 20, 3.0),
        (torch.bfloat16, 4, 2, 20, 35, 37, None, None),
        (torch.bfloat16, 3, 1, 16, 9, 50, 20, 3.0),
    ],
)
def test_window_of_queries(
    dtype: torch.dtype, heads: int, kv_heads: int, head_size: int, start: int, rows: int,
    window: int | None, cap: float | None,
) -> None:  # fmt: skip
    length = start + rows
    query, d_out = (torch.randn(rows, heads, head_size).to(dtype) for _ in range(2))
    key, value = (torch.randn(kv_heads, length, head_size).to(dtype) for _ in range(2))
    # Pages in a random order within a cache of NaN; a second layer's pages lie between them.
    num_blocks = -(-length // BLOCK)
    cache = torch.full((num_blocks + 2, 2, kv_heads, BLOCK, 2 * head_size), float("nan"))
    cache = cache.to(dtype)[:, 1]
    block_ids = torch.randperm(num_blocks + 2)[:num_blocks]
    for position in range(length):
        entry = torch.cat((key[:, position], value[:, position]), dim=-1)
        cache[block_ids[position // BLOCK], :, position % BLOCK] = entry
    leaves = [x.double().requires_grad_() for x in (query, key, value)]
    expected = reference(*leaves, start, 0.3, window, cap)
    expected.backward(d_out.double())
    options = {"sliding_window": window, "soft_cap": cap}
    got = attention_forward(query, cache, block_ids, start, 0.3, **options)
    assert_near(got, expected.detach(), dtype)
    dk, dv = (torch.ones(kv_heads, length + 3, head_size) for _ in range(2))
    dq = attention_backward(d_out, query, cache, block_ids, start, 0.3, dk, dv, **options)
    assert_near(dq, leaves[0].grad, dtype)
    assert_near(dk[:, :length], leaves[1].grad + 1, dtype)
    assert_near(dv[:, :length], leaves[2].grad + 1, dtype)
    assert (dk[:, length:] == 1).all()
    assert (dv[:, length:] == 1).all()
