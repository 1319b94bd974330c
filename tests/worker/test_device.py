"""A training step on a device: nothing of it is on the host, and the host waits for nothing.

There is no GPU here. Fake tensors on torch's "meta" device stand for its memory: an operation on
tensors of two devices raises, and so does reading a number. The operations are the torch twins of
the Triton kernels, which have tests of their own.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from flexllm_vllm.kernels.cross_entropy import release_buffers
from flexllm_vllm.models import decoder
from flexllm_vllm.models.base import ActivationPolicy
from flexllm_vllm.models.llama import LlamaBackward
from flexllm_vllm.models.parallel import TensorParallel
from flexllm_vllm.plan import (
    BackwardWindow,
    ForwardWindow,
    OpenPack,
    OptimizerStep,
    PackedSequence,
    PreferenceLoss,
    StepPlan,
    TrainAdapter,
)
from flexllm_vllm.worker import activation_cache, adapter, packs, readings, trainer
from flexllm_vllm.worker.activation_cache import PAGE_TOKENS, ActivationCache
from flexllm_vllm.worker.activation_codec import build_codec
from flexllm_vllm.worker.trainer import Trainer

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD, INNER, VOCAB = 2, 64, 4, 2, 16, 96, 300
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GPU = torch.device("meta")
DTYPE = torch.bfloat16


class Module(torch.nn.Module):
    """A module of vLLM's model, with what the backward reads of it."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


def empty(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=GPU)


def linear(out_features: int, in_features: int, **attributes: Any) -> Module:
    return Module(weight=empty(out_features, in_features), bias=None, tp_rank=0, **attributes)


class GemmaRMSNorm(Module):
    pass


class SiluAndMul(Module):
    pass


class GeluAndMul(Module):
    pass


def model(family: str) -> Any:
    """As vLLM loads it."""
    kind = GemmaRMSNorm if family == "gemma3" else Module

    def norm(width: int) -> Module:
        return kind(weight=empty(width), variance_epsilon=1e-6)

    act_fn = GeluAndMul(approximate="tanh") if family == "gemma3" else SiluAndMul()
    q, kv = HEADS * HEAD, KV_HEADS * HEAD
    rotary = Module(cos_sin_cache=empty(128, HEAD), is_neox_style=True, rotary_dim=HEAD)
    layers = []
    for _ in range(LAYERS):
        norms = {"q_norm": norm(HEAD), "k_norm": norm(HEAD)} if family != "llama" else {}
        post = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
        post_norms = {name: norm(HIDDEN) for name in post} if family == "gemma3" else {}
        attention = Module(
            num_heads=HEADS, num_kv_heads=KV_HEADS, total_num_kv_heads=KV_HEADS, head_dim=HEAD,
            q_size=q, kv_size=kv, scaling=HEAD**-0.5, rotary_emb=rotary,
            qkv_proj=linear(q + 2 * kv, HIDDEN), o_proj=linear(HIDDEN, q),
            attn=Module(kv_cache=empty(8, KV_HEADS, 16, 2 * HEAD), sliding_window=None), **norms,
        )  # fmt: skip
        mlp = Module(
            gate_up_proj=linear(2 * INNER, HIDDEN), act_fn=act_fn,
            down_proj=linear(HIDDEN, INNER, input_size_per_partition=INNER),
        )  # fmt: skip
        layers.append(
            Module(
                self_attn=attention, mlp=mlp, input_layernorm=norm(HIDDEN),
                post_attention_layernorm=norm(HIDDEN), **post_norms,
            )
        )  # fmt: skip
    shard = SimpleNamespace(org_vocab_start_index=0, org_vocab_end_index=VOCAB)
    return SimpleNamespace(
        model=SimpleNamespace(norm=norm(HIDDEN), layers=layers, embed_tokens=None),
        lm_head=Module(weight=empty(VOCAB, HIDDEN), shard_indices=shard),
        logits_processor=Module(scale=1.0),
        config=SimpleNamespace(vocab_size=VOCAB),
    )


class Slots:
    """In place of vLLM's LoRA slots."""

    def add(self, _: Any) -> None:
        pass

    write = remove = add


