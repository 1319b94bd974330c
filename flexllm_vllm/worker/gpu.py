"""vLLM's GPU worker, extended. Never run on a GPU so far (README)."""

import torch
from vllm.model_executor.custom_op import CustomOp
from vllm.v1.worker.gpu_worker import Worker

from flexllm_vllm.models.base import Capture
from flexllm_vllm.worker.kv_layout import check_gpu_layout
from flexllm_vllm.worker.mixin import FinetuningWorkerMixin
from flexllm_vllm.worker.side_stream import SideStream


class FinetuningGPUWorker(FinetuningWorkerMixin, Worker):
    """See :class:`FinetuningWorkerMixin`."""

    def _check_kv_layout(self) -> None:
        check_gpu_layout(self.model_runner, self._backward)

    def _build_side_stream(self) -> SideStream | None:
        # Over several ranks the collectives of both would meet in one communicator.
        return SideStream(self.device) if self.parallel_config.tensor_parallel_size == 1 else None

    def _prepare_eager(self, model: torch.nn.Module, capture: Capture) -> None:
        """Under the compiler vLLM's operations are written in torch, to be fused; run eagerly they
        are slower than its own kernels. The graphs exist already and are not concerned."""
        for module in model.modules():
            if isinstance(module, CustomOp):
                module._enforce_enable = True
                module._forward_method = module.dispatch_forward(compile_native=False)
