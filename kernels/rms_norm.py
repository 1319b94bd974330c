"""RMSNorm, recomputed and differentiated with respect to its input."""

import torch

from flexllm_vllm.kernels import native
from flexllm_vllm.kernels.triton_support import use_triton


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``y = x / sqrt(mean(x^2) + eps) * weight``.

    Args:
        x: ``[num_tokens, hidden_size]``.
        weight: ``[hidden_size]``, in the dtype of ``x`` or in float32.
        eps: added to the mean square.

    Returns:
        ``[num_tokens, hidden_size]`` in the dtype of ``x``; computed in float32.
    """
    if use_triton(x):
        from flexllm_vllm.kernels.triton import rms_norm as on_gpu

        return on_gpu.rms_norm(x, weight, eps)
    x = x.contiguous()
    y = torch.empty_like(x)
    if weight.dtype == x.dtype and native.call("rms_norm", x, weight, *x.shape, eps, y):
        return y
    return rms_norm_torch(x, weight, eps)


def add_rms_norm_(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> None:
    """``residual += x``, then ``x = rms_norm(residual)``, in place; on the host.

    Args:
        x: ``[num_tokens, hidden_size]`` contiguous.
        residual: like ``x``.
        weight: ``[hidden_size]``, in the dtype of ``x`` or in float32.
        eps: added to the mean square.
    """
    usable = x.is_contiguous() and residual.is_contiguous() and weight.dtype == x.dtype
    if usable and native.call("add_rms_norm", x, residual, weight, *x.shape, eps):
        return
    residual.add_(x)
    x.copy_(rms_norm_torch(residual, weight, eps))


def rms_norm_torch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """:func:`rms_norm` in torch operations."""
    x32 = x.float()
    rstd = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (x32 * rstd).mul_(weight.float()).to(x.dtype)


def rms_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gradient of :func:`rms_norm` with respect to ``x`` (the weight is frozen).

    With ``g = dy * weight`` and ``n = x * rstd``: ``dx = rstd * (g - n * mean(g * n))``.

    Args:
        dy: ``[num_tokens, hidden_size]``.
        x: ``[num_tokens, hidden_size]``, the input of the forward.
        weight: ``[hidden_size]``.
        eps: as in the forward.
        residual: ``[num_tokens, hidden_size]`` float32, added to the result: the gradient that
            passes by the norm on the residual stream.

    Returns:
        ``[num_tokens, hidden_size]`` float32.
    """
    if use_triton(x):
        from flexllm_vllm.kernels.triton import rms_norm as on_gpu

        return on_gpu.rms_norm_backward(dy, x, weight, eps, residual)
    dx = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    dy, x = dy.contiguous(), x.contiguous()
    same = dy.dtype == weight.dtype == x.dtype
    if same and native.call("rms_norm_backward", dy, x, weight, residual, *x.shape, eps, dx):
        return dx
    return rms_norm_backward_torch(dy, x, weight, eps, residual)


def rms_norm_backward_torch(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`rms_norm_backward` in torch operations."""
    x32 = x.float()
    rstd = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    normed = x32 * rstd
    g = dy.float() * weight.float()
    projection = (g * normed).mean(-1, keepdim=True)
    dx = g.sub_(normed.mul_(projection)).mul_(rstd)
    return dx if residual is None else dx.add_(residual)
