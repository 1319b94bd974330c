"""SwiGLU and its backward, against float64."""

import torch
from against_float64 import DTYPES, assert_near
from torch.nn import functional as F

from flexllm_vllm.kernels.swiglu import swiglu, swiglu_backward


@DTYPES
def test_swiglu(dtype: torch.dtype) -> None:
    x, dy = 9 * torch.randn(300, 2 * 29).to(dtype), torch.randn(300, 29).to(dtype)
    leaf = x.double().requires_grad_()
    gate, up = leaf.chunk(2, dim=-1)
    y = F.silu(gate) * up
    y.backward(dy.double())
    assert_near(swiglu(x), y.detach(), dtype)
    gradient, product = swiglu_backward(dy, x)
    assert_near(gradient, leaf.grad, dtype)
    assert_near(product, y.detach(), dtype)
