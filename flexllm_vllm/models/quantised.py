"""Quantised linears of vLLM's, whatever the method: what their weight is.

Each method stores its weights its own way, repacked for its kernel at that. All have one operation
in common, ``x W^T``, and its product with the identity is ``W^T``: what the forward multiplies by.
That costs as much as ``in_features`` tokens of the layer's forward, once for each layer of a pack.
"""

from typing import Any

import torch

# Rows of the identity that are multiplied at once.
ROWS = 512
# How far from proportional the products of a method that rounds its inputs may be.
TOLERANCE = 0.02


def is_quantised(module: Any) -> bool:
    """Whether a linear of vLLM's has other weights than plain ones."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    method = getattr(module, "quant_method", None)
    return method is not None and not isinstance(method, UnquantizedLinearMethod)


def dequantised(module: Any) -> torch.Tensor:
    """``[out_features, in_features]``, row-major, in the dtype of the activations."""
    size, unit = int(module.input_size_per_partition), _unit(module)
    weight: torch.Tensor | None = None
    for first in range(0, size, ROWS):
        end = min(first + ROWS, size)
        rows = torch.zeros(end - first, size, dtype=module.params_dtype, device=_device(module))
        rows[:, first:end].fill_diagonal_(unit)
        columns = module.quant_method.apply(module, rows, None)
        if weight is None:
            weight = columns.new_empty(columns.shape[1], size)
        weight[:, first:end] = columns.t() / unit
    assert weight is not None
    return weight


def check_quantised(module: Any, dtype: torch.dtype, where: str) -> None:
    """Whether :func:`dequantised` finds what the forward multiplies by.

    Methods that round their inputs too do so exactly for rows of the identity where the scale is
    that of the inputs at hand, or one that is known (:func:`_unit`). With another one the product
    of a number three times as large is not three times as large.

    Raises:
        ValueError: it does not.
    """
    method = getattr(module, "scheme", module.quant_method)
    refusal = f"finetuning does not support the quantisation {type(method).__name__} of {where}: "
    try:
        one, three = (
            module.quant_method.apply(module, _first_of_identity(module, dtype, times), None)
            for times in (1, 3)
        )
    except Exception as error:
        raise ValueError(f"{refusal}{error}") from error
    # So written that NaN is refused as well.
    if not (three.float() - 3 * one.float()).abs().max() <= TOLERANCE * three.float().abs().max():
        raise ValueError(f"{refusal}it rounds its inputs by a scale that cannot be told")


def _first_of_identity(module: Any, dtype: torch.dtype, times: int) -> torch.Tensor:
    row = torch.zeros(1, int(module.input_size_per_partition), dtype=dtype, device=_device(module))
    row[0, 0] = times * _unit(module)
    return row


def _unit(module: Any) -> float:
    """What is multiplied in place of one: a number that rounding leaves as it is.

    Methods with one scale for all inputs, read from the checkpoint, keep it as ``input_scale``.
    """
    scale = getattr(module, "input_scale", None)
    return 1.0 if scale is None else float(scale.max())


def _device(module: Any) -> torch.device:
    return next(module.parameters()).device
