"""LoRA on CPU: right for rows without an adapter, one GEMM for each adapter.

vLLM 0.32 indexes the stacked adapters with -1 for rows without one, which is the last slot: a base
request that shares a batch with an adapter gets that adapter's answers (vllm-project/vllm#48421).
It also gathers the whole A and B once per token. Co-serving puts such rows into every batch.
Here rows are grouped by slot once per batch; each adapter's rows are one GEMM for A and one for B,
other rows are not touched, and where no row has an adapter nothing is done.
Fits vLLM 0.32 (``vllm/lora/punica_wrapper/punica_cpu.py``). The correctness part is needless once
vLLM masks these rows; ``tests/patches`` has a test that fails then.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch

from flexllm_vllm.kernels.lora import NativeLora
from flexllm_vllm.patches import require

Segment = tuple[int, "slice | torch.Tensor"]
# Adds an adapter's product to some rows (None: all) of a merged output ``y``, of those of ``x``.
Product = Callable[[torch.Tensor, torch.Tensor, "slice | None"], object]


def segments(slots: torch.Tensor) -> list[Segment]:
    """Groups rows by adapter.

    Args:
        slots: ``[num_rows]``, the LoRA slot of each row, -1 for none.

    Returns:
        For each slot in use its rows: a slice where they adjoin, else an index tensor.
    """
    runs: dict[int, list[tuple[int, int]]] = {}
    values, counts = torch.unique_consecutive(slots, return_counts=True)
    start = 0
    for slot, count in zip(values.tolist(), counts.tolist(), strict=True):
        if slot >= 0:
            runs.setdefault(slot, []).append((start, start + count))
        start += count
    return [
        (slot, slice(*pieces[0]))
        if len(pieces) == 1
        else (slot, torch.cat([torch.arange(a, b) for a, b in pieces]))
        for slot, pieces in runs.items()
    ]


def has_adapter_rows(wrapper: Any) -> bool:
    """Whether a row of the current batch has an adapter.

    Args:
        wrapper: a ``PunicaWrapperCPU``.
    """
    return bool(getattr(wrapper, "_token_segments", ()))


def know_ranks(manager: Any) -> None:
    """Has a LoRA manager tell the operations the rank of each adapter that it puts into a slot.

    Args:
        manager: a ``LoRAModelManager``.
    """
    activate = require(manager, "activate_adapter")

    def activate_with_rank(int_id: int) -> bool:
        activated = activate(int_id)
        slot = manager.lora_index_to_id.index(int_id)
        rank = _largest_rank(manager.list_adapters()[int_id])
        for wrapper in manager.punica_wrapper_mapping.values():
            wrapper.__dict__.setdefault("slot_ranks", {})[slot] = rank
        return bool(activated)

    manager.activate_adapter = activate_with_rank


def _largest_rank(lora_model: Any) -> int:
    """Of all its matrices: PEFT's ``rank_pattern`` gives some layers another rank than ``r``."""
    return max(
        a.shape[-2]
        for weights in lora_model.loras.values()
        for a in (weights.lora_a if isinstance(weights.lora_a, list) else [weights.lora_a])
        if a is not None
    )


