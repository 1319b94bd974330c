"""GeGLU and its backward, against float64."""

import torch
from against_float64 import DTYPES, assert_near
from torch.nn import functional as F

from flexllm_vllm.kernels.geglu import geglu, geglu_backward


@DTYPES
def test_geglu(dtype: torch.dtype) -> None:
    x, dy = 4 * torch.randn(300, 2 * 29).to(dtype), torch.randn(300, 29).to(dtype)
    leaf = x.double().requires_grad_()
    gate, up = leaf.chunk(2, dim=-1)
    y = F.gelu(gate, approximate="tanh") * up
    y.backward(dy.double())
    assert_near(geglu(x), y.detach(), dtype)
    gradient, product = geglu_backward(dy, x)
    assert_near(gradient, leaf.grad, dtype)
    assert_near(product, y.detach(), dtype)
