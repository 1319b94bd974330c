"""The capture of some rows of a batch."""

import pytest
import torch
from near import TOLERANCE

from flexllm_vllm.kernels.triton import capture

DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE))


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
