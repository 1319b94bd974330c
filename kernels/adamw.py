"""One AdamW step over the flat buffers of an adapter, with the clipping in it."""

import torch

from flexllm_vllm.kernels.triton_support import use_triton


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
    """Clips the gradients as ``torch.nn.utils.clip_grad_norm_`` does, then steps as
    ``torch.optim.AdamW`` (Loshchilov and Hutter, arXiv 1711.05101).

    Nothing waits for ``norm``: where it is not finite, nothing changes, and whoever reads it later
    learns of it.

    Args:
        weights, gradients, exp_avg, exp_avg_sq: ``[num_parameters]`` float32; all but the gradients
            are updated in place.
        norm: float32 scalar on the same device, the norm of ``gradients``.
        step: number of this step, from 1.
        learning_rate: of this step.
        betas, eps, weight_decay: of AdamW.
        max_grad_norm: 0 turns clipping off.
    """
    if use_triton(weights):
        from flexllm_vllm.kernels.triton import adamw as triton_adamw

        triton_adamw.adamw(
            weights, gradients, exp_avg, exp_avg_sq, norm, step, learning_rate, betas, eps,
            weight_decay, max_grad_norm,
        )  # fmt: skip
        return
    if not bool(torch.isfinite(norm)):
        return
    clip = min(1.0, max_grad_norm / (float(norm) + 1e-6)) if max_grad_norm > 0 else 1.0
    g = gradients * clip
    exp_avg.lerp_(g, 1.0 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(g, g, value=1.0 - betas[1])
    weights.mul_(1.0 - learning_rate * weight_decay)
    denominator = (exp_avg_sq.sqrt() / (1.0 - betas[1] ** step) ** 0.5).add_(eps)
    weights.addcdiv_(exp_avg, denominator, value=-learning_rate / (1.0 - betas[0] ** step))
