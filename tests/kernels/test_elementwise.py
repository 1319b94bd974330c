"""Norm, SwiGLU, rotary embedding and cross-entropy against autograd in float64."""

import pytest
import torch
from torch.nn import functional as F

from flexllm_vllm.kernels.cross_entropy import LogitForm, linear_cross_entropy
from flexllm_vllm.kernels.geglu import geglu, geglu_backward
from flexllm_vllm.kernels.lora import LoraGroup, lora_add, lora_backward
from flexllm_vllm.kernels.rms_norm import add_rms_norm_, rms_norm, rms_norm_backward
from flexllm_vllm.kernels.rotary import apply_rotary, apply_rotary_torch
from flexllm_vllm.kernels.swiglu import swiglu, swiglu_backward

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE))


def assert_near(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    error = (got.double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[dtype]


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


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("rotary_dim", [16, 8])
def test_rotary_is_vllms_and_its_backward_is_the_negative_angle(
    neox: bool, rotary_dim: int
) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    with set_current_vllm_config(VllmConfig()):
        rope = RotaryEmbedding(16, rotary_dim, 64, 10000.0, neox, torch.float32)
    positions = torch.tensor([0, 5, 63, 17])
    x = torch.randn(4, 3, 16)
    expected, _ = rope.forward_native(positions, x.flatten(1).clone(), x.flatten(1).clone())
    cos_sin = rope.cos_sin_cache[positions]
    torch.testing.assert_close(apply_rotary(x, cos_sin, neox).flatten(1), expected)
    leaf, dy = x.clone().requires_grad_(), torch.randn_like(x)
    apply_rotary_torch(leaf, cos_sin, neox).backward(dy)
    torch.testing.assert_close(apply_rotary(dy, cos_sin, neox, inverse=True), leaf.grad)


def test_rotary_reads_and_writes_any_layout_and_dtype() -> None:
    """As the backward uses it: from [heads, tokens, size] accumulators into columns of d_qkv."""
    accumulator, cos_sin = torch.randn(3, 9, 16), torch.randn(9, 16)
    merged = torch.zeros(9, 100, dtype=torch.bfloat16)
    out = merged[:, 20:68].view(9, 3, 16)
    apply_rotary(accumulator.transpose(0, 1), cos_sin, True, inverse=True, out=out)
    expected = apply_rotary_torch(accumulator.transpose(0, 1), cos_sin, True, inverse=True)
    torch.testing.assert_close(merged[:, 20:68].float(), expected.flatten(1), rtol=0.01, atol=0.01)
    assert not merged[:, :20].any()
    assert not merged[:, 68:].any()


@DTYPES
@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_linear_cross_entropy(dtype: torch.dtype, rows: int, soft_cap: float | None) -> None:
    x, weight = torch.randn(rows, 24).to(dtype), torch.randn(101, 24).to(dtype)
    targets = torch.randint(0, 101, (rows,))
    leaf = x.double().requires_grad_()
    logits = leaf @ weight.double().t()
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    loss = F.cross_entropy(0.7 * logits, targets, reduction="sum")
    (loss / 9).backward()
    got, dx = linear_cross_entropy(x, weight, targets, 1 / 9, LogitForm(0.7, soft_cap))
    assert dx is not None
    assert float(got.losses.sum()) == pytest.approx(float(loss.detach()), rel=TOLERANCE[dtype])
    if soft_cap is None:  # bent and rounded, many logits are the largest
        logits = (x.float() @ weight.float().t()).to(dtype)
        assert torch.equal(got.correct, (logits.argmax(1) == targets).long())
    scored, none = linear_cross_entropy(x, weight, targets, 0.0, LogitForm(0.7, soft_cap))
    assert none is None
    assert torch.equal(scored.losses, got.losses)
    assert_near(dx, leaf.grad, dtype)


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


# Rows, inputs, rank, columns of the targets within the merged output.
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


def test_a_loss_that_is_not_finite_is_not_hidden() -> None:
    x = torch.randn(3, 24)
    x[1, 0] = float("nan")
    found, _ = linear_cross_entropy(x, torch.randn(101, 24), torch.tensor([1, 2, 3]), 1.0)
    assert found.losses.sum().isnan()
