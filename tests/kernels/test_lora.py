"""LoRA gradients, against float64."""

import pytest
import torch
from against_float64 import DTYPES, assert_near
from torch.nn import functional as F

from flexllm_vllm.kernels.lora import LoraGroup, lora_add, lora_backward

LORA_SHAPES = pytest.mark.parametrize(
    ("rows", "width", "r", "columns"),
    [
        (11, 20, 4, ((0, 24), (32, 40))),
        (1, 64, 16, ((0, 200),)),
        (70, 65, 8, ((0, 64), (64, 96), (96, 128))),
        (130, 200, 17, ((8, 137),)),
        (64, 128, 64, ((0, 64), (64, 128))),
        (67, 33, 130, ((3, 40),)),
        (29, 7, 300, ((0, 130),)),
    ],
)


@DTYPES
@LORA_SHAPES
def test_lora_of_targets_that_share_their_input(
    dtype: torch.dtype, rows: int, width: int, r: int, columns: tuple[tuple[int, int], ...]
) -> None:
    torch.manual_seed(0)
    out = columns[-1][1] + 5
    # Parts of wider tensors, as q, k and v are of one.
    x, dy, dx, into = (torch.randn(rows, n + 3).to(dtype)[:, :n] for n in (width, out, width, out))
    a, b = torch.randn(len(columns) * r, width), tuple(torch.randn(e - s, r) for s, e in columns)
    leaves = [t.to(dtype).double().requires_grad_() for t in (x, a, *b)]
    y = torch.zeros(rows, out, dtype=torch.float64)
    for i, (start, end) in enumerate(columns):
        u = leaves[0] @ leaves[1][i * r : (i + 1) * r].t()
        y = y + F.pad(1.5 * u @ leaves[2 + i].t(), (start, out - end))
    y.backward(dy.double())
    group = LoraGroup(a, b, columns, 1.5)
    grad = LoraGroup(torch.ones_like(a), tuple(torch.ones_like(m) for m in b), columns, 1.5)
    before = dx.double(), into.double()
    lora_backward(dy, x, group, grad, dx)
    assert lora_add(into, x, group) is into
    assert_near(into, before[1] + y.detach(), dtype)
    assert_near(dx, before[0] + leaves[0].grad, dtype)
    for got, leaf in zip((grad.a, *grad.b), leaves[1:], strict=True):
        assert_near(got - 1, leaf.grad, dtype)


def test_lora_takes_new_accumulators_for_the_same_matrices() -> None:
    x, dy = torch.randn(11, 20), torch.randn(11, 40)
    group = LoraGroup(torch.randn(4, 20), (torch.randn(40, 4),), ((0, 40),), 0.5)
    other = LoraGroup(torch.randn(4, 20), (torch.randn(40, 4),), ((0, 40),), 0.5)
    grad, again = (
        LoraGroup(torch.zeros(4, 20), (torch.zeros(40, 4),), ((0, 40),), 0.5) for _ in "ab"
    )
    lora_backward(dy, x, group, grad, None)
    lora_backward(dy, x, group, again, None)
    assert torch.equal(grad.a, again.a)
    lora_backward(dy, x, other, grad, None)
    assert not torch.equal(grad.a, again.a)
    assert torch.allclose(grad.b[0], 0.5 * dy.t() @ x @ (group.a + other.a).t(), atol=1e-3)


def test_lora_gradients_in_two_calls_are_those_of_one() -> None:
    x, dy = torch.randn(11, 20), torch.randn(11, 40)
    group = LoraGroup(torch.randn(4, 20), (torch.randn(40, 4),), ((0, 40),), 0.5)
    grads = [LoraGroup(torch.zeros(4, 20), (torch.zeros(40, 4),), ((0, 40),), 0.5) for _ in "ab"]
    once, twice = torch.zeros_like(x), torch.zeros_like(x)
    lora_backward(dy, x, group, grads[0], once)
    g = lora_backward(dy, None, group, None, twice)
    lora_backward(dy, x, group, grads[1], None, g)
    assert torch.equal(once, twice)
    assert torch.equal(grads[0].a, grads[1].a)
    assert torch.equal(grads[0].b[0], grads[1].b[0])
