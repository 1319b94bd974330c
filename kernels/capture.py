"""Keeps activations of the finetuning rows of a batch, in slots of a paged cache."""

import torch

from flexllm_vllm.kernels.triton_support import use_triton


def capture_rows(
    pool: torch.Tensor, slots: torch.Tensor, x: torch.Tensor, addend: torch.Tensor | None = None
) -> None:
    """``pool[slots[i]] = x[i] + addend[i]`` for every row whose slot is not negative.

    Args:
        pool: ``[num_slots, width]`` contiguous, in the dtype of ``x``; updated in place.
        slots: ``[num_tokens]`` int64 on the same device, -1 for rows that are not kept; as long as
            the batch that a CUDA graph was captured with.
        x: ``[num_tokens, width]``, elements of a row adjoining.
        addend: like ``x``: a residual that is kept apart.
    """
    if use_triton(pool):
        from flexllm_vllm.kernels.triton import capture

        capture.capture_rows(pool, slots, x, addend)
        return
    kept = (slots >= 0).nonzero().squeeze(1)
    values = x[kept] if addend is None else x[kept] + addend[kept]
    pool.index_copy_(0, slots[kept], values)
