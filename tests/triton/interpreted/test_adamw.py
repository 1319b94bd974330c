"""AdamW with the clipping of gradients, against torch."""

import pytest
import torch
from near import assert_near

from flexllm_vllm.kernels.triton import adamw as gpu_adamw


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_adamw_is_torchs_with_its_clipping(max_grad_norm: float) -> None:
    parameter = torch.nn.Parameter(torch.randn(1500))
    weights = parameter.detach().clone()
    exp_avg, exp_avg_sq = torch.zeros(1500), torch.zeros(1500)
    options = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW([parameter], lr=0.01, **options)
    for step in (1, 2, 3):
        gradient = torch.randn(1500)
        norm = torch.linalg.vector_norm(gradient)
        gpu_adamw.adamw(weights, gradient, exp_avg, exp_avg_sq, norm, step, 0.01, **options,
                        max_grad_norm=max_grad_norm)  # fmt: skip
        parameter.grad = gradient.clone()
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_([parameter], max_grad_norm)
        optimizer.step()
    assert_near(weights, parameter.detach(), torch.float32)


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_adamw_changes_nothing_at_a_norm_that_is_not_finite(norm: float) -> None:
    state = [torch.randn(9).abs() for _ in range(3)]
    before = [x.clone() for x in state]
    gpu_adamw.adamw(state[0], torch.randn(9), state[1], state[2], torch.tensor(norm), 1, 0.1,
                    (0.9, 0.99), 1e-8, 0.1, 1.0)  # fmt: skip
    assert all(torch.equal(x, y) for x, y in zip(state, before, strict=True))
