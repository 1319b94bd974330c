"""The rotary embedding of a layer, at the positions of some rows."""

from dataclasses import dataclass
from typing import Any

import torch

from flexllm_vllm.kernels.rotary import apply_rotary

# Of ``Phi3LongRoPEScaledRotaryEmbedding``, which pairs halves: the table for short contexts, then
# that for long ones. They are scaled as well; the transpose of a scaled rotation is the scaled
# inverse.
LONG_ROPE = "long_short_cos_sin_cache"


def cos_sin(module: Any, positions: torch.Tensor) -> torch.Tensor:
    """Cosines and sines ``[num_rows, rotary_dim]`` float32 of vLLM's module at these positions."""
    table = getattr(module, LONG_ROPE, None)
    if table is None:
        table = module.cos_sin_cache
    elif module.use_long_rope:
        positions = positions + module.original_max_position_embeddings
    return table.index_select(0, positions).float()


@dataclass(frozen=True)
class Rotary:
    """A rotary embedding at the positions of some rows.

    Attributes:
        cos_sin: ``[num_rows, rotary_dim]`` float32.
        is_neox_style: halves are paired, or neighbours.
    """

    cos_sin: torch.Tensor
    is_neox_style: bool

    def __getitem__(self, rows: slice) -> "Rotary":
        return Rotary(self.cos_sin[rows], self.is_neox_style)

    def apply(
        self, x: torch.Tensor, inverse: bool = False, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See :func:`apply_rotary`."""
        return apply_rotary(x, self.cos_sin, self.is_neox_style, inverse, out)