class _SegmentedOps:
    """The methods that replace those of ``PunicaWrapperCPU``; names and arguments are vLLM's."""

    _token_segments: list[Segment]
    _sampler_segments: list[Segment]
    # Rank of the adapter in a slot where it is known: the padding up to the maximum is skipped.
    slot_ranks: dict[int, int]
    # (address of the linear's first stacked A, slot) -> what adds the adapter's product instead.
    slot_products: dict[tuple[int, int], Product]
    # (address of the linear's first stacked A, slot, rank) -> the slot's matrices.
    slot_matrices: dict[tuple[int, int, int], NativeLora]

    def update_metadata(self: Any, *args: Any, **kwargs: Any) -> None:
        _stock_update_metadata(self, *args, **kwargs)
        self._token_segments = segments(self.token_lora_indices)
        self._sampler_segments = segments(self.sampler_indices)

    def _rank(self: Any, slot: int, padded: int) -> int:
        return min(getattr(self, "slot_ranks", {}).get(slot, padded), padded)

    def add_shrink(
        self: Any,
        y: tuple[torch.Tensor, ...] | torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        scale: float,
        **kwargs: Any,
    ) -> None:
        x = x.view(-1, x.shape[-1])
        for slot, rows in self._token_segments:
            for y_i, a in zip(y, lora_a_stacked, strict=False):
                out = torch.matmul(x[rows], _matrix(a, slot).t())
                y_i.view(-1, y_i.shape[-1])[rows, : out.shape[1]] = (out * scale).to(y_i.dtype)

    def add_expand(
        self: Any,
        y: torch.Tensor,
        x: tuple[torch.Tensor, ...] | torch.Tensor,
        lora_b_stacked: tuple[torch.Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        y = y.view(-1, y.shape[-1])
        for slot, rows in self._token_segments:
            offset = offset_start
            for x_i, b, width in zip(x, lora_b_stacked, output_slices, strict=True):
                _expand(y, rows, x_i[rows], _matrix(b, slot), offset, width, add_inputs)
                offset += width

    def add_lora_linear(
        self: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        products = getattr(self, "slot_products", {})
        for slot, rows in self._token_segments:
            add = products.get((lora_a_stacked[0].data_ptr(), slot))
            if add is None:
                rank = self._rank(slot, lora_b_stacked[0].shape[-1])
                slices = (lora_a_stacked, lora_b_stacked, output_slices)
                matrices = _matrices(self, slot, rank, *slices, y.shape[1])
                add = functools.partial(_add_products, matrices, slot, rank, *slices, scale)
            if isinstance(rows, slice):
                add(y, x, rows)
            else:
                y_rows = y[rows]
                add(y_rows, x[rows], None)
                y[rows] = y_rows

    def add_lora_embedding(
        self: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        for slot, rows in self._token_segments:
            b = _matrix(lora_b_stacked, slot)
            _expand(y, rows, x[rows], b, 0, y.shape[-1], add_inputs)

    def add_lora_logits(
        self: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        y = y.view(-1, y.shape[-1])
        x = x.view(-1, x.shape[-1])
        for slot, rows in self._sampler_segments:
            shrunk = torch.matmul(x[rows], _matrix(lora_a_stacked, slot).t()) * scale
            _expand(y, rows, shrunk, _matrix(lora_b_stacked, slot), 0, y.shape[-1], True)


def _matrix(stacked: torch.Tensor, slot: int) -> torch.Tensor:
    """The slot's matrix of ``[max_loras, 1, m, n]`` or ``[max_loras, m, n]``."""
    matrix = stacked[slot]
    return matrix.squeeze(0) if matrix.dim() == 3 else matrix


def _matrices(
    wrapper: Any,
    slot: int,
    rank: int,
    lora_a_stacked: tuple[torch.Tensor, ...],
    lora_b_stacked: tuple[torch.Tensor, ...],
    output_slices: tuple[int, ...],
    width: int,
) -> NativeLora:
    """The slot's matrices in a merged linear that is ``width`` wide."""
    known = wrapper.__dict__.setdefault("slot_matrices", {})
    key = (lora_a_stacked[0].data_ptr(), slot, rank)
    if key not in known:
        b, columns, offset = [], [], 0
        for stacked, size in zip(lora_b_stacked, output_slices, strict=True):
            matrix = _matrix(stacked, slot)
            end = min(offset + min(size, len(matrix)), width)
            b.append(matrix[: end - offset, :rank])
            columns.append((offset, end))
            offset += size
        a = [_matrix(stacked, slot)[:rank] for stacked in lora_a_stacked]
        known[key] = NativeLora(a, b, columns)
    return known[key]


def _add_products(
    matrices: NativeLora,
    slot: int,
    rank: int,
    lora_a_stacked: tuple[torch.Tensor, ...],
    lora_b_stacked: tuple[torch.Tensor, ...],
    output_slices: tuple[int, ...],
    scale: float,
    y: torch.Tensor,
    x: torch.Tensor,
    rows: slice | None,
) -> None:
    """A :data:`Product` of what lies in a slot, whose matrices are ``matrices``."""
    if matrices.add(y, x, scale, rows):
        return
    if rows is not None:
        y, x = y[rows], x[rows]
    offset = 0
    for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
        shrunk = torch.matmul(x, _matrix(a, slot)[:rank].t())
        if scale != 1.0:
            shrunk *= scale
        _expand(y, slice(None), shrunk, _matrix(b, slot)[:, :rank], offset, width, True)
        offset += width


def _expand(
    y: torch.Tensor,
    rows: "slice | torch.Tensor",
    x: torch.Tensor,
    b: torch.Tensor,
    offset: int,
    width: int,
    add_inputs: bool,
) -> None:
    """``y[rows, offset:] (+)= x b^T``; the adapter's and the layer's padding may differ."""
    width = min(width, b.shape[0], y.shape[1] - offset)
    x, b = x.to(y.dtype), b[:width].to(y.dtype)
    columns = slice(offset, offset + width)
    if not add_inputs:
        y[rows, columns] = x @ b.t()
    elif isinstance(rows, slice):
        y[rows, columns].addmm_(x, b.t())
    else:
        y[rows, columns] += x @ b.t()


_METHODS: Iterable[str] = (
    "update_metadata",
    "add_shrink",
    "add_expand",
    "add_lora_linear",
    "add_lora_embedding",
    "add_lora_logits",
)
_stock_update_metadata: Any = None


def apply() -> None:
    """Replaces the methods of ``PunicaWrapperCPU``; once."""
    global _stock_update_metadata
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    if _stock_update_metadata is not None:
        return
    for name in _METHODS:
        require(PunicaWrapperCPU, name)
    _stock_update_metadata = PunicaWrapperCPU.update_metadata
    for name in (*_METHODS, "_rank"):
        setattr(PunicaWrapperCPU, name, getattr(_SegmentedOps, name))
