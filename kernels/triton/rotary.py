"""Rotary position embedding, forward and inverse: a program for each head of each token."""

import torch
import triton
import triton.language as tl


@triton.jit
def rotary_kernel(
    x, cos_sin, out, x_token, x_head, out_token, out_head, half, head_size, sign,
    NEOX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    x += token * x_token + head * x_head
    out += token * out_token + head * out_head
    pairs = tl.arange(0, BLOCK)
    inside = pairs < half
    if NEOX:
        first, second = pairs, pairs + half
    else:
        first, second = 2 * pairs, 2 * pairs + 1
    cos = tl.load(cos_sin + token * 2 * half + pairs, mask=inside, other=0.0)
    sin = tl.load(cos_sin + token * 2 * half + half + pairs, mask=inside, other=0.0) * sign
    a = tl.load(x + first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + second, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + first, a * cos - b * sin, mask=inside)
    tl.store(out + second, b * cos + a * sin, mask=inside)
    # What is not rotated is copied.
    rest = 2 * half + tl.arange(0, 2 * BLOCK)
    for _ in range((head_size - 2 * half + 2 * BLOCK - 1) // (2 * BLOCK)):
        kept = rest < head_size
        tl.store(out + rest, tl.load(x + rest, mask=kept, other=0.0), mask=kept)
        rest += 2 * BLOCK


def apply_rotary(
    x: torch.Tensor,
    cos_sin: torch.Tensor,
    is_neox_style: bool,
    inverse: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See :func:`flexllm_vllm.kernels.rotary.apply_rotary`."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    tokens, heads, head_size = x.shape
    half = cos_sin.shape[-1] // 2
    if tokens:
        rotary_kernel[(tokens, heads)](
            x, cos_sin.contiguous(), out, x.stride(0), x.stride(1), out.stride(0), out.stride(1),
            half, head_size, -1.0 if inverse else 1.0,
            NEOX=is_neox_style, BLOCK=triton.next_power_of_2(half),
        )  # fmt: skip
    return out
