"""Linear + cross-entropy in one pass, a chunk of positions at a time.

The logits of a whole sequence (``[num_tokens, vocab_size]``) never exist; compare Liger-Kernel's
fused linear cross-entropy.
"""

import torch

# Positions a chunk holds: at a vocabulary of 50k a float32 chunk is 25 MB, large enough for an
# efficient GEMM and small beside the activation cache.
CHUNK = 128


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    scale: float,
    logit_scale: float = 1.0,
) -> tuple[float, torch.Tensor]:
    """Sum of ``-log softmax(logit_scale * x W^T)[target]`` and its gradient.

    Args:
        x: ``[num_tokens, hidden_size]``.
        weight: ``[vocab_size, hidden_size]``.
        targets: ``[num_tokens]`` int64.
        scale: factor of the gradient (one over the loss-bearing tokens of the batch).
        logit_scale: factor of the logits.

    Returns:
        The loss sum (not scaled), and ``dx`` ``[num_tokens, hidden_size]`` in the dtype of ``x``,
        scaled by ``scale``.
    """
    dx = torch.empty_like(x)
    loss = 0.0
    for start in range(0, x.shape[0], CHUNK):
        rows = slice(start, start + CHUNK)
        logits = (x[rows] @ weight.t()).float()
        if logit_scale != 1.0:
            logits *= logit_scale
        log_norm = torch.logsumexp(logits, dim=-1)
        picked = logits.gather(1, targets[rows, None]).squeeze(1)
        loss += float((log_norm - picked).double().sum())
        probabilities = logits.sub_(log_norm[:, None]).exp_()
        ones = torch.ones_like(probabilities[:, :1])
        probabilities.scatter_add_(1, targets[rows, None], -ones)
        probabilities *= scale * logit_scale
        torch.mm(probabilities.to(x.dtype), weight, out=dx[rows])
    return loss, dx
