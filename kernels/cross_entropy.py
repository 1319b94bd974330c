"""Linear + cross-entropy in one pass, a chunk of positions at a time.

The logits of a whole sequence (``[num_tokens, vocab_size]``) never exist; compare Liger-Kernel's
fused linear cross-entropy.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from flexllm_vllm.kernels import native
from flexllm_vllm.kernels.linear import input_gradient
from flexllm_vllm.kernels.triton_support import use_triton

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


@dataclass(frozen=True)
class TokenLosses:
    """What a model thinks of tokens that are given.

    Attributes:
        losses: ``[num_tokens]`` float64, ``-log softmax(logits)[target]``.
        correct: ``[num_tokens]`` int64, 1 where no other token has a higher logit.
    """

    losses: torch.Tensor
    correct: torch.Tensor

    @classmethod
    def empty(cls, num_tokens: int, device: torch.device | None = None) -> "TokenLosses":
        return cls(
            torch.empty(num_tokens, dtype=torch.float64, device=device),
            torch.empty(num_tokens, dtype=torch.int64, device=device),
        )


@dataclass(frozen=True)
class LogitForm:
    """What becomes of the product with the head: ``scale * soft_cap * tanh(product / soft_cap)``,
    or ``scale * product``.

    Attributes:
        scale: factor of the logits.
        soft_cap: bound of the logits before that factor (Gemma 2, arXiv 2408.00118); None for none.
    """

    scale: float = 1.0
    soft_cap: float | None = None

    def bend(self, product: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The logits before the factor, in the dtype of ``product``; and their derivative, where it
        is not one."""
        if self.soft_cap is None:
            return product, None
        bent = torch.tanh(product.float() / self.soft_cap)
        slope = 1.0 - bent.square()
        return (bent * self.soft_cap).to(product.dtype), slope


PLAIN = LogitForm()


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    scale: float,
    form: LogitForm = PLAIN,
    project: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[TokenLosses, torch.Tensor | None]:
    """``-log softmax(form(x W^T))[target]`` of each token, and the gradient of their sum.

    Args:
        x: ``[num_tokens, hidden_size]``.
        weight: ``[vocab_size, hidden_size]``.
        targets: ``[num_tokens]`` int64.
        scale: factor of the gradient (one over the loss-bearing tokens of the batch); 0 for none.
        form: of the logits.
        project: a faster ``x W^T``, where there is one.

    Returns:
        The losses (not scaled), and ``dx`` ``[num_tokens, hidden_size]`` in the dtype of ``x``,
        scaled by ``scale``; None where that is 0.
    """
    dx = torch.empty_like(x) if scale else None
    found = TokenLosses.empty(x.shape[0], x.device)
    for start in range(0, x.shape[0], CHUNK):
        rows = slice(start, start + CHUNK)
        chunk = x[rows]
        logits = (
            project(chunk)
            if project
            else torch.mm(chunk, weight.t(), out=_buffer(x, weight.shape[0])[: len(chunk)])
        )
        into = TokenLosses(found.losses[rows], found.correct[rows])
        logits, slope = form.bend(logits)
        gradient = softmax_cross_entropy(logits, targets[rows], scale, form.scale, into)
        if dx is not None:
            if slope is not None:
                gradient = (slope * gradient).to(weight.dtype)
            dx[rows] = input_gradient(gradient, weight)
    return found, dx


def softmax_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, scale: float, logit_scale: float, into: TokenLosses
) -> torch.Tensor:
    """Losses of ``softmax(logit_scale * logits)``, and the gradient of their sum times ``scale``.

    Args:
        logits: ``[num_tokens, vocab_size]``, overwritten unless ``scale`` is 0.
        targets: ``[num_tokens]`` int64.
        scale, logit_scale: factors of the gradient and of the logits.
        into: takes the losses; contiguous.

    Returns:
        The gradient ``[num_tokens, vocab_size]`` in the dtype of ``logits``; without a meaning
        where ``scale`` is 0.
    """
    if use_triton(logits):
        from flexllm_vllm.kernels.triton import cross_entropy as on_gpu

        return on_gpu.softmax_cross_entropy(logits, targets, scale, logit_scale, into)
    logits = logits.contiguous()
    if native.call("cross_entropy", logits, targets.contiguous(), *logits.shape, logit_scale, scale,
                   into.losses, into.correct):  # fmt: skip
        return logits
    return softmax_cross_entropy_torch(logits, targets, scale, logit_scale, into)


def softmax_cross_entropy_torch(
    logits: torch.Tensor, targets: torch.Tensor, scale: float, logit_scale: float, into: TokenLosses
) -> torch.Tensor:
    """:func:`softmax_cross_entropy` in torch operations."""
    scores = logits.float()
    if logit_scale != 1.0:
        scores = scores * logit_scale
    log_norm = torch.logsumexp(scores, dim=-1)
    picked = scores.gather(1, targets[:, None]).squeeze(1)
    into.losses.copy_(log_norm - picked)
    into.correct.copy_(picked >= scores.amax(dim=-1))
    if not scale:
        return logits
    probabilities = scores.sub_(log_norm[:, None]).exp_()
    ones = torch.ones_like(probabilities[:, :1])
    probabilities.scatter_add_(1, targets[:, None], -ones)
    probabilities *= scale * logit_scale
    return probabilities.to(logits.dtype)
