"""Training as on a GPU, with fake tensors on torch's "meta" device for its memory: they have a
shape and a device, and no content."""

from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch

from flexllm_vllm.models.llama import LlamaBackward
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
from flexllm_vllm.worker.trainer import Trainer

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GPU = torch.device("meta")
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Sizes:
    """Of a model."""

    layers: int = 2
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head: int = 16
    inner: int = 96
    vocab: int = 300


class Module(torch.nn.Module):
    """A module of vLLM's model, with what the backward reads of it."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


class GemmaRMSNorm(Module):
    pass


class SiluAndMul(Module):
    pass


class GeluAndMul(Module):
    pass


def empty(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=GPU)


def linear(out_features: int, in_features: int, **attributes: Any) -> Module:
    return Module(weight=empty(out_features, in_features), bias=None, tp_rank=0, **attributes)


def model(family: str, sizes: Sizes) -> Any:
    """As vLLM loads it."""
    kind = GemmaRMSNorm if family == "gemma3" else Module

    def norm(width: int) -> Module:
        return kind(weight=empty(width), variance_epsilon=1e-6)

    s, hidden, head = sizes, sizes.hidden, sizes.head
    act_fn = GeluAndMul(approximate="tanh") if family == "gemma3" else SiluAndMul()
    q, kv = s.heads * head, s.kv_heads * head
    rotary = Module(cos_sin_cache=empty(8192, head), is_neox_style=True, rotary_dim=head)
    layers = []
    for _ in range(s.layers):
        norms = {"q_norm": norm(head), "k_norm": norm(head)} if family != "llama" else {}
        post = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
        post_norms = {name: norm(hidden) for name in post} if family == "gemma3" else {}
        attention = Module(
            num_heads=s.heads, num_kv_heads=s.kv_heads, total_num_kv_heads=s.kv_heads,
            head_dim=head, q_size=q, kv_size=kv, scaling=head**-0.5, rotary_emb=rotary,
            qkv_proj=linear(q + 2 * kv, hidden), o_proj=linear(hidden, q),
            attn=Module(kv_cache=empty(8, s.kv_heads, 16, 2 * head), sliding_window=None), **norms,
        )  # fmt: skip
        mlp = Module(
            gate_up_proj=linear(2 * s.inner, hidden), act_fn=act_fn,
            down_proj=linear(hidden, s.inner, input_size_per_partition=s.inner),
        )  # fmt: skip
        layers.append(
            Module(
                self_attn=attention, mlp=mlp, input_layernorm=norm(hidden),
                post_attention_layernorm=norm(hidden), **post_norms,
            )
        )  # fmt: skip
    shard = SimpleNamespace(org_vocab_start_index=0, org_vocab_end_index=s.vocab)
    return SimpleNamespace(
        model=SimpleNamespace(norm=norm(hidden), layers=layers, embed_tokens=None),
        lm_head=Module(weight=empty(s.vocab, hidden), shard_indices=shard),
        logits_processor=Module(scale=1.0),
        config=SimpleNamespace(vocab_size=s.vocab),
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


def train(
    run: Trainer, sizes: Sizes, rows: tuple[int, ...], window: int, r: int, preference: bool = False
) -> None:
    """Starts a job and runs an optimizer step of sequences of so many rows."""

    def carry_out(plan: StepPlan) -> None:
        run.run(plan)
        assert not run._result.failures

    adapter = TrainAdapter(
        "job", 1, r, 8.0, False, TARGETS, 0, None, (0.9, 0.999), 1e-8, 0.0
    )  # fmt: skip
    carry_out(StepPlan(start=[adapter]))
    sequences = tuple(
        PackedSequence(f"row-{i}", (-1, *range(1, count))) for i, count in enumerate(rows)
    )
    total = sum(rows)
    pages = tuple(range(-(-total // run._layouts["job"].tokens_per_page)))
    loss = PreferenceLoss(0.1, (-3.0,) * len(rows), 1) if preference else None
    carry_out(StepPlan(open=[OpenPack(1, "job", sequences, pages[::-1], total, preference=loss)]))
    blocks = list(range(-(-max(rows) // 16)))
    windows = [ForwardWindow(1, f"row-{i}", 0, count, blocks) for i, count in enumerate(rows)]
    run.begin_forward(windows, {f"row-{i}": sum(rows[:i]) for i in range(len(rows))})
    _forward(run, sizes, total)
    run.end_forward()
    edges = [*range(0, total, window), total]
    parts = list(pairwise(edges))[::-1]
    plan = StepPlan(optimize=[OptimizerStep("job", 1e-3, 1.0)])
    for layer in range(sizes.layers + int(preference), -1, -1):
        plan.backward += [BackwardWindow(1, layer, start, end, layer) for start, end in parts]
    carry_out(plan)
    assert not run.packs


def _forward(run: Trainer, sizes: Sizes, num_rows: int) -> None:
    """What the forward's hooks would be given."""
    adapter = run.adapters["job"].trained
    widths = {**run.model.saved(0, "store", adapter), "attention": sizes.heads * sizes.head}
    for name in ("hidden", "middle", "attended", "transformed"):
        widths[name] = sizes.hidden
    for layer in range(sizes.layers):
        for name, width in widths.items():
            addend = empty(num_rows, width) if name in ("hidden", "middle") else None
            run.capture(layer, name, empty(num_rows, width), addend)
    hidden, addend = empty(num_rows, sizes.hidden), empty(num_rows, sizes.hidden)
    run.capture(sizes.layers, "hidden", hidden, addend)


def backward_of(family: str, sizes: Sizes) -> LlamaBackward:
    return LlamaBackward(model(family, sizes))
