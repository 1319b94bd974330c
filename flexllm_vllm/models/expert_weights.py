"""The weights of vLLM's experts, read back from the layout that its kernel packed them into."""

from collections.abc import Callable
from typing import Any

import torch

from flexllm_vllm.models.gated import GatedActivation

# Of the norm of the kernel's output, in bfloat16; a wrong layout is off by all of it.
TOLERANCE = 0.03
# Output columns that vLLM's CPU kernels interleave (``csrc/cpu/cpu_fused_moe.cpp``).
_BLOCK = 16


def _plain(packed: torch.Tensor) -> torch.Tensor:
    return packed


def _of_vectors(packed: torch.Tensor) -> torch.Tensor:
    """``[out / 16, in, 16]``."""
    out, size = packed.shape
    return packed.view(out // _BLOCK, size, _BLOCK).transpose(1, 2).reshape(out, size)


def _of_tiles(packed: torch.Tensor) -> torch.Tensor:
    """``[out / 16, in / n, 16, n]``, where a tile's row of 4 bytes has ``n`` inputs."""
    out, size = packed.shape
    n = 4 // packed.element_size()
    tiles = packed.view(out // _BLOCK, size // n, _BLOCK, n)
    return tiles.transpose(1, 2).reshape(out, size)


# By the instruction set that a CPU kernel is for.
_LAYOUTS: dict[str | None, Callable[[torch.Tensor], torch.Tensor]] = {
    None: _plain,
    "vec": _of_vectors,
    "amx": _of_tiles,
}


class ExpertWeights:
    """The experts of one layer: ``E(x) = (act(x gate_up^T)) down^T``, without biases.

    Args:
        experts: vLLM's ``RoutedExperts``, with its weights loaded.
        activation: between the two products.

    Attributes:
        intermediate_size: columns of the first product, on this rank, are twice that.

    Raises:
        ValueError: they are quantised or have biases, or what is read back is not what vLLM's
            kernel multiplies by.
    """

    def __init__(self, experts: Any, activation: GatedActivation) -> None:
        self._experts = experts
        self._activation = activation
        # Wrapped by vLLM's LoRA where a user has the experts covered as well.
        method = getattr(experts.quant_method, "old_quant_method", experts.quant_method)
        if type(method).__name__ != "UnquantizedFusedMoEMethod":
            raise ValueError(
                f"finetuning does not support the quantisation {type(method).__name__} of experts"
            )
        if hasattr(experts, "w13_bias"):
            raise ValueError("finetuning does not support experts with biases")
        self._method = method
        isa = getattr(method.moe_kernel.fused_experts, "isa", None)
        if isa not in _LAYOUTS:
            raise ValueError(f"finetuning does not support experts packed for {isa}")
        self._unpacked = _LAYOUTS[isa]
        self.intermediate_size = int(experts.w2_weight.shape[2])
        self._check()

    def of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``[2 * intermediate_size, hidden_size]`` gate and up, and ``[hidden_size,
        intermediate_size]`` down."""
        gate_up, down = self._experts.w13_weight[expert], self._experts.w2_weight[expert]
        return self._unpacked(gate_up), self._unpacked(down)

    def _check(self) -> None:
        """Whether the last expert's output by the weights read back is that of vLLM's kernel."""
        packed = self._experts.w2_weight
        last, hidden = packed.shape[0] - 1, packed.shape[1]
        x = torch.randn(2, hidden, generator=torch.Generator().manual_seed(0)).to(packed)
        one = torch.ones(2, 1, device=packed.device)
        ids = torch.full((2, 1), last, dtype=torch.int32, device=packed.device)
        expected = self._method.apply(self._experts, x, one, ids, None, None).float()
        gate_up, down = self.of(last)
        found = (self._activation.forward(x @ gate_up.t()) @ down.t()).float()
        if not (found - expected).norm() <= TOLERANCE * expected.norm():
            kernel = type(self._method.moe_kernel.fused_experts).__name__
            raise ValueError(
                f"finetuning does not support experts whose weights are packed for {kernel}"
            )
