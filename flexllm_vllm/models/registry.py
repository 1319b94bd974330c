"""Builds the backward of a model."""

import torch

from flexllm_vllm.architectures import check_architecture
from flexllm_vllm.models.base import ModelBackward
from flexllm_vllm.models.llama import LlamaBackward


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
    return LlamaBackward(model, max_jobs, attention_backend)
