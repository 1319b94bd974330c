"""The worker process: vLLM's worker with training inside its iterations.

vLLM finds the class by its name, ``flexllm_vllm.worker.FinetuningWorker``.
"""

from flexllm_vllm.worker.worker import FinetuningWorker

__all__ = ["FinetuningWorker"]
