"""What results are compared by."""

import torch

# Of a float32 sum, and of values that are rounded to the type on their way.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def assert_near(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Within the tolerance of a dtype of a float64 result, relative to its norm."""
    assert got.shape == expected.shape
    error = (got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-9)
    assert error < TOLERANCE[dtype], error


def poison(like: torch.Tensor) -> torch.Tensor:
    return torch.full_like(like, float("nan"))
