"""LoRA on CPU beside linears in 8 bits.

vLLM's wrapper asks a linear's weight for its device. Where the weights have 8 bits the CPU keeps
them in an object of oneDNN's, and ``weight`` is None: no server with LoRA starts.
Why a patch: the wrapper asks in its constructor, by a function of its own module.
Fits vLLM 0.32 (``vllm/lora/layers/base_linear.py``); raises there if the function is gone.
"""

from typing import Any

import torch

from flexllm_vllm.patches import require

_stock: Any = None


def apply() -> None:
    """Replaces ``_get_lora_device`` as linears see it."""
    global _stock
    from vllm.lora.layers import base_linear as module

    if _stock is None:
        _stock = require(module, "_get_lora_device")
        module._get_lora_device = _device


def _device(base_layer: Any) -> Any:
    if getattr(base_layer, "weight", base_layer) is None:
        return torch.device("cpu")
    return _stock(base_layer)
