"""Mixtures of experts on CPU beside LoRA: the kernels that vLLM has for them.

Where LoRA is enabled vLLM computes experts by Triton, in case an adapter covers them, and on a CPU
there is no Triton. Adapters in training cover the attention alone, and the experts are not wrapped
(``lora_target_modules``), so that the kernels without LoRA do. Where a user has them wrapped all
the same, vLLM's wrapper says that its CPU kernels have no LoRA.
Why a patch: what chooses the kernel asks the configuration whether LoRA is enabled at all.
Fits vLLM 0.32 (``vllm/model_executor/layers/fused_moe/unquantized_fused_moe_method.py``); raises
there if the choice is gone.
"""

from typing import Any

from flexllm_vllm.patches import require

_stock: Any = None


def apply() -> None:
    """Replaces ``select_unquantized_moe_backend``."""
    global _stock
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as module

    if _stock is None:
        _stock = require(module, "select_unquantized_moe_backend")
        module.select_unquantized_moe_backend = _select


def _select(moe_config: Any) -> Any:
    moe_config.is_lora_enabled = False
    return _stock(moe_config)
