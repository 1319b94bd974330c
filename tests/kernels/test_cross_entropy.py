"""Cross-entropy of a linear layer, against float64."""

import pytest
import torch
from against_float64 import DTYPES, TOLERANCE, assert_near
from torch.nn import functional as F

from flexllm_vllm.kernels.cross_entropy import LogitForm, linear_cross_entropy


@DTYPES
@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_linear_cross_entropy(dtype: torch.dtype, rows: int, soft_cap: float | None) -> None:
    # Logits of no more than a few units: a token that is certain has no gradient to compare.
    x, weight = 0.3 * torch.randn(rows, 24), torch.randn(101, 24)
    x, weight = x.to(dtype), weight.to(dtype)
    targets = torch.randint(0, 101, (rows,))
    targets[1::2] = (x.double() @ weight.double().t()).argmax(1)[1::2]
    leaf = x.double().requires_grad_()
    logits = leaf @ weight.double().t()
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    loss = F.cross_entropy(0.7 * logits, targets, reduction="sum")
    (loss / 9).backward()
    got, dx = linear_cross_entropy(x, weight, targets, 1 / 9, LogitForm(0.7, soft_cap))
    assert dx is not None
    assert float(got.losses.sum()) == pytest.approx(float(loss.detach()), rel=TOLERANCE[dtype])
    first, second = logits.detach().topk(2).values.unbind(1)
    clear = first - second > 4 * torch.finfo(dtype).eps * first.abs()  # else rounding may decide
    correct = (logits.argmax(1) == targets).long()
    assert torch.equal(got.correct[clear], correct[clear])
    scored, none = linear_cross_entropy(x, weight, targets, 0.0, LogitForm(0.7, soft_cap))
    assert none is None
    assert torch.equal(scored.losses, got.losses)
    assert_near(dx, leaf.grad, dtype)


def test_a_loss_that_is_not_finite_is_not_hidden() -> None:
    x = torch.randn(3, 24)
    x[1, 0] = float("nan")
    found, _ = linear_cross_entropy(x, torch.randn(101, 24), torch.tensor([1, 2, 3]), 1.0)
    assert found.losses.sum().isnan()
