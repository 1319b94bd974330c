"""vLLM's CPU worker, extended."""

import torch
from vllm.v1.worker.cpu_worker import CPUWorker

from flexllm_vllm.config import FinetuningConfig
from flexllm_vllm.kernels import native
from flexllm_vllm.patches import (
    cpu_attention_layout,
    cpu_compilation,
    cpu_linear_weights,
    cpu_lora_ops,
)
from flexllm_vllm.worker.kv_layout import check_cpu_layout
from flexllm_vllm.worker.mixin import FinetuningWorkerMixin


class FinetuningCPUWorker(FinetuningWorkerMixin, CPUWorker):
    """See :class:`FinetuningWorkerMixin`."""

    def _patch_vllm(self, config: FinetuningConfig) -> None:
        cpu_attention_layout.apply()
        cpu_linear_weights.apply({"one-copy": True, "two-copies": False}.get(config.base_weights))
        cpu_lora_ops.apply()
        cpu_compilation.apply_to_layers()
        native.library()  # compiled at the first start on a machine, not during the first job

    def _check_kv_layout(self) -> None:
        check_cpu_layout(self.model_runner, self._backward)

    def _prepare_eager(self, model: torch.nn.Module) -> None:
        cpu_lora_ops.know_ranks(self._lora_manager)
        cpu_compilation.use_fast_operations(model)

    def _needs_eager(self) -> bool:
        """Rows with an adapter too: the compiled graph is that of the base model."""
        if super()._needs_eager():
            return True
        wrappers = self._lora_manager.punica_wrapper_mapping.values()
        return any(cpu_lora_ops.has_adapter_rows(wrapper) for wrapper in wrappers)
