"""The engine process: vLLM's scheduler with finetuning work added to its iterations.

vLLM finds it by a name, ``flexllm_vllm.scheduler.finetuning_scheduler``.
"""

from flexllm_vllm.scheduler.scheduler import (
    AsyncFinetuningScheduler,
    FinetuningScheduler,
    finetuning_scheduler,
)

__all__ = ["AsyncFinetuningScheduler", "FinetuningScheduler", "finetuning_scheduler"]
