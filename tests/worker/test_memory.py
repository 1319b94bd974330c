"""What vLLM is told that training takes, against what a training step allocates."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_gpu import DTYPE, GPU, Sizes, Slots, backward_of, train
from torch.distributed._tools.mem_tracker import MemTracker

from flexllm_vllm.config import FinetuningConfig
from flexllm_vllm.kernels import (
    cross_entropy,
    geglu,
    paged_attention,
    rms_norm,
    rotary,
    swiglu,
    triton,
)
from flexllm_vllm.models.base import ActivationPolicy, TrainedLinears
from flexllm_vllm.worker.activation_cache import PAGE_TOKENS, ActivationCache
from flexllm_vllm.worker.activation_codec import build_codec
from flexllm_vllm.worker.memory import training_bytes
from flexllm_vllm.worker.mixin import FinetuningWorkerMixin
from flexllm_vllm.worker.trainer import Trainer, kept_per_token

SIZES = Sizes(layers=3, hidden=1024, heads=16, kv_heads=4, head=64, inner=2816, vocab=32_000)
TOKENS = 2048


def gated(dy: torch.Tensor, gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(gate_up), torch.empty_like(dy)


def half(gate_up: torch.Tensor) -> torch.Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


def float_like(_: torch.Tensor, x: torch.Tensor, *__: Any) -> torch.Tensor:
    return torch.empty_like(x, dtype=torch.float32)


# What each Triton kernel allocates: its result.
KERNELS = {
    rms_norm: ("rms_norm", {"rms_norm": lambda x, *_: torch.empty_like(x),
                            "rms_norm_backward": float_like}),
    swiglu: ("swiglu", {"swiglu": half, "swiglu_backward": gated}),
    geglu: ("geglu", {"geglu": half, "geglu_backward": gated}),
    rotary: ("rotary", {"apply_rotary": lambda x, *rest: rest[-1] if rest[-1] is not None
                        else torch.empty_like(x)}),
    cross_entropy: ("cross_entropy", {"softmax_cross_entropy": lambda logits, *_: logits}),
    paged_attention: ("paged_attention", {
        "attention_backward": float_like, "attention_forward": lambda q, *_: torch.empty_like(q),
    }),
}  # fmt: skip


@pytest.mark.parametrize("policy", ["store", "balanced", "minimal"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.usefixtures("gpu")
def test_room_is_left_for_all_that_a_step_allocates(
    family: str, policy: ActivationPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, (name, functions) in KERNELS.items():
        monkeypatch.setattr(module, "use_triton", lambda _: True)
        monkeypatch.setattr(triton, name, SimpleNamespace(**functions), raising=False)
    config = FinetuningConfig(max_tokens=512, max_lora_rank=64)
    backward = backward_of(family, SIZES)
    kept = kept_per_token(backward, policy, TrainedLinears.all(SIZES.layers))
    codec = build_codec(DTYPE, "auto")
    page = PAGE_TOKENS * sum(codec.row_bytes(width) for width in kept.values())
    room = training_bytes(backward, config, TOKENS)
    tracker = MemTracker()
    with tracker:
        cache = ActivationCache(TOKENS // PAGE_TOKENS, page, codec, GPU)
        run = Trainer(backward, policy, cache, Slots())  # type: ignore[arg-type]
        train(run, SIZES, (TOKENS - 100, 100), window=config.max_tokens, r=config.max_lora_rank)
    (peak,) = (x["Total"] for d, x in tracker.get_tracker_snapshot("peak").items() if d == GPU)
    # The inputs of the forward's hooks are vLLM's, and were profiled by it.
    assert peak - cache.num_bytes <= room
    assert room < 1.5 * (peak - cache.num_bytes)


class Profiled:
    """vLLM's worker, as far as it sizes the KV cache."""

    def determine_available_memory(self) -> int:
        return 10 << 30


class SizedWorker(FinetuningWorkerMixin, Profiled):  # type: ignore[misc]
    def __init__(self, config: FinetuningConfig, kv_cache_memory_bytes: int | None) -> None:
        self._finetuning = config
        self._backward = backward_of("llama", SIZES)
        self.cache_config = SimpleNamespace(kv_cache_memory_bytes=kv_cache_memory_bytes)


@pytest.mark.usefixtures("gpu")
def test_the_kv_cache_gets_what_training_leaves() -> None:
    config = FinetuningConfig(activation_cache_tokens=TOKENS)
    worker = SizedWorker(config, None)
    kept = kept_per_token(worker._backward, "balanced", TrainedLinears.all(SIZES.layers))
    cache = TOKENS * sum(build_codec(DTYPE, "auto").row_bytes(width) for width in kept.values())
    taken = cache + training_bytes(worker._backward, config, TOKENS)
    assert worker.determine_available_memory() == (10 << 30) - taken
    # A size that the user has chosen is the KV cache's own.
    assert SizedWorker(config, 4 << 30).determine_available_memory() == 10 << 30
