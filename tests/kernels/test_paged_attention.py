"""K and V written by vLLM's own operation; attention's backward against autograd in float64."""

import pytest
import torch
from vllm import _custom_ops as ops
from vllm.platforms import current_platform

from flexllm_vllm.kernels.paged_attention import (
    attention_backward,
    attention_forward,
    read_paged_kv,
)

current_platform.import_kernels()


def filled_cache(
    key: torch.Tensor, value: torch.Tensor, table: torch.Tensor, isa: str, block_size: int
) -> torch.Tensor:
    """A paged cache that holds ``[tokens, kv_heads, head_size]`` in the blocks of ``table``."""
    num_tokens, kv_heads, head_size = key.shape
    cache = torch.full((16, kv_heads, block_size, 2 * head_size), float("nan")).to(key.dtype)
    halves = cache.view(16, kv_heads, 2 * block_size, -1).chunk(2, dim=2)
    positions = torch.arange(num_tokens)
    slots = table[positions // block_size] * block_size + positions % block_size
    ops.cpu_attn_reshape_and_cache(
        key, value, *halves, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
    )
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("isa", "head_size"), [("vec", 64), ("vec", 128), ("vec16", 80)])
@pytest.mark.parametrize("num_tokens", [1, 127, 128, 300])
def test_keys_and_values_are_read_back_exactly(
    dtype: torch.dtype, isa: str, head_size: int, num_tokens: int
) -> None:
    key, value = (torch.randn(num_tokens, 2, head_size).to(dtype) for _ in range(2))
    table = torch.tensor([5, 0, 3])
    cache = filled_cache(key, value, table, isa, 128)
    read_key, read_value = read_paged_kv(cache, table, num_tokens)
    assert torch.equal(read_key, key.permute(1, 2, 0))
    assert torch.equal(read_value, value.transpose(0, 1))


@pytest.mark.parametrize("window", [1, 7, 64, 300])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(("dtype", "block_size"), [(torch.float32, 128), (torch.float32, 32),
                                                   (torch.bfloat16, 128)])  # fmt: skip
def test_gradients_equal_autograd_whatever_the_windows(
    window: int, heads: int, kv_heads: int, dtype: torch.dtype, block_size: int
) -> None:
    check_gradients(window, heads, kv_heads, dtype, block_size, "vec", 32)


@pytest.mark.parametrize(("isa", "head_size"), [("vec", 64), ("vec", 96), ("vec16", 80)])
@pytest.mark.parametrize("window", [50, 300])
def test_gradients_whatever_the_head_size(window: int, isa: str, head_size: int) -> None:
    check_gradients(window, 4, 2, torch.float32, 32, isa, head_size)


def check_gradients(
    window: int, heads: int, kv_heads: int, dtype: torch.dtype, block_size: int, isa: str, d: int
) -> None:
    torch.manual_seed(window)
    n = 300
    q, k, v = (torch.randn(n, h, d).to(dtype) for h in (heads, kv_heads, kv_heads))
    d_out = torch.randn(n, heads, d).to(dtype)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in leaves), is_causal=True, scale=0.3, enable_gqa=True
    )[0].transpose(0, 1)
    exact.backward(d_out.double())

    table = torch.randperm(-(-n // block_size) + 3)[: -(-n // block_size)]
    cache = filled_cache(k, v, table, isa, block_size)
    dk, dv = torch.zeros(kv_heads, n, d), torch.zeros(kv_heads, n, d)
    dq, out = torch.empty(q.shape), torch.empty_like(q)
    for end in range(n, 0, -window):
        rows = slice(max(0, end - window), end)
        out[rows] = attention_forward(q[rows], cache, table, rows.start, 0.3)
        dq[rows] = attention_backward(d_out[rows], q[rows], cache, table, rows.start, 0.3, dk, dv)
    bound = 1e-5 if dtype is torch.float32 else 2e-2
    gradients = zip((dq, dk.transpose(0, 1), dv.transpose(0, 1)), leaves, strict=True)
    for got, expected in ((out, exact.detach()), *((g, leaf.grad) for g, leaf in gradients)):
        assert (got.double() - expected).norm() < bound * expected.norm()
