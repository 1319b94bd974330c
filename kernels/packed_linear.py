"""Linear layers whose weight oneDNN has packed, and a kernel of ours that reads it as it is packed.

A decode step multiplies a few rows by each weight: how fast memory is read is all that counts, and
there oneDNN leaves a third of it. ``cpu/few_rows.cpp`` reads the weight at four places at once. All
linears of SmolLM2-135M's layers (424 MB) on two cores of an EPYC (Zen 3, AVX2), ours and vLLM's
operation of oneDNN in turn, medians of 13:

====  ============  ======
rows  oneDNN, vLLM  ours
====  ============  ======
1     20.5 ms       12.7
8     30.4 ms       20.8
16    40.0 ms       32.7
32    59.4 ms       51.4
64    109 ms        98
96    153 ms        147
128   201 ms        205
====  ============  ======
"""

import ctypes
from typing import Any

import torch

from flexllm_vllm.kernels import native

# Rows beyond which oneDNN is as fast, by the floats of a vector: with AVX-512, where it is faster
# and ours was not measured, what a decode step has.
_FEW_ROWS = {8: 96}
_FEW_ROWS_ELSE = 16
# Of a packed weight: outputs of a block, and what the number of inputs is rounded up to.
_BLOCK = 64
_INNER_STEP = 16


class PackedLinear:
    """``x W^T + b``.

    Args:
        weight: ``[out_features, in_features]``, float32 or bfloat16; it is copied.

    Attributes:
        packed: an opaque tensor of oneDNN's.
        few_rows: so many are multiplied by our kernel.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        self._inner = 0
        self._kernel: Any = None
        self.few_rows = 0
        if weight.dtype == torch.float32 and _is_in_blocks(self.packed, weight):
            self._kernel = native.function("few_rows")
            self._address = torch.ops.mkldnn.data_ptr(self.packed)
            self._inner = _round_up(self.in_features, _INNER_STEP)
            if self._kernel is not None:
                self.few_rows = _FEW_ROWS.get(native.lanes(), _FEW_ROWS_ELSE)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Args:
            x: ``[num_rows, in_features]`` in the dtype of the weight.
            bias: ``[out_features]``.

        Returns:
            ``[num_rows, out_features]``.
        """
        # Called 120 times in a decode step: each microsecond here counts.
        if not 0 < len(x) <= self.few_rows or x.dim() != 2 or x.stride(1) != 1:
            return self._by_onednn(x, bias)
        y = x.new_empty(len(x), self.out_features)
        self._kernel(
            0, x.data_ptr(), x.stride(0), len(x), self._address, self.in_features, self._inner,
            self.out_features, None if bias is None else bias.data_ptr(), y.data_ptr(),
            self.out_features,
        )  # fmt: skip
        return y

    def _by_onednn(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(
            x, self.packed, bias, "none", [], ""
        )
        return found


def can_pack(weight: torch.Tensor) -> bool:
    """Whether torch has oneDNN here, and that takes such a weight."""
    return (
        not weight.is_meta
        and weight.device.type == "cpu"
        and weight.ndim == 2
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and (weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and _has_bfloat16()))
    )


def _has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _is_in_blocks(packed: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a weight was packed as ``few_rows.cpp`` reads it: oneDNN is free to choose."""
    operations = torch.ops.mkldnn
    if not (hasattr(operations, "data_ptr") and hasattr(operations, "_nbytes")):
        return False
    outer, inner = weight.shape
    shape = (-(-outer // _BLOCK), _round_up(inner, _INNER_STEP), _BLOCK)
    size = shape[0] * shape[1] * shape[2]
    if operations._nbytes(packed) != 4 * size:
        return False
    memory = (ctypes.c_float * size).from_address(operations.data_ptr(packed))
    blocks = torch.frombuffer(memory, dtype=torch.float32).view(shape)
    # Not all of them: a copy of the whole weight may be gigabytes.
    for number in {0, shape[0] // 2, shape[0] - 1}:
        rows = weight[number * _BLOCK : (number + 1) * _BLOCK]
        expected = torch.nn.functional.pad(rows, (0, shape[1] - inner, 0, _BLOCK - len(rows)))
        if not torch.equal(blocks[number], expected.t()):
            return False
    return True


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
