"""The flags: declared in a group of their own, turned into vLLM's engine arguments."""

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import Any

from flexllm_vllm.config import (
    ACTIVATION_DTYPES,
    ACTIVATION_POLICIES,
    BASE_WEIGHTS,
    KEY,
    TRACKERS,
    FinetuningConfig,
    default_dir,
)
from flexllm_vllm.cpu_defaults import apply_cpu_defaults, default_dtype
from flexllm_vllm.log import get_logger
from flexllm_vllm.patches import cpu_compilation
from flexllm_vllm.release import check_vllm_release

logger = get_logger(__name__)

SCHEDULER = "flexllm_vllm.scheduler.finetuning_scheduler"
# By vLLM's platform.
WORKERS = {
    "cpu": "flexllm_vllm.worker.cpu.FinetuningCPUWorker",
    "cuda": "flexllm_vllm.worker.gpu.FinetuningGPUWorker",
}
# Finetuning tokens an iteration may hold on a GPU, where a few hundred leave it idle.
GPU_MAX_TOKENS = 1024

# Adapters that can be served beside the base model when the user has not said --max-loras.
SERVED_LORAS = 4
# Seconds that the engine is given to end at SIGTERM. vLLM's own 0 means that it is killed.
SHUTDOWN_TIMEOUT = 15
# Only these layers are wrapped when the user has not enabled LoRA: the logits layer and the
# embedding would cost every decode step something and no job trains them.
TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def add_flags(parser: Any) -> None:
    """Adds the flags to vLLM's parser."""
    group = parser.add_argument_group(
        title="Finetuning",
        description="LoRA finetuning inside the serving iterations (flexllm-vllm).",
    )
    defaults = FinetuningConfig()
    # SUPPRESS: vLLM's help would add a second "(default: None)".
    group.add_argument(
        "--enable-finetuning",
        action="store_true",
        default=False,
        help="Serve /v1/files and /v1/fine_tuning/jobs, and train in the token slots that "
        "inference leaves free.",
    )
    group.add_argument(
        "--finetuning-dir",
        type=Path,
        default=argparse.SUPPRESS,
        help=f"Folder of files, jobs and adapters. (default: {default_dir()})",
    )
    group.add_argument(
        "--finetuning-max-jobs",
        type=int,
        default=argparse.SUPPRESS,
        help=f"Jobs that train at once; others are queued. (default: {defaults.max_jobs})",
    )
    group.add_argument(
        "--finetuning-max-lora-rank",
        type=int,
        default=argparse.SUPPRESS,
        help=f"Largest LoRA rank a job may ask for. (default: {defaults.max_lora_rank})",
    )
    group.add_argument(
        "--finetuning-max-tokens",
        type=int,
        default=argparse.SUPPRESS,
        help="Finetuning tokens an iteration may hold; with inference in it, it holds fewer. "
        f"(default: {defaults.max_tokens}, on a GPU {GPU_MAX_TOKENS})",
    )
    group.add_argument(
        "--finetuning-activation-cache-tokens",
        type=int,
        default=argparse.SUPPRESS,
        help="Tokens whose activations can be kept for their backward; also the longest sequence "
        f"that can be trained. (default: {defaults.activation_cache_tokens})",
    )
    group.add_argument(
        "--finetuning-activation-cache-bytes",
        type=_size,
        default=argparse.SUPPRESS,
        help="The same as a size, such as 2G or 512Mi, in place of the number of tokens.",
    )
    group.add_argument(
        "--finetuning-activation-policy",
        choices=ACTIVATION_POLICIES,
        default=argparse.SUPPRESS,
        help="What is kept of a finetuning token between its forward and its backward: store (no "
        "matrix product is run twice), balanced, or minimal (only the input of each layer). "
        f"(default: {defaults.activation_policy})",
    )
    group.add_argument(
        "--finetuning-activation-dtype",
        choices=ACTIVATION_DTYPES,
        default=argparse.SUPPRESS,
        help="Keeps activations in fewer bits than the model computes with; gradients are then "
        f"approximate. (default: {defaults.activation_dtype}, exact)",
    )
    group.add_argument(
        "--finetuning-base-weights",
        choices=BASE_WEIGHTS,
        default=argparse.SUPPRESS,
        help="On CPU, whether the backward has the linear weights beside the packed form that "
        "inference uses (two-copies), or unpacks them layer by layer (one-copy: less memory, a "
        f"few microseconds more a layer in inference). (default: {defaults.base_weights}: "
        "two-copies for weights below 16 MiB)",
    )
    group.add_argument(
        "--finetuning-tpot-slo-ms",
        type=_target_ms,
        default=argparse.SUPPRESS,
        help="Latency target in milliseconds of an iteration that holds inference, and so of the "
        "time per output token; finetuning takes what fits. (default: auto, 2.5 times what the "
        "iteration takes without finetuning)",
    )
    group.add_argument(
        "--finetuning-ttft-slo-ms",
        type=_target_ms,
        default=argparse.SUPPRESS,
        help="Target in milliseconds of the time to first token: an iteration without inference "
        "takes at most half of it, since a request that arrives waits for its end. (default: auto, "
        "4 times the target of an iteration with inference)",
    )
    group.add_argument(
        "--finetuning-checkpoint-interval-s",
        type=float,
        default=argparse.SUPPRESS,
        help="Seconds of training that a server that is killed may lose: from one checkpoint of a "
        f"running job to the next. (default: {defaults.checkpoint_interval_s:.0f})",
    )
    group.add_argument(
        "--finetuning-keys-file",
        type=Path,
        default=argparse.SUPPRESS,
        help="TOML file of API keys (hashed), each with its organization, role and quotas; files, "
        "jobs and adapters are then an organization's own, and every route with data needs a key. "
        "Read again when it changes.",
    )
    group.add_argument(
        "--finetuning-max-file-bytes",
        type=_size,
        default=argparse.SUPPRESS,
        help="Largest file that is taken, such as 2G or 512Mi. "
        f"(default: {defaults.max_file_bytes >> 20}Mi)",
    )
    group.add_argument(
        "--finetuning-max-files",
        type=int,
        default=argparse.SUPPRESS,
        help=f"Uploaded files that are kept; one more is refused. (default: {defaults.max_files})",
    )
    group.add_argument(
        "--finetuning-max-disk-bytes",
        type=_size,
        default=argparse.SUPPRESS,
        help="Size of --finetuning-dir above which neither files nor jobs are taken, such as 200G. "
        "(default: none; some free space is left on the disk in any case)",
    )
    group.add_argument(
        "--finetuning-max-queued-jobs",
        type=int,
        default=argparse.SUPPRESS,
        help="Jobs that may wait for their start; one more is refused. "
        f"(default: {defaults.max_queued_jobs})",
    )
    group.add_argument(
        "--finetuning-max-examples",
        type=int,
        default=argparse.SUPPRESS,
        help=f"Examples that a file may have. (default: {defaults.max_examples})",
    )
    group.add_argument(
        "--finetuning-webhook-allow-private",
        action="store_true",
        default=argparse.SUPPRESS,
        help="Webhooks may go to private, loopback and link-local addresses, and over http. Anyone "
        "who may create webhook endpoints can then have this server call its own network.",
    )
    group.add_argument(
        "--finetuning-report-to",
        nargs="+",
        choices=TRACKERS,
        default=argparse.SUPPRESS,
        help="Experiment trackers that get the metrics of every job, beside its TensorBoard files. "
        "(default: those that the job asks for in its integrations)",
    )
    group.add_argument(
        "--finetuning-wandb-key-file",
        type=Path,
        default=argparse.SUPPRESS,
        help="File that holds the key for Weights & Biases. (default: WANDB_API_KEY)",
    )


