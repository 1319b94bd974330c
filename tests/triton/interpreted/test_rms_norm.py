"""RMSNorm and its backward, against float64."""

import pytest
import torch
from near import TOLERANCE, assert_near
from torch.nn import functional as F

from flexllm_vllm.kernels.triton import rms_norm

DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE))


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (5, 37), (3, 128)])
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, dy = (torch.randn(shape).to(dtype) for _ in range(2))
    weight = (torch.rand(shape[1]) + 0.5).to(dtype)
    leaf = x.double().requires_grad_()
    y = F.rms_norm(leaf, shape[1:], weight.double(), 1e-5)
    y.backward(dy.double())
    assert_near(rms_norm.rms_norm(x, weight, 1e-5), y.detach(), dtype)
    residual = torch.randn(shape)
    got = rms_norm.rms_norm_backward(dy, x, weight, 1e-5, residual)
    assert_near(got, leaf.grad + residual, dtype)
    if shape[1] > 1:  # the gradient of a norm of one element is zero
        assert_near(rms_norm.rms_norm_backward(dy, x, weight, 1e-5), leaf.grad, dtype)
