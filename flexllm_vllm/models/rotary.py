"""The rotary embedding of a layer, at the positions of some rows."""

from dataclasses import dataclass

import torch

from flexllm_vllm.kernels.rotary import apply_rotary


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
