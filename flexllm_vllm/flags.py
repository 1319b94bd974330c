"""The flags: declared in a group of their own, turned into the configuration."""

import argparse
from pathlib import Path
from typing import Any

from flexllm_vllm.config import (
    ACTIVATION_DTYPES,
    ACTIVATION_POLICIES,
    ATTENTION_BACKENDS,
    BASE_WEIGHTS,
    TRACKERS,
    FinetuningConfig,
    default_dir,
)

# Finetuning tokens an iteration may hold on a GPU, where a few hundred leave it idle.
GPU_MAX_TOKENS = 1024


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
        "--finetuning-attention-backend",
        choices=ATTENTION_BACKENDS,
        default=argparse.SUPPRESS,
        help="On GPU, whose kernels run the backward of attention: native (ours, on the paged KV "
        "cache) or xformers (which has to be installed; K and V are gathered for it). (default: "
        f"{defaults.attention_backend})",
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
