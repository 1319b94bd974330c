"""Activations of a batch's finetuning rows into the slots of a paged cache.

The slot of every row lies in a tensor, so that a captured CUDA graph writes wherever the tensor
says when it is replayed; rows that are not kept have slot -1.
"""

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def capture_kernel(
    x, addend, slots, pool, x_row, addend_row, width, HAS_ADDEND: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < tl.where(slot >= 0, width, 0)
    values = tl.load(x + row * x_row + columns, mask=inside, other=0.0)
    if HAS_ADDEND:
        more = tl.load(addend + row * addend_row + columns, mask=inside, other=0.0)
        values = (values.to(tl.float32) + more.to(tl.float32)).to(values.dtype)
    tl.store(pool + slot * width + columns, values, mask=inside)


def capture_rows(
    pool: torch.Tensor, slots: torch.Tensor, x: torch.Tensor, addend: torch.Tensor | None = None
) -> None:
    """See :func:`flexllm_vllm.kernels.capture.capture_rows`."""
    rows, width = x.shape
    if rows:
        grid = (rows, triton.cdiv(width, BLOCK))
        capture_kernel[grid](
            x, x if addend is None else addend, slots, pool, x.stride(0),
            0 if addend is None else addend.stride(0), width,
            HAS_ADDEND=addend is not None, BLOCK=BLOCK,
        )  # fmt: skip
