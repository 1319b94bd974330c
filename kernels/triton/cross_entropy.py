"""Softmax cross-entropy of a chunk of logits, its gradient written over them.

Two passes over a row in blocks of the vocabulary: the first finds the norm of the softmax online
(its maximum and sum together), the second writes the gradient; compare Liger-Kernel's
``cross_entropy.py``.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from flexllm_vllm.kernels.cross_entropy import TokenLosses

BLOCK = 4096


@triton.jit
def cross_entropy_kernel(
    logits, targets, losses, correct, vocab_size, logit_scale, scale,
    WITH_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocab_size
    target = tl.load(targets + row)
    picked = tl.load(logits + target).to(tl.float32) * logit_scale
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab_size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocab_size
        scores = tl.load(logits + columns, mask=inside, other=float("-inf")).to(tl.float32)
        scores *= logit_scale
        scores = tl.where(inside, scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(scores - new))
        largest = new
    log_norm = largest + tl.log(total)
    tl.store(losses + row, (log_norm - picked).to(tl.float64))
    tl.store(correct + row, (picked >= largest).to(tl.int64))
    if WITH_GRADIENT:
        factor = scale * logit_scale
        for start in range(0, vocab_size, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < vocab_size
            scores = tl.load(logits + columns, mask=inside, other=0.0).to(tl.float32)
            p = tl.exp(scores * logit_scale - log_norm)
            gradient = (p - tl.where(columns == target, 1.0, 0.0)) * factor
            tl.store(logits + columns, gradient, mask=inside)


def softmax_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    scale: float,
    logit_scale: float,
    into: "TokenLosses",
) -> torch.Tensor:
    """See :func:`flexllm_vllm.kernels.cross_entropy.softmax_cross_entropy`."""
    logits = logits.contiguous()
    rows, vocab_size = logits.shape
    if rows:
        cross_entropy_kernel[(rows,)](
            logits, targets.contiguous(), into.losses, into.correct, vocab_size, logit_scale,
            scale, WITH_GRADIENT=scale != 0, BLOCK=min(BLOCK, triton.next_power_of_2(vocab_size)),
        )  # fmt: skip
    return logits
