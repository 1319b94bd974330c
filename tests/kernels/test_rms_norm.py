"""RMSNorm and its backward, against float64."""

import pytest
import torch
from against_float64 import DTYPES, assert_near
from torch.nn import functional as F

from flexllm_vllm.kernels.rms_norm import add_rms_norm_, rms_norm, rms_norm_backward


@DTYPES
def test_rms_norm(dtype: torch.dtype) -> None:
    x, dy = (torch.randn(300, 37).to(dtype) for _ in range(2))
    weight = torch.rand(37).to(dtype) + 0.5
    leaf = x.double().requires_grad_()
    y = F.rms_norm(leaf, (37,), weight.double(), 1e-5)
    y.backward(dy.double())
    assert_near(rms_norm(x, weight, 1e-5), y.detach(), dtype)
    assert_near(rms_norm_backward(dy, x, weight, 1e-5), leaf.grad, dtype)
    residual = torch.randn(300, 37)
    got = rms_norm_backward(dy, x, weight, 1e-5, residual)
    assert_near(got, leaf.grad + residual, dtype)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 8), (37, 100), (300, 576)])
def test_rms_norm_of_a_sum(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    weight = torch.randn(shape[1]).to(dtype)
    total = x.double() + residual.double()
    normed = F.rms_norm(total, (shape[1],), weight.double(), 1e-5)
    add_rms_norm_(x, residual, weight, 1e-5)
    assert_near(residual, total, dtype)
    assert_near(x, normed, dtype)
