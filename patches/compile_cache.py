"""Compiled graphs are found again whatever the finetuning flags are.

vLLM keeps compiled graphs on disk under a hash of its whole configuration, what plugins put into
``additional_config`` among it: another ``--finetuning-dir`` or latency target would compile the
model anew, which takes minutes on a small machine. Hardly any of it changes a graph. Why a patch:
the hash of ``additional_config`` is taken of all of it.
Fits vLLM 0.32 (``VllmConfig.compute_hash``). Needless once a plugin can say what its part of
``additional_config`` means to the graph.
"""

import copy
import functools
from collections.abc import Collection
from typing import Any

import torch

from flexllm_vllm.patches import require


def apply(key: str, version: int, matters: Collection[str] = ()) -> None:
    """Leaves this key of ``additional_config`` out of the hash; once in a process.

    Args:
        key: what the plugin keeps there.
        version: of the operations that the plugin puts into graphs; takes the key's place.
        matters: names below the key that graphs depend on, which stay in the hash.
    """
    from vllm.config import VllmConfig

    compute = require(VllmConfig, "compute_hash")
    if getattr(compute, "_finetuning", False):
        return

    @functools.wraps(compute)
    def compute_hash(self: Any) -> str:
        others = self.additional_config
        if isinstance(others, dict) and key in others:
            kept = {name: value for name, value in others[key].items() if name in matters}
            others = {**others, key: {**kept, "version": version}}
            self = copy.copy(self)
            self.additional_config = others
        return str(compute(self))

    compute_hash._finetuning = True  # type: ignore[attr-defined]
    VllmConfig.compute_hash = compute_hash


def load_plain_functions() -> None:
    """Has vLLM load the graphs of its CPU back-end, which it saves and then cannot load.

    Those of its own back-end have ``finalize_loading``; the CPU's are functions of inductor's,
    which have nothing to finalize. Without this the model is compiled anew at every start.
    """
    load = require(torch.compiler, "load_compiled_function")
    if getattr(load, "_finetuning", False):
        return

    @functools.wraps(load)
    def load_function(*args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        compiled = loaded._artifacts.compiled_fn
        if not hasattr(compiled, "finalize_loading"):
            compiled.finalize_loading = lambda _: None
        return loaded

    load_function._finetuning = True  # type: ignore[attr-defined]
    torch.compiler.load_compiled_function = load_function
