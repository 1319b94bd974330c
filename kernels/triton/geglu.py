"""GeGLU (tanh form) again, and its backward fused with it: one pass over gate and up."""

import torch
import triton
import triton.language as tl

from flexllm_vllm.kernels.geglu import CUBIC, SLOPE

BLOCK = 1024


@triton.jit
def half_of_one_plus_tanh(gate, SLOPE: tl.constexpr, CUBIC: tl.constexpr):
    """``(1 + tanh(x)) / 2`` is ``sigmoid(2 x)``."""
    return tl.sigmoid(2.0 * SLOPE * gate * (1.0 + CUBIC * gate * gate))


@triton.jit
def geglu_kernel(
    gate_up, out, width, SLOPE: tl.constexpr, CUBIC: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + columns, mask=inside, other=0.0)
    gelu = gate * half_of_one_plus_tanh(gate, SLOPE, CUBIC)
    tl.store(out + row * width + columns, gelu * up.to(tl.float32), mask=inside)


@triton.jit
def geglu_backward_kernel(
    dy, gate_up, gradient, product, width,
    SLOPE: tl.constexpr, CUBIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    first = row * 2 * width + columns
    gate = tl.load(gate_up + first, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + first + width, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dy + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    half = half_of_one_plus_tanh(gate, SLOPE, CUBIC)
    tl.store(product + row * width + columns, gate * half * up, mask=inside)
    tl.store(gradient + first + width, d * gate * half, mask=inside)
    # With h = half: dh / dgate = 2 h (1 - h) SLOPE (1 + 3 CUBIC gate^2).
    inner = SLOPE * (1.0 + 3.0 * CUBIC * gate * gate)
    slope = half + gate * 2.0 * half * (1.0 - half) * inner
    tl.store(gradient + first, d * up * slope, mask=inside)


def geglu(gate_up: torch.Tensor) -> torch.Tensor:
    """See :func:`flexllm_vllm.kernels.geglu.geglu`."""
    gate_up = gate_up.contiguous()
    rows, twice = gate_up.shape
    out = gate_up.new_empty(rows, twice // 2)
    if rows:
        grid = (rows, triton.cdiv(twice // 2, BLOCK))
        geglu_kernel[grid](gate_up, out, twice // 2, SLOPE=SLOPE, CUBIC=CUBIC, BLOCK=BLOCK)
    return out


def geglu_backward(dy: torch.Tensor, gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`flexllm_vllm.kernels.geglu.geglu_backward`."""
    dy, gate_up = dy.contiguous(), gate_up.contiguous()
    gradient, product = torch.empty_like(gate_up), torch.empty_like(dy, dtype=gate_up.dtype)
    rows, width = dy.shape
    if rows:
        grid = (rows, triton.cdiv(width, BLOCK))
        geglu_backward_kernel[grid](
            dy, gate_up, gradient, product, width, SLOPE=SLOPE, CUBIC=CUBIC, BLOCK=BLOCK
        )
    return gradient, product
