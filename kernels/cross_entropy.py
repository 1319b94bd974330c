"""Linear + cross-entropy in one pass, a chunk of positions at a time.

The logits of a whole sequence (``[num_tokens, vocab_size]``) never exist; compare Liger-Kernel's
fused linear cross-entropy.
"""

from collections.abc import Callable

import torch

from flexllm_vllm.kernels import native
from flexllm_vllm.kernels.linear import input_gradient

# Positions a chunk holds: at a vocabulary of 50k a float32 chunk is 50 MB, large enough for an
# efficient GEMM (128 rows are a tenth slower) and small beside the activation cache.
CHUNK = 256


_buffers: dict[tuple[torch.device, torch.dtype, int], torch.Tensor] = {}


def _buffer(like: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Logits of a chunk, kept between calls: fresh pages cost as much as half of the product."""
    key = (like.device, like.dtype, vocab_size)
    if key not in _buffers:
        _buffers[key] = like.new_empty(CHUNK, vocab_size)
    return _buffers[key]


def release_buffers() -> None:
    """Frees what is kept between calls."""
    _buffers.clear()


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    scale: float,
    logit_scale: float = 1.0,
    project: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[float, torch.Tensor]:
    """Sum of ``-log softmax(logit_scale * x W^T)[target]`` and its gradient.

    Args:
        x: ``[num_tokens, hidden_size]``.
        weight: ``[vocab_size, hidden_size]``.
        targets: ``[num_tokens]`` int64.
        scale: factor of the gradient (one over the loss-bearing tokens of the batch).
        logit_scale: factor of the logits.
        project: a faster ``x W^T``, where there is one.

    Returns:
        The loss sum (not scaled), and ``dx`` ``[num_tokens, hidden_size]`` in the dtype of ``x``,
        scaled by ``scale``.
    """
    dx = torch.empty_like(x)
    loss = 0.0
    for start in range(0, x.shape[0], CHUNK):
        rows = slice(start, start + CHUNK)
        chunk = x[rows]
        logits = (
            project(chunk)
            if project
            else torch.mm(chunk, weight.t(), out=_buffer(x, weight.shape[0])[: len(chunk)])
        )
        chunk_loss, gradient = softmax_cross_entropy(logits, targets[rows], scale, logit_scale)
        loss += chunk_loss
        dx[rows] = input_gradient(gradient, weight)
    return loss, dx


def softmax_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, scale: float, logit_scale: float
) -> tuple[float, torch.Tensor]:
    """Loss sum of ``softmax(logit_scale * logits)``, and its gradient times ``scale``.

    Args:
        logits: ``[num_tokens, vocab_size]``, overwritten.
        targets: ``[num_tokens]`` int64.
        scale, logit_scale: factors of the gradient and of the logits.

    Returns:
        The loss sum, and the gradient ``[num_tokens, vocab_size]`` in the dtype of ``logits``.
    """
    logits = logits.contiguous()
    losses = torch.empty(logits.shape[0], dtype=torch.float64)
    if native.call("cross_entropy", logits, targets.contiguous(), *logits.shape, logit_scale, scale,
                   losses):  # fmt: skip
        return float(losses.sum()), logits
    return softmax_cross_entropy_torch(logits, targets, scale, logit_scale)


def softmax_cross_entropy_torch(
    logits: torch.Tensor, targets: torch.Tensor, scale: float, logit_scale: float
) -> tuple[float, torch.Tensor]:
    """:func:`softmax_cross_entropy` in torch operations."""
    scores = logits.float()
    if logit_scale != 1.0:
        scores = scores * logit_scale
    log_norm = torch.logsumexp(scores, dim=-1)
    picked = scores.gather(1, targets[:, None]).squeeze(1)
    loss = float((log_norm - picked).double().sum())
    probabilities = scores.sub_(log_norm[:, None]).exp_()
    ones = torch.ones_like(probabilities[:, :1])
    probabilities.scatter_add_(1, targets[:, None], -ones)
    probabilities *= scale * logit_scale
    return loss, probabilities.to(logits.dtype)
