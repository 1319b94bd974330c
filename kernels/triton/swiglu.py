"""SwiGLU again, and its backward fused with it: one pass over gate and up."""

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def swiglu_kernel(gate_up, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + columns, mask=inside, other=0.0)
    silu = gate * tl.sigmoid(gate)
    tl.store(out + row * width + columns, silu * up.to(tl.float32), mask=inside)


@triton.jit
def swiglu_backward_kernel(dy, gate_up, gradient, product, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    first = row * 2 * width + columns
    gate = tl.load(gate_up + first, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + first + width, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dy + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(product + row * width + columns, silu * up, mask=inside)
    tl.store(gradient + first + width, d * silu, mask=inside)
    # d silu(g) / dg = s + g s (1 - s) = s + silu (1 - s)
    tl.store(gradient + first, d * up * (sigmoid + silu * (1.0 - sigmoid)), mask=inside)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """See :func:`flexllm_vllm.kernels.swiglu.swiglu`."""
    gate_up = gate_up.contiguous()
    rows, twice = gate_up.shape
    out = gate_up.new_empty(rows, twice // 2)
    if rows:
        grid = (rows, triton.cdiv(twice // 2, BLOCK))
        swiglu_kernel[grid](gate_up, out, twice // 2, BLOCK=BLOCK)
    return out


def swiglu_backward(dy: torch.Tensor, gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`flexllm_vllm.kernels.swiglu.swiglu_backward`."""
    dy, gate_up = dy.contiguous(), gate_up.contiguous()
    gradient, product = torch.empty_like(gate_up), torch.empty_like(dy, dtype=gate_up.dtype)
    rows, width = dy.shape
    if rows:
        grid = (rows, triton.cdiv(width, BLOCK))
        swiglu_backward_kernel[grid](dy, gate_up, gradient, product, width, BLOCK=BLOCK)
    return gradient, product
