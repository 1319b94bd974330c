"""Cross-entropy and the gradient of its logits, against float64."""

import pytest
import torch
from near import TOLERANCE, assert_near, poison
from torch.nn import functional as F

from flexllm_vllm.kernels.cross_entropy import TokenLosses
from flexllm_vllm.kernels.triton import cross_entropy

DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE))


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
