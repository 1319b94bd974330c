"""AdamW over the flat buffers of an adapter, clipped by a norm that stays on the GPU."""

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def adamw_kernel(
    weights, gradients, exp_avg, exp_avg_sq, norm, count,
    learning_rate, beta1, beta2, eps, weight_decay, correction1, correction2, max_norm,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    found = tl.load(norm)
    clip = 1.0
    if max_norm > 0:
        clip = tl.minimum(1.0, max_norm / (found + 1e-6))
    g = tl.load(gradients + at, mask=inside, other=0.0) * clip
    w = tl.load(weights + at, mask=inside, other=0.0)
    m = tl.load(exp_avg + at, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq + at, mask=inside, other=0.0)
    m = m + (1.0 - beta1) * (g - m)
    v = beta2 * v + (1.0 - beta2) * g * g
    w = w * (1.0 - learning_rate * weight_decay)
    w -= learning_rate / correction1 * m / (tl.sqrt(v) / tl.sqrt(correction2) + eps)
    # A norm that is not finite changes nothing: the host learns of it with the iteration's result.
    finite = at < tl.where(found < float("inf"), count, 0)
    tl.store(weights + at, w, mask=finite)
    tl.store(exp_avg + at, m, mask=finite)
    tl.store(exp_avg_sq + at, v, mask=finite)


def adamw(
    weights: torch.Tensor,
    gradients: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    norm: torch.Tensor,
    step: int,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    max_grad_norm: float,
) -> None:
    """See :func:`flexllm_vllm.kernels.adamw.adamw`."""
    count = weights.numel()
    adamw_kernel[(triton.cdiv(count, BLOCK),)](
        weights, gradients, exp_avg, exp_avg_sq, norm, count, learning_rate, betas[0], betas[1],
        eps, weight_decay, 1.0 - betas[0] ** step, 1.0 - betas[1] ** step, max_grad_norm,
        BLOCK=BLOCK,
    )  # fmt: skip
