"""One AdamW step over the flat buffers of an adapter, with the clipping in it."""

import math

import torch
from torch.optim.adamw import adamw as torch_adamw

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
        weights, exp_avg, exp_avg_sq: ``[num_parameters]`` float32, updated in place.
        gradients: likewise; may be overwritten.
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
    found = float(norm)
    if not math.isfinite(found):
        return
    if 0 < max_grad_norm < found + 1e-6:
        gradients.mul_(max_grad_norm / (found + 1e-6))
    torch_adamw(
        [weights], [gradients], [exp_avg], [exp_avg_sq], [], [torch.tensor(step - 1.0)],
        fused=True, amsgrad=False, maximize=False, beta1=betas[0], beta2=betas[1],
        lr=learning_rate, weight_decay=weight_decay, eps=eps,
    )  # fmt: skip
