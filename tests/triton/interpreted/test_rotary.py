"""The rotary embedding and its backward."""

import pytest
import torch
from near import TOLERANCE, assert_near

from flexllm_vllm.kernels.rotary import apply_rotary_torch
from flexllm_vllm.kernels.triton import rotary

DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE))


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
