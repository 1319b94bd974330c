"""SwiGLU, ``silu(gate) * up``, recomputed and differentiated."""

import torch
import torch.nn.functional as F


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``.

    Args:
        gate_up: ``[num_tokens, 2 * intermediate_size]``, gate in the first half.

    Returns:
        ``[num_tokens, intermediate_size]`` in the same dtype.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def swiglu_backward(dy: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """Gradient of :func:`swiglu`.

    With ``s = sigmoid(gate)``: ``dup = dy * gate * s`` and
    ``dgate = dy * up * s * (1 + gate * (1 - s))``.

    Args:
        dy: ``[num_tokens, intermediate_size]``.
        gate_up: ``[num_tokens, 2 * intermediate_size]``, the input of the forward.

    Returns:
        ``[num_tokens, 2 * intermediate_size]`` in the dtype of ``gate_up``.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    dy = dy.float()
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    out = torch.empty_like(gate_up)
    dgate, dup = out.chunk(2, dim=-1)
    dup.copy_(dy * silu)
    # d silu(g) / dg = s + g s (1 - s) = s + silu (1 - s)
    dgate.copy_(silu.mul_(1 - sigmoid).add_(sigmoid).mul_(up).mul_(dy))
    return out
