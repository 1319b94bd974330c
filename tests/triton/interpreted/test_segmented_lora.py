"""LoRA gradients of several adapters in one launch, against each adapter in float64."""

import pytest
import torch
from near import TOLERANCE, assert_near

from flexllm_vllm.kernels.segmented_lora import (
    segmented_lora_backward,
    segmented_lora_backward_torch,
)


@pytest.mark.parametrize("in_torch", [True, False], ids=["torch", "triton"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("rank", [3, 16])
def test_gradients(in_torch: bool, dtype: torch.dtype, rank: int) -> None:
    lengths, used = [1, 0, 41], [2, 0, 1]  # slot 3 has no rows; a segment is empty
    rows, out_features, in_features = sum(lengths), 70, 37
    dy, x = torch.randn(rows, out_features).to(dtype), torch.randn(rows, in_features).to(dtype)
    a, b = torch.randn(4, rank, in_features), torch.randn(4, out_features, rank)
    scaling = torch.tensor([2.0, 0.5, 1.5, float("nan")])
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    da, db, dx = torch.ones_like(a), torch.ones_like(b), torch.ones(rows, in_features)
    slots = torch.tensor(used, dtype=torch.int32)

    def run(dx: torch.Tensor | None) -> None:
        if in_torch:
            segmented_lora_backward_torch(dy, x, a, b, scaling, starts, slots, da, db, dx)
        else:
            segmented_lora_backward(dy, x, a, b, scaling, starts, slots, 41, da, db, dx)

    run(dx)
    expected_a, expected_b = torch.ones(a.shape).double(), torch.ones(b.shape).double()
    expected_x = torch.ones(dx.shape).double()
    for index, slot in enumerate(used):
        span = slice(int(starts[index]), int(starts[index + 1]))
        d, inputs = dy[span].double(), x[span].double()
        g = float(scaling[slot]) * d @ b[slot].double()
        expected_a[slot] += g.t() @ inputs
        expected_b[slot] += float(scaling[slot]) * d.t() @ (inputs @ a[slot].double().t())
        expected_x[span] += g @ a[slot].double()
    assert_near(da, expected_a, dtype)
    assert_near(db, expected_b, dtype)
    assert_near(dx, expected_x, dtype)
    untouched = dx.clone()
    run(None)
    assert torch.equal(dx, untouched)