class Unread:
    """In place of the copy to the host: the numbers are on the device, and stay there."""

    def __init__(self, values: torch.Tensor) -> None:
        assert values.device == GPU
        self.count = len(values)


def step_without_reading(weights: Any, gradients: Any, *rest: Any) -> None:
    """In place of the fused AdamW, a Triton kernel."""
    tensors = [weights, gradients, *(x for x in rest if isinstance(x, torch.Tensor))]
    assert {x.device for x in tensors} == {GPU}
    assert len(tensors) == 5


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    for module in (packs, activation_cache, trainer):
        monkeypatch.setattr(module, "to_device", lambda x, device: x.to(device))
    monkeypatch.setattr(readings, "HostCopy", Unread)
    monkeypatch.setattr(adapter, "adamw", step_without_reading)
    monkeypatch.setattr(TensorParallel, "of_this_worker", classmethod(lambda cls: cls()))
    assert decoder.TensorParallel is TensorParallel
    with FakeTensorMode(), torch.inference_mode():
        yield
    release_buffers()


def capture_all(backward: LlamaBackward, run: Trainer, num_rows: int) -> None:
    """What the forward's hooks would be given."""
    widths = {**backward.saved(0, "store", adapter_of(run)), "attention": HEADS * HEAD}
    for name in ("hidden", "middle", "attended", "transformed"):
        widths[name] = HIDDEN
    for layer in range(LAYERS):
        for name, width in widths.items():
            addend = empty(num_rows, width) if name in ("hidden", "middle") else None
            run._capture(layer, name, empty(num_rows, width), addend)
    run._capture(LAYERS, "hidden", empty(num_rows, HIDDEN), empty(num_rows, HIDDEN))


def adapter_of(run: Trainer) -> Any:
    (found,) = run.adapters.values()
    return found.trained


@pytest.mark.parametrize("policy", ["store", "balanced", "minimal"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("preference", [False, True])
@pytest.mark.usefixtures("gpu")
def test_a_step_is_all_on_the_device(
    policy: ActivationPolicy, family: str, preference: bool
) -> None:
    backward = LlamaBackward(model(family))
    page = PAGE_TOKENS * 2 * (LAYERS * 1000 + HIDDEN)
    cache = ActivationCache(16, page, build_codec(DTYPE, "auto"), GPU)
    run = Trainer(backward, policy, cache, Slots())  # type: ignore[arg-type]
    run.run(StepPlan(start=[TrainAdapter("job", 1, 4, 8.0, False, TARGETS, 0, None, (0.9, 0.999),
                                         1e-8, 0.0)]))  # fmt: skip
    assert not run._result.failures
    rows = (20, 13)
    sequences = tuple(
        PackedSequence(f"row-{i}", (-1, *range(1, count))) for i, count in enumerate(rows)
    )
    loss = PreferenceLoss(0.1, (-3.0, -4.0), 1) if preference else None
    run.run(StepPlan(open=[OpenPack(1, "job", sequences, (3, 1, 2), 31, preference=loss)]))
    windows = [ForwardWindow(1, f"row-{i}", 0, count, [2 * i, 2 * i + 1])
               for i, count in enumerate(rows)]  # fmt: skip
    run.begin_forward(windows, {"row-0": 0, "row-1": rows[0]})
    capture_all(backward, run, sum(rows))
    run.end_forward()
    total = sum(rows)
    plan = StepPlan(optimize=[OptimizerStep("job", 1e-3, 1.0)])
    if preference:
        plan.backward.append(BackwardWindow(1, LAYERS + 1, 0, total, LAYERS + 1))
    for layer in range(LAYERS, -1, -1):
        plan.backward += [
            BackwardWindow(1, layer, 7, total, layer), BackwardWindow(1, layer, 0, 7, layer),
        ]  # fmt: skip
    run.run(plan)
    assert not run._result.failures
    assert not run.packs
    pending = run.take_result()
    assert pending
    # Loss and correct tokens, or loss and rewards; and the norm.
    assert pending._copy.count == (4 if preference else 3)  # type: ignore[union-attr]
