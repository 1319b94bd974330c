"""Activations kept from a finetuning token's forward until its backward."""

from collections.abc import Mapping

import torch


class ActivationCache:
    """Fixed-size buffers, allocated once and indexed by slot, one slot per token.

    Args:
        num_slots: tokens it holds.
        num_layers: decoder layers.
        saved: name -> width of what a layer keeps per token.
        hidden_size: width of the input of the final norm, kept for the loss.
        dtype: of the activations.
    """

    def __init__(
        self,
        num_slots: int,
        num_layers: int,
        saved: Mapping[str, int],
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_slots = num_slots
        self._num_layers = num_layers
        self._final = torch.zeros(num_slots, hidden_size, dtype=dtype, device=device)
        self._layers = {
            name: torch.zeros(num_layers, num_slots, width, dtype=dtype, device=device)
            for name, width in saved.items()
        }

    @property
    def num_bytes(self) -> int:
        """Memory of all buffers, in bytes."""
        return sum(x.nbytes for x in (self._final, *self._layers.values()))

    def write(
        self,
        layer: int,
        name: str,
        slots: torch.Tensor,
        rows: torch.Tensor,
        x: torch.Tensor,
        addend: torch.Tensor | None,
    ) -> None:
        """Stores ``x[rows]`` (plus ``addend[rows]``) at ``slots``.

        Args:
            layer: ``num_layers`` stands for the input of the final norm.
            name: one of ``saved``.
            slots: ``[num_finetuning_rows]`` int64.
            rows: ``[num_finetuning_rows]`` int64, rows of the batch.
            x: ``[num_batch_rows, width]``.
            addend: like ``x``.
        """
        values = x.index_select(0, rows)
        if addend is not None:
            values += addend.index_select(0, rows)
        self._buffer(layer, name).index_copy_(0, slots, values)

    def read(self, layer: int, slots: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the layer kept for these tokens: name -> ``[num_slots, width]``."""
        return {name: self._buffer(layer, name).index_select(0, slots) for name in self._layers}

    def read_final(self, slots: torch.Tensor) -> torch.Tensor:
        """The input of the final norm, ``[num_slots, hidden_size]``."""
        return self._final.index_select(0, slots)

    def _buffer(self, layer: int, name: str) -> torch.Tensor:
        return self._final if layer == self._num_layers else self._layers[name][layer]
