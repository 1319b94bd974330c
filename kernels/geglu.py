"""GeGLU with the tanh form of GELU, ``gelu(gate) * up``, recomputed and differentiated."""

import math

import torch
import torch.nn.functional as F

from flexllm_vllm.kernels.triton_support import use_triton

# gelu(x) = x (1 + tanh(SLOPE (x + CUBIC x^3))) / 2 (Hendrycks and Gimpel, arXiv 1606.08415).
SLOPE = math.sqrt(2 / math.pi)
CUBIC = 0.044715


def geglu(gate_up: torch.Tensor) -> torch.Tensor:
    """``gelu(gate) * up``.

    Args:
        gate_up: ``[num_tokens, 2 * intermediate_size]``, gate in the first half.

    Returns:
        ``[num_tokens, intermediate_size]`` in the same dtype.
    """
    if use_triton(gate_up):
        from flexllm_vllm.kernels.triton import geglu as on_gpu

        return on_gpu.geglu(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh").mul_(up)


def geglu_backward(dy: torch.Tensor, gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of :func:`geglu`, and its value again: both need the same pass over memory.

    With ``t = tanh(SLOPE (gate + CUBIC gate^3))``: ``dup = dy * gate (1 + t) / 2`` and
    ``dgate = dy * up * (1 + t + gate (1 - t^2) SLOPE (1 + 3 CUBIC gate^2)) / 2``.

    Args:
        dy: ``[num_tokens, intermediate_size]``.
        gate_up: ``[num_tokens, 2 * intermediate_size]``, the input of the forward.

    Returns:
        The gradient ``[num_tokens, 2 * intermediate_size]`` and the product
        ``[num_tokens, intermediate_size]``, in the dtype of ``gate_up``.
    """
    if use_triton(gate_up):
        from flexllm_vllm.kernels.triton import geglu as on_gpu

        return on_gpu.geglu_backward(dy, gate_up)
    gate, up = gate_up.float().chunk(2, dim=-1)
    dy = dy.float()
    square = gate * gate
    t = torch.tanh((square * CUBIC).add_(1).mul_(gate).mul_(SLOPE))
    half = (t + 1).mul_(0.5)
    gelu = gate * half
    product = (gelu * up).to(gate_up.dtype)
    out = torch.empty_like(gate_up)
    dgate, dup = out.chunk(2, dim=-1)
    dup.copy_(dy * gelu)
    slope = square.mul_(3 * CUBIC).add_(1).mul_(0.5 * SLOPE).mul_(gate)
    dgate.copy_(slope.mul_(1 - t.square()).add_(half).mul_(up).mul_(dy))
    return out, product
