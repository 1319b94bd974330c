"""Operations of the compiled graphs on CPU, called without torch's dispatcher.

A graph calls its operations by way of the dispatcher, which looks up what to do for the device and
turns the arguments into its own kind and back before it calls the Python function that does the
work. A decode step has 180 such calls, with adapters 450, each after megabytes of weights have gone
through the caches: without the dispatcher it takes 23.2 ms instead of 24.9, with an adapter 30.6
instead of 34.3 (SmolLM2-135M, 2 cores of a Zen 3, in turn, medians of 7).
Why a patch: a graph looks its operations up at each call (``torch.ops.vllm.name.default``), so that
it is enough to put the function there. Only graphs that exist by then may run so: a tracer needs
the dispatcher, hence :func:`restore`.
Fits torch 2.13 (``OpOverloadPacket`` keeps its overloads as attributes). Needless once vLLM's CPU
build compiles to C++ calls.
"""

from collections.abc import Callable
from typing import Any

import torch

_overloads: dict[tuple[str, str], Any] = {}


def call_directly(namespace: str, **functions: Callable[..., Any]) -> None:
    """Has graphs call these functions.

    Args:
        namespace: of ``torch.ops``.
        functions: by the names of their operations.
    """
    for name, function in functions.items():
        packet = getattr(getattr(torch.ops, namespace), name)
        _overloads.setdefault((namespace, name), packet.default)
        packet.default = function


def restore() -> None:
    """Gives the dispatcher its calls back, before a graph is traced."""
    for (namespace, name), overload in _overloads.items():
        getattr(getattr(torch.ops, namespace), name).default = overload
    _overloads.clear()