def _target_ms(text: str) -> float | None:
    return None if text == "auto" else float(text)


def _size(text: str) -> int:
    """Bytes of ``512M``, ``512Mi`` or ``512MiB`` (binary), ``512m`` (decimal): vLLM's notation, and
    that of Kubernetes for the binary ones."""
    from vllm.engine.arg_utils import human_readable_int

    return human_readable_int(text.removesuffix("B").removesuffix("i"))


def config_from_args(args: argparse.Namespace) -> FinetuningConfig | None:
    """The configuration that the flags ask for; None without ``--enable-finetuning``.

    Raises:
        ValueError: a value is out of range, or a finetuning flag stands alone.
    """
    prefix = "finetuning_"
    given = {
        name.removeprefix(prefix): value
        for name, value in vars(args).items()
        if name.startswith(prefix) and value is not None
    }
    if not getattr(args, "enable_finetuning", False):
        if given:
            flag = "--" + prefix.replace("_", "-") + next(iter(given)).replace("_", "-")
            raise ValueError(f"{flag} has no effect without --enable-finetuning")
        return None
    if {"activation_cache_tokens", "activation_cache_bytes"} <= given.keys():
        raise ValueError(
            "--finetuning-activation-cache-tokens and --finetuning-activation-cache-bytes say the "
            "same thing; give one of them"
        )
    for name in given.keys() & {"dir", "keys_file", "wandb_key_file"}:
        given[name] = Path(given[name]).expanduser().absolute()
    if "report_to" in given:
        given["report_to"] = tuple(dict.fromkeys(given["report_to"]))
    config = FinetuningConfig(**given)
    if config.keys_file is not None:
        from flexllm_vllm.api.keys import KeyFile

        KeyFile(config.keys_file)  # what is wrong with it is said now, not when the engine is up
    if config.report_to or config.wandb_key_file is not None:
        from flexllm_vllm.api.tracker_access import TrackerAccess

        TrackerAccess(config.report_to, config.wandb_key_file).check()
    return config


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
        "--quantization": (
            engine_args.quantization,
            "the backward needs plain weights",
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
    # Where only some layers have a sliding window vLLM frees the blocks behind it in those alone;
    # the backward has one block table for all.
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


def install() -> None:
    """Wraps vLLM's parser set-up and the step from flags to engine arguments; once.

    General plugins are loaded inside ``AsyncEngineArgs.add_cli_args``, so the flags hang on
    ``EngineArgs.add_cli_args``, which it calls next.
    """
    from vllm.engine.arg_utils import EngineArgs

    if getattr(EngineArgs, "_finetuning_flags", False):
        return
    EngineArgs._finetuning_flags = True
    cpu_compilation.apply_to_platform(lambda c: FinetuningConfig.from_vllm_config(c) is not None)
    add_cli_args = EngineArgs.add_cli_args
    from_cli_args = EngineArgs.from_cli_args.__func__

    @functools.wraps(add_cli_args)
    def add_cli_args_with_finetuning(parser: Any) -> Any:
        parser = add_cli_args(parser)
        add_flags(parser)
        return parser

    @functools.wraps(from_cli_args)
    def from_cli_args_with_finetuning(cls: Any, args: argparse.Namespace) -> Any:
        engine_args = from_cli_args(cls, args)
        config = config_from_args(args)
        if config is not None:
            import vllm
            from vllm import envs
            from vllm.platforms import current_platform

            check_vllm_release(vllm.__version__)
            device = current_platform.device_name
            check_combination(engine_args, args, device, envs.VLLM_USE_RUST_FRONTEND)
            if device != "cpu" and getattr(args, "finetuning_max_tokens", None) is None:
                config = dataclasses.replace(config, max_tokens=GPU_MAX_TOKENS)
            before = dict(vars(engine_args))
            apply_to_engine_args(engine_args, config, device)
            # With several API servers the flags are handed to processes that turn them into engine
            # arguments before any plugin is loaded: they must find our choices in the flags.
            for name, value in vars(engine_args).items():
                if value is not before[name]:
                    setattr(args, name, value)
            if device != "cpu":
                return engine_args
            num_engines = engine_args.data_parallel_size_local or engine_args.data_parallel_size
            apply_cpu_defaults(num_engines * engine_args.tensor_parallel_size)
        return engine_args

    EngineArgs.add_cli_args = staticmethod(add_cli_args_with_finetuning)
    EngineArgs.from_cli_args = classmethod(from_cli_args_with_finetuning)
