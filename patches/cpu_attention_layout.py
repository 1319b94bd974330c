"""Keeps vLLM's CPU attention off the AMX layout of K and V.

The backward reads K and V back from the paged cache. For bfloat16 on processors with AMX vLLM packs
them for the tile instructions, a layout that the backward does not read; "vec" runs on the same
processors. Only attention is concerned: the linear layers keep using AMX.
Why a patch: the choice has no switch (``_get_attn_isa``).
Fits vLLM 0.32 (``vllm/v1/attention/backends/cpu_attn.py``). The layout is tried when the worker
starts (``worker/kv_layout.py``), so a release that no longer fits is refused there.
"""

import functools
from typing import Any

from flexllm_vllm.patches import require


def apply() -> None:
    """Wraps ``_get_attn_isa``; once."""
    from vllm.v1.attention.backends import cpu_attn

    choose = require(cpu_attn, "_get_attn_isa")
    if getattr(choose, "_finetuning", False):
        return

    @functools.wraps(choose)
    def choose_readable(*args: Any, **kwargs: Any) -> str:
        isa = choose(*args, **kwargs)
        return "vec" if isa == "amx" else isa

    choose_readable._finetuning = True  # type: ignore[attr-defined]
    cpu_attn._get_attn_isa = choose_readable
