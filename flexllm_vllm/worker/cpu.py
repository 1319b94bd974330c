"""vLLM's CPU worker, extended."""

from collections.abc import Callable
from typing import Any

import torch
from vllm.v1.worker.cpu_worker import CPUWorker

from flexllm_vllm.config import KEY, FinetuningConfig
from flexllm_vllm.kernels import native
from flexllm_vllm.models.base import Capture
from flexllm_vllm.patches import (
    compile_cache,
    cpu_adapter_graph,
    cpu_attention_forward,
    cpu_attention_layout,
    cpu_compilation,
    cpu_experts,
    cpu_linear_weights,
    cpu_lora_ops,
    cpu_quantised_lora,
    direct_operations,
    require,
)
from flexllm_vllm.worker.heap import keep_freed_memory
from flexllm_vllm.worker.kv_layout import check_cpu_layout
from flexllm_vllm.worker.mixin import FinetuningWorkerMixin

# Rows of the batch that a graph is traced with; it holds for any number.
GRAPH_ROWS = 32
# Of :class:`FinetuningConfig`: by them a linear is another operation of the graph.
GRAPH_OPTIONS = ("base_weights",)
# To be raised when the graph of an unchanged configuration holds other operations than before.
GRAPH_VERSION = 2


class FinetuningCPUWorker(FinetuningWorkerMixin, CPUWorker):
    """See :class:`FinetuningWorkerMixin`."""

    def _patch_vllm(self, config: FinetuningConfig) -> None:
        direct_operations.restore()  # of another engine of this process
        cpu_attention_layout.apply()
        cpu_attention_forward.apply()
        cpu_linear_weights.apply({"one-copy": True, "two-copies": False}.get(config.base_weights))
        cpu_experts.apply()
        cpu_lora_ops.apply()
        cpu_quantised_lora.apply()
        cpu_compilation.apply_to_layers()
        compile_cache.apply(KEY, GRAPH_VERSION, GRAPH_OPTIONS)
        compile_cache.load_plain_functions()
        native.library()  # compiled at the first start on a machine, not during the first job

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        # Not before: what loading frees, the weights before they were packed, is for the system.
        keep_freed_memory()

    def _check_kv_layout(self) -> None:
        check_cpu_layout(self.model_runner, self._backward)

    def _before_forward(self, *args: Any) -> None:
        super()._before_forward(*args)
        windows = self._plan.forward if self._plan is not None else []
        rows = {window.row_id for window in windows}
        cpu_attention_forward.use_ours(bool(rows) and rows == set(self._num_scheduled_tokens))

    def _prepare_eager(
        self, model: torch.nn.Module, capture: Capture
    ) -> Callable[[bool], object] | None:
        manager, runner = self._lora_manager, self.model_runner
        cpu_lora_ops.know_ranks(manager)
        num_rows = min(GRAPH_ROWS, self.scheduler_config.max_num_batched_tokens)
        graph = cpu_adapter_graph.build(
            model,
            manager.modules,
            self._backward.install_capture,
            capture,
            lambda: runner._dummy_run(num_rows),
        )
        if graph is not None:
            call_operations_directly()
            return graph.select
        cpu_compilation.use_fast_operations(model)
        return None

    def _needs_eager(self) -> bool:
        """Rows with an adapter too: the compiled graph is that of the base model."""
        if super()._needs_eager():
            return True
        wrappers = self._lora_manager.punica_wrapper_mapping.values()
        return any(cpu_lora_ops.has_adapter_rows(wrapper) for wrapper in wrappers)


def call_operations_directly() -> None:
    """Has the compiled graphs do so from now on, when both exist."""
    from vllm.model_executor.layers.attention import attention

    direct_operations.call_directly(
        "flexllm_vllm",
        packed_linear=cpu_linear_weights.packed_linear,
        add_adapters=cpu_adapter_graph.add_adapters,
        capture=cpu_adapter_graph.hand_over,
    )
    names = ("unified_attention_with_output", "unified_kv_cache_update")
    direct_operations.call_directly("vllm", **{name: require(attention, name) for name in names})
