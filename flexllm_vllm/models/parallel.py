"""Tensor parallelism as the backward sees it: which rank this is, and the sums over the ranks."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TensorParallel:
    """The tensor-parallel group of this worker.

    What the ranks get from these methods is equal to the bit, so that what they compute from it
    (norms, clipping, AdamW on replicated matrices) stays equal without being exchanged.

    Attributes:
        rank: of this worker in the group.
        size: of the group.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def of_this_worker(cls) -> "TensorParallel":
        """vLLM's group; the engine must have initialised it."""
        from vllm.distributed import (
            get_tensor_model_parallel_rank,
            get_tensor_model_parallel_world_size,
        )

        return cls(get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, by the collective that inference uses; ``x`` may be overwritten.

        Args:
            x: contiguous; a dtype that activations have.
        """
        if self.size == 1:
            return x
        from vllm.distributed import tensor_model_parallel_all_reduce

        found: torch.Tensor = tensor_model_parallel_all_reduce(x)
        return found

    def all_reduce_small(
        self, x: torch.Tensor, op: torch.distributed.ReduceOp.RedOpType
    ) -> torch.Tensor:
        """``x`` reduced over the ranks in place: a few numbers, of any dtype."""
        if self.size > 1:
            torch.distributed.all_reduce(x, op, group=self._group())
        return x

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """``x`` of each rank, in their order; of one shape and dtype."""
        if self.size == 1:
            return [x]
        found = [torch.empty_like(x) for _ in range(self.size)]
        torch.distributed.all_gather(found, x.contiguous(), group=self._group())
        return found

    @staticmethod
    def _group() -> torch.distributed.ProcessGroup:
        from vllm.distributed import get_tp_group

        group: torch.distributed.ProcessGroup = get_tp_group().device_group
        return group
