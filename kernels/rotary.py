"""Rotary position embedding in vLLM's two layouts, forward and backward.

The rotation is orthogonal, so the backward is the rotation by the negative angle.
"""

import torch


def apply_rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    is_neox_style: bool,
) -> torch.Tensor:
    """Rotates the first ``2 * cos.shape[-1]`` elements of each head.

    Args:
        x: ``[num_tokens, num_heads, head_size]``.
        cos: ``[num_tokens, rotary_dim / 2]``, gathered at the tokens' positions.
        sin: like ``cos``; pass ``-sin`` for the backward.
        is_neox_style: halves are paired (True) or neighbours are (False).

    Returns:
        A new tensor shaped and typed like ``x``.
    """
    half = cos.shape[-1]
    cos = cos.unsqueeze(1).to(x.dtype)
    sin = sin.unsqueeze(1).to(x.dtype)
    rotated = x[..., : 2 * half]
    if is_neox_style:
        first, second = rotated[..., :half], rotated[..., half:]
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    else:
        first, second = rotated[..., ::2], rotated[..., 1::2]
        turned = torch.stack(
            (first * cos - second * sin, second * cos + first * sin), dim=-1
        ).flatten(-2)
    if 2 * half == x.shape[-1]:
        return turned
    return torch.cat((turned, x[..., 2 * half :]), dim=-1)
