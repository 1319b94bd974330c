"""LoRA gradients of many adapters in one launch, rows sorted by adapter.

The grouped form of vLLM's shrink and expand (``vllm/lora/ops/triton_ops``): a program belongs to
one segment, so that no two of them write to the same matrix and no sum depends on their order.
"""

import torch
import triton
import triton.language as tl

ROWS, COLUMNS = 32, 64


@triton.jit
def segment_rows(starts, segment, block, ROWS: tl.constexpr):
    """Rows of a block of a segment, and which of them belong to it."""
    row = tl.load(starts + segment) + block * ROWS + tl.arange(0, ROWS)
    return row.to(tl.int64), row < tl.load(starts + segment + 1)


@triton.jit
def shrink_kernel(
    x, matrix, out, starts, slots, scaling, width, rank, matrix_slot, matrix_column, matrix_rank,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """``out[rows] = scaling x[rows] M[slot]``, M ``[width, rank]`` by its strides."""
    segment = tl.program_id(0)
    slot = tl.load(slots + segment).to(tl.int64)
    row, valid = segment_rows(starts, segment, tl.program_id(1), ROWS)
    ranks = tl.arange(0, RANK)
    total = tl.zeros((ROWS, RANK), tl.float32)
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = column < width
        x_tile = tl.load(x + row[:, None] * width + column, mask=valid[:, None] & inside, other=0.0)
        m_tile = tl.load(
            matrix + slot * matrix_slot + column[:, None] * matrix_column + ranks * matrix_rank,
            mask=inside[:, None] & (ranks < rank),
            other=0.0,
        ).to(x_tile.dtype)
        total = tl.dot(x_tile, m_tile, total, input_precision="ieee")
    total *= tl.load(scaling + slot)
    tl.store(out + row[:, None] * RANK + ranks, total, mask=valid[:, None])


@triton.jit
def outer_kernel(
    left, right, gradient, starts, slots, width, rank, gradient_slot, gradient_column,
    gradient_rank, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """``gradient[slot] += left[rows]^T right[rows]``, ``[width, rank]`` by its strides."""
    segment = tl.program_id(0)
    slot = tl.load(slots + segment).to(tl.int64)
    first = tl.load(starts + segment)
    end = tl.load(starts + segment + 1)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    ranks = tl.arange(0, RANK)
    total = tl.zeros((COLUMNS, RANK), tl.float32)
    for start in range(first, end, ROWS):
        row = start + tl.arange(0, ROWS)
        valid = row < end
        row = row.to(tl.int64)
        left_tile = tl.load(
            left + row[:, None] * width + column, mask=valid[:, None] & inside, other=0.0
        )
        right_tile = tl.load(right + row[:, None] * RANK + ranks, mask=valid[:, None], other=0.0)
        total = tl.dot(tl.trans(left_tile), right_tile, total, input_precision="ieee")
    at = gradient + slot * gradient_slot + column[:, None] * gradient_column
    at += ranks * gradient_rank
    mask = inside[:, None] & (ranks < rank)
    tl.store(at, tl.load(at, mask=mask, other=0.0) + total, mask=mask)


@triton.jit
def expand_kernel(
    g, a, dx, starts, slots, width, rank,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """``dx[rows] += g[rows] A[slot]``."""
    segment = tl.program_id(0)
    slot = tl.load(slots + segment).to(tl.int64)
    row, valid = segment_rows(starts, segment, tl.program_id(1), ROWS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    ranks = tl.arange(0, RANK)
    g_tile = tl.load(g + row[:, None] * RANK + ranks, mask=valid[:, None], other=0.0)
    a_tile = tl.load(
        a + slot * rank * width + ranks[:, None] * width + column,
        mask=(ranks < rank)[:, None] & inside,
        other=0.0,
    ).to(g_tile.dtype)
    at = dx + row[:, None] * width + column
    mask = valid[:, None] & inside
    old = tl.load(at, mask=mask, other=0.0)
    product = tl.dot(g_tile, a_tile, input_precision="ieee")
    tl.store(at, old + product, mask=mask)


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
    """See :func:`flexllm_vllm.kernels.segmented_lora.segmented_lora_backward`."""
    num_segments = slots.shape[0]
    if num_segments == 0 or longest == 0:
        return
    (num_rows, out_features), in_features, rank = dy.shape, x.shape[1], a.shape[1]
    # Tensor cores multiply tiles of 16 at least.
    padded = max(16, triton.next_power_of_2(rank))
    tile = {"ROWS": ROWS, "COLUMNS": COLUMNS, "RANK": padded}
    g, u = (dy.new_empty(num_rows, padded) for _ in range(2))
    row_blocks = triton.cdiv(longest, ROWS)
    grid = (num_segments, row_blocks)
    shrink_kernel[grid](dy, b, g, starts, slots, scaling, out_features, rank,
                        b.stride(0), b.stride(1), b.stride(2), **tile)  # fmt: skip
    shrink_kernel[grid](x, a, u, starts, slots, scaling, in_features, rank,
                        a.stride(0), a.stride(2), a.stride(1), **tile)  # fmt: skip
    outer_kernel[num_segments, triton.cdiv(out_features, COLUMNS)](
        dy, u, db, starts, slots, out_features, rank, db.stride(0), db.stride(1), db.stride(2),
        **tile,
    )  # fmt: skip
    outer_kernel[num_segments, triton.cdiv(in_features, COLUMNS)](
        x, g, da, starts, slots, in_features, rank, da.stride(0), da.stride(2), da.stride(1),
        **tile,
    )  # fmt: skip
    if dx is not None:
        expand_kernel[num_segments, row_blocks, triton.cdiv(in_features, COLUMNS)](
            g, a, dx, starts, slots, in_features, rank, **tile
        )
