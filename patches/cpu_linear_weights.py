"""The weights of linear layers on CPU, so that inference and the backward can both use them.

vLLM packs each weight for oneDNN and drops the original, which the backward ``dX = dY W`` needs,
and the packed form of vLLM's own operation cannot be read back. Two ways out, per layer:

- *two copies*: beside vLLM's packed form the weight is kept for the backward, as it is or, where
  oneDNN runs that GEMM, packed for it (``layer.backward_linear``; of 64, 220 and 511 rows a decoder
  layer's four products take 2.5, 7.5 and 17.2 ms on 2 cores of a Zen 4, and 2.9, 8.5 and 20.1 from
  the plain weight).
- *one copy*: the weight is packed by torch's oneDNN operation instead, which runs the same GEMM and
  can be unpacked, one decoder layer at a time, when the backward gets there (0.2 ms for 7 MB). It
  stays in ``layer.packed_weight``. Its
  call costs 8 us more than vLLM's: 10% of a decode step for such a small layer, nothing for one
  of a billion parameters.

Hence the default: one copy where the weight has ``ONE_COPY_BYTES`` or more.
Why a patch: the call that drops the original has no switch (``UnquantizedLinearMethod``).
Fits vLLM 0.32 (``vllm/model_executor/layers/utils.py``; imported at each call, so replacing the
module's function is enough). The family's backward refuses a layer without its weight.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from flexllm_vllm.kernels.linear import prefers_packed
from flexllm_vllm.patches import require

# A call on such a weight takes 0.8 ms at 20 GB/s: 8 us are one per cent of it.
ONE_COPY_BYTES = 16 << 20

# Numbers of rows that a packed weight is ready for at once: vLLM's own figure.
_PRIMITIVES = 32

_stock: Any = None
_one_copy: bool | None = None


def apply(one_copy: bool | None = None) -> None:
    """Replaces ``dispatch_cpu_unquantized_gemm``.

    Args:
        one_copy: for all layers; None for the default by size.
    """
    global _stock, _one_copy
    from vllm.model_executor.layers import utils

    _one_copy = one_copy
    if _stock is None:
        _stock = require(utils, "dispatch_cpu_unquantized_gemm")
        utils.dispatch_cpu_unquantized_gemm = _dispatch


def _dispatch(layer: torch.nn.Module, remove_weight: bool) -> None:
    weight = layer.weight
    if not (remove_weight and _can_pack(weight)):
        _stock(layer, remove_weight=False)
        return
    if not _wants_one_copy(weight):
        _stock(layer, remove_weight=False)
        layer.backward_linear = _packed_for_backward(weight.detach())
        if layer.backward_linear is not None:
            layer.weight = torch.nn.Parameter(weight.new_empty(0), requires_grad=False)
        return
    layer.packed_weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    layer.cpu_linear = functools.partial(_linear, len(_packed), weight.shape[0])
    _packed.append(layer.packed_weight)
    layer.weight = torch.nn.Parameter(weight.new_empty(0), requires_grad=False)


def _packed_for_backward(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """``dy -> dy @ weight`` with a weight of its own; None where the plain one is as fast."""
    from vllm import _custom_ops as ops

    # Of bfloat16, and on Intel's processors, nothing was measured that speaks for it.
    if weight.dtype != torch.float32 or not (ops._supports_onednn and prefers_packed()):
        return None
    try:
        handler = ops.create_onednn_mm(weight.contiguous(), _PRIMITIVES)
    except RuntimeError:  # as vLLM's own dispatch
        return None
    return lambda dy: ops.onednn_mm(handler, dy, None)


# Packed weights by their number. The compiler can trace neither them nor the operation on them, so
# that the operation is hidden in one of our own, which takes the number.
_packed: list[torch.Tensor] = []


def _linear(
    number: int, width: int, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return torch.ops.flexllm_vllm.packed_linear(x, bias, number, width)


def _packed_linear(
    x: torch.Tensor, bias: torch.Tensor | None, number: int, width: int
) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, _packed[number], bias, "none", [], "")


def _packed_linear_shape(
    x: torch.Tensor, bias: torch.Tensor | None, number: int, width: int
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], width))


_library = torch.library.Library("flexllm_vllm", "FRAGMENT")
_library.define("packed_linear(Tensor x, Tensor? bias, int number, int width) -> Tensor")
_library.impl("packed_linear", _packed_linear, "CPU")
_library._register_fake("packed_linear", _packed_linear_shape)


def _wants_one_copy(weight: torch.Tensor) -> bool:
    return weight.nbytes >= ONE_COPY_BYTES if _one_copy is None else _one_copy


def _can_pack(weight: torch.Tensor) -> bool:
    return (
        not weight.is_meta
        and weight.ndim == 2
        and weight.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )
