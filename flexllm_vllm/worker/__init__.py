"""The worker process: vLLM's worker with training inside its iterations.

vLLM finds its classes by their names: ``flexllm_vllm.worker.cpu.FinetuningCPUWorker`` and
``flexllm_vllm.worker.gpu.FinetuningGPUWorker``.
"""
