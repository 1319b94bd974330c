"""The weights of linear layers on CPU, so that inference and the backward can both use them.

vLLM packs each weight for oneDNN and drops the original, which the backward ``dX = dY W`` needs,
and the packed form of vLLM's own operation cannot be read: neither back, nor by a kernel of ours
that is faster for a few rows. So float32 weights are packed by torch's oneDNN operation instead,
which runs the same GEMM (:class:`PackedLinear`). Then per layer:

- *two copies*: the weight is kept for the backward as well, as it is or, where oneDNN runs that
  GEMM, packed for it (``layer.backward_linear``; of 64, 220 and 511 rows a decoder layer's four
  products take 2.5, 7.5 and 17.2 ms on 2 cores of a Zen 4, and 2.9, 8.5 and 20.1 from the plain
  weight). Of bfloat16 inference keeps vLLM's packed form.
- *one copy*: the packed weight (``layer.packed_weight``) is unpacked, one decoder layer at a time,
  when the backward gets there (0.2 ms for 7 MB).

Hence the default: one copy where the weight has ``ONE_COPY_BYTES`` or more.
Why a patch: the call that drops the original has no switch (``UnquantizedLinearMethod``).
Fits vLLM 0.32 (``vllm/model_executor/layers/utils.py``; imported at each call, so replacing the
module's function is enough). The family's backward refuses a layer without its weight.
"""

import functools
from typing import Any

import torch

from flexllm_vllm.kernels.linear import prefers_packed
from flexllm_vllm.kernels.packed_linear import PackedLinear, can_pack
from flexllm_vllm.patches import require

# Two copies are the faster ones for the backward, and of small weights the memory does not matter.
ONE_COPY_BYTES = 16 << 20

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
    one_copy = remove_weight and _wants_one_copy(weight)
    if not can_pack(weight) or not (one_copy or weight.dtype == torch.float32):
        _stock(layer, remove_weight=False)
        return
    linear = PackedLinear(weight)
    layer.cpu_linear = functools.partial(_linear, len(_packed), linear.out_features)
    _packed.append(linear)
    if not remove_weight:
        return
    if one_copy:
        layer.packed_weight = linear.packed
    elif prefers_packed():
        layer.backward_linear = PackedLinear(weight.t().contiguous())
    else:
        return
    layer.weight = torch.nn.Parameter(weight.new_empty(0), requires_grad=False)


# By their number: the compiler can trace neither packed weights nor the operation on them, so that
# the operation is hidden in one of our own, which takes the number.
_packed: list[PackedLinear] = []


def _linear(
    number: int, width: int, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return torch.ops.flexllm_vllm.packed_linear(x, bias, number, width)


def packed_linear(
    x: torch.Tensor, bias: torch.Tensor | None, number: int, width: int
) -> torch.Tensor:
    """The operation of that name: the linear with this number."""
    return _packed[number](x, bias)


def _packed_linear_shape(
    x: torch.Tensor, bias: torch.Tensor | None, number: int, width: int
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], width))


_library = torch.library.Library("flexllm_vllm", "FRAGMENT")
_library.define("packed_linear(Tensor x, Tensor? bias, int number, int width) -> Tensor")
_library.impl("packed_linear", packed_linear, "CPU")
_library._register_fake("packed_linear", _packed_linear_shape)


def _wants_one_copy(weight: torch.Tensor) -> bool:
    return weight.nbytes >= ONE_COPY_BYTES if _one_copy is None else _one_copy
