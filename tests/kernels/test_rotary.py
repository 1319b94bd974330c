"""The rotary embedding and its backward, against that of vLLM."""

import pytest
import torch

from flexllm_vllm.kernels.rotary import apply_rotary, apply_rotary_torch


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
