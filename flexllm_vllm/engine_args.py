"""What finetuning asks of vLLM's engine arguments, and what of them it cannot work with."""

import argparse
from typing import Any

from flexllm_vllm.config import KEY, FinetuningConfig
from flexllm_vllm.cpu_defaults import default_dtype
from flexllm_vllm.log import get_logger

logger = get_logger(__name__)

SCHEDULER = "flexllm_vllm.scheduler.finetuning_scheduler"
# By vLLM's platform.
WORKERS = {
    "cpu": "flexllm_vllm.worker.cpu.FinetuningCPUWorker",
    "cuda": "flexllm_vllm.worker.gpu.FinetuningGPUWorker",
}

# Adapters that can be served beside the base model when the user has not said --max-loras.
SERVED_LORAS = 4
# Seconds that the engine is given to end at SIGTERM. vLLM's own 0 means that it is killed.
SHUTDOWN_TIMEOUT = 15
# Only these layers are wrapped when the user has not enabled LoRA: the logits layer and the
# embedding would cost every decode step something and no job trains them.
TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def check_combination(
    engine_args: Any, args: argparse.Namespace, device: str, rust_frontend: bool = False
) -> None:
    """Refuses what finetuning cannot work with, naming it.

    Args:
        engine_args: vLLM's ``EngineArgs``, as the user's flags made them.
        args: the parsed flags.
        device: vLLM's platform, ``"cpu"`` or another.
        rust_frontend: whether vLLM serves HTTP by its Rust program.
    """
    conflicts = {
        "--scheduler-cls": (
            engine_args.scheduler_cls not in (None, SCHEDULER),
            "finetuning brings its own scheduler",
        ),
        "--worker-cls": (
            engine_args.worker_cls not in ("auto", None, *WORKERS.values()),
            "finetuning brings its own worker",
        ),
        "--headless": (getattr(args, "headless", False), "it has no API server"),
        "--grpc": (getattr(args, "grpc", False), "the gRPC server has no finetuning API"),
        "VLLM_USE_RUST_FRONTEND": (
            rust_frontend,
            "the Rust front-end has no routes in Python, and so no finetuning API",
        ),
        "--pipeline-parallel-size": (
            engine_args.pipeline_parallel_size > 1,
            "training over several pipeline stages is not supported yet",
        ),
        "--distributed-executor-backend": (
            engine_args.distributed_executor_backend not in (None, "mp", "uni"),
            "finetuning runs with vLLM's own worker processes only (mp)",
        ),
        "--fully-sharded-loras": (
            engine_args.fully_sharded_loras and engine_args.tensor_parallel_size > 1,
            "adapters in training are sharded as vLLM shards them without it",
        ),
        "--decode-context-parallel-size": (
            engine_args.decode_context_parallel_size > 1,
            "the backward needs all of a sequence's K and V on each rank",
        ),
        "--speculative-config": (
            engine_args.speculative_config,
            "draft tokens and finetuning rows do not share a batch yet",
        ),
        "--no-disable-hybrid-kv-cache-manager": (
            engine_args.disable_hybrid_kv_cache_manager is False,
            "where only some layers have a sliding window vLLM frees the blocks behind it in those "
            "alone; the backward has one block table for all",
        ),
        "--kv-transfer-config": (
            engine_args.kv_transfer_config,
            "a KV connector would see the finetuning rows",
        ),
        "--kv-cache-dtype": (
            engine_args.kv_cache_dtype not in ("auto", None) and engine_args.kv_cache_dtype,
            "the backward reads K and V back in the model's dtype",
        ),
    }
    if device == "cpu":
        conflicts["--finetuning-attention-backend xformers"] = (
            getattr(args, "finetuning_attention_backend", None) == "xformers",
            "xformers has no kernels for CPUs",
        )
    for flag, (given, reason) in conflicts.items():
        if given:
            raise ValueError(f"--enable-finetuning cannot be used with {flag}: {reason}")
    if device not in WORKERS:
        raise ValueError(
            f"--enable-finetuning runs on CPU and on CUDA, and vLLM's platform here is {device}"
        )


def apply_to_engine_args(engine_args: Any, config: FinetuningConfig, device: str = "cpu") -> None:
    """Sets scheduler, worker and LoRA of vLLM's ``EngineArgs``, keeping what the user chose.

    Args:
        engine_args: of vLLM.
        config: of finetuning.
        device: vLLM's platform, one of :data:`WORKERS`.
    """
    if not engine_args.enable_lora:
        engine_args.enable_lora = True
        engine_args.max_loras = max(engine_args.max_loras, SERVED_LORAS)
        engine_args.max_lora_rank = config.max_lora_rank
        engine_args.lora_target_modules = engine_args.lora_target_modules or TARGETS
    elif engine_args.max_lora_rank < config.max_lora_rank:
        logger.info(
            "--max-lora-rank is raised from %d to %d, the rank that finetuning jobs may have",
            engine_args.max_lora_rank,
            config.max_lora_rank,
        )
        engine_args.max_lora_rank = config.max_lora_rank
    # For vLLM the flag is open; one who insists on the other setting is refused above.
    engine_args.disable_hybrid_kv_cache_manager = True
    engine_args.scheduler_cls = SCHEDULER
    engine_args.worker_cls = WORKERS[device]
    engine_args.shutdown_timeout = engine_args.shutdown_timeout or SHUTDOWN_TIMEOUT
    engine_args.additional_config = {
        **(engine_args.additional_config or {}),
        KEY: config.to_dict(),
    }
    is_cpu = device == "cpu"
    if is_cpu and engine_args.dtype == "auto" and (dtype := default_dtype()) is not None:
        engine_args.dtype = dtype
    if not is_cpu:
        logger.warning(
            "finetuning on a GPU is experimental: this release was tested on CPUs alone, its "
            "kernels in Triton's interpreter"
        )
    logger.info("Finetuning is on; files, jobs and adapters are kept in %s", config.dir)
