"""The engine process: vLLM's scheduler with finetuning work added to its iterations.

vLLM finds the class by its name, ``flexllm_vllm.scheduler.FinetuningScheduler``.
"""

from flexllm_vllm.scheduler.scheduler import FinetuningScheduler

__all__ = ["FinetuningScheduler"]
