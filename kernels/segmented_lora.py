"""LoRA gradients of one linear layer for the rows of many adapters at once."""

import torch

from flexllm_vllm.kernels.triton_support import use_triton


def segmented_lora_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: torch.Tensor,
    starts: torch.Tensor,
    slots: torch.Tensor,
    longest: int,
    da: torch.Tensor,
    db: torch.Tensor,
    dx: torch.Tensor | None,
) -> None:
    """Accumulates ``dA`` and ``dB`` of each adapter and adds its share to ``dx``.

    With ``u = x A^T`` and ``g = scaling dy B`` of an adapter's rows: ``dB += scaling dy^T u``,
    ``dA += g^T x``, ``dx += g A``; ``u`` and ``g`` in the dtype of ``dy``, sums in float32.

    Args:
        dy: ``[num_tokens, out_features]`` contiguous, gradient of the layer's output.
        x: ``[num_tokens, in_features]`` contiguous, its input, in the dtype of ``dy``.
        a: ``[num_slots, r, in_features]`` contiguous.
        b: ``[num_slots, out_features, r]``.
        scaling: ``[num_slots]`` float32, factor of each ``B A``.
        starts: ``[num_segments + 1]`` int32, the rows of segment ``i`` are
            ``[starts[i], starts[i + 1])``.
        slots: ``[num_segments]`` int32, the adapter of each segment; none twice.
        longest: rows of the longest segment.
        da: float32 like ``a``, updated in place.
        db: float32 like ``b``, updated in place.
        dx: ``[num_tokens, in_features]`` contiguous, updated in place; None where nobody needs it.
    """
    if use_triton(dy):
        from flexllm_vllm.kernels.triton import segmented_lora

        segmented_lora.segmented_lora_backward(
            dy, x, a, b, scaling, starts, slots, longest, da, db, dx
        )
        return
    segmented_lora_backward_torch(dy, x, a, b, scaling, starts, slots, da, db, dx)


def segmented_lora_backward_torch(
    dy: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: torch.Tensor,
    starts: torch.Tensor,
    slots: torch.Tensor,
    da: torch.Tensor,
    db: torch.Tensor,
    dx: torch.Tensor | None,
) -> None:
    """:func:`segmented_lora_backward` in torch operations."""
    bounds = starts.tolist()
    for index, slot in enumerate(slots.tolist()):
        rows = slice(bounds[index], bounds[index + 1])
        dy_i, x_i, factor = dy[rows], x[rows], float(scaling[slot])
        g = (dy_i.float() @ b[slot].float() * factor).to(dy.dtype)
        u = (x_i.float() @ a[slot].float().t() * factor).to(dy.dtype)
        db[slot] += dy_i.float().t() @ u.float()
        da[slot] += g.float().t() @ x_i.float()
        if dx is not None:
            dx[rows] += (g.float() @ a[slot].float()).to(dx.dtype)
