"""torch.compile for LoRA servers on CPU, at no cost to batches without an adapter.

vLLM turns compilation off on CPU as soon as LoRA is enabled, so that a server that merely could
serve an adapter decodes the base model more slowly. Here the model is compiled as if it had no
LoRA: the graph is the one of a server without it. A batch that holds an adapter's row, or whose
activations are captured for finetuning, runs a second graph (``cpu_adapter_graph.py``).
Why a patch: the switch is hard-coded (``CpuPlatform.check_and_update_config``), and the wrapped
layers have no way around their adapter.
Fits vLLM 0.32. Needless once vLLM compiles LoRA on CPU and skips it where no row has an adapter;
``tests/patches`` has a test that fails then.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from flexllm_vllm.kernels.rms_norm import add_rms_norm_, rms_norm
from flexllm_vllm.kernels.swiglu import swiglu
from flexllm_vllm.patches import cpu_adapter_graph, require


def apply_to_platform(applies: Callable[[Any], bool]) -> None:
    """Keeps the compilation mode of servers that finetune; once, before a configuration is built.

    Args:
        applies: whether a ``VllmConfig`` is that of such a server.
    """
    from vllm.platforms.cpu import CpuPlatform

    update = require(CpuPlatform, "check_and_update_config").__func__
    if getattr(update, "_finetuning", False):
        return

    @functools.wraps(update)
    def update_config(cls: Any, vllm_config: Any) -> None:
        if vllm_config.lora_config is None or not applies(vllm_config):
            update(cls, vllm_config)
            return
        lora, vllm_config.lora_config = vllm_config.lora_config, None
        try:
            update(cls, vllm_config)
        finally:
            vllm_config.lora_config = lora

    update_config._finetuning = True  # type: ignore[attr-defined]
    CpuPlatform.check_and_update_config = classmethod(update_config)


def apply_to_layers() -> None:
    """While the model is traced, wrapped layers are the layers they wrap; once, before that."""
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.lora.layers.vocab_parallel_embedding import VocabParallelEmbeddingWithLoRA

    linear = require(BaseLinearLayerWithLoRA, "apply")
    embedding = require(VocabParallelEmbeddingWithLoRA, "forward")
    if getattr(linear, "_finetuning", False):
        return

    @functools.wraps(linear)
    def apply(self: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if torch.compiler.is_compiling():
            y = self.base_layer.quant_method.apply(self.base_layer, x, bias)
            if cpu_adapter_graph.is_traced():
                torch.ops.flexllm_vllm.add_adapters(y, x, self.adapter_path)
            return y
        return linear(self, x, bias)

    @functools.wraps(embedding)
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            y = self.base_layer.forward(x)
            if cpu_adapter_graph.is_traced():
                torch.ops.flexllm_vllm.add_embedding_adapters(y, x, self.adapter_path)
            return y
        return embedding(self, x)

    apply._finetuning = True  # type: ignore[attr-defined]
    BaseLinearLayerWithLoRA.apply = apply
    VocabParallelEmbeddingWithLoRA.forward = forward


def use_fast_operations(model: torch.nn.Module) -> None:
    """For a model that is not compiled (``--enforce-eager``), whose operations may be written in
    torch, to be fused: run eagerly they are slower than those in C++. Of 256 rows vLLM's own SwiGLU
    takes 1.3 ms where ours takes 0.3, and a norm of a few rows waits for threads that it does not
    need. Graphs that exist already are not concerned."""
    from vllm.model_executor.custom_op import CustomOp
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.layernorm import RMSNorm

    for module in model.modules():
        if type(module) is RMSNorm and module.variance_size_override is None:
            module._forward_method = functools.partial(_rms_norm, module)
        elif type(module) is SiluAndMul:
            module._forward_method = _silu_and_mul
        elif isinstance(module, CustomOp) and hasattr(module, "_forward_method"):
            module._forward_method = module.forward_cpu


def _rms_norm(norm: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    """``RMSNorm.forward``; with a residual ``x`` and it are overwritten, as vLLM allows."""
    weight, eps = norm.weight.data, norm.variance_epsilon
    width = x.shape[-1]
    if residual is None:
        return rms_norm(x.reshape(-1, width), weight, eps).view(x.shape)
    add_rms_norm_(x.view(-1, width), residual.view(-1, width), weight, eps)
    return x, residual


def _silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """``SiluAndMul.forward``."""
    return swiglu(x.view(-1, x.shape[-1])).view(*x.shape[:-1], -1)
