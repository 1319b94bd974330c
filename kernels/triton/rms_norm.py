"""RMSNorm again, and its backward: a program for each row, which it reads once."""

import torch
import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(x, weight, y, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x_row = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x_row * x_row) / width + eps)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + columns, x_row * rstd * w, mask=inside)


@triton.jit
def rms_norm_backward_kernel(
    dy, x, weight, residual, dx, width, eps, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x_row = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(dy + row * width + columns, mask=inside, other=0.0).to(tl.float32) * w
    rstd = tl.rsqrt(tl.sum(x_row * x_row) / width + eps)
    normed = x_row * rstd
    gradient = (g - normed * (tl.sum(g * normed) / width)) * rstd
    if HAS_RESIDUAL:
        gradient += tl.load(residual + row * width + columns, mask=inside, other=0.0)
    tl.store(dx + row * width + columns, gradient, mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See :func:`flexllm_vllm.kernels.rms_norm.rms_norm`."""
    x = x.contiguous()
    y = torch.empty_like(x)
    rows, width = x.shape
    if rows:
        rms_norm_kernel[(rows,)](x, weight, y, width, eps, BLOCK=triton.next_power_of_2(width))
    return y


def rms_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """See :func:`flexllm_vllm.kernels.rms_norm.rms_norm_backward`."""
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    rows, width = x.shape
    if rows:
        rms_norm_backward_kernel[(rows,)](
            dy,
            x,
            weight,
            dx if residual is None else residual.contiguous(),
            dx,
            width,
            eps,
            HAS_RESIDUAL=residual is not None,
            BLOCK=triton.next_power_of_2(width),
        )
    return dx
