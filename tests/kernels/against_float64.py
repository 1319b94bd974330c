"""What the tests of the kernels have in common."""

import pytest
import torch

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE))


def assert_near(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    error = (got.double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[dtype]
