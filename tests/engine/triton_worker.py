"""A worker on a CPU that trains as one on a GPU does: by the Triton kernels, run in Triton's
interpreter, from a KV cache in the layout of vLLM's GPU back-ends, and with indexed copies."""

import torch

from flexllm_vllm.kernels import triton_support
from flexllm_vllm.worker.cpu import FinetuningCPUWorker


class TritonWorker(FinetuningCPUWorker):
    """:attr:`num_translated` counts how often K and V were read."""

    num_translated = 0

    def _check_kv_layout(self) -> None:
        """The layout is made below."""
        assert triton_support.INTERPRETED

    def _start_trainer(self) -> None:
        super()._start_trainer()
        trainer = self._trainer
        trainer._cache._is_indexed = True
        trainer._lora_slots._uses_masters = False
        decoder = trainer.model._decoder
        kv_cache = decoder.kv_cache
        trainer.model.kv_cache = decoder.kv_cache = lambda i: self._as_on_a_gpu(kv_cache(i))

    def _as_on_a_gpu(self, cache: torch.Tensor) -> torch.Tensor:
        """The layout of ``kernels/triton/paged_attention.py``, from that of a CPU."""
        self.num_translated += 1
        num_blocks, num_heads, block_size, twice = cache.shape
        parts = cache.reshape(num_blocks, num_heads, 2, block_size * (twice // 2))
        key = parts[:, :, 0].view(num_blocks, num_heads, twice // 2, block_size).transpose(2, 3)
        value = parts[:, :, 1].view(num_blocks, num_heads, block_size, twice // 2)
        return torch.cat([key, value], dim=-1)

    def triton_reads(self) -> int:
        return self.num_translated
