"""Rotary position embedding in vLLM's two layouts, forward and backward.

The rotation is orthogonal, so the backward is the rotation by the negative angle.
"""

import torch

from flexllm_vllm.kernels import native
from flexllm_vllm.kernels.triton_support import use_triton


def apply_rotary(
    x: torch.Tensor,
    cos_sin: torch.Tensor,
    is_neox_style: bool,
    inverse: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotates the first ``rotary_dim`` elements of each head.

    Args:
        x: ``[num_tokens, num_heads, head_size]``; any strides, elements of a head adjoining.
        cos_sin: ``[num_tokens, rotary_dim]`` float32, cosines then sines (vLLM's
            ``cos_sin_cache`` gathered at the tokens' positions).
        is_neox_style: halves are paired (True) or neighbours are (False).
        inverse: rotate by the negative angle, as the backward does.
        out: where to write, shaped like ``x``; may differ in dtype and strides.

    Returns:
        ``out``, or a new tensor shaped and typed like ``x``.
    """
    if use_triton(x):
        from flexllm_vllm.kernels.triton import rotary as on_gpu

        return on_gpu.apply_rotary(x, cos_sin, is_neox_style, inverse, out)
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    num_tokens, num_heads, head_size = x.shape
    typed = {torch.float32: 0, torch.bfloat16: 1}.get(out.dtype)
    if typed is not None and native.call_typed(
        "rotary", x, typed, x, x.stride(0), x.stride(1), cos_sin, -1.0 if inverse else 1.0,
        num_tokens, num_heads, head_size, cos_sin.shape[-1] // 2, int(is_neox_style),
        out, out.stride(0), out.stride(1),
    ):  # fmt: skip
        return out
    return out.copy_(apply_rotary_torch(x, cos_sin, is_neox_style, inverse))


def apply_rotary_torch(
    x: torch.Tensor, cos_sin: torch.Tensor, is_neox_style: bool, inverse: bool = False
) -> torch.Tensor:
    """:func:`apply_rotary` in torch operations, into a new tensor."""
    cos, sin = cos_sin.unsqueeze(1).to(x.dtype).chunk(2, dim=-1)
    if inverse:
        sin = -sin
    half = cos.shape[-1]
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
