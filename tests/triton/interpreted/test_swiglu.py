"""SwiGLU and its backward, against float64."""

import pytest
import torch
from near import TOLERANCE, assert_near
from torch.nn import functional as F

from flexllm_vllm.kernels.triton import swiglu

DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE))


@DTYPES
@pytest.mark.parametrize("width", [1, 29, 1500])
def test_swiglu(dtype: torch.dtype, width: int) -> None:
    x, dy = 4 * torch.randn(3, 2 * width).to(dtype), torch.randn(3, width).to(dtype)
    leaf = x.double().requires_grad_()
    gate, up = leaf.chunk(2, dim=-1)
    y = F.silu(gate) * up
    y.backward(dy.double())
    assert_near(swiglu.swiglu(x), y.detach(), dtype)
    gradient, product = swiglu.swiglu_backward(dy, x)
    assert_near(gradient, leaf.grad, dtype)
    assert_near(product, y.detach(), dtype)
