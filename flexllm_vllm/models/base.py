"""What the worker asks of a model family."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from flexllm_vllm.kernels.cross_entropy import TokenLosses
from flexllm_vllm.kernels.lora import LoraGroup
from flexllm_vllm.models.parallel import TensorParallel

# PEFT's names of the linear layers, by the merged linear of vLLM that computes them. The order
# within a group is the order of the merged output. Of a model of the Llama kind:
LORA_GROUPS: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}

# ... and of one whose linears are merged in its checkpoint already (Phi-3).
MERGED_LORA_GROUPS: dict[str, tuple[str, ...]] = {name: (name,) for name in LORA_GROUPS}

# ... and of a mixture of experts, whose experts are frozen.
ATTENTION_LORA_GROUPS: dict[str, tuple[str, ...]] = {
    name: LORA_GROUPS[name] for name in ("qkv_proj", "o_proj")
}

# How much of a layer's forward is kept for its backward; the rest is computed again.
ActivationPolicy = Literal["store", "balanced", "minimal"]


@dataclass(frozen=True)
class LinearShape:
    """Shape of one merged linear, whole.

    Attributes:
        in_features: width of its input.
        out_features: width of the output of each target in it.
        sharded: along which of the two vLLM shards it over a tensor-parallel group.
        parts: of each target, the widths that are sharded one by one where it is itself merged
            (queries, keys and values of a ``qkv_proj``); empty where none is.
    """

    in_features: int
    out_features: tuple[int, ...]
    sharded: Literal["input", "output"]
    parts: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class RowSegment:
    """The rows of a backward window that belong to one sequence.

    Attributes:
        rows: where they lie in the window.
        start: position of the first of them in its sequence.
        block_ids: ``[num_blocks]`` int64, the sequence's block table.
        dk: ``[num_kv_heads, sequence_length, head_size]`` float32, the KV-gradient accumulator.
        dv: like ``dk``.
    """

    rows: slice
    start: int
    block_ids: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


@dataclass(frozen=True)
class TrainedLinears:
    """Which merged linears an adapter has matrices for.

    Attributes:
        groups: (layer, name of the merged linear).
    """

    groups: frozenset[tuple[int, str]]

    @classmethod
    def all(cls, num_layers: int) -> "TrainedLinears":
        """Every linear of every layer."""
        return cls(frozenset((layer, name) for layer in range(num_layers) for name in LORA_GROUPS))

    def __contains__(self, group: tuple[int, str]) -> bool:
        return group in self.groups

    @functools.cached_property
    def lowest_layer(self) -> int:
        """The first decoder layer with matrices; below it nothing is differentiated."""
        return min(layer for layer, _ in self.groups)


class LoraMatrices(Protocol):
    """An adapter as the backward sees it.

    Attributes:
        trained: where it has matrices.
    """

    trained: TrainedLinears

    def group(self, layer: int, name: str) -> LoraGroup | None:
        """Matrices of a merged linear's targets, or None where it has none."""

    def grad(self, layer: int, name: str) -> LoraGroup:
        """Their float32 gradient accumulators."""


Capture = Callable[[int, str, torch.Tensor, "torch.Tensor | None"], None]


class ModelBackward(Protocol):
    """The backward of one loaded vLLM model.

    Attributes:
        num_layers: decoder layers.
        num_kv_heads, head_size: of the attention, for the KV-gradient accumulators.
        hidden_size: width of the residual stream.
        vocab_size: tokens of the loss head, over all ranks.
        dtype, device: of the weights and activations.
        parallel: the tensor-parallel group; heads and widths above are those of this rank.
        widest: columns of the widest linear of a layer, on this rank.
        lora_groups: PEFT's names of the linears, by the merged linear that computes them.
    """

    num_layers: int
    num_kv_heads: int
    head_size: int
    hidden_size: int
    vocab_size: int
    dtype: torch.dtype
    device: torch.device
    parallel: TensorParallel
    widest: int
    lora_groups: dict[str, tuple[str, ...]]

    def linear_shapes(self) -> dict[str, LinearShape]:
        """Shapes of the merged linears that an adapter may cover, whole, by their names in
        ``lora_groups``."""

    def module_path(self, layer: int, name: str) -> str:
        """Path of a linear (merged or PEFT's name) within the model."""

    def saved(
        self, layer: int, policy: ActivationPolicy, trained: TrainedLinears
    ) -> dict[str, int]:
        """What a layer keeps for the backward: name -> width per token."""

    def install_capture(self, capture: Capture) -> Callable[[], None]:
        """Registers hooks that call ``capture(layer, name, x, addend)`` in each forward.

        What is to be saved is ``x``, or ``x + addend`` where a residual is kept apart.
        ``layer == num_layers`` and name ``"hidden"`` is the input of the final norm.

        Returns:
            A function that removes the hooks.
        """

    def kv_cache(self, layer: int) -> torch.Tensor:
        """The layer's paged KV cache."""

    def rotary_table(self, positions: torch.Tensor) -> torch.Tensor:
        """Cosines and sines ``[num_rows, num_tables * rotary_dim]`` float32 at these positions, of
        each distinct rotary embedding of the model."""

    def loss_head(
        self, hidden: torch.Tensor, targets: torch.Tensor, scale: float
    ) -> tuple[TokenLosses, torch.Tensor | None]:
        """Losses of these rows, and the gradient of their sum by ``hidden``, times ``scale``.

        Args:
            hidden: ``[num_rows, hidden_size]``, the input of the final norm.
            targets: ``[num_rows]`` int64.
            scale: one over the loss-bearing tokens of the optimizer batch; 0 for no gradient.
        """

    def layer_backward(
        self,
        layer: int,
        d_out: torch.Tensor,
        saved: Mapping[str, torch.Tensor],
        rotary: torch.Tensor,
        segments: list[RowSegment],
        adapter: LoraMatrices,
    ) -> torch.Tensor | None:
        """Runs one layer backward for a window of rows, accumulating the LoRA gradients.

        Args:
            layer: index of the layer.
            d_out: ``[num_rows, hidden_size]`` float32, gradient of the layer's output.
            saved: what ``capture`` was given for this layer and these rows.
            rotary: see :meth:`rotary_table`.
            segments: the sequences that the rows belong to.
            adapter: the job's adapter.

        Returns:
            ``[num_rows, hidden_size]`` float32, gradient of the layer's input; None for the
            adapter's lowest layer, below which nobody needs it.
        """

    def release(self) -> None:
        """Nothing is in training: frees what is kept between windows."""
