"""The RMSNorms of a model."""

from dataclasses import dataclass
from typing import Any

import torch

from flexllm_vllm.kernels.rms_norm import rms_norm, rms_norm_backward


@dataclass(frozen=True)
class FrozenNorm:
    """An RMSNorm of the model.

    Attributes:
        weight: ``[width]``, by which the normed is multiplied.
        eps: added to the mean square.
    """

    weight: torch.Tensor
    eps: float

    @classmethod
    def of(cls, module: Any) -> "FrozenNorm":
        """Gemma's store what is added to one, and multiply in float32."""
        weight = module.weight
        if type(module).__name__ == "GemmaRMSNorm":
            weight = weight.float() + 1.0
        return cls(weight, module.variance_epsilon)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[num_rows, width]`` normed, in the dtype of ``x``."""
        return rms_norm(x, self.weight, self.eps)

    def backward(
        self, dy: torch.Tensor, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See :func:`rms_norm_backward`."""
        return rms_norm_backward(dy, x, self.weight, self.eps, residual)

    def heads_backward_(self, d_heads: torch.Tensor, raw: torch.Tensor) -> None:
        """Turns gradients of normed heads into those of the heads before, in place.

        Args:
            d_heads: ``[num_rows, num_heads * width]``, any row stride.
            raw: like ``d_heads``, the norm's input.
        """
        width = self.weight.shape[0]
        found = self.backward(d_heads.reshape(-1, width), raw.reshape(-1, width))
        d_heads.copy_(found.view(d_heads.shape))
