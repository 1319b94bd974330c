import pytest
import torch
import vllm._custom_ops  # noqa: F401, registers its C++ operations

from flexllm_vllm.patches import cpu_compilation


class Norm:
    weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, 32))
    variance_epsilon = 1e-6


@pytest.mark.parametrize("heads", [1, 4])
def test_the_norm_of_heads_within_a_merged_projection(heads: int) -> None:
    """Qwen3 norms queries and keys where they lie, with rows between which others lie."""
    merged = torch.randn(5, 7 * 32, generator=torch.Generator().manual_seed(0))
    x = merged[:, 32 : 32 + heads * 32].view(5, heads, 32)
    expected = torch.nn.functional.rms_norm(x, (32,), Norm.weight, Norm.variance_epsilon)
    torch.testing.assert_close(cpu_compilation._rms_norm(Norm, x), expected.detach())
