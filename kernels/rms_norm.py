"""RMSNorm, recomputed and differentiated with respect to its input."""

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``y = x / sqrt(mean(x^2) + eps) * weight``.

    Args:
        x: ``[num_tokens, hidden_size]``.
        weight: ``[hidden_size]``.
        eps: added to the mean square.

    Returns:
        ``[num_tokens, hidden_size]`` in the dtype of ``x``; computed in float32.
    """
    x32 = x.float()
    rstd = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (x32 * rstd).mul_(weight.float()).to(x.dtype)


def rms_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Gradient of :func:`rms_norm` with respect to ``x`` (the weight is frozen).

    With ``g = dy * weight`` and ``n = x * rstd``: ``dx = rstd * (g - n * mean(g * n))``.

    Args:
        dy: ``[num_tokens, hidden_size]``.
        x: ``[num_tokens, hidden_size]``, the input of the forward.
        weight: ``[hidden_size]``.
        eps: as in the forward.

    Returns:
        ``[num_tokens, hidden_size]`` float32.
    """
    x32 = x.float()
    rstd = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    normed = x32 * rstd
    g = dy.float() * weight.float()
    projection = (g * normed).mean(-1, keepdim=True)
    return g.sub_(normed.mul_(projection)).mul_(rstd)
