"""Which architectures can be finetuned."""

from collections.abc import Callable
from typing import Any

import torch

from flexllm_vllm.models.base import ModelBackward
from flexllm_vllm.models.llama import LlamaBackward

_FAMILIES: dict[str, Callable[[Any, int, str], ModelBackward]] = {
    "LlamaForCausalLM": LlamaBackward,
    "MistralForCausalLM": LlamaBackward,
    "Qwen2ForCausalLM": LlamaBackward,
    "Qwen3ForCausalLM": LlamaBackward,
    "Phi3ForCausalLM": LlamaBackward,
    "GraniteForCausalLM": LlamaBackward,
    "Gemma2ForCausalLM": LlamaBackward,
    "Gemma3ForCausalLM": LlamaBackward,
    "MixtralForCausalLM": LlamaBackward,
    "Qwen3MoeForCausalLM": LlamaBackward,
}
SUPPORTED_ARCHITECTURES = tuple(_FAMILIES)


def check_architecture(architectures: list[str]) -> None:
    """Raises ValueError for a model that cannot be finetuned."""
    if not any(name in _FAMILIES for name in architectures):
        raise ValueError(
            f"--enable-finetuning does not support the architecture {', '.join(architectures)}; "
            f"supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )


def build_backward(
    model: torch.nn.Module,
    architectures: list[str],
    max_jobs: int = 1,
    attention_backend: str = "native",
) -> ModelBackward:
    """The backward of a loaded vLLM model.

    Args:
        model: vLLM's model.
        architectures: of the model's configuration.
        max_jobs: adapters that train at once.
        attention_backend: one of :data:`flexllm_vllm.config.ATTENTION_BACKENDS`.

    Raises:
        ValueError: the architecture is not supported, or this model of it is not, or the back-end
            does not fit.
    """
    check_architecture(architectures)
    name = next(name for name in architectures if name in _FAMILIES)
    return _FAMILIES[name](model, max_jobs, attention_backend)
