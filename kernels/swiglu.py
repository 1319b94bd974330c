"""SwiGLU, ``silu(gate) * up``, recomputed and differentiated."""

import torch
import torch.nn.functional as F

from flexllm_vllm.kernels import native
from flexllm_vllm.kernels.triton_support import use_triton


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``.

    Args:
        gate_up: ``[num_tokens, 2 * intermediate_size]``, gate in the first half.

    Returns:
        ``[num_tokens, intermediate_size]`` in the same dtype.
    """
    if use_triton(gate_up):
        from flexllm_vllm.kernels.triton import swiglu as on_gpu

        return on_gpu.swiglu(gate_up)
    num_tokens, twice = gate_up.shape
    out = gate_up.new_empty(num_tokens, twice // 2)
    if native.call("swiglu", gate_up.contiguous(), num_tokens, twice // 2, out):
        return out
    return swiglu_torch(gate_up)


def swiglu_torch(gate_up: torch.Tensor) -> torch.Tensor:
    """:func:`swiglu` in torch operations."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def swiglu_backward(dy: torch.Tensor, gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of :func:`swiglu`, and its value again: both need the same pass over memory.

    With ``s = sigmoid(gate)``: ``dup = dy * gate * s`` and
    ``dgate = dy * up * s * (1 + gate * (1 - s))``.

    Args:
        dy: ``[num_tokens, intermediate_size]``.
        gate_up: ``[num_tokens, 2 * intermediate_size]``, the input of the forward.

    Returns:
        The gradient ``[num_tokens, 2 * intermediate_size]`` and the product
        ``[num_tokens, intermediate_size]``, in the dtype of ``gate_up``.
    """
    if use_triton(gate_up):
        from flexllm_vllm.kernels.triton import swiglu as on_gpu

        return on_gpu.swiglu_backward(dy, gate_up)
    dy, gate_up = dy.contiguous(), gate_up.contiguous()
    out, product = torch.empty_like(gate_up), torch.empty_like(dy)
    if native.call("swiglu_backward", dy, gate_up, *dy.shape, out, product):
        return out, product
    return swiglu_backward_torch(dy, gate_up)


def swiglu_backward_torch(
    dy: torch.Tensor, gate_up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`swiglu_backward` in torch operations."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    dy = dy.float()
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    product = (silu * up).to(gate_up.dtype)
    out = torch.empty_like(gate_up)
    dgate, dup = out.chunk(2, dim=-1)
    dup.copy_(dy * silu)
    # d silu(g) / dg = s + g s (1 - s) = s + silu (1 - s)
    dgate.copy_(silu.mul_(1 - sigmoid).add_(sigmoid).mul_(up).mul_(dy))
    return out, product
