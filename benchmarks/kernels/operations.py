"""The operations that are timed, each beside what torch offers for it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from flexllm_vllm.kernels import (
    adamw,
    capture,
    cross_entropy,
    paged_attention,
    rms_norm,
    segmented_lora,
    swiglu,
)
from flexllm_vllm.kernels import rotary as rotary_op

EPS = 1e-5


@dataclass(frozen=True)
class Sizes:
    """A model's, a window's and a batch's.

    Attributes:
        tokens: rows of a window.
        context: tokens of the sequence that the window ends.
    """

    name: str
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    tokens: int
    context: int
    r: int = 16
    adapters: int = 4


# SmolLM2-135M on a CPU, Llama-3.1-8B on a GPU.
SMALL = Sizes("SmolLM2-135M", 576, 1536, 9, 3, 64, 49152, 256, 1024)
LARGE = Sizes("Llama-3.1-8B", 4096, 14336, 32, 8, 128, 128256, 1024, 4096)


@dataclass(frozen=True)
class Operation:
    """Attributes:
    ours: the operation as the backward calls it.
    torchs: the same by torch's own operations (autograd, scaled_dot_product_attention,
        torch.optim), or by our twin in torch where torch has none.
    """

    name: str
    ours: Callable[[], object]
    torchs: Callable[[], object]


def operations(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Iterator[Operation]:
    """Each with inputs of its own."""

    def random(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(of)

    n, hidden = sizes.tokens, sizes.hidden
    yield _norm(random(n, hidden), random(n, hidden), random(hidden))
    yield _swiglu(random(n, 2 * sizes.inner), random(n, sizes.inner))
    yield _rotary(
        random(n, sizes.heads, sizes.head_size), random(n, sizes.head_size, of=torch.float32)
    )
    yield _cross_entropy(
        random(256, sizes.vocab), torch.randint(sizes.vocab, (256,), device=device)
    )
    yield _attention(sizes, dtype, device)
    yield _lora(sizes, dtype, device)
    count = 2 * sizes.r * hidden * 7 * 16
    yield _adamw([random(count, of=torch.float32) for _ in range(4)])
    slots = torch.arange(n, device=device)
    slots[::2] = -1
    pool, x, addend = random(4 * n, hidden), random(n, hidden), random(n, hidden)
    kept = (slots >= 0).nonzero().squeeze(1)
    yield Operation(
        "capture of every second row",
        lambda: capture.capture_rows(pool, slots, x, addend),
        lambda: pool.index_copy_(0, slots[kept], x[kept] + addend[kept]),
    )


def _norm(x: torch.Tensor, dy: torch.Tensor, weight: torch.Tensor) -> Operation:
    leaf = x.clone().requires_grad_()
    y = F.rms_norm(leaf, x.shape[1:], weight, EPS)
    return Operation(
        "RMSNorm backward",
        lambda: rms_norm.rms_norm_backward(dy, x, weight, EPS),
        lambda: torch.autograd.grad(y, leaf, dy, retain_graph=True),
    )


def _swiglu(gate_up: torch.Tensor, dy: torch.Tensor) -> Operation:
    leaf = gate_up.clone().requires_grad_()

    def recompute_and_differentiate() -> object:
        gate, up = leaf.chunk(2, dim=-1)
        return torch.autograd.grad(F.silu(gate) * up, leaf, dy)

    return Operation(
        "SwiGLU again, and backward",
        lambda: swiglu.swiglu_backward(dy, gate_up),
        recompute_and_differentiate,
    )


def _rotary(x: torch.Tensor, cos_sin: torch.Tensor) -> Operation:
    return Operation(
        "rotary backward",
        lambda: rotary_op.apply_rotary(x, cos_sin, True, inverse=True),
        lambda: rotary_op.apply_rotary_torch(x, cos_sin, True, inverse=True),
    )


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> Operation:
    into = cross_entropy.TokenLosses.empty(len(targets), logits.device)
    scratch, leaf = logits.clone(), logits.clone().requires_grad_()

    def torchs() -> object:
        return torch.autograd.grad(F.cross_entropy(leaf, targets, reduction="sum"), leaf)

    return Operation(
        "cross-entropy and its gradient",
        lambda: cross_entropy.softmax_cross_entropy(scratch, targets, 1.0, 1.0, into),
        torchs,
    )


def _attention(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Operation:
    """A window at the end of its sequence. torch's backward has K and V in one piece, and so no
    paged cache to read; its forward is not in its time."""
    n, start = sizes.tokens, sizes.context - sizes.tokens
    block = 16 if device.type == "cuda" else 128
    num_blocks = -(-sizes.context // block)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    query, d_out = (random(n, sizes.heads, sizes.head_size) for _ in range(2))
    cache = random(num_blocks, sizes.kv_heads, block, 2 * sizes.head_size)
    blocks = torch.randperm(num_blocks, device=device)
    shape = (sizes.kv_heads, sizes.context, sizes.head_size)
    dk, dv = (torch.zeros(shape, device=device) for _ in range(2))
    scale = sizes.head_size**-0.5
    leaves = [
        random(1, heads, length, sizes.head_size).requires_grad_()
        for heads, length in ((sizes.heads, n), *2 * ((sizes.kv_heads, sizes.context),))
    ]
    position = torch.arange(n, device=device)[:, None] + start
    mask = torch.arange(sizes.context, device=device) <= position
    out = F.scaled_dot_product_attention(*leaves, attn_mask=mask, enable_gqa=True)
    gradient = d_out.transpose(0, 1)[None]
    return Operation(
        f"attention backward, {n} queries at the end of {sizes.context}",
        lambda: paged_attention.attention_backward(
            d_out, query, cache, blocks, start, scale, dk, dv
        ),
        lambda: torch.autograd.grad(out, leaves, gradient, retain_graph=True),
    )


def _lora(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Operation:
    n, count, r, width = sizes.tokens, sizes.adapters, sizes.r, sizes.hidden

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    dy, x, a, b = (
        random(n, width),
        random(n, width),
        random(count, r, width),
        random(count, width, r),
    )
    da, db = (torch.zeros(m.shape, device=device) for m in (a, b))
    dx, scaling = random(n, width), torch.ones(count, device=device)
    starts = torch.arange(count + 1, device=device, dtype=torch.int32) * (n // count)
    slots = torch.arange(count, device=device, dtype=torch.int32)
    rest = (dy, x, a, b, scaling, starts, slots)
    return Operation(
        f"LoRA gradients of {count} adapters, r={r}",
        lambda: segmented_lora.segmented_lora_backward(*rest, n // count, da, db, dx),
        lambda: segmented_lora.segmented_lora_backward_torch(*rest, da, db, dx),
    )


def _adamw(state: list[torch.Tensor]) -> Operation:
    weights, gradients, exp_avg, exp_avg_sq = state
    exp_avg_sq.abs_()
    norm = torch.linalg.vector_norm(gradients)
    parameter = torch.nn.Parameter(weights.clone())
    parameter.grad = gradients.clone()
    optimizer = torch.optim.AdamW([parameter], fused=True)

    def torchs() -> None:
        torch.nn.utils.clip_grad_norm_([parameter], 1.0)
        optimizer.step()

    return Operation(
        f"clipping and AdamW, {len(weights) / 1e6:.1f} million parameters",
        lambda: adamw.adamw(weights, gradients, exp_avg, exp_avg_sq, norm, 1, 1e-4, (0.9, 0.999),
                            1e-8, 0.0, 1.0),
        torchs,
    )  # fmt: skip
