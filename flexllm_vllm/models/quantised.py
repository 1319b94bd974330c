"""Quantised linears of vLLM's, whatever the method: what their weight is.

Each method stores its weights its own way, repacked for its kernel at that. All have one operation
in common, ``x W^T``, and its product with the identity is ``W^T``: what the forward multiplies by.
That costs as much as ``in_features`` tokens of the layer's forward, once for each layer of a pack.
"""

from typing import Any

import torch

# Rows of the identity that are multiplied at once.
ROWS = 512
# Of a method that rounds its inputs too: how far from proportional a product may be.
TOLERANCE = 0.02


def is_quantised(module: Any) -> bool:
    """Whether a linear of vLLM's has other weights than plain ones."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    method = getattr(module, "quant_method", None)
    return method is not None and not isinstance(method, UnquantizedLinearMethod)


def dequantised(module: Any) -> torch.Tensor:
    """``[out_features, in_features]``, row-major, in the dtype of the activations."""
    size = int(module.input_size_per_partition)
    dtype, device = module.params_dtype, _device(module)
    weight: torch.Tensor | None = None
    for first in range(0, size, ROWS):
        end = min(first + ROWS, size)
        rows = torch.zeros(end - first, size, dtype=dtype, device=device)
        rows[:, first:end].fill_diagonal_(1.0)
        columns = module.quant_method.apply(module, rows, None)
        if weight is None:
            weight = columns.new_empty(columns.shape[1], size)
        weight[:, first:end] = columns.t()
    assert weight is not None
    return weight


def check_quantised(module: Any, dtype: torch.dtype, where: str) -> None:
    """Whether :func:`dequantised` finds what the forward multiplies by.

    Methods that round their inputs by a scale of each row do so exactly for rows of the identity.
    Those with one scale for all inputs do not.

    Raises:
        ValueError: it does not.
    """
    method = getattr(module, "scheme", module.quant_method)
    size = int(module.input_size_per_partition)
    rows = torch.zeros(2, size, dtype=dtype, device=_device(module))
    rows[0, 0], rows[1, 0] = 1.0, 0.375
    try:
        one, part = module.quant_method.apply(module, rows, None).float()
    except Exception as error:
        raise ValueError(
            f"finetuning does not support the quantisation {type(method).__name__} of {where}: "
            f"{error}"
        ) from error
    # So written that NaN is refused as well.
    if not (part - 0.375 * one).abs().max() <= TOLERANCE * one.abs().max():
        raise ValueError(
            f"finetuning does not support the quantisation {type(method).__name__} of {where}: it "
            "rounds its inputs by one scale for all of them"
        )


def _device(module: Any) -> torch.device:
    return next(module.parameters()).device
