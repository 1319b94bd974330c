"""Norm, SwiGLU, rotary embedding, cross-entropy, AdamW and capture, against float64."""

import pytest
import torch
from near import TOLERANCE, assert_near, poison
from torch.nn import functional as F

from flexllm_vllm.kernels.cross_entropy import TokenLosses
from flexllm_vllm.kernels.rotary import apply_rotary_torch
from flexllm_vllm.kernels.triton import adamw as gpu_adamw
from flexllm_vllm.kernels.triton import capture, cross_entropy, geglu, rms_norm, rotary, swiglu

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


@DTYPES
@pytest.mark.parametrize("width", [1, 29, 1500])
def test_geglu(dtype: torch.dtype, width: int) -> None:
    x, dy = 4 * torch.randn(3, 2 * width).to(dtype), torch.randn(3, width).to(dtype)
    leaf = x.double().requires_grad_()
    gate, up = leaf.chunk(2, dim=-1)
    y = F.gelu(gate, approximate="tanh") * up
    y.backward(dy.double())
    assert_near(geglu.geglu(x), y.detach(), dtype)
    gradient, product = geglu.geglu_backward(dy, x)
    assert_near(gradient, leaf.grad, dtype)
    assert_near(product, y.detach(), dtype)


@DTYPES
@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("rotary_dim", [12, 4])
def test_rotary(dtype: torch.dtype, neox: bool, rotary_dim: int) -> None:
    x = torch.randn(4, 3, 12).to(dtype)
    angles = torch.randn(4, rotary_dim // 2)
    table = torch.cat((angles.cos(), angles.sin()), dim=-1)
    for inverse in (False, True):
        expected = apply_rotary_torch(x.double(), table.double(), neox, inverse)
        assert_near(rotary.apply_rotary(x, table, neox, inverse), expected, dtype)
        wide = torch.full((4, 3, 20), float("nan"))[..., 8:]  # strided, another dtype
        assert_near(rotary.apply_rotary(x, table, neox, inverse, wide), expected, dtype)


@DTYPES
@pytest.mark.parametrize("vocab_size", [7, 5000])
def test_cross_entropy(dtype: torch.dtype, vocab_size: int) -> None:
    logits = 3 * torch.randn(3, vocab_size).to(dtype)
    targets = torch.tensor([0, vocab_size - 1, int(logits[2].argmax())])
    leaf = logits.double().requires_grad_()
    losses = F.cross_entropy(0.5 * leaf, targets, reduction="none")
    (0.25 * losses.sum()).backward()
    into = TokenLosses(poison(torch.zeros(3, dtype=torch.float64)), torch.full((3,), -7))
    untouched = logits.clone()
    cross_entropy.softmax_cross_entropy(untouched, targets, 0.0, 0.5, into)
    assert torch.equal(untouched, logits)
    assert_near(into.losses, losses.detach(), torch.float32)
    assert into.correct.tolist() == (logits.argmax(-1) == targets).int().tolist()
    got = cross_entropy.softmax_cross_entropy(logits, targets, 0.25, 0.5, into)
    assert_near(got, leaf.grad, dtype)


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


@DTYPES
def test_capture_keeps_the_rows_that_have_a_slot(dtype: torch.dtype) -> None:
    pool = torch.full((6, 1100), 7.0).to(dtype)
    x, addend = (torch.randn(5, 1100).to(dtype) for _ in range(2))
    slots = torch.tensor([4, -1, 0, -1, 5])
    capture.capture_rows(pool, slots, x, addend)
    kept = torch.tensor([0, 2, 4])
    assert torch.equal(pool[slots[kept]], x[kept] + addend[kept])
    assert (pool[[1, 2, 3]] == 7.0).all()
    capture.capture_rows(pool, slots, x)
    assert torch.equal(pool[slots[kept]], x[kept])
