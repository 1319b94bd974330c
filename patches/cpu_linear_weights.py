"""Keeps the plain weights of linear layers on CPU.

vLLM packs each weight for oneDNN and drops the original; the backward ``dX = dY W`` and the
recomputation need it. The cost is a second copy of the linear weights.
Why a patch: the call that drops it has no switch (``UnquantizedLinearMethod``).
Fits vLLM 0.32 (``vllm/model_executor/layers/utils.py``; imported at each call, so replacing the
module's function is enough). The family's backward refuses a layer without its weight.
"""

import functools
from typing import Any

from flexllm_vllm.patches import require


def apply() -> None:
    """Makes ``dispatch_cpu_unquantized_gemm`` keep the weight; once."""
    from vllm.model_executor.layers import utils

    dispatch = require(utils, "dispatch_cpu_unquantized_gemm")
    if getattr(dispatch, "_finetuning", False):
        return

    @functools.wraps(dispatch)
    def dispatch_keeping_weight(layer: Any, remove_weight: bool) -> None:
        dispatch(layer, remove_weight=False)

    dispatch_keeping_weight._finetuning = True  # type: ignore[attr-defined]
    utils.dispatch_cpu_unquantized_gemm = dispatch_keeping_weight
