"""How activations are stored: as they are, or compressed."""

from typing import Literal, Protocol

import torch

ActivationDtype = Literal["auto", "bfloat16", "int8"]

# Elements that share a scale: one float for 64 bytes, and an outlier spoils only its neighbours.
INT8_GROUP = 64


class ActivationCodec(Protocol):
    """Turns rows of activations into bytes and back."""

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of ``width`` elements."""

    def keeps(self, dtype: torch.dtype) -> bool:
        """Whether values of this dtype are stored as they are."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """``[n, width]`` -> ``[n, row_bytes(width)]`` uint8."""

    def decode(self, encoded: torch.Tensor, width: int) -> torch.Tensor:
        """``[n, row_bytes(width)]`` uint8 -> ``[n, width]`` in the model's dtype."""


class PlainCodec:
    """Stores in ``stored`` what the model has in ``dtype``: exact where they are equal."""

    def __init__(self, dtype: torch.dtype, stored: torch.dtype) -> None:
        self._dtype = dtype
        self._stored = stored

    def row_bytes(self, width: int) -> int:
        return width * self._stored.itemsize

    def keeps(self, dtype: torch.dtype) -> bool:
        return self._stored == dtype

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self._stored).contiguous().view(torch.uint8)

    def decode(self, encoded: torch.Tensor, width: int) -> torch.Tensor:
        return encoded.view(self._stored).to(self._dtype)


class Int8Codec:
    """Symmetric 8-bit integers, one float32 scale for each group of :data:`INT8_GROUP` elements."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    @staticmethod
    def _groups(width: int) -> int:
        return -(-width // INT8_GROUP)

    def row_bytes(self, width: int) -> int:
        # A multiple of 4, so that the scales of the next row are aligned.
        return 4 * self._groups(width) + -(-width // 4) * 4

    def keeps(self, dtype: torch.dtype) -> bool:
        return False

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        n, width = x.shape
        groups = self._groups(width)
        padded = torch.nn.functional.pad(x.float(), (0, groups * INT8_GROUP - width))
        grouped = padded.view(n, groups, INT8_GROUP)
        scale = grouped.abs().amax(-1).div_(127).clamp_min_(torch.finfo(torch.float32).tiny)
        values = (grouped / scale.unsqueeze(-1)).round_().to(torch.int8).view(n, -1)[:, :width]
        out = torch.zeros(n, self.row_bytes(width), dtype=torch.uint8, device=x.device)
        out[:, : 4 * groups] = scale.view(torch.uint8)
        out[:, 4 * groups : 4 * groups + width] = values.contiguous().view(torch.uint8)
        return out

    def decode(self, encoded: torch.Tensor, width: int) -> torch.Tensor:
        groups = self._groups(width)
        scale = encoded[:, : 4 * groups].contiguous().view(torch.float32)
        values = encoded[:, 4 * groups : 4 * groups + width].contiguous().view(torch.int8).float()
        values *= scale.repeat_interleave(INT8_GROUP, dim=1)[:, :width]
        return values.to(self._dtype)


def build_codec(dtype: torch.dtype, stored: ActivationDtype) -> ActivationCodec:
    """The codec for a model of this dtype; ``"auto"`` stores values as they are."""
    if stored == "int8":
        return Int8Codec(dtype)
    return PlainCodec(dtype, torch.bfloat16 if stored == "bfloat16" else dtype)
