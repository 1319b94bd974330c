"""A training step on a device: nothing of it is on the host, and the host waits for nothing.

There is no GPU here. An operation on fake tensors of two devices raises, and so does reading a
number. The operations are the torch twins of the Triton kernels, which have tests of their own.
"""

import pytest
from fake_gpu import DTYPE, GPU, Sizes, Slots, backward_of, train

from flexllm_vllm.models.base import ActivationPolicy
from flexllm_vllm.worker.activation_cache import PAGE_TOKENS, ActivationCache
from flexllm_vllm.worker.activation_codec import build_codec
from flexllm_vllm.worker.trainer import Trainer


@pytest.mark.parametrize("policy", ["store", "balanced", "minimal"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("preference", [False, True])
@pytest.mark.usefixtures("gpu")
def test_a_step_is_all_on_the_device(
    policy: ActivationPolicy, family: str, preference: bool
) -> None:
    sizes = Sizes()
    page = PAGE_TOKENS * 2 * (sizes.layers * 1000 + sizes.hidden)
    cache = ActivationCache(16, page, build_codec(DTYPE, "auto"), GPU)
    run = Trainer(backward_of(family, sizes), policy, cache, Slots())  # type: ignore[arg-type]
    train(run, sizes, (20, 13), window=7, r=4, preference=preference)
    pending = run.take_result()
    assert pending
    # Loss and correct tokens, or loss and rewards; and the norm.
    assert pending._copy.count == (4 if preference else 3)  # type: ignore[union-attr]
