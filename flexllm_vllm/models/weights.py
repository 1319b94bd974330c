"""The frozen weights of a model, as its backward reads them."""

from collections import OrderedDict
from typing import Any

import torch

from flexllm_vllm.kernels.linear import input_gradient
from flexllm_vllm.models.quantised import check_quantised, dequantised, is_quantised


def unwrapped(module: Any) -> Any:
    """The plain layer below vLLM's LoRA wrapper."""
    return getattr(module, "base_layer", module)


class FrozenWeights:
    """Linears of each decoder layer: forward by inference's own GEMM, and ``dX = dY W``.

    Where a weight exists only in the packed form that inference uses
    (``patches/cpu_linear_weights.py``), or quantised, it is unpacked when a layer is asked for, and
    kept until the backward has moved on: windows of one layer follow each other.

    Args:
        layers: name -> linear of each decoder layer, LoRA wrappers and all.
        num_kept: layers whose unpacked weights are kept; as many as jobs train at once.
    """

    def __init__(self, layers: list[dict[str, Any]], num_kept: int = 1) -> None:
        self._layers = [{name: unwrapped(m) for name, m in layer.items()} for layer in layers]
        self._num_kept = num_kept
        self._unpacked: OrderedDict[tuple[int, str], torch.Tensor] = OrderedDict()

    def check(self, dtype: torch.dtype) -> None:
        """Raises ValueError for a layer whose weight cannot be had in this dtype."""
        for index, layer in enumerate(self._layers):
            for name, module in layer.items():
                if is_quantised(module):
                    check_quantised(module, dtype, f"layer {index} {name}")
                    continue
                if getattr(module, "backward_linear", None) is not None:
                    continue
                packed = getattr(module, "packed_weight", None)
                weight = packed if packed is not None else getattr(module, "weight", None)
                if weight is None or weight.dim() != 2 or weight.dtype != dtype:
                    raise ValueError(
                        f"finetuning needs {dtype} weights; layer {index} {name} was repacked "
                        "without keeping its weight"
                    )

    def project(self, layer: int, name: str, x: torch.Tensor) -> torch.Tensor:
        """``x W^T + b`` of the whole merged linear, adapter not included.

        Of a linear that is sharded along its input, this rank's part of the sum.
        """
        return self._forward(self._layers[layer][name], x)

    @staticmethod
    def _forward(module: Any, x: torch.Tensor) -> torch.Tensor:
        is_partial = getattr(module, "reduce_results", False) and module.tp_rank > 0
        bias = None if is_partial else module.bias
        found: torch.Tensor
        if is_quantised(module):
            found = module.quant_method.apply(module, x, bias)
        elif (linear := getattr(module, "cpu_linear", None)) is not None:
            found = linear(x, module.weight, bias)
        else:
            found = torch.nn.functional.linear(x, module.weight, bias)
        return found

    def first_columns(self, layer: int, name: str, x: torch.Tensor, width: int) -> torch.Tensor:
        """The first columns of :meth:`project`, contiguous."""
        module = self._layers[layer][name]
        if getattr(module, "backward_linear", None) is not None:
            # Packed weights cannot be cut, and all columns take no longer than some by plain ones.
            return self._forward(module, x)[:, :width].contiguous()
        bias = None if module.bias is None else module.bias[:width]
        return torch.nn.functional.linear(x, self._dense(layer, name)[:width], bias)

    def input_gradient(self, layer: int, name: str, dy: torch.Tensor) -> torch.Tensor:
        """``dX = dY W``, ``[num_rows, in_features]``."""
        backward = getattr(self._layers[layer][name], "backward_linear", None)
        if backward is not None:
            found: torch.Tensor = backward(dy)
            return found
        return input_gradient(dy, self._dense(layer, name))

    def _dense(self, layer: int, name: str) -> torch.Tensor:
        """``[out_features, in_features]``, row-major."""
        module = self._layers[layer][name]
        packed = getattr(module, "packed_weight", None)
        if packed is None and not is_quantised(module):
            return module.weight
        found = self._unpacked.get((layer, name))
        if found is None:
            found = dequantised(module) if packed is None else packed.to_dense()
            self._unpacked[layer, name] = found
            while len(self._unpacked) > self._num_kept * len(self._layers[layer]):
                self._unpacked.popitem(last=False)
        else:
            self._unpacked.move_to_end((layer, name))
        return found

    def forget(self) -> None:
        """Frees the unpacked weights: nothing is in training."""
        self._unpacked.clear()
