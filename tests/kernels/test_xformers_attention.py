"""What is given to xformers and made of its answer.

Its kernels are CUDA's: here torch computes, in float64 and from the mask that xformers says it
would apply, what they are documented to return.
"""

import pytest
import torch

from flexllm_vllm.kernels import xformers_attention
from flexllm_vllm.kernels.paged_attention import attention_backward_torch

fmha = pytest.importorskip("xformers.ops.fmha")


@pytest.fixture
def torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(q, k, v, mask, scale):
        q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
        bias = mask.materialize((q.shape[2], k.shape[2]), dtype=torch.float64)
        scores = q @ k.transpose(2, 3) * scale + bias
        return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)

    def forward(query, key, value, attn_bias=None, scale=None):
        out, lse = attend(query, key, value, attn_bias, scale)
        return out.to(query.dtype), lse.float()

    def backward(grad, output, lse, query, key, value, attn_bias=None, scale=None):
        leaves = [x.double().requires_grad_() for x in (query, key, value)]
        with torch.enable_grad():
            out, again = attend(*leaves, attn_bias, scale)
        torch.testing.assert_close(output, out.detach().to(output.dtype))
        torch.testing.assert_close(lse, again.detach().float())
        found = torch.autograd.grad(out, leaves, grad.double())
        return tuple(x.to(query.dtype) for x in found)

    monkeypatch.setattr(fmha, "memory_efficient_attention_forward_requires_grad", forward)
    monkeypatch.setattr(fmha, "memory_efficient_attention_backward", backward)


@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.usefixtures("torch_computes")
def test_the_gradients_are_those_of_torch(heads: int, kv_heads: int, window: int | None) -> None:
    torch.manual_seed(0)
    start, num_queries, head_size, block = 13, 25, 16, 8
    num_keys = start + num_queries
    cache = torch.randn(12, kv_heads, block, 2 * head_size)
    # By its strides the blocks' tokens may come before their heads.
    cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
    blocks = torch.tensor([7, 2, 11, 0, 5, 9])
    query, d_out = torch.randn(2, num_queries, heads, head_size).unbind()
    key, value = xformers_attention.read_gpu_kv(cache, blocks, num_keys)
    # Later windows have left their part, and this sequence is longer than what it sees.
    found = torch.randn(2, kv_heads, num_keys + 3, head_size)
    expected = found.clone()
    dq = xformers_attention.attention_backward(
        d_out, query, cache, blocks, start, 0.3, *found, window
    )
    wanted = attention_backward_torch(
        d_out, query, key.permute(1, 2, 0), value.transpose(0, 1), start, 0.3, *expected, window
    )
    torch.testing.assert_close(dq, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("torch_computes")
def test_the_trial_at_start_passes(dtype: torch.dtype) -> None:
    xformers_attention.check(6, 2, 32, dtype, torch.device("cpu"))


@pytest.mark.usefixtures("torch_computes")
def test_the_trial_finds_other_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    backward = fmha.memory_efficient_attention_backward

    def wrong(*args, **kwargs):
        dq, dk, dv = backward(*args, **kwargs)
        return dq, dv, dk

    monkeypatch.setattr(fmha, "memory_efficient_attention_backward", wrong)
    with pytest.raises(ValueError, match="other gradients than torch"):
        xformers_attention.check(4, 2, 32, torch.float32, torch.device("cpu"))


def test_where_xformers_has_no_kernel_it_says_why() -> None:
    with pytest.raises(
        ValueError, match=r"(?s)attention-backend xformers: No operator found.*device=cpu"
    ):
        xformers_attention.check(4, 2, 32, torch.float32, torch.device("cpu"))
