"""The gated activations of MLPs, by the module of vLLM that computes them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from flexllm_vllm.kernels.geglu import geglu, geglu_backward
from flexllm_vllm.kernels.swiglu import swiglu, swiglu_backward


@dataclass(frozen=True)
class GatedActivation:
    """``[num_tokens, 2 * intermediate_size]`` gate and up -> ``[num_tokens, intermediate_size]``.

    Attributes:
        forward: the activation.
        backward: of its gradient and its input, the gradient of the input, and its value again.
    """

    forward: Callable[[torch.Tensor], torch.Tensor]
    backward: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


_SWIGLU = GatedActivation(swiglu, swiglu_backward)
_GEGLU = GatedActivation(geglu, geglu_backward)


def gated_activation(module: Any) -> GatedActivation:
    """That of vLLM's module.

    Raises:
        ValueError: it is not covered.
    """
    name, form = type(module).__name__, getattr(module, "approximate", None)
    if name == "SiluAndMul":
        return _SWIGLU
    if name == "GeluAndMul" and form == "tanh":
        return _GEGLU
    raise ValueError(f"finetuning does not support the activation {name} ({form}) of this model")


def gated_activation_of(name: str) -> GatedActivation:
    """That of vLLM's experts, by the value of its ``MoEActivation``.

    Raises:
        ValueError: it is not covered.
    """
    found = {"silu": _SWIGLU, "gelu_tanh": _GEGLU}.get(name)
    if found is None:
        raise ValueError(f"finetuning does not support experts with the activation {name}")
    return found
